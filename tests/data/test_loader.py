"""The order of clips, mixtures of datasets, and worker processes: the same batches whoever reads them."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_data import episode_latents, latent_path, states, write_dataset
from processes import wait_for_end

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PretrainRequest
from persistworld_cli.config.settings import ClipSettings, PretrainSettings, Settings, WorldSettings
from persistworld_cli.data.clips.clips import ClipSource
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import ClipBatch, ClipMixture, open_clips, training_shares
from persistworld_cli.data.clips.order import Order
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.launch.launcher import run_task
from persistworld_cli.training import pretrain

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes are Linux's alone")
LENGTHS = ({0: 30, 1: 6, 2: 17}, {3: 25})


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets: float16 .npy, and Ctrl-World's float32 .pt."""
    folder = tmp_path_factory.mktemp("mixed")
    pairs = zip(("a", "b"), LENGTHS, (".npy", ".pt"), strict=True)
    return [write_dataset(folder / name, lengths, suffix) for name, lengths, suffix in pairs]


@pytest.fixture
def clips(roots: list[Path]) -> ClipMixture:
    return open_clips(mixed(roots))


def mixed(roots: list[Path], **clip_settings: object) -> Settings:
    datasets = {str(roots[0]): 3.0, str(roots[1]): 1.0}
    return Settings(
        world=WorldSettings(dataset=str(roots[0])),
        clips=ClipSettings(datasets=datasets, **clip_settings),  # type: ignore[arg-type]
    )


def same(one: ClipBatch, other: ClipBatch) -> bool:
    tensors = all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("latents", "actions", "ids"))
    return tensors and (one.texts, one.episodes, one.sources) == (other.texts, other.episodes, other.sources)


