"""The key of a blind study: which model each side of each video is. Whoever answers must not have it.

Sides are a pure function of a secret that is drawn once and kept in the key file: a seed that can be guessed would be
a key that can be guessed.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import hash_of, write_json
from persistworld_cli.read_files import parse_json

KIND = "persistworld study key"


@dataclass(frozen=True)
class Trial:
    """One question to the rater: a rollout seen by some cameras.

    Attributes:
        id: names the video; says nothing about what is in it.
        episode, start, seed: the rollout.
        cameras: the camera group shown.
        first: index of the model that is "a" in the video; the other one is "b".
    """

    id: str
    episode: str
    start: int
    seed: int
    cameras: str
    first: int


@dataclass(frozen=True)
class StudyKey:
    """Everything that a report needs beside the answers.

    Attributes:
        study: id; answers carry it too.
        secret: what sides and ids are drawn from.
        models: two of them, the baseline first: ``label`` and hashes, as in ``eval.json``.
        trials: all questions.
    """

    study: str
    secret: str
    models: tuple[Mapping[str, str], ...]
    trials: tuple[Trial, ...]

    def save(self, path: Path) -> None:
        """As JSON. Raises CannotWrite."""
        write_json(path, {"kind": KIND, **asdict(self)})


def key_path(folder: Path) -> Path:
    """Where the key of the study in a folder lies: beside the folder, so that handing out the folder keeps it back."""
    return folder.with_name(f"{folder.name}.key.json")


def new_secret() -> str:
    """128 random bits as hex."""
    return secrets.token_hex(16)


def make_key(
    secret: str,
    rollouts: Sequence[tuple[str, int, int]],
    groups: Sequence[str],
    models: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    limit: int = 0,
) -> StudyKey:
    """Draw the questions and their sides; the same secret draws the same.

    Each model is "a" in half of the videos.

    Args:
        secret: from `new_secret`, or of a key that is there.
        rollouts: (episode, start, seed) of each.
        groups: camera groups; each rollout is asked about once for each.
        models: two of them, the baseline first; names, paths and hashes are kept.
        protocol: what else makes a study another one.
        limit: at most so many questions, drawn at random; 0: all.
    """
    draw = random.Random(secret)
    asked = [(*rollout, group) for rollout in rollouts for group in groups]
    draw.shuffle(asked)
    asked = asked[:limit] if limit else asked
    sides = [index % 2 for index in range(len(asked))]
    draw.shuffle(sides)
    trials = tuple(
        Trial(hash_of([secret, *question]), *question, first=side) for question, side in zip(asked, sides, strict=True)
    )
    kept = tuple({name: value for name, value in model.items() if isinstance(value, str)} for model in models)
    study = hash_of([secret, [asdict(trial) for trial in trials], kept, protocol])
    return StudyKey(study, secret, kept, trials)


def _sound(key: StudyKey) -> bool:
    """Whether everything in a key is of the kind that it should be."""
    texts = [
        key.study,
        key.secret,
        *(text for trial in key.trials for text in (trial.id, trial.episode, trial.cameras)),
    ]
    numbers = [number for trial in key.trials for number in (trial.start, trial.seed, trial.first)]
    texts += [text for model in key.models for text in (model["label"], *model.values())]
    return (
        len(key.models) == 2
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
        and all(trial.first in (0, 1) for trial in key.trials)
    )


def load_key(path: Path) -> StudyKey:
    """Read a key file.

    Raises:
        PersistWorldError: no such file, or no key.
    """
    fix = "name the .key.json that `persistworld eval --study` wrote beside the study's folder"
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        if data.pop("kind") != KIND:
            raise ValueError("another kind of file")
        trials = tuple(Trial(**trial) for trial in data.pop("trials"))
        key = StudyKey(trials=trials, models=tuple(data.pop("models")), **data)
        if not _sound(key):
            raise ValueError("values of another kind")
        return key
    except OSError as error:
        raise PersistWorldError(f"the key cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PersistWorldError("this file is no study's key", where=str(path), fix=fix) from error
