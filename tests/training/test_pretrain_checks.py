"""What pretraining looks at as it goes: closed loop, videos, and a held-out loss of the weights as they are now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from persistworld_cli.config.requests import PretrainRequest
from persistworld_cli.config.settings import PretrainSettings, Settings
from persistworld_cli.data.raw.video import read_frames
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.training import pretrain


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """A small recorded world; the text encoder learns too, and everything is looked at at every update."""
    options = PretrainSettings(
        parts=("unet", "action_encoder", "text_encoder"),
        updates=2,
        batch=1,
        lr=3e-3,
        save_every=1,
        log_every=1,
        validate_every=1,
        check_every=1,
        check_rollouts=1,
        check_steps=2,
    )
    return replace(small_world, pretrain=options)


def logged(output: Path, name: str) -> list[Any]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_checks_are_of_the_weights_as_they_are_and_are_kept_when_resumed(world: Settings, tmp_path: Path) -> None:
    result = pretrain.run(world, PretrainRequest(output=tmp_path))
    base = logged(tmp_path, "val_base")
    assert base[0] == base[1] and logged(tmp_path, "val_reward")[0] != base[0]
    # instructions were embedded in the first check: with those kept, the second loss would be of two models
    on = replace(world.model, ckpt=result["weights"], adapter="")  # begins from those weights and learns nothing
    unchanged = replace(world, model=on, pretrain=replace(world.pretrain, updates=0))
    again = pretrain.run(unchanged, PretrainRequest(output=tmp_path / "again"))
    assert again["val_loss"] == pytest.approx(result["val_loss"], abs=1e-6) == logged(tmp_path, "val_loss")[-1]

    longer = replace(world, pretrain=replace(world.pretrain, updates=3, video_every=3, video_rollouts=1))
    pretrain.run(longer, PretrainRequest(output=tmp_path))
    assert logged(tmp_path, "val_base") == [base[0]] * 3
    (video,) = (tmp_path / "videos" / "step-00000003").glob("*.mp4")
    assert len(read_frames(video, range(9))) == 9 and (tmp_path / "curves.png").exists()


def test_nothing_to_roll_out_is_told_before_anything_is_trained(world: Settings, tmp_path: Path) -> None:
    settings = replace(world, eval=replace(world.eval, split="test"))
    with pytest.raises(PersistWorldError, match="no 'test' episodes to roll out"):
        pretrain.run(settings, PretrainRequest(output=tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
