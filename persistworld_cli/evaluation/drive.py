"""`drive`: act in the world by key. From one real frame, each key is one interaction (method.md section 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.film import write_film, write_film_sheet, write_json
from persistworld_cli.evaluation.living import LivingWorld, Moved, Start, load_model, make_start
from persistworld_cli.evaluation.recording import Item
from persistworld_cli.reports.progress import Meter
from persistworld_cli.robot.keyboard import GRIPS, MOVES, KeyMap, parse_keys
from persistworld_cli.rollout.controllers import KeyboardController


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Drive along a string of keys and write what was seen.

    Args:
        settings: resolved settings.
        job: ``keys`` ("lllrrr") and ``output`` (folder); optional ``episode``, ``start``, ``seed`` (else
            `settings.drive`; no episode: the first of ``eval.split``), ``ckpt``, ``adapter`` (see `load_model`).

    Returns:
        A summary for the terminal with the paths ``video``, ``sheet`` and ``json``; poses and times are in the JSON.

    Raises:
        UsageError: unknown keys, before any compute.
        PersistWorldError: no such episode or frame, unreadable weights or data.
    """
    keys = parse_keys(str(job["keys"]))
    store = open_store(settings)
    start = _find_start(settings, job, store)
    store.stat()  # missing metadata should be told before the weights are read
    world = LivingWorld(load_model(settings, job), store, [start], settings)
    opening = world.pictures[0]
    controller = KeyboardController(KeyMap(settings=settings.drive), keys, world.rows)
    moves: list[Moved] = []
    with Meter("drive", len(keys)) as meter:
        for step in range(len(keys)):
            moves.append(world.step(controller.poses(step, world.poses)))
            meter.advance(seconds_a_step=moves[-1].seconds)
    return _write(Path(job["output"]), settings, start, keys, opening, moves)


def _find_start(settings: Settings, job: dict[str, Any], store: EpisodeStore) -> Start:
    """The start frame that job and settings name."""
    drive, split = settings.drive, settings.eval.split
    episode = str(_given(job, "episode", drive.episode) or "")
    if not episode:
        known = store.episodes(split)
        if not known:
            raise PersistWorldError(
                f"split '{split}' has no episodes",
                where=str(store.root),
                fix="name one that has: --set eval.split=train",
            )
        episode = known[0]
    item = Item(episode, int(_given(job, "start", drive.start)), int(_given(job, "seed", drive.seed)))
    return make_start(store, item, split)


def _given(job: dict[str, Any], key: str, default: Any) -> Any:
    """The job's value, or the default where it has none."""
    return default if job.get(key) is None else job[key]


def _write(
    output: Path, settings: Settings, start: Start, keys: list[str], opening: np.ndarray, moves: list[Moved]
) -> dict[str, Any]:
    """Write video, contact sheet and JSON; opening (V, H, W, 3) is the frame that was started from."""
    item = start.item
    frames = np.concatenate([opening[None], *(moved.pictures[0] for moved in moves)])
    titles = [f"{key}: {MOVES[key][2] if key in MOVES else GRIPS[key]}" for key in keys]
    title = f"drive {''.join(keys)}: episode {item.episode}, frame {item.start}, seed {item.seed}"
    video, sheet, record = output / "drive.mp4", output / "drive.png", output / "drive.json"
    write_film(video, title, settings, frames, titles, settings.world.rate_hz)
    write_film_sheet(sheet, title, settings, frames, [f"{i} {key}" for i, key in enumerate(keys, 1)])
    seconds = [round(moved.seconds, 4) for moved in moves]
    shown: dict[str, Any] = {
        "keys": "".join(keys),
        "episode": item.episode,
        "split": start.split,
        "start": item.start,
        "seed": item.seed,
        "instruction": start.text,
        "frames": len(frames),
        "seconds_per_step": float(np.median(seconds)),
    }
    moved_to = {
        "start_pose": start.pose.tolist(),
        "poses": [moved.poses[0].tolist() for moved in moves],
        "seconds": seconds,
    }
    write_json(record, {**shown, **moved_to})
    return {**shown, "video": str(video), "sheet": str(sheet), "json": str(record)}
