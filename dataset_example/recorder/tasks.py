"""Scripted motions: what the robot does next, the instruction that names it, and whether it came true.

An episode's main task comes first, and once more if it failed; afterwards the robot keeps moving things until time is
up, so that something moves, hides or reappears most of the time. Directions are the robot's: left is +y, forward
is +x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from persistworld_cli.policies.bundled_world.rules import (
    DIRECTIONS,
    EXTERIOR_VIEWS,
    Condition,
    Task,
    instruction,
)

from .design import Design
from .robot import Waypoint
from .scene import ObjectSpec

LEAN = np.pi - 0.22  # roll of the flange at work
YAW = np.pi / 2
UP = np.array([0.0, 0.0, 1.0])
PUSH_HEIGHT = 0.035
FINGER_BELOW = 0.03  # m that must stay free under the finger point while travelling


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Objects at one moment: positions (3, 3) m and rotation matrices (3, 3, 3); the finger point (3,) m."""

    positions: np.ndarray
    rotations: np.ndarray
    tcp: np.ndarray


class Director:
    """Chooses scripts for one episode, from the state of the world and its own random stream.

    `task` is the main task, chosen on the first call of `next_script`; `success` is whether its condition held when its
    script ended.
    """

    def __init__(self, objects: tuple[ObjectSpec, ...], rng: np.random.Generator, design: Design) -> None:
        self.objects = objects
        self.rng = rng
        self.motion = design.motion
        self._azimuths = [math.radians(azimuth) for azimuth, _, _ in EXTERIOR_VIEWS.values()]
        self._low, self._high = np.array(design.work_low), np.array(design.work_high)
        self._push_low, self._push_high = np.array(design.push_low), np.array(design.push_high)
        self.task: Task | None = None
        self.success = False
        self._tries = 0
        self._condition: Condition | None = None
        self._last = -1

    @property
    def instruction(self) -> str:
        return instruction(self.task, [item.name for item in self.objects])

    def next_script(self, now: Snapshot) -> list[Waypoint]:
        """Waypoints of the next motion; never empty."""
        script = self._main(now) or self._filler(now)
        return self._over(now, now.tcp, script[0], FINGER_BELOW, None) + script

    def judge(self, now: Snapshot) -> None:
        """Decides `success` while the main task is the latest motion; later motions do not change it."""
        if self._tries in (1, 2) and not self.success:
            self.success = bool(self._condition.holds(now.positions[None], now.tcp[None])[0] == 1)

    def _main(self, now: Snapshot) -> list[Waypoint]:
        """The main task's script: first of all, and once more if it failed."""
        if self.task is None:
            script = []
            while not script:
                self.task = self._choose_task()
                script = self._script_for(self.task, now)
            half = np.array([item.half for item in self.objects])
            self._condition = Condition(self.task, half, now.positions)
            self._tries = 1
            return script
        self.judge(now)
        if self._tries == 1 and not self.success:
            self._tries = 2
            return self._script_for(self.task, now)
        self._tries = 3
        return []

    # What to do -----------------------------------------------------------------------------------------------------

    def _choose_task(self) -> Task:
        small = int(self.rng.integers(2))
        kind = self.rng.choice(["pick", "push", "stack", "reach"], p=self.motion.tasks)
        if kind == "stack":
            return Task("stack", small, onto=2)
        if kind == "reach":
            return Task("reach", int(self.rng.integers(3)))
        target = small if kind == "pick" or self.rng.random() < 0.3 else 2
        place = np.array(self.objects[target].position)
        room = {name: self._room(place, way) for name, way in DIRECTIONS.items()}
        names = [name for name, space in room.items() if space > 0.09] or [max(room, key=room.get)]
        return Task(str(kind), target, str(self.rng.choice(names)))

    def _script_for(self, task: Task, now: Snapshot) -> list[Waypoint]:
        if task.kind == "pick":
            way = DIRECTIONS[task.direction]
            spot = self._free_spot(now, task.target, lambda p: (p - now.positions[task.target][:2]) @ way > 0.08)
            return self._pick(now, task.target, spot)
        if task.kind == "push":
            return self._push(now, task.target, DIRECTIONS[task.direction], 0.13)
        if task.kind == "stack":
            return self._stack(now, task.target, task.onto)
        return self._reach(now, task.target)

    def _filler(self, now: Snapshot) -> list[Waypoint]:
        """Something else to do, mostly with another object than the last time."""
        for _ in range(40):
            target = int(self.rng.integers(3))
            if target == self._last and self.rng.random() < 0.6:
                continue
            kind = self.rng.choice(["pick", "hide", "push", "stack", "reach"], p=self.motion.fillers)
            script = self._filler_script(str(kind), target, self.objects[target].graspable, now)
            if script:
                self._last = target
                return script
        return self._reach(now, int(self.rng.integers(3)))

    def _filler_script(self, kind: str, target: int, small: bool, now: Snapshot) -> list[Waypoint]:
        if kind == "reach":
            return self._reach(now, target)
        if kind == "hide" and not small:
            return self._screen(now, int(self.rng.integers(2)))
        if kind == "push" or not small:
            angle = self.rng.uniform(0, 2 * np.pi)
            return self._push(now, target, np.array([np.cos(angle), np.sin(angle)]), self.rng.uniform(0.09, 0.17))
        if kind == "stack":
            return self._stack(now, target, 2)
        if kind == "hide":
            spot = self._hidden_spot(now, target)
        else:
            spot = self._free_spot(now, target, lambda p: np.linalg.norm(p - now.positions[target][:2]) > 0.13)
        return self._pick(now, target, spot)

    # Where ----------------------------------------------------------------------------------------------------------

    def _free_spot(self, now: Snapshot, target: int, wanted: Callable[[np.ndarray], bool]) -> np.ndarray | None:
        """A point of the work area that `wanted` accepts, clear of other objects; None if there seems to be none."""
        for _ in range(60):
            spot = self.rng.uniform(self._low, self._high)
            if wanted(spot) and self._clearance(now, target, spot) > 0.03:
                return spot
        return None

    def _hidden_spot(self, now: Snapshot, target: int) -> np.ndarray | None:
        """A point right behind the large object, as one of the exterior cameras sees it."""
        for azimuth in self.rng.permutation(self._azimuths):
            away = -np.array([np.cos(azimuth), np.sin(azimuth)])
            gap = self.objects[2].radius + self.objects[target].radius + 0.018
            spot = now.positions[2][:2] + gap * away
            inside = np.all(spot > self._low - 0.02) and np.all(spot < self._high + 0.02)
            if inside and self._clearance(now, target, spot) > 0.01:
                return spot
        return None

    def _screen(self, now: Snapshot, hidden: int) -> list[Waypoint]:
        """Push the large object to where it stands between an exterior camera and the object `hidden`."""
        for azimuth in self.rng.permutation(self._azimuths):
            gap = self.objects[2].radius + self.objects[hidden].radius + 0.02
            way = now.positions[hidden][:2] + gap * np.array([np.cos(azimuth), np.sin(azimuth)]) - now.positions[2][:2]
            length = float(np.linalg.norm(way))
            script = self._push(now, 2, way / max(length, 1e-6), length)
            if script:
                return script
        return []

    def _clearance(self, now: Snapshot, target: int, spot: np.ndarray) -> float:
        others = [index for index in range(3) if index != target]
        gaps = [np.linalg.norm(now.positions[i][:2] - spot) - self.objects[i].radius for i in others]
        return float(min(gaps) - self.objects[target].radius)

    def _room(self, place: np.ndarray, way: np.ndarray) -> float:
        """How far an object at `place` can go towards `way` inside the work area."""
        space = np.where(way > 0, self._high - place, np.where(way < 0, place - self._low, np.inf))
        return float(np.min(space))

    def _reachable(self, place: np.ndarray) -> bool:
        return bool(np.all(place > self._low - 0.05) and np.all(place < self._high + 0.05))

    # How ------------------------------------------------------------------------------------------------------------

    def _euler(self, yaw: float) -> np.ndarray:
        return np.array([LEAN + self.rng.uniform(-0.06, 0.06), self.rng.uniform(-0.08, 0.08), yaw])

    def _speed(self) -> float:
        return float(self.rng.uniform(*self.motion.speed))

    def _yaw_off(self, most: float | None = None) -> float:
        most = self.motion.yaw if most is None else most
        return self.rng.uniform(-most, most)

    def _grasp_yaw(self, now: Snapshot, target: int) -> float | None:
        """Yaw at which the fingers meet two faces of the object; None if the arm cannot turn there."""
        axes, item = now.rotations[target], self.objects[target]
        if item.round:
            upright = abs(axes[2, 2]) > 0.8
            if upright:
                return YAW + self._yaw_off()
            yaw = np.arctan2(axes[1, 2], axes[0, 2]) + np.pi / 2
            yaw = (yaw - YAW + np.pi / 2) % np.pi - np.pi / 2 + YAW
            return float(yaw) if abs(yaw - YAW) < 0.9 else None
        flat = axes[:, int(np.argmin(np.abs(axes[2])))]
        yaw = np.arctan2(flat[1], flat[0])
        return float((yaw - YAW + np.pi / 4) % (np.pi / 2) - np.pi / 4 + YAW)

    def _pick(self, now: Snapshot, target: int, spot: np.ndarray | None, height: float = 0.0) -> list[Waypoint]:
        """Grasp, carry and put down at `spot` (x, y), on something `height` m above the table."""
        place, item = now.positions[target], self.objects[target]
        yaw = self._grasp_yaw(now, target)
        if spot is None or yaw is None or not self._reachable(place[:2]):
            return []
        speed, euler = self._speed(), self._euler(yaw)
        down = np.array([*place[:2], max(place[2], 0.03)])
        above = down + UP * 0.06
        lift = np.array([*place[:2], max(place[2] + 0.08, height + 0.10, 0.13)])
        turned = self._euler(YAW + self._yaw_off())
        carry = np.array([*spot, max(height + 0.10, 0.13)])
        put = np.array([*spot, height + max(item.half[2], 0.03) + 0.004])
        goal = Waypoint(carry, turned, 1.0, speed, target, passing=True)
        return [
            Waypoint(above, euler, 0.0, speed),
            Waypoint(down, euler, 0.0, speed * 0.9),
            Waypoint(down, euler, 1.0, speed),
            Waypoint(lift, euler, 1.0, speed, target, passing=True),
            *self._over(now, lift, goal, max(item.half) + 0.015, target),
            goal,
            Waypoint(put, turned, 1.0, speed * 0.8, target),
            Waypoint(put, turned, 0.0, speed),
            Waypoint(put + UP * 0.07, turned, 0.0, speed, passing=True),
        ]

    def _over(
        self, now: Snapshot, start: np.ndarray, goal: Waypoint, below: float, carried: int | None
    ) -> list[Waypoint]:
        """Points on the way to `goal` that clear what stands between; `below` m hang under the fingers."""
        line = goal.position[:2] - start[:2]
        height = 0.0
        for index, item in enumerate(self.objects):
            place = now.positions[index]
            along = np.clip((place[:2] - start[:2]) @ line / max(line @ line, 1e-9), 0, 1)
            if index != carried and np.linalg.norm(start[:2] + along * line - place[:2]) < item.radius + 0.05:
                height = max(height, place[2] + max(item.half) + below)
        up, across = np.array([*start[:2], height]), np.array([*goal.position[:2], height])
        points = [up] if height > start[2] + 0.01 else []
        points += [across] if height > goal.position[2] + 0.01 else []
        return [dataclasses.replace(goal, position=point, passing=True) for point in points]

    def _stack(self, now: Snapshot, target: int, below: int) -> list[Waypoint]:
        flat = np.abs(now.rotations[below][2, 2]) > 0.95 and now.positions[target][2] < 0.07
        spot = now.positions[below][:2]
        return self._pick(now, target, spot, 2 * self.objects[below].half[2]) if flat and self._reachable(spot) else []

    def _push(self, now: Snapshot, target: int, way: np.ndarray, length: float) -> list[Waypoint]:
        """Slide with closed fingers, towards `way` but never out of the work area."""
        place, item = now.positions[target][:2], self.objects[target]
        end = np.clip(place + way * length, self._low, self._high)
        shift = np.linalg.norm(end - place)
        if shift < 0.05 or now.positions[target][2] > 0.075:
            return []
        way = (end - place) / shift
        start, stop = place - way * (item.radius + 0.035), end - way * (item.radius + 0.008)
        inside = all(np.all(p > self._push_low) and np.all(p < self._push_high) for p in (start, stop))
        if not inside or self._clearance_of_finger(now, target, start) < 0.03:
            return []
        speed, euler = self._speed(), self._euler(YAW + self._yaw_off())
        return [
            Waypoint(np.array([*start, 0.11]), euler, 0.9, speed, passing=True),
            Waypoint(np.array([*start, PUSH_HEIGHT]), euler, 0.9, speed),
            Waypoint(np.array([*stop, PUSH_HEIGHT]), euler, 0.9, speed * 0.75),
            Waypoint(np.array([*(stop - 0.02 * way), 0.11]), euler, 0.9, speed, passing=True),
        ]

    def _clearance_of_finger(self, now: Snapshot, target: int, spot: np.ndarray) -> float:
        others = [index for index in range(3) if index != target]
        return float(min(np.linalg.norm(now.positions[i][:2] - spot) - self.objects[i].radius for i in others))

    def _reach(self, now: Snapshot, target: int) -> list[Waypoint]:
        place = np.clip(now.positions[target][:2], self._low - 0.03, self._high + 0.03)
        point = np.array([*place, max(now.positions[target][2], 0.05) + self.rng.uniform(0.08, 0.12)])
        gripper = float(self.rng.choice([0.0, 0.9]))
        return [Waypoint(point, self._euler(YAW + self._yaw_off(self.motion.reach_yaw)), gripper, self._speed())]


def start_waypoint(rng: np.random.Generator, design: Design) -> Waypoint:
    """Where an episode begins: above the work area, in a varied pose."""
    low, high, most = np.array(design.work_low), np.array(design.work_high), design.motion.reach_yaw
    spot = rng.uniform(low - np.array([0.02, 0.04]), high + np.array([0.0, 0.04]))
    euler = np.array([LEAN + rng.uniform(-0.06, 0.06), rng.uniform(-0.1, 0.1), YAW + rng.uniform(-most, most)])
    return Waypoint(np.array([*spot, rng.uniform(0.15, 0.23)]), euler, float(rng.choice([0.0, 0.9])), 0.3)
