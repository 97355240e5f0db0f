"""The user's masks (``--masks``): the pixels of the recording that show an object, a robot or a hand.

    DIR/<episode>/<camera>/<frame>.png     one image per recorded frame; every value but 0 is marked
    DIR/<episode>/<camera>.npz             or one array (T, H, W) for the whole episode

``<camera>`` is a name of ``world.cameras`` or its number, ``<frame>`` the recorded frame's number (leading zeros are
ignored). Every scored frame needs a mask, an empty one if nothing is visible; a camera without masks in all episodes is
left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.read_files import reading

LAYOUT = "DIR/<episode>/<camera>/<frame>.png (or DIR/<episode>/<camera>.npz), see docs/evaluation.md"


@dataclass(frozen=True)
class MaskSet:
    """Checked masks of one object.

    Attributes:
        name: in tables.
        files: (episode, camera) -> frame -> PNG, or the one npz under the key -1; cameras without masks are absent.
        size: (V, H, W).
        sha256: of all used files.
    """

    name: str
    files: Mapping[tuple[str, int], Mapping[int, Path]]
    size: tuple[int, int, int]
    sha256: str

    def load(self, episode: str, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Masks (N, V, H, W) of recorded frames; all False for a camera without masks."""
        out = np.zeros((len(frames), *self.size), dtype=bool)
        for camera in range(self.size[0]):
            own = self.files.get((episode, camera), {})
            if -1 in own:
                out[:, camera] = _array(own[-1])[frames] != 0
            elif own:
                for row, frame in enumerate(frames.tolist()):
                    out[row, camera] = _image(own[frame])
        return out

    def describe(self) -> dict[str, object]:
        """For result files: two results under the same name need the same masks."""
        return {"sha256": self.sha256}


def parse_masks(text: str) -> tuple[str, Path]:
    """``NAME=DIR`` or ``DIR``, whose last part is then the name. Raises UsageError if it is not a folder."""
    name, given, folder = text.rpartition("=")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UsageError(f"no folder of masks '{folder}'", where="--masks", fix=f"give a folder with {LAYOUT}")
    return (name if given else path.resolve().name), path


def open_masks(
    text: str, needed: Mapping[str, Sequence[int]], cameras: Sequence[str], height: int, width: int
) -> MaskSet:
    """Find and check every needed mask, before any compute.

    Args:
        text: as for `parse_masks`.
        needed: episode -> scored frames of the recording.
        cameras: names, in order.
        height, width: of the recorded images.

    Raises:
        UsageError: no such folder.
        PersistWorldError: masks that are missing, unreadable or of another size; none for any camera.
    """
    name, folder = parse_masks(text)
    found = {
        (episode, camera): files
        for episode in needed
        for camera, label in enumerate(cameras)
        if (files := _files(folder / episode, label, camera)) is not None
    }
    used = sorted({camera for _, camera in found})
    if not used:
        raise PersistWorldError(
            f"no masks of the episodes {', '.join(list(needed)[:5])}{' ...' if len(needed) > 5 else ''} here",
            where=str(folder),
            fix=f"lay them out as {LAYOUT}",
        )
    digest = hashlib.sha256()
    for episode, frames in needed.items():
        for camera in used:
            own = found.get((episode, camera))
            if own is None:
                raise PersistWorldError(
                    f"episode '{episode}' has no masks of camera {cameras[camera]}, but other episodes have",
                    where=str(folder / episode),
                    fix=f"lay them out as {LAYOUT}",
                )
            wanted = _check(own, frames, folder / episode / cameras[camera], (height, width))
            for path in wanted:
                digest.update(f"{episode}/{camera}/{path.name}\0".encode() + path.read_bytes())
    return MaskSet(name, found, (len(cameras), height, width), digest.hexdigest())


def _files(folder: Path, label: str, camera: int) -> dict[int, Path] | None:
    """Frame -> PNG of one camera, or {-1: npz}; None where there is neither."""
    for stem in (label, str(camera)):
        packed = folder / f"{stem}.npz"
        if packed.is_file():
            return {-1: packed}
        if (folder / stem).is_dir():
            return {int(path.stem): path for path in (folder / stem).glob("*.png") if path.stem.isdigit()}
    return None


def _check(own: Mapping[int, Path], frames: Sequence[int], where: Path, size: tuple[int, int]) -> list[Path]:
    """The files of the frames. Raises PersistWorldError if one is missing or of another size."""
    if -1 in own:
        shape = _array(own[-1]).shape
        if len(shape) != 3 or shape[1:] != size or shape[0] <= max(frames):
            raise PersistWorldError(
                f"masks of shape {shape}, but (at least {max(frames) + 1}, {size[0]}, {size[1]}) are needed",
                where=str(own[-1]),
                fix="write one mask for each recorded frame, in the size of the recorded images",
            )
        return [own[-1]]
    missing = [frame for frame in frames if frame not in own]
    if missing:
        raise PersistWorldError(
            f"masks of {len(missing)} of {len(frames)} frames are missing (first: frame {missing[0]})",
            where=str(where),
            fix="write one PNG per recorded frame, named by its number; an empty one if nothing is visible",
        )
    for frame in frames:
        got = _size(own[frame])
        if got != size:
            raise PersistWorldError(
                f"a mask of {got[0]}x{got[1]} pixels, but the recorded images have {size[0]}x{size[1]}",
                where=str(own[frame]),
                fix="resize the masks without smoothing (nearest neighbour)",
            )
    return [own[frame] for frame in frames]


def _size(path: Path) -> tuple[int, int]:
    """Height and width of an image, from its header."""
    with reading("unreadable mask", path, "write it again"), Image.open(path) as image:
        return image.height, image.width


def _image(path: Path) -> NDArray[np.bool_]:
    """The marked pixels of a PNG, (H, W): all but black ones, or all but index 0 of a palette."""
    with reading("unreadable mask", path, "write it again"), Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB") if image.mode not in ("1", "L", "P", "I;16", "I") else image)
    return (pixels.any(axis=-1) if pixels.ndim == 3 else pixels) != 0


def _array(path: Path) -> NDArray[np.generic]:
    """The one array of an npz file."""
    with reading("unreadable mask", path, "write it again"), np.load(path, allow_pickle=False) as data:
        if len(data.files) != 1:
            raise ValueError(f"{len(data.files)} arrays instead of one")
        array: NDArray[np.generic] = data[data.files[0]]
        return array
