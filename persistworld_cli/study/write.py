"""A blind preference study from finished rollouts: a folder to hand out, and beside it the key to keep.

Shape legend: F frames, V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import writing
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.recording import Item, Recording
from persistworld_cli.rollout.scoring import camera_groups
from persistworld_cli.study.key import StudyKey, Trial, key_path, load_key, make_key, new_secret
from persistworld_cli.study.page import Question, write_question, write_study_page

Draw = Callable[[Item], tuple[Recording, Mapping[str, NDArray[np.uint8]]]]


def camera_sets(settings: Settings) -> dict[str, tuple[int, ...]]:
    """What a question shows, name -> cameras: one group, or all cameras at once (``eval.study_cameras``)."""
    groups = camera_groups(settings.world)
    if settings.eval.study_cameras == "all" or not groups:
        return {"all": tuple(range(len(settings.world.cameras)))}
    return groups


def plan_study(
    folder: Path,
    settings: Settings,
    items: Sequence[Item],
    models: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
) -> StudyKey:
    """Draw a study's questions and sides, or find them as they were; to be called before any compute.

    Args:
        folder: of the study.
        settings: ``eval.study_cameras`` and ``eval.study_trials`` are read.
        items: the rollouts.
        models: what is compared, the baseline first: ``label``, ``ckpt_sha256``, ``adapter_sha256``, ...
        protocol: what makes a benchmark's result another one.

    Raises:
        PersistWorldError: one model only; a folder that holds something else, or the study of other rollouts.
    """
    if len(models) != 2:
        raise UsageError(
            "a study compares two models, and there is one",
            where="--study",
            fix="name what is compared: --ckpt ADAPTER_OR_WEIGHTS, or --baseline WEIGHTS",
        )
    path = key_path(folder)
    known = load_key(path) if path.exists() else None
    if known is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "there is something else already, or a study whose key is gone",
            where=str(folder),
            fix="name a folder that is new or empty",
        )
    secret = known.secret if known else new_secret()
    rollouts = [(item.episode, item.start, item.seed) for item in items]
    limit = settings.eval.study_trials
    key = make_key(secret, rollouts, list(camera_sets(settings)), models, protocol, limit)
    if known and known.study != key.study:
        raise PersistWorldError(
            "the study there is of other rollouts: other weights, episodes, starts, seeds, steps or cameras",
            where=str(folder),
            fix=f"name another folder; or, if nobody answers it any more, remove {folder} and {path}",
        )
    return key


def write_study(
    key: StudyKey, folder: Path, settings: Settings, items: Sequence[Item], labels: Sequence[str], draw: Draw
) -> dict[str, Any]:
    """Write key, videos and page. What is there already is kept, so an interrupted run continues.

    Args:
        key: from `plan_study`.
        folder: to hand out.
        settings: cameras and rate.
        items: the finished rollouts.
        labels: the two models, the baseline first.
        draw: a rollout -> its recording, and each model's frames (n, V, H, W, 3) of it as far as was recorded.

    Returns:
        What the command prints of it.

    Raises:
        PersistWorldError: unreadable recordings, or files that cannot be written.
    """
    _save_key(key, folder)
    questions = []
    with Meter("study", len(key.trials)) as meter:
        for item in items:
            trials = [trial for trial in key.trials if (trial.episode, trial.start, trial.seed) == _place(item)]
            if trials:
                questions += _questions(trials, item, folder, settings, labels, draw)
                meter.advance(len(trials))
    page = write_study_page(folder, key.study, questions, settings.world.rate_hz)
    return {"page": str(page), "key": str(key_path(folder)), "questions": len(questions), "study": key.study}


def _place(item: Item) -> tuple[str, int, int]:
    return item.episode, item.start, item.seed


def _save_key(key: StudyKey, folder: Path) -> None:
    """The key before anything else: a folder without one cannot be continued."""
    key.save(key_path(folder))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _questions(
    trials: Sequence[Trial],
    item: Item,
    folder: Path,
    settings: Settings,
    labels: Sequence[str],
    draw: Draw,
) -> list[Question]:
    """The videos of one rollout, and what the page knows of them."""
    recording, drawn = draw(item)
    recorded = _from_start(recording.first, recording.frames[: int(recording.valid.sum())])
    made = [_from_start(recording.first, drawn[label]) for label in labels]
    sets, names = camera_sets(settings), settings.world.cameras
    out = []
    for trial in trials:
        views = list(sets[trial.cameras])
        panes = [frames[:, views] for frames in (recorded, made[trial.first], made[1 - trial.first])]
        shown = ", ".join(names[view].replace("_", " ") for view in views)
        text = recording.annotation.text
        out.append(write_question(folder, trial.id, panes, shown, text, settings.world.rate_hz))
    return out


def _from_start(first: NDArray[np.uint8], frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The start frame (V, H, W, 3), which is real everywhere, before the others (F, V, H, W, 3)."""
    return np.concatenate([first[None], frames])
