"""Write a blind preference study from finished rollouts: a folder to hand out, and beside it the secret key.

Shape legend: F frames, V cameras, H, W pixels.
"""

from __future__ import annotations

import secrets
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
from persistworld_cli.study.key import StudyKey, key_path, load_key, make_key
from persistworld_cli.study.page import write_question, write_study_page

Draw = Callable[[Item], tuple[Recording, Mapping[str, NDArray[np.uint8]]]]


def camera_sets(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name -> cameras of a question: one group, or all cameras at once (``eval.study_cameras``)."""
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
    """Draw a study's questions and sides, or find those of an interrupted study, before anything is computed.

    Args:
        folder: of the study.
        settings: ``eval.study_cameras`` and ``eval.study_trials`` are read.
        items: the rollouts.
        models: the two to compare, the baseline first: ``label``, ``ckpt_sha256``, ``adapter_sha256``, ...
        protocol: distinguishes the results of one benchmark from those of another.

    Raises:
        PersistWorldError: only one model; a folder that holds something else, or a study of other rollouts.
    """
    if len(models) != 2:
        raise UsageError(
            "a study compares two models, but there is one",
            where="--study",
            fix="name the other model: --ckpt ADAPTER_OR_WEIGHTS, or --baseline WEIGHTS",
        )
    path = key_path(folder)
    known = load_key(path) if path.exists() else None
    if known is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            "the folder holds something else, or a study without its key",
            where=str(folder),
            fix="name a new or empty folder",
        )
    secret = known.secret if known else secrets.token_hex(16)
    rollouts = [(item.episode, item.start, item.seed) for item in items]
    key = make_key(secret, rollouts, list(camera_sets(settings)), models, protocol, settings.eval.study_trials)
    if known and known.study != key.study:
        raise PersistWorldError(
            "the folder holds a study of other rollouts: other weights, episodes, starts, seeds, steps or cameras",
            where=str(folder),
            fix=f"name another folder; or, if that study is over, remove {folder} and {path}",
        )
    return key


def write_study(
    key: StudyKey, folder: Path, settings: Settings, items: Sequence[Item], labels: Sequence[str], draw: Draw
) -> dict[str, Any]:
    """Write key, videos and page. Existing videos are kept, so an interrupted run continues.

    Args:
        key: from `plan_study`.
        folder: to hand out.
        settings: cameras and rate.
        items: the finished rollouts.
        labels: the two models, the baseline first.
        draw: a rollout -> its recording, and each model's frames (n, V, H, W, 3), as far as the recording goes.

    Returns:
        ``page`` and ``key`` (paths), ``questions`` (how many), ``study`` (id).

    Raises:
        PersistWorldError: unreadable recordings, or files that cannot be written.
    """
    key.save(key_path(folder))  # first: a folder without it cannot be continued
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    questions, world, sets = [], settings.world, camera_sets(settings)
    with Meter("study", len(key.trials)) as meter:
        for item in items:
            place = item.episode, item.start, item.seed
            trials = [trial for trial in key.trials if (trial.episode, trial.start, trial.seed) == place]
            if not trials:
                continue
            recording, drawn = draw(item)
            frames = [recording.frames[: int(recording.valid.sum())], *(drawn[label] for label in labels)]
            recorded, *made = (np.concatenate([recording.first[None], part]) for part in frames)  # the start is real
            for trial in trials:
                views = list(sets[trial.cameras])
                panes = [part[:, views] for part in (recorded, made[trial.first], made[1 - trial.first])]
                shown = ", ".join(world.cameras[view].replace("_", " ") for view in views)
                text = recording.annotation.text
                questions.append(write_question(folder, trial.id, panes, shown, text, world.rate_hz))
            meter.advance(len(trials))
    page = write_study_page(folder, key.study, questions, world.rate_hz)
    return {"page": str(page), "key": str(key_path(folder)), "questions": len(questions), "study": key.study}
