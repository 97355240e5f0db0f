"""The UNet's fused blocks and compilation: the same numbers as diffusers' blocks."""

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
from persistworld_cli.models.cpu.fused_blocks import FusedTransformer
from persistworld_cli.models.cpu.hook import as_diffusers, speed_up
from persistworld_cli.models.cpu.native.build import without_kernels
from persistworld_cli.models.layers import TemporalConv, fold_temporal_convs
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model


@pytest.fixture(scope="module")
def model() -> WorldModel:
    """The tiny preset's, with random weights of which none is at its neutral start."""
    settings = load_settings("tiny", [], {})
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
    with as_diffusers(model.unet):
        assert not any(isinstance(module, FusedTransformer) for module in model.unet.modules())
        theirs = predicted(model)
    assert any(isinstance(module, FusedTransformer) for module in model.unet.modules())
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_gradients_are_those_of_diffusers_blocks(model: WorldModel) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        predicted(model, 1).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.unet.named_parameters() if p.grad is not None}

    ours = gradients()
    with as_diffusers(model.unet):
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
    fold_temporal_convs(block)
    speed_up(block)
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
        if isinstance(module, nn.Conv2d | TemporalConv) and name != "conv_in"
    ]
    with without_kernels():
        predicted(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(hooks) and all(seen)


def test_compiled_is_the_same_and_says_when_it_compiles(caplog: pytest.LogCaptureFixture) -> None:
    settings = load_settings("tiny", [], {})
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
