"""The key of a blind study: which model is on each side of each video. Raters must not have it.

Sides are a pure function of a secret that is drawn once and kept in the key file. A guessable seed would make the key
guessable.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.files import hash_of, write_json
from persistworld_cli.read_files import as_object, parse_json, reading

KIND = "persistworld study key"


@dataclass(frozen=True)
class Trial:
    """One question to the rater: a rollout (episode, start, seed) seen by a camera group.

    `id` names the video and reveals nothing about it; `first` is the index of the model that is "a" in the video.
    """

    id: str
    episode: str
    start: int
    seed: int
    cameras: str
    first: int


@dataclass(frozen=True)
class StudyKey:
    """Everything that a report needs besides the responses.

    Attributes:
        study: id, which the responses carry too.
        secret: source of sides and ids.
        models: two, the baseline first: ``label`` and hashes, as in ``eval.json``.
        trials: all questions.
    """

    study: str
    secret: str
    models: tuple[Mapping[str, str], ...]
    trials: tuple[Trial, ...]

    def save(self, path: Path) -> None:
        """Write the key as JSON. Raises CannotWrite."""
        write_json(path, {"kind": KIND, **asdict(self)})


def key_path(folder: Path) -> Path:
    """Path of a study's key: a file beside the folder, so that the folder can be handed out."""
    return folder.with_name(f"{folder.name}.key.json")


def make_key(
    secret: str,
    rollouts: Sequence[tuple[str, int, int]],
    groups: Sequence[str],
    models: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    limit: int = 0,
) -> StudyKey:
    """Draw the questions and their sides from a secret; each model is "a" in half of the videos.

    Args:
        secret: random text.
        rollouts: (episode, start, seed) of each.
        groups: camera groups; each rollout gives one question per group.
        models: two, the baseline first; names, paths and hashes are kept.
        protocol: what else distinguishes studies.
        limit: maximum number of questions, drawn at random; 0: all.
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


def _check(key: StudyKey) -> None:
    """Raise ValueError if a value of a key has the wrong type."""
    texts = [key.study, key.secret, *(text for model in key.models for text in (model["label"], *model.values()))]
    texts += [text for trial in key.trials for text in (trial.id, trial.episode, trial.cameras)]
    numbers = [number for trial in key.trials for number in (trial.start, trial.seed, trial.first)]
    sound = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    if not sound or len(key.models) != 2 or any(trial.first not in (0, 1) for trial in key.trials):
        raise ValueError("values of another kind")


def load_key(path: Path) -> StudyKey:
    """Read a key file. Raises PersistWorldError: it cannot be read, or is not a key."""
    fix = "name the .key.json that `persistworld eval --study` wrote beside the study's folder"
    with reading("not the key of a study", path, fix):
        data = as_object(parse_json(path.read_text(encoding="utf-8")))
        if data.pop("kind") != KIND:
            raise ValueError("another kind of file")
        trials = tuple(Trial(**trial) for trial in data.pop("trials"))
        key = StudyKey(trials=trials, models=tuple(data.pop("models")), **data)
        _check(key)
        return key
