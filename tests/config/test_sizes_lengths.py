"""One rule for the size of a latent, one for the length of an episode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.sizes import latent_size
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.annotations import read_annotation
from persistworld_cli.data.metadata.scan import list_annotations, read_episode
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.models.vae import build_vae, encode_images
from persistworld_cli.rollout.recording import Item, check_item

TINY = load_settings("tiny", env={})


def test_the_latent_s_size_is_what_the_vae_makes() -> None:
    vae = build_vae(TINY.model.vae, TINY.model.norm_groups).eval()
    for high, wide in ((16, 24), (18, 27)):
        images = torch.zeros(1, 1, high, wide, 3, dtype=torch.uint8)
        for posterior in ("mode", "sample"):
            with torch.no_grad():
                made = encode_images(vae, images, torch.device("cpu"), posterior)
            assert (
                tuple(made.shape[1:]) == latent_size(vae.config, high, wide) == latent_size(TINY.model.vae, high, wide)
            )


@pytest.mark.parametrize(
    ("preset", "size", "fix"),
    [
        ("tiny", "world.height=50", "set world.height = 48 or 52"),
        ("tiny", "world.width=3", "set world.width = 4"),
        ("ctrl-world", "world.height=180", "set world.height = 176 or 184"),
        ("ctrl-world", "world.width=322", "set world.width = 320 or 328"),
    ],
)
def test_a_size_that_the_vae_would_cut_is_refused_with_the_settings(preset: str, size: str, fix: str) -> None:
    with pytest.raises(UsageError, match="is not a multiple of") as error:
        load_settings(preset, [size], env={})
    assert error.value.fix == fix and "--set" in str(error.value.where)
    key, _, good = fix.removeprefix("set ").partition(" = ")
    for side in good.split(" or "):
        load_settings(preset, [f"{key}={side}"], env={})


def test_bundled_presets_and_benchmarks_have_sizes_that_work() -> None:
    for file in sorted((bundled_root() / "presets").glob("*.toml")):
        load_settings(file.stem, env={})


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """One episode of 5 states with joints, and latents of two cameras."""
    latents = tmp_path / "latent_videos" / "val" / "9"
    latents.mkdir(parents=True)
    for camera in range(2):
        np.save(latents / f"{camera}.npy", np.zeros((5, 4, 2, 3), np.float16))
    write(tmp_path)
    return tmp_path


def write(root: Path, **changed: Any) -> Path:
    note = {"texts": ["go"], "states": [[0.0] * 7] * 5, "joints": [[0.0] * 8] * 5, "video_length": 5, "success": 1}
    file = root / "annotation" / "val" / "9.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({k: v for k, v in {**note, **changed}.items() if v is not None}))
    return file


def test_an_episode_is_as_long_as_its_states(dataset: Path) -> None:
    note = check_item(EpisodeStore(dataset), "val", Item("9", 0, 0))
    assert note.num_frames == 5 and note.joints is not None and note.joints.shape == (5, 8) and note.success
    bare = read_annotation(write(dataset, video_length=None, joints=None, success=None, texts=None))
    assert (bare.num_frames, bare.joints, bare.success, bare.text) == (5, None, None, "")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"video_length": 4}, "video_length is not the number of states"),
        ({"video_length": 6}, "video_length is not the number of states"),
        ({"video_length": "5"}, "video_length is not the number of states"),
        ({"joints": [[0.0] * 8] * 4}, "joints and states differ in number"),
        ({"joints": [[0.0] * 8] * 4 + [[0.0]]}, "joints are not rows of numbers of one width"),
        ({"states": None}, "states are missing"),
        ({"states": [[0.0] * 7] * 6, "joints": None, "video_length": 6}, "latents are shorter than the states"),
    ],
)
def test_what_disagrees_is_refused_by_metadata_and_rollouts_alike(
    changed: dict[str, Any], message: str, dataset: Path
) -> None:
    write(dataset, **changed)
    (item,) = list_annotations(dataset)
    assert read_episode(dataset, (item, False)).problem.startswith(message)
    with pytest.raises(PersistWorldError, match=message):
        check_item(EpisodeStore(dataset), "val", Item("9", 0, 0))
