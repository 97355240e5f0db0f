"""Check settings: the bounds and choices that their fields declare, and the rules between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from persistworld_cli.config.fields import check_fields
from persistworld_cli.config.keys import check_drive
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.sizes import check_image_size
from persistworld_cli.errors import UsageError

_Place = Callable[..., str]


def check(settings: Settings, where: Mapping[str, str] | None = None) -> None:
    """Refuse invalid settings.

    Args:
        settings: typed settings.
        where: dotted key -> where it was written, for the message.

    Raises:
        UsageError: the first error.
    """
    places = where or {}

    def place(*keys: str) -> str:
        """Where the keys were written; the key itself where it is a default."""
        return "; ".join(dict.fromkeys(places.get(key, f"{key} (default)") for key in keys))

    _check_precision(settings, place)
    for table in fields(settings):
        check_fields(getattr(settings, table.name), f"{table.name}.", place)
    _check_world(settings, place)
    check_image_size(settings, place)
    check_drive(settings.drive, place)
    _check_sampling(settings, place)
    _check_post_train(settings, place)
    _check_eval(settings, place)
    _check_launch(settings, place)


def _check_precision(settings: Settings, place: _Place) -> None:
    """Say why fp16, which other programs offer, is not among the choices."""
    for key in ("pretrain", "vae", "post_train"):
        if getattr(settings, key).mixed_precision == "fp16":
            raise UsageError(
                f"{key}.mixed_precision = 'fp16' is not offered: gradients vanish in it without loss scaling",
                where=place(f"{key}.mixed_precision"),
                fix="use 'bf16', which needs none, or 'no' (float32)",
            )


def _check_world(settings: Settings, place: _Place) -> None:
    world, count = settings.world, len(settings.world.cameras)
    if not count:
        raise UsageError("world.cameras is empty", where=place("world.cameras"), fix="name at least one camera")
    if len(set(world.cameras)) != count:
        raise UsageError(
            f"world.cameras names a camera twice: {', '.join(world.cameras)}",
            where=place("world.cameras"),
            fix="name each camera once",
        )
    for key, ids in (("world.exterior", world.exterior), ("world.wrist", world.wrist)):
        outside = [i for i in ids if not 0 <= i < count]
        if outside:
            raise UsageError(
                f"{key} names camera {outside[0]}, but there are {count} (0..{count - 1})",
                where=place(key, "world.cameras"),
                fix=f"set world.exterior and world.wrist too: places of world.cameras, from 0 to {count - 1}",
            )
    resize = settings.policy.resize
    if resize and len(resize) != 2:
        raise UsageError(
            f"policy.resize = {list(resize)} is not a height and a width",
            where=place("policy.resize"),
            fix="write policy.resize = [180, 320], or [] for images as they are sampled",
        )
    weights = settings.rewards.camera_weights
    if weights and len(weights) != count:
        raise UsageError(
            f"rewards.camera_weights has {len(weights)} entries for {count} cameras",
            where=place("rewards.camera_weights", "world.cameras"),
            fix="give one weight a camera, or none for equal weights",
        )
    if not settings.rewards.weights:
        raise UsageError("rewards.weights is empty", where=place("rewards.weights"), fix="name at least one reward")


def _check_sampling(settings: Settings, place: _Place) -> None:
    sampling, model = settings.sampling, settings.model
    if sampling.sigma_max <= sampling.sigma_min:
        raise UsageError(
            f"sampling.sigma_max = {sampling.sigma_max:g} must be more than sigma_min = {sampling.sigma_min:g}",
            where=place("sampling.sigma_max", "sampling.sigma_min"),
            fix="raise sigma_max, or lower sigma_min",
        )
    for key, entries in (("sampling.history", sampling.history), ("sampling.history_policy", sampling.history_policy)):
        if len(entries) != model.num_history:
            raise UsageError(
                f"{key} has {len(entries)} entries, but model.num_history = {model.num_history}",
                where=place(key, "model.num_history"),
                fix=f"write {model.num_history} entries",
            )
        if any(not -sampling.buffer_fill <= entry < sampling.buffer_fill for entry in entries):
            raise UsageError(
                f"{key} = {list(entries)} reaches beyond the buffer's first {sampling.buffer_fill} entries",
                where=place(key, "sampling.buffer_fill"),
                fix="write entries that the buffer has at the start",
            )
    if settings.clips.zero_history_prob + settings.clips.rollout_history_prob > 1.0:
        raise UsageError(
            "clips.zero_history_prob and clips.rollout_history_prob add up to more than 1",
            where=place("clips.zero_history_prob", "clips.rollout_history_prob"),
            fix="lower one of them",
        )
    weights = settings.clips.datasets
    if weights and not any(weights.values()):
        raise UsageError(
            f"clips.datasets = {weights}: all weights are 0",
            where=place("clips.datasets"),
            fix="write a weight above 0 for one dataset at least",
        )


def _check_post_train(settings: Settings, place: _Place) -> None:
    post = settings.post_train
    kept = post.keep_best + post.keep_worst
    if not 2 <= kept <= post.candidates:
        raise UsageError(
            f"post_train.keep_best + keep_worst = {kept} must be at least 2 and at most candidates = {post.candidates}",
            where=place("post_train.keep_best", "post_train.keep_worst", "post_train.candidates"),
            fix="keep fewer candidates, or draw more",
        )


def _check_eval(settings: Settings, place: _Place) -> None:
    crop, world = settings.eval.crop, settings.world
    if sum(crop[:2]) >= world.height or sum(crop[2:]) >= world.width:
        raise UsageError(
            f"eval.crop = {list(crop)} leaves nothing of {world.height}x{world.width} pixels",
            where=place("eval.crop", "world.height", "world.width"),
            fix="write pixels to leave out at the top, bottom, left and right: eval.crop = [0, 0, 0, 0]",
        )


def _check_launch(settings: Settings, place: _Place) -> None:
    launch = settings.launch
    if "none" in launch.trackers and len(set(launch.trackers)) > 1:
        raise UsageError(
            f"launch.trackers = {', '.join(launch.trackers)}: 'none' stands alone",
            where=place("launch.trackers"),
            fix="leave 'none' out, or the others",
        )
    if launch.machine_rank >= launch.num_machines:
        raise UsageError(
            f"launch.machine_rank = {launch.machine_rank}, but launch.num_machines = {launch.num_machines}",
            where=place("launch.machine_rank", "launch.num_machines"),
            fix="machines are counted from 0",
        )
    if launch.num_machines > 1 and (not launch.main_process_ip or not launch.main_process_port):
        raise UsageError(
            "several machines need one address to meet at",
            where=place("launch.num_machines", "launch.main_process_ip", "launch.main_process_port"),
            fix="add --main-process-ip ADDRESS --main-process-port PORT, the same on every machine",
        )
    if launch.num_processes % launch.num_machines:
        raise UsageError(
            f"launch.num_processes = {launch.num_processes} is not divisible by num_machines = {launch.num_machines}",
            where=place("launch.num_processes", "launch.num_machines"),
            fix="num_processes counts the processes of all machines together",
        )
