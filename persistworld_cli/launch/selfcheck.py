"""The task ``selfcheck``: check that launching works. Every rank describes itself; the results are gathered."""

from __future__ import annotations

import os
import time
from typing import Any

from persistworld_cli.config.requests import SelfcheckRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError


def run(settings: Settings, request: SelfcheckRequest) -> dict[str, Any]:
    """Gather rank, threads and CPUs of every process, and sum a tensor over them; only ``launch.device`` is read."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object, reduce

    state = PartialState(cpu=settings.launch.device == "cpu")
    if request.fail_rank == state.process_index and _still_fails(request):
        _fail(request.fail_how)
    if request.seconds:
        (request.output / f"waiting.{state.process_index}").write_text("waiting\n", encoding="utf-8")
        time.sleep(request.seconds)
    total = reduce(torch.tensor(float(state.process_index + 1), device=state.device), "sum")
    own = {
        "rank": state.process_index,
        "threads": torch.get_num_threads(),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "device": str(state.device),
    }
    return {"world_size": state.num_processes, "sum": float(total), "ranks": gather_object([own])}


def _still_fails(request: SelfcheckRequest) -> bool:
    """Whether this start is one of those that fail."""
    if request.fail_starts is None:
        return True
    with (request.output / "failed").open("a+") as failed:
        failed.write("failed\n")
        failed.seek(0)
        return len(failed.readlines()) <= request.fail_starts


def _fail(how: str) -> None:
    """Make this rank fail in the requested way."""
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "crash":
        raise RuntimeError("selfcheck was asked to crash")
    if how == "lost-gpu":
        raise RuntimeError("CUDA error: unspecified launch failure")
    raise PersistWorldError("selfcheck was asked to fail", where="fail_rank", fix="ask for something else")
