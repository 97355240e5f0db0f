"""A folder belongs to one run: who may work in it, who must not, and how a lock is freed; with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import eval_world
import pytest
from drive_world import arm_world, drive_command
from processes import free_port

from persistworld_cli.config.presets import to_json
from persistworld_cli.config.settings import LaunchSettings, PretrainSettings, Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.launch.run_lock import RunFolder, own_folder

ALONE = LaunchSettings()
FIRST = LaunchSettings(num_machines=2, num_processes=2, main_process_ip="10.0.0.1", main_process_port=29500)
SECOND = replace(FIRST, machine_rank=1)
# Holds a folder, as a launcher does while its child works; the child, which only waits, holds the lock too.
HOLD = """
import subprocess, sys
from pathlib import Path
from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.launch.run_lock import own_folder
with own_folder(Path(sys.argv[1]), "pretrain", LaunchSettings(), command=["persistworld", "pretrain"]) as folder:
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, pass_fds=[folder.fd])
    print(child.pid, flush=True)
    sys.stdin.read()
    child.kill()
    child.wait()
"""
LAUNCH = """
import json, sys
from pathlib import Path
from persistworld_cli.config.presets import from_json
from persistworld_cli.console import show_error
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.config.requests import request_from_json
from persistworld_cli.launch.launcher import run_task
from persistworld_cli.worker import TASKS
settings = from_json(json.loads(Path(sys.argv[1]).read_text()))
request = {"output": sys.argv[3], "command": ["persistworld", sys.argv[1]]}
kind = next(kind for kind in TASKS if kind.task == sys.argv[2])
try:
    sys.exit(run_task(settings, request_from_json(kind, request, ""))[0])
except PersistWorldError as error:
    show_error(error)
    sys.exit(1)
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def holding(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds a folder, and its child; both are gone afterwards."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def launch(task: str, settings: Settings, output: Path, name: str) -> subprocess.Popen[str]:
    """The launcher in a process, its settings in a file of that name beside the folder."""
    file = output.parent / name
    file.write_text(json.dumps(to_json(settings)))
    command = [sys.executable, "-c", LAUNCH, str(file), task, str(output)]
    return subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)


def refused(folder: Path, launch: LaunchSettings = ALONE, task: str = "eval", take_over: bool = False) -> str:
    """What a run is told that cannot have a folder."""
    with pytest.raises(PersistWorldError) as error, own_folder(folder, task, launch, take_over=take_over):
        raise AssertionError("it had the folder")
    return str(error.value)


def had(folder: Path, launch: LaunchSettings = ALONE, task: str = "eval", take_over: bool = False) -> RunFolder:
    """What a run has of a folder that is free for it."""
    with own_folder(folder, task, launch, take_over=take_over) as own:
        return own


def leave_lock(folder: Path, name: str = "run.lock", **entries: object) -> None:
    """The lock of a run that was killed."""
    (folder / name).unlink(missing_ok=True)
    with own_folder(folder, "eval", ALONE):
        lock = json.loads((folder / "run.lock").read_text())
    (folder / name).write_text(json.dumps(lock | entries))


def test_two_drives_at_once_one_drives_and_the_other_says_who_does(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    root.mkdir()
    arm_world(root)
    commands = {keys: drive_command(root, "--keys", keys, "-o", str(out))[0] for keys in ("l", "rr")}
    pipe = subprocess.PIPE
    with own_folder(root, "pretrain", ALONE):  # a run that goes on where the weights lie: readers are never refused
        both = {
            keys: subprocess.Popen(words, env=ENV, stdout=pipe, stderr=pipe, text=True)
            for keys, words in commands.items()
        }
        told = {keys: process.communicate()[1] for keys, process in both.items()}
    codes = {keys: process.returncode for keys, process in both.items()}
    assert sorted(codes.values()) == [0, 1], told
    winner, loser = sorted(codes, key=codes.__getitem__)
    assert "another run works in this folder: persistworld drive" in told[loser]
    assert f"--keys {winner} " in told[loser] and "Traceback" not in told[loser]
    assert json.loads((out / "config.json").read_text())["request"]["keys"] == winner
    drive = json.loads((out / "drive.json").read_text())
    assert drive["keys"] == winner
    left = {path.name for path in out.iterdir()}
    assert "result.json" in left and not left & {"run.lock", "failure.json"}
    assert not [name for name in left if name.startswith(".")]


def test_two_trainings_at_once_each_update_is_done_once_and_the_refused_one_leaves_nothing(tmp_path: Path) -> None:
    eval_world.build(tmp_path)
    options = PretrainSettings(updates=2, batch=2, log_every=1, validate_every=0, lr=1e-3)
    world, out = replace(eval_world.settings(tmp_path), pretrain=options), tmp_path / "out"
    world = replace(world, launch=replace(world.launch, trackers=("none",)), clips=replace(world.clips, workers=0))
    other = replace(world, pretrain=replace(options, lr=2e-3))
    both = [launch("pretrain", settings, out, f"{i}.json") for i, settings in enumerate((world, other))]
    told = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], told
    winner = 0 if both[0].returncode == 0 else 1
    assert "another run works in this folder" in told[1 - winner] and f"{winner}.json" in told[1 - winner]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rate = (1e-3, 2e-3)[winner]
    assert [(line["step"], line["lr"]) for line in lines] == [(1, rate), (2, rate)]
    assert json.loads((out / "config.json").read_text())["settings"]["pretrain"]["lr"] == rate
    assert not (out / "failure.json").exists() and (out / "result.json").exists()


