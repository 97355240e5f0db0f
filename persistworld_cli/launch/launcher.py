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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
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
from persistworld_cli.launch.elastic import END_RANKS
from persistworld_cli.launch.environment import cores_alone, gpu_count, torch_has_cuda, use_gpu, worker_environment
from persistworld_cli.launch.restarting import POLL_S, Restarts
from persistworld_cli.launch.run_lock import RunFolder, own_folder
from persistworld_cli.launch.terminal import keep_terminal
from persistworld_cli.read_files import read_json

_PATIENCE = 3  # the worker is killed after this many signals
_SECONDS_TO_END = 60.0  # an agent gives its ranks 30 s to end


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
            code = _work(launch, folder, request, record)
        result = {} if code or not folder.first else _result(folder)
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


def _work(launch: LaunchSettings, folder: RunFolder, request: TaskRequest, record: dict[str, Any]) -> int:
    """Start the workers, again if they die, and wait for their exit code; reports a worker that was killed."""
    config, several = folder.private / CONFIG, launch.num_machines > 1
    command, stdin = _command(launch, config), None if request.terminal else subprocess.DEVNULL
    with cores_alone(launch) as alone, _Child() as child:
        if not alone:
            note("other work runs on these CPU cores: to share them, this run's threads sleep while they wait")
        environment = worker_environment(launch, alone=alone)
        restarts = Restarts(folder, request, launch.restarts, alone=not several, stopped=lambda: bool(child.signals))
        while True:
            code = child.run(command, environment, stdin, folder.fd, restarts.must_end if several else None)
            failure = _failure(code, folder, launch, followed=child.followed)
            if failure is None or not restarts.begin(failure):
                break
            _clear(folder.private, FAILURE, RESULT)
            again = {"request": restarts.request(record["request"]), "restarts": restarts.done}
            write_json(config, record | again)
    if failure is None:
        return 0
    if folder.first:
        write_json(folder.output / FAILURE, failure | {"run": folder.run})
        _clear(folder.output, RESULT)
    if restarts.ended_elsewhere:
        note("another machine has ended the run; its messages say why")
        return 1
    if child.signals and failure["again"] == "elsewhere":
        return INTERRUPTED
    if failure["code"] > 128 and failure["code"] != INTERRUPTED:
        memory = failure["code"] == 128 + signal.SIGKILL
        fix = "if nobody killed it, memory ran out: use a smaller batch" if memory else "run it again with --debug"
        others = "; the other ranks were ended" if launch.num_processes > 1 else ""
        show_error(PersistWorldError(f"{failure['what']}{others}", where=str(folder.output), fix=fix))
    return int(failure["code"])


def _failure(code: int, folder: RunFolder, launch: LaunchSettings, *, followed: bool) -> dict[str, Any] | None:
    """Why the workers ended, as `launch.restarting` reads it; None if they are done.

    Args:
        code: of the child; negative if a signal killed it. Ranks that stopped on request exit with 0, so that
            accelerate waits for all of them: then the file has the code.
        folder: the run's.
        launch: its processes.
        followed: whether the launcher ended them, since another machine restarts.
    """
    failure = _read(folder.private / FAILURE)
    if failure is None and code == 0:
        return None
    if failure is None:
        alone, killed = launch.num_processes == 1, code < 0
        who = "the worker" if alone else "the ranks' agent"
        how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with exit code {code}"
        again = "yes" if alone and killed else "no"
        failure = {"code": 128 - code if killed else code, "rank": 0, "what": f"{who} {how}", "again": again}
    if followed and failure["code"] >= 128:  # the signal was this launcher's
        failure |= {"what": "the workers of another machine died", "again": "elsewhere"}
    return failure


def _result(folder: RunFolder) -> dict[str, Any]:
    """The result that this run's workers left; it is put into the folder, for people."""
    result = _read(folder.private / RESULT)
    if result is None:
        raise PersistWorldError(
            "the worker ended without a result", where=str(folder.output), fix="run it again with --debug"
        )
    shutil.move(folder.private / RESULT, folder.output / RESULT)
    _clear(folder.output, FAILURE)
    return result


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


class _Child:
    """The child process. While the block runs, signals are passed on to it; it saves its work and ends in its own time.

    Attributes:
        signals: that asked this process to end.
        followed: whether the last child was ended to follow another machine.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.followed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Child:
        if threading.current_thread() is threading.main_thread():  # only a main thread can have handlers
            self._before = {number: signal.signal(number, self._forward) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        stdin: int | None,
        lock: int,
        must_end: Callable[[], bool] | None,
    ) -> int:
        """Start the child and wait for its exit code; it inherits the file ``lock``.

        It gets its own session, so that Ctrl-C reaches it once, from here, and not from the terminal too. Its standard
        output goes to standard error, because this process's standard output carries only data. Once ``must_end`` is
        true, it is ended.
        """
        options: dict[str, Any] = {"stdout": 2, "stdin": stdin, "start_new_session": True, "pass_fds": (lock,)}
        self.followed = False
        with subprocess.Popen(command, env=dict(env), **options) as self._process:
            try:
                for number in self.signals[-1:]:  # between two children
                    self._process.send_signal(number)
                while must_end:
                    with suppress(subprocess.TimeoutExpired):
                        return self._process.wait(POLL_S)
                    if must_end():
                        self.followed, must_end = True, None
                        self._process.send_signal(END_RANKS)
                        with suppress(subprocess.TimeoutExpired):
                            return self._process.wait(_SECONDS_TO_END)
                        self._process.kill()
                return self._process.wait()
            finally:
                self._process = None

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if self._process is not None and len(self.signals) >= _PATIENCE:
            self._process.kill()
            return
        if self._process is not None:
            self._process.send_signal(number)  # before the note: standard error may be closed
        if len(self.signals) == 1:
            note(f"{signal.Signals(number).name}: saving and stopping (a second signal ends it sooner, a third kills)")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file; None if it does not exist."""
    return read_json(path, "unreadable result of the worker", "run it again with --debug") if path.exists() else None
