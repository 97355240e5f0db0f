"""Which saved states are whole. A damaged one costs only itself: a run goes on from the newest that is whole."""

from __future__ import annotations

import logging
import re
import zipfile
import zlib
from pathlib import Path

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import writing

STATE = "state.pt"
_STEP = re.compile(r"step-\d+")
_DAMAGED = "damaged-"  # before the name of a state that was set aside
_BEGIN_ANEW = "go on from another run's state (--resume-from), or begin anew (--no-resume, or another --output)"
_log = logging.getLogger(__name__)


def states_of(output: Path) -> list[Path]:
    """A run's saved states, oldest first; whatever else lies beside them is left alone."""
    found = [path for path in (output / "state").glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    """Updates that had been done when a state (``.../step-00000040``) was saved."""
    return int(state.name.removeprefix("step-"))


def damage_of(state: Path) -> str:
    """What is wrong with a saved state (a ``step-N`` folder); "" for a whole one.

    The file is an archive with a checksum of every tensor, which torch itself does not look at: all of it is read.
    """
    file = state / STATE
    if not file.exists():
        return f"it has no {STATE}"
    if not file.is_file():
        return f"{STATE} is no file"
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        return str(error) or repr(error)
    return f"{broken} does not have its checksum" if broken else ""


def set_aside_damaged(output: Path) -> None:
    """Rename the damaged states of a run that are newer than its newest whole one, and say so.

    Raises:
        PersistWorldError: there are states, and none is whole.
    """
    states, damaged = states_of(output), []
    for state in reversed(states):
        if not (why := damage_of(state)):
            break
        damaged.append((state, why))
    else:
        if damaged:
            newest, why = damaged[0]
            raise PersistWorldError(f"no saved state is whole; the newest: {why}", where=str(newest), fix=_BEGIN_ANEW)
    for state, why in damaged:
        aside = next(path for path in _names(state) if not path.exists())
        with writing(state):
            state.rename(aside)
        _log.warning(
            "the saved state %s is damaged (%s): the run goes on from %s; what is left of it is %s",
            state.name,
            why,
            states[-1 - len(damaged)].name,
            aside,
        )


def newest_whole(states: list[Path]) -> Path:
    """The newest whole one of some states, oldest first. Raises PersistWorldError where none is."""
    for state in reversed(states):
        if not (why := damage_of(state)):
            return state
        _log.warning("the saved state %s is damaged (%s): an older one is taken", state, why)
    raise PersistWorldError("no saved state is whole", where=str(states[-1].parent), fix=_BEGIN_ANEW)


def require_whole(state: Path) -> None:
    """Raise PersistWorldError where a state that was named is damaged."""
    if why := damage_of(state):
        raise PersistWorldError(f"the saved state is damaged: {why}", where=str(state), fix="name another state")


def _names(state: Path) -> list[Path]:
    """Names that a damaged state may be given, in order of choice."""
    return [state.with_name(f"{_DAMAGED}{state.name}{end}") for end in ("", *(f".{n}" for n in range(2, 1000)))]
