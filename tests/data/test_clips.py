from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from data_raw import HEIGHT, WIDTH, encode, write_v21
from golden_files import GoldenFiles
from golden_table import close

from persistworld_cli.config.settings import ClipSettings, SamplingSettings, WorldSettings
from persistworld_cli.data.clips.clips import ClipSource, clip_ids, rollout_history_ids
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents

HISTORY = SamplingSettings().history


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    root = tmp_path_factory.mktemp("clips")
    write_v21(root / "raw", {0: 120, 1: 10, 2: 60})  # 40, 4 and 20 frames: one shorter than a clip's future
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), root / "raw", root / "out", encode)
    build_meta(root / "out")
    return EpisodeStore(root / "out")


def test_ids_of_a_clip() -> None:
    assert clip_ids(10, 1, 99, history_step=4) == (0, 0, 0, 0, 2, 6, 10, 11, 12, 13, 14)
    assert clip_ids(60, 2, 67, history_step=8) == (12, 20, 28, 36, 44, 52, 60, 62, 64, 66, 67)
    assert clip_ids(3, 1, 3, history_step=0) == (3,) * 11


def test_history_as_a_rollout_shows_it() -> None:
    assert rollout_history_ids(20, 20, HISTORY, 24, 4) == (20,) * 6
    assert rollout_history_ids(24, 20, HISTORY, 24, 4) == (20, 20, 20, 20, 20, 20)
    assert rollout_history_ids(28, 20, HISTORY, 24, 4) == (20, 20, 20, 20, 20, 24)
    assert rollout_history_ids(60, 20, HISTORY, 24, 4) == (20, 20, 32, 40, 48, 56)
    for now, start in ((21, 20), (19, 20)):
        with pytest.raises(ValueError, match="never reaches"):
            rollout_history_ids(now, start, HISTORY, 24, 4)


def test_history_is_that_of_the_reference_rollout(golden: GoldenFiles) -> None:
    """Golden I: `history_position` counts buffer entries; entry 24 + i - 1 is the frame after i interactions."""
    from safetensors.torch import load_file

    start = 8
    positions = load_file(golden / "rollouts.safetensors")["replay.g2.history_position"]
    for interaction, row in enumerate(positions.tolist()):
        entries = [start + 4 * max(0, p - 23) for p in row]
        assert rollout_history_ids(start + 4 * interaction, start, HISTORY, 24, 4) == tuple(entries)


def test_golden_clips(golden: GoldenFiles, shared_data: Path, tmp_path: Path) -> None:
    """Golden F: frame ids, actions and latents of the reference's own draws (of the episodes that are here)."""
    build_meta(shared_data / "droid_subset", meta=tmp_path)
    store = EpisodeStore(shared_data / "droid_subset", meta=tmp_path)
    expected = json.loads((golden / "dataset_semantics.json").read_text())
    actions = np.load(golden / "dataset_actions.npz")
    shipped = expected["meta_info"]["shipped_stat"]
    stat = ActionStat(np.array(shipped["state_01"]), np.array(shipped["state_99"]))
    checked = 0
    for split in ("train", "val"):
        source = ClipSource(store, split, ClipSettings(), stat=stat)
        for number, item in enumerate(expected[split]["items"]):
            if str(item["episode_id"]) not in source.index.ids:
                continue
            row = source.index.ids.index(str(item["episode_id"]))
            skip, draw = (item["draws"][k][1] for k in (1, 2))
            spacing = 0 if draw < 0.15 else 4 * skip
            ids = clip_ids(item["frame_now"], skip, int(source.index.lengths[row]) - 1, history_step=spacing)
            assert list(ids) == item["rgb_ids"] and [3 * i for i in ids] == item["state_ids"]
            latents, (own,) = store.latents(split, source.index.ids[row], ids), source.actions([row], np.array([ids]))
            assert hashlib.sha256(latents.numpy().tobytes()).hexdigest() == item["latent_sha256"]
            np.testing.assert_array_equal(own, actions[f"{split}_action"][number])
            close("F clips, actions (latents: by hash)", own, actions[f"{split}_action"][number], 1e-9)
            assert source.index.texts[row] == item["text"]
            checked += 1
    assert checked == 15


def test_every_start_frame_is_one_sample(store: EpisodeStore) -> None:
    source = ClipSource(store, "train", ClipSettings())
    assert source.starts.tolist() == [36, 1, 16] and len(source) == 53
    assert [source.locate(k) for k in (0, 35, 36, 37, 52)] == [(0, 0), (0, 35), (1, 0), (2, 0), (2, 15)]


def test_draws_follow_the_settings(store: EpisodeStore) -> None:
    rng = np.random.default_rng(0)
    plain = ClipSource(store, "train", ClipSettings())
    draws = [plain.draw_ids(rng) for _ in range(3000)]
    steps = [ids[7] - ids[6] for row, ids in draws if row == 0]
    assert {*steps} == {1, 2} and np.mean(steps) == pytest.approx(1.5, abs=0.05)
    late = [ids for row, ids in draws if row == 0 and ids[6] >= 8]
    assert np.mean([ids[5] == ids[6] for ids in late]) == pytest.approx(0.15, abs=0.03)
    assert all(min(ids) >= 0 and max(ids) < (40, 4, 20)[row] for row, ids in draws)
    share = np.bincount([row for row, _ in draws], minlength=3) / len(draws)
    assert share == pytest.approx([36 / 53, 1 / 53, 16 / 53], abs=0.03)


def test_rollout_like_draws(store: EpisodeStore) -> None:
    settings = ClipSettings(rollout_history_prob=1.0)
    source = ClipSource(store, "train", settings)
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(4000):
        row, ids = source.draw_ids(rng)
        now, start = ids[6], ids[0]
        assert (now - start) % 4 == 0
        assert ids[:6] == rollout_history_ids(now, start, HISTORY, 24, 4)
        assert ids[6:] == clip_ids(now, 1, (39, 3, 19)[row], num_history=0)
        if row == 0 and now == 32:
            starts.add(start)
    assert starts == set(range(0, 33, 4))
    with pytest.raises(PersistWorldError, match=r"sampling\.history has 6 entries, the model takes 4"):
        ClipSource(store, "train", settings, num_history=4)
    with pytest.raises(PersistWorldError, match="reaches beyond a new rollout's 8 entries"):
        ClipSource(store, "train", settings, sampling=SamplingSettings(history=(0, 0, -12, -9, -6, -3), buffer_fill=8))
