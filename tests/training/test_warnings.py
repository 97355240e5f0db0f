"""What a training run warns of: each warning provoked with a real tiny model, told at its onset, kept over a resume."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_groups import small_groups

from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest
from persistworld_cli.config.settings import PretrainSettings, Settings
from persistworld_cli.training import action_margin, post_train, pretrain
from persistworld_cli.training.run import Run
from persistworld_cli.training.warnings import (
    CHECKS,
    FallingReferee,
    IdenticalPolicies,
    IgnoredActions,
    Warnings,
    log_deviation,
)


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """A small recorded world whose episodes do not all move alike, and settings for a few cheap updates."""
    post = small_groups(
        updates=6,
        prefix_max=0,
        lora_rank=2,
        lora_alpha=2,
        save_every=3,
        margin_every=0,
    )
    return replace(small_world, post_train=post)


def warned(output: Path) -> list[dict[str, Any]]:
    path = output / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(world: Settings, output: Path, **options: Any) -> dict[str, Any]:
    settings = replace(world, post_train=replace(world.post_train, **options))
    return post_train.run(settings, PostTrainRequest(output=output))


def test_resting_policies_and_groups_without_spread_over_a_resume(
    world: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A sampling policy that is always the trained one, and a reward that is the same for all candidates."""
    flat = replace(world, rewards=replace(world.rewards, weights={"ssim": 0.0}))
    still: dict[str, Any] = {"lr": 1e-12, "ema": "constant", "ema_max": 0.0}
    assert run(flat, tmp_path, **still, updates=3)["warnings"] == []
    with (tmp_path / "warnings.jsonl").open("a") as file:  # of an update after the saved state: it will come again
        file.write(json.dumps({"step": 4, "warning": "groups without spread", "message": ""}) + "\n")
    with caplog.at_level(logging.WARNING):
        result = run(flat, tmp_path, **still)
    lines = warned(tmp_path)
    assert [(line["step"], line["warning"]) for line in lines] == [
        (5, "groups without spread"),
        (6, "identical policies"),  # five updates: the first does not count
    ]
    assert "for 5 updates" in lines[0]["message"] and "post_train.explore" in lines[0]["message"]
    assert "for 5 updates" in lines[1]["message"] and "post_train.ema_max" in lines[1]["message"]
    assert result["warnings"] == lines
    assert "warnings in this run: identical policies (update 6)" in caplog.text


