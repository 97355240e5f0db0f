from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_raw import HEIGHT, WIDTH, encode, write_v21
from golden_files import GoldenFiles
from numpy.typing import NDArray
from safetensors import safe_open

from persistworld_cli.config.settings import ClipSettings, WorldSettings
from persistworld_cli.data.clips.clips import ClipSource
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.adapter_fit import fit_adapter
from persistworld_cli.data.metadata.annotations import read_keys
from persistworld_cli.data.metadata.ctrl_world_meta import SampleLists, export_ctrl_world
from persistworld_cli.data.metadata.health import count_starts, findings
from persistworld_cli.data.metadata.index import ActionStat, IndexFile
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.data.metadata.scan import facts
from persistworld_cli.data.processes import in_order
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_v21(tmp_path / "raw", {0: 60, 1: 45, 2: 10, 99: 30})
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), tmp_path / "raw", tmp_path / "out", encode)
    return tmp_path / "out"


def test_start_frames() -> None:
    """Edge cases of golden F: an episode of up to 5 frames gives one start, one of n gives n - 4."""
    lengths = np.array([1, 4, 5, 6, 8, 9, 33])
    assert count_starts(lengths, 5).tolist() == [1, 1, 1, 2, 4, 5, 29]


def test_percentiles_are_of_every_training_start(dataset: Path) -> None:
    report = build_meta(dataset)
    store = EpisodeStore(dataset)
    states = [store.annotation("train", e).states for e in store.episodes("train")]
    starts = np.concatenate([states[0][:16], states[1][:11], states[2][:1]])
    np.testing.assert_array_equal(store.stat().p01, np.percentile(starts, 1, axis=0))
    np.testing.assert_array_equal(store.stat().p99, np.percentile(starts, 99, axis=0))
    assert report.episodes == {"train": 3, "val": 1}
    assert report.frames == {"train": 39, "val": 10} and report.samples == {"train": 28, "val": 6}
    assert report.health["unusable"] == [] and report.health["length"] == {"min": 4, "median": 12.5, "max": 20}
    short = [row for row in report.health["findings"] if row["finding"] == "shorter than a clip"]
    assert [row["first"] for row in short] == [["train/2"]]


def test_adapter_finds_the_gain(dataset: Path) -> None:
    adapter = build_meta(dataset).adapter
    assert adapter is not None
    assert adapter["gain"] == pytest.approx([0.05] * 7, abs=1e-6)
    assert adapter["joint_mae"]["fitted"] < 1e-6 < adapter["joint_mae"]["hold"] < adapter["joint_mae"]["scale_0.2"]
    assert json.loads((dataset / "meta/joint_velocity_adapter.json").read_text()) == adapter


