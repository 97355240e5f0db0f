"""Compute the result of a blind study from the raters' files and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import jsonable
from persistworld_cli.read_files import parse_json, reading
from persistworld_cli.statistics.paired import FloatArray
from persistworld_cli.statistics.preference import elo, elo_interval, fleiss_kappa, islands, kappa_words, preference
from persistworld_cli.study.key import KIND as KEY_KIND
from persistworld_cli.study.key import StudyKey, Trial, load_key

KIND = "persistworld study answers"  # the page writes it
CHOICES = ("a", "b", "neither")
ALL = "all"  # the row over all camera groups
NEITHER = -1


@dataclass(frozen=True)
class Response:
    """One response, with the key applied.

    Attributes:
        rater: name.
        study: id.
        trial: the question.
        chosen: index of the preferred model among the study's two, or `NEITHER`.
        side: ``left`` or ``right``; "" for `NEITHER`.
        seconds: from the first frame to the response; NaN where the file lacks it.
    """

    rater: str
    study: str
    trial: Trial
    chosen: int
    side: str
    seconds: float

    @property
    def score(self) -> float:
        """1 for the new model, 0 for the baseline, 1/2 for neither."""
        return 0.5 if self.chosen == NEITHER else float(self.chosen)


@dataclass(frozen=True)
class ResponseFile:
    """One rater's responses, and the number of questions in the study."""

    path: Path
    rater: str
    study: str
    questions: int
    responses: tuple[Response, ...]


# -- reading ------------------------------------------------------------------------------------------------------


def read_study(files: Sequence[Path], keys: Sequence[Path] = ()) -> tuple[dict[str, StudyKey], list[ResponseFile]]:
    """Read raters' files and the keys they need.

    Args:
        files: the raters' files.
        keys: key files; if empty, ``*.key.json`` is searched beside the files, one folder up, in the current folder
            and in its ``outputs``.

    Raises:
        PersistWorldError: a file without responses, a study without a key, or two files of one rater.
    """
    raw = [(path, _load(path)) for path in files]
    wanted = {str(data["study"]) for _, data in raw}
    known = {key.study: key for key in (map(load_key, keys) if keys else _keys_around(files, wanted))}
    read: list[ResponseFile] = []
    for path, data in raw:
        study = str(data["study"])
        if study not in known and keys:
            raise PersistWorldError(
                f"these are answers to study {study}, the key is of study {', '.join(sorted(known))}",
                where=str(path),
                fix="leave the file out, or add that study's key with another --key",
            )
        if study not in known:
            raise UsageError(
                f"no key of study {study}",
                where=str(path),
                fix="give --key FILE: `persistworld eval --study DIR` wrote it as DIR.key.json, beside DIR",
            )
        with reading("unreadable answers", path, "ask the rater to download the file again"):
            read.append(_apply_key(path, data, known[study]))
    _check_raters(read)
    return {study: known[study] for study in sorted(wanted)}, read


def _load(path: Path) -> dict[str, Any]:
    """The JSON of a rater's file, its outer shape checked."""
    fix = "name the files that raters downloaded from the page (answers-....json)"
    if path.is_dir():
        raise UsageError("this is a folder", where=str(path), fix=f"name the files in it: {path}/*.json")
    with reading("cannot be read", path, fix):
        data = parse_json(path.read_text(encoding="utf-8"))
    if isinstance(data, dict) and data.get("kind") == KEY_KIND:
        raise UsageError("this is a study's key, not answers", where=str(path), fix=f"give it as --key {path}")
    if not (isinstance(data, dict) and data.get("kind") == KIND and isinstance(data.get("answers"), list)):
        raise PersistWorldError("this file holds no answers of a study", where=str(path), fix=fix)
    if not data.get("study") or not str(data.get("rater") or "").strip():
        raise PersistWorldError("the file lacks the study's id or the rater's name", where=str(path), fix=fix)
    return data


