"""The package from Python: lazy, and the examples of docs/python.md run as they are printed."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundled_starts import extract

import persistworld_cli
from persistworld_cli.config.settings import RewardSettings, SamplingSettings, WorldSettings
from persistworld_cli.cost.interaction import sampler_calls
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.policies.embedded import make_policy
from persistworld_cli.policies.judge import Evidence, ask_judge, load_judge


def blocks(page: str) -> list[str]:
    """The Python code in a page of the project."""
    return re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / page).read_text(), re.DOTALL)


ROLLOUT, CLASSES = blocks("docs/python.md")
(README,) = blocks("README.md")


def test_the_package_imports_no_torch_and_has_every_name() -> None:
    code = "import sys, persistworld_cli; dir(persistworld_cli); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "tomli", "typer"} & set(loaded)
    for name in persistworld_cli.__all__:
        assert getattr(persistworld_cli, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = persistworld_cli.nothing


def test_the_example_of_a_rollout_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(tmp_path / "outputs" / "world", [60], frames=24)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(ROLLOUT, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("lpips", "ssim", "psnr"))
    shorter: dict[str, object] = {}
    exec(compile(README, "README.md", "exec"), shorter)
    assert np.array_equal(shorter["images"], names["images"][0])  # type: ignore[index,arg-type]
    assert names["scores"]["psnr"].shape == (1, 12, 3) and names["scores"]["psnr"].mean() > 15  # type: ignore[index]


def test_the_example_classes_are_taken_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert importlib.import_module("mine").MeanError.label == "mean_error"
    scorer = Scorer(RewardSettings(weights={"mine:MeanError": -1.0}), WorldSettings())
    assert scorer.weights == {"mean_error": -1.0}
    assert sampler_calls(SamplingSettings(steps=5, sampler="mine:Midpoint")) == 9
    assert make_policy("mine:Still").infer({})["actions"].shape == (15, 8)
    evidence = Evidence(
        episode="60",
        start=0,
        seed=0,
        instruction="lift",
        cameras=("a",),
        rate_hz=5.0,
        frames=np.zeros((2, 1, 4, 4, 3), np.uint8),
        poses=np.array([[0.0] * 7, [0, 0, 0.1, 0, 0, 0, 1.0]]),
        joint_pos=np.empty((0, 7)),
        joint_vel=np.empty((0, 7)),
    )
    assert ask_judge(load_judge("mine:Lifted"), evidence, "mine:Lifted").success is True
