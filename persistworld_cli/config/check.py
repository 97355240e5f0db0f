"""Check settings: the bounds and choices that their fields declare, and the rules between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import NoReturn

from persistworld_cli.config.fields import check_fields
from persistworld_cli.config.keys import KEY_ACTION, SESSION_KEYS, dimensions_of, parse_action
from persistworld_cli.config.settings import LaunchSettings, Settings
from persistworld_cli.config.sizes import vae_factor
from persistworld_cli.errors import UsageError

_Refuse = Callable[..., NoReturn]  # (what is wrong, what to do, *dotted keys)


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
        """Where the keys were written; the key itself if it is a default."""
        return "; ".join(dict.fromkeys(places.get(key, f"{key} (default)") for key in keys))

    def refuse(what: str, fix: str, *keys: str) -> NoReturn:
        raise UsageError(what, where=place(*keys), fix=fix)

    _check_precision(settings, refuse)
    for table in fields(settings):
        check_fields(getattr(settings, table.name), f"{table.name}.", place)
    _check_cameras(settings, refuse)
    _check_sizes(settings, refuse)
    _check_robot(settings, refuse)
    _check_sampling(settings, refuse)
    _check_training(settings, refuse)
    _check_launch(settings.launch, refuse)


def _check_precision(settings: Settings, refuse: _Refuse) -> None:
    """Explain why fp16, which other programs offer, is not among the choices."""
    for table in ("pretrain", "vae", "post_train"):
        if getattr(settings, table).mixed_precision == "fp16":
            key = f"{table}.mixed_precision"
            what = f"{key} = 'fp16' is not supported: gradients underflow without loss scaling"
            refuse(what, "use 'bf16', which needs none, or 'no' (float32)", key)


def _check_cameras(settings: Settings, refuse: _Refuse) -> None:
    world, rewards, count = settings.world, settings.rewards, len(settings.world.cameras)
    if not count:
        refuse("world.cameras is empty", "name at least one camera", "world.cameras")
    if len(set(world.cameras)) != count:
        names = ", ".join(world.cameras)
        refuse(f"world.cameras names a camera twice: {names}", "name each camera once", "world.cameras")
    for key, ids in (("world.exterior", world.exterior), ("world.wrist", world.wrist)):
        if outside := [i for i in ids if not 0 <= i < count]:
            what = f"{key} names camera {outside[0]}, but there are {count} (0..{count - 1})"
            fix = f"set world.exterior and world.wrist too: indices into world.cameras, from 0 to {count - 1}"
            refuse(what, fix, key, "world.cameras")
    grouped = Counter((*world.exterior, *world.wrist))
    if odd := [i for i in range(count) if grouped[i] != 1]:
        times = f"{grouped[odd[0]]} times" if grouped[odd[0]] else "not"
        what = f"camera {odd[0]} ('{world.cameras[odd[0]]}') is {times} in world.exterior and world.wrist"
        fix = f"name each of 0..{count - 1} once: in world.exterior if it stands still, in world.wrist if it moves"
        refuse(what, fix, "world.exterior", "world.wrist", "world.cameras")
    if len(rewards.camera_weights) not in (0, count):
        what = f"rewards.camera_weights has {len(rewards.camera_weights)} entries for {count} cameras"
        fix = "give one weight per camera, or none for equal weights"
        refuse(what, fix, "rewards.camera_weights", "world.cameras")
    if rewards.camera_weights and not any(rewards.camera_weights):
        refuse("rewards.camera_weights are all 0", "give one camera a weight above 0", "rewards.camera_weights")
    if not rewards.weights:
        refuse("rewards.weights is empty", "name at least one reward", "rewards.weights")


def _check_sizes(settings: Settings, refuse: _Refuse) -> None:
    factor, world = vae_factor(settings.model.vae), settings.world
    for key, side in (("world.height", world.height), ("world.width", world.width)):
        if side % factor:
            below = side // factor * factor
            sizes = " or ".join(str(size) for size in (below, below + factor) if size)
            what = f"{key} = {side} is not a multiple of {factor}, this VAE's downsampling factor"
            refuse(what, f"set {key} = {sizes}", key, "model.vae")
    context = settings.model.unet.get("cross_attention_dim", settings.model.token_dim)
    if context != settings.model.token_dim:
        what = f"model.token_dim = {settings.model.token_dim}, but the UNet's cross_attention_dim is {context}"
        refuse(what, f"set model.token_dim = {context}", "model.token_dim", "model.unet")
    text = settings.model.text.get("projection_dim", context)
    if isinstance(text, int) and text and settings.model.token_dim % text:
        what = f"model.token_dim = {settings.model.token_dim} is not a multiple of the text encoder's width {text}"
        refuse(what, "change model.text.projection_dim or model.token_dim", "model.token_dim", "model.text")
    crop, resize = settings.eval.crop, settings.policy.resize
    if sum(crop[:2]) >= world.height or sum(crop[2:]) >= world.width:
        what = f"eval.crop = {list(crop)} leaves nothing of {world.height}x{world.width} pixels"
        fix = "write pixels to leave out at the top, bottom, left and right: eval.crop = [0, 0, 0, 0]"
        refuse(what, fix, "eval.crop", "world.height", "world.width")
    if len(resize) not in (0, 2):
        what = f"policy.resize = {list(resize)} is not a height and a width"
        refuse(what, "write policy.resize = [180, 320], or [] for images as they are sampled", "policy.resize")


def _check_robot(settings: Settings, refuse: _Refuse) -> None:
    robot, drive, width = settings.robot, settings.drive, settings.model.action_dim
    dimensions = {one.name: one for one in dimensions_of(settings)}
    if robot.dimensions and len(robot.dimensions) != width:
        what = f"robot.dimensions has {len(robot.dimensions)} entries, but model.action_dim = {width}"
        fix = 'name every number of a state, in order: dimensions = ["x m", "gripper"]'
        refuse(what, fix, "robot.dimensions", "model.action_dim")
    if len(dimensions) < len(robot.dimensions):
        refuse("robot.dimensions names a number twice", "name each number once", "robot.dimensions")
    for name in dimensions:
        if not name or name[0] in "+-" or "=" in name:
            what = f"robot.dimensions: '{name}' cannot be a name"
            refuse(what, "a name has no '=', and no '+' or '-' in front; a unit may follow it", "robot.dimensions")
    for name, (low, high) in robot.limits.items():
        if low >= high:
            refuse(f"robot.limits.{name} = {low:g} .. {high:g} is empty", "write the lower one first", "robot.limits")
    if not drive.keys:
        refuse("drive.keys is empty", 'write, for example, l = "-y"', "drive.keys")
    for key, text in drive.keys.items():
        if len(key) != 1 or not key.isascii() or not key.isalpha():
            refuse(f"drive.keys: '{key}' is not one letter", "use a letter", "drive.keys")
        if key in SESSION_KEYS:
            refuse(f"drive.keys: '{key}' is reserved for {SESSION_KEYS[key]}", "use another letter", "drive.keys")
        try:
            action = parse_action(text)
        except ValueError:
            refuse(f"drive.keys: '{text}' of key '{key}' is not an action", KEY_ACTION, "drive.keys")
        if dimensions and action.name not in dimensions:
            what = f"drive.keys: '{text}' of key '{key}' is not an action: no number of the state is '{action.name}'"
            refuse(what, f"they are: {', '.join(dimensions)}", "drive.keys", "robot.dimensions")
        if action.sign and action.name not in drive.step:
            what = f"drive.step has no '{action.name}', which key '{key}' changes"
            refuse(what, f"write drive.step = {{ {action.name} = 0.1 }}", "drive.step", "drive.keys")
        low, high = robot.limits.get(action.name, (-math.inf, math.inf))
        if not action.sign and not low <= action.goal <= high:
            what = f"drive.keys: '{text}' of key '{key}' is outside robot.limits.{action.name} = {low:g} .. {high:g}"
            refuse(what, "change one of them", "drive.keys", "robot.limits")
    for table, entries in (("robot.limits", robot.limits), ("drive.step", drive.step)):
        if dimensions and (unknown := [name for name in entries if name not in dimensions]):
            what = f"{table} names '{unknown[0]}', which is no number of the state ({', '.join(dimensions)})"
            refuse(what, f"write the whole table: {table} = {{ {next(iter(dimensions))} = ... }}", table)


def _check_sampling(settings: Settings, refuse: _Refuse) -> None:
    sampling, count = settings.sampling, settings.model.num_history
    if sampling.sigma_max <= sampling.sigma_min:
        what = f"sampling.sigma_max = {sampling.sigma_max:g} must be more than sigma_min = {sampling.sigma_min:g}"
        refuse(what, "raise sigma_max, or lower sigma_min", "sampling.sigma_max", "sampling.sigma_min")
    for key, entries in (("sampling.history", sampling.history), ("sampling.history_policy", sampling.history_policy)):
        if len(entries) != count:
            what = f"{key} has {len(entries)} entries, but model.num_history = {count}"
            refuse(what, f"write {count} entries", key, "model.num_history")
        if any(not -sampling.buffer_fill <= entry < sampling.buffer_fill for entry in entries):
            what = f"{key} = {list(entries)} reaches beyond the buffer's first {sampling.buffer_fill} entries"
            refuse(what, "write entries that the buffer has at the start", key, "sampling.buffer_fill")


def _check_training(settings: Settings, refuse: _Refuse) -> None:
    clips, pre, post = settings.clips, settings.pretrain, settings.post_train
    if pre.shard and pre.optimizer == "muon":
        what = "pretrain.shard = true: Muon needs whole matrices (pretrain.optimizer = 'muon')"
        refuse(what, "set pretrain.optimizer = 'adamw'", "pretrain.shard", "pretrain.optimizer")
    if clips.zero_history_prob + clips.rollout_history_prob > 1.0:
        what = "clips.zero_history_prob and clips.rollout_history_prob add up to more than 1"
        refuse(what, "lower one of them", "clips.zero_history_prob", "clips.rollout_history_prob")
    if clips.datasets and not any(clips.datasets.values()):
        what = f"clips.datasets = {clips.datasets}: all weights are 0"
        refuse(what, "give at least one dataset a weight above 0", "clips.datasets")
    kept = post.keep_best + post.keep_worst
    if not 2 <= kept <= post.candidates:
        keys = ("post_train.keep_best", "post_train.keep_worst", "post_train.candidates")
        what = f"post_train.keep_best + keep_worst = {kept} must be at least 2 and at most candidates"
        refuse(f"{what} = {post.candidates}", "keep fewer candidates, or sample more", *keys)


def _check_launch(launch: LaunchSettings, refuse: _Refuse) -> None:
    if "none" in launch.trackers and len(set(launch.trackers)) > 1:
        what = f"launch.trackers = {', '.join(launch.trackers)}: 'none' excludes the others"
        refuse(what, "leave 'none' out, or the others", "launch.trackers")
    if launch.machine_rank >= launch.num_machines:
        what = f"launch.machine_rank = {launch.machine_rank}, but launch.num_machines = {launch.num_machines}"
        refuse(what, "ranks of machines begin at 0", "launch.machine_rank", "launch.num_machines")
    if launch.num_machines > 1 and not (launch.main_process_ip and launch.main_process_port):
        keys = ("launch.num_machines", "launch.main_process_ip", "launch.main_process_port")
        fix = "add --main-process-ip ADDRESS --main-process-port PORT, the same on every machine"
        refuse("several machines need a common address", fix, *keys)
    if launch.num_processes % launch.num_machines:
        what = f"launch.num_processes = {launch.num_processes} is not divisible by num_machines = {launch.num_machines}"
        fix = "num_processes counts the processes of all machines together"
        refuse(what, fix, "launch.num_processes", "launch.num_machines")
