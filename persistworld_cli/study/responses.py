"""From the files that raters hand in, and the key, to the result of a blind study."""

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
from persistworld_cli.read_files import parse_json, reading, reason
from persistworld_cli.statistics.paired import FloatArray
from persistworld_cli.statistics.preference import (
    elo,
    elo_interval,
    fleiss_kappa,
    islands,
    kappa_words,
    preference,
)
from persistworld_cli.study.key import KIND as KEY_KIND
from persistworld_cli.study.key import StudyKey, Trial, load_key

KIND = "persistworld study answers"  # the page writes it
CHOICES = ("a", "b", "neither")
ALL = "all"  # the row of all camera groups together
NEITHER = -1


@dataclass(frozen=True)
class Vote:
    """One answer, with what the key says of it.

    Attributes:
        rater: who.
        study: id.
        trial: the question.
        chosen: index of the preferred model among the study's two, or `NEITHER`.
        side: ``left`` or ``right``; "" for `NEITHER`.
        seconds: from the first frame to the answer; NaN where the file does not say.
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
class Sheet:
    """One rater's file."""

    path: Path
    rater: str
    study: str
    asked: int
    votes: tuple[Vote, ...]


# -- reading ------------------------------------------------------------------------------------------------------


def read_study(files: Sequence[Path], keys: Sequence[Path] = ()) -> tuple[dict[str, StudyKey], list[Sheet]]:
    """Read answers and the keys they need.

    Args:
        files: what raters handed in.
        keys: key files; with none, ``*.key.json`` are looked for beside the answers, one folder up, in the current
            folder and in its ``outputs``.

    Raises:
        PersistWorldError: a file that is no answers file, or of a study that no key is of, or twice the same rater.
    """
    raw = [(path, _load_answers(path)) for path in files]
    wanted = {str(data["study"]) for _, data in raw}
    opened = [load_key(path) for path in (keys or _keys_around(files, wanted))]
    known = {key.study: key for key in opened}
    sheets = []
    for path, data in raw:
        key = known.get(str(data["study"]))
        if key is None:
            raise _without_key(path, str(data["study"]), known, bool(keys))
        with reading("unreadable answers", path, "ask the rater to download the file again"):
            sheets.append(_sheet(path, data, key))
    _check_raters(sheets)
    return {study: known[study] for study in sorted(wanted)}, sheets


def _load_answers(path: Path) -> dict[str, Any]:
    """The JSON of an answers file, its outer shape checked."""
    fix = "name the files that raters downloaded from the page (answers-....json)"
    if path.is_dir():
        raise UsageError("this is a folder", where=str(path), fix=f"name the files in it: {path}/*.json")
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PersistWorldError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise PersistWorldError(f"this is no JSON file: {reason(error)}", where=str(path), fix=fix) from error
    if isinstance(data, dict) and data.get("kind") == KEY_KIND:
        raise UsageError("this is a study's key, not answers", where=str(path), fix=f"give it as --key {path}")
    if not (isinstance(data, dict) and data.get("kind") == KIND and isinstance(data.get("answers"), list)):
        raise PersistWorldError("this file holds no answers of a study", where=str(path), fix=fix)
    if not data.get("study") or not str(data.get("rater") or "").strip():
        raise PersistWorldError("the file lacks the study's id or the rater's name", where=str(path), fix=fix)
    return data


def _keys_around(files: Sequence[Path], wanted: set[str]) -> list[Path]:
    """Keys of the wanted studies near the files. Other files called ``*.key.json`` do not matter."""
    folders = dict.fromkeys(
        folder.resolve() for path in files for folder in (path.parent, path.parent / "..", Path(), Path("outputs"))
    )
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.key.json"))):
        try:
            if load_key(path).study in wanted:
                found.append(path)
        except PersistWorldError:  # somebody else's file of that name
            continue
    return found


def _without_key(path: Path, study: str, known: Mapping[str, StudyKey], given: bool) -> PersistWorldError:
    if given:
        return PersistWorldError(
            f"these are answers to study {study}, the key is of study {', '.join(sorted(known))}",
            where=str(path),
            fix="leave the file out, or add that study's key with another --key",
        )
    return UsageError(
        f"no key of study {study}",
        where=str(path),
        fix="give --key FILE: `persistworld eval --study DIR` wrote it as DIR.key.json, beside DIR",
    )


def _sheet(path: Path, data: Mapping[str, Any], key: StudyKey) -> Sheet:
    """An answers file with the key applied. Raises PersistWorldError for answers that the study does not have."""
    trials = {trial.id: trial for trial in key.trials}
    rater, votes = str(data["rater"]).strip(), {}
    for answer in data["answers"]:
        name = answer.get("trial") if isinstance(answer, dict) else None
        if name not in trials or answer.get("choice") not in CHOICES or name in votes:
            raise PersistWorldError(
                f"an answer that the study does not have: {json.dumps(answer)[:120]}",
                where=str(path),
                fix="the file was changed or is damaged: ask the rater to download it again",
            )
        trial, choice = trials[name], CHOICES.index(answer["choice"])
        chosen = NEITHER if choice == 2 else trial.first if choice == 0 else 1 - trial.first
        seconds = answer.get("seconds")
        side = str(answer.get("side") or "")
        took = float(seconds) if isinstance(seconds, int | float) else math.nan
        votes[name] = Vote(rater, key.study, trial, chosen, side, took)
    return Sheet(path, rater, key.study, len(trials), tuple(votes.values()))


