"""Latent files read frame by frame: .npy, and torch's .pt in place, without torch.load and without unpickling objects.

It uses positioned reads, not memory maps. A map causes read-ahead around every frame (from a cold disk about nine times
the bytes of a clip; without read-ahead it waits for single pages), and a file that is truncated while mapped kills the
process by a signal, while a read raises an error. `python -m benchmarks.loader` measures both. Frames that are not in
the cache are all announced to the kernel before the first is read, so that the disk serves them together. No file stays
open.

Legend: T frames of a file, C latent channels, V cameras, h1 latent height of one camera, h = V * h1, w latent width,
N requested frames.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from persistworld_cli.data.metadata.annotations import REDO, Unreadable
from persistworld_cli.data.metadata.latent_header import Layout, read_layout
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import reason

_SHORTER = "run persistworld build-meta again to leave the episode out, or delete its annotation and extract it again"
_REMEMBERED = 200_000  # episodes whose layout is kept: about 350 bytes each
_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # read only what is in the cache (Linux)
_THREAD = threading.local()
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class LatentReader:
    """Reads frames of latent files and remembers their layouts; a replaced file is noticed by size, time or inode.

    Args:
        root: the folder that holds ``<split>/<episode>/{0,1,...}.{npy,pt}``.
        find: (split, episode) -> the files in camera order; it raises PersistWorldError where one is missing.
    """

    def __init__(self, root: Path, find: Callable[[str, str], list[Path]]) -> None:
        self._root, self._find = str(root), find
        self._known: OrderedDict[str, tuple[tuple[Layout, ...], int]] = OrderedDict()  # and the files' `_stamp`
        self._shared: dict[tuple[Layout, ...], tuple[Layout, ...]] = {}  # most episodes differ in length alone

    def layouts(self, split: str, episode: str) -> tuple[Layout, ...]:
        """The layout of each camera's file, read again. Raises PersistWorldError: missing or unreadable files."""
        paths = self._find(split, episode)
        layouts = tuple(read_layout(path) for path in paths)
        layouts = self._shared.setdefault(layouts, layouts)
        try:
            stamp = _stamp([os.stat(path) for path in paths])
        except OSError as error:
            raise Unreadable("unreadable latents", paths[0], reason(error)) from error
        self._known[f"{split}/{episode}"] = layouts, stamp
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return layouts

    def read(self, split: str, episode: str, frames: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Frames of an episode: float32 (N, C, h, w), cameras stacked, into ``out`` if given.

        Raises:
            PersistWorldError: missing, unreadable or cut files, a frame beyond the end, another shape than ``out``'s.
        """
        opened: list[int] = []
        try:
            layouts = self._open(split, episode, opened)
            return self._read(split, episode, list(zip(opened, layouts, strict=True)), frames, out)
        finally:
            for file in opened:
                os.close(file)

    def _read(
        self, split: str, episode: str, files: Sequence[tuple[int, Layout]], frames: Sequence[int], out: Tensor | None
    ) -> Tensor:
        """`read` from open files."""
        low, high = (min(frames), max(frames)) if frames else (0, 0)
        out = self._target(split, episode, [layout for _, layout in files], len(frames), out)
        runs = _runs(frames)
        waiting, top = not _NOWAIT, 0
        for camera, (file, layout) in enumerate(files):
            path = self._path(split, episode, camera, layout)
            if low < 0 or high >= layout.length:
                frame = low if low < 0 else high
                what = f"frame {frame} is not in a file with {layout.length} latents: it is shorter than the index says"
                raise PersistWorldError(what, where=path, fix=_SHORTER)
            direct, size = layout.dtype == "float32" and out.is_contiguous(), layout.frame_bytes
            block = out if direct else _scratch(len(frames) * size)
            places = (
                _in_place(out, top, layout) if direct else [[part] for part in block.view(len(frames), size).numpy()]
            )
            if waiting or not _fill(path, file, layout, runs, places, _NOWAIT):
                if not waiting:
                    _announce(files[camera:], runs)
                waiting = _fill(path, file, layout, runs, places, 0)
            if not direct:
                out[:, :, top : top + layout.frame[1]] = block.view(_DTYPES[layout.dtype]).view(-1, *layout.frame)
            top += layout.frame[1]
        return out

    def _target(self, split: str, episode: str, layouts: Sequence[Layout], count: int, out: Tensor | None) -> Tensor:
        """The tensor (N, C, h, w) to read into: ``out`` if given. Raises if layouts do not match it or each other."""
        channels, _, width = layouts[0].frame
        shape = (count, channels, sum(layout.frame[1] for layout in layouts), width)
        odd = any((layout.frame[0], layout.frame[2]) != (channels, width) for layout in layouts)
        if odd or (out is not None and out.shape != shape):
            known = "those of another camera" if odd or out is None else f"{tuple(out.shape[1:])} elsewhere"
            raise PersistWorldError(
                f"latents of a frame have shape {shape[1:]}, unlike {known}",
                where=f"{self._root}/{split}/{episode}",
                fix=REDO,
            )
        return torch.empty(shape) if out is None else out

    def _open(self, split: str, episode: str, opened: list[int]) -> tuple[Layout, ...]:
        """Open an episode's files; returns their layouts, remembered ones if the files are unchanged."""
        key = f"{split}/{episode}"
        for known in (self._known.get(key), None):
            layouts = known[0] if known else self.layouts(split, episode)
            for camera, layout in enumerate(layouts):
                path = self._path(split, episode, camera, layout)
                try:
                    opened.append(os.open(path, _OPEN))
                except FileNotFoundError:
                    break  # replaced by the other file type, or missing: look again; `find` then reports it
                except OSError as error:
                    raise Unreadable("unreadable latents", path, reason(error)) from error
            else:
                if _stamp([os.fstat(file) for file in opened]) == self._known[key][1]:
                    return layouts
            del self._known[key]
            while opened:
                os.close(opened.pop())
        raise PersistWorldError(
            "latents are being replaced while they are read",
            where=f"{self._root}/{split}/{episode}",
            fix="let extract-latents finish, then run this again",
        )

    def _path(self, split: str, episode: str, camera: int, layout: Layout) -> str:
        return f"{self._root}/{split}/{episode}/{camera}{layout.suffix}"


def _stamp(stats: Sequence[os.stat_result]) -> int:
    return hash(tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats))


