"""From resolved settings to worker processes and back: config.json, one child or accelerate, signals, result.

The launcher holds the run's folder (`run_lock`) and refuses to mix runs in it (`continuing`) before it writes anything.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from persistworld_cli import __version__
from persistworld_cli.compat import STOP_SIGNALS
from persistworld_cli.config.inputs import describe_inputs
from persistworld_cli.config.presets import to_json
from persistworld_cli.config.requests import CONFIG, FAILURE, INTERRUPTED, RESULT, TaskRequest, request_to_json
from persistworld_cli.config.settings import LaunchSettings, Settings
from persistworld_cli.console import note, show_error
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import write_json
from persistworld_cli.launch.continuing import find_earlier_run, keep_history, what_remains
from persistworld_cli.launch.elastic import killed
from persistworld_cli.launch.environment import cores_alone, gpu_count, torch_has_cuda, use_gpu, worker_environment
from persistworld_cli.launch.run_lock import RunFolder, own_folder
from persistworld_cli.launch.terminal import keep_terminal
from persistworld_cli.read_files import read_json

_PATIENCE = 3  # the worker is killed after this many signals


def run_task(settings: Settings, request: TaskRequest, *, take_over: bool = False) -> tuple[int, dict[str, Any]]:
    """Run the task of a request in worker processes and wait for it.

    Args:
        settings: resolved settings; ``settings.launch`` says how many processes.
        request: its ``output`` is created if it is missing. If it needs the terminal, the worker gets standard input,
            whose modes are restored afterwards.
        take_over: take the folder over from a run on another host that was killed.

    Returns:
        The exit code (0: done; otherwise the worker has reported why), and what the task returned ({} on machines other
        than the first).

    Raises:
        PersistWorldError: the folder cannot be written, or belongs to another run; there are fewer GPUs than requested.
        UsageError: the folder holds work that was done with other settings.
    """
    launch = _settle_device(settings.launch)
    settings = dataclasses.replace(settings, launch=launch)
    task, output = request.task, request.output
    with ExitStack() as holding:
        try:
            output.mkdir(parents=True, exist_ok=True)
            folder = holding.enter_context(
                own_folder(output, task, launch, take_over=take_over, command=request.command)
            )
            record = _record(settings, request, folder.run)
            earlier = find_earlier_run(record, output)
            if folder.first:
                keep_history(earlier, record, output)
                write_json(output / CONFIG, record)
                _clear(output, RESULT, FAILURE)
            write_json(folder.private / CONFIG, record)
        except OSError as error:
            raise PersistWorldError(
                f"the output folder cannot be written: {error.strerror}", where=str(output), fix="take another --output"
            ) from error
        with keep_terminal() if request.terminal else nullcontext():
            code = _work(launch, folder, request.terminal)
        code, result = _outcome(code, folder)
        if code == INTERRUPTED and folder.first and request.command:
            note(what_remains(request))
        return code, result


def _record(settings: Settings, request: TaskRequest, run: str) -> dict[str, Any]:
    """``config.json``: everything a worker gets, and the record that a later run in the folder is compared with."""
    tables, asked = to_json(settings), request_to_json(request)
    return {
        "task": request.task,
        "run": run,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": tables,
        "request": asked,
        "inputs": describe_inputs(request.task, tables, asked),
        "version": __version__,
    }


def _work(launch: LaunchSettings, folder: RunFolder, terminal: bool) -> int:
    """Start the workers and wait for their exit code."""
    command = _command(launch, folder.private / CONFIG)
    held = () if folder.fd is None else (folder.fd,)
    with cores_alone(launch) as alone:
        if not alone:
            note("other work runs on these CPU cores: to share them, this run's threads sleep while they wait")
        environment = worker_environment(launch, alone=alone)
        code = _wait(command, environment, stdin=None if terminal else subprocess.DEVNULL, pass_fds=held)
    if code < 0:
        show_error(killed("the worker", -code, where=str(folder.output), otherwise="run it again with --debug"))
        code = 128 - code
    return code


def _outcome(code: int, folder: RunFolder) -> tuple[int, dict[str, Any]]:
    """The exit code and result that this run's workers left; one of both is put into the folder, for people."""
    failure = _read(folder.private / FAILURE) or {"code": code, "what": f"the worker ended with {code}"}  # killed
    # Ranks that stopped on request exit with 0, so that accelerate waits for all of them: the file has the code.
    code = code or int(failure["code"])
    if code and folder.first:
        write_json(folder.output / FAILURE, failure | {"run": folder.run})
        _clear(folder.output, RESULT)
    if code or not folder.first:
        return code, {}
    result = _read(folder.private / RESULT)
    if result is None:
        raise PersistWorldError(
            "the worker ended without a result", where=str(folder.output), fix="run it again with --debug"
        )
    shutil.move(folder.private / RESULT, folder.output / RESULT)
    _clear(folder.output, FAILURE)
    return 0, result


