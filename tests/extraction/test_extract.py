from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_raw import CAMERAS, HEIGHT, TASK, WIDTH, columns, encode, video_path, write_v21, write_v30

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.annotations import load_annotation
from persistworld_cli.data.raw.clock import Clock
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.extraction.pipeline import ExtractCallbacks, Progress, extract_latents
from persistworld_cli.extraction.preparing import split_of
from persistworld_cli.extraction.publish import Changing, Encoder
from persistworld_cli.extraction.report import merge_reports

WORLD = WorldSettings(height=HEIGHT, width=WIDTH)


@pytest.mark.parametrize(
    ("length", "fps", "rate", "expected"),
    [
        (7, 15, 5, [0, 3, 6]),
        (9, 15, 5, [0, 3, 6]),
        (4, 5, 5, [0, 1, 2, 3]),
        (9, 10, 5, [0, 2, 4, 6, 8]),
        (8, 12, 5, [0, 2, 5, 7]),
        (10, 30, 5, [0, 6]),
        (1, 15, 5, [0]),
    ],
)
def test_resampling(length: int, fps: float, rate: float, expected: list[int]) -> None:
    assert _clock(length, fps).rows(rate).tolist() == expected


def test_resampling_of_a_whole_ratio_is_every_third_row_for_any_length() -> None:
    for length in (*range(1, 50), 20_000):
        assert _clock(length, 15).rows(5).tolist() == list(range(0, length, 3))


def _clock(length: int, fps: float) -> Clock:
    return Clock.of((np.arange(length) / fps).astype(np.float32), fps)


def test_split_rules() -> None:
    assert [split_of(i, "id-ends-99", {}) for i in (9, 99, 100, 199, 1799)] == ["train", "val", "train", "val", "val"]
    assert [split_of(i, "every-4", {}) for i in range(5)] == ["train", "train", "train", "val", "train"]
    ranges = {"train": (0, 60), "validation": (60, 80)}
    assert [split_of(i, "info-splits", ranges) for i in (0, 59, 60)] == ["train", "train", "val"]
    with pytest.raises(PersistWorldError, match="episode 80 is in no split"):
        split_of(80, "info-splits", ranges)
    for rule in ("every-1", "every-x", "random"):
        with pytest.raises(PersistWorldError, match="unknown split rule"):
            split_of(0, rule, {})


