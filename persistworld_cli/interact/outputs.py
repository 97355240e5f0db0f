"""Outputs of a drive (by keys, terminal or page): video, contact sheet, JSON, LeRobot dataset."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.config.keys import robot_name
from persistworld_cli.data.raw.lerobot_writer import NewEpisode, pose_columns, write_lerobot
from persistworld_cli.files import CannotWrite, scratch_folder, whole_file, write_json
from persistworld_cli.interact.session import DriveSession
from persistworld_cli.reports.videos import write_imagined_sheet, write_imagined_video


def title(session: DriveSession) -> str:
    """Keys and start, in a line."""
    item = session.start.item
    return f"drive {_keys(session) or '(nothing)'}: episode {item.episode}, frame {item.start}, seed {item.seed}"


def summary(session: DriveSession) -> dict[str, Any]:
    """Keys, start and times of the path to the current step."""
    start, path, branches = session.start, session.path, [step.branch for step in session.path]
    return {
        "keys": _keys(session),
        "episode": start.item.episode,
        "split": start.split,
        "start": start.item.start,
        "seed": start.item.seed,
        "instruction": start.text,
        "frames": sum(len(step.images) for step in path) + 1,
        "seconds_per_step": float(np.median([step.seconds for step in path])) if path else None,
        **({"branches": branches} if any(branches) else {}),
    }


def record(session: DriveSession) -> dict[str, Any]:
    """`summary` and, for each step, its branch, poses and seconds."""
    path = session.path
    return {
        **summary(session),
        "branches": [step.branch for step in path],
        "start_pose": session.start.pose.tolist(),
        "poses": [step.poses.tolist() for step in path],
        "seconds": [round(step.seconds, 4) for step in path],
    }


def write_video(session: DriveSession, path: Path) -> None:
    """An mp4 of the path to the current step."""
    titles = [f"{step.key}: {session.keymap.meaning(step.key)}" for step in session.path]
    settings = session.settings
    write_imagined_video(path, title(session), settings, session.frames(), titles, settings.world.rate_hz)


def write_record(session: DriveSession, path: Path) -> None:
    """`record` as a JSON file."""
    write_json(path, record(session))


def write_lerobot_zip(session: DriveSession, path: Path) -> None:
    """The path to the current step as a LeRobot v3.0 dataset of one episode, in a zip file.

    The state of a frame is the pose commanded at it; the action is the next frame's pose (for the last frame, its own).
    """
    poses = np.concatenate([session.steps[0].poses, *(step.poses[1:] for step in session.path)])
    settings, frames = session.settings, session.frames()
    images = {camera: frames[:, view] for view, camera in enumerate(settings.world.cameras)}
    episode = NewEpisode(task=session.start.text, columns=pose_columns(settings, poses), images=images)
    with scratch_folder(path) as folder, whole_file(path) as partial:
        root = folder / path.stem
        write_lerobot(root, [episode], settings.world.rate_hz, robot_name(settings))
        with zipfile.ZipFile(partial, "w") as packed:
            for file in sorted(root.rglob("*")):
                packed.write(file, file.relative_to(folder))


def write_all(session: DriveSession, output: Path) -> Mapping[str, Any]:
    """Write JSON, video and contact sheet; returns `summary` with their paths ``video``, ``sheet`` and ``json``.

    Raises:
        CannotWrite: the message holds the keys, which reproduce the frames. The JSON, the smallest file, comes first.
    """
    video, sheet, file = output / "drive.mp4", output / "drive.png", output / "drive.json"
    columns = [f"{step.depth} {step.key}" for step in session.path]
    try:
        write_record(session, file)
        write_video(session, video)
        write_imagined_sheet(sheet, title(session), session.settings, session.frames(), columns)
    except CannotWrite as error:
        driven = f"{error.what} (driven: --keys {_keys(session) or 'none'} --seed {session.start.item.seed})"
        raise CannotWrite(driven, where=error.where, fix=error.fix) from error
    return {**summary(session), "video": str(video), "sheet": str(sheet), "json": str(file)}


def _keys(session: DriveSession) -> str:
    return "".join(step.key for step in session.path)