def _check_raters(sheets: Sequence[Sheet]) -> None:
    """Refuse two files of one rater (they would count twice), and answers that are all empty."""
    seen: dict[tuple[str, str], Path] = {}
    for sheet in sheets:
        who = (sheet.study, sheet.rater.casefold())
        if who in seen:
            raise PersistWorldError(
                f"two files of rater '{sheet.rater}'",
                where=f"{seen[who]}, {sheet.path}",
                fix='keep the later one; if they are two people, change "rater" in one of the files',
            )
        seen[who] = sheet.path
    if not any(sheet.votes for sheet in sheets):
        raise PersistWorldError("nobody has answered anything", where=str(sheets[0].path), fix="wait for answers")


# -- the result ---------------------------------------------------------------------------------------------------


def study_result(keys: Mapping[str, StudyKey], sheets: Sequence[Sheet], samples: int = 2000) -> dict[str, Any]:
    """Everything as one dictionary that JSON can hold (NaN becomes None).

    Args:
        keys: id -> key of the studies.
        sheets: the answers.
        samples: of the bootstrap over episodes.
    """
    names = model_names(keys.values())
    incomplete = [sheet for sheet in sheets if len(sheet.votes) < sheet.asked]
    rows = [row for key in keys.values() for row in _preferences(key, sheets, names, samples)]
    return {
        "kind": "study-report",
        "studies": [
            {"study": key.study, "models": _pair(key, names), "trials": len(key.trials)} for key in keys.values()
        ],
        "raters": [_rater_row(sheet) for sheet in sheets],
        "incomplete": len(incomplete),
        "preference": rows,
        **_elo(keys, sheets, names),
    }


def model_names(keys: Iterable[StudyKey]) -> dict[str, str]:
    """Identity of each model's weights -> a name for tables; where labels are equal, with a piece of the hash."""
    labels = {_identity(model): model["label"] for key in keys for model in key.models}
    many = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    return {own: f"{label} {_short(own)}" if label in many else label for own, label in labels.items()}


def _identity(model: Mapping[str, str]) -> str:
    return f"{model.get('ckpt_sha256', '')}+{model.get('adapter_sha256', '')}"


def _short(identity: str) -> str:
    return next(part for part in reversed(identity.split("+")) if part)[:6]


def _pair(key: StudyKey, names: Mapping[str, str]) -> list[str]:
    return [names[_identity(model)] for model in key.models]


def _rater_row(sheet: Sheet) -> dict[str, Any]:
    """What a rater did: how much, how fast, how often left."""
    decided = [vote for vote in sheet.votes if vote.chosen != NEITHER]
    seconds = [vote.seconds for vote in sheet.votes if math.isfinite(vote.seconds)]
    return {
        "rater": sheet.rater,
        "study": sheet.study,
        "answered": len(sheet.votes),
        "of": sheet.asked,
        "cannot_tell": len(sheet.votes) - len(decided),
        "left": sum(vote.side == "left" for vote in decided) / len(decided) if decided else None,
        "median_seconds": float(np.median(seconds)) if seconds else None,
        "file": str(sheet.path),
    }


def _preferences(
    key: StudyKey, sheets: Sequence[Sheet], names: Mapping[str, str], samples: int
) -> Iterator[dict[str, Any]]:
    """One row for each camera group of a study, and one for all together."""
    votes = [vote for sheet in sheets if sheet.study == key.study for vote in sheet.votes]
    base, new = _pair(key, names)
    groups = sorted({trial.cameras for trial in key.trials})
    for group in [*groups, ALL] if groups != [ALL] and len(groups) > 1 else groups:
        own = [vote for vote in votes if group in (ALL, vote.trial.cameras)]
        scores = np.array([vote.score for vote in own])
        found = preference(scores, [vote.trial.episode for vote in own], samples=samples)
        kappa = fleiss_kappa(vote_counts(own))
        yield {
            "study": key.study,
            "base": base,
            "new": new,
            "cameras": group,
            "answers": found.rollouts,
            "raters": len({vote.rater for vote in own}),
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


def vote_counts(votes: Sequence[Vote]) -> NDArray[np.int64]:
    """How many raters chose baseline, new model and neither for each question: (N, 3)."""
    trials = {name: row for row, name in enumerate(dict.fromkeys(vote.trial.id for vote in votes))}
    counts = np.zeros((len(trials), 3), np.int64)
    for vote in votes:
        counts[trials[vote.trial.id], vote.chosen] += 1  # NEITHER is the last column
    return counts


def _elo(keys: Mapping[str, StudyKey], sheets: Sequence[Sheet], names: Mapping[str, str]) -> dict[str, Any]:
    """Ratings of all models of all studies together, best first."""
    order = list(names)
    games = episode_games(keys, sheets, order)
    total = games.sum(axis=0)
    ratings, (low, high) = elo(total), elo_interval(games)
    rows = [
        {
            "model": names[own],
            "elo": float(ratings[index]),
            "low": jsonable(low[index]),
            "high": jsonable(high[index]),
            "games": float(total[index].sum() + total[:, index].sum()),
        }
        for index, own in enumerate(order)
    ]
    apart = len(islands((total + total.T) > 0)) > 1
    return {"elo": sorted(rows, key=lambda row: -row["elo"]), "elo_comparable": not apart}


def episode_games(keys: Mapping[str, StudyKey], sheets: Sequence[Sheet], order: Sequence[str]) -> FloatArray:
    """Games of each episode as `agreement.elo` wants them: (E, M, M), a draw half a win for both."""
    votes = [vote for sheet in sheets for vote in sheet.votes]
    episodes = {name: row for row, name in enumerate(dict.fromkeys(vote.trial.episode for vote in votes))}
    games = np.zeros((len(episodes), len(order), len(order)))
    for vote in votes:
        base, new = (order.index(_identity(model)) for model in keys[vote.study].models)
        games[episodes[vote.trial.episode], new, base] += vote.score
        games[episodes[vote.trial.episode], base, new] += 1 - vote.score
    return games
