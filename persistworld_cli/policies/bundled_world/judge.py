"""The judge of the bundled world: finds the objects by their colours and applies the world's own rules.

It works from the exterior images, the poses and the gripper; of the simulator it knows only where the objects stood
at the start. What it cannot see it does not guess: the verdict is then None, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.bundled_world.success import (
    Aim,
    frames_kept,
    held,
    outcome,
    pad_positions,
    read_instruction,
)
from persistworld_cli.policies.bundled_world.triangulate import VIEWS, Finder, calibrate, find_patches, nominal_camera
from persistworld_cli.policies.judge import Evidence, Float, SceneObject, Verdict

UNSEEN = 0.5  # part of the frames: with more of them unknown, a failure is not told from what was not seen


class BundledJudge:
    """Success and progress by the recorder's rules, from where the objects are seen."""

    wants_objects = True

    def judge(self, evidence: Evidence) -> Verdict:
        """A rollout of the bundled world -> its verdict. Raises PersistWorldError: not this world's cameras."""
        objects = evidence.objects or ()
        aim = read_instruction(evidence.instruction, objects)
        if isinstance(aim, str):
            return Verdict(success=None, progress=None, reason=f"cannot tell: {aim}")
        positions = locate(evidence, aim.watched)
        pads = pad_positions(evidence.poses)
        return say(aim, objects, positions, pads, evidence.rate_hz)


def locate(evidence: Evidence, wanted: Sequence[int]) -> Float:
    """(F, N, 3): where the wanted objects are seen in each frame; NaN for others, and where it cannot be told.

    Raises:
        PersistWorldError: the images are not of the bundled world's cameras.
    """
    missing = [name for name in VIEWS if name not in evidence.cameras]
    if missing:
        raise PersistWorldError(
            f"the judge of the bundled world needs camera {missing[0]}",
            where=f"cameras {', '.join(evidence.cameras)}",
            fix="name a judge of your own (--judge module:Class), or judge by hand",
        )
    objects = evidence.objects or ()
    seen = {
        name: [find_patches(evidence.frames[:, evidence.cameras.index(name)], item) for item in objects]
        for name in VIEWS
    }
    at_start = {name: [(item, one[0]) for item, one in zip(objects, seen[name], strict=True)] for name in VIEWS}
    cameras = calibrate({name: nominal_camera(name) for name in VIEWS}, at_start)
    pads, gripper = pad_positions(evidence.poses), evidence.poses[:, 6]
    positions = np.full((len(evidence.frames), len(objects), 3), np.nan)
    for number in wanted:
        finder = Finder([cameras[name] for name in VIEWS], objects[number])
        for frame in range(len(positions)):
            patches = [seen[name][number][frame] for name in VIEWS]
            positions[frame, number] = finder.place(patches, pads[frame], float(gripper[frame]))
    return positions


def say(aim: Aim, objects: Sequence[SceneObject], positions: Float, pads: Float, rate_hz: float) -> Verdict:
    """What the places come to; a failure is only told of objects that were seen to the end."""
    known = ~np.isnan(held(aim, objects, positions, pads))
    told = f"seen in {known.sum()} of {len(known)} frames"
    names = " and ".join(objects[number].name for number in aim.watched)
    found = outcome(aim, objects, positions, pads, rate_hz)
    if found is None:
        return Verdict(success=None, progress=None, reason=f"cannot tell: {names} {told}")
    at_end = known[-2 * frames_kept(rate_hz) :].any()
    if not found.success and (known.mean() < UNSEEN or not at_end):
        when = "" if at_end else ", not at the end"
        return Verdict(success=None, progress=None, reason=f"cannot tell: {names} {told}{when}")
    reason = f"{_told(aim, objects, positions, pads, known)}; {names} {told}"
    return Verdict(success=found.success, progress=round(found.progress, 4), reason=reason)


def _told(aim: Aim, objects: Sequence[SceneObject], positions: Float, pads: Float, known: np.ndarray) -> str:
    """The distance that matters, at the last frame that is known."""
    last = int(np.flatnonzero(known)[-1])
    target = positions[last, aim.target]
    if aim.kind == "reach":
        return f"gripper {100 * np.hypot(*(pads[last] - target)[:2]):.0f} cm from above it at the end"
    if aim.onto is not None:
        below = positions[last, aim.onto]
        return f"{100 * np.hypot(*(target - below)[:2]):.0f} cm beside, {100 * (target - below)[2]:.0f} cm higher"
    moved = (target - objects[aim.target].position)[:2] @ np.array(aim.way)
    return f"moved {100 * moved:+.0f} cm that way at the end"
