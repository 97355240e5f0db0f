"""Lines before a command starts: valid settings that are perhaps not meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persistworld_cli.commands.hints import hints
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.config.requests import ExtractRequest, PostTrainRequest, PretrainRequest


@pytest.mark.parametrize(
    ("shape", "names", "said"),
    [
        ([480, 640, 3], ["height", "width", "channels"], "480x640 to 48x80 is 25% wider (front); "),
        ([3, 300, 640], None, "300x640 to 48x80 is 28% taller (front); "),
        ([640, 384, 3], ["width", "height", "channels"], ""),
        ([], None, ""),
    ],
)
def test_stretched_images_are_reported(tmp_path: Path, shape: list[int], names: list[str] | None, said: str) -> None:
    features = {"observation.images.front": {"dtype": "image", "shape": shape, "names": names}}
    info = {"codebase_version": "v3.0", "fps": 10, "data_path": "data.parquet", "features": features}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    lines = hints(resolve_settings("one-camera", [f"world.raw={tmp_path}"], env={}), ExtractRequest())
    assert [said in line for line in lines] == [True] * bool(said)


def test_a_learning_rate_that_rises_most_of_the_time_is_reported() -> None:
    def said(updates: int) -> list[str]:
        tiny = resolve_settings("tiny", [f"pretrain.updates={updates}", "pretrain.warmup=100"], env={})
        return hints(tiny, PretrainRequest(scratch=True)) + hints(tiny, PostTrainRequest())

    (line,) = said(50)
    assert "50 of 50 updates, to 50% of pretrain.lr" in line and "--set pretrain.warmup=5 " in line
    assert "100 of 150 updates, to 100%" in said(150)[0] and said(200) == []
