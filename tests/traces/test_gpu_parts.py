"""The parts of `python -m benchmarks --gpu` mix no devices and types: those of sampling, at the small size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_trace import CUDA, cuda_trace, without_weights

from benchmarks import gpu_parts
from persistworld_cli.config.settings import Settings

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is no CUDA build (.ci/traces gets one)")


def test_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):  # they ask the card, and there is none
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2**30)
    load = gpu_parts.load_for_sampling

    def loaded(settings: Settings, *, device: str, **how: Any) -> Any:
        if device == "cpu":
            return load(settings, device=device, **how)
        return without_weights(settings.model, settings.world)

    monkeypatch.setattr(gpu_parts, "load_for_sampling", loaded)
    bench = gpu_parts.Bench("tiny", CUDA, tmp_path, tmp_path / "world", time.time() + 600)
    bench.settings("tiny")  # its weights and recordings, before the trace
    every = gpu_parts.parts("tiny")
    names = [name for name in every if name.startswith(("call in", "decoding in")) and "tiny" in name]
    names += ["call", "interaction, 4 calls", "decoding", "interaction, 8 calls, 8 rollouts together"]
    with cuda_trace():
        made = {name: list(every[name].run(bench, name)) for name in names}
    for name in names[-4:]:
        (found,) = made[name]
        assert found.values and found.bytes == 2**30, name
    assert all(found.values for (found,) in made.values())
