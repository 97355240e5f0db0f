"""A world to drive in: two episodes of an arm with its joints, and the preset with which the real command finds it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from eval_world import make_world, settings

from persistworld_cli.config.presets import to_json
from persistworld_cli.config.settings import DriveSettings, Settings
from persistworld_cli.interact.drive import open_session
from persistworld_cli.interact.session import DriveSession
from persistworld_cli.robot.kinematics import pose

REST = np.array([0.0, 0.05, 0.3, -2.25, 0.0, 2.5, -np.pi / 2])
LENGTH = 8


def arm_world(folder: Path) -> Path:
    """Write two episodes of an arm that turns at its base; returns the folder."""
    store = make_world(folder, {"7": LENGTH, "8": LENGTH})
    for index, episode in enumerate(("7", "8")):
        joints = REST + np.arange(LENGTH)[:, None] * 0.01 * np.eye(7)[0] + 0.05 * index
        gripper = np.full((LENGTH, 1), 0.2)
        file = store.root / "annotation" / "val" / f"{episode}.json"
        note = json.loads(file.read_text())
        note["states"] = np.concatenate([pose(joints), gripper], axis=1).tolist()
        note["joints"] = np.concatenate([joints, gripper], axis=1).tolist()
        file.write_text(json.dumps(note))
    stat = {"state_01": [0.3, -0.5, 0.0, -3.2, -1.0, -2.0, 0.0], "state_99": [0.8, 0.5, 0.5, 3.2, 1.0, 2.0, 1.0]}
    (store.meta / "stat.json").write_text(json.dumps(stat))
    return folder


def drive_settings(root: Path, **drive: Any) -> Settings:
    """Settings of a drive in the world under ``root``."""
    return replace(settings(root), drive=DriveSettings(**drive))


def session(root: Path, **drive: Any) -> DriveSession:
    """A drive in this process."""
    return open_session(drive_settings(root, **drive))


def write_preset(path: Path, own: Settings) -> Path:
    """Settings as a preset."""
    lines: list[str] = []
    for table, entries in to_json(own).items():
        plain = {key: value for key, value in entries.items() if not isinstance(value, dict)}
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
        for key, inner in entries.items():
            if isinstance(inner, dict):
                lines += [f"[{table}.{key}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in inner.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def drive_command(root: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """``persistworld drive ARGUMENTS`` in the world under ``root``: command line and environment.

    As many threads as this process has: frames are compared, and sums over more threads may differ in their last bits.
    """
    preset = write_preset(root / "drive.toml", settings(root))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return [sys.executable, "-m", "persistworld_cli", "drive", "--preset", str(preset), *arguments], environment


@contextmanager
def pseudo_terminal(lines: int = 30, columns: int = 100) -> Iterator[tuple[int, int]]:
    """A terminal of some size: the person's side, and the program's."""
    import fcntl
    import pty
    import struct
    import termios

    person, program = pty.openpty()
    fcntl.ioctl(person, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    try:
        yield person, program
    finally:
        os.close(person)
        os.close(program)
