"""Checkpoints for tests: the bundled tiny model in every form, an adapter, and the command line on them.

The fixtures `base` and `adapter` (conftest.py) are made of them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from persistworld_cli.checkpoints.compatibility import parts_of, preset_shapes
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings, to_json
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.training.policy_switch import PolicySwitch

TINY = load_settings("tiny", (), {}, env={})
BASE, ADAPTER = TINY.model.ckpt, "bundled:presets/tiny/adapter"
Tensors = dict[str, torch.Tensor]


def bundled_model() -> WorldModel:
    """The bundled model, float32, without adapter."""
    return load_world_model(TINY.model, TINY.world, adapter="")


def write_run(run: Path) -> Path:
    """A post-training's folder, as far as weights go: adapter, saved state, settings. Returns the adapter's folder."""
    options = replace(TINY.post_train, lora_rank=4, lora_alpha=8)
    switch = PolicySwitch(bundled_model(), options)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in switch.parameters("old"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    switch.save_adapter(run / "weights" / "adapter", "old")
    step = run / "state" / "step-00000001"
    step.mkdir(parents=True)
    torch.save({"step": 1, "switch": switch.state(), "optimizers": [{"lr": 0.1}]}, step / "state.pt")
    settings = to_json(replace(TINY, post_train=options))
    (run / "config.json").write_text(json.dumps({"task": "post-train", "settings": settings}))
    return run / "weights" / "adapter"


def write_full_size(path: Path) -> Path:
    """A checkpoint of the full-size model that holds one number a tensor: shapes alone are real."""
    torch.save({k: torch.zeros(1).expand(shape) for k, shape in preset_shapes("ctrl-world").items()}, path)
    return path


def cli(*arguments: object, code: int = 0) -> Any:
    """``persistworld ARGUMENTS --json``: what it printed, or where a mistake is expected its standard error."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, (done.stderr, done.exception)
    if code:
        assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr if code else json.loads(done.stdout)


def part(tensors: Tensors, name: str) -> Tensors:
    """A part's tensors under its own names."""
    return {k.removeprefix(f"{name}."): v.contiguous() for k, v in tensors.items() if k.startswith(f"{name}.")}


def as_pt(tensors: Tensors, folder: Path) -> Path:
    ids = {"text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None]}  # transformers before 4.31
    torch.save({**tensors, **ids}, folder / "checkpoint-10000.pt")
    return folder / "checkpoint-10000.pt"


def as_old_pt(tensors: Tensors, folder: Path) -> Path:
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def as_safetensors(tensors: Tensors, folder: Path) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / "model.safetensors"))
    return folder


def as_shards(tensors: Tensors, folder: Path) -> Path:
    names = list(tensors)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in halves.items():
        save_file({k: tensors[k].contiguous() for k in own}, str(folder / file))
    index = {"weight_map": {k: file for file, own in halves.items() for k in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_diffusers(tensors: Tensors, folder: Path) -> Path:
    (folder / "model_index.json").write_text("{}")
    (folder / "svd.safetensors").write_bytes(b"the same in another format")
    for name in parts_of(tensors):
        (folder / name).mkdir()
        file = "model" if "encoder" in name else "diffusion_pytorch_model"
        save_file(part(tensors, name), str(folder / name / f"{file}.safetensors"))
        (folder / name / f"{file}.fp16.safetensors").write_bytes(b"the same in half precision")
    return folder
