"""Names of weights in settings and options, and adapters on disk; needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.errors import UsageError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE = "adapter_config.json", "adapter_model", "state.pt"
CARD = "README.md"  # the model card beside weights
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # of files with weights
_ADAPTER_FOLDERS = ("", "adapter/", "weights/adapter/")  # an adapter, a post-training's `weights`, its run's folder
PARTS = ("unet", "vae", "image_encoder", "text_encoder", "action_encoder")  # of a world model's checkpoint
PASSTHROUGH = "image_encoder"  # in checkpoints because Ctrl-World's strict loading needs it; otherwise unused
USED_PARTS = tuple(part for part in PARTS if part != PASSTHROUGH)
NO_ADAPTER = ("base", "none")  # as an adapter or baseline: the checkpoint without an adapter
READINGS: list[str] = []  # how this process read weights that are not plain; recorded in result.json

logger = logging.getLogger(__name__)


def report_reading(text: str) -> None:
    """Log and record, once per process, how weights were read."""
    if text not in READINGS:
        READINGS.append(text)
        logger.info(text)


def content_of(path: Path) -> list[Path]:
    """The files that make weights what they are, in order: a folder's without its model card, which `eval` rewrites."""
    inside = path.rglob("*") if path.is_dir() else (path,)
    return sorted(file for file in inside if file.is_file() and file.name != CARD)


def adapter_name(name: str) -> str:
    """``model.adapter`` or ``--adapter`` resolved: "" for none, the PEFT folder of a run's folder."""
    return "" if name in NO_ADAPTER else adapter_on_disk(name) or name


def adapter_on_disk(name: str) -> str:
    """The adapter at a path, spelled as it was given; "" if there is none.

    An adapter is a PEFT folder, a file of one, a run's folder or its ``weights``, or a saved state of post-training.

    Raises:
        PersistWorldError: ``bundled:NAME`` that is not shipped.
    """
    if not name:
        return ""
    path = resolve_path(name)
    if path.is_file():
        if path.name.startswith(ADAPTER_WEIGHTS) and (path.parent / ADAPTER_CONFIG).is_file():
            return name.removesuffix(f"/{path.name}") if "/" in name else "."
        return name if path.name == STATE else ""
    folder = adapter_folder_in(names_in(path))
    if folder is not None:
        return f"{name.rstrip('/')}/{folder}".rstrip("/") if folder else name
    return name if (path / STATE).is_file() else ""


def require_one_adapter(weights: str, own: str, adapter: str) -> None:
    """Refuse an adapter on weights that hold another one, ``own``. Raises UsageError."""
    if own and adapter and adapter != own:
        raise UsageError(
            f"'{weights}' is an adapter, and '{adapter}' is another one",
            where="--ckpt, --adapter",
            fix="name one adapter, or whole weights with --ckpt",
        )


def adapter_folder_in(names: Collection[str]) -> str | None:
    """The folder of the adapter among a folder's or repository's files (``"adapter/"``; "" for the top), or None.

    Outside the usual folders, it must hold all the weights.
    """
    for folder in _ADAPTER_FOLDERS:
        if folder + ADAPTER_CONFIG in names:
            return folder
    homes = {PurePosixPath(name).parent.as_posix() for name in names if name.endswith(SUFFIXES)}
    only = homes.pop() if len(homes) == 1 else ""
    return f"{only}/" if only and f"{only}/{ADAPTER_CONFIG}" in names else None


def names_in(folder: Path) -> frozenset[str]:
    """Files of a folder, its subfolders and a run's adapter; not deeper, since a run's folder holds many.

    A link to an absent file counts: the hub's cache has one where a download is not whole.
    """
    found = [*folder.glob("*"), *folder.glob("*/*"), *folder.glob("weights/adapter/*")]
    return frozenset(path.relative_to(folder).as_posix() for path in found if not path.is_dir())