# -- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_every_sample_comes_once_an_epoch(size: int) -> None:
    order = Order([size], [1.0])
    epochs = [[order.place(7, e * size + i) for i in range(size)] for e in range(3)]
    assert all(sorted(p.sample for p in epoch) == list(range(size)) for epoch in epochs)
    assert [{p.epoch for p in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    if size > 3:
        assert epochs[0] != [order.place(8, i) for i in range(size)]
        assert [p.sample for p in epochs[0]] != [p.sample for p in epochs[1]]


def test_epochs_are_shuffled_evenly() -> None:
    """Each of ten samples comes to each of ten places about equally often over many seeds (mean 50, sd 7)."""
    order = Order([10], [1.0])
    counts = np.zeros((10, 10))
    for seed in range(500):
        for place in range(10):
            counts[place, order.place(seed, place).sample] += 1
    assert abs(counts - 50).max() < 35


def test_ten_million_samples_need_no_list() -> None:
    order = Order([9_876_543], [1.0])
    drawn = [order.place(0, 10**11 + i) for i in range(3000)]
    samples = np.array([p.sample for p in drawn])
    assert len(set(samples.tolist())) > 2990 and samples.min() >= 0 and samples.max() < 9_876_543
    assert np.bincount(samples * 10 // 9_876_543, minlength=10).min() > 230  # spread over the whole dataset


def test_shares_hold_in_every_stretch() -> None:
    weights = np.array([0.61, 0.3, 0.09])
    order = Order([1000, 50, 7], weights.tolist())
    seen = np.zeros(3)
    positions: list[list[int]] = [[], [], []]
    for number in range(3000):
        place = order.place(1, number)
        seen[place.source] += 1
        positions[place.source].append(place.epoch)
        assert abs(seen - weights * (number + 1)).max() < 2
    assert all(epochs == sorted(epochs) for epochs in positions)
    assert Counter(positions[2])[3] == 7  # a small dataset's epochs are its own


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_clips_of_a_mixture_are_those_of_their_datasets(clips: ClipMixture, roots: list[Path]) -> None:
    stat = EpisodeStore(roots[0]).stat()  # world.dataset's percentiles scale all actions
    batch = clips.batch(0, 0, 48)
    assert Counter(batch.sources) == {0: 36, 1: 12}
    for i, source in enumerate(batch.sources):
        episode = int(batch.episodes[i])
        length = LENGTHS[source][episode]
        assert batch.texts[i] == f"task {episode}"
        assert torch.equal(batch.latents[i], episode_latents(episode, length)[batch.ids[i]])
        np.testing.assert_array_equal(batch.actions[i], stat.normalise(states(episode, length)[batch.ids[i].numpy()]))


def test_batches_are_a_pure_function_of_their_arguments(clips: ClipMixture, roots: list[Path]) -> None:
    one = clips.batch(3, 7, 4)
    assert one.latents.dtype == one.actions.dtype == torch.float32
    assert one.latents.shape == (4, 11, 4, 9, 5) and one.actions.shape == (4, 11, 7) and one.ids.shape == (4, 11)
    clips.batch(3, 8, 4)
    assert same(one, open_clips(mixed(roots)).batch(3, 7, 4))
    halves = [clips.batch(3, 7, 2, rank=rank, world=2) for rank in (0, 1)]
    assert torch.equal(one.latents, torch.cat([half.latents for half in halves]))
    assert one.episodes == halves[0].episodes + halves[1].episodes
    for other in (clips.batch(4, 7, 4), clips.batch(3, 8, 4)):
        assert not torch.equal(one.ids, other.ids)
    assert clips.batch(-1, 0, 1).episodes  # any whole number is a seed


def test_both_kinds_of_latent_files_give_the_same_clips(tmp_path: Path) -> None:
    sources = [
        ClipSource(EpisodeStore(write_dataset(tmp_path / kind, {0: 20, 1: 9}, kind)), "train", ClipSettings())
        for kind in (".npy", ".pt")
    ]
    assert same(*(ClipMixture([source]).batch(0, 0, 24) for source in sources))


def test_mixtures_that_cannot_be_meant(roots: list[Path], tmp_path: Path) -> None:
    good = mixed(roots)
    assert training_shares(Settings(world=good.world)) == {str(roots[0]): 1.0}
    elsewhere = replace(good, world=WorldSettings(dataset=str(tmp_path)))
    with pytest.raises(UsageError, match=r"is not among clips\.datasets"):
        open_clips(elsewhere)
    with pytest.raises(UsageError, match="no dataset to train on"):
        open_clips(Settings())
    lone = mixed(roots)
    lone.clips.datasets[str(roots[0])] = 0.0  # still gives the percentiles
    assert set(open_clips(lone).batch(0, 0, 8).episodes) == {"3"}
    write_dataset(tmp_path / "odd", {0: 12})
    for camera in range(3):
        np.save(latent_path(tmp_path / "odd", 0, camera), np.zeros((12, 4, 8, 5), np.float16))
    lone.clips.datasets[str(tmp_path / "odd")] = 1.0
    with pytest.raises(PersistWorldError, match=r"cannot be mixed: .* \(4, 9, 5\) .* \(4, 24, 5\) here"):
        open_clips(lone)


def test_a_mixture_is_written_as_a_table(tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    text = 'extends = "tiny"\n[world]\ndataset = "a"\n[clips]\nworkers = 3\n[clips.datasets]\n"a" = 0.8\n"b/c" = 0.2\n'
    preset.write_text(text)
    clip_settings = load_settings(str(preset), env={}).clips
    assert clip_settings.datasets == {"a": 0.8, "b/c": 0.2} and clip_settings.workers == 3
    for wrong, message in (
        ('"a" = -1', "clips.datasets.a = -1.0 must be at least 0"),
        ('"a" = 0.0', "all weights are 0"),
    ):
        preset.write_text(f'extends = "tiny"\n[clips.datasets]\n{wrong}\n')
        with pytest.raises(UsageError, match=message):
            load_settings(str(preset), env={})


# -- worker processes ----------------------------------------------------------------------------------------------


@linux
@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (3, 2)])
def test_workers_read_what_one_process_would(clips: ClipMixture, workers: int, ahead: int) -> None:
    with ClipLoader(clips, 2, workers=workers, ahead=ahead) as loader:
        for step, batch in enumerate(islice(loader.batches(5, 7, rank=1, world=2), 9), 7):
            assert same(batch, clips.batch(5, step, 2, rank=1, world=2))
    assert not multiprocessing.active_children()


def test_memory_of_batches_is_used_again_but_never_while_held(clips: ClipMixture) -> None:
    held = clips.batch(0, 0, 2)
    part, copy, place = held.latents[1], held.latents.clone(), held.latents.data_ptr()
    del held
    assert clips.batch(0, 1, 2).latents.data_ptr() != place
    assert torch.equal(part, copy[1])  # a view holds it too
    del part
    assert place in [batch.latents.data_ptr() for batch in [clips.batch(0, step, 2) for step in (2, 3)]]


def test_without_workers_batches_are_read_when_asked_for(clips: ClipMixture) -> None:
    with ClipLoader(clips, 3, workers=0) as loader:
        for step, batch in enumerate(islice(loader.batches(5, 2), 3), 2):
            assert same(batch, clips.batch(5, step, 3))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 40)


def shorten(path: Path) -> None:
    np.save(path, np.load(path)[:3])


def scribble(path: Path) -> None:
    path.write_bytes(b"\x93NUMPY\x01\x00" + b"?" * 300)


@linux
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cut"),
        (shorten, r"frame \d+ is not in a file with 3 latents: it is shorter than the index says"),
        (scribble, "unreadable latents"),
        (Path.unlink, "camera 1 is missing"),
    ],
)
def test_a_workers_error_is_the_readers_own(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    root = write_dataset(tmp_path, {0: 40, 1: 8})
    clips = ClipMixture([ClipSource(EpisodeStore(root), "train", ClipSettings(zero_history_prob=0.0))])
    first = next(step for step in range(500) if clips.batch(0, step, 1).episodes == ["1"])
    harm(latent_path(root, 1, 1))
    errors: list[PersistWorldError] = []
    for workers in (0, 2):
        with ClipLoader(clips, 1, workers=workers) as loader:
            batches = loader.batches(0, 0)
            assert [next(batches).episodes for _ in range(first)] == [["0"]] * first
            with pytest.raises(PersistWorldError, match=message) as caught:
                next(batches)
            errors.append(caught.value)
    ours, theirs = errors
    assert (ours.what, ours.where, ours.fix) == (theirs.what, theirs.where, theirs.fix)
    assert str(tmp_path) in str(ours.where) and ours.fix


@linux
@pytest.mark.parametrize("read", [1, 4])
def test_a_killed_worker_is_an_error_not_a_hang(clips: ClipMixture, read: int) -> None:
    with ClipLoader(clips, 2, workers=2) as loader:
        batches = loader.batches(0, 0)
        for _ in range(read):
            next(batches)
        children = multiprocessing.active_children()
        os.kill(children[0].pid or 0, signal.SIGKILL)
        with pytest.raises(PersistWorldError, match="a process that reads clips was killed by SIGKILL"):
            for _ in range(50):
                next(batches)
    assert not multiprocessing.active_children()


@linux
def test_signals_to_the_whole_group_leave_the_workers_reading(clips: ClipMixture) -> None:
    """Schedulers signal every process; the training process is the one to save and to end the others."""
    with ClipLoader(clips, 2, workers=1) as loader:
        batches = loader.batches(0, 0)
        next(batches)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(multiprocessing.active_children()[0].pid or 0, number)
        assert all(same(batch, clips.batch(0, step, 2)) for step, batch in enumerate(islice(batches, 8), 1))


@linux
def test_workers_end_with_a_killed_training_process(roots: list[Path]) -> None:
    script = (
        "import multiprocessing, sys\n"
        "from persistworld_cli.config.settings import ClipSettings\n"
        "from persistworld_cli.data.clips.clips import ClipSource\n"
        "from persistworld_cli.data.clips.loader import ClipLoader\n"
        "from persistworld_cli.data.clips.mixture import ClipMixture\n"
        "from persistworld_cli.data.clips.store import EpisodeStore\n"
        "clips = ClipMixture([ClipSource(EpisodeStore(sys.argv[1]), 'train', ClipSettings())])\n"
        "loader = ClipLoader(clips, 2, workers=2)\n"
        "next(loader.batches(0, 0))\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command, pipe = [sys.executable, "-c", script, str(roots[0])], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(children) == 2
    for pid in children:
        wait_for_end(pid)


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    options = PretrainSettings(updates=2, batch=2, validate_every=0, log_every=1, save_every=100)
    return replace(small_world, pretrain=options)


@linux
def test_training_on_a_mixture_is_the_same_with_workers(world: Settings, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(world.world.dataset)
    datasets = {world.world.dataset: 0.5, str(tmp_path / "linked"): 0.5}
    logs = []
    for workers in (0, 2):
        settings = replace(world, clips=ClipSettings(datasets=datasets, workers=workers))
        pretrain.run(settings, PretrainRequest(output=tmp_path / str(workers)))
        logs.append((tmp_path / str(workers) / "metrics.jsonl").read_text())
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 2


@linux
def test_a_damaged_file_ends_training_with_its_name(
    world: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "world"
    shutil.copytree(world.world.dataset, damaged)
    for path in (damaged / "latent_videos" / "train").glob("[12]/1.npy"):
        os.truncate(path, 500)
    settings = replace(world, world=replace(world.world, dataset=str(damaged)), clips=ClipSettings(workers=2))
    assert run_task(settings, PretrainRequest(output=tmp_path / "run"))[0] == 1
    message = capfd.readouterr().err
    assert "cut off" in message and "1.npy" in message and "extract-latents" in message
    assert "Traceback" not in message
