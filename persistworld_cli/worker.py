"""``python -m persistworld_cli.worker config.json``: one process of a run, with resolved settings and no flags.

A task is a function ``run(settings, request) -> dict``. Only this run uses the folder of config.json: rank 0 writes the
task's result to ``result.json`` there, and the first rank that fails writes ``failure.json``. A task raises
PersistWorldError for a user's mistake, and `training.run.Interrupted` after all ranks have agreed to stop and saved;
KeyboardInterrupt means that this rank was interrupted without that agreement.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from persistworld_cli.compat import STOP_SIGNALS, end_with_parent, free_main_thread
from persistworld_cli.config import requests
from persistworld_cli.config.presets import from_json
from persistworld_cli.config.requests import FAILURE, INTERRUPTED, RESULT, TRY_AGAIN, TaskRequest, request_from_json
from persistworld_cli.config.weight_names import READINGS
from persistworld_cli.console import debug_wanted, listen_to_library, note, show_error, show_traceback
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import write_json

TASKS: dict[type[TaskRequest], str] = {
    requests.ExtractRequest: "persistworld_cli.extraction.run:run",
    requests.PretrainRequest: "persistworld_cli.training.pretrain:run",
    requests.PretrainVaeRequest: "persistworld_cli.training.vae:run",
    requests.PostTrainRequest: "persistworld_cli.training.post_train:run",
    requests.EvalRequest: "persistworld_cli.evaluation.run:run",
    requests.VerifyRequest: "persistworld_cli.evaluation.verify:run",
    requests.FrontierRequest: "persistworld_cli.frontier.run:run",
    requests.ReplayRequest: "persistworld_cli.interact.replay:run",
    requests.DriveRequest: "persistworld_cli.interact.drive:run",
    requests.PolicyRolloutRequest: "persistworld_cli.policies.run:run",
    requests.SelfcheckRequest: "persistworld_cli.launch.selfcheck:run",
}
_OF_ONE_MACHINE = ("machine_rank", "cores", "command", "output", "threads")  # may differ between the machines of a run
_RESUME = ("resume", "resume_from")
_OF_THE_MACHINE = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL", "DataLoader worker")
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # torch's words on CPUs and GPUs, CUDA's
_LESS = (
    "lower --batch (extract-latents), pretrain.batch (with pretrain.accumulate), post_train.micro_batch or eval.batch; "
    "see docs/troubleshooting.md, out of memory"
)


def main(argv: list[str]) -> int:
    """Run the task of a config.json.

    Returns the exit code: 0 done, 1 failed, 2 wrong usage, 75 the machine failed, 130 interrupted.
    """
    end_with_parent()
    _hear_signals()
    listen_to_library(_rank())
    config = Path(argv[1])
    whole = json.loads(config.read_text(encoding="utf-8"))
    folder = config.parent
    try:
        free_main_thread()
        result = _run(whole, config)
        if _rank() == 0:
            write_json(folder / RESULT, result | ({"weights_read": READINGS} if READINGS else {}))
        _leave_group()
        return 0
    except (KeyboardInterrupt, SystemExit) as stop:
        _ignore_signals()
        code = stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else INTERRUPTED
        if code:
            _first_to_fail(folder, code, "interrupted")
        return code
    except PersistWorldError as error:
        _ignore_signals()
        if debug_wanted():
            show_traceback()
        code = 2 if isinstance(error, UsageError) else 1
        if _first_to_fail(folder, code, error.what):
            show_error(error)
        return code
    except Exception as error:
        _ignore_signals()
        if _saved_and_stopped(error):
            _first_to_fail(folder, INTERRUPTED, "interrupted")
            # All ranks agreed to stop. After a nonzero code accelerate would end the other ranks, while rank 0
            # may still be writing; the launcher reads the code from the file.
            return 0 if _world_size() > 1 else INTERRUPTED
        return _crashed(error, folder)


def _run(whole: dict[str, Any], config: Path) -> dict[str, Any]:
    """Import the task and call it."""
    kinds = {kind.task: kind for kind in TASKS}
    if whole["task"] not in kinds:
        raise UsageError(f"unknown task '{whole['task']}'", where=str(config), fix=f"known: {', '.join(sorted(kinds))}")
    kind = kinds[whole["task"]]
    settings = from_json(whole["settings"], where=str(config))
    if settings.launch.num_machines > 1:
        _require_one_command(whole)
    request = request_from_json(kind, whole["request"], where=str(config))
    module, _, name = TASKS[kind].partition(":")
    task = getattr(importlib.import_module(module), name)
    if not request.profile or _rank():
        result: dict[str, Any] = task(settings, request)
        return result
    from persistworld_cli.profiling import FOLDER, profiling

    with profiling(folder := request.output / FOLDER):
        result = task(settings, request)
    return {**result, "profile": folder / "table.txt"}


def _require_one_command(whole: dict[str, Any]) -> None:
    """Raise if the machines run different commands: each launcher resolves its own settings.

    After a restart, whether to resume is machine 0's decision: the others may not see its last state yet.

    Raises:
        UsageError: on every rank, naming what differs.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=whole["settings"]["launch"]["device"] == "cpu")
    own, request = {"task": whole["task"], "version": whole.get("version")}, dict(whole["request"])
    resume = {name: request.pop(name) for name in _RESUME if name in request and whole.get("restarts")}
    for table, entries in {**whole["settings"], "request": request}.items():
        own |= {f"{table}.{name}": value for name, value in entries.items() if name not in _OF_ONE_MACHINE}
    whole["request"] = request | gather_object([resume])[0]
    first, *others = gather_object([own])
    for other in others:
        for key in dict.fromkeys([*first, *other]):
            if first.get(key) != other.get(key):
                raise UsageError(
                    f"machines were given different commands: {key} = {first.get(key)!r} on machine 0, "
                    f"{other.get(key)!r} on another",
                    where="--machine-rank",
                    fix="give every machine the same command, except for --machine-rank",
                )


