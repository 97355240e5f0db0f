"""Presets, overrides, types, ranges, and where each value came from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from persistworld_cli.config.bundled import bundled_root, resolve_path
from persistworld_cli.config.presets import (
    flatten,
    from_json,
    load_settings,
    preset_names,
    resolve_settings,
    to_json,
)
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError, UsageError


def preset(folder: Path, text: str, name: str = "own.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", preset_names())
def test_bundled_presets_load_and_survive_json(name: str) -> None:
    settings = load_settings(name, env={})
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings


def test_three_presets_are_bundled() -> None:
    assert {"tiny", "ctrl-world", "persistworld"} <= set(preset_names())


def test_full_presets_hold_the_papers_numbers() -> None:
    settings = load_settings("persistworld", env={})
    post = settings.post_train
    assert (post.candidates, post.keep_best, post.keep_worst, post.chunks, post.prefix_max) == (16, 5, 5, 1, 9)
    assert (post.lora_rank, post.lora_alpha, post.lr, post.optimizer) == (64, 64, 1e-4, "muon")
    assert settings.sampling.steps == 50 and settings.sampling.guidance == 1.0
    assert (post.prefix, post.ema, post.ema_rate, post.ema_max) == ("uniform", "ramp", 0.001, 0.5)
    assert settings.rewards.weights == {"lpips": -1.0, "ssim": 1.0, "psnr": 1 / 32} and settings.eval.steps == 14
    base = load_settings("ctrl-world", env={})
    assert base.sampling.guidance == 2.0 and base.sampling.noise_aug == 0.02 and base.pretrain.noise_aug == 0.0
    assert base.sampling.decode_chunk == 7 and base.sampling.buffer_fill == 24
    assert base.sampling.history == (0, 0, -8, -6, -4, -2)
    assert base.sampling.history_policy == (0, 0, -12, -9, -6, -3)
    # Taken over from the preset it extends.
    assert settings.model.unet == load_settings("ctrl-world", env={}).model.unet


def test_every_layer_overrides_the_one_below_and_is_named(tmp_path: Path) -> None:
    own = preset(tmp_path, "[post_train]\nbeta = 0.1\nkl = 0.1\nlr = 0.1\ngroups = 3\n")
    resolved = resolve_settings(
        own,
        ["post_train.lr=0.3", "post_train.groups=5"],
        {"post_train.groups": 7, "post_train.seed": None},
        {"PERSISTWORLD_POST_TRAIN__KL": "0.2", "PERSISTWORLD_POST_TRAIN__LR": "0.2", "PERSISTWORLD_DEBUG": "1"},
    )
    post, origin = resolved.settings.post_train, resolved.origin
    assert (post.beta, post.kl, post.lr, post.groups, post.seed) == (0.1, 0.2, 0.3, 7, 0)
    assert origin["post_train.beta"] == f"preset {own}"
    assert origin["post_train.kl"] == "environment PERSISTWORLD_POST_TRAIN__KL"
    assert origin["post_train.lr"] == "--set"
    assert origin["post_train.groups"] == "--groups"
    assert origin["post_train.seed"] == "default"
    assert set(origin) == set(flatten(resolved.settings))


def test_without_a_preset_the_bundled_world_is_taken_and_said() -> None:
    resolved = resolve_settings(None, env={})
    assert resolved.implied and resolved.preset == "tiny"
    assert resolved.settings == load_settings("tiny", env={})
    assert resolved.origin["world.raw"] == "preset tiny"


def test_extends_a_file_beside_and_a_bundled_name(tmp_path: Path) -> None:
    preset(tmp_path, 'extends = "ctrl-world"\n[sampling]\nsteps = 10\n', "mine.toml")
    child = resolve_settings(
        preset(tmp_path, 'extends = "mine.toml"\n[sampling]\nguidance = 3\n', "child.toml"), env={}
    )
    assert (child.settings.sampling.steps, child.settings.sampling.guidance) == (10, 3.0)
    assert isinstance(child.settings.sampling.guidance, float)
    assert child.settings.model.ckpt == "yjguo/Ctrl-World"
    assert child.origin["model.ckpt"] == "preset ctrl-world"
    assert child.origin["sampling.steps"].endswith("mine.toml")


def test_a_circle_of_presets_is_refused(tmp_path: Path) -> None:
    first = preset(tmp_path, 'extends = "b.toml"\n', "a.toml")
    preset(tmp_path, 'extends = "a.toml"\n', "b.toml")
    with pytest.raises(UsageError, match=r"circle: a.toml -> b.toml -> a.toml"):
        load_settings(first, env={})


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("[post_train]\nbetta = 1.0\n", "unknown key 'post_train.betta'", "did you mean 'post_train.beta'?"),
        ("[posttrain]\nbeta = 1.0\n", "unknown table 'posttrain'", "did you mean 'post_train"),
        ("[sampling]\nbeta = 1.0\n", "unknown key 'sampling.beta'", "did you mean 'post_train.beta'?"),
        ("beta = 1.0\n", "unknown key 'beta'", "did you mean 'post_train.beta'?"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(tmp_path: Path, text: str, message: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(preset(tmp_path, text), env={})
    assert caught.value.what == message
    assert caught.value.fix is not None and caught.value.fix.startswith(fix)
    assert "own.toml" in str(caught.value.where)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('updates = "many"', "a whole number"),
        ("updates = 1.5", "a whole number"),
        ("updates = true", "a whole number"),
        ('lr = "fast"', "a number"),
        ("lr = true", "a number"),
        ("train_action_encoder = 1", "true or false"),
        ("optimizer = 3", "a string"),
        ('lora_targets = "to_q"', "a list of strings"),
        ("lora_targets = [1]", "a string"),
    ],
)
def test_a_wrong_type_names_key_value_and_line(tmp_path: Path, line: str, expected: str) -> None:
    with pytest.raises(UsageError, match=f"wrong type: expected {expected}") as caught:
        load_settings(preset(tmp_path, f"# a comment\n[post_train]\ngroups = 2\n{line}\n"), env={})
    assert line.split(" ")[0] in caught.value.what
    assert str(caught.value.where).endswith("own.toml:4")


def test_whole_numbers_pass_as_numbers_and_infinity_does_not(tmp_path: Path) -> None:
    value = load_settings(preset(tmp_path, "[post_train]\nbeta = 1\n"), env={}).post_train.beta
    assert value == 1.0 and isinstance(value, float)
    for bad in ("inf", "nan"):
        with pytest.raises(UsageError, match="not finite"):
            load_settings(preset(tmp_path, f"[post_train]\nbeta = {bad}\n"), env={})


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["post_train.candidates=1"], "candidates = 1 must be at least 2"),
        (
            ["post_train.candidates=4", "post_train.keep_best=3", "post_train.keep_worst=2"],
            r"keep_best \+ keep_worst = 5",
        ),
        (["post_train.keep_best=0", "post_train.keep_worst=1"], "must be at least 2"),
        (["post_train.optimizer=sgd"], "not one of muon, adamw"),
        (["post_train.lr=0"], "must be more than 0"),
        (["pretrain.mixed_precision=fp16"], "gradients underflow without loss scaling"),
        (["post_train.mixed_precision=fp16"], "gradients underflow without loss scaling"),
        (["vae.mixed_precision=fp16"], "gradients underflow without loss scaling"),
        (["pretrain.mixed_precision=fp8"], "not one of no, bf16"),
        (["pretrain.beta2=1.0"], "less than 1"),
        (["pretrain.shard=true", "pretrain.optimizer=muon"], "Muon needs whole matrices"),
        (["sampling.cast=weights"], "not one of autocast, model"),
        (["model.posterior=mean"], "not one of mode, sample"),
        (["pretrain.token_drop=1.5"], "must be at least 0 and at most 1"),
        (["sampling.guidance=0.5"], "must be at least 1"),
        (["sampling.sigma_max=0.001"], "must be more than sigma_min"),
        (["sampling.history=0,0"], "has 2 entries, but model.num_history = 6"),
        (["sampling.history=0,0,0,0,0,-99"], "reaches beyond the buffer"),
        (["world.wrist=3"], "names camera 3"),
        (["world.wrist=[]"], r"camera 2 \('wrist_left'\) is not in world.exterior and world.wrist"),
        (["world.wrist=1,2"], r"camera 1 \('exterior_2_left'\) is 2 times in world.exterior and world.wrist"),
        (["world.pixel_rounding=up"], "not one of nearest, down"),
        (["model.temporal_token=last"], "not one of first, all"),
        (["model.token_dim=512"], "model.token_dim = 512, but the UNet's cross_attention_dim is 1024"),
        (["model.text.projection_dim=768"], "model.token_dim = 1024 is not a multiple of the text encoder's width 768"),
        (["policy.resize=180"], "not a height and a width"),
        (["policy.resize=0,10"], r"policy.resize\[0\] = 0 must be at least 1"),
        (["eval.crop=1,2,3"], "expected a list of 4 whole numbers"),
        (["eval.crop=0,0,0,-1"], r"eval.crop\[3\] = -1 must be at least 0"),
        (["eval.following=swaped"], r"eval.following\[0\] = 'swaped' is not one of swapped, null"),
        (["launch.trackers=wandbb"], "not one of tensorboard, wandb, trackio, none"),
        (["sampling.sampler=eulr"], "unknown sampler 'eulr'"),
        (["rewards.weights.psn=1"], "unknown reward 'psn'"),
        (["clips.datasets.a=-1"], "clips.datasets.a = -1.0 must be at least 0"),
        (["rewards.camera_weights=1.0,2.0"], "2 entries for 3 cameras"),
        (["launch.machine_rank=1"], "launch.machine_rank = 1"),
        (["launch.num_machines=2", "launch.num_processes=2"], "need a common address"),
        (["launch.num_processes=0"], "at least 1"),
    ],
)
def test_invalid_values_are_refused_with_their_place(sets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_settings("ctrl-world", sets, env={})
    assert "--set" in str(caught.value.where)


def test_set_takes_toml_plain_strings_lists_and_entries_of_tables() -> None:
    settings = load_settings(
        "ctrl-world",
        [
            "eval.split=train",
            "eval.episodes=0001,99",
            "eval.seeds=[1, 2]",
            "rewards.weights.psnr=0.5",
            "rewards.weights.mine.parts:Error=-1",
            "model.unet.layers_per_block=1",
            "model.ckpt=a=b",
        ],
        env={},
    )
    assert settings.eval.split == "train"
    assert settings.eval.episodes == ("0001", "99")
    assert settings.eval.seeds == (1, 2)
    assert settings.rewards.weights == {"lpips": -1.0, "ssim": 1.0, "psnr": 0.5, "mine.parts:Error": -1.0}
    assert settings.model.unet["layers_per_block"] == 1 and settings.model.unet["in_channels"] == 8
    assert settings.model.ckpt == "a=b"
    assert load_settings("tiny", ["rewards.weights={psnr = 1}"], env={}).rewards.weights == {"psnr": 1.0}


@pytest.mark.parametrize("item", ["beta", "=1", "post_train=1", "post_train.nothing.here=1"])
def test_a_malformed_set_is_refused(item: str) -> None:
    with pytest.raises(UsageError):
        load_settings("tiny", [item], env={})


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        load_settings("persistwrld", env={})
    assert caught.value.fix == "did you mean 'persistworld'?"
    with pytest.raises(UsageError, match="no preset file"):
        load_settings("nowhere/own.toml", env={})


def test_what_is_not_toml_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2"):
        load_settings(preset(tmp_path, "[post_train]\nbeta = = 1\n"), env={})


def test_an_unknown_variable_of_ours_is_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'post_train\.betta'"):
        load_settings("tiny", env={"PERSISTWORLD_POST_TRAIN__BETTA": "1"})


def test_json_of_another_shape_is_refused() -> None:
    tables = to_json(Settings())
    tables["post_train"]["betta"] = 1
    with pytest.raises(UsageError, match="unknown key"):
        from_json(tables)


def test_bundled_paths() -> None:
    assert resolve_path("bundled:presets") == bundled_root() / "presets"
    assert resolve_path("somewhere/else") == Path("somewhere/else")
    assert resolve_path("~/x") == Path.home() / "x"
    with pytest.raises(UsageError, match="is outside"):
        resolve_path("bundled:../../etc/passwd")
    with pytest.raises(PersistWorldError, match="not shipped"):
        resolve_path("bundled:presets/nothing.bin")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().post_train.beta = 2.0  # type: ignore[misc]


def test_a_whole_number_beyond_every_float_is_one_error() -> None:
    with pytest.raises(UsageError, match="too large"):
        load_settings("tiny", ["post_train.beta=1" + "0" * 400])


def test_a_setting_is_read_under_its_old_name_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "tiny"\n[policy]\nadapter = "meta"\n')
    assert load_settings(str(mine), env={}).policy.joint_velocity_adapter == "meta"
    env = {"PERSISTWORLD_POLICY__ADAPTER": "meta"}
    assert load_settings("tiny", ["policy.adapter=gain"], env=env).policy.joint_velocity_adapter == "gain"
    assert from_json({"policy": {"adapter": "meta"}}).policy.joint_velocity_adapter == "meta"
