"""Names of tensors as other tools write them -> the names of a world model.

A wrapper puts its own segment into names: ``module.unet.conv_in.weight`` (DDP), ``unet._orig_mod.conv_in.weight``
(torch.compile). There is no list of such segments: whatever all names at a place share is left out if the rest is then
a model's. A part that was saved alone lacks its name, which is put before (``decoder...``: ``vae.decoder...``).
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
        strange: the names of no model.
        removed: segments that were left out (``module.``) -> number of names that had them.
    """

    names: dict[str, str]
    strange: list[str]
    removed: dict[str, int]

    def __str__(self) -> str:
        """What was left out, in one line; "" for nothing."""
        return ", ".join(f"'{text}' left out of {count} names" for text, count in self.removed.items())


def read_names(names: Iterable[str]) -> Naming:
    """The names of a world model, of one of its parts, or of neither, whatever its size."""
    names = list(names)
    given, known = _tree(names), _known()
    best, part, fits = len(names), "", frozenset[_Path]()
    for candidate in ("", *PARTS):
        strange, dropped = _fit(given, known[candidate] if candidate else known, ())
        if strange < best:
            best, part, fits = strange, candidate, dropped
        if not best:
            break
    if 2 * best >= len(names):  # it is something else
        return Naming({name: name for name in names}, names, {})
    below = known[part] if part else known
    mapping, unknown, removed = {}, [], Counter[str]()
    for name in names:
        kept, left_out = _without(name.split("."), fits)
        mapping[name] = ".".join((part, *kept) if part else kept) if _holds(below, kept) else name
        if not _holds(below, kept):
            unknown.append(name)
        elif left_out:
            removed.update(set(left_out))
    if len(set(mapping.values())) < len(names):  # two tensors of one name
        return Naming({name: name for name in names}, names, {})
    return Naming(mapping, unknown, dict(removed))


def split_joined(text: str, part: str) -> list[str]:
    """The layers of a part whose name with ``_`` for every dot is `text`: one, if it is unambiguous."""

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
    """The smallest number of names that stay unknown, and the paths of the segments to leave out for it."""
    strange, dropped = 0, frozenset[_Path]()
    for segment, child in given.items():
        if (into := _child(known, segment)) is None:
            strange += _count(child) if segment != _END else 1
        elif segment != _END:
            more, paths = _fit(child, into, (*path, segment))
            strange, dropped = strange + more, dropped | paths
    inner = {segment: child for segment, child in given.items() if segment != _END}
    if strange and inner and set(known) != {_END}:  # nothing follows the end of a name
        segment = max(inner, key=lambda key: _count(inner[key]))
        here = (*path, segment)
        more, paths = _fit(inner[segment], known, here)
        more += _count(given) - _count(inner[segment])
        if more < strange:
            return more, paths | {here}
    return strange, dropped


def _without(segments: Sequence[str], dropped: frozenset[_Path]) -> tuple[list[str], list[str]]:
    """The segments that stay, and the runs of those that are left out (``base_model.model.``)."""
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
