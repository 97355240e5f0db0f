"""A world of one's own by TOML alone: the shipped one-camera preset, through the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_robot import NUMBERS, states, write_robot
from safetensors.torch import load_file

from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.annotations import load_annotation
from persistworld_cli.data.raw.lerobot import RawDataset

PRESET = """
extends = "one-camera"

[world]
raw = "{root}/raw"
dataset = "{root}/latents"

[pretrain]
updates = 1
batch = 2
"""


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``persistworld ARGUMENTS`` with the preset, in a process of its own."""
    call = [sys.executable, "-m", "persistworld_cli", *arguments, "--preset", str(root / "arm.toml")]
    return subprocess.run(call, capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})


def result(root: Path, *arguments: str) -> dict[str, Any]:
    done = command(root, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    out: dict[str, Any] = json.loads(done.stdout)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw recordings at 30 Hz, and the preset."""
    root = tmp_path_factory.mktemp("arm")
    write_robot(root / "raw", {0: 45, 1: 31, 2: 60})
    (root / "arm.toml").write_text(PRESET.format(root=root))
    return root


def test_extraction_metadata_and_a_training_step(root: Path) -> None:
    assert result(root, "extract-latents")["done"] == 3
    store = EpisodeStore(root / "latents")
    assert [len(store.annotation("train", e).states) for e in store.episodes("train")] == [15, 11, 20]
    np.testing.assert_array_equal(store.annotation("train", "1").states, states(1, 31)[::3].astype(float))
    assert store.latent_shape("train", "0") == (4, 12, 20)
    assert store.frames("train", "0", [3]).shape == (1, 1, 48, 80, 3)
    assert store.annotation("train", "0").joints is None
    assert load_annotation(root / "latents/annotation/train/0.json")["rate_hz"] == 10

    meta = result(root, "build-meta")
    assert meta["frames"] == {"train": 46} and len(meta["state_p99"]) == NUMBERS and meta["adapter"] is None
    assert [row["number"] for row in meta["health"]["states"]] == [str(i) for i in range(NUMBERS)]
    checked = command(root, "build-meta", "--check", "--json")
    told = json.loads(checked.stdout)
    assert checked.returncode == 0 and {row["kind"] for row in told["findings"]} == {"no-val"}

    trained = result(root, "pretrain", "--scratch", "--vae", "bundled:presets/tiny/base", "--output", str(root / "run"))
    assert np.isfinite(trained["loss"])
    weights = load_file(trained["weights"])
    assert weights["action_encoder.action_encode.0.weight"].shape[1] == NUMBERS


def test_drive_refuses_states_that_are_no_pose(root: Path) -> None:
    done = command(root, "drive", "--keys", "l", "--episode", "0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "states have 10 numbers, not 7" in done.stderr


def test_a_camera_may_be_named_without_the_usual_prefix(tmp_path: Path) -> None:
    raw = RawDataset(write_robot(tmp_path, {0: 6}, camera="observation.image"))
    assert raw.cameras == ("observation.image",)
    assert raw.video(0, "observation.image").path.parent.name == "observation.image"
    assert len(list(raw.images(0, "observation.image", range(6)))) == 6