def motion(joints: NDArray[np.floating], velocity: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.stack([joints, velocity], axis=1)


def test_adapter_edge_cases() -> None:
    assert fit_adapter([]) is None
    still = fit_adapter([motion(np.zeros((20, 7)), np.zeros((20, 7)))])
    assert still is not None and still["gain"] == [0.0] * 7 and still["held_out"] is False
    assert fit_adapter([motion(np.zeros((1, 7)), np.zeros((1, 7)))]) is None


def test_the_held_out_error_is_of_a_gain_fitted_without_the_episode() -> None:
    """Two episodes whose joints answer by 0.04 and 0.08: each is predicted by the other's gain."""
    velocity = np.ones((3, 1))
    walks = [motion(gain * np.arange(3.0)[:, None], velocity) for gain in (0.04, 0.08)]
    fitted = fit_adapter(walks, hand_position=lambda q: np.repeat(q, 3, axis=1))
    assert fitted is not None and fitted["gain"] == pytest.approx([0.06])
    # windows of 1 and 2 frames: two and one of them, so (2 * 0.04 + 1 * 0.08) / 3
    assert fitted["joint_mae"]["fitted"] == pytest.approx(0.16 / 3)
    assert fitted["joint_mae"]["fit"] == pytest.approx(0.08 / 3)
    assert fitted["hand_error"]["fitted"] == pytest.approx(np.sqrt(3) * 0.04)  # one window of one frame each


def test_unusable_episodes_are_named_and_left_out(dataset: Path) -> None:
    note = dataset / "annotation/train/1.json"
    data = json.loads(note.read_text())
    note.write_text(json.dumps(data | {"video_length": 3}))
    (dataset / "latent_videos/train/0/1.npy").unlink()
    report = build_meta(dataset)
    assert report.episodes == {"train": 1, "val": 1}
    assert {row["finding"]: row["first"] for row in report.health["unusable"]} == {
        "latents of camera 1 are missing": ["train/0"],
        "video_length is not the number of states": ["train/1"],
    }
    assert EpisodeStore(dataset).index("train").ids == ("2",)


def test_no_training_episode_is_an_error(dataset: Path) -> None:
    for path in (dataset / "annotation/train").iterdir():
        path.unlink()
    with pytest.raises(PersistWorldError, match="no training episode") as caught:
        build_meta(dataset)
    assert "val_rule" in str(caught.value)
    assert not (dataset / "meta").exists()


def meta_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_update_reads_what_is_new_and_equals_a_rebuild(dataset: Path, tmp_path: Path) -> None:
    assert build_meta(dataset).read == 4
    before = meta_bytes(dataset / "meta")
    assert build_meta(dataset).read == 0 and meta_bytes(dataset / "meta") == before
    source = json.loads((dataset / "annotation/train/0.json").read_text())
    (dataset / "annotation/train/1.json").unlink()  # deleted
    copied = source | {"episode_id": 7, "texts": ["another one"]}
    for folder in ("videos", "latent_videos"):
        shutil.copytree(dataset / folder / "train/0", dataset / folder / "train/7")
    (dataset / "annotation/train/7.json").write_text(json.dumps(copied))  # new
    changed = source | {"texts": ["asked otherwise"], "states": (np.array(source["states"]) + 0.1).tolist()}
    (dataset / "annotation/train/0.json").write_text(json.dumps(changed))  # changed; its states need float64
    (dataset / "latent_videos/train/2/0.npy").unlink()  # damaged, behind an annotation that did not change
    report = build_meta(dataset)
    assert report.read == 3 and report.episodes == {"train": 2, "val": 1}
    build_meta(dataset, meta=tmp_path / "again", fresh=True)
    assert meta_bytes(dataset / "meta") == meta_bytes(tmp_path / "again")
    index = EpisodeStore(dataset).index("train")
    assert index.ids == ("0", "7") and index.texts == ("asked otherwise", "another one")
    assert index.states.dtype == np.float64
    np.testing.assert_array_equal(index.states[:20], changed["states"])


def test_many_episodes_go_through_workers_alike(dataset: Path, tmp_path: Path) -> None:
    for number in range(300, 560):
        for folder, name in (("annotation", f"{number}.json"), ("videos", str(number)), ("latent_videos", str(number))):
            (dataset / folder / "train" / name).symlink_to(dataset / folder / "train" / name.replace(str(number), "0"))
    seen: list[tuple[int, int]] = []
    build_meta(dataset, workers=2, progress=lambda done, total: seen.append((done, total)))
    build_meta(dataset, meta=tmp_path / "alone", workers=1)
    assert meta_bytes(dataset / "meta") == meta_bytes(tmp_path / "alone")
    assert seen[-1] == (264, 264) and EpisodeStore(dataset).index("train").ids[-1] == "559"


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(PersistWorldError, match="a worker process was killed"):
        list(in_order(os._exit, [3] * 300, 2))


def test_a_failure_leaves_the_old_metadata_whole(dataset: Path) -> None:
    build_meta(dataset)
    before = meta_bytes(dataset / "meta")
    note = dataset / "annotation/val/99.json"
    data = json.loads(note.read_text())
    note.write_text(json.dumps(data | {"states": [row[:6] for row in data["states"]]}))
    with pytest.raises(PersistWorldError, match=r"states have widths 7 \(train/0\) and 6 \(val/99\)"):
        build_meta(dataset)
    assert meta_bytes(dataset / "meta") == before

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    note.write_text(json.dumps(data))
    with pytest.raises(KeyboardInterrupt):
        build_meta(dataset, progress=interrupt)
    assert meta_bytes(dataset / "meta") == before


def test_a_damaged_index_is_named_and_made_again(dataset: Path) -> None:
    build_meta(dataset)
    path = dataset / "meta/index.safetensors"
    whole = path.read_bytes()
    for damage, message in ((whole[:-5], "cut off"), (b"x" * 40, "damaged"), (whole.replace(b"-1", b"-0"), "version")):
        path.write_bytes(damage)
        with pytest.raises(PersistWorldError, match=message) as caught:
            EpisodeStore(dataset).index("train")
        assert "build-meta" in str(caught.value)
    assert build_meta(dataset).read == 4 and path.read_bytes() == whole
    with safe_open(path, "np") as file:  # any reader of safetensors will do
        assert file.get_tensor("states").shape == (49, 7)


def export(dataset: Path, folder: Path, meta: Path | None = None) -> Path:
    meta = meta or dataset / "meta"
    return export_ctrl_world(IndexFile(meta / "index.safetensors"), ActionStat.load(meta / "stat.json"), folder)


def test_export_in_ctrl_worlds_form(dataset: Path) -> None:
    build_meta(dataset)
    folder = export(dataset, dataset / "meta_info/mine")
    entries = json.loads((folder / "train_sample.json").read_text())
    pairs = sorted((e["episode_id"], *e["frame_ids"]) for e in entries)
    assert pairs == [(0, i) for i in range(16)] + [(1, i) for i in range(11)] + [(2, 0)]
    assert [e["frame_ids"][0] for e in entries] != sorted(e["frame_ids"][0] for e in entries)
    assert len(json.loads((folder / "val_sample.json").read_text())) == 6
    assert json.loads((folder / "stat.json").read_text()) == json.loads((dataset / "meta/stat.json").read_text())


def test_ctrl_worlds_lists_are_taken_as_they_are(dataset: Path, tmp_path: Path) -> None:
    """Episodes that are not listed are left out, start frames and percentiles are the lists'."""
    lists = tmp_path / "droid"
    lists.mkdir()
    chosen = [(0, 3), (2, 0), (0, 12), (77, 1)]  # 77 is not on this disk
    entries = [{"episode_id": episode, "frame_ids": [start]} for episode, start in chosen]
    (lists / "train_sample.json").write_text(json.dumps(entries, indent=1))
    stat = {"state_01": [-1.0] * 7, "state_99": [2.0] * 7}
    (lists / "stat.json").write_text(json.dumps(stat))
    report = build_meta(dataset, lists=SampleLists(lists))
    assert report.episodes == {"train": 2} and report.samples == {"train": 3}
    assert report.health["imported"]["first"] == ["train/77"] and report.stat.p99.tolist() == stat["state_99"]
    store = EpisodeStore(dataset)
    source = ClipSource(store, "train", ClipSettings())
    assert len(source) == 3
    assert [(store.index("train").ids[row], start) for row, start in map(source.locate, range(3))] == [
        ("0", 3),
        ("0", 12),
        ("2", 0),
    ]
    exported = export(dataset, tmp_path / "back")
    back = json.loads((exported / "train_sample.json").read_text())
    assert sorted((e["episode_id"], *e["frame_ids"]) for e in back) == [(0, 3), (0, 12), (2, 0)]
    (lists / "train_sample.json").write_text(json.dumps(entries)[:-9])
    with pytest.raises(PersistWorldError, match="unreadable list of samples"):
        SampleLists(lists)
    with pytest.raises(PersistWorldError, match=r"no train_sample\.json") as caught:
        SampleLists(tmp_path)
    assert "back, droid" in str(caught.value)


def test_a_dataset_with_only_ctrl_worlds_metadata(dataset: Path) -> None:
    build_meta(dataset)
    export(dataset, dataset / "meta_info/mine")
    expected = EpisodeStore(dataset).stat().p01
    shutil.rmtree(dataset / "meta")
    store = EpisodeStore(dataset)
    np.testing.assert_array_equal(store.stat().p01, expected)
    with pytest.raises(PersistWorldError, match="Ctrl-World's lists but no index") as caught:
        store.index("train")
    assert "--import" in str(caught.value)


def test_real_samples_survive_the_round_trip(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "droid_subset"
    own = build_meta(root, meta=tmp_path / "own")
    folder = export(root, tmp_path / "lists", tmp_path / "own")
    again = build_meta(root, meta=tmp_path / "again", lists=SampleLists(folder))
    assert (again.episodes, again.samples) == (own.episodes, own.samples)
    np.testing.assert_array_equal(again.stat.p99, own.stat.p99)
    indices = [EpisodeStore(root, meta=tmp_path / name).index("train") for name in ("own", "again")]
    assert indices[0].ids == indices[1].ids and indices[1].starts is None
    np.testing.assert_array_equal(*(index.states for index in indices))


def test_findings_name_their_episodes() -> None:
    """Poses at 5 Hz: one stays, one leaps, one turns through roll's end, one grips in millimetres."""
    base = np.tile([0.5, 0, 0.3, 3.1, 0, 0, 0.2], (10, 1))
    leap, turn, grip = base.copy(), base.copy(), base.copy()
    leap[5:, 0] += 0.4
    turn[:, 3] = np.linspace(3.0, 3.3, 10)
    turn[:, 3] -= 2 * np.pi * (turn[:, 3] > np.pi)
    turn[:, 1] = np.linspace(0, 0.1, 10)
    grip[:, 6] = np.linspace(0, 85, 10)
    names, states = ["stay", "leap", "turn", "grip"], [base, leap, turn, grip]
    found = findings(names, np.full(4, 10), ["do it"] * 4, np.array([facts(s) for s in states]), 5.0, 5)
    assert {row["finding"].partition(" (")[0]: row["first"] for row in found} == {
        "arm never moves 1 cm": ["stay", "grip"],
        "position jumps": ["leap"],
        "gripper outside 0..1": ["grip"],
        "gripper never moves": ["stay", "leap", "turn"],
        "roll wraps around at pi": ["turn"],
    }
    flipped = base.copy()
    flipped[5:, 5] = 2.5  # a half turn between two frames
    assert facts(flipped).turn == pytest.approx(2.5) and facts(turn).turn < 0.05


def test_keys_are_read_as_json_reads_them() -> None:
    wanted = ("states", "texts")
    for text in (
        "{}",
        ' { "a" : [ [1, 2.5e-3], [] ] , "states" : [[1]] } ',
        '{"a": ["x", [1]], "b": {"states": 3}, "states": 4}',
        '{"t": "\\"states\\": [", "states": [1], "z": [NaN, -Infinity]}',
        '{"texts": ["s]{"], "a": [], "b": null, "states": [[1, 2]]}',
    ):
        whole = json.loads(text)
        assert read_keys(text, wanted) == {k: v for k, v in whole.items() if k in wanted}
    for text in ("[1]", '{"a": [1, 2', '{"a": [1, 2]', '{"a": [1}', '{"a" 1}', "", '{"states": [1,,]}'):
        with pytest.raises((ValueError, TypeError)):
            read_keys(text, wanted)


def test_real_subset_agrees_with_the_reference(golden: GoldenFiles, shared_data: Path, tmp_path: Path) -> None:
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
    assert not (copy / "meta/joint_velocity_adapter.json").exists()
