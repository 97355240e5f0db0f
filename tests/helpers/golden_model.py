"""The reference's tiny model and inputs, drawn again from their seeds, and its numbers as `tests/golden` keeps them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from golden_files import SHIPPED

from persistworld_cli.config.settings import ModelSettings, WorldSettings
from persistworld_cli.models.world_model import WorldModel, build_world_model


def reference_model(text_cond: bool = True, history_cond_zero: bool = False) -> ModelSettings:
    """Settings of golden section B's model."""
    config = json.loads((SHIPPED / "tiny_model.json").read_text())
    return ModelSettings(
        unet=config["unet"],
        vae=config["vae"],
        text=config["text_encoder"],
        image=config["image_encoder"],
        text_cond=text_cond,
        history_cond_zero=history_cond_zero,
    )


@functools.cache
def golden_model(text_cond: bool = True, history_cond_zero: bool = False, encoder: Path | None = None) -> WorldModel:
    """Golden section B's model with its weights, in eval mode; not to be changed.

    The seed gives all but the three matrices of the action encoder: those are read from ``encoder``, else are ours.
    """
    from safetensors.torch import load_file

    model = build_world_model(reference_model(text_cond, history_cond_zero), WorldSettings(height=64, width=128))
    model.load_state_dict(reference_weights(model) if encoder is None else load_file(str(encoder)))
    return model.eval()


def reference_weights(model: WorldModel) -> dict[str, torch.Tensor]:
    """The weights that the reference's runs began from: normal numbers of one seed, in the order of the names."""
    generator = torch.Generator().manual_seed(99)
    state = model.state_dict()
    for name, weight in sorted(state.items()):
        if name.startswith("action_encoder") and weight.ndim == 2:
            continue
        drawn = torch.randn(weight.shape, generator=generator)
        if name.endswith("class_embedding"):
            drawn *= 0.3
        elif weight.ndim > 1:
            drawn *= (0.6 if name.endswith(("visual_projection.weight", "text_projection.weight")) else 1.0) * (
                weight[0].numel() ** -0.5
            )
        elif name.endswith("weight"):
            drawn = 1 + 0.15 * drawn
        elif not name.endswith("mix_factor"):
            drawn *= 0.1
        state[name] = drawn
    return state


def thinned(got: torch.Tensor, step: int = 61) -> torch.Tensor:
    """The numbers of an output that are shipped: one in ``step``."""
    return got.flatten()[::step]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()
