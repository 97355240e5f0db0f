"""Health of a post-training run: the closed-loop check beside the base, and what happens when it keeps falling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_groups import small_groups

from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.video import read_frames
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.training import post_train
from persistworld_cli.training.health import CollapseGuard


def test_the_guard_wants_falls_in_a_row_and_below_the_base() -> None:
    policy = {"old": {"w": torch.zeros(1)}}
    guard = CollapseGuard(checks=2)
    assert not guard.see(0.5, policy)
    policy["old"]["w"] += 1  # what was best must not change with it
    assert not guard.see(0.3, policy)
    assert not guard.see(0.1, policy)  # two falls, but better than the base still
    assert guard.see(-0.1, policy)
    assert guard.best == 0.5 and guard.state is not None and guard.state["old"]["w"].item() == 0
    guard.rolled_back()
    assert not guard.see(-0.2, policy)  # one fall since
    assert not guard.see(-0.1, policy)
    never = CollapseGuard(checks=0)
    assert not any(never.see(-float(i), policy) for i in range(9))
    again = CollapseGuard(checks=2)
    again.load(guard.snapshot())
    assert (again.scores, again.best) == (guard.scores, guard.best)


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """A small recorded world and a check at every update."""
    options = small_groups(
        updates=2,
        prefix_max=1,
        lora_rank=4,
        validate_every=1,
        validate_rollouts=2,
        validate_steps=2,
        collapse_checks=0,
        credit="patch",
    )
    return replace(small_world, post_train=options)


def log(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_every_check_has_the_base_beside_it(world: Settings, tmp_path: Path) -> None:
    post_train.run(world, PostTrainRequest(output=tmp_path))
    lines = log(tmp_path)
    assert lines[0]["val_base"] == lines[1]["val_base"] and 0 <= lines[0]["val_won"] <= 1
    assert abs(lines[0]["val_reward"] - lines[0]["val_base"]) < 0.1  # a step of 1e-4 moves next to nothing
    assert {f"ssim/{camera}" for camera in world.world.cameras} <= set(lines[0])
    longer = replace(world, post_train=replace(world.post_train, updates=3, video_every=3))
    post_train.run(longer, PostTrainRequest(output=tmp_path))
    video = tmp_path / "videos" / "step-00000003" / "9_0_0.mp4"
    assert len(read_frames(video, range(9))) == 9 and (tmp_path / "curves.png").exists()  # the start, 2 x 4 new frames
    assert log(tmp_path)[2]["val_base"] == lines[0]["val_base"]  # kept with the state


@pytest.mark.parametrize("reaction", ["stop", "rollback"])
def test_a_run_that_is_blown_up_is_stopped_or_rolled_back(world: Settings, tmp_path: Path, reaction: str) -> None:
    options = replace(world.post_train, lr=0.3, ema="constant", ema_max=0.0, updates=4, collapse_checks=1)
    options = replace(options, validate_rollouts=1, validate_steps=1)
    settings = replace(world, post_train=replace(options, on_collapse=reaction))
    if reaction == "stop":
        with pytest.raises(PersistWorldError, match="collapsed"):
            post_train.run(settings, PostTrainRequest(output=tmp_path))
        assert len(log(tmp_path)) < 4
    else:
        post_train.run(settings, PostTrainRequest(output=tmp_path))
        rates = [line["lr"] for line in log(tmp_path)]
        assert rates[0] == 0.3 and rates[-1] < 0.3
    assert (tmp_path / "weights" / "adapter" / "adapter_model.safetensors").exists()
