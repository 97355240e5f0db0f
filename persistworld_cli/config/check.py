"""Range checks of settings: one plain message for each thing that cannot be meant."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from persistworld_cli.config.keys import check_drive
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.sizes import check_image_size
from persistworld_cli.config.trackers import NO_TRACKER, TRACKERS
from persistworld_cli.errors import UsageError, nearest

_PRECISIONS = ("no", "bf16")
FOLLOWING = ("swapped", "null")  # wrong actions that a model is also rolled out under
REFEREES = ("sharpness_gap", "st_lpips")  # metrics.referees has them
_CHOICES: dict[str, Sequence[str]] = {
    "world.pixel_rounding": ("nearest", "down"),
    "model.temporal_token": ("first", "all"),
    "model.posterior": ("mode", "sample"),
    "sampling.dtype": ("float32", "bfloat16", "float16"),
    "sampling.decode_dtype": ("float32", "bfloat16"),
    "sampling.cast": ("autocast", "model"),
    "pretrain.decay": ("constant", "cosine"),
    "pretrain.mixed_precision": _PRECISIONS,
    "vae.mixed_precision": _PRECISIONS,
    "post_train.mixed_precision": _PRECISIONS,
    "post_train.prefix": ("uniform", "fixed", "curriculum"),
    "post_train.weighting": ("plain", "self"),
    "post_train.objective": ("nft", "recorded"),
    "post_train.on_collapse": ("stop", "rollback"),
    "post_train.credit": ("rollout", "frame", "patch"),
    "post_train.ema": ("ramp", "constant", "late-ramp"),
    "post_train.optimizer": ("muon", "adamw"),
    "post_train.muon_scale": ("match_rms_adamw", "original"),
    "pretrain.optimizer": ("muon", "adamw"),
    "vae.optimizer": ("muon", "adamw"),
    "eval.study_cameras": ("groups", "all"),
    "eval.colour_range": ("unit", "8bit"),
    "drive.display": ("auto", "kitty", "iterm", "sixel", "blocks", "blocks-256", "none"),
    "policy.layout": ("pi05", "pi0", "pi0-fast"),
    "launch.device": ("auto", "cpu", "cuda"),
}
_CHANGE = "write another value there, or leave it out for the default"
# (relation, bound, keys): every number whose bound depends on nothing else.
_BOUNDS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    (
        ">=",
        1,
        (
            "world.height",
            "world.width",
            "model.num_history",
            "model.num_frames",
            "model.action_dim",
            "model.token_dim",
            "sampling.steps",
            "sampling.buffer_fill",
            "sampling.decode_chunk",
            "clips.max_step",
            "clips.history_stride",
            "clips.ahead",
            "pretrain.updates",
            "pretrain.batch",
            "pretrain.accumulate",
            "pretrain.save_every",
            "pretrain.keep",
            "pretrain.log_every",
            "vae.updates",
            "vae.batch",
            "vae.clip",
            "vae.save_every",
            "post_train.updates",
            "post_train.groups",
            "post_train.chunks",
            "post_train.sigmas_per_candidate",
            "post_train.lora_rank",
            "post_train.lora_alpha",
            "post_train.micro_batch",
            "pretrain.check_rollouts",
            "pretrain.check_steps",
            "pretrain.video_rollouts",
            "post_train.validate_rollouts",
            "post_train.video_rollouts",
            "post_train.validate_steps",
            "post_train.save_every",
            "post_train.keep",
            "eval.steps",
            "eval.batch",
            "eval.following_steps",
            "policy.image_size",
            "launch.num_processes",
            "launch.num_machines",
        ),
    ),
    (
        ">=",
        0,
        (
            "sampling.noise_aug",
            "clips.workers",
            "pretrain.weight_decay",
            "pretrain.warmup",
            "pretrain.max_grad_norm",
            "pretrain.history_noise",
            "pretrain.current_noise",
            "pretrain.noise_aug",
            "pretrain.validate_every",
            "pretrain.check_every",
            "pretrain.video_every",
            "vae.kl",
            "vae.colour_weight",
            "vae.edge_weight",
            "post_train.steps",
            "post_train.margin_every",
            "post_train.validate_every",
            "post_train.video_every",
            "post_train.collapse_checks",
            "post_train.p_std",
            "post_train.explore",
            "post_train.keep_best",
            "post_train.keep_worst",
            "post_train.prefix_max",
            "post_train.kl",
            "post_train.ema_rate",
            "post_train.weight_decay",
            "post_train.warmup",
            "post_train.max_grad_norm",
            "eval.sheets",
            "eval.bootstrap",
            "eval.study_trials",
            "drive.start",
            "policy.camera",
            "policy.wrist_camera",
            "policy.skip",
            "policy.steps",
            "policy.wait_s",
            "launch.machine_rank",
            "launch.main_process_port",
            "launch.threads",
        ),
    ),
    (
        ">",
        0,
        (
            "world.rate_hz",
            "sampling.sigma_min",
            "sampling.rho",
            "pretrain.lr",
            "pretrain.p_std",
            "vae.lr",
            "post_train.lr",
            "post_train.beta",
            "post_train.adv_clip",
            "drive.step_m",
            "policy.timeout_s",
            "policy.gain",
        ),
    ),
    ("<", 1, ("pretrain.beta2",)),
    ("<=", 65535, ("launch.main_process_port", "policy.port")),
)
_SHARES = (
    "clips.zero_history_prob",
    "clips.rollout_history_prob",
    "pretrain.token_drop",
    "pretrain.ema",
    "pretrain.beta2",
    "post_train.ema_max",
    "drive.gripper_open",
    "drive.gripper_closed",
    "policy.gripper_cap",
)
_RELATIONS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    ">=": (operator.ge, "at least"),
    ">": (operator.gt, "more than"),
    "<=": (operator.le, "at most"),
    "<": (operator.lt, "less than"),
}


def check(settings: Settings, where: Mapping[str, str] | None = None) -> None:
    """Refuse settings that cannot work together.

    Args:
        settings: typed settings.
        where: dotted key -> where it was written, for the message.

    Raises:
        UsageError: the first thing that is wrong.
    """
    places = where or {}

    def place(*keys: str) -> str:
        """Where the keys were written; the key itself where it is a default."""
        return "; ".join(dict.fromkeys(places.get(key, f"{key} (default)") for key in keys))

    _check_choices(settings, place)
    _check_bounds(settings, place)
    _check_world(settings, place)
    check_image_size(settings, place)
    check_drive(settings.drive, place)
    _check_sampling(settings, place)
    _check_post_train(settings, place)
    _check_eval(settings, place)
    _check_launch(settings, place)


_Place = Callable[..., str]


def _value(settings: Settings, key: str) -> Any:
    table, _, name = key.partition(".")
    return getattr(getattr(settings, table), name)


def _check_choices(settings: Settings, place: _Place) -> None:
    for key, choices in _CHOICES.items():
        value = _value(settings, key)
        if value == "fp16" and choices is _PRECISIONS:
            raise UsageError(
                f"{key} = 'fp16' is not offered: gradients vanish in it without loss scaling, which is not done",
                where=place(key),
                fix="take 'bf16', which needs none, or 'no' (float32)",
            )
        if value not in choices:
            raise UsageError(
                f"{key} = {value!r} is none of {', '.join(choices)}", where=place(key), fix=nearest(value, choices)
            )


def _check_bounds(settings: Settings, place: _Place) -> None:
    for sign, bound, keys in _BOUNDS:
        holds, words = _RELATIONS[sign]
        for key in keys:
            if not holds(_value(settings, key), bound):
                raise UsageError(
                    f"{key} = {_value(settings, key)} must be {words} {bound:g}", where=place(key), fix=_CHANGE
                )
    for key in _SHARES:
        if not 0.0 <= _value(settings, key) <= 1.0:
            raise UsageError(f"{key} = {_value(settings, key)} must lie between 0 and 1", where=place(key), fix=_CHANGE)


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
    if resize and (len(resize) != 2 or min(resize) < 1):
        raise UsageError(
            f"policy.resize = {list(resize)} is no height and width",
            where=place("policy.resize"),
            fix="write policy.resize = [180, 320], or [] for images as they are drawn",
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
    if sampling.guidance < 1.0:
        raise UsageError(
            f"sampling.guidance = {sampling.guidance:g} must be at least 1",
            where=place("sampling.guidance"),
            fix="1 means no guidance",
        )
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
    if weights and (min(weights.values()) < 0 or max(weights.values()) == 0):
        raise UsageError(
            f"clips.datasets = {weights}: weights must be at least 0, and one of them more",
            where=place("clips.datasets"),
            fix="write a weight above 0 for one dataset at least",
        )


def _check_post_train(settings: Settings, place: _Place) -> None:
    post = settings.post_train
    if post.candidates < 2:
        raise UsageError(
            f"post_train.candidates = {post.candidates} must be at least 2",
            where=place("post_train.candidates"),
            fix="advantages compare the candidates of a group (the paper uses 16)",
        )
    if len(post.credit_grid) != 2 or min(post.credit_grid) < 1:
        raise UsageError(
            f"post_train.credit_grid = {list(post.credit_grid)} is no number of rows and columns",
            where=place("post_train.credit_grid"),
            fix="write post_train.credit_grid = [3, 5]",
        )
    for name in post.referees:
        if ":" not in name and name not in REFEREES:
            fix = f"{nearest(name, REFEREES)} (or module:Class for your own)"
            raise UsageError(f"unknown referee '{name}'", where=place("post_train.referees"), fix=fix)
    kept = post.keep_best + post.keep_worst
    if not 2 <= kept <= post.candidates:
        raise UsageError(
            f"post_train.keep_best + keep_worst = {kept} must be at least 2 and at most candidates = {post.candidates}",
            where=place("post_train.keep_best", "post_train.keep_worst", "post_train.candidates"),
            fix="keep fewer candidates, or draw more",
        )


def _check_eval(settings: Settings, place: _Place) -> None:
    options, world = settings.eval, settings.world
    crop = options.crop
    if len(crop) != 4 or min(crop) < 0 or sum(crop[:2]) >= world.height or sum(crop[2:]) >= world.width:
        raise UsageError(
            f"eval.crop = {list(crop)} leaves nothing of {world.height}x{world.width} pixels, or is no four margins",
            where=place("eval.crop"),
            fix="write pixels to leave out at the top, bottom, left and right: eval.crop = [0, 0, 0, 0]",
        )
    for kind in options.following:
        if kind not in FOLLOWING:
            raise UsageError(
                f"eval.following names '{kind}'", where=place("eval.following"), fix=nearest(kind, FOLLOWING)
            )
    if not 0.0 < options.moving_threshold < 1.0:
        raise UsageError(
            f"eval.moving_threshold = {options.moving_threshold:g} must lie between 0 and 1",
            where=place("eval.moving_threshold"),
            fix=_CHANGE,
        )


def _check_launch(settings: Settings, place: _Place) -> None:
    launch = settings.launch
    known = (*TRACKERS, NO_TRACKER)
    for name in launch.trackers:
        if name not in known:
            raise UsageError(f"unknown tracker '{name}'", where=place("launch.trackers"), fix=nearest(name, known))
    if NO_TRACKER in launch.trackers and len(set(launch.trackers)) > 1:
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
