"""Policies of graded skill for the bundled world: they repeat its recordings more or less well.

Their noise and speed were chosen by their success in the simulator alone.

`persistworld pi-rollout --policy benchmarks.policies:Recorded --against sim` in the repository's root.

A policy recognises the episode by its instruction and the arm's joints, and answers with the recorded velocities and
gripper positions from there on, corrected towards the recorded pose of the arm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.embedded import read_joints
from persistworld_cli.policies.observation import PROMPT
from persistworld_cli.robot.adapter import DEFAULT_GAIN

ROWS, TAKEN = 15, 12  # of an answer; of it taken in an interaction, at the bundled task's skip of 3
SAME_JOINTS = 0.01  # rad: an arm further from every recorded row starts in another scene
_FIELDS = ("observation.state.joint_position", "action.joint_velocity", "action.gripper_position")


@lru_cache(maxsize=1)
def _recordings() -> list[tuple[str, dict[str, NDArray[Any]]]]:
    raw = RawDataset(resolve_path("bundled:dataset_example/world"))
    return [(raw.instruction(index), raw.read(index, _FIELDS)) for index in raw.episodes]


class Recorded:
    """Repeats the recording."""

    speed, noise, gripper = 1.0, 0.0, True

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._known: dict[str, NDArray[Any]] | None = None
        self._row = 0
        self._rng = np.random.default_rng(0)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        joints = read_joints(obs)
        if self._known is None:
            self._known, self._row = self._recognise(str(obs[PROMPT]), joints[:7])
        known, last = self._known, len(self._known[_FIELDS[0]]) - 1
        rows = np.minimum(self._row + np.arange(ROWS), last)
        still = (self._row + np.arange(ROWS) > last)[:, None]
        wanted = np.where(still, 0.0, known[_FIELDS[1]][rows])
        back = (known[_FIELDS[0]][rows[0]] - joints[:7]) / (DEFAULT_GAIN * TAKEN) if self.speed == 1 else 0.0
        velocity = self.speed * wanted + back + self.noise * self._rng.normal(size=7)
        gripper = known[_FIELDS[2]][rows] if self.gripper else np.zeros(ROWS)
        self._row += TAKEN
        return {"actions": np.concatenate([np.clip(velocity, -1, 1), gripper.reshape(ROWS, 1)], axis=1)}

    def _recognise(self, prompt: str, joints: NDArray[np.float64]) -> tuple[dict[str, NDArray[Any]], int]:
        """The recording and the row in it that the arm is nearest to, among those with this instruction."""
        found = [columns for text, columns in _recordings() if text == prompt]
        if not found:
            raise PersistWorldError(f"no recording of '{prompt}'")
        gaps = [np.abs(columns[_FIELDS[0]] - joints).max(axis=1) for columns in found]
        best = int(np.argmin([gap.min() for gap in gaps]))
        if gaps[best].min() > SAME_JOINTS:
            raise PersistWorldError(f"no recording of '{prompt}' with these joints: an episode of another dataset?")
        return found[best], int(np.argmin(gaps[best]))


class Noisy(Recorded):
    """With a wrong drift, another in each interaction."""

    noise = 0.1


class Shaky(Recorded):
    """With a worse one."""

    noise = 0.15


class Wild(Recorded):
    """With one that mostly misses."""

    noise = 0.25


class Slow(Recorded):
    """Goes four fifths of every distance, and is not corrected."""

    speed = 0.8


class Open(Recorded):
    """Never closes the gripper."""

    gripper = False