def _leave_group() -> None:
    """Leave the process group together: gloo's threads abort a process that ends while they still communicate."""
    if _in_group():
        distributed = sys.modules["torch.distributed"]
        distributed.barrier()
        distributed.destroy_process_group()


def _hear_signals() -> None:
    """Turn signals into an exception, so that ``finally`` blocks run; a training loop sets its own handlers."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def _ignore_signals() -> None:
    """Ignore signals while this process ends: the launcher's signal to other ranks must not cut off the error."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _saved_and_stopped(error: Exception) -> bool:
    """Whether all ranks of a training agreed to stop, and saved."""
    module = sys.modules.get("persistworld_cli.training.run")
    return module is not None and isinstance(error, module.Interrupted)


def _crashed(error: Exception, folder: Path) -> int:
    """Report an unexpected error once, from the rank that raised it; the other ranks print one line each."""
    if _world_size() > 1 and _lost_contact(error):
        note(f"rank {_rank()} lost contact with another rank: {error}")
    elif _first_to_fail(folder, code := TRY_AGAIN if _of_the_machine(error) else 1, f"rank {_rank()}: {error!r}"):
        if _no_memory(error) and not debug_wanted():
            show_error(PersistWorldError("out of memory", where=(str(error) or repr(error)).splitlines()[0], fix=_LESS))
        else:
            show_traceback()
        return code
    else:
        note(f"rank {_rank()} failed after another one: {error!r}")
    if debug_wanted():
        show_traceback()
    return 1


def _lost_contact(error: Exception) -> bool:
    """Whether an error comes from communication between ranks (gloo, NCCL, the store): its cause is another rank."""
    distributed = sys.modules.get("torch.distributed")
    known = distributed is not None and isinstance(error, distributed.DistError)
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _of_the_machine(error: Exception) -> bool:
    """Whether an error may not come again after a restart: the GPU's, communication's, the network disk's.

    What did not fit into memory would not fit the next time.
    """
    if _no_memory(error):
        return False
    if isinstance(error, RuntimeError):
        return _lost_contact(error) or any(words in str(error) for words in _OF_THE_MACHINE)
    return getattr(error, "errno", None) in (errno.EIO, errno.ESTALE)


def _no_memory(error: Exception) -> bool:
    """Whether an error says that memory, a CPU's or a GPU's, was not enough."""
    torch_told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return torch_told or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def _in_group() -> bool:
    """Whether this process is in a group of ranks."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _first_to_fail(folder: Path, code: int, what: str) -> bool:
    """Write the exit code for the launcher; True if this is the first rank to fail on this machine: it reports why."""
    again = "yes" if code == TRY_AGAIN else "no"
    try:
        with (folder / FAILURE).open("x", encoding="utf-8") as file:
            json.dump({"code": code, "rank": _rank(), "what": what, "again": again}, file)
    except FileExistsError:
        return False
    except OSError:
        return True  # a full disk must not hide the reason
    return True


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _exit(code: int) -> NoReturn:
    """End this process; a rank that is still in a group skips the teardown, which could abort and hide the code."""
    if _in_group():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main(sys.argv))
