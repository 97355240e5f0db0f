"""The judge of the bundled world: finds the objects by their colours and applies the world's own rules.

It uses the exterior images, the poses and the gripper; from the simulator it only knows the objects' positions at the
start. It does not guess what it cannot see: success is then None, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.bundled_world.rules import (
    DIRECTIONS,
    EXTERIOR_VIEWS,
    Condition,
    Float,
    frames_kept,
    pad_positions,
    read_instruction,
)
from persistworld_cli.policies.bundled_world.triangulate import ObjectTracker, calibrate, detect, nominal_camera
from persistworld_cli.policies.judge import Evidence, SceneObject, Verdict

MOST_UNSEEN = 0.5  # share of the frames: if more are unknown, an unseen success is not a failure


class BundledJudge:
    """Success and progress by the recorder's rules, from the objects' positions in the images."""

    wants_objects = True

    def judge(self, evidence: Evidence) -> Verdict:
        """The verdict on a rollout of the bundled world. Raises PersistWorldError: the cameras are not this world's."""
        objects = evidence.objects or ()
        condition = find_condition(evidence.instruction, objects)
        if isinstance(condition, str):
            return _undecided(condition)
        positions = locate(evidence, condition.task.objects)
        return decide(condition, objects, positions, pad_positions(evidence.poses), evidence.rate_hz)


def find_condition(instruction: str, objects: Sequence[SceneObject]) -> Condition | str:
    """The success condition of an instruction among objects; or the reason why it is invalid there, as text."""
    task = read_instruction(instruction, [item.name for item in objects])
    if isinstance(task, str):
        return task
    return Condition(task, np.stack([item.half for item in objects]), np.stack([item.position for item in objects]))


def locate(evidence: Evidence, wanted: Sequence[int]) -> Float:
    """(F, N, 3): positions of the wanted objects in each frame; NaN for the others and where unknown.

    Raises:
        PersistWorldError: the images are not of the bundled world's cameras.
    """
    missing = [name for name in EXTERIOR_VIEWS if name not in evidence.cameras]
    if missing:
        raise PersistWorldError(
            f"the judge of the bundled world needs camera {missing[0]}",
            where=f"cameras {', '.join(evidence.cameras)}",
            fix="name a judge of your own (--judge module:Class), or judge by hand",
        )
    objects, cameras, seen = evidence.objects or (), {}, {}
    for name in EXTERIOR_VIEWS:
        images = evidence.frames[:, evidence.cameras.index(name)]
        seen[name] = [detect(images, item) for item in objects]
        cameras[name] = calibrate(
            nominal_camera(name), [(item, one[0]) for item, one in zip(objects, seen[name], strict=True)]
        )
    pads = pad_positions(evidence.poses)
    positions = np.full((len(evidence.frames), len(objects), 3), np.nan)
    for number in wanted:
        tracker = ObjectTracker(cameras, objects[number])
        for frame in range(len(positions)):
            views = {name: seen[name][number][frame] for name in EXTERIOR_VIEWS}
            positions[frame, number] = tracker.locate(views, pads[frame], float(evidence.poses[frame, 6]))
    return positions


def decide(
    condition: Condition, objects: Sequence[SceneObject], positions: Float, pads: Float, rate_hz: float
) -> Verdict:
    """The verdict on positions (F, N, 3); failure only if the objects were seen to the end."""
    known = ~np.isnan(condition.holds(positions, pads))
    names = " and ".join(objects[number].name for number in condition.task.objects)
    seen = f"{names} seen in {known.sum()} of {len(known)} frames"
    found = condition.outcome(positions, pads, rate_hz)
    at_end = known[-2 * frames_kept(rate_hz) :].any()
    if found is None:
        return _undecided(seen)
    if not found.success and (known.mean() < MOST_UNSEEN or not at_end):
        return _undecided(seen if at_end else f"{seen}, not at the end")
    last = int(np.flatnonzero(known)[-1])
    reason = f"{_distance(condition, positions[last], pads[last])}; {seen}"
    return Verdict(success=found.success, progress=round(found.progress, 4), reason=reason)


def _undecided(why: str) -> Verdict:
    return Verdict(success=None, progress=None, reason=f"undecided: {why}")


def _distance(condition: Condition, positions: Float, pads: Float) -> str:
    """The distance that decides, in words: positions (N, 3), pads (3,)."""
    task, target = condition.task, positions[condition.task.target]
    if task.kind == "reach":
        return f"gripper {100 * np.hypot(*(pads - target)[:2]):.0f} cm from above it at the end"
    if task.onto is not None:
        gap = target - positions[task.onto]
        return f"{100 * np.hypot(*gap[:2]):.0f} cm beside, {100 * gap[2]:.0f} cm higher"
    moved = (target - condition.start[task.target])[:2] @ DIRECTIONS[task.direction]
    return f"moved {100 * moved:+.0f} cm {task.direction} at the end"
