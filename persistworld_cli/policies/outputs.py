"""Output of policy rollouts: video, contact sheet and JSON of each, and a LeRobot dataset of all.

Shape legend: S interactions, L rows of one (row 0 the current frame), F = 1 + S (L-1) frames, V cameras, H, W pixels,
R = S (L-1) skip rows of a policy's answers, D numbers of a pose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.keys import robot_name
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.lerobot_writer import NewEpisode, pose_columns, write_lerobot
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import remove, whole_folder, write_json
from persistworld_cli.policies.controller import PolicyTrace
from persistworld_cli.policies.judge import Evidence, SceneObject, Verdict
from persistworld_cli.reports.videos import write_imagined_sheet, write_imagined_video
from persistworld_cli.rollout.interactive import Float
from persistworld_cli.rollout.recording import Start

POLICY_HZ = 15.0  # rows of an answer per second (DROID)
_SUMMARY = ("episode", "start", "seed", "steps", "complete", "success", "progress", "judged")


@dataclass(frozen=True, kw_only=True)
class PolicyRollout:
    """One rollout of a policy, up to the error if there was one.

    Attributes:
        start: start of the rollout.
        frames: (F, V, H, W, 3).
        poses: (S, L, D).
        trace: the arm's motion, row by row.
        joints_end: (8,) joints and gripper at the end; empty in an action space without joints.
        skip, rate_hz: rows of the policy's answer per frame, and per second.
        seconds: computing time per interaction.
        error: why the rollout ended early; None for a complete one.
    """

    start: Start
    frames: NDArray[np.uint8]
    poses: Float
    trace: PolicyTrace
    joints_end: Float
    skip: int
    rate_hz: float = POLICY_HZ
    seconds: Sequence[float] = ()
    error: PersistWorldError | None = None

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.rate_hz / self.skip

    @property
    def frame_poses(self) -> Float:
        """(F, D) the pose at each frame."""
        return np.concatenate([self.start.pose[None], *(rows[1:] for rows in self.poses)])

    def evidence(self, cameras: Sequence[str], objects: tuple[SceneObject, ...] | None) -> Evidence:
        """The judge's view of the rollout."""
        item = self.start.item
        return Evidence(
            episode=item.episode,
            start=item.start,
            seed=item.seed,
            instruction=self.start.text,
            cameras=tuple(cameras),
            rate_hz=self.fps,
            frames=self.frames,
            poses=self.frame_poses,
            joint_pos=np.array(self.trace.joint_pos or np.empty((0, 0))),
            joint_vel=np.array(self.trace.joint_vel or np.empty((0, 0))),
            objects=objects,
        )


def save_rollout(
    output: Path,
    settings: Settings,
    rollout: PolicyRollout,
    extra: Mapping[str, Any],
    verdict: Verdict | None,
    beside: Mapping[str, NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:
    """Write one rollout's video, contact sheet and JSON; returns its entry in the summary.

    Args:
        output: folder.
        settings: for the cameras' names.
        rollout: the rollout.
        extra: further keys of the JSON, with ``policy`` and ``task``.
        verdict: the judge's verdict; None: for a person to judge.
        beside: name -> frames shown below the world model's.
    """
    start, done, policy, task = rollout.start, len(rollout.poses), str(extra["policy"]), extra["task"]
    title = f"{policy}, {task}: episode {start.item.episode}, frame {start.item.start}: {start.text}"
    paths = {kind: output / f"{task}_{start.item.name}.{kind}" for kind in ("mp4", "png", "json")}
    write_imagined_video(paths["mp4"], title, settings, rollout.frames, [policy] * done, rollout.fps, beside)
    steps = [f"step {i}" for i in range(1, done + 1)]
    write_imagined_sheet(paths["png"], title, settings, rollout.frames, steps, beside)
    entry: dict[str, Any] = {
        "success": verdict and verdict.success,  # None: for a person to judge
        "progress": verdict and verdict.progress,
        "judged": verdict and verdict.reason,
        "start_idx": 0,  # of the video
        "end_idx": len(rollout.frames) - 1,
        "instructions": start.text,
        "complete": rollout.error is None,
        "error": None if rollout.error is None else str(rollout.error),
        "episode": start.item.episode,
        "split": start.split,
        "start": start.item.start,
        "seed": start.item.seed,
        **extra,
        "steps": done,
        "skip": rollout.skip,
        "fps": rollout.fps,
        "seconds": [round(seconds, 4) for seconds in rollout.seconds],
    }
    write_json(paths["json"], {**entry, **vars(rollout.trace), "poses": rollout.poses})
    named = {"video": str(paths["mp4"]), "sheet": str(paths["png"]), "json": str(paths["json"])}
    return {**{key: entry[key] for key in _SUMMARY}, **named}


def write_episodes(root: Path, settings: Settings, rollouts: Sequence[PolicyRollout]) -> list[int | None]:
    """Write the complete rollouts as one LeRobot v3.0 dataset of imagined episodes; an existing dataset is replaced.

    State and action are those of `drive`'s episodes (the pose commanded at a frame, and at the next one), plus
    joints and, of a policy that answers joint velocities, its mean velocities over a frame.

    Returns:
        Each rollout's number in the dataset; None for an incomplete one, which is left out.
    """
    whole = [rollout for rollout in rollouts if rollout.error is None and len(rollout.poses)]
    if whole:
        episodes = [_episode(settings, rollout) for rollout in whole]
        with whole_folder(root) as partial:
            write_lerobot(partial, episodes, whole[0].fps, robot_name(settings))
    else:
        remove(root)
    numbers = {id(rollout): number for number, rollout in enumerate(whole)}
    return [numbers.get(id(rollout)) for rollout in rollouts]


def _episode(settings: Settings, rollout: PolicyRollout) -> NewEpisode:
    columns, trace, skip = pose_columns(settings, rollout.frame_poses), rollout.trace, rollout.skip
    if trace.joint_pos:
        joints = np.array([*trace.joint_pos[::skip], rollout.joints_end[: len(trace.joint_pos[0])]])
        columns |= {"observation.state.joint_position": joints}
        columns |= {"action.joint_position": np.concatenate([joints[1:], joints[-1:]])}
    if trace.joint_vel:
        velocities = np.array(trace.joint_vel).reshape(len(joints) - 1, skip, -1).mean(axis=1)
        columns["action.joint_velocity"] = np.concatenate([velocities, np.zeros_like(velocities[:1])])
    images = {camera: rollout.frames[:, view] for view, camera in enumerate(settings.world.cameras)}
    return NewEpisode(task=rollout.start.text, columns=columns, images=images)