def _keys_around(files: Sequence[Path], wanted: set[str]) -> Iterator[StudyKey]:
    """Keys of the wanted studies near the files; other files called ``*.key.json`` are ignored."""
    folders = dict.fromkeys(
        folder.resolve() for path in files for folder in (path.parent, path.parent / "..", Path(), Path("outputs"))
    )
    for path in (path for folder in folders for path in sorted(folder.glob("*.key.json"))):
        try:
            key = load_key(path)
        except PersistWorldError:  # another program's file of that name
            continue
        if key.study in wanted:
            yield key


def _apply_key(path: Path, data: Mapping[str, Any], key: StudyKey) -> ResponseFile:
    """A rater's file with the key applied. Raises PersistWorldError for responses that the study does not have."""
    trials = {trial.id: trial for trial in key.trials}
    rater, responses = str(data["rater"]).strip(), {}
    for answer in data["answers"]:
        name = answer.get("trial") if isinstance(answer, dict) else None
        if name not in trials or answer.get("choice") not in CHOICES or name in responses:
            raise PersistWorldError(
                f"an answer that the study does not have: {json.dumps(answer)[:120]}",
                where=str(path),
                fix="the file was changed or is damaged: ask the rater to download it again",
            )
        trial, choice, seconds = trials[name], answer["choice"], answer.get("seconds")
        chosen = NEITHER if choice == "neither" else trial.first if choice == "a" else 1 - trial.first
        took = float(seconds) if isinstance(seconds, int | float) else math.nan
        responses[name] = Response(rater, key.study, trial, chosen, str(answer.get("side") or ""), took)
    return ResponseFile(path, rater, key.study, len(trials), tuple(responses.values()))


def _check_raters(files: Sequence[ResponseFile]) -> None:
    """Refuse two files of one rater (they would count twice), and files without any response."""
    seen: dict[tuple[str, str], Path] = {}
    for file in files:
        who = (file.study, file.rater.casefold())
        if who in seen:
            raise PersistWorldError(
                f"two files of rater '{file.rater}'",
                where=f"{seen[who]}, {file.path}",
                fix='keep the later one; if they are two people, change "rater" in one of the files',
            )
        seen[who] = file.path
    if not any(file.responses for file in files):
        raise PersistWorldError("no file holds an answer", where=str(files[0].path), fix="wait for answers")


# -- the result ---------------------------------------------------------------------------------------------------


def study_result(keys: Mapping[str, StudyKey], files: Sequence[ResponseFile], samples: int = 2000) -> dict[str, Any]:
    """Everything as one dictionary that JSON can hold (NaN becomes None).

    Args:
        keys: id -> key of the studies.
        files: the responses.
        samples: of the bootstrap over episodes.
    """
    names = model_names(keys.values())
    responses = [response for file in files for response in file.responses]
    return {
        "kind": "study-report",
        "studies": [
            {"study": key.study, "models": _pair(key, names), "trials": len(key.trials)} for key in keys.values()
        ],
        "raters": [_rater_row(file) for file in files],
        "incomplete": sum(len(file.responses) < file.questions for file in files),
        "preference": [row for key in keys.values() for row in _preferences(key, responses, names, samples)],
        **_elo(keys, responses, names),
    }


def model_names(keys: Iterable[StudyKey]) -> dict[str, str]:
    """Hash of each model's weights -> a name for tables; equal labels get a part of the hash."""
    labels = {_identity(model): model["label"] for key in keys for model in key.models}
    shared = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    return {own: f"{label} {_short(own)}" if label in shared else label for own, label in labels.items()}


def _identity(model: Mapping[str, str]) -> str:
    return f"{model.get('ckpt_sha256', '')}+{model.get('adapter_sha256', '')}"


def _short(identity: str) -> str:
    return next(part for part in reversed(identity.split("+")) if part)[:6]


def _pair(key: StudyKey, names: Mapping[str, str]) -> list[str]:
    return [names[_identity(model)] for model in key.models]


