"""What the traces must catch is caught, and what a card accepts is not, in layers of a few numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_trace import CUDA, CudaTrace, cuda_trace, require_no_wait_in_a_loop, without_weights
from torch import nn

from persistworld_cli.config.presets import load_settings
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.metrics.score import _require_finite
from persistworld_cli.models.precision import small_products
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import Inputs, RolloutEngine

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is no CUDA build (.ci/traces gets one)")


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(4, 4, dtype=dtype, device="meta").to_empty(device=CUDA)


def test_mixed_devices_and_types() -> None:
    with cuda_trace():
        x = torch.ones(2, 4, device=CUDA)
        with pytest.raises(RuntimeError, match=r"cuda.*cpu|cpu.*cuda"):
            layer()(x) + torch.ones(2, 4)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.bfloat16)(x)
        with small_products(CUDA, torch.bfloat16, torch.float32):  # as a card does, and as none does without one
            assert layer(torch.bfloat16)(x).dtype is layer()(x).dtype is torch.bfloat16
        assert (x * torch.tensor(2.0)).device.type == "cuda"  # a number on the CPU is an argument of a kernel


def sample(planted: Callable[[WorldModel], object] = lambda model: None, history: torch.device = CUDA) -> CudaTrace:
    """Two calls of the small network by the engine, with a fault."""
    settings = load_settings("tiny", ["sampling.steps=2", "sampling.dtype=float32"], {})
    with cuda_trace() as trace:
        model = without_weights(settings.model, settings.world)
        planted(model)
        engine = RolloutEngine(model, settings.sampling, ActionStat(np.zeros(7), np.ones(7)))
        past, frame = settings.model.num_history, model.latent_shape
        inputs = Inputs(
            history=torch.zeros(1, past, *frame, device=history),
            current=torch.zeros(1, *frame, device=CUDA),
            actions=torch.zeros(1, past + settings.model.num_frames, 7, device=CUDA),
            text=torch.zeros(1, model.text_encoder.text_projection.out_features, device=CUDA),
        )
        engine.sample(engine.condition(inputs), torch.zeros(1, *engine.noise_shape))
    return trace


def test_faults_in_the_engine() -> None:
    require_no_wait_in_a_loop(sample())

    def reads(model: WorldModel) -> None:
        network = model.network
        model.network = lambda x, sigma, condition: (x.mean().item(), network(x, sigma, condition))[1]

    with pytest.raises(AssertionError, match=r"models/world_model\.py:\d+': 2"):
        require_no_wait_in_a_loop(sample(reads))
    with pytest.raises(RuntimeError, match="cpu"):
        sample(history=torch.device("cpu"))

    def rounds_a_kernel(model: WorldModel) -> None:
        model.unet.conv_out.weight = nn.Parameter(model.unet.conv_out.weight.bfloat16(), requires_grad=False)

    with pytest.raises(RuntimeError, match="mixed dtypes"):
        sample(rounds_a_kernel)


def waits(trace: CudaTrace, x: torch.Tensor, times: int, *, in_loop: bool) -> None:
    for _ in range(times if in_loop else 1):
        _require_finite([x], ["x"])  # waits once, in the package


def test_waits_in_a_loop() -> None:
    with cuda_trace() as trace:
        x = torch.ones(3, device=CUDA)
        waits(trace, x, 3, in_loop=False)
        require_no_wait_in_a_loop(trace)
        waits(trace, x, 3, in_loop=True)
    with pytest.raises(AssertionError, match=r"metrics/score\.py:\d+': 4"):
        require_no_wait_in_a_loop(trace)


def test_what_makes_the_host_wait() -> None:
    with cuda_trace() as trace:
        x = torch.ones(3, device=CUDA)

        def count() -> int:
            found = trace.waits.total()
            trace.waits.clear()
            return found

        count()
        x.mean().item(), float(x[0]), x.tolist(), x.cpu(), x.to("cpu"), torch.ones(3).to(CUDA), x[[0, 1]]
        assert count() == 7
        torch.tensor([1.0, 2.0], device=CUDA)
        assert count() == 1
        torch.ones(3).to(CUDA, non_blocking=True), torch.ones(3, device=CUDA), x.new_full((2,), 3.0), x * 2.0
        x[torch.tensor([0, 1]).to(CUDA, non_blocking=True)], x[1:], torch.ones(3).tolist()
        assert count() == 0
        with pytest.raises(RuntimeError):
            x[x > 0]  # the number of rows is on the card
        assert count() == 1


def test_bytes_alive() -> None:
    with cuda_trace() as trace:
        x = torch.ones(1024, device=CUDA)
        y = x.view(2, 512) * 2
        assert trace.bytes.alive == 8192
        del x
        assert trace.bytes.alive == 4096 and trace.bytes.peak == 8192
        del y
    assert trace.bytes.alive == 0
