"""The task ``selfcheck``: does launching work here? Every rank says who it is, and they agree on it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Gather rank, threads and CPUs of every process, and sum a tensor over them.

    Args:
        settings: only ``launch.device`` is read.
        job: ``seconds`` to stay before the gathering (each rank then leaves a file ``waiting.RANK`` in ``output``);
            ``fail_rank`` and ``fail_how`` ("mistake", "crash", "kill") let a rank end badly, to see what becomes of it
            (it leaves ``failing.RANK``).
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object, reduce

    state = PartialState(cpu=settings.launch.device == "cpu")
    if job.get("fail_rank") == state.process_index:
        (Path(job["output"]) / f"failing.{state.process_index}").touch()
        _fail(str(job.get("fail_how", "mistake")))
    if job.get("seconds"):
        (Path(job["output"]) / f"waiting.{state.process_index}").touch()
        time.sleep(float(job["seconds"]))
    total = reduce(torch.tensor(float(state.process_index + 1), device=state.device), "sum")
    own = {
        "rank": state.process_index,
        "threads": torch.get_num_threads(),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "device": str(state.device),
    }
    return {"world_size": state.num_processes, "sum": float(total), "ranks": gather_object([own])}


def _fail(how: str) -> None:
    """End this rank in one of the ways in which ranks end."""
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "crash":
        raise RuntimeError("selfcheck was asked to crash")
    raise PersistWorldError("selfcheck was asked to fail", where="job.fail_rank", fix="ask for something else")
