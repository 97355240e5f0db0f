"""The UNet's lean blocks, float32 linears and compilation: the same numbers as diffusers' blocks."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import nn
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models import compiling
from persistworld_cli.models.cpu.convolutions import (
    ChannelsLastConv,
    TemporalConv,
    fold_temporal_convs,
    put_channels_last,
)
from persistworld_cli.models.cpu.exchange import exchanged
from persistworld_cli.models.cpu.lean_blocks import DIFFUSERS, LeanTransformer, make_blocks_lean
from persistworld_cli.models.cpu.linears import FastLinear
from persistworld_cli.models.cpu.native.build import without_kernels
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model


@pytest.fixture(scope="module")
def model() -> WorldModel:
    """The tiny preset's, with random weights of which none is at its neutral start."""
    settings = load_settings("tiny", [], {}).settings
    torch.manual_seed(0)
    made = build_world_model(settings.model, settings.world).eval()
    with torch.no_grad():
        for parameter in made.unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def predicted(model: WorldModel, clips: int = 2, seed: int = 1) -> torch.Tensor:
    """Raw output for random inputs."""
    g = torch.Generator().manual_seed(seed)
    shape, own = model.latent_shape, model.settings
    condition = Condition(
        history=torch.randn(clips, own.num_history, *shape, generator=g),
        current=torch.randn(clips, *shape, generator=g),
        tokens=torch.randn(clips, own.num_history + own.num_frames, own.token_dim, generator=g),
        noise_aug=0.02,
    )
    x = torch.randn(clips, own.num_frames, *shape, generator=g)
    return model.network(x, torch.tensor([1.0, 30.0])[:clips], condition)


@torch.no_grad()
def test_predictions_are_those_of_diffusers_blocks(model: WorldModel) -> None:
    ours = predicted(model)
    with exchanged(model.unet, DIFFUSERS):
        assert not any(isinstance(module, LeanTransformer) for module in model.unet.modules())
        theirs = predicted(model)
    assert any(isinstance(module, LeanTransformer) for module in model.unet.modules())
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_gradients_are_those_of_diffusers_blocks(model: WorldModel) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        predicted(model, 1).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.unet.named_parameters() if p.grad is not None}

    ours = gradients()
    with exchanged(model.unet, DIFFUSERS):
        theirs = gradients()
    # the queries and norms before a single token get a zero there and nothing here
    silent = {name for name in theirs if name not in ours}
    assert all(".attn2." in name or ".norm2." in name for name in silent)
    assert all(theirs[name].abs().max() < 1e-9 for name in silent)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-9, name
    model.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("channels", [(640, 64), (64, 640), (640, 640)])
def test_a_block_of_which_a_convolution_is_too_wide_for_the_kernels(channels: tuple[int, int], small: bool) -> None:
    # as in the full-size network: 640 and more come together where it goes up again
    torch.manual_seed(0)
    block = SpatioTemporalResBlock(*channels, temb_channels=32).eval()
    x, temb = torch.randn(4, channels[0], 8, 12), torch.randn(4, 32)
    frames = torch.zeros(2, 2)
    theirs = block(x, temb, frames)
    make_blocks_lean(block)
    put_channels_last(block)
    fold_temporal_convs(block)
    with torch.autocast("cpu", torch.bfloat16, enabled=small):
        ours = block(x, temb, frames)
    assert (ours - theirs).abs().max() < (5e-2 if small else 1e-5) * theirs.abs().max()


@torch.no_grad()
def test_no_convolution_has_to_reorder_its_input(model: WorldModel) -> None:
    seen: list[bool] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda conv, args: seen.append(
                (args[0].flatten(3) if args[0].ndim == 5 else args[0]).is_contiguous(memory_format=torch.channels_last)
            )
        )
        for name, module in model.unet.named_modules()
        if isinstance(module, ChannelsLastConv | TemporalConv) and name != "conv_in"
    ]
    with without_kernels():
        predicted(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks) and all(seen)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_as_a_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    x = torch.randn(3, 100, 24)
    grown = []
    for kind in (nn.Linear, FastLinear):
        plain.__class__ = kind
        plain.zero_grad()
        given = x.clone().requires_grad_(True)
        out = plain(given)
        out.square().sum().backward()
        assert given.grad is not None and plain.weight.grad is not None
        grown.append((out.detach(), given.grad, plain.weight.grad.clone()))
    for ours, theirs in zip(grown[1], grown[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_frozen_linear_keeps_no_input_for_its_gradient() -> None:
    layer = FastLinear(24, 40).requires_grad_(False)
    kept: list[torch.Size] = []
    x = torch.randn(300, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert x.shape not in kept and all(300 not in shape for shape in kept)


def test_compiled_is_the_same_and_says_when_it_compiles(caplog: pytest.LogCaptureFixture) -> None:
    settings = load_settings("tiny", [], {}).settings
    unet = {
        **settings.model.unet,
        "block_out_channels": [32],
        "down_block_types": ["DownBlockSpatioTemporal"],
        "up_block_types": ["UpBlockSpatioTemporal"],
        "num_attention_heads": [1],
    }
    torch.manual_seed(0)
    made = build_world_model(replace(settings.model, unet=unet), settings.world).eval().requires_grad_(False)
    plain = predicted(made, 1)
    with caplog.at_level(logging.INFO, logger="persistworld_cli"):
        compiling.compile_network(made)
        first, again = predicted(made, 1), predicted(made, 1)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" in ")[0] for text in said] == [
        "compiling the network for 1 clip at once (--compile) ...",
        "compiled",
    ]
    assert torch.equal(first, again) and torch.allclose(first, plain, atol=1e-5)


@pytest.mark.parametrize("command", ["eval", "frontier", "replay", "drive", "pi-rollout"])
def test_compile_is_a_flag_of_what_samples(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--compile", "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["launch.compile"] == {"value": True, "origin": "--compile"}


def test_two_finished_results_are_not_compiled() -> None:
    told = CliRunner().invoke(app, ["eval", "--compare", "a", "--compare", "b", "--compile"])
    assert told.exit_code == 2 and "nothing is run" in told.stderr


def test_without_a_compiler_compilation_is_refused(monkeypatch: pytest.MonkeyPatch, model: WorldModel) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PersistWorldError, match=r"no C\+\+ compiler"):
        compiling.compile_network(model)
