from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_raw import HEIGHT, WIDTH, encode, write_v21

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.extract import extract_latents
from persistworld_cli.data.meta import build_meta, export_ctrl_world, fit_adapter, start_states
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_v21(tmp_path / "raw", {0: 60, 1: 45, 2: 10, 99: 30})
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), tmp_path / "raw", tmp_path / "out", encode)
    return tmp_path / "out"


def test_start_frames() -> None:
    """Edge cases of golden F: an episode of up to 5 frames gives one start, one of n gives n - 4."""
    for length, count in ((1, 1), (4, 1), (5, 1), (6, 2), (8, 4), (9, 5), (33, 29)):
        assert len(start_states([np.zeros((length, 7))])) == count


def test_percentiles_are_of_every_training_start(dataset: Path) -> None:
    report = build_meta(dataset)
    store = EpisodeStore(dataset)
    states = [store.annotation("train", e).states for e in store.episodes("train")]
    starts = np.concatenate([states[0][:16], states[1][:11], states[2][:1]])
    np.testing.assert_array_equal(store.stat().p01, np.percentile(starts, 1, axis=0))
    np.testing.assert_array_equal(store.stat().p99, np.percentile(starts, 99, axis=0))
    assert report.episodes == {"train": 3, "val": 1}
    assert report.frames == {"train": 39, "val": 10} and report.samples == {"train": 28, "val": 6}
    assert report.health["unusable"] == {} and report.health["length"]["max"] == 20
    assert report.health["shorter_than_clip"] == 1


def test_adapter_finds_the_gain(dataset: Path) -> None:
    adapter = build_meta(dataset).adapter
    assert adapter is not None
    assert adapter["gain"] == pytest.approx([0.05] * 7, abs=1e-6)
    assert adapter["joint_mae"]["fitted"] < 1e-6 < adapter["joint_mae"]["hold"] < adapter["joint_mae"]["scale_0.2"]
    assert json.loads((dataset / "meta/adapter.json").read_text()) == adapter


def test_adapter_edge_cases() -> None:
    assert fit_adapter([]) is None
    still = fit_adapter([(np.zeros((20, 7)), np.zeros((20, 7)))])
    assert still is not None and still["gain"] == [0.0] * 7 and still["held_out"] is False
    assert fit_adapter([(np.zeros((1, 7)), np.zeros((1, 7)))]) is None


def test_unusable_episodes_are_named_and_left_out(dataset: Path) -> None:
    note = dataset / "annotation/train/1.json"
    data = json.loads(note.read_text())
    note.write_text(json.dumps(data | {"video_length": 3}))
    (dataset / "latent_videos/train/0/1.npy").unlink()
    report = build_meta(dataset)
    assert report.episodes == {"train": 1, "val": 1}
    assert {reason: entry["first"] for reason, entry in report.health["unusable"].items()} == {
        "latents of camera 1 of episode '0' are missing": ["train/0"],
        "video_length 3 but 15 states": ["train/1"],
    }
    assert EpisodeStore(dataset).index("train").ids == ("2",)


def test_no_training_episode_is_an_error(dataset: Path) -> None:
    for path in (dataset / "annotation/train").iterdir():
        path.unlink()
    with pytest.raises(PersistWorldError, match="no training episode") as caught:
        build_meta(dataset)
    assert "val_rule" in str(caught.value)
    assert not (dataset / "meta").exists()


def test_export_in_ctrl_worlds_form(dataset: Path) -> None:
    build_meta(dataset)
    folder = export_ctrl_world(EpisodeStore(dataset), "mine")
    assert folder == dataset / "meta_info/mine"
    entries = json.loads((folder / "train_sample.json").read_text())
    pairs = sorted((e["episode_id"], *e["frame_ids"]) for e in entries)
    assert pairs == [(0, i) for i in range(16)] + [(1, i) for i in range(11)] + [(2, 0)]
    assert [e["frame_ids"][0] for e in entries] != sorted(e["frame_ids"][0] for e in entries)
    assert len(json.loads((folder / "val_sample.json").read_text())) == 6
    assert json.loads((folder / "stat.json").read_text()) == json.loads((dataset / "meta/stat.json").read_text())


def test_real_subset_agrees_with_the_reference(golden: Path, shared_data: Path, tmp_path: Path) -> None:
    report = build_meta(shared_data / "droid_subset", meta=tmp_path)
    info = json.loads((golden / "dataset_semantics.json").read_text())["meta_info"]
    store = EpisodeStore(shared_data / "droid_subset", meta=tmp_path)
    for split in ("train", "val"):
        per_episode = info[split]["per_episode"]
        ours = {e: max(1, store.annotation(split, e).num_frames - 4) for e in store.episodes(split)}
        assert ours == {e: per_episode[e] for e in ours}
        assert report.samples[split] == sum(ours.values())
    # method.md: the motion a frame is about 0.054 v on the full set of episodes
    assert report.adapter is not None
    assert report.adapter["gain_pooled"] == pytest.approx(0.054, abs=0.004)
    errors = report.adapter["joint_mae"]
    assert errors["fitted"] < 0.5 * errors["hold"] < errors["scale_0.2"]


def test_recordings_of_the_new_setup_need_no_raw_lists(shared_data: Path, tmp_path: Path) -> None:
    """Only texts, states, joints and videos are sure to be there; these samples are all validation."""
    with pytest.raises(PersistWorldError, match="no training episode"):
        build_meta(shared_data / "droid_new_setup", meta=tmp_path / "a")
    copy = tmp_path / "d"
    (copy / "annotation").mkdir(parents=True)
    (copy / "annotation/train").symlink_to(shared_data / "droid_new_setup/annotation/val")
    (copy / "videos").mkdir()
    (copy / "videos/train").symlink_to(shared_data / "droid_new_setup/videos/val")
    report = build_meta(copy)
    assert report.episodes == {"train": 3} and report.adapter is None
    assert not (copy / "meta/adapter.json").exists()
