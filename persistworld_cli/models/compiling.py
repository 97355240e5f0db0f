"""Compile the network with torch.compile (``--compile``): fused kernels on a CPU, CUDA graphs on a GPU.

Results agree to rounding. Weights become constants, so it is for sampling only, after adapters are merged. Every new
batch size is compiled at its first call, in every process; this is logged and takes minutes on two CPU cores.
"""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel

MANY = 64  # different batch sizes in one process; torch gives up after 8 by default
_log = logging.getLogger(__name__)


def compile_network(model: WorldModel) -> None:
    """Compile the UNet of a frozen model, which stays on its device.

    Raises:
        PersistWorldError: no C++ compiler, where torch needs one.
    """
    from torch._inductor import config as inductor

    on_cpu = model.device.type == "cpu"
    if on_cpu:
        _require_compiler(inductor.cpp.cxx)
    torch._dynamo.config.recompile_limit = max(MANY, torch._dynamo.config.recompile_limit)
    own = model.unet.forward
    compiled = torch.compile(own, dynamic=False, options=None if on_cpu else {"triton.cudagraphs": True})
    seen: set[Any] = set()

    def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = sample.device.type
        key = (tuple(sample.shape), sample.dtype, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind))
        if key in seen:
            return compiled(sample, *args, **kwargs)
        clips = len(sample)
        _log.info("compiling the network for %d clip%s at once (--compile) ...", clips, "s" * (clips > 1))
        begun = time.monotonic()
        # freezing packs weights; as an option of torch.compile it comes too late. Warnings are torch's about itself.
        with inductor.patch(freezing=on_cpu), warnings.catch_warnings(action="ignore"):
            out = compiled(sample, *args, **kwargs)
        _log.info("compiled in %.0f s", time.monotonic() - begun)
        seen.add(key)
        return out

    model.unet.forward = forward  # type: ignore[method-assign]


def _require_compiler(configured: str | Sequence[str | None]) -> None:
    """Look for a compiler as inductor does: by its configured names."""
    names = [configured] if isinstance(configured, str) else configured
    if not any(name and shutil.which(name) for name in names):
        raise PersistWorldError(
            "no C++ compiler, which torch.compile needs on a CPU",
            where="--compile",
            fix="install one (apt install g++), or set CXX, or leave --compile out",
        )
