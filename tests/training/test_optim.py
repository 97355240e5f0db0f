"""Optimisers and the group sizes of small models' norms."""

import copy

import pytest
import torch
from torch import nn

from persistworld_cli.models.layers import set_norm_groups
from persistworld_cli.training.optim import Optimizers, inputs_and_outputs


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.inner = nn.Conv2d(8, 8, 3)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.inner(self.conv_in(x)).mean((2, 3)))


def made(seed: int = 0) -> tuple[Small, Optimizers]:
    torch.manual_seed(seed)
    model = Small()
    return model, Optimizers(model.parameters(), "muon", lr=1e-2, weight_decay=0.1, by_adamw=inputs_and_outputs(model))


def learn(model: Small, optimizers: Optimizers, updates: int) -> None:
    for k in range(updates):
        x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(k))
        model(x).pow(2).mean().backward()
        optimizers.step()


def test_kernels_are_stepped_as_matrices() -> None:
    model, optimizers = made()
    flat = nn.Parameter(model.inner.weight.detach().clone().flatten(1))
    alone = torch.optim.Muon([flat], adjust_lr_fn="match_rms_adamw", lr=1e-2, weight_decay=0.1)
    model(torch.ones(2, 3, 9, 9)).pow(2).mean().backward()
    assert model.inner.weight.grad is not None
    flat.grad = model.inner.weight.grad.flatten(1).clone()
    optimizers.step()
    alone.step()
    assert torch.equal(model.inner.weight.flatten(1), flat)
    assert model.inner.weight.grad is None and model.linear.bias.grad is None


def test_first_and_last_layers_and_vectors_go_to_adamw() -> None:
    _, optimizers = made()
    muon, adamw = optimizers.all
    assert sum(len(g["params"]) for g in muon.param_groups) == 2  # inner.weight, linear.weight
    assert sum(len(g["params"]) for g in adamw.param_groups) == 4


def test_state_goes_on_where_it_stopped() -> None:
    whole, optimizers = made()
    learn(whole, optimizers, 2)
    saved, weights = copy.deepcopy(optimizers.state()), copy.deepcopy(whole.state_dict())
    learn(whole, optimizers, 3)
    again, fresh = made(seed=1)
    again.load_state_dict(weights)
    fresh.load_state(saved)
    learn(again, fresh, 3)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_changed_setting_of_a_step_outlives_the_saved_state() -> None:
    whole, optimizers = made()
    learn(whole, optimizers, 1)
    options = {"weight_decay": 0.3, "betas": (0.8, 0.7), "scale": "original"}
    ends = inputs_and_outputs(whole)
    changed = Optimizers(whole.parameters(), "muon", lr=1e-2, by_adamw=ends, **options)  # type: ignore[arg-type]
    changed.load_state(copy.deepcopy(optimizers.state()))
    muon, adamw = (optimizer.param_groups[0] for optimizer in changed.all)
    assert muon["weight_decay"] == adamw["weight_decay"] == 0.3
    assert muon["adjust_lr_fn"] == "original" and adamw["betas"] == (0.8, 0.7)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="sgd"):
        Optimizers([], "sgd", lr=1.0, weight_decay=0.0)


def test_groups_keep_the_difference_between_channels() -> None:
    """One channel a group takes every channel's mean out, so that two plain colours become the same."""
    norm = nn.Sequential(nn.GroupNorm(8, 8))
    red, blue = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)
    red[:, 0], blue[:, 1] = 1, 1
    assert torch.equal(norm(red), norm(blue))
    set_norm_groups(norm, 2)
    assert not torch.allclose(norm(red), norm(blue), atol=0.1)
    with pytest.raises(ValueError, match="8 channels in 3 groups"):
        set_norm_groups(norm, 3)


def test_the_scale_of_muon_s_step_is_as_named() -> None:
    """LoRA A (64, 1280): the original step, orthogonal, and AdamW's size, 0.2 sqrt(1280) = 7.2 times as large."""
    gradient = torch.randn(64, 1280, generator=torch.Generator().manual_seed(0))
    steps = {}
    for scale in ("original", "match_rms_adamw"):
        a = torch.nn.Parameter(torch.zeros(64, 1280))
        a.grad = gradient.clone()
        Optimizers([a], "muon", lr=1.0, weight_decay=0.0, scale=scale).step()
        steps[scale] = a.detach().norm().item()
    assert steps["match_rms_adamw"] / steps["original"] == pytest.approx(0.2 * 1280**0.5, rel=1e-3)
