"""The golden tiny model, built and loaded once for the tests that compare with it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from persistworld_cli.config.settings import ModelSettings, WorldSettings
from persistworld_cli.models.world_model import WorldModel, build_world_model


@functools.cache
def golden_model(golden: Path, text_cond: bool = True, history_cond_zero: bool = False) -> WorldModel:
    """Golden section B's model with its weights, in eval mode."""
    from safetensors.torch import load_file

    config = json.loads((golden / "tiny_configs.json").read_text())
    settings = ModelSettings(
        unet=config["unet"],
        vae=config["vae"],
        text=config["text_encoder"],
        image=config["image_encoder"],
        text_cond=text_cond,
        history_cond_zero=history_cond_zero,
    )
    model = build_world_model(settings, WorldSettings(height=64, width=128))
    model.load_state_dict(load_file(str(golden / "tiny_ctrl_world.safetensors")))
    return model.eval()


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()