def _scratch(size: int) -> Tensor:
    """A buffer of ``size`` bytes that this thread reuses: the kernel would zero new memory page by page."""
    kept: Tensor | None = getattr(_THREAD, "scratch", None)
    if kept is None or len(kept) < size:
        kept = _THREAD.scratch = torch.empty(size, dtype=torch.uint8)
    return kept[:size]


def _runs(frames: Sequence[int]) -> list[tuple[int, int]]:
    """Frames in their order as runs of neighbours: (first frame, how many)."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        if runs and frame == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((frame, 1))
    return runs


def _announce(files: Sequence[tuple[int, Layout]], runs: Sequence[tuple[int, int]]) -> None:
    """Announce to the kernel what will be read, without read-ahead around it (Linux)."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file, layout in files:
        size = layout.frame_bytes
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for first, count in runs:
            os.posix_fadvise(file, layout.offset + first * size, count * size, os.POSIX_FADV_WILLNEED)


def _in_place(out: Tensor, top: int, layout: Layout) -> list[list[memoryview]]:
    """Where a camera's frames lie in a contiguous (N, C, h, w) of the file's own type: for each frame, its channels."""
    memory = out.numpy().data.cast("B")
    size = math.prod(layout.frame[1:]) * 4
    channel, begin = out.shape[2] * out.shape[3] * 4, top * out.shape[3] * 4
    starts = range(begin, len(memory), channel)
    channels = layout.frame[0]
    return [[memory[at : at + size] for at in starts[k : k + channels]] for k in range(0, len(starts), channels)]


def _fill(
    path: str,
    file: int,
    layout: Layout,
    runs: Sequence[tuple[int, int]],
    places: Sequence[list[memoryview]],
    flags: int,
) -> bool:
    """Read runs of frames into the places of each frame, in order; False if it has to wait and ``flags`` forbid it."""
    done, size = 0, layout.frame_bytes
    for first, count in runs:
        buffers = places[done] if count == 1 else [part for frame in places[done : done + count] for part in frame]
        done, offset, left = done + count, layout.offset + first * size, count * size
        while left:
            try:
                got = os.preadv(file, buffers, offset, flags)
            except OSError as error:
                if flags:  # not in the cache, or the file system does not support the flag
                    return False
                raise Unreadable("unreadable latents", path, reason(error)) from error
            if not got:
                raise PersistWorldError("latents are cut short", where=path, fix=f"the file is damaged; {REDO}")
            offset, left = offset + got, left - got
            if left:
                buffers = _behind(buffers, got)
    return True


def _behind(buffers: Sequence[memoryview], read: int) -> list[memoryview]:
    """The rest of some buffers after ``read`` bytes are filled."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if read < len(buffer):
            rest.append(buffer[read:])
        read = max(0, read - len(buffer))
    return rest
