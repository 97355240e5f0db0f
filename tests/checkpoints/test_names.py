"""Weights under the names that other tools give them, and beside what they save with them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import TINY, Tensors, part
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file

from persistworld_cli.checkpoints.adapters import Adapter, adapter_misfit, read_adapter
from persistworld_cli.checkpoints.compatibility import preset_shapes
from persistworld_cli.checkpoints.loading import load_vae, load_world_model
from persistworld_cli.checkpoints.names import read_names
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles, tensors_in
from persistworld_cli.config import weight_names
from persistworld_cli.errors import PersistWorldError

NAMES = list(preset_shapes("tiny"))
MARKED = {name: torch.tensor([float(number)]) for number, name in enumerate(NAMES)}  # each tensor is its name's number

# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "removed"),
    [
        (lambda name: name, set()),
        (lambda name: f"module.{name}", {"module."}),
        (lambda name: f"_orig_mod.module.model.{name}", {"_orig_mod.module.model."}),
        (lambda name: re.sub(r"^unet\.", "unet._orig_mod.", name), {"_orig_mod."}),
        (lambda name: re.sub(r"^(unet|vae)\.", r"model.\1.module.", name), {"model.", "module."}),
        (lambda name: re.sub(r"(down_blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", f"a.{name}"), None),
        (lambda name: name.replace("unet.", "unet.base_model.model.", 1), {"base_model.model."}),
    ],
)
def test_what_all_names_at_a_place_share_is_removed(rename: Callable[[str], str], removed: set[str] | None) -> None:
    given = [rename(name) for name in NAMES]
    naming = read_names(given)
    assert not naming.unknown and [naming.names[name] for name in given] == NAMES
    assert removed is None or naming.removed.keys() == removed


@pytest.mark.parametrize("wrapper", ["", "module.", "vae.", "text_encoder._orig_mod."])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "action_encoder"])
def test_a_part_alone_is_known_without_its_name(name: str, wrapper: str) -> None:
    own = [key.removeprefix(f"{name}.") for key in NAMES if key.startswith(f"{name}.")]
    assert [*read_names([wrapper + key for key in own]).names.values()] == [f"{name}.{key}" for key in own]


def test_names_of_no_model_stay() -> None:
    assert read_names(["layer.weight", "a.b"]).unknown == ["layer.weight", "a.b"]
    one = read_names(["extra", *(f"module.{name}" for name in NAMES)])
    assert one.unknown == ["extra"] and one.names["module.vae.quant_conv.bias"] == "vae.quant_conv.bias"
    twice = [*NAMES, *(f"ema.{name}" for name in NAMES)]
    assert read_names(twice).unknown == twice


# -- what is saved beside weights ------------------------------------------------------------------------------------


def wrapped(prefix: str) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in MARKED.items()}


SAVED: dict[str, Any] = {
    "numpy": {**MARKED, "best": np.float64(0.5), "seen": np.int64(3), "mean": np.arange(3.0)},
    "step": {"model": wrapped("module."), "step": 3, "lr": np.float32(0.1)},
    "optimizer": {
        "model_state_dict": MARKED,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": [{"params": [0]}]},
        "rng": torch.zeros(3, dtype=torch.uint8),
    },
    "named optimizer": {"m": MARKED, "optim": {"state": {NAMES[0]: {"exp_avg": torch.zeros(1)}}}},
    "parts": {name: part(MARKED, name) for name in ("unet", "vae", "text_encoder", "action_encoder")},
    "lightning": {"state_dict": wrapped("model."), "epoch": 2, "callbacks": {}},
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", SAVED)
def test_only_the_weights_of_a_file_are_read(kind: str, old: bool, tmp_path: Path) -> None:
    torch.save(SAVED[kind], tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    assert WeightFiles(locate(tmp_path)).load() == MARKED


def test_two_sets_of_weights_are_told_apart(tmp_path: Path) -> None:
    torch.save({"model": wrapped("module."), "ema": {k: v + 1 for k, v in MARKED.items()}}, tmp_path / "w.pt")
    with pytest.raises(PersistWorldError, match="2 sets of weights in the file: model, ema") as error:
        WeightFiles(locate(tmp_path))
    assert error.value.fix == f"name one: {tmp_path / 'w.pt'}:model"
    assert WeightFiles(locate(f"{tmp_path / 'w.pt'}:model")).load() == MARKED
    assert WeightFiles(locate(f"{tmp_path / 'w.pt'}:ema")).load()[NAMES[3]] == 4
    with pytest.raises(PersistWorldError, match="no 'other' in the file"):
        WeightFiles(locate(f"{tmp_path / 'w.pt'}:other"))
    torch.save({**MARKED, "ema": MARKED}, tmp_path / "outer.pt")
    assert WeightFiles(locate(f"{tmp_path / 'outer.pt'}:.")).load() == MARKED


def test_what_could_run_code_is_named_with_the_command_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": MARKED, "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(PersistWorldError, match=r"more than tensors \(argparse.Namespace, which could run") as error:
        WeightFiles(locate(path))
    command = str(error.value.fix).partition('python -c "')[2].rstrip('"')
    exec(command, {})
    assert WeightFiles(locate(tmp_path / "w-tensors.pt")).load() == MARKED
    assert list(tensors_in(torch.nn.Linear(1, 1))) == ["weight", "bias"]
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(path))
    with pytest.raises(PersistWorldError, match="a TorchScript program"):
        WeightFiles(locate(path))


def test_loaded_weights_are_the_same_and_the_reading_is_reported(
    base: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_names, "READINGS", [])
    path, extra = tmp_path / "w.pt", tmp_path / "extra.pt"
    prefixed = {f"module.{name}": tensor for name, tensor in base.items()}
    torch.save({"state_dict": prefixed, "best": np.float64(0.1)}, path)
    with caplog.at_level("INFO", logger="persistworld_cli"):
        loaded = load_world_model(TINY.model, TINY.world, ckpt=str(path), adapter="").state_dict()
        vae = load_vae(TINY.model, str(path)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.items())
    assert all(torch.equal(vae[name], tensor) for name, tensor in part(base, "vae").items())
    read = [f"{path}: 'state_dict.module.' removed from 914 tensor names", f"{path}: skipped, beside the weights: best"]
    assert read == weight_names.READINGS and caplog.messages == read
    torch.save({**prefixed, "module.loss.weight": torch.zeros(1)}, extra)
    with pytest.raises(PersistWorldError, match=r"1 unexpected \(first: module.loss.weight\)") as error:
        load_world_model(TINY.model, TINY.world, ckpt=str(extra))
    assert "without the unexpected tensors it fits; to leave them out: python -c" in str(error.value.fix)


# -- adapters of other tools -----------------------------------------------------------------------------------------


def peft_layers(adapter: Path) -> Tensors:
    """The adapter's tensors under ``LAYER.lora_A.weight``."""
    lora = load_file(str(adapter / "adapter_model.safetensors"))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in lora.items()}


