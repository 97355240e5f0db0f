"""The typed command line with the change that an error message suggests, ready to copy and run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_WITH_CHANGES = "--continue-with-changes"


def command_line() -> list[str]:
    """This process's command as it was typed, but for the secret of ``--token``: files and logs hold it."""
    return _without(["persistworld", *sys.argv[1:]], "--token")


def commit(*ignored: str) -> str:
    """The commit of this program's repository, with a ``+`` if files differ (but the ``ignored``); "" outside git."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if not (root / ".git").exists():
        return ""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in ignored))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def unused_folder(folder: Path) -> Path:
    """A folder of this name that does not exist yet: ``outputs/post-train-tiny-2``."""
    base = re.sub(r"-\d+$", "", folder.name)
    if not folder.with_name(base).exists():
        base = folder.name
    number = 2
    while (found := folder.with_name(f"{base}-{number}")).exists():
        number += 1
    return found


def with_output(command: Sequence[str], output: Path) -> str:
    """The command with another ``--output``."""
    words = [word for word in _without(command, "--output", "-o") if word != _WITH_CHANGES]
    return shlex.join([*words, "--output", relative(output)])


def _without(command: Sequence[str], *flags: str) -> list[str]:
    """The command without an option and its value."""
    words, skip = [], False
    for word in command:
        if not skip and word not in flags and not word.startswith(tuple(f"{flag}=" for flag in flags)):
            words.append(word)
        skip = not skip and word in flags
    return words


def with_dataset(command: Sequence[str], old: str, new: Path) -> str:
    """The command with another dataset to write: in place of the old argument, or as a setting."""
    words = [word for word in command if word != _WITH_CHANGES]
    if old in words:
        words[len(words) - 1 - words[::-1].index(old)] = relative(new)
        return shlex.join(words)
    return shlex.join([*words, "--set", f"world.dataset={relative(new)}"])


def with_changes(command: Sequence[str]) -> str:
    """The command with ``--continue-with-changes``."""
    return shlex.join([*(word for word in command if word != _WITH_CHANGES), _WITH_CHANGES])


def to_continue(command: Sequence[str]) -> str:
    """The command that continues its own run: ``--no-resume`` and ``--resume-from`` would begin again."""
    return shlex.join(word for word in _without(command, "--resume-from") if word != "--no-resume")


def relative(path: Path) -> str:
    """A path relative to the working folder if it is inside it, else absolute."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
