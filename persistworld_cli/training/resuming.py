"""Saved states of a run as files: which is the newest, and going on from one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import whole_file, whole_folder
from persistworld_cli.training.whole_states import STATE, newest_whole, require_whole, states_of, step_of

LOG, WARNINGS = "metrics.jsonl", "warnings.jsonl"


def newest_step(states: Sequence[Path]) -> int:
    """Of states, oldest first; 0 where there are none."""
    return step_of(states[-1]) if states else 0


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or warnings.jsonl, less those that are damaged or cut off."""
    return [entry for _, entry in numbered_log(path) if entry is not None]


def numbered_log(path: Path) -> list[tuple[int, dict[str, Any] | None]]:
    """(line number from 1, what it says; None for a damaged one) of a metrics.jsonl; [] where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(number, _entry(line)) for number, line in lines]


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the log; None for one that is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return entry if isinstance(step, int) and not isinstance(step, bool) else None


def find_state(path: Path) -> Path:
    """The state that a path means: a ``step-N`` folder, the file in it, or a run's folder (its newest whole one).

    Raises:
        PersistWorldError: there is none (those that lie near are named), or it is damaged.
    """
    folder = path.parent if path.name == STATE else path
    if (folder / STATE).is_file() and folder.name.removeprefix("step-").isdigit():
        require_whole(folder)
        return folder
    if states := states_of(folder):
        return newest_whole(states)
    near = sorted(folder.parent.glob("step-*"))
    known = f"there are: {', '.join(str(state) for state in near)}" if near else "name a run's folder or state/step-N"
    raise PersistWorldError(f"no training state at '{path}'", where="--resume-from", fix=known)


def adopt_state(output: Path, state: Path) -> None:
    """Make a state the newest of a run: later ones go, one of another run is copied, with its log where there is none.

    Args:
        output: the run's folder.
        state: as `find_state` gives it.
    """
    own = output / "state" / state.name
    if own.resolve() != state.resolve():
        with whole_folder(own) as partial:
            shutil.copytree(state, partial, dirs_exist_ok=True)
        for name in (LOG, WARNINGS):
            log, past = output / name, state.parent.parent / name
            if not log.exists() and past.exists():
                with whole_file(log) as file:
                    shutil.copyfile(past, file)  # what comes after the state is dropped when it is loaded
    for later in states_of(output):
        if step_of(later) > step_of(state):
            shutil.rmtree(later)


def require_same_shapes(saved: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor], settings: str) -> None:
    """Refuse a state of another model or adapter before any of it is put in place.

    Args:
        saved, now: name -> tensor.
        settings: which ones decide it.

    Raises:
        PersistWorldError: naming the first tensor that differs.
    """
    for name in [*now, *saved]:
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (now, saved))
        if ours != theirs:
            raise PersistWorldError(
                f"the saved state is another model's: {name} is {theirs or 'absent'} there and {ours or 'absent'} here",
                where="state/",
                fix=f"go on with the settings it was saved under ({settings}), or begin anew (--no-resume, --output)",
            )
