"""Weights in: every form of a checkpoint, what does not fit, and bad files."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    BASE,
    TINY,
    Tensors,
    as_diffusers,
    as_old_pt,
    as_pt,
    as_safetensors,
    as_shards,
    cli,
    part,
    write_full_size,
)
from safetensors.torch import load_file, save_file

from persistworld_cli.checkpoints.loading import OPTIONAL, SCALING_NOTE, load_vae, load_world_model
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.config.presets import load_settings
from persistworld_cli.errors import PersistWorldError

# -- every form of a checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [as_pt, as_old_pt, as_safetensors, as_shards, as_diffusers])
def test_every_form_loads_the_same(write: Callable[[Tensors, Path], Path], base: Tensors, tmp_path: Path) -> None:
    path = write(base, tmp_path)
    loaded = load_world_model(TINY.model, TINY.world, ckpt=str(path), adapter="")
    assert not loaded.training and not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[k], v) for k, v in base.items())
    ids = dict(loaded.named_buffers())["text_encoder.text_model.embeddings.position_ids"]
    assert torch.equal(ids, torch.arange(77)[None])
    vae = load_vae(TINY.model, str(path)).state_dict()
    assert all(torch.equal(vae[k], v) for k, v in part(base, "vae").items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_asked_for_is_that_of_every_weight(dtype: torch.dtype, base: Tensors, adapter: Path) -> None:
    loaded = load_world_model(TINY.model, TINY.world, adapter="", dtype=dtype).state_dict()
    assert all(v.dtype == dtype and torch.equal(v, base[k].to(dtype)) for k, v in loaded.items())
    merged = load_world_model(TINY.model, TINY.world, adapter=str(adapter), dtype=dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype}


def test_a_vae_alone_loads_under_either_name(base: Tensors, tmp_path: Path) -> None:
    own = part(base, "vae")
    save_file(own, str(tmp_path / "diffusion_pytorch_model.safetensors"))
    save_file({f"vae.{k}": v for k, v in own.items()}, str(tmp_path / "vae.safetensors"))
    for file in ("diffusion_pytorch_model.safetensors", "vae.safetensors"):
        loaded = load_vae(TINY.model, str(tmp_path / file)).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in own.items())
        described = cli("inspect", tmp_path / file)
        assert described["kind"] == "VAE" and "tiny" in described["fits"] and "unet" in described["lacks"]
        with pytest.raises(PersistWorldError, match="keys missing") as error:
            load_world_model(TINY.model, TINY.world, ckpt=str(tmp_path / file))
        assert re.search(r"this is only a VAE \(preset .*tiny\): give it with --vae", str(error.value.fix))
    full = load_settings("ctrl-world", (), {}, env={})
    with pytest.raises(PersistWorldError, match="does not fit this preset's VAE") as error:
        load_vae(full.model, str(tmp_path / "vae.safetensors"))
    assert re.fullmatch(r"it fits preset .*tiny: --preset \S+", str(error.value.fix))


def test_a_vae_of_another_scale_than_the_presets_is_told(
    base: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for measured, told in (("0.25", False), ("0.5", True)):
        caplog.clear()
        save_safetensors(tmp_path / "vae.safetensors", part(base, "vae"), {SCALING_NOTE: measured})
        load_vae(TINY.model, str(tmp_path / "vae.safetensors"))
        assert ("standard deviation of 0.50 instead of 1" in caplog.text) is told
        assert ("--set model.vae.scaling_factor=0.5" in caplog.text) is told


def test_pretraining_starts_from_a_folder_without_text_and_action_encoder(
    base: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    svd, clip = tmp_path / "svd", tmp_path / "clip"
    svd.mkdir()
    clip.mkdir()
    as_diffusers({k: v for k, v in base.items() if k.startswith(("unet.", "vae."))}, svd)
    images = {"vision_model.x": torch.zeros(1), "logit_scale": torch.zeros(1)}
    save_file({**part(base, "text_encoder"), **images}, str(clip / "model.safetensors"))
    told = cli("inspect", svd)
    assert told["kind"] == "diffusers folder" and told["lacks"] == ["text_encoder", "action_encoder"]
    model = replace(TINY.model, tokenizer=str(clip))
    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="persistworld_cli"):
        loaded = load_world_model(model, TINY.world, ckpt=str(svd), optional=OPTIONAL).state_dict()
    assert "has no action encoder: it starts with random weights" in caplog.text
    assert "has no text encoder: using CLIP's from" in caplog.text
    random = [k for k, v in base.items() if not torch.equal(loaded[k], v)]
    assert random and all(k.startswith("action_encoder.") for k in random)
    assert all(v.isfinite().all() and v.abs().max() < 1 for v in part(loaded, "action_encoder").values())
    with pytest.raises(PersistWorldError, match="none with the tokenizer"):
        load_world_model(TINY.model, TINY.world, ckpt=str(svd), optional=OPTIONAL)
    with pytest.raises(PersistWorldError, match="keys missing") as error:
        load_world_model(model, TINY.world, ckpt=str(svd))
    assert re.fullmatch(
        "it holds the unet and vae of preset .*tiny, without text_encoder and action_encoder: give whole weights, .*",
        str(error.value.fix),
    )


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.pt", "README.md", "optimizer.bin"], ["a.pt"]),
        (["pytorch_model.bin", "model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["weights/model.safetensors", "state/step-1/state.pt"], ["weights/model.safetensors"]),
        (["m-00001-of-00002.bin", "m-00002-of-00002.bin"], ["m-00001-of-00002.bin", "m-00002-of-00002.bin"]),
        (["unet/x.fp16.safetensors", "vae/x.bin"], ["unet/x.fp16.safetensors", "vae/x.bin"]),
        (["a.pt", "b.pt"], "2 checkpoints there: a.pt, b.pt"),
        (["m-00001-of-00002.safetensors"], "only 1 of the 2 shards"),
        (["config.json"], "no weights there"),
        (["adapter_config.json"], "an adapter without its weights"),
    ],
)
def test_a_folder_is_looked_at_by_its_names(names: list[str], chosen: list[str] | str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if isinstance(chosen, str):
        with pytest.raises(PersistWorldError, match=re.escape(chosen)):
            locate(tmp_path)
    else:
        assert [path.relative_to(tmp_path).as_posix() for path, _ in locate(tmp_path).files] == chosen


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_preset_is_told_in_one_message(tmp_path: Path) -> None:
    full_size = write_full_size(tmp_path / "checkpoint-10000.pt")
    with pytest.raises(PersistWorldError) as error:
        load_world_model(TINY.model, TINY.world, ckpt=str(full_size))
    said = error.value
    assert re.search(r"\d+ of 914 keys missing \(first: unet\.", said.what)
    assert re.search(r"\d+ unexpected \(first: unet\.", said.what)
    assert re.search(
        r"\d+ of another shape \(first: unet\.conv_in\.weight \(320, 8, 3, 3\), not \(64, 8, 3, 3\)", said.what
    )
    assert said.where == str(full_size)
    assert said.fix == "it fits preset ctrl-world or ctrl-world-svd or persistworld: --preset ctrl-world"


def test_a_missing_key_and_a_foreign_one_are_named(base: Tensors, tmp_path: Path) -> None:
    tensors = {k: v.contiguous() for k, v in base.items() if k != "vae.quant_conv.bias"}
    save_file({**tensors, "extra": torch.zeros(1)}, str(tmp_path / "a.safetensors"))
    with pytest.raises(PersistWorldError) as error:
        load_world_model(TINY.model, TINY.world, ckpt=str(tmp_path / "a.safetensors"))
    told = "1 of 914 keys missing (first: vae.quant_conv.bias); 1 unexpected (first: extra)"
    assert told in error.value.what and "none of the bundled presets" in str(error.value.fix)


def test_adapters_and_weights_are_not_taken_for_each_other(adapter: Path) -> None:
    with pytest.raises(PersistWorldError) as error:
        load_world_model(TINY.model, TINY.world, ckpt=str(adapter))
    assert error.value.fix == "this is an adapter: give it with --adapter, and the weights it belongs on with --ckpt"
    with pytest.raises(PersistWorldError, match="a model's weights, not an adapter"):
        load_world_model(TINY.model, TINY.world, adapter=BASE)


@pytest.mark.parametrize("damage", ["missing", "shape", "encoder", "targets"])
def test_a_wrong_adapter_is_refused_as_a_whole(damage: str, adapter: Path, tmp_path: Path) -> None:
    lora = load_file(str(adapter / "adapter_model.safetensors"))
    encoder = load_file(str(adapter / "action_encoder.safetensors"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    first = sorted(lora)[0]
    if damage == "missing":  # peft itself would leave that layer as it is, and say nothing
        del lora[first]
    if damage == "shape":
        lora[first] = torch.zeros(4, 7)
    if damage == "encoder":
        encoder = {k: v[:1] for k, v in encoder.items()}
    if damage == "targets":
        config["target_modules"] = ["no_such_layer"]
    save_file(lora, str(tmp_path / "adapter_model.safetensors"))
    save_file(encoder, str(tmp_path / "action_encoder.safetensors"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PersistWorldError, match="the adapter does not fit this model") as error:
        load_world_model(TINY.model, TINY.world, adapter=str(tmp_path))
    assert "none of the bundled presets" in str(error.value.fix)
    out = tmp_path / "out"
    told = cli("export", BASE, "--adapter", tmp_path, "--to", "ctrl-world", "-o", out / "merged.pt", code=1)
    assert "does not fit" in told
    assert "does not fit" in cli("export", tmp_path, "--to", "peft", "-o", out / "adapter", code=1)
    assert not list(out.rglob("*"))


# -- bad files ---------------------------------------------------------------------------------------------------------


class Runs:
    """Pickled, it asks whoever loads it to run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / ("w.safetensors" if kind == "truncated safetensors" else "w.pt")
    whole = {"unet.a": torch.zeros(3000)}
    if kind.startswith("code"):
        content = {**whole, "x": Runs(f"touch {folder / 'ran'}")}
        if kind == "code, plain pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=kind == "code, zip")
    elif kind.startswith("truncated"):
        if kind == "truncated safetensors":
            save_file(whole, str(path))
        else:
            torch.save(whole, path, _use_new_zipfile_serialization=kind == "truncated zip")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "other tensors":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    elif kind == "training state":
        torch.save({"step": 3, "parameters": [torch.zeros(3)]}, path)
    elif kind == "a list":
        torch.save([torch.zeros(3)], path)
    elif kind == "folder":
        (folder / "folder").mkdir()
        return folder / "folder"
    elif kind != "nowhere":
        path.write_bytes(
            {"empty": b"", "page": b"<!DOCTYPE html>", "lfs": b"version https://git-lfs.github.com/"}[kind]
        )
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code, zip", "more than tensors"),
        ("code, legacy", "more than tensors"),
        ("code, plain pickle", "more than tensors"),
        ("truncated zip", "damaged: its end is missing"),
        ("truncated legacy", "damaged"),
        ("truncated safetensors", "damaged: its end is missing"),
        ("empty", "the file is empty"),
        ("page", "not a weights file"),
        ("lfs", "git-lfs pointer"),
        ("a list", "no state dict"),
        ("training state", "saved state of a training"),
        ("other tensors", "layer.weight"),
        ("folder", "no weights there"),
        ("nowhere", "no such file or folder"),
    ],
)
def test_a_bad_file_is_one_error_and_nothing_is_written(kind: str, message: str, tmp_path: Path) -> None:
    path, out = bad_file(kind, tmp_path), tmp_path / "out"
    for arguments in (["inspect", path], ["export", path, "--to", "safetensors", "-o", out / "m.safetensors"]):
        told = cli(*arguments, code=1)
        assert "\nerror: " in f"\n{told}" and told.count("error: ") == 1 and message in told
    with pytest.raises(PersistWorldError):
        load_world_model(TINY.model, TINY.world, ckpt=str(path))
    with pytest.raises(PersistWorldError):
        load_world_model(TINY.model, TINY.world, adapter=str(path))
    assert not (tmp_path / "ran").exists() and not list(out.rglob("*"))
