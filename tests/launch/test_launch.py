"""From settings to worker processes and back: one child, several ranks, failures, signals, environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import make_pipe, read_lines, wait_for_end

from persistworld_cli import worker
from persistworld_cli.config.presets import from_json, load_settings
from persistworld_cli.config.requests import SelfcheckRequest
from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import jsonable
from persistworld_cli.launch import environment, launcher
from persistworld_cli.launch.launcher import run_task

# As a command does it, in a process of its own: launch the selfcheck, exit with the code.
LAUNCH = """
import json, sys
from pathlib import Path
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import SelfcheckRequest
from persistworld_cli.launch.launcher import run_task
settings = load_settings("tiny", ["launch.device=cpu", *("launch." + word for word in sys.argv[1].split())])
code, result = run_task(settings, SelfcheckRequest(output=Path(sys.argv[3]), **json.loads(sys.argv[2])))
print(json.dumps(result))
sys.exit(code)
"""


@contextmanager
def started(processes: int, request: dict[str, Any], output: Path, restarts: int) -> Iterator[subprocess.Popen[str]]:
    """The launcher, in a process that is killed in the end if it still lives."""
    options = f"num_processes={processes} restarts={restarts}"
    command = [sys.executable, "-c", LAUNCH, options, json.dumps(request), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def launch(processes: int, request: dict[str, Any], output: Path, restarts: int = 0) -> tuple[int, str, str]:
    with started(processes, request, output, restarts) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def alive(marker: str) -> list[int]:
    """Processes with ``marker`` on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marker in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@contextmanager
def waiting(output: Path, ranks: int) -> Iterator[subprocess.Popen[str]]:
    """The launcher of ranks that have all come to the point where they only wait."""
    pipes = [make_pipe(output / f"waiting.{rank}") for rank in range(ranks)]
    with started(ranks, {"seconds": 900}, output, 3) as process:
        for pipe in pipes:
            assert read_lines(pipe, 1) == ["waiting"]
        yield process


def test_one_process_is_one_child_with_its_environment(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failure.json").write_text("{}")  # of a run before
    code, out, err = launch(1, {}, tmp_path / "run")
    assert code == 0, err
    result = json.loads(out)
    assert result["world_size"] == 1 and result["sum"] == 1.0
    assert result["ranks"][0]["cpus"] == environment.cpus()  # the binding of OpenMP's threads is not inherited
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["task"] == "selfcheck"
    assert config["request"]["output"] == str(tmp_path / "run")
    assert from_json(config["settings"]).launch.device == "cpu"
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "result.json"]


def test_two_cpu_processes_find_each_other(tmp_path: Path) -> None:
    code, out, err = launch(2, {}, tmp_path)
    assert code == 0, err
    result = json.loads(out)
    assert result["world_size"] == 2 and result["sum"] == 3.0
    assert [entry["rank"] for entry in result["ranks"]] == [0, 1]
    assert all(entry["cpus"] == environment.cpus() for entry in result["ranks"])
    threads = max(1, environment.cores() // 2)
    assert [entry["threads"] for entry in result["ranks"]] == [int(os.environ.get("OMP_NUM_THREADS", threads))] * 2


@pytest.mark.parametrize("how", ["mistake", "kill"])
def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path: Path, how: str) -> None:
    code, out, err = launch(2, {"fail_rank": 1, "fail_how": how}, tmp_path)
    assert out.strip() == "{}"
    if how == "mistake":
        assert code == 1 and err.count("error: selfcheck was asked to fail") == 1 and "Traceback" not in err
    else:
        assert code == 137 and "rank 1 was killed by SIGKILL" in err and "Traceback" not in err
    assert not alive(f"{tmp_path}/.run-node0-")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("how", "expected"), [("mistake", 1), ("crash", 1), ("lost-gpu", 75), ("kill", 137)])
def test_a_single_worker_that_fails_passes_its_code_on(tmp_path: Path, how: str, expected: int) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, out, err = launch(1, {"fail_rank": 0, "fail_how": how}, tmp_path, restarts=1)
    assert (code, out.strip()) == (expected, "{}")
    assert err.count("Traceback") == {"crash": 1, "lost-gpu": 2}.get(how, 0)
    assert ("restart 1 of 1" in err) == ("no restart: there were 1" in err) == (expected > 2)
    told = {
        "mistake": "to do: ask for something else",
        "crash": "RuntimeError: selfcheck was",
        "lost-gpu": "restart 1 of 1: rank 0: RuntimeError('CUDA error",
        "kill": "restart 1 of 1: the worker was killed by SIGKILL; nothing was saved yet",
    }
    assert told[how] in err
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["code"] == expected and not (tmp_path / "result.json").exists()  # only what happened last


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_ends_in_good_order(tmp_path: Path, processes: int) -> None:
    number = signal.SIGINT if processes == 1 else signal.SIGTERM
    with waiting(tmp_path, processes) as process:
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert f"{number.name}: saving and stopping" in err
    assert "Traceback" not in err
    assert not alive(f"{tmp_path}/.run-node0-")


