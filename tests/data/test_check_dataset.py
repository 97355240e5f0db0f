"""`build-meta --check` on sound and broken datasets, through the command: what is told, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_raw import HEIGHT, WIDTH, encode, write_v21
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.data.raw import video
from persistworld_cli.extraction.pipeline import extract_latents

PRESET = f"""
extends = "tiny"
[world]
height = {HEIGHT}
width = {WIDTH}
val_rule = "id-ends-99"
[model.vae]
block_out_channels = [1, 1, 1, 1]
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training episodes and one for validation, with metadata."""
    root = tmp_path_factory.mktemp("sound")
    write_v21(root / "raw", {0: 24, 1: 30, 2: 18, 3: 21, 99: 24})
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), root / "raw", root / "out", encode)
    build_meta(root / "out")
    (root / "mine.toml").write_text(PRESET)
    return root


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(sound / "out", tmp_path / "d", copy_function=shutil.copy2)
    for folder in ("videos", "latent_videos"):  # a copy has times of its own: not what is tested here
        for episode in (tmp_path / "d" / folder).glob("*/*"):
            shutil.copystat(sound / "out" / episode.relative_to(tmp_path / "d"), episode)
    return tmp_path / "d"


def check(dataset: Path, preset: Path | str, *more: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """(exit code, findings by kind, the whole result)."""
    arguments = ["build-meta", str(dataset), "--check", "--json", *more]
    done = CliRunner().invoke(app, [*arguments, *(["--preset", str(preset)] if preset else [])])
    assert done.exit_code in (0, 1), done.output
    told = json.loads(done.stdout)
    return done.exit_code, {row["kind"]: row for row in told["findings"]}, told


def test_a_sound_dataset_passes(sound: Path, dataset: Path) -> None:
    code, found, told = check(dataset, sound / "mine.toml")
    assert (code, set(found), told["ok"]) == (0, {"few-val"}, True)
    assert found["few-val"]["first"] == ["annotation/val (1 of 5)"]
    assert list(told["checked"].values()) == [5, 15, 5]
    assert check(dataset, sound / "mine.toml", "--sample", "2")[2]["checked"].popitem()[1] == 2
    code, found, _ = check(dataset, "")
    assert code == 0 and set(found) == {"few-val", "no-preset"}
    text = CliRunner().invoke(app, ["build-meta", str(dataset), "--check"]).stdout
    assert "not compared with a preset" in text and "fit for use" in text


def edit(note: Path, **changes: Any) -> None:
    """Rewrite an annotation; a value of None takes the key away."""
    data = json.loads(note.read_text()) | changes
    note.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def states(d: Path, episode: str) -> Any:
    return np.array(json.loads((d / f"annotation/train/{episode}.json").read_text())["states"])


def no_annotations(d: Path) -> None:
    shutil.rmtree(d / "annotation")


def unreadable(d: Path) -> None:
    note = d / "annotation/train/1.json"
    note.write_text(note.read_text()[:2000])


def states_missing(d: Path) -> None:
    edit(d / "annotation/train/1.json", states=None)


def states_nan(d: Path) -> None:
    values = states(d, "1")
    values[3, 2] = np.nan
    edit(d / "annotation/train/1.json", states=values.tolist())


def states_narrow(d: Path) -> None:
    edit(d / "annotation/train/1.json", states=states(d, "1")[:, :6].tolist())


def states_fewer(d: Path) -> None:
    edit(d / "annotation/train/1.json", states=states(d, "1")[:-2].tolist())


def video_gone(d: Path) -> None:
    (d / "videos/train/2/1.mp4").unlink()


def video_damaged(d: Path) -> None:
    (d / "videos/train/2/1.mp4").write_bytes(b"no video")


def video_short(d: Path) -> None:
    path = d / "videos/train/2/0.mp4"
    frames = video.read_frames(path, range(4))
    video.write_mp4(path, list(frames), 5.0)


def latents_gone(d: Path) -> None:
    shutil.rmtree(d / "latent_videos/train/3")


def latents(d: Path, change: Callable[[Any], Any]) -> None:
    path = d / "latent_videos/train/3/0.npy"
    np.save(path, change(np.load(path)))


def latents_short(d: Path) -> None:
    latents(d, lambda x: x[:-1])


def latents_more(d: Path) -> None:
    latents(d, lambda x: np.concatenate([x, x[-1:]]))


def latents_flat(d: Path) -> None:
    latents(d, lambda x: x.reshape(len(x), -1))


def latents_double(d: Path) -> None:
    latents(d, lambda x: x.astype(np.float64))


def latents_nan(d: Path) -> None:
    latents(d, lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x).astype(np.float16))


def latents_zero(d: Path) -> None:
    latents(d, lambda x: x * 0)


def latents_cut(d: Path) -> None:
    path = d / "latent_videos/train/3/0.npy"
    path.write_bytes(path.read_bytes()[:-100])


def latents_old(d: Path) -> None:
    folder = d / "latent_videos/train/3"
    torch.save(torch.zeros(7, 4, 4, 6), folder / "0.pt", _use_new_zipfile_serialization=False)
    (folder / "0.npy").unlink()


def one_camera_less(d: Path) -> None:
    for folder in ("videos/train/2/2.mp4", "latent_videos/train/2/2.npy"):
        (d / folder).unlink()


def other_size(d: Path) -> None:
    for camera in range(3):
        path = d / f"latent_videos/train/3/{camera}.npy"
        np.save(path, np.load(path)[:, :, :2])


def no_training(d: Path) -> None:
    shutil.rmtree(d / "annotation/train")


def in_two_splits(d: Path) -> None:
    for folder in ("annotation", "videos", "latent_videos"):
        for source in (d / folder / "train").glob("0*"):
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, d / folder / "val" / source.name)


def index_cut(d: Path) -> None:
    path = d / "meta/index.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def percentiles(d: Path, low: float, high: float, count: int = 7) -> None:
    (d / "meta/stat.json").write_text(json.dumps({"state_01": [low] * count, "state_99": [high] * count}))


def percentiles_swapped(d: Path) -> None:
    percentiles(d, 1.0, -1.0)


def percentiles_of_another(d: Path) -> None:
    percentiles(d, -1.0, 1.0, 6)


def percentiles_same(d: Path) -> None:
    percentiles(d, 0.5, 0.5)


def no_index(d: Path) -> None:
    shutil.rmtree(d / "meta")


def no_texts(d: Path) -> None:
    edit(d / "annotation/train/0.json", texts=None)


@pytest.mark.parametrize(
    ("damage", "kind", "must", "first"),
    [
        (no_annotations, "no-annotation", True, ""),
        (unreadable, "unreadable", True, "train/1 (Expecting"),
        (states_missing, "states", True, "train/1 (are missing)"),
        (states_nan, "states", True, "train/1 (hold NaN or infinite values)"),
        (states_narrow, "state-width", True, "train/1 (6, most have 7)"),
        (states_fewer, "states", True, "train/1 (video_length is 10, there are 8 states)"),
        (video_gone, "video-missing", True, "train/2 (camera 1)"),
        (video_damaged, "video-unreadable", True, "train/2 (1.mp4"),
        (video_short, "video-length", True, "train/2 (0.mp4: 4 frames, 6 states)"),
        (latents_gone, "latent-missing", True, "train/3 (camera 0, 1, 2)"),
        (latents_short, "latent-length", True, "train/3 (0.npy: 6 latents, 7 states)"),
        (latents_more, "latent-longer", False, "train/3 (0.npy: 8 latents, 7 states)"),
        (latents_flat, "latent-shape", True, "train/3 (0.npy: (7, "),
        (latents_double, "latent-type", True, "train/3 (0.npy: float64)"),
        (latents_nan, "latent-values", True, "train/3 (0.npy)"),
        (latents_zero, "latent-constant", False, "train/3 (0.npy)"),
        (latents_cut, "latent-unreadable", True, "train/3 (0.npy: the file is cut off)"),
        (latents_old, "latent-old", True, "train/3 (0.pt)"),
        (one_camera_less, "cameras", True, "train/2 (2, most have 3)"),
        (other_size, "latent-size", True, "train/3 ((4, 2, 6), most have (4, 4, 6))"),
        (no_training, "no-train", True, "annotation/train"),
        (in_two_splits, "two-splits", True, "0 (train and val)"),
        (index_cut, "bad-index", True, ""),
        (percentiles_swapped, "stat-order", True, "x (1 .. -1)"),
        (percentiles_of_another, "stat-width", True, "stat.json (6 numbers, the states have 7)"),
        (percentiles_same, "stat-constant", False, "x (0.5)"),
        (no_index, "no-index", False, ""),
        (no_texts, "no-instruction", False, "train/0"),
    ],
)
def test_what_is_broken_is_named(
    sound: Path, dataset: Path, damage: Callable[[Path], None], kind: str, must: bool, first: str
) -> None:
    damage(dataset)
    code, found, told = check(dataset, sound / "mine.toml")
    assert kind in found, told["findings"]
    row = found[kind]
    assert row["level"] == ("error" if must else "warning") and row["first"][0].startswith(first) and row["to do"]
    others = {name for name, other in found.items() if other["level"] == "error"} - {kind, "stale-index"}
    assert not others, others
    stale = "stale-index" in found
    assert code == (1 if must or stale else 0) and told["errors"] == must + stale


def test_an_index_older_than_the_episodes(sound: Path, dataset: Path) -> None:
    (dataset / "annotation/train/0.json").unlink()
    note = json.loads((dataset / "annotation/train/1.json").read_text())
    (dataset / "annotation/train/7.json").write_text(json.dumps(note | {"episode_id": 7}))
    edit(dataset / "annotation/train/2.json", texts=["asked otherwise, and longer"])
    for folder in ("videos", "latent_videos"):
        shutil.copytree(dataset / folder / "train/1", dataset / folder / "train/7")
    code, found, _ = check(dataset, sound / "mine.toml")
    assert code == 1 and set(found) == {"few-val", "stale-index"}
    assert found["stale-index"]["first"] == ["train/7 (new)", "train/2 (changed)", "train/0 (deleted)"]
    build_meta(dataset)
    code, found, _ = check(dataset, sound / "mine.toml")
    assert code == 0 and set(found) == {"few-val"}


def test_another_preset_than_the_datasets(dataset: Path, tmp_path: Path) -> None:
    code, found, _ = check(dataset, "tiny")
    assert code == 1 and set(found) == {"few-val", "preset-latent", "preset-image", "preset-split"}
    assert found["preset-image"]["first"] == ["preset tiny (32x48, the preset takes 48x80)"]
    assert "--preset" in found["preset-image"]["to do"]
    _, found, _ = check(dataset, "one-camera")
    differing = {"preset-cameras", "preset-numbers", "preset-latent", "preset-image", "preset-rate", "preset-split"}
    assert set(found) == {"few-val"} | differing
    assert found["preset-split"]["first"] == ["preset one-camera (split by id-ends-99, the preset has every-3)"]


def test_the_real_samples(shared_data: Path) -> None:
    code, found, _ = check(shared_data / "droid_subset", "ctrl-world", "--sample", "1")
    assert code == 0 and set(found) == {"few-val", "no-instruction", "no-index"}
    code, found, _ = check(shared_data / "droid_new_setup", "ctrl-world", "--sample", "1")
    assert code == 1 and set(found) == {"few-val", "no-train", "no-latents", "no-index", "video-longer"}


def test_check_goes_with_nothing_that_writes(dataset: Path) -> None:
    done = CliRunner().invoke(app, ["build-meta", str(dataset), "--check", "--export", "ctrl-world"])
    assert done.exit_code == 2 and "--check writes nothing" in done.stderr
