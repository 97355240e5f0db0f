"""Recordings that cannot be used are skipped, named with their reason, and the rest is done."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from data_broken import BROKEN, LENGTH, no_instruction
from data_raw import HEIGHT, WIDTH, encode, write_v21, write_v30

from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents
from persistworld_cli.extraction.report import ExtractReport, path_of

WORLD = WorldSettings(height=HEIGHT, width=WIDTH)
NUMBER = {name: number for number, name in enumerate(BROKEN, 1)}  # episode that is broken so; 0 is whole


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one episode of each kind."""
    root = write_v21(tmp_path_factory.mktemp("broken") / "raw", dict.fromkeys(range(len(BROKEN) + 2), LENGTH))
    for name, (spoil, _) in BROKEN.items():
        spoil(root, NUMBER[name])
    no_instruction(root, len(BROKEN) + 1)
    return root


@pytest.fixture(scope="module", params=[0, 2])
def extracted(request: pytest.FixtureRequest, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """All of them extracted, decoded here and by two other processes."""
    out = tmp_path_factory.mktemp("out")
    extract_latents(WORLD, raw, out, encode, workers=request.param)
    return out, request.param


def test_each_is_named_with_its_reason(raw: Path, extracted: tuple[Path, int]) -> None:
    out, _ = extracted
    reasons = {f["episode"]: f["reason"] for f in json.loads((out / "extract_report.json").read_text())["failed"]}
    assert set(reasons) == {str(number) for number in NUMBER.values()}
    for name, (_, expected) in BROKEN.items():
        reason = reasons[str(NUMBER[name])]
        assert re.search(expected, reason) and str(raw) in reason, (name, reason)


def test_the_others_are_done_and_nothing_is_left_behind(extracted: tuple[Path, int]) -> None:
    out, _ = extracted
    whole = ["0", str(len(BROKEN) + 1)]
    report = ExtractReport.read(path_of(out))
    assert report.done == whole and EpisodeStore(out).episodes("train") == whole
    assert report.without_instruction == [whole[1]] and EpisodeStore(out).annotation("train", whole[1]).text == ""
    assert not any((out / ".staging").iterdir())
    for folder in ("videos", "latent_videos", "annotation"):
        assert {path.stem for path in (out / folder / "train").iterdir()} == set(whole)


@pytest.mark.parametrize("name", BROKEN)
def test_strict_fails_at_once(raw: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(PersistWorldError, match=BROKEN[name][1]) as caught:
        extract_latents(WORLD, raw, tmp_path, encode, episodes={NUMBER[name]}, strict=True)
    assert caught.value.where and caught.value.fix
    assert not any((tmp_path / ".staging").glob("*"))


def test_an_episode_in_no_split(tmp_path: Path) -> None:
    raw = write_v21(tmp_path / "raw", dict.fromkeys(range(3), LENGTH), splits={"train": "0:1", "val": "2:3"})
    report = extract_latents(replace(WORLD, val_rule="info-splits"), raw, tmp_path / "out", encode)
    assert report.done == ["0", "2"]
    assert [f["episode"] for f in report.failed] == ["1"] and "in no split" in report.failed[0]["reason"]


def test_a_shared_video_that_is_cut_short_costs_the_episodes_behind(tmp_path: Path) -> None:
    raw = write_v30(tmp_path / "raw", [LENGTH] * 3)
    table = raw / "data/chunk-000/file-000.parquet"
    mp4 = raw / "videos/observation.images.wrist_left/chunk-000/file-000.mp4"
    table.rename(table.with_suffix(".away"))
    report = extract_latents(WORLD, raw, tmp_path / "a", encode)
    assert not report.done and all("table is missing" in f["reason"] for f in report.failed)
    table.with_suffix(".away").rename(table)
    from persistworld_cli.data.raw import video

    video.write_mp4(mp4, video.read_frames(mp4, range(2 * LENGTH - 2)), 15, crf=1)
    report = extract_latents(WORLD, raw, tmp_path / "b", encode)
    assert report.done == ["0"]
    assert [f["reason"].partition(" (")[0] for f in report.failed] == [
        "camera 'wrist_left' of episode 1 has 10 frames, the table 12 rows",
        "camera 'wrist_left' of episode 2 has 0 frames, the table 12 rows",
    ]
