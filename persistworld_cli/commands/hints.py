"""What a command says before it starts: settings that are valid, but perhaps not what was meant."""

from __future__ import annotations

import math

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import Resolved, load_settings
from persistworld_cli.config.requests import ExtractRequest, PostTrainRequest, PretrainRequest, Request
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, WorldSettings

_STRETCH = 0.02  # of the ratio of width to height; less is not seen


def hints(resolved: Resolved, request: Request) -> list[str]:
    """Lines for the terminal, without the task's name."""
    if isinstance(request, ExtractRequest):
        return _stretched(resolved.settings.world)
    if isinstance(request, PretrainRequest):
        started = [] if request.scratch else _finished(resolved.settings.model.ckpt)
        return [*started, *_warming("pretrain", resolved.settings.pretrain)]
    if isinstance(request, PostTrainRequest):
        return _warming("post_train", resolved.settings.post_train)
    return []


def _finished(ckpt: str) -> list[str]:
    """Pretraining starts from the finished Ctrl-World: name the preset that starts from Stable Video Diffusion."""
    if ckpt != load_settings("ctrl-world", env={}).model.ckpt:
        return []
    return ["these weights are trained already; to start from Stable Video Diffusion: --preset ctrl-world-svd"]


def _warming(table: str, options: PretrainSettings | PostTrainSettings) -> list[str]:
    """The learning rate rises during half of the updates or more."""
    updates, warmup = options.updates, options.warmup
    if updates >= 2 * warmup:
        return []
    rising, reached = min(warmup, updates), min(1, updates / warmup)
    return [
        f"the learning rate rises during {rising} of {updates} updates, to {reached:.0%} of {table}.lr: "
        f"{table}.warmup = {warmup}; --set {table}.warmup={updates // 10} makes it a tenth of the updates"
    ]


def _stretched(world: WorldSettings) -> list[str]:
    """Cameras whose images change their ratio of width to height, by the sizes that the recordings' metadata states."""
    raw = resolve_path(world.raw)
    if not (raw / "meta/info.json").is_file():  # extraction itself says so
        return []
    from persistworld_cli.data.raw.lerobot import RawDataset

    dataset, lines = RawDataset(raw), []
    sizes = {camera: dataset.image_size(camera) for camera in world.cameras}
    for size in dict.fromkeys(size for size in sizes.values() if size):
        height, width = size
        ratio = (world.width / width) / (world.height / height)
        if abs(ratio - 1) > _STRETCH:
            cameras, common = ", ".join(camera for camera in sizes if sizes[camera] == size), math.gcd(*size)
            change = f"{ratio - 1:.0%} wider" if ratio > 1 else f"{1 / ratio - 1:.0%} taller"
            lines.append(
                f"images are stretched, not cropped: {height}x{width} to {world.height}x{world.width} is {change} "
                f"({cameras}); world.height : world.width = {height // common}:{width // common} would keep their shape"
            )
    return lines
