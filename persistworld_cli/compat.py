"""Workarounds for other packages and the operating system, each applied only where it is needed."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from typing import Any

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_SCHEMAS = {name: f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms")}
_declared: dict[str, Any] = {}  # schema -> Library, whose operators vanish when it is collected


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU-only torch; harmless everywhere else, and idempotent.

    PyPI's torchvision is built against PyPI's (CUDA) torch. Beside a CPU-only torch wheel its C++ operators cannot be
    loaded; torchvision tolerates that except where it registers a fake kernel for ``torchvision::nms`` (0.28: and
    ``qnms``), which fails because the operator is not declared. That breaks lpips, transformers and peft, which use
    none of these operators. Only on exactly that failure: forget the half-imported modules, declare the operator's
    schema (without a kernel: calling it still fails), and import again.

    Raises:
        ImportError: torchvision is not installed. Other failures pass unchanged.
    """
    for _ in range(len(_SCHEMAS) + 1):
        try:
            importlib.import_module("torchvision")
            return
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            schema = _SCHEMAS.get(missing[1]) if missing else None
            if schema is None or schema in _declared:
                raise
        _forget("torchvision")
        _declare(schema)


def _forget(package: str) -> None:
    """Remove a half-imported package from ``sys.modules``."""
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]


def _declare(schema: str) -> None:
    """Declare a torchvision operator without a kernel."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define(schema)
    _declared[schema] = library


def free_main_thread() -> None:
    """Let the main thread run on every CPU again if the launcher bound OpenMP's threads to cores.

    With ``OMP_PROC_BIND`` libgomp binds the thread that loads it to the first core, and its child threads and processes
    (decoders, data loaders) inherit that one core. OpenMP's other threads stay bound. Does nothing unless the launcher
    set ``PERSISTWORLD_CPUS``.
    """
    cpus = os.environ.pop("PERSISTWORLD_CPUS", "")
    if not cpus or not hasattr(os, "sched_setaffinity"):
        return
    import torch  # noqa: F401  (loads libgomp, which binds now and not later)

    for name in ("OMP_PROC_BIND", "OMP_PLACES"):  # helper processes must not be bound either
        os.environ.pop(name, None)
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})


# Signals that ask a run to end. A shell makes background jobs ignore SIGINT; SLURM can send SIGUSR1 before the limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def end_with_parent(number: int | None = None) -> None:
    """Get a signal (SIGTERM) when the parent process dies, on Linux: a killed launcher leaves no workers behind."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number or signal.SIGTERM, 0, 0, 0)
