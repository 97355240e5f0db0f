"""What is damaged costs only itself: saved states, lines of the log, the index; and equal runs write equal files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_raw import HEIGHT, WIDTH, encode, write_v21

from persistworld_cli.checkpoints.adapters import write_adapter
from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.index import IndexFile
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.extraction.pipeline import extract_latents
from persistworld_cli.training.run import Run


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processed dataset with metadata; not to be written to."""
    root = tmp_path_factory.mktemp("indexed")
    write_v21(root / "raw", {0: 60, 1: 45, 99: 30})
    extract_latents(WorldSettings(height=HEIGHT, width=WIDTH), root / "raw", root / "out", encode)
    build_meta(root / "out")
    return root / "out"


def run_of(folder: Path, *steps: int) -> Path:
    """A run's folder with saved states and a line of log for each update."""
    with Run(folder, cpu=True) as work:
        for step in range(1, max(steps) + 1):
            work.log(step, {"loss": float(step)})
            if step in steps:
                work.save(step, {"tensor": torch.arange(5000) * step})
    return folder


def _zero(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    path.write_bytes(data)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "zeroed": _zero,
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
    "a directory": _directory,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_its_newest_whole_state(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = run_of(tmp_path, 1, 2) / "state"
    (state / "step-backup").mkdir()
    (state / "step-00000009").touch()
    DAMAGES[damage](state / "step-00000002" / "state.pt")
    with caplog.at_level(logging.WARNING), Run(tmp_path, cpu=True) as work:
        saved = work.load()
        assert saved is not None and saved["step"] == 1 and torch.equal(saved["tensor"], torch.arange(5000))
        assert [entry["step"] for entry in work.history()] == [1]
        work.save(2, {"tensor": torch.ones(1)})
    assert "step-00000002 is damaged" in caplog.text and "continues from step-00000001" in caplog.text
    names = ["damaged-step-00000002", "step-00000001", "step-00000002", "step-00000009", "step-backup"]
    assert sorted(path.name for path in state.iterdir()) == names
    with Run(tmp_path, cpu=True) as work:
        assert (work.load() or {})["step"] == 2


def test_a_run_without_a_whole_state_does_not_begin_anew_by_itself(tmp_path: Path) -> None:
    state = run_of(tmp_path / "run", 1) / "state" / "step-00000001"
    (state / "state.pt").write_bytes(b"")
    with pytest.raises(PersistWorldError, match="no saved state is intact") as told:
        Run(tmp_path / "run", cpu=True)
    assert "--no-resume" in str(told.value.fix) and len((tmp_path / "run" / "metrics.jsonl").read_text()) > 9
    for given in (state, tmp_path / "run"):
        with pytest.raises(PersistWorldError, match="saved state is"):
            Run(tmp_path / "other", cpu=True, resume_from=given)
    run_of(tmp_path / "longer", 1, 2)
    shutil.copy(state / "state.pt", tmp_path / "longer" / "state" / "step-00000002" / "state.pt")
    with Run(tmp_path / "other", cpu=True, resume_from=tmp_path / "longer") as work:
        assert (work.load() or {})["step"] == 1


def test_damaged_lines_of_the_log_cost_themselves_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = run_of(tmp_path, 5) / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    lines[1], lines[2], lines[3] = b'{"step": 2, "lo', b'\xff"step": 3}', b"4"
    log.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING), Run(tmp_path, cpu=True) as work:
        work.load()
        assert [entry["step"] for entry in work.history()] == [1, 5]
    assert "3 damaged lines are dropped (the first is line 2)" in caplog.text
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 5]


@pytest.mark.parametrize("name", ["states", "lengths", "motion", "ids"])
def test_a_zeroed_index_is_refused_and_made_again(
    name: str, indexed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = shutil.copytree(indexed, tmp_path / "data")
    path, stat = dataset / "meta" / "index.safetensors", dataset / "meta" / "stat.json"
    whole, numbers = path.read_bytes(), stat.read_bytes()
    file = IndexFile(path)
    begin, end = (file._begin + at for at in file._entries[name]["data_offsets"])
    path.write_bytes(whole[:begin] + bytes(end - begin) + whole[end:])
    with pytest.raises(PersistWorldError, match=f"the checksum of '{name}' differs") as told:
        IndexFile(path).check()
    assert "build-meta" in str(told.value.fix)
    if name != "motion":  # which training does not use
        with pytest.raises(PersistWorldError, match=r"the checksum of '.*' differs"):
            EpisodeStore(dataset).index("train")
    with caplog.at_level(logging.WARNING):
        report = build_meta(dataset)
    assert report.read == sum(1 for _ in (dataset / "annotation").glob("*/*.json"))
    assert "every annotation is read again" in caplog.text
    assert path.read_bytes() == whole and stat.read_bytes() == numbers


def test_an_index_from_before_checksums_is_read(indexed: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(indexed, tmp_path / "data")
    path = dataset / "meta" / "index.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"crc32"', b'"older"'))
    assert len(EpisodeStore(dataset).index("train").ids) and build_meta(dataset).read == 0


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    from peft import LoraConfig  # imports torchvision, which the package makes importable

    names = ["to_q", "to_k", "to_v", "to_out.0", "conv_in", "proj_in"]
    for folder, targets in (("one", names), ("two", names[::-1])):
        config = LoraConfig(r=2, target_modules=targets, bias="none")
        write_adapter(tmp_path / folder, config, {"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, {})
    one, two = (tmp_path / folder / "adapter_config.json" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert json.loads(one.read_text())["target_modules"] == sorted(names)
    assert LoraConfig.from_pretrained(str(one.parent)).target_modules == set(names)
