"""Whether workers that died are started again, and from which state; two launchers' folders in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persistworld_cli.config.requests import EvalRequest, PostTrainRequest, VerifyRequest, request_to_json
from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.launch import restarting
from persistworld_cli.launch.restarting import Restarts
from persistworld_cli.launch.run_lock import RunFolder, own_folder

FIRST = LaunchSettings(num_machines=2, num_processes=2, main_process_ip="10.0.0.1", main_process_port=29500)
DIED = {"again": "yes", "what": "rank 1 was killed by SIGKILL"}
LOST = {"again": "elsewhere", "what": "rank 0 lost contact with another rank"}
MISTAKE = {"again": "no", "what": "the gradient is not finite"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with own_folder(tmp_path, "post-train", LaunchSettings()) as own:
        yield own


def restarts_of(folder: RunFolder, most: int = 2, alone: bool = False) -> Restarts:
    return Restarts(folder, PostTrainRequest(), most, alone=alone, stopped=lambda: False)


def save_state(output: Path, step: int, at_ns: int) -> None:
    state = output / "state" / f"step-{step:08d}"
    state.mkdir(parents=True, exist_ok=True)
    os.utime(state, ns=(at_ns, at_ns))


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """What another machine does while this one waits."""
    monkeypatch.setattr(restarting.time, "sleep", lambda _: act())


def test_restarts_are_counted_and_what_would_come_again_is_final(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    restarts = restarts_of(folder, alone=True)
    assert not restarts.begin(MISTAKE) and capsys.readouterr().err == ""
    assert restarts.begin(DIED)
    save_state(folder.output, 4, 1_000_000_000)
    (folder.output / "metrics.jsonl").write_text('{"step": 4}\n{"step": 7}\n')
    assert restarts.begin(LOST)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "restart 1 of 2: rank 1 was killed by SIGKILL; nothing was saved yet"
    assert second.startswith(
        "restart 2 of 2: rank 0 lost contact with another rank after update 7; resuming from update 4"
    )
    assert not restarts.begin(DIED)
    for request, most in ((EvalRequest(), 1), (VerifyRequest(), 0)):  # only what continues finished work
        assert Restarts(folder, request, 1, alone=True, stopped=lambda: False).begin(DIED) == bool(most)
    assert not Restarts(folder, EvalRequest(), 1, alone=True, stopped=lambda: True).begin(LOST)  # interrupted


def test_a_restart_begins_anew_or_at_another_run_s_state_only_until_it_has_its_own(
    folder: RunFolder, tmp_path: Path
) -> None:
    save_state(tmp_path, 9, 1_000_000_000)
    restarts = restarts_of(folder)
    for request in (PostTrainRequest(resume=False), PostTrainRequest(resume_from=tmp_path / "other")):
        asked = request_to_json(request)
        assert restarts.request(asked) == asked  # step 9 is of an earlier run
    save_state(tmp_path, 9, 2_000_000_000)  # its own
    assert restarts.request(asked) == {**asked, "resume": True, "resume_from": None}


@pytest.mark.parametrize("failure", [DIED, LOST], ids=["own", "of the other machine"])
def test_machines_restart_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: dict[str, str]) -> None:
    with own_folder(tmp_path, "post-train", FIRST) as own, own_folder(tmp_path, "post-train", second()) as other:
        restarts = restarts_of(own)
        assert not restarts.must_end()
        meanwhile(monkeypatch, lambda: other.count_restarts(1))
        assert restarts.begin(failure) and other.other_machines() == {own.run: 1}
        assert not restarts.must_end()
        other.count_restarts(2)
        assert restarts.must_end()


def test_a_machine_that_ends_the_run_ends_it_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_folder(tmp_path, "post-train", FIRST) as own:
        with own_folder(tmp_path, "post-train", second()):
            restarts = restarts_of(own)
            assert not restarts.must_end()
        assert not restarts.must_end()  # its workers may still be ending
        assert not restarts.begin(LOST) and restarts.ended_elsewhere
        monkeypatch.setattr(restarting, "_SECONDS_TO_END", -1.0)
        assert restarts.must_end()


def second() -> LaunchSettings:
    return replace(FIRST, machine_rank=1)
