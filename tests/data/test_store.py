from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_data import camera_latents, episode_latents, latent_path, write_dataset
from data_raw import HEIGHT, WIDTH, encode, write_v21

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, store_of
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents
from persistworld_cli.files import natural_key


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EpisodeStore:
    root = tmp_path_factory.mktemp("store")
    write_v21(root / "raw", {0: 20, 2: 14, 10: 31, 99: 22})
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), root / "raw", root / "out", encode)
    build_meta(root / "out")
    return EpisodeStore(root / "out")


def test_natural_order() -> None:
    assert sorted(["10", "9", "0011", "b2", "a10", "a9", "2"], key=natural_key) == [
        "2",
        "9",
        "10",
        "0011",
        "a9",
        "a10",
        "b2",
    ]


def test_episodes_and_index(store: EpisodeStore) -> None:
    assert store.splits == ["train", "val"]
    assert store.episodes("train") == ["0", "2", "10"] and store.episodes("test") == []
    index = store.index("train")
    assert index.ids == ("0", "2", "10") and index.lengths.tolist() == [7, 5, 11]
    assert index.offsets.tolist() == [0, 7, 12, 23]
    for row, episode in enumerate(index.ids):
        states = index.states[index.offsets[row] : index.offsets[row + 1]].astype(np.float64)
        np.testing.assert_array_equal(states, store.annotation("train", episode).states)
    assert store.index("val").ids == ("99",)


def test_frames_and_latents_of_any_ids(store: EpisodeStore) -> None:
    whole = store.latents("train", "10", range(11))
    ids = [10, 0, 0, 3]
    assert torch.equal(store.latents("train", "10", ids), whole[ids])
    frames = store.frames("train", "10", ids)
    assert frames.shape == (4, 3, HEIGHT, WIDTH, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames[1], frames[2]) and not np.array_equal(frames[0], frames[3])
    with pytest.raises(PersistWorldError, match=r"frame 11 is not in a file with 11 latents: it is shorter"):
        store.latents("train", "10", [0, 11])


def test_a_dataset_of_another_rate_or_of_other_cameras_is_refused(store: EpisodeStore) -> None:
    world = WorldSettings(height=HEIGHT, width=WIDTH)
    assert store_of(world, str(store.root)).root == store.root
    for other, words, fix in (
        (replace(world, rate_hz=30.0), "world.rate_hz = 5.0, the settings have 30.0", "set world.rate_hz = 5.0"),
        (replace(world, cameras=("top", *world.cameras[1:])), "the settings have ['top', ", 'world.cameras = ["ext'),
    ):
        with pytest.raises(PersistWorldError) as wrong:
            store_of(other, str(store.root))
        assert words in wrong.value.what and fix in str(wrong.value.fix)


def test_mistakes_are_named(store: EpisodeStore, tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="extract-latents"):
        try:
            EpisodeStore(tmp_path)
        except PersistWorldError as error:
            raise PersistWorldError(str(error)) from error
    with pytest.raises(PersistWorldError, match="no episode '7' in split 'train'") as caught:
        store.annotation("train", "7")
    assert "0, 2, 10" in str(caught.value)
    assert store.instead_of("val", ["2", "10"]) == "take --split train"
    with pytest.raises(PersistWorldError, match="split 'test' has no episodes"):
        store.index("test")
    bare = EpisodeStore(store.root, meta=tmp_path / "none")
    for call in (bare.stat, lambda: bare.index("train")):
        with pytest.raises(PersistWorldError) as caught:
            call()
        assert "build-meta" in str(caught.value)


