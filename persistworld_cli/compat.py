"""What other packages need before they import, kept in one place and switched on only where it is needed."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_NMS_SCHEMA = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_MISSING = "operator torchvision::nms does not exist"
_keep_alive: list[Any] = []  # a torch.library.Library takes its operators with it when it is collected


def ensure_torchvision() -> None:
    """Make ``import torchvision`` work beside a CPU-only torch; harmless everywhere else, and idempotent.

    PyPI's torchvision is built against PyPI's (CUDA) torch. Beside a CPU-only torch wheel its C++ operators cannot be
    loaded; torchvision tolerates that except for one line, which registers a fake kernel for ``torchvision::nms`` and
    fails because nobody declared the operator. The failed import then breaks lpips, transformers and peft, which use
    none of these operators. So, only when exactly that failure happens: forget the half-imported modules, declare the
    operator's schema (without a kernel: calling it still fails, as it must), and import again.

    Raises:
        ImportError: torchvision is not installed, or fails in another way (passed on unchanged).
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    import torch

    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    if not _keep_alive:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(_NMS_SCHEMA)
        _keep_alive.append(library)
    importlib.import_module("torchvision")


def use_all_cpus() -> None:
    """Undo, in a helper process, the binding to one core that it inherited.

    The launcher sets ``OMP_PROC_BIND``, with which libgomp ties the main thread to one core as soon as torch is imported;
    every process started from there (data loading, decoding) inherits that one core. The launcher leaves the original
    set in ``PERSISTWORLD_CPUS``. Call this first in such a process; without the variable it does nothing.
    """
    cpus = os.environ.get("PERSISTWORLD_CPUS", "")
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