def _clear(output: Path, *names: str) -> None:
    """Remove files that say how an earlier run ended; runs that share the folder may have left them meanwhile."""
    for name in names:
        (output / name).unlink(missing_ok=True)


def _settle_device(launch: LaunchSettings) -> LaunchSettings:
    """``auto`` decided once, so that all ranks agree. Raises PersistWorldError for GPUs that do not exist."""
    found = gpu_count()
    launch = dataclasses.replace(launch, device="cuda" if use_gpu(launch) else "cpu")
    if launch.device == "cpu":
        return launch
    if not found:
        raise PersistWorldError(
            "no CUDA device was found" if torch_has_cuda() else "the installed torch is built for CPUs only",
            where="launch.device = cuda",
            fix="use --device cpu or auto",
        )
    local = launch.num_processes // launch.num_machines
    if local > found:
        raise PersistWorldError(
            f"{local} processes on this machine, but {found} GPU{'s' if found != 1 else ''}",
            where="launch.num_processes",
            fix=f"use --num-processes {found * launch.num_machines}, or --device cpu",
        )
    return launch


def _command(launch: LaunchSettings, config: Path) -> list[str]:
    """The child's command line: the worker itself, or accelerate with the worker as its module."""
    if launch.num_processes == 1:
        return [sys.executable, "-m", "persistworld_cli.worker", str(config)]
    threads = worker_environment(launch)["OMP_NUM_THREADS"]
    options = {
        "num_processes": launch.num_processes,
        "num_machines": launch.num_machines,
        "machine_rank": launch.machine_rank,
        "main_process_ip": launch.main_process_ip or "127.0.0.1",
        "main_process_port": launch.main_process_port,
        "num_cpu_threads_per_process": threads,
        "mixed_precision": "no",  # each task sets its own
        "dynamo_backend": "no",
    }
    # --multi_gpu is accelerate's name for "through torch.distributed.run": with ACCELERATE_USE_CPU the same path starts
    # CPU ranks over gloo, while `accelerate launch --cpu --num_processes 2` would start a single process.
    spelled = [f"--{name}={value}" for name, value in options.items()]
    module = ["--module", "persistworld_cli.worker", str(config)]
    return [sys.executable, "-m", "persistworld_cli.launch.elastic", "--multi_gpu", *spelled, *module]


def _wait(
    command: Sequence[str],
    env: Mapping[str, str],
    stdin: int | None = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> int:
    """Start the child, pass signals on to it, and wait for its exit code; it inherits the files of ``pass_fds``.

    The child gets its own session, so that Ctrl-C reaches it once, from here, and not from the terminal too. Its
    standard output goes to standard error, because this process's standard output carries only data.
    """
    options: dict[str, Any] = {"stdout": 2, "stdin": stdin, "start_new_session": True, "pass_fds": pass_fds}
    with subprocess.Popen(command, env=dict(env), **options) as child, _forwarding(child):
        return child.wait()


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass signals on; the child saves its work and ends in its own time."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only a main thread can have handlers
        return

    seen: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) >= _PATIENCE:
            child.kill()
            return
        child.send_signal(number)  # before the note: standard error may be closed
        if len(seen) == 1:
            note(f"{signal.Signals(number).name}: saving and stopping (a second signal ends it sooner, a third kills)")

    before = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None if it does not exist."""
    return read_json(path, "unreadable result of the worker", "run it again with --debug") if path.exists() else None