def test_damage_is_named(store: EpisodeStore, tmp_path: Path) -> None:
    note = store.root / "annotation/train/2.json"
    broken = tmp_path / "d"
    for folder in ("annotation", "videos", "latent_videos"):
        (broken / folder / "train").mkdir(parents=True)
    (broken / "annotation/train/2.json").write_text(note.read_text()[:100])
    (broken / "annotation/train/3.json").write_text(json.dumps({"states": [], "texts": []}))
    (broken / "videos/train/2").mkdir()
    for camera in (0, 2):
        (broken / f"videos/train/2/{camera}.mp4").touch()
    other = EpisodeStore(broken)
    with pytest.raises(PersistWorldError, match="unreadable annotation"):
        other.annotation("train", "2")
    with pytest.raises(PersistWorldError, match="states are empty"):
        other.annotation("train", "3")
    with pytest.raises(PersistWorldError, match="camera 1 is missing"):
        other.frames("train", "2", [0])
    with pytest.raises(PersistWorldError, match="episode has no videos"):
        other.frames("train", "4", [0])
    (broken / "videos/train/2/1.mp4").touch()
    with pytest.raises(PersistWorldError, match="latents of camera 0 are missing"):
        other.latents("train", "2", [0])
    (broken / "latent_videos/train/2").mkdir()
    for camera in range(3):
        (broken / f"latent_videos/train/2/{camera}.pt").write_bytes(b"no tensor")
    with pytest.raises(PersistWorldError, match="unreadable latents"):
        other.latents("train", "2", [0])


def test_normalisation_is_float64_then_clipped(tmp_path: Path) -> None:
    stat = ActionStat(np.array([0.0, -1.0]), np.array([2.0, -1.0]))
    out = stat.normalise([[1.0, -1.0], [5.0, 0.0], [-1.0, -2.0]])
    assert out.dtype == np.float32
    expected = np.array([[-5e-9, -1], [1, 1], [-1, -1]])  # the 1e-8 of the formula shows only in float64
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    (tmp_path / "stat.json").write_text('{"state_01": [0]}')
    with pytest.raises(PersistWorldError, match="unreadable percentiles"):
        ActionStat.load(tmp_path / "stat.json")


def test_real_processed_datasets_are_read(shared_data: Path) -> None:
    store = EpisodeStore(shared_data / "droid_subset")
    assert store.episodes("train") == ["0", "1", "5", "6"] and store.episodes("val") == ["199", "1799"]
    assert store.latents("val", "199", [32, 0]).shape == (2, 4, 72, 40)
    assert store.frames("val", "199", [32]).shape == (1, 3, 192, 320, 3)
    new = EpisodeStore(shared_data / "droid_new_setup")  # texts, states, joints and videos only
    note = new.annotation("val", "0011")
    assert note.text == "close the laptop" and note.states.shape == (57, 7)
    assert note.joints is not None and note.joints.shape == (57, 8)
    assert new.frames("val", "0011", [0, 56]).shape[:2] == (2, 3)
    with pytest.raises(PersistWorldError, match="latents of camera 0"):
        new.latents("val", "0011", [0])


# -- latent files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_only_the_frames_asked_for_are_read(tmp_path: Path, suffix: str) -> None:
    """By the kernel's own count of this thread's reads (Linux): the frames' bytes, once the headers are known."""
    counter = Path("/proc/thread-self/io")
    if not counter.exists():
        pytest.skip("no /proc/thread-self/io: not Linux, or a kernel without I/O accounting")

    def bytes_read() -> int:
        return int(counter.read_text().split()[1])

    root = write_dataset(tmp_path, {0: 60}, suffix)
    store, ids = EpisodeStore(root), [0, 0, 4, 8, 8, 30, 31, 32, 33, 34, 59]
    assert torch.equal(store.latents("train", "0", ids), episode_latents(0, 60)[ids])
    own = -bytes_read() + bytes_read()  # what looking at the counter costs
    before = bytes_read()
    store.latents("train", "0", ids)
    frame = 4 * 3 * 5 * (2 if suffix == ".npy" else 4)
    assert bytes_read() - before - own <= len(ids) * 3 * frame + 16


