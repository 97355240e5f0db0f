"""Recorded starts of the bundled world as a processed dataset, without extracting all of it; and its simulator."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.data.raw.video import read_frames, write_mp4
from persistworld_cli.policies.bundled_world.scene import find_recorded
from persistworld_cli.policies.judge import Evidence
from persistworld_cli.rollout.interactive import make_start
from persistworld_cli.rollout.recording import Item, Start

RAW = bundled_root() / "dataset_example" / "world"
STEP = 3  # 15 Hz -> 5 Hz


def extract(root: Path, episodes: Sequence[int], frames: int = 40) -> Settings:
    """Write the beginnings of bundled episodes as a dataset (no latents), and the tiny preset's settings for it."""
    settings = load_settings("tiny", flags={"world.dataset": str(root), "launch.device": "cpu"})
    world, raw = settings.world, RawDataset(RAW)
    for episode in episodes:
        columns = raw.read(episode, [*world.state_fields, *world.joint_fields])
        rows = np.arange(frames) * STEP
        joined = [
            np.concatenate([columns[name].reshape(len(columns[name]), -1) for name in names], axis=1)[rows]
            for names in (world.state_fields, world.joint_fields)
        ]
        note = {"texts": [raw.instruction(episode)], "states": joined[0].tolist(), "joints": joined[1].tolist()}
        file = root / "annotation" / "val" / f"{episode}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**note, "video_length": frames}))
        for index, camera in enumerate(world.cameras):
            images = resize(read_frames(raw.video(episode, camera)[0], rows.tolist()), world.height, world.width)
            write_mp4(root / "videos" / "val" / str(episode) / f"{index}.mp4", images, world.rate_hz)
    (root / "meta").mkdir(exist_ok=True)
    shutil.copy(bundled_root() / "presets" / "tiny" / "stat.json", root / "meta" / "stat.json")
    return settings


def recorded_start(settings: Settings, episode: int, start: int = 0) -> Start:
    """A start in that dataset."""
    return make_start(open_store(settings), Item(str(episode), start, 0), "val")


def recorded_evidence(settings: Settings, episode: int, instruction: str = "") -> Evidence:
    """The recorded frames of an episode as if they were a rollout."""
    store, start = open_store(settings), recorded_start(settings, episode)
    count = start.annotation.num_frames
    return Evidence(
        episode=str(episode),
        start=0,
        seed=0,
        instruction=instruction or start.text,
        cameras=settings.world.cameras,
        rate_hz=settings.world.rate_hz,
        frames=store.frames("val", str(episode), list(range(count))),
        poses=start.annotation.states[:count],
        joint_pos=np.empty((0, 7)),
        joint_vel=np.empty((0, 7)),
        objects=find_recorded(settings, start).objects,
    )


def recorder(module: str) -> Any:
    """A module of the bundled world's recorder; skips where that is not at hand. Physics need nothing else."""
    package = pytest.importorskip("dataset_example.recorder", reason="runs in a checkout only")  # chooses MuJoCo's GL
    pytest.importorskip("mujoco", reason="the simulator needs mujoco (pip install -e '.[sim]')")
    return importlib.import_module(f"{package.__name__}.{module}")


@lru_cache(maxsize=1)
def _cannot_draw() -> str:
    """Why MuJoCo cannot draw here; empty where it can."""
    mujoco = recorder("scene").mujoco
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except Exception as error:  # each driver fails in a way of its own
        return f"{type(error).__name__}: {error}"
    return ""


def require_drawing() -> None:
    """Skip where MuJoCo is not installed or cannot draw."""
    if reason := _cannot_draw():
        pytest.skip(f"images need EGL (apt install libegl1 libegl-mesa0 libgl1-mesa-dri): {reason}")