def as_kohya(layers: Tensors, alpha: float | None = None) -> Tensors:
    made: Tensors = {}
    for name, tensor in layers.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".")
        stem = f"lora_unet_{layer.replace('.', '_')}"
        made[f"{stem}.lora_{'down' if side == 'lora_A' else 'up'}.weight"] = tensor
        if alpha is not None:
            made[f"{stem}.alpha"] = torch.tensor(alpha)
    return made


def as_oldest(layers: Tensors) -> Tensors:
    """The attention processors of diffusers before 0.20."""
    ends = {".lora_A.weight": "_lora.down.weight", ".lora_B.weight": "_lora.up.weight"}
    made: Tensors = {}
    for name, tensor in layers.items():
        home, _, rest = name.partition(".to_")
        which = rest[: rest.index(".lora_")].removesuffix(".0")
        made[f"unet.{home}.processor.to_{which}{ends[name[name.index('.lora_') :]]}"] = tensor
    return made


@pytest.mark.parametrize(
    ("write", "alpha"),
    [
        (lambda own: {f"unet.{k}": v for k, v in own.items()}, 4),
        (lambda own: {f"unet.{k}": v for k, v in convert_state_dict_to_diffusers(own).items()}, 4),
        (as_oldest, 4),
        (as_kohya, 4),
        (lambda own: as_kohya(own, 8.0), 8),
        (lambda own: as_kohya(own, 0.5), 0.5),
    ],
)
def test_a_lora_file_of_another_tool_is_the_adapter(
    write: Callable[[Tensors], Tensors], alpha: float, adapter: Path, tmp_path: Path
) -> None:
    layers = {name: tensor for name, tensor in peft_layers(adapter).items() if ".to_" in name}
    save_file({name: tensor.contiguous() for name, tensor in write(layers).items()}, str(tmp_path / "my.safetensors"))
    read = read_adapter(locate(tmp_path))
    assert read.config.target_modules == {name.partition(".lora_")[0] for name in layers} and not read.encoder
    assert read.lora.keys() == {f"base_model.model.{name}" for name in layers}
    assert all(torch.equal(read.lora[f"base_model.model.{name}"], tensor) for name, tensor in layers.items())
    assert (read.config.r, read.config.lora_alpha, read.config.alpha_pattern) == (4, alpha, {})