def test_a_killed_launcher_leaves_no_workers(tmp_path: Path) -> None:
    with waiting(tmp_path, 2):  # killed on leaving
        workers = alive(f"{tmp_path}/.run-node0-")
        assert len(workers) >= 2
    for worker_pid in workers:
        wait_for_end(worker_pid)


def test_every_task_has_its_function() -> None:
    from importlib.util import find_spec

    for task, place in worker.TASKS.items():
        module, _, name = place.partition(":")
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, f"{task.task}: no module {module}"
        assert f"def {name}(" in Path(spec.origin).read_text(), f"{task.task}: no function {name} in {module}"


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PersistWorldError, match="cannot be written"):
        run_task(load_settings("tiny", env={}), SelfcheckRequest(output=tmp_path / "file" / "run"))


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launcher, "gpu_count", lambda: 0)
    settings = load_settings("tiny", ["launch.device=cuda"], env={})
    with pytest.raises(PersistWorldError, match=r"no CUDA device|built for CPUs only"):
        run_task(settings, SelfcheckRequest(output=tmp_path))
    monkeypatch.setattr(launcher, "gpu_count", lambda: 2)
    settings = load_settings("tiny", ["launch.device=cuda", "launch.num_processes=4"], env={})
    with pytest.raises(PersistWorldError, match="4 processes on this machine, but 2 GPUs"):
        run_task(settings, SelfcheckRequest(output=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_environment_of_a_cpu_worker() -> None:
    one = environment.worker_environment(LaunchSettings(device="cpu"), {"HOME": "/h"})
    assert one["OMP_NUM_THREADS"] == str(environment.cores())
    assert (one["OMP_PROC_BIND"], one["OMP_PLACES"], one["MALLOC_MMAP_MAX_"]) == ("true", "cores", "0")
    assert one["ACCELERATE_USE_CPU"] == "true" and one["HOME"] == "/h"
    two = environment.worker_environment(LaunchSettings(device="cpu", num_processes=2), {})
    assert two["OMP_NUM_THREADS"] == str(max(1, environment.cores() // 2))
    assert "OMP_PROC_BIND" not in two and "MALLOC_TOP_PAD_" in two  # both would be bound to the same cores


def test_what_the_user_set_stays_but_for_the_threads_asked_for() -> None:
    own = {"OMP_NUM_THREADS": "3", "MALLOC_MMAP_MAX_": "9", "OMP_PLACES": "threads"}
    kept = environment.worker_environment(LaunchSettings(device="cpu"), own)
    assert {name: kept[name] for name in own} == own
    assert "OMP_PROC_BIND" not in kept
    assert environment.worker_environment(LaunchSettings(device="cpu", threads=1), own)["OMP_NUM_THREADS"] == "1"


def test_gpu_workers_are_neither_bound_nor_given_another_malloc() -> None:
    env = environment.worker_environment(LaunchSettings(device="cuda"), {})
    assert not {"OMP_PROC_BIND", "MALLOC_MMAP_MAX_", "ACCELERATE_USE_CPU"} & set(env)


def test_results_become_plain_json() -> None:
    import numpy as np

    given = {
        "a": np.float64(1.5),
        "b": float("nan"),
        "c": Path("/x"),
        "d": (np.arange(2), {"e": np.bool_(True)}),
        3: None,
    }
    assert jsonable(given) == {"a": 1.5, "b": None, "c": "/x", "d": [[0, 1], {"e": True}], "3": None}


def test_an_unknown_task_or_field_is_told() -> None:
    whole = {"task": "selfcheck", "settings": {}, "request": {"second": 1}}
    with pytest.raises(UsageError, match="unknown task 'evaluate'"):
        worker._run({**whole, "task": "evaluate"}, Path("config.json"))
    with pytest.raises(UsageError, match="unknown field 'second' of the selfcheck request") as told:
        worker._run(whole, Path("config.json"))
    assert told.value.fix == "did you mean 'seconds'?"


def test_torchvision_imports_and_a_second_time_costs_nothing() -> None:
    from persistworld_cli.compat import ensure_torchvision

    ensure_torchvision()
    first = sys.modules["torchvision"]
    ensure_torchvision()
    assert sys.modules["torchvision"] is first


def _no_memory_on_the_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _no_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 23 GiB in all")


def _none_for_cublas() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def _none_for_python() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("ask", [_no_memory_on_the_cpu, _no_memory_on_a_gpu, _none_for_cublas, _none_for_python])
def test_memory_that_cannot_be_had_is_one_error_without_a_restart(
    ask: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as refused:
        ask()
    assert worker._crashed(refused.value, tmp_path) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said and "lower --batch" in said and "Traceback" not in said
    assert json.loads((tmp_path / "failure.json").read_text())["again"] == "no"


def test_a_failed_gpu_is_the_machines_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worker._crashed(RuntimeError("CUDA error: unspecified launch failure"), tmp_path) == 75
    assert json.loads((tmp_path / "failure.json").read_text())["again"] == "yes"