def test_an_episode_comes_out_whole(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", {0: 20, 99: 10})
    seen: list[Progress] = []
    callbacks = ExtractCallbacks(progress=seen.append)
    report = extract_latents(WORLD, raw, tmp_path / "out", encode, batch_frames=3, callbacks=callbacks)
    assert (report.done, report.skipped, report.failed) == (["0", "99"], [], [])
    counts = [(now.frames, now.episodes) for now in seen]
    assert counts == sorted(counts) and {now.of_episodes for now in seen} == {2} and {0, 7, 11} <= set(dict(counts))
    assert (seen[-1].frames, seen[-1].of_frames, seen[-1].episodes) == (11, 11, 2)
    store = EpisodeStore(tmp_path / "out")
    assert store.episodes("train") == ["0"] and store.episodes("val") == ["99"]
    note = store.annotation("train", "0")
    expected = columns(0, 20)
    names = ("observation.state.cartesian_position", "observation.state.gripper_position")
    states = np.concatenate([expected[n].astype(float).reshape(20, -1) for n in names], 1)[::3]
    np.testing.assert_array_equal(note.states, states)
    assert note.joints is not None and note.joints.shape == (7, 8)
    assert (note.text, note.success, note.num_frames) == (TASK, True, 7)
    raw_note = load_annotation(tmp_path / "out/annotation/train/0.json")
    assert raw_note["raw_length"] == len(raw_note["action.joint_velocity"]) == 20
    frames = store.frames("train", "0", range(7))
    assert frames.shape == (7, 3, HEIGHT, WIDTH, 3)
    assert frames[:, 0, HEIGHT // 2 :].mean(axis=(1, 2, 3)) == pytest.approx(40 + 12 * np.arange(7), abs=1.5)
    latents = store.latents("train", "0", range(7))
    assert latents.shape == (7, 4, 3 * HEIGHT // 8, WIDTH // 8) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, encode(torch.from_numpy(frames)), atol=0.02, rtol=0)
    for video_entry, latent_entry in zip(raw_note["videos"], raw_note["latent_videos"], strict=True):
        assert (tmp_path / "out" / video_entry["video_path"]).is_file()
        assert (tmp_path / "out" / latent_entry["latent_video_path"]).is_file()
    assert not any((tmp_path / "out/.staging").iterdir())


def test_layouts_and_versions_agree(tmp_path: Path) -> None:
    lengths = [16, 10]
    old, new = write_v21(tmp_path / "v21", dict(enumerate(lengths))), write_v30(tmp_path / "v30", lengths)
    extract_latents(WORLD, old, tmp_path / "a", encode, layout="ctrl-world")
    extract_latents(WORLD, new, tmp_path / "b", encode, layout="native")
    a, b = EpisodeStore(tmp_path / "a"), EpisodeStore(tmp_path / "b")
    for episode, frames in (("0", 6), ("1", 4)):
        left = torch.load(tmp_path / f"a/latent_videos/train/{episode}/1.pt", weights_only=True)
        assert left.shape == (frames, 4, HEIGHT // 8, WIDTH // 8) and left.dtype == torch.float32
        right = np.load(tmp_path / f"b/latent_videos/train/{episode}/1.npy", mmap_mode="r")
        assert right.dtype == np.float16
        ids = [0, frames - 1, 1]
        torch.testing.assert_close(
            a.latents("train", episode, ids), b.latents("train", episode, ids), atol=0.015, rtol=0
        )
        x, y = a.annotation("train", episode), b.annotation("train", episode)
        np.testing.assert_array_equal(x.states, y.states)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    raw, out = write_v21(tmp_path / "raw", dict.fromkeys(range(4), 12)), tmp_path / "out"
    calls = 0

    def dies_at_third(frames: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(frames)

    with pytest.raises(KeyboardInterrupt):
        extract_latents(WORLD, raw, out, dies_at_third, batch_frames=4)
    store = EpisodeStore(out)
    assert store.episodes("train") == ["0", "1"]
    # a run killed between its renames leaves videos without an annotation
    (out / "videos/train/2").mkdir(parents=True)
    (out / "videos/train/2/0.mp4").write_bytes(b"half")
    (out / ".staging/2-1").mkdir(parents=True, exist_ok=True)
    before = (out / "annotation/train/0.json").stat().st_mtime_ns
    report = extract_latents(WORLD, raw, out, encode)
    assert (report.skipped, report.done) == (["0", "1"], ["2", "3"])
    assert (out / "annotation/train/0.json").stat().st_mtime_ns == before
    assert store.frames("train", "2", [3]).shape == (1, 3, HEIGHT, WIDTH, 3)
    assert not any((out / ".staging").iterdir())


def test_two_processes_never_share_an_episode(tmp_path: Path) -> None:
    raw, out = write_v21(tmp_path / "raw", dict.fromkeys(range(5), 7)), tmp_path / "out"
    parts = [extract_latents(WORLD, raw, out, encode, rank=r, world_size=2) for r in (1, 0)]
    assert [p.done for p in parts] == [["1", "3"], ["0", "2", "4"]]
    merged = merge_reports(out, 2, "")
    assert sorted(merged.done) == ["0", "1", "2", "3", "4"]


def test_chosen_episodes_and_absent_ones(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", dict.fromkeys(range(4), 7))
    for camera in CAMERAS:  # its table is there: tables are small, and fetched as a whole
        video_path(raw, 3, camera).unlink()
    report = extract_latents(WORLD, raw, tmp_path / "a", encode)
    assert (report.done, report.absent, report.failed) == (["0", "1", "2"], 1, [])
    assert report.absent_ids == "3"
    report = extract_latents(WORLD, raw, tmp_path / "b", encode, episodes={1, 3, 8})
    assert report.done == ["1"] and [f["episode"] for f in report.failed] == ["3", "8"]
    assert report.absent == 2


def test_a_dataset_never_mixes_settings_or_encoders(tmp_path: Path) -> None:
    raw, out = write_v21(tmp_path / "raw", {0: 7}), tmp_path / "out"
    a, b = Encoder("a"), Encoder("b")
    extract_latents(WORLD, raw, out, encode, encoder=a)
    with pytest.raises(UsageError, match="encoder: a -> b"):
        extract_latents(WORLD, raw, out, encode, encoder=b)
    with pytest.raises(PersistWorldError, match="layout"):
        extract_latents(WORLD, raw, out, encode, encoder=a, layout="ctrl-world")
    with pytest.raises(PersistWorldError, match="unknown latent layout"):
        extract_latents(WORLD, raw, tmp_path / "c", encode, layout="zip")
    (out / "extract.json").unlink()
    with pytest.raises(PersistWorldError, match="unknown origin"):
        extract_latents(WORLD, raw, out, encode)


def test_a_wrong_preset_is_not_blamed_on_the_episodes(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", {0: 7})
    for world, message in (
        (WorldSettings(cameras=("exterior_1_left", "wrist")), "no camera 'wrist'"),
        (WorldSettings(state_fields=("observation.state.cartesian",)), r"no column 'observation\.state\.cartesian'"),
        (WorldSettings(val_rule="id-ends-98"), "unknown split rule"),
    ):
        with pytest.raises(PersistWorldError, match=message):
            extract_latents(world, raw, tmp_path / "out", encode)
    with pytest.raises(PersistWorldError, match=r"have 7 numbers, but model\.action_dim = 6") as wide:
        extract_latents(WORLD, raw, tmp_path / "out", encode, numbers=6)
    assert "model.action_dim = 7" in str(wide.value.fix) and not (tmp_path / "out").exists()


def test_a_broken_encoder_stops_the_run(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", {0: 7})
    with pytest.raises(PersistWorldError, match="encoder returned NaN or infinite values"):
        extract_latents(WORLD, raw, tmp_path / "a", lambda f: encode(f) * float("nan"))
    assert not (tmp_path / "a/annotation").exists()


def test_raw_at_the_model_rate_keeps_every_frame(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", {0: 7}, fps=5)
    extract_latents(WORLD, raw, tmp_path / "out", encode)
    assert EpisodeStore(tmp_path / "out").annotation("train", "0").num_frames == 7


@pytest.mark.parametrize(
    ("version", "where"),
    # v3.0 numbers its episodes anew, so that none ends in 99
    [("v21", {"6": ("train", "6"), "199": ("val", "199")}), ("v30", {"6": ("train", "3"), "199": ("train", "4")})],
)
def test_real_droid_gives_the_processed_subset_back(
    tmp_path: Path, shared_data: Path, version: str, where: dict[str, tuple[str, str]]
) -> None:
    chosen = {int(name) for _, name in where.values()}
    world = WorldSettings(height=48, width=80)
    extract_latents(world, shared_data / f"droid_raw_{version}", tmp_path, encode, episodes=chosen)
    ours, theirs = EpisodeStore(tmp_path), EpisodeStore(shared_data / "droid_subset")
    for episode, (split, name) in where.items():
        their_split = "val" if episode == "199" else "train"
        own, reference = ours.annotation(split, name), theirs.annotation(their_split, episode)
        np.testing.assert_array_equal(own.states, reference.states)
        assert (own.text, own.success, own.num_frames) == (reference.text, reference.success, reference.num_frames)
        wanted, got = (
            load_annotation(root / f"annotation/{part}/{file}.json")
            for root, part, file in ((theirs.root, their_split, episode), (ours.root, split, name))
        )
        differing = {key for key, value in wanted.items() if got[key] != value}
        assert differing <= {"latent_videos", "joints"} | ({"episode_id", "videos"} if version == "v30" else set())
        ids = [5, 12, 20, 27]  # the wrist's images are of the same moments: its neighbours in time are further off
        wrist = ours.frames(split, name, ids)[:, 2].astype(float)
        error = {}
        for shift in (-1, 0, 1):
            frames = theirs.frames(their_split, episode, [i + shift for i in ids])[:, 2]
            error[shift] = np.abs(wrist - resize(frames, 48, 80)).mean()
        assert min(error, key=lambda shift: error[shift]) == 0, error


def test_a_dataset_goes_on_with_changes_only_where_it_is_asked_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, more, out = (tmp_path / name for name in ("raw", "more", "out"))
    write_v21(raw, {0: 7})
    write_v21(more, {0: 7, 1: 7})
    weights = Encoder("a", "fp32", "1" * 64)
    extract_latents(WORLD, raw, out, encode, encoder=weights)
    with caplog.at_level(logging.INFO, "persistworld_cli"):
        extract_latents(WORLD, raw, out, encode, encoder=replace(weights, name="b"))  # the same weights elsewhere
    assert "resuming: 1 episodes are finished" in caplog.text
    typed = Changing(command=("persistworld", "extract-latents", str(more), str(out)), dataset=str(out))
    before = (out / "extract.json").read_bytes()
    with pytest.raises(UsageError, match=r"raw: .*raw -> .*more") as refusal:
        extract_latents(WORLD, more, out, encode, encoder=weights, changes=typed)
    assert f"persistworld extract-latents {more} {out}-2\n" in str(refusal.value)
    assert f"persistworld extract-latents {more} {out} --continue-with-changes" in str(refusal.value)
    assert (out / "extract.json").read_bytes() == before
    wanted = replace(typed, wanted=True)
    assert extract_latents(WORLD, more, out, encode, encoder=weights, changes=wanted).done == ["1"]
    assert json.loads((out / "extract.json").read_text())["changes"] == [
        {"from_episodes": 1, "raw": [str(raw), str(more)]}
    ]
    with pytest.raises(UsageError, match="state_fields: ") as never:  # nobody could read these side by side
        other = replace(WORLD, state_fields=WORLD.state_fields[:1])
        extract_latents(other, more, out, encode, encoder=weights, changes=wanted)
    assert "--continue-with-changes" not in str(never.value)
    known = {
        key: value for key, value in json.loads(before).items() if key in ("cameras", "height", "width", "rate_hz")
    }
    (out / "extract.json").write_text(
        json.dumps(known | {"layout": "native", "val_rule": "id-ends-99", "encoder": "a"})
    )
    with caplog.at_level(logging.INFO, "persistworld_cli"):
        extract_latents(WORLD, raw, out, encode, encoder=weights)  # a dataset of an older version
    assert f"not recorded for the existing episodes: raw {raw}" in caplog.text


def test_runs_that_share_a_dataset_tell_of_their_own_episodes(tmp_path: Path) -> None:
    raw, out = write_v21(tmp_path / "raw", dict.fromkeys(range(3), 7)), tmp_path / "out"
    for run, chosen in (("a", {0}), ("b", {1, 2})):
        for rank in (0, 1):
            extract_latents(WORLD, raw, out, encode, episodes=chosen, rank=rank, world_size=2, run=run)
    assert merge_reports(out, 2, "a").done == ["0"] and sorted(merge_reports(out, 2, "b").done) == ["1", "2"]
