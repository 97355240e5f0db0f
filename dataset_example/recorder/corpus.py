"""Many episodes, in several processes, with progress on stderr."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .design import DEFAULT, DESIGNS
from .episode import record_episode
from .lerobot import recorded, write_episode, write_meta

# MuJoCo's EGL contexts leak memory: a worker process ends after so many episodes.
EPISODES_PER_WORKER = 40


class OtherWorldError(Exception):
    """The output folder holds episodes of another design, seed, rate or length."""


def record(
    root: Path,
    wanted: Sequence[int],
    seed: int,
    fps: int,
    seconds: float,
    workers: int,
    validation: int,
    design: str = DEFAULT.name,
) -> None:
    """Records the episodes of `wanted` that are not on disk yet, then writes `meta/`, also when interrupted.

    Raises OtherWorldError before it writes anything.
    """
    done = recorded(root)
    length = round(seconds * fps)
    for episode_id, entry in done.items():
        if (entry["design"], entry["seed"], entry["fps"], entry["line"]["length"]) != (design, seed, fps, length):
            raise OtherWorldError(
                f"episode {episode_id} in {root} was recorded with another --design, --seed, --fps or --seconds; "
                "choose an empty folder, or the same options"
            )
    jobs = [(root, design, seed, episode_id, fps, seconds) for episode_id in wanted if episode_id not in done]
    print(f"{len(jobs)} episodes to record, {len(wanted) - len(jobs)} are there", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        if not jobs:
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, _leave_interrupts_to_parent, maxtasksperchild=EPISODES_PER_WORKER) as pool:
            for count, (episode_id, text, success) in enumerate(pool.imap_unordered(_record_one, jobs), start=1):
                pace = (time.monotonic() - started) / count
                outcome = "done" if success else "failed"
                line = f"[{count}/{len(jobs)}] episode {episode_id}: {text} ({outcome}), {pace:.1f} s per episode"
                print(line, file=sys.stderr, flush=True)
    finally:
        write_meta(root, fps, validation)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _record_one(job: tuple[Path, str, int, int, int, float]) -> tuple[int, str, bool]:
    root, design, seed, episode_id, fps, seconds = job
    episode = record_episode(seed, episode_id, fps=fps, seconds=seconds, design=DESIGNS[design])
    write_episode(root, episode, seed)
    return episode_id, episode.instruction, episode.success
