"""Saved states of a run as files: which is the newest, and going on from one that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from persistworld_cli.errors import PersistWorldError

LOG, STATE = "metrics.jsonl", "state.pt"


def states_of(output: Path) -> list[Path]:
    """A run's whole saved states, oldest first."""
    return sorted((output / "state").glob("step-*"))


def step_of(state: Path) -> int:
    """Updates that had been done when a state (``.../step-00000040``) was saved."""
    return int(state.name.removeprefix("step-"))


def newest_step(states: Sequence[Path]) -> int:
    """Of states, oldest first; 0 where there are none."""
    return step_of(states[-1]) if states else 0


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, less a last one that was cut off (a full disk)."""
    lines = path.read_text().splitlines() if path.exists() else []
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def find_state(path: Path) -> Path:
    """The state that a path means: a ``step-N`` folder, the file in it, or a run's folder (its newest).

    Raises:
        PersistWorldError: there is none; those that lie near are named.
    """
    folder = path.parent if path.name == STATE else path
    if (folder / STATE).is_file() and folder.name.removeprefix("step-").isdigit():
        return folder
    if states := states_of(folder):
        return states[-1]
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
        beside = own.with_name(f".{own.name}.adopted")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(state, beside)
        shutil.rmtree(own, ignore_errors=True)
        beside.rename(own)
        log, past = output / LOG, state.parent.parent / LOG
        if not log.exists() and past.exists():
            shutil.copyfile(past, log)  # what comes after the state is dropped when it is loaded
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