def _rater_row(file: ResponseFile) -> dict[str, Any]:
    """A rater's number of responses, median time, and share of left choices."""
    decided = [response for response in file.responses if response.chosen != NEITHER]
    seconds = [response.seconds for response in file.responses if math.isfinite(response.seconds)]
    return {
        "rater": file.rater,
        "study": file.study,
        "responses": len(file.responses),
        "questions": file.questions,
        "cannot_tell": len(file.responses) - len(decided),
        "left": sum(response.side == "left" for response in decided) / len(decided) if decided else None,
        "median_seconds": float(np.median(seconds)) if seconds else None,
        "file": str(file.path),
    }


def _preferences(
    key: StudyKey, responses: Sequence[Response], names: Mapping[str, str], samples: int
) -> Iterator[dict[str, Any]]:
    """One row per camera group of a study, and one over all."""
    base, new = _pair(key, names)
    groups = sorted({trial.cameras for trial in key.trials})
    for group in [*groups, ALL] if len(groups) > 1 else groups:
        own = [one for one in responses if one.study == key.study and group in (ALL, one.trial.cameras)]
        found = preference(np.array([one.score for one in own]), [one.trial.episode for one in own], samples=samples)
        kappa = fleiss_kappa(response_counts(own))
        yield {
            "study": key.study,
            "base": base,
            "new": new,
            "cameras": group,
            "responses": found.rollouts,
            "raters": len({one.rater for one in own}),
            "episodes": found.episodes,
            "prefer_new": found.wins,
            "prefer_base": found.losses,
            "cannot_tell": found.ties,
            "rate": jsonable(found.win_rate),
            "low": found.win_low,
            "high": found.win_high,
            "episodes_low": jsonable((1 + found.change_low) / 2),
            "episodes_high": jsonable((1 + found.change_high) / 2),
            "binomial_p": found.sign_p,
            "episodes_p": found.wilcoxon_p_episodes,
            "kappa": jsonable(kappa),
            "kappa_words": kappa_words(kappa),
            "verdict": found.verdict,
            "words": found.words,
        }


def response_counts(responses: Sequence[Response]) -> NDArray[np.int64]:
    """For each question, how many raters chose baseline, new model and neither: (N, 3)."""
    trials = {name: row for row, name in enumerate(dict.fromkeys(one.trial.id for one in responses))}
    counts = np.zeros((len(trials), 3), np.int64)
    for one in responses:
        counts[trials[one.trial.id], one.chosen] += 1  # NEITHER is the last column
    return counts


def _elo(keys: Mapping[str, StudyKey], responses: Sequence[Response], names: Mapping[str, str]) -> dict[str, Any]:
    """Ratings of all models of all studies together, best first."""
    games = episode_games(keys, responses, list(names))
    total = games.sum(axis=0)
    ratings, (low, high) = elo(total), elo_interval(games)
    rows = [
        {
            "model": name,
            "elo": float(ratings[index]),
            "low": jsonable(low[index]),
            "high": jsonable(high[index]),
            "games": float(total[index].sum() + total[:, index].sum()),
        }
        for index, name in enumerate(names.values())
    ]
    comparable = len(islands((total + total.T) > 0)) == 1
    return {"elo": sorted(rows, key=lambda row: -row["elo"]), "elo_comparable": comparable}


def episode_games(keys: Mapping[str, StudyKey], responses: Sequence[Response], order: Sequence[str]) -> FloatArray:
    """Games of each episode as `preference.elo` takes them: (E, M, M), a draw half a win for both."""
    episodes = {name: row for row, name in enumerate(dict.fromkeys(one.trial.episode for one in responses))}
    games = np.zeros((len(episodes), len(order), len(order)))
    for one in responses:
        base, new = (order.index(_identity(model)) for model in keys[one.study].models)
        games[episodes[one.trial.episode], new, base] += one.score
        games[episodes[one.trial.episode], base, new] += 1 - one.score
    return games