def scales(read: Adapter) -> dict[str, float]:
    """Layer -> alpha / rank, as peft sets them."""
    from peft import PeftModel

    from persistworld_cli.models.unet import FrameLevelUNet

    with torch.device("meta"):
        wrapped = PeftModel(FrameLevelUNet(**TINY.model.unet), read.config, low_cpu_mem_usage=True)
    return {name: m.scaling["default"] for name, m in wrapped.named_modules() if hasattr(m, "scaling")}


def test_an_adapter_on_the_whole_model_and_ranks_of_their_own(adapter: Path, tmp_path: Path) -> None:
    whole, mixed = tmp_path / "whole", tmp_path / "mixed.safetensors"
    whole.mkdir()
    layers = peft_layers(adapter)
    save_file({f"base_model.model.unet.{k}": v for k, v in layers.items()}, str(whole / "adapter_model.safetensors"))
    (whole / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ".*unet.*", '
        '"alpha_pattern": {"unet.mid_block.*to_q": 16}}'
    )
    read = read_adapter(locate(whole))
    assert adapter_misfit(read, TINY.model) == "" and all(torch.equal(v, layers[k[17:]]) for k, v in read.lora.items())
    assert {name.endswith("to_q") and "mid_block" in name for name, own in scales(read).items() if own == 4} == {True}
    first = next(iter(layers)).partition(".lora_")[0]
    for name in [name for name in layers if name.startswith(f"{first}.")]:
        layers[name] = layers[name][:2] if ".lora_A." in name else layers[name][:, :2]
    save_file({name: tensor.contiguous() for name, tensor in as_kohya(layers).items()}, str(mixed))
    read = read_adapter(locate(mixed))
    assert adapter_misfit(read, TINY.model) == "" and set(scales(read).values()) == {1.0}


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"base_model.model.{name}", r"nothing says their alpha \(rank 4\)"),
        (lambda name: f"unet.{name.replace('lora_A', 'hada_w1_a')}", "change no layer of the UNet by LoRA"),
        (lambda name: f"lora_te_{name}".replace(".lora_A", ".lora_down"), r"no layer of the UNet .*first: lora_te_"),
        (lambda name: f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{name[-13:]}", "of the UNet by LoRA"),
    ],
)
def test_an_adapter_that_leaves_a_doubt_is_refused(
    rename: Callable[[str], str], said: str, adapter: Path, tmp_path: Path
) -> None:
    tensors = {rename(name): tensor for name, tensor in peft_layers(adapter).items()}
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(PersistWorldError, match=said) as error:
        read_adapter(locate(tmp_path))
    if "alpha" in said:
        settings = str(error.value.fix).partition("echo '")[2].partition("'")[0].replace("ALPHA", "8")
        (tmp_path / "adapter_config.json").write_text(settings)
        assert adapter_misfit(read_adapter(locate(tmp_path)), TINY.model) == ""


@pytest.mark.parametrize("alpha", [torch.tensor(float("nan")), torch.tensor(0.0), torch.ones(2)])
def test_a_damaged_alpha_is_refused(alpha: torch.Tensor, adapter: Path, tmp_path: Path) -> None:
    tensors = as_kohya(peft_layers(adapter), 8.0)
    tensors[next(name for name in tensors if name.endswith(".alpha"))] = alpha
    save_file(tensors, str(tmp_path / "my.safetensors"))
    with pytest.raises(PersistWorldError, match="the adapter is damaged"):
        read_adapter(locate(tmp_path))
