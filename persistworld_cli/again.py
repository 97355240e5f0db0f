"""The same command once more, into a folder that does not exist yet: what a refusal prints, to be pasted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

WITH_CHANGES = "--continue-with-changes"


def fresh_folder(folder: Path) -> Path:
    """A folder of this name that does not exist yet: ``outputs/post-train-tiny-2``."""
    base = re.sub(r"-\d+$", "", folder.name)
    if not folder.with_name(base).exists():
        base = folder.name
    number = 2
    while (fresh := folder.with_name(f"{base}-{number}")).exists():
        number += 1
    return fresh


def with_output(command: Sequence[str], output: Path) -> str:
    """The same command line with another ``--output``."""
    words, skip = [], False
    for word in command:
        if skip or word == WITH_CHANGES:
            skip = False
        elif word in ("--output", "-o"):
            skip = True
        elif not word.startswith(("--output=", "-o=")):
            words.append(word)
    return shlex.join([*words, "--output", shown(output)])


def with_dataset(command: Sequence[str], old: str, new: Path) -> str:
    """The same command line with another dataset to write, which is an argument where it is named."""
    words = [word for word in command if word != WITH_CHANGES]
    if old in words:
        place = len(words) - 1 - words[::-1].index(old)
        return shlex.join([*words[:place], shown(new), *words[place + 1 :]])
    return shlex.join([*words, "--set", f"world.dataset={shown(new)}"])


def with_changes(command: Sequence[str]) -> str:
    """The same command line, going on in spite of changes."""
    return shlex.join([*(word for word in command if word != WITH_CHANGES), WITH_CHANGES])


def shown(path: Path) -> str:
    """A path as a person writes it: relative to the working folder where it lies in it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