def test_a_folder_that_is_held_is_refused_whoever_asks_and_free_when_its_run_ends(tmp_path: Path) -> None:
    with holding(tmp_path) as (process, _):
        for asked in (refused(tmp_path), refused(tmp_path, task="extract-latents"), refused(tmp_path, take_over=True)):
            assert f"another run works in this folder: persistworld pretrain (process {process.pid} on " in asked
            assert "use another --output" in asked
        assert "another run works" in refused(tmp_path, SECOND)  # a machine of another run
        process.communicate("")
        assert process.returncode == 0
    assert had(tmp_path).first and list(tmp_path.iterdir()) == []


def test_a_run_that_has_just_taken_the_lock_is_waited_for_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from persistworld_cli.launch import run_lock

    with holding(tmp_path):
        lock = tmp_path / "run.lock"
        text = lock.read_text()
        lock.write_text("")  # taken, but it does not say yet by whom
        threading.Timer(0.5, lock.write_text, (text,)).start()
        assert "another run works in this folder: persistworld pretrain" in refused(tmp_path)
        lock.write_text("")
        monkeypatch.setattr(run_lock, "_SECONDS_TO_NAME", 0.0)
        assert "another run is starting in this folder" in refused(tmp_path)
        lock.write_text(text)


def test_a_killed_launcher_frees_the_folder_when_its_workers_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from persistworld_cli.launch import run_lock

    with holding(tmp_path) as (process, child):
        stale = next(tmp_path.glob(".run-node0-*"))
        process.kill()  # SIGKILL: the lock file stays, and its worker still works
        process.wait()
        monkeypatch.setattr(run_lock, "_SECONDS_TO_END", 0.0)
        assert "whose launcher was killed still work in the folder" in refused(tmp_path)
        monkeypatch.setattr(run_lock, "_SECONDS_TO_END", 60.0)
        monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.kill(child, signal.SIGKILL))
        assert had(tmp_path).first
    assert "waiting for the workers of a run whose launcher was killed" in capsys.readouterr().err
    assert not stale.exists() and list(tmp_path.iterdir()) == []


def test_a_dead_holder_of_this_host_frees_the_folder_one_of_another_needs_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from persistworld_cli.launch import run_lock

    leave_lock(tmp_path, born=1.0)  # the process id is another program's by now
    assert had(tmp_path).first and "a run was killed here" in capsys.readouterr().err
    leave_lock(tmp_path, host="gpu7")
    asked = refused(tmp_path)
    assert "belongs to a run on another host" in asked and "--take-over" in asked and "gpu7" in asked
    assert had(tmp_path, take_over=True).first and "taken over from another host" in capsys.readouterr().err
    for cut in ("", '{"run": "2026', "[]", '{"run": 3}'):
        (tmp_path / "run.lock").write_text(cut)  # of a launcher that was killed before it had written it
        assert had(tmp_path).first
    monkeypatch.setattr(run_lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(38, "not here")))
    leave_lock(tmp_path)  # no locks in this file system: the living process that the file names is this one
    assert "another run works in this folder" in refused(tmp_path)
    leave_lock(tmp_path, born=1.0)
    assert had(tmp_path).first


def test_a_run_whose_folder_was_taken_over_says_so(tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="taken over meanwhile"), own_folder(tmp_path, "eval", ALONE):
        lock = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").unlink()  # by hand, since the other host was thought to be gone
        (tmp_path / "run.lock").write_text(json.dumps(lock | {"run": "another"}))
    assert (tmp_path / "run.lock").exists()  # it is the other run's


def test_other_machines_join_their_run_and_no_other(tmp_path: Path) -> None:
    assert not had(tmp_path, SECOND).first  # before machine 0 has come
    with own_folder(tmp_path, "eval", FIRST) as first, own_folder(tmp_path, "eval", SECOND) as second:
        assert first.private != second.private and first.private.is_dir() and second.private.is_dir()
        assert "another run works" in refused(tmp_path, FIRST) and "another run works" in refused(tmp_path, SECOND)
        assert "another run works" in refused(tmp_path, replace(SECOND, main_process_port=29501, machine_rank=1))
        assert "another run works" in refused(tmp_path, SECOND, task="pretrain")
    leave_lock(tmp_path, host="gpu7")  # machine 0 will take it over, or be refused itself
    assert "another run works" in refused(tmp_path, SECOND) and not had(tmp_path, SECOND, take_over=True).first


def test_extractions_share_the_folder_of_their_reports_and_nobody_else(tmp_path: Path) -> None:
    with own_folder(tmp_path, "extract-latents", ALONE) as one:
        with own_folder(tmp_path, "extract-latents", ALONE) as two:
            assert one.private != two.private
            assert "another run works" in refused(tmp_path)
        assert one.private.is_dir() and (tmp_path / "run.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_two_launchers_stand_for_two_machines_and_must_have_been_given_one_command(tmp_path: Path) -> None:
    base, out = eval_world.settings(tmp_path), tmp_path / "out"
    pair = LaunchSettings(
        device="cpu", num_machines=2, num_processes=2, main_process_ip="127.0.0.1", main_process_port=free_port()
    )
    both = []
    for rank in (0, 1):
        settings = replace(base, launch=replace(pair, machine_rank=rank), drive=replace(base.drive, seed=rank))
        both.append(launch("selfcheck", settings, out, f"{rank}.json"))
    told = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], told
    for text in told:  # each machine has a log of its own
        assert "machines were given different commands: drive.seed = 0 on machine 0, 1 on another" in text
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "failure.json"]
