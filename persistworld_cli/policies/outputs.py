"""What a policy's rollouts leave behind: video, contact sheet and JSON of each, and a LeRobot dataset of them all.

Shape legend: S interactions, L rows of one (row 0 the current frame), F = 1 + S (L-1) frames, V cameras, H, W pixels,
R = S (L-1) skip rows of a policy's answers at 15 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.lerobot_writer import NewEpisode, write_lerobot
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import remove, whole_folder, write_json
from persistworld_cli.policies.controller import PolicyTrace
from persistworld_cli.policies.judge import Evidence, SceneObject, Verdict
from persistworld_cli.reports.videos import write_imagined_sheet, write_imagined_video
from persistworld_cli.rollout.interactive import Float
from persistworld_cli.rollout.recording import Start

POLICY_HZ = 15.0  # rows of a chunk a second (DROID)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One rollout, as far as it came.

    Attributes:
        start: where it began.
        frames: (F, V, H, W, 3).
        poses: (S, L, 7).
        trace: what the arm did at 15 Hz.
        joints_end: (8,) where the arm is.
        skip: rows of the policy's answer that make a frame.
        seconds: of work, an interaction.
        error: why it ended early; None for a whole one.
    """

    start: Start
    frames: NDArray[np.uint8]
    poses: Float
    trace: PolicyTrace
    joints_end: Float
    skip: int
    seconds: Sequence[float]
    error: PersistWorldError | None = None

    @property
    def fps(self) -> float:
        """Frames a second."""
        return POLICY_HZ / self.skip

    @property
    def frame_poses(self) -> Float:
        """(F, 7) the pose at each frame."""
        return np.concatenate([self.start.pose[None], *(rows[1:] for rows in self.poses)])

    def evidence(self, cameras: Sequence[str], objects: tuple[SceneObject, ...] | None) -> Evidence:
        """What a judge is shown of it."""
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
            joint_pos=np.array(self.trace.joint_pos).reshape(-1, 7),
            joint_vel=np.array(self.trace.joint_vel).reshape(-1, 7),
            objects=objects,
        )


def save_rollout(
    output: Path,
    settings: Settings,
    rollout: Rollout,
    told: Mapping[str, Any],
    verdict: Verdict | None,
    beside: Mapping[str, NDArray[np.uint8]] | None = None,
) -> dict[str, Any]:
    """Write one rollout's video, contact sheet and JSON; returns its entry in the summary.

    Args:
        output: folder.
        settings: for the cameras' names.
        rollout: what happened.
        told: further keys of the JSON; ``policy`` and ``task`` among them.
        verdict: a judge's; None: to be judged by a person.
        beside: name -> frames that are shown under the world model's.
    """
    start, done = rollout.start, len(rollout.poses)
    title = f"{told['policy']}, {told['task']}: episode {start.item.episode}, frame {start.item.start}: {start.text}"
    name = f"{told['task']}_{start.item.name}"
    video, sheet, record = (output / f"{name}.{suffix}" for suffix in ("mp4", "png", "json"))
    write_imagined_video(video, title, settings, rollout.frames, [str(told["policy"])] * done, rollout.fps, beside)
    write_imagined_sheet(sheet, title, settings, rollout.frames, [f"step {i}" for i in range(1, done + 1)], beside)
    entry: dict[str, Any] = {
        "success": verdict and verdict.success,  # None: to be judged by a person
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
        **told,
        "steps": done,
        "skip": rollout.skip,
        "fps": rollout.fps,
        "seconds": [round(seconds, 4) for seconds in rollout.seconds],
    }
    arrays = {
        "joint_pos": rollout.trace.joint_pos,
        "joint_vel": rollout.trace.joint_vel,
        "state_fk": rollout.trace.state_fk,
        "poses": rollout.poses.tolist(),
    }
    write_json(record, {**entry, **arrays})
    shown = {
        key: entry[key] for key in ("episode", "start", "seed", "steps", "complete", "success", "progress", "judged")
    }
    return {**shown, "video": str(video), "sheet": str(sheet), "json": str(record)}


def write_episodes(root: Path, settings: Settings, rollouts: Sequence[Rollout]) -> list[int | None]:
    """The whole rollouts as one LeRobot v3.0 dataset of imagined episodes; a dataset that lies there is replaced.

    State and action are those of `drive`'s episodes (the pose commanded at a frame, and at the next one); the joints,
    and the policy's mean velocities over a frame, come with them.

    Returns:
        Each rollout's number in the dataset; None for one that broke off, which is left out.
    """
    whole = [rollout for rollout in rollouts if rollout.error is None and len(rollout.poses)]
    if whole:
        episodes = [_episode(settings, rollout) for rollout in whole]
        with whole_folder(root) as partial:
            write_lerobot(partial, episodes, whole[0].fps, "Franka")
    else:
        remove(root)
    numbers = {id(rollout): number for number, rollout in enumerate(whole)}
    return [numbers.get(id(rollout)) for rollout in rollouts]


def _episode(settings: Settings, rollout: Rollout) -> NewEpisode:
    poses = rollout.frame_poses
    joints = np.array(rollout.trace.joint_pos)[:: rollout.skip]
    joints = np.concatenate([joints, rollout.joints_end[None, :7]])
    velocities = np.array(rollout.trace.joint_vel).reshape(len(joints) - 1, rollout.skip, 7).mean(axis=1)
    columns: dict[str, Float] = {}
    for name, later in (("observation.state", 0), ("action", 1)):
        rows = np.minimum(np.arange(len(poses)) + later, len(poses) - 1)
        columns |= {
            name: poses[rows],
            f"{name}.cartesian_position": poses[rows, :6],
            f"{name}.gripper_position": poses[rows, 6:],
            f"{name}.joint_position": joints[rows],
        }
    columns["action.joint_velocity"] = np.concatenate([velocities, np.zeros((1, 7))])
    images = {camera: rollout.frames[:, view] for view, camera in enumerate(settings.world.cameras)}
    return NewEpisode(task=rollout.start.text, columns=columns, images=images)