@pytest.fixture(scope="module")
def deaf(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A model whose action encoder says the same of every action."""
    tensors = load_file(world.model.ckpt)
    for name in tensors:
        if name.startswith("action_encoder"):
            tensors[name] = torch.zeros_like(tensors[name])
    path = tmp_path_factory.mktemp("deaf") / "model.safetensors"
    save_file(tensors, str(path))
    return replace(world, model=replace(world.model, ckpt=str(path)))


def test_post_training_a_model_that_ignores_its_actions(
    deaf: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action_margin, "CLIPS", 8)
    run(deaf, tmp_path, updates=2, margin_every=1, train_action_encoder=False)
    (line,) = warned(tmp_path)
    assert (line["step"], line["warning"]) == (2, "actions ignored")
    assert "does not use its actions" in line["message"] and "not above noise" in line["message"]
    logged = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["action_margin"] for entry in logged] == [0.0, 0.0]  # the same loss, to the last bit
    assert logged[0]["action_margin_base"] == 0.0


def test_pretraining_a_model_that_ignores_its_actions(
    deaf: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(action_margin, "CLIPS", 8)
    options = PretrainSettings(parts=("unet",), updates=2, batch=1, validate_every=1, save_every=1, log_every=1)
    settings = replace(deaf, pretrain=options)
    first = pretrain.run(replace(settings, pretrain=replace(options, updates=1)), PretrainRequest(output=tmp_path))
    assert first["warnings"] == []  # one check of a model that may yet learn it
    result = pretrain.run(settings, PretrainRequest(output=tmp_path))
    assert [(line["step"], line["warning"]) for line in result["warnings"]] == [(2, "actions ignored")]
    assert "pretrain.token_drop" in warned(tmp_path)[0]["message"]


def test_a_reward_that_rises_by_blur_is_told_by_the_referee(world: Settings, tmp_path: Path) -> None:
    """PSNR alone pays an untrained model for ever flatter images; their sharpness leaves the record's."""
    options = replace(world.post_train, validate_every=1, validate_rollouts=1, validate_steps=1)
    rewards = replace(world.rewards, weights={"psnr": 1.0})
    settings = replace(world, post_train=options, rewards=rewards)
    with Run.of(settings, options, PostTrainRequest(output=tmp_path)) as work:
        trainer = post_train.PostTrainer(settings, work)
        last = trainer.model.vae.decoder.time_conv_out
        assert trainer.check is not None
        item = trainer.check.held.items[0]
        record = trainer.check.held.store.frames("val", item.episode, range(5)).astype("float32")
        mean = torch.from_numpy(record).mean(dim=(0, 1, 2, 3)) / 127.5 - 1
        with torch.no_grad():
            last.weight *= 0.3  # less sharp than the record
        rows = []
        for step in range(1, CHECKS + 1):
            rows.append(trainer.check.check(nullcontext, nullcontext))
            trainer.warnings.see(step, rows[-1])
            with torch.no_grad():  # towards the record's mean colour, and nothing else
                last.weight *= 0.8
                last.bias.lerp_(mean, 0.3)
        assert rows[0]["val_sharpness_gap"] == rows[0]["val_base_sharpness_gap"]
        found = [line for line in warned(tmp_path) if "sharpness" in line["warning"]]
    assert [(line["step"], line["warning"]) for line in found] == [(CHECKS, "reward up, val_sharpness_gap worse")], rows
    assert "val_reward rose from" in found[0]["message"] and "rewards.weights" in found[0]["message"]


def test_a_streak_speaks_at_its_onset_and_when_it_doubled() -> None:
    streak, once = IdenticalPolicies().streak, IdenticalPolicies().streak
    assert [i for i in range(1, 26) if streak("streak", True, 3)] == [3, 6, 12, 24]
    assert not streak("streak", False, 3) and [i for i in range(1, 5) if streak("streak", True, 3)] == [3]
    spoke = [once("streak", present, 1, repeat=False) for present in (True, True, False, True)]
    assert spoke == [True, False, False, True]


def test_a_watcher_reads_the_states_of_older_runs() -> None:
    warnings = Warnings([IdenticalPolicies(), IgnoredActions("")], Run.__new__(Run))
    warnings.load_state({"policies at rest": 4, "actions ignored": {"used": True, "noise": 1, "lost": 0}})
    assert warnings.state() == {
        "identical policies": {"streak": 4},
        "actions ignored": {"used": True, "noise": 1, "lost": 0},
    }


def margin(value: float, error: float = 0.01, **more: float) -> dict[str, float]:
    return {"action_margin": value, "action_margin_se": error, **more}


def test_a_margin_that_falls_to_noise_is_told_at_once_and_one_below_the_base_too() -> None:
    watcher = IgnoredActions("Fix.")
    assert watcher.see(10, margin(0.3)) == ""
    assert "no longer uses its actions" in watcher.see(20, margin(0.01))
    assert watcher.see(30, margin(0.3)) == ""
    beside = {"action_margin_base": 0.3, "action_margin_fall_se": 0.01}
    assert watcher.see(40, margin(0.25, **beside, action_margin_fall=0.05)) == ""  # less, but most of it is there
    words = watcher.see(50, margin(0.1, **beside, action_margin_fall=0.2))
    assert "less than the base" in words and "+30.00%" in words and words.endswith("Fix.")
    assert watcher.see(60, {"reward": 1.0}) == ""


def test_trends_in_noise_are_not_told_and_a_resumed_watcher_goes_on() -> None:
    rng = np.random.default_rng(0)

    def watcher() -> FallingReferee:
        return FallingReferee("sharpness", "reward", 20, log_deviation)

    quiet = watcher()
    for step in range(1, 400):  # the reward rises, the referee only varies
        words = quiet.see(step, {"reward": 0.01 * step + rng.normal(0, 0.1), "sharpness": rng.normal(0.9, 0.05)})
        assert not words, step
    whole, broken, spoke = watcher(), watcher(), []
    for step in range(1, 41):
        numbers = {"reward": 0.01 * step + rng.normal(0, 0.02), "sharpness": 1 - 0.01 * step + rng.normal(0, 0.01)}
        told = whole.see(step, numbers)
        if step == 10:
            saved = json.loads(json.dumps(broken.memory))
            broken = watcher()
            broken.load_state(saved)
        assert broken.see(step, numbers) == told
        spoke += [step] if told else []
    assert spoke == [20]  # once, though it goes on


def test_sharpness_beyond_the_records_that_comes_back_to_it_is_no_fall() -> None:
    watcher = FallingReferee("sharpness", "reward", 10, log_deviation)
    told = [watcher.see(step, {"reward": float(step), "sharpness": 2 - 0.04 * step}) for step in range(1, 21)]
    assert not any(told)
