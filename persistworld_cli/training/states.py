"""A run's saved states and logs as files: which states are intact, which is the newest, how to resume from another.

A run resumes from its newest intact state; newer damaged ones are set aside.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file, whole_folder, writing

STATE, LOG, WARNINGS = "state.pt", "metrics.jsonl", "warnings.jsonl"
_STEP = re.compile(r"step-\d+")
_START_ANEW = "resume from another run's state (--resume-from), or start anew (--no-resume, or another --output)"
_log = logging.getLogger(__name__)


def states_of(output: Path) -> list[Path]:
    """A run's saved states, oldest first; other files beside them are ignored."""
    found = [path for path in (output / "state").glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    """Number of updates done when a state (``.../step-00000040``) was saved."""
    return int(state.name.removeprefix("step-"))


def damage_of(state: Path) -> str:
    """What is wrong with a saved state (a ``step-N`` folder); "" for an intact one.

    The file is an archive with a checksum of every tensor. torch does not verify them, so the whole file is read here.
    """
    file = state / STATE
    if not file.exists():
        return f"it has no {STATE}"
    if not file.is_file():
        return f"{STATE} is not a file"
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        return str(error) or repr(error)
    return f"the checksum of {broken} differs" if broken else ""


def newest_whole(states: list[Path]) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest intact one of ``states`` (oldest first), and the newer ones with the damage of each.

    Raises:
        PersistWorldError: none is intact.
    """
    damaged: list[tuple[Path, str]] = []
    for state in reversed(states):
        if not (damage := damage_of(state)):
            return state, damaged
        damaged.append((state, damage))
    newest, damage = damaged[0]
    raise PersistWorldError(f"no saved state is intact; the newest: {damage}", where=str(newest), fix=_START_ANEW)


def set_aside_damaged(output: Path) -> None:
    """Rename the damaged states of a run that are newer than its newest intact one, with a warning.

    Raises:
        PersistWorldError: there are states, and none is intact.
    """
    if not (states := states_of(output)):
        return
    whole, damaged = newest_whole(states)
    for state, damage in damaged:
        endings = ("", *(f".{n}" for n in range(2, 1000)))
        aside = next(p for e in endings if not (p := state.with_name(f"damaged-{state.name}{e}")).exists())
        with writing(state):
            state.rename(aside)
        words = "the saved state %s is damaged (%s) and renamed to %s; the run continues from %s"
        _log.warning(words, state.name, damage, aside, whole.name)


def find_state(path: Path) -> Path:
    """The state that a path names: a ``step-N`` folder, the file in it, or a run's folder (its newest intact one).

    Raises:
        PersistWorldError: there is none (those nearby are named), or it is damaged.
    """
    folder = path.parent if path.name == STATE else path
    if (folder / STATE).is_file() and folder.name.removeprefix("step-").isdigit():
        if damage := damage_of(folder):
            raise PersistWorldError(f"the saved state is damaged: {damage}", where=str(folder), fix="name another one")
        return folder
    if states := states_of(folder):
        whole, damaged = newest_whole(states)
        for state, damage in damaged:
            _log.warning("the saved state %s is damaged (%s): an older one is used", state, damage)
        return whole
    near = sorted(folder.parent.glob("step-*"))
    known = f"there are: {', '.join(map(str, near))}" if near else "name a run's folder or state/step-N"
    raise PersistWorldError(f"no training state at '{path}'", where="--resume-from", fix=known)


def adopt_state(output: Path, state: Path) -> None:
    """Make a state the newest of a run: newer ones are deleted; one of another run is copied, with its logs if absent.

    Args:
        output: the run's folder.
        state: from `find_state`.
    """
    own = output / "state" / state.name
    if own.resolve() != state.resolve():
        with whole_folder(own) as partial:
            shutil.copytree(state, partial, dirs_exist_ok=True)
        for name in (LOG, WARNINGS):
            log, past = output / name, state.parent.parent / name
            if not log.exists() and past.exists():
                with whole_file(log) as file:
                    shutil.copyfile(past, file)  # lines after the state are dropped when it is loaded
    for later in states_of(output):
        if step_of(later) > step_of(state):
            shutil.rmtree(later)


def require_same_shapes(saved: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor], settings: str) -> None:
    """Refuse a state of another model or adapter before any of it is loaded.

    Args:
        saved, now: name -> tensor.
        settings: names of the settings that decide the shapes.

    Raises:
        PersistWorldError: naming the first tensor that differs.
    """
    for name in [*now, *saved]:
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (now, saved))
        if ours != theirs:
            raise PersistWorldError(
                f"the saved state is of another model: {name} is {theirs or 'absent'} there, {ours or 'absent'} here",
                where="state/",
                fix=f"resume with the settings it was saved under ({settings}), or start anew (--no-resume, --output)",
            )


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or warnings.jsonl, without damaged or truncated ones."""
    return [entry for _, entry in numbered_log(path) if entry is not None]


def numbered_log(path: Path) -> list[tuple[int, dict[str, Any] | None]]:
    """(line number from 1, its content; None for a damaged line) of a log; [] if there is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [(number, _entry(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _entry(line: str) -> dict[str, Any] | None:
    """A line of a log; None for a damaged one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if isinstance(step, int) and not isinstance(step, bool) else None
