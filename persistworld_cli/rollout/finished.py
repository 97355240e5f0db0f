"""Finished rollouts on disk: an interrupted run continues from them, and several processes share them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.files import whole_file
from persistworld_cli.read_files import reading
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.recording import Item

_log = logging.getLogger(__name__)

_RESUME = "free some disk and run the same command again: finished rollouts stay"


def pending(folder: Path, work: Sequence[Sequence[Item]]) -> list[Item]:
    """The items of all batches in which a finished file is missing."""
    return [item for batch in work if any(not _path(folder, item).is_file() for item in batch) for item in batch]


def log_finished(folders: Sequence[Path], items: Sequence[Item]) -> None:
    """Log how many of the rollouts an earlier run finished; nothing where there are none."""
    done, total = sum(_path(folder, item).is_file() for folder in folders for item in items), len(folders) * len(items)
    if done == total:
        _log.info("finished; nothing was rolled out: all %d rollouts exist already", total)
    elif done:
        _log.info("resuming: %d of %d rollouts are finished", done, total)


def save_rollout(folder: Path, rollout: ScoredRollout) -> None:
    """Write a rollout's file atomically. Raises CannotWrite."""
    arrays: dict[str, Any] = {f"score.{name}": value for name, value in rollout.scores.items()}
    if rollout.latents is not None:
        arrays["latents"] = rollout.latents
    with whole_file(_path(folder, rollout.item), _RESUME) as partial:
        np.savez(partial, valid=rollout.valid, seconds=rollout.seconds, **arrays)


def load_rollout(folder: Path, item: Item) -> ScoredRollout:
    """Read what `save_rollout` wrote, without the latents.

    Raises:
        PersistWorldError: a damaged file.
    """
    with _opened(folder, item) as data:
        scores = {key.removeprefix("score."): data[key] for key in data.files if key.startswith("score.")}
        return ScoredRollout(item, data["valid"], scores, None, float(data["seconds"]))


def load_latents(folder: Path, item: Item) -> NDArray[np.float16]:
    """The predicted latents (S, L, C, h, w) of a finished rollout. Raises PersistWorldError for a damaged file."""
    with _opened(folder, item) as data:
        latents: NDArray[np.float16] = data["latents"]
        return latents


def _path(folder: Path, item: Item) -> Path:
    return folder / f"{item.name}.npz"


@contextmanager
def _opened(folder: Path, item: Item) -> Iterator[Any]:
    path = _path(folder, item)
    fix = "delete the file and run again"
    with reading("unreadable rollout", path, fix), np.load(path, allow_pickle=False) as data:
        yield data
