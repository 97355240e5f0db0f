"""Decoding in other processes, several runs over one output, and runs that are killed."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.spawn
import subprocess
from pathlib import Path

import pytest
import torch
from data_raw import HEIGHT, WIDTH, encode, write_v21
from extract_process import start_extraction, tree

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import ExtractCallbacks, extract_latents

WORLD = WorldSettings(height=HEIGHT, width=WIDTH)
PATIENCE = 300.0  # seconds, for machines that do much else


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of different lengths."""
    return write_v21(tmp_path_factory.mktemp("raw"), {0: 20, 1: 61, 2: 7, 3: 33, 4: 50, 99: 12})


@pytest.fixture(scope="module")
def unbroken(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run gives that nothing disturbs, decoding in its own process."""
    out = tmp_path_factory.mktemp("unbroken")
    extract_latents(WORLD, raw, out, encode, batch_frames=5)
    return tree(out)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[list[str], list[str], list[dict[str, str]]]]:
    """Let them go on to their ends; what each has done, skipped and failed at."""
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    results = []
    for process in processes:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.mark.parametrize("workers", [1, 3])
def test_other_processes_give_the_same_bytes(
    raw: Path, unbroken: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    report = extract_latents(WORLD, raw, tmp_path, encode, batch_frames=5, workers=workers)
    assert report.done == ["0", "1", "2", "3", "4", "99"] and not report.failed
    assert tree(tmp_path) == unbroken
    assert not multiprocessing.active_children()
    assert 0 < report.waited_s <= report.wall_s and report.frames == 7 + 21 + 3 + 11 + 17 + 4


def test_batches_are_filled_across_episodes(raw: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def counting(frames: torch.Tensor) -> torch.Tensor:
        seen.append(len(frames))
        return encode(frames)

    extract_latents(WORLD, raw, tmp_path, counting, batch_frames=10)
    assert seen == [10] * 7  # 63 frames of six episodes


def test_a_decoding_process_that_dies_costs_its_episode_and_no_other(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", {0: 160, 1: 7, 2: 7}, fps=5)  # longer than what may wait for the encoder
    killed = []

    def kills_once(frames: torch.Tensor) -> torch.Tensor:
        if not killed:
            killed.extend(multiprocessing.active_children())
            killed[0].kill()
        return encode(frames)

    report = extract_latents(WORLD, raw, tmp_path / "out", kills_once, batch_frames=4, workers=1)
    assert report.done == ["1", "2"]
    assert [f["episode"] for f in report.failed] == ["0"] and "killed by SIGKILL" in report.failed[0]["reason"]
    assert not multiprocessing.active_children() and not any((tmp_path / "out/.staging").iterdir())
    assert extract_latents(WORLD, raw, tmp_path / "out", encode).done == ["0"]


def test_processes_that_keep_dying_are_one_error(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
    with pytest.raises(PersistWorldError, match="3 decoding processes died in a row") as caught:
        extract_latents(WORLD, raw, tmp_path, encode, workers=1)
    assert "--workers" in str(caught.value.fix)


def test_an_interrupt_leaves_nobody_behind(raw: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[int] = []
    callbacks = ExtractCallbacks(progress=lambda now: seen.append(now.episodes), stop=lambda: any(seen))
    with pytest.raises(KeyboardInterrupt):
        extract_latents(WORLD, raw, tmp_path, encode, batch_frames=5, workers=2, callbacks=callbacks)
    assert not multiprocessing.active_children() and not any((tmp_path / ".staging").iterdir())
    assert extract_latents(WORLD, raw, tmp_path, encode, batch_frames=5).skipped
    assert tree(tmp_path) == unbroken


def test_killed_at_any_batch_the_tree_is_that_of_an_unbroken_run(
    raw: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    for batches in (1, 4, 7):  # of 13, less what was finished before
        with start_extraction(raw, tmp_path, workers=2) as process:
            assert process.stdin and process.stdout
            for _ in range(batches):
                assert process.stdout.readline() == "batch\n"
                process.stdin.write("\n")
            process.kill()  # while it encodes, and writes what it has
        for name, data in tree(tmp_path).items():  # an annotation stands only where all of its episode does
            if name.startswith("annotation/") and not Path(name).name.startswith("."):
                note = json.loads(data)
                files = [v["video_path"] for v in note["videos"]]
                files += [v["latent_video_path"] for v in note["latent_videos"]]
                assert all((tmp_path / file).read_bytes() == unbroken[file] for file in files)
    finish(start_extraction(raw, tmp_path, workers=2))
    assert tree(tmp_path) == unbroken


def test_two_runs_over_one_output_share_the_work(raw: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    runs = [start_extraction(raw, tmp_path, workers=1) for _ in range(2)]
    assert [run.stdout and run.stdout.readline() for run in runs] == ["batch\n"] * 2  # each has begun an episode
    (first, skipped, _), (second, also_skipped, _) = finish(*runs)
    assert sorted(map(int, first + second)) == [0, 1, 2, 3, 4, 99]
    assert len(first + skipped) == len(second + also_skipped) == 6
    assert tree(tmp_path) == unbroken
