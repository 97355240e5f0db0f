"""Names of tensors as other tools write them -> the names of a world model.

A wrapper adds segments to names: ``module.unet.conv_in.weight`` (DDP), ``unet._orig_mod.conv_in.weight``
(torch.compile). No list of such segments exists here: a segment that all names at its place share is removed if the
rest are a model's names. A part that was saved alone lacks its own name, which is added: ``decoder...`` becomes
``vae.decoder...``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from persistworld_cli.checkpoints.compatibility import preset_shapes
from persistworld_cli.config.weight_names import PARTS

_Tree = dict[str, Any]  # segment -> the tree below it
_Path = tuple[str, ...]
_END, _NUMBER = "", "#"


@dataclass(frozen=True)
class Naming:
    """What names mean.

    Attributes:
        names: name in the file -> name in a world model; names of no model stay as they are.
        unknown: the names of no model.
        removed: removed segments (``module.``) -> number of names that had them.
    """

    names: dict[str, str]
    unknown: list[str]
    removed: dict[str, int]

    def __str__(self) -> str:
        """What was removed, in one line; "" for nothing."""
        return ", ".join(f"'{text}' removed from {count} tensor names" for text, count in self.removed.items())


def read_names(names: Iterable[str]) -> Naming:
    """What names mean: those of a world model or of one of its parts, of any size, or of something else."""
    names = list(names)
    given, known = _tree(names), _known()
    fewest, part, dropped = len(names), "", frozenset[_Path]()
    for candidate in ("", *PARTS):
        count, paths = _fit(given, known[candidate] if candidate else known, ())
        if count < fewest:
            fewest, part, dropped = count, candidate, paths
        if not fewest:
            break
    other = Naming({name: name for name in names}, names, {})
    if 2 * fewest >= len(names):
        return other
    below = known[part] if part else known
    mapping, unknown, removed = {}, list[str](), Counter[str]()
    for name in names:
        kept, runs = _without(name.split("."), dropped)
        if _holds(below, kept):
            mapping[name] = ".".join((part, *kept) if part else kept)
            removed.update(set(runs))
        else:
            mapping[name] = name
            unknown.append(name)
    if len(set(mapping.values())) < len(names):  # two tensors would have one name
        return other
    return Naming(mapping, unknown, dict(removed))


def split_joined(text: str, part: str) -> list[str]:
    """The layers of a part whose name, with ``_`` for every dot, is `text`; one if it is unambiguous."""

    def below(rest: str, known: _Tree) -> Iterable[_Path]:
        if not rest and "weight" in known:
            yield ()
        for segment in (key for key in known if key != _END):
            head, _, tail = rest.partition("_")
            if segment == _NUMBER and head.isdigit():
                yield from ((head, *more) for more in below(tail, known[segment]))
            elif rest == segment or rest.startswith(f"{segment}_"):
                yield from ((segment, *more) for more in below(rest[len(segment) + 1 :], known[segment]))

    return [".".join(path) for path in below(text, _known()[part])]


@functools.cache
def _known() -> _Tree:
    """The names of the full-size model, in which a number stands for every number: those of all sizes."""
    return _tree(
        ".".join(_NUMBER if segment.isdigit() else segment for segment in name.split("."))
        for name in preset_shapes("ctrl-world")
    )


def _tree(names: Iterable[str]) -> _Tree:
    root: _Tree = {}
    for name in names:
        node = root
        for segment in (*name.split("."), _END):
            node = node.setdefault(segment, {})
    return root


def _child(known: _Tree, segment: str) -> _Tree | None:
    return known.get(_NUMBER if segment.isdigit() else segment)


def _holds(known: _Tree, segments: Sequence[str]) -> bool:
    node: _Tree | None = known
    for segment in (*segments, _END):
        node = None if node is None else _child(node, segment)
    return node is not None


def _count(tree: _Tree) -> int:
    """Names in a tree."""
    return sum(1 if segment == _END else _count(child) for segment, child in tree.items())


def _fit(given: _Tree, known: _Tree, path: _Path) -> tuple[int, frozenset[_Path]]:
    """The fewest names that remain unknown, and the paths of the segments to remove for that."""
    unknown, dropped = 0, frozenset[_Path]()
    for segment, child in given.items():
        if (into := _child(known, segment)) is None:
            unknown += _count(child) if segment != _END else 1
        elif segment != _END:
            more, paths = _fit(child, into, (*path, segment))
            unknown, dropped = unknown + more, dropped | paths
    inner = {segment: child for segment, child in given.items() if segment != _END}
    if unknown and inner and set(known) != {_END}:  # nothing follows the end of a name
        segment = max(inner, key=lambda key: _count(inner[key]))
        here = (*path, segment)
        more, paths = _fit(inner[segment], known, here)
        more += _count(given) - _count(inner[segment])
        if more < unknown:
            return more, paths | {here}
    return unknown, dropped


def _without(segments: Sequence[str], dropped: frozenset[_Path]) -> tuple[list[str], list[str]]:
    """The segments that are kept, and the runs of those that are removed (``base_model.model.``)."""
    kept: list[str] = []
    runs: list[str] = []
    joined = False
    for number, segment in enumerate(segments, 1):
        out = tuple(segments[:number]) in dropped
        if not out:
            kept.append(segment)
        elif joined:
            runs[-1] += f"{segment}."
        else:
            runs.append(f"{segment}.")
        joined = out
    return kept, runs
