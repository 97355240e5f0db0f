"""The fused LoRA layers are peft's own, to rounding: outputs, gradients, switching."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from persistworld_cli.models.cpu.hook import speed_up
from persistworld_cli.models.cpu.layers import effective_weight
from persistworld_cli.models.cpu.lora_layers import FUSED_LORA
from persistworld_cli.models.layers import fold_temporal_convs

INPUTS = {"linear": (2, 3, 8), "conv": (2, 8, 6, 5), "temporal": (1, 8, 4, 6, 5)}
FOR_KERNELS = {"linear": (2, 90, 16), "conv": (2, 16, 13, 12), "temporal": (1, 16, 5, 9, 8)}


def layers(width: int = 8, wide: int = 12) -> nn.ModuleDict:
    """A layer of each kind with two adapters, B not zero, as the world model has them."""
    from peft import LoraConfig, inject_adapter_in_model  # not before the package has made torchvision importable

    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(width, wide),
            "conv": nn.Conv2d(width, wide, 3, padding=1),
            "temporal": nn.Conv3d(width, wide, (3, 1, 1), padding=(1, 0, 0)),
        }
    )
    fold_temporal_convs(net)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=list(INPUTS), bias="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        for name in ("one", "two"):
            inject_adapter_in_model(config, net, adapter_name=name)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return net


@pytest.mark.parametrize("kind", list(INPUTS))
@pytest.mark.parametrize("small", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("native", [False, True], ids=["too small for kernels", "for kernels"])
def test_same_outputs_and_gradients(kind: str, small: bool, native: bool) -> None:
    net = layers(16, 32) if native else layers()
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)  # as PolicySwitch has it
    x = torch.randn((FOR_KERNELS if native else INPUTS)[kind], requires_grad=True)

    def run(adapter: str) -> list[torch.Tensor]:
        layer = net[kind]
        layer.enable_adapters(adapter != "none")
        if adapter != "none":
            layer.set_adapter(adapter)
        with torch.autocast("cpu", torch.bfloat16, enabled=small):
            out = layer(x)
        (out.float() ** 2).mean().backward()
        grads = [p.grad.clone() for p in [x, *layer.parameters()] if p.grad is not None]
        net.zero_grad()
        x.grad = None
        return [out.detach().float(), *grads]

    before = {adapter: run(adapter) for adapter in ("one", "two", "none")}
    speed_up(net)
    assert type(net[kind]) in FUSED_LORA.values()
    bound = {"rtol": 5e-2, "atol": 0.3} if small else {"rtol": 1e-4, "atol": 1e-5}
    for adapter, wanted in before.items():
        got = run(adapter)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **bound)
    assert not torch.equal(before["one"][0], before["two"][0])


def test_what_is_unusual_is_left_to_peft() -> None:
    net = layers()
    x = torch.randn(INPUTS["linear"])
    layer = net["linear"]
    layer.set_adapter(["one", "two"])
    both = layer(x)
    speed_up(net)
    torch.testing.assert_close(layer(x), both)
    layer.merge()
    torch.testing.assert_close(layer(x), both, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", list(INPUTS))
def test_a_layer_says_its_weight_only_while_it_samples_with_one_adapter(kind: str) -> None:
    net = layers(16, 32)
    layer, x = net[kind], torch.randn(FOR_KERNELS[kind])
    layer.set_adapter("one")
    wanted = layer(x)
    assert effective_weight(layer) is None  # of a layer with more than its own weight, unless it answers itself
    speed_up(net)
    assert effective_weight(layer) is None
    layer.merging = True
    bare = layer.base_layer
    merged, own = effective_weight(layer), bare.weight
    assert merged is not None and not torch.equal(merged, own)
    bare.weight = nn.Parameter(merged)
    torch.testing.assert_close(bare(x), wanted, rtol=1e-4, atol=1e-5)
    bare.weight = own
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        assert effective_weight(layer) is None
    layer.set_adapter(["one", "two"])
    assert effective_weight(layer) is None
    layer.enable_adapters(False)
    assert effective_weight(layer) is own
