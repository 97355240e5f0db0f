"""Atomic writes, one error for a full disk, modes by the umask. A file's size limit stands in for the disk."""

from __future__ import annotations

import os
import re
import resource
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import drive_world
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from persistworld_cli.checkpoints.saving import save_safetensors, save_torch
from persistworld_cli.data.raw.lerobot_writer import NewEpisode, write_lerobot
from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.files import (
    CannotWrite,
    hash_of,
    jsonable,
    remove,
    sweep,
    whole_file,
    whole_folder,
    write_json,
    write_text,
    writing,
)
from persistworld_cli.interact.web import SAVES, _Host
from persistworld_cli.reports.curves import save_figure
from persistworld_cli.reports.tables import write_csv
from persistworld_cli.reports.videos import SheetBlock, contact_sheet
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.finished import save_rollout
from persistworld_cli.rollout.recording import Item
from persistworld_cli.training.run import Run

NOISE = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3)).astype(np.uint8)


@contextmanager
def full_disk(room: int = 100) -> Iterator[None]:
    """No file may grow beyond some bytes: writing fails as on a full disk, with EFBIG for ENOSPC, natively too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _lerobot(path: Path) -> None:
    episode = NewEpisode(task="t", columns={"action": np.zeros((6, 7))}, images={"c": NOISE})
    with whole_folder(path) as partial:
        write_lerobot(partial, [episode], 5, "Franka")


def _save_state(path: Path) -> None:
    here = SimpleNamespace(main=True, output=path.parent.parent, keep=9, states=list, notes={})
    Run.save(here, int(path.name.removeprefix("step-")), {"t": torch.ones(999)})  # type: ignore[arg-type]


WRITERS: dict[str, Callable[[Path], None]] = {
    "note.txt": lambda path: write_text(path, "x" * 999),
    "note.json": lambda path: write_json(path, list(range(999))),
    "rows.csv": lambda path: write_csv(path, [{"a": "x" * 999}]),
    "model.safetensors": lambda path: save_safetensors(path, {"t": torch.ones(999)}),
    "model.pt": lambda path: save_torch(path, {"t": torch.ones(999)}),
    "film.mp4": lambda path: write_mp4(path, NOISE, 5),
    "sheet.png": lambda path: contact_sheet(path, "t", ["a"], [SheetBlock("b", [("c", NOISE[:1], ())])]),
    "curves.png": lambda path: save_figure(Figure(), path),
    "7_0_0.npz": lambda path: save_rollout(
        path.parent, ScoredRollout(Item("7", 0, 0), np.ones(99, bool), {}, None, 1.0)
    ),
    "state/step-00000007": _save_state,
    "lerobot": _lerobot,
}


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_error_and_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for _ in range(2):  # with nothing there, and with an older one
        before = {file: (tmp_path / file).read_bytes() for file in everything(tmp_path)}
        with full_disk(), pytest.raises(CannotWrite, match="cannot be written: File too large") as told:
            WRITERS[name](path)
        assert str(told.value.where).startswith(str(path)) and "free some disk" in str(told.value.fix)
        assert {file: (tmp_path / file).read_bytes() for file in everything(tmp_path)} == before
        WRITERS[name](path)
        assert path.exists() and not [file for file in everything(tmp_path) if ".partial" in file or "/." in file]


@pytest.mark.parametrize("name", WRITERS)
def test_others_read_what_the_umask_lets_them(name: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    files = [tmp_path / file for file in everything(tmp_path)]
    assert files and all(stat.S_IMODE(file.stat().st_mode) == 0o640 for file in files)
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o750 for folder in folders)


def test_missing_permissions_are_the_same_error_with_another_fix(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="Permission denied") as told, writing(tmp_path / "x"):
        raise PermissionError(13, "Permission denied")
    assert "permissions" in str(told.value.fix)
    (tmp_path / "file").touch()
    with pytest.raises(CannotWrite, match="File exists") as other:
        write_text(tmp_path / "file" / "below.txt", "")
    assert "at this path" in str(other.value.fix)


def test_whatever_ends_the_block_the_old_one_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), whole_file(tmp_path / "a.txt") as partial:
            assert partial.suffix == ".txt"
            partial.write_text("new")
            raise error
        with pytest.raises(error), whole_folder(tmp_path / "b") as partial:
            raise error
    assert everything(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    for name in (".a.12.partial.json", ".b.12.old", ".c.12.old", ".mine", "c", "d.json"):
        (tmp_path / name).mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "b", "c", "d.json"]  # b: between two renames
    sweep(tmp_path / "absent")
    remove(tmp_path / "absent")


def test_json_is_plain_and_hashes_stay(tmp_path: Path) -> None:
    given = {"set": {"b", "a"}, "nan": [float("nan"), np.float64("inf")], 3: np.arange(2), "path": Path("/x")}
    assert jsonable(given) == {"set": ["a", "b"], "nan": [None, None], "3": [0, 1], "path": "/x"}
    assert hash_of({"b": (1, 2.5), "a": np.float32(1), "c": Path("/x"), "d": None}) == "f99c7ebe7bc5"


def test_driving_goes_on_where_the_page_cannot_save(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    session = drive_world.session(drive_world.arm_world(tmp_path / "world"))
    told: list[str | bytes] = []
    output = tmp_path / "out"
    host = _Host(session, lambda message: told.append(message) is None, output)
    host.do({"do": "key", "key": "l"})
    for kind in SAVES:
        told.clear()
        with full_disk():
            host.do({"do": "save", "kind": kind})
        assert re.search(r'"type": "error", "text": "cannot be written: File too large"', str(told[0]))
    assert everything(output) == []
    host.do({"do": "key", "key": "r"})
    assert session.head.depth == 2
    host.do({"do": "save", "kind": "lerobot"})
    with zipfile.ZipFile(output / "drive-lerobot.zip") as packed:
        assert "drive-lerobot/meta/info.json" in packed.namelist()