def test_no_latent_file_stays_open(tmp_path: Path) -> None:
    handles = Path("/proc/self/fd")
    if not handles.exists():
        pytest.skip("no /proc/self/fd: not Linux")
    store = EpisodeStore(write_dataset(tmp_path, dict.fromkeys(range(40), 5)))
    store.latents("train", "0", [0])
    before = len(list(handles.iterdir()))
    for episode in range(40):
        store.latents("train", str(episode), [0, 4])
    assert len(list(handles.iterdir())) == before


def test_a_replaced_latent_file_is_noticed(tmp_path: Path) -> None:
    store = EpisodeStore(write_dataset(tmp_path, {0: 10}))
    assert torch.equal(store.latents("train", "0", [9]), episode_latents(0, 10)[[9]])
    for camera in range(3):
        new = camera_latents(1, camera, 12)
        latent_path(tmp_path, 0, camera).unlink()
        torch.save(torch.from_numpy(new), latent_path(tmp_path, 0, camera, ".pt"))
    assert torch.equal(store.latents("train", "0", [11]), episode_latents(1, 12)[[11]])


def test_tensors_saved_as_parts_of_others(tmp_path: Path) -> None:
    """A slice keeps its whole storage in the file: the frames begin further in."""
    store = EpisodeStore(write_dataset(tmp_path, {0: 10}, ".pt"))
    for camera in range(3):
        whole = torch.from_numpy(camera_latents(0, camera, 30))
        torch.save(whole[20:], latent_path(tmp_path, 0, camera, ".pt"))
    assert torch.equal(store.latents("train", "0", range(10)), episode_latents(0, 30)[20:])


class Evil:
    """What a pickle can do when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, ("raise SystemExit('the file ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(10, 4, 3, 5, dtype=torch.float64), r"(?s)latents are neither float16 nor float32.*: float64"),
        (torch.zeros(10, 4, 15), r"(?s)not of shape \(T, C, h, w\).*: \(10, 4, 15\)"),
        (torch.zeros(4, 10, 3, 5).transpose(0, 1), "row-major"),
        ({"latent": torch.zeros(10, 4, 3, 5)}, "single tensor"),
        (Evil(), "unreadable latents"),
        (torch.zeros(10, 4, 3, 6), r"latents of a frame have shape \(4, 9, 5\), unlike those of another camera"),
    ],
)
def test_latents_that_cannot_be_used(tmp_path: Path, content: object, message: str) -> None:
    store = EpisodeStore(write_dataset(tmp_path, {0: 10}, ".pt"))
    torch.save(content, latent_path(tmp_path, 0, 1, ".pt"))
    with pytest.raises(PersistWorldError, match=message) as caught:
        store.latents("train", "0", [0])
    assert caught.value.fix and "latent_videos/train/0" in str(caught.value.where)


def test_torchs_old_format_is_named(tmp_path: Path) -> None:
    store = EpisodeStore(write_dataset(tmp_path, {0: 10}, ".pt"))
    path = latent_path(tmp_path, 0, 1, ".pt")
    torch.save(torch.zeros(10, 4, 3, 5), path, _use_new_zipfile_serialization=False)
    with pytest.raises(PersistWorldError, match=r"before version 1\.6"):
        store.latents("train", "0", [0])


def test_numbers_that_cannot_be_read_in_place(tmp_path: Path) -> None:
    store = EpisodeStore(write_dataset(tmp_path, {0: 10}))
    np.save(latent_path(tmp_path, 0, 1), np.zeros((10, 4, 3, 5), ">f4"))
    with pytest.raises(PersistWorldError, match="little-endian"):
        store.latents("train", "0", [0])
    path = latent_path(tmp_path, 0, 1, ".pt")
    latent_path(tmp_path, 0, 1).unlink()
    torch.save(torch.zeros(10, 4, 3, 5), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(PersistWorldError, match="compressed"):
        store.latents("train", "0", [0])
