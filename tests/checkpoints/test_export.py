"""Weights told of and written: `persistworld inspect` and `persistworld export`."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    ADAPTER,
    BASE,
    TINY,
    Tensors,
    bundled_model,
    cli,
    part,
    write_full_size,
)
from golden_files import GoldenFiles, flat
from golden_model import golden_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from persistworld_cli.checkpoints.adapters import PeftModel
from persistworld_cli.checkpoints.compatibility import parts_of
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.commands.app import app
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel, build_world_model

# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_the_bundled_weights_are(base: Tensors, adapter: Path) -> None:
    told = cli("inspect", BASE)
    assert told["kind"] == "world model" and told["fits"] == ["tiny"] and told["lacks"] == []
    assert told["layers"] == "whole weights" and told["adapter"] is None and told["dtypes"] == {"float16": len(base)}
    assert {row["part"]: row["parameters"] for row in told["parts"]} == {
        name: sum(v.numel() for v in part(base, name).values()) for name in parts_of(base)
    }
    stored = (resolve_path(BASE) / "model.safetensors").read_bytes()
    assert told["sha256"] == hashlib.sha256(stored).hexdigest()
    assert told["files"] == [{"file": "model.safetensors", "bytes": len(stored), "sha256": told["sha256"]}]
    other = cli("inspect", BASE, "--preset", "tiny", "--set", "model.text.hidden_size=64")
    assert "of another shape" in other["own_preset"]
    told = cli("inspect", adapter)
    assert told["kind"] == "adapter" and told["fits"] == ["tiny"]
    assert told["adapter"] | {"targets": [], "modules": 0} == {
        "type": "LORA", "rank": 4, "alpha": 8, "targets": [], "modules": 0, "action_encoder": True,
    }  # fmt: skip
    assert told["tensors"] == 2 * told["adapter"]["modules"] + 6
    assert cli("inspect", adapter.parent)["adapter"] == told["adapter"]  # a run's weights folder
    assert cli("inspect", ADAPTER)["kind"] == "adapter"


def test_inspect_says_first_what_it_is(adapter: Path, base: Tensors, tmp_path: Path) -> None:
    def lines(path: object) -> list[str]:
        done = CliRunner().invoke(app, ["inspect", str(path)])
        assert done.exit_code == 0, done.stderr
        return done.stdout.splitlines()

    told = lines(BASE)
    assert told[0] == "world model, fits preset tiny"
    assert told[2] == "5,060,430 parameters in 914 tensors, float16; whole weights"
    assert any(line.startswith("model.safetensors  9.76 MiB  ") and len(line.split()[-1]) == 64 for line in told)
    run = lines(adapter.parents[1])  # a run's folder means its adapter
    assert run[0] == "adapter, fits preset tiny" and run[3].startswith("LORA of rank 4, alpha 8 on 214 layers")
    torch.save({k: v for k, v in base.items() if k != "vae.quant_conv.bias"}, tmp_path / "less.pt")
    less = lines(tmp_path / "less.pt")
    assert less[0] == "world model, fits no bundled preset"
    assert less[3] == "nearest is preset tiny: 1 of 914 keys missing (first: vae.quant_conv.bias)"


def test_inspect_tells_of_layers_that_are_not_merged(adapter: Path, tmp_path: Path) -> None:
    model = bundled_model()
    wrapped = PeftModel.from_pretrained(model.unet, str(adapter))
    torch.save({f"unet.{k}": v for k, v in wrapped.state_dict().items()}, tmp_path / "unmerged.pt")
    told = cli("inspect", tmp_path / "unmerged.pt")
    assert told["kind"] == "unmerged world model" and "not merged" in told["layers"]
    with pytest.raises(PersistWorldError) as error:
        load_world_model(TINY.model, TINY.world, ckpt=str(tmp_path / "unmerged.pt"))
    assert "its LoRA layers are not merged" in str(error.value.fix)


def test_inspect_knows_the_full_size_model(tmp_path: Path) -> None:
    told = cli("inspect", write_full_size(tmp_path / "checkpoint-10000.pt"))
    assert told["kind"] == "world model" and told["fits"] == ["ctrl-world", "ctrl-world-svd", "persistworld"]
    assert told["tensors"] == 2525 and told["parameters"] == 2_319_978_217 and told["dtypes"] == {"float32": 2525}
    assert [row["part"] for row in told["parts"]] == ["unet", "vae", "image_encoder", "text_encoder", "action_encoder"]


# -- export ------------------------------------------------------------------------------------------------------------


def outputs(model: WorldModel) -> list[torch.Tensor]:
    """What the UNet and the action encoder make of the same random inputs, in float64: it is the weights that differ.

    In float32 the network rounds to 1e-5 of its own, which a merged weight would hide in.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 11, model.settings.token_dim, generator=draw).double()
    x = torch.randn(1, 11, 8, 12, 8, generator=draw).double()
    unet, encoder = copy.deepcopy(model.unet).double(), copy.deepcopy(model.action_encoder).double()
    with torch.no_grad():
        made = unet(x, torch.tensor([0.3]).double(), tokens, torch.zeros(1, 3).double(), return_dict=False)[0]
        return [made, encoder(torch.randn(1, 11, 7, generator=draw).double())]


@pytest.fixture(scope="module")
def unmerged(adapter: Path) -> list[torch.Tensor]:
    """Outputs of the bundled model with the adapter beside its weights, loaded by peft's own loader."""
    model = bundled_model()
    model.unet = PeftModel.from_pretrained(model.unet, str(adapter))
    model.action_encoder.load_state_dict(load_file(str(adapter / "action_encoder.safetensors")))
    return outputs(model)


@pytest.mark.parametrize(("to", "name"), [("ctrl-world", "merged.pt"), ("safetensors", "merged.safetensors")])
def test_a_merged_export_is_the_adapter_on_its_base(
    to: str, name: str, adapter: Path, base: Tensors, unmerged: list[torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "new" / name
    told = cli("export", BASE, "--adapter", adapter, "--to", to, "--output", out)
    assert told["tensors"] == len(base) and told["bytes"] == out.stat().st_size
    read = torch.load(out, weights_only=True) if to == "ctrl-world" else load_file(str(out))
    model = build_world_model(TINY.model, TINY.world).eval()
    model.load_state_dict(read, strict=True)
    for ours, theirs in zip(outputs(model), unmerged, strict=True):
        assert (ours - theirs).abs().max() < 1e-6
    assert (outputs(model)[0] - outputs(bundled_model())[0]).abs().max() > 1e-3
    if to == "ctrl-world":
        assert list(read) == list(base) and type(read) is dict
    else:
        with safe_open(str(out), "pt") as file:
            noted = file.metadata()["merged_adapter"]
        assert len(noted) == 64 and cli("inspect", out)["merged_adapter"] == noted
    assert {v.dtype for v in read.values()} == {torch.float32} and not any("position_ids" in k for k in read)
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert out.stat().st_mode & 0o044 == 0o044 or os.umask(os.umask(0o22)) & 0o044


def test_a_ctrl_world_export_has_the_reference_keys(golden: GoldenFiles, tmp_path: Path) -> None:
    """Of the tiny model with an image encoder: the order and names of Ctrl-World's own state dict."""
    config = json.loads((golden / "tiny_model.json").read_text())
    tables = {
        "unet": config["unet"],
        "vae": config["vae"],
        "text": config["text_encoder"],
        "image": config["image_encoder"],
    }
    preset = tmp_path / "golden.toml"
    preset.write_text("[model]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in tables.items()))
    out, source = tmp_path / "ctrl-world.pt", tmp_path / "tiny.safetensors"
    save_file(golden_model().state_dict(), str(source))
    cli("export", source, "--preset", preset, "--to", "ctrl-world", "-o", out)
    written, stored = torch.load(out, weights_only=True), load_file(str(source))
    assert list(written) == [name for name, _ in flat(config["shapes"])]
    assert all(torch.equal(written[k], v) and written[k].dtype == v.dtype for k, v in stored.items())
    assert cli("inspect", source, "--preset", preset)["own_preset"] == "fits"


def toml(value: Any) -> str:
    """A JSON value as TOML; null has none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{k}" = {toml(v)}' for k, v in value.items() if v is not None) + "}"
    return json.dumps(value)


def test_export_in_half_precision_and_without_adapter(base: Tensors, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    cli("export", BASE, "--to", "safetensors", "--dtype", "float16", "-o", out)
    stored = load_file(str(resolve_path(BASE) / "model.safetensors"))
    assert all(torch.equal(v, stored[k]) for k, v in load_file(str(out)).items())
    torch.save({k: torch.full_like(v, 1e5) for k, v in base.items()}, tmp_path / "large.pt")
    arguments = ["export", tmp_path / "large.pt", "--to", "safetensors", "--dtype", "float16"]
    assert "not finite in float16" in cli(*arguments, "-o", tmp_path / "large.safetensors", code=1)
    assert not (tmp_path / "large.safetensors").exists()


def test_an_adapter_is_written_as_peft_reads_it(adapter: Path, unmerged: list[torch.Tensor], tmp_path: Path) -> None:
    state = adapter.parents[1] / "state" / "step-00000001"
    written = []
    for number, source in enumerate((adapter, adapter.parent, state, state / "state.pt")):
        out = tmp_path / str(number)
        cli("export", source, "--to", "peft", "--output", out)
        config = json.loads((out / "adapter_config.json").read_text())
        tensors = load_file(str(out / "adapter_model.safetensors"))
        written.append((config, tensors, load_file(str(out / "action_encoder.safetensors"))))
    for config, tensors, encoder in written[1:]:
        assert config == written[0][0] and tensors.keys() == written[0][1].keys()
        assert all(torch.equal(value, written[0][1][name]) for name, value in tensors.items())
        assert all(torch.equal(value, written[0][2][name]) for name, value in encoder.items())
    model = bundled_model()
    model.unet = PeftModel.from_pretrained(model.unet, str(tmp_path / "0"))
    assert (outputs(model)[0] - unmerged[0]).abs().max() < 1e-6
    own = load_file(str(adapter / "action_encoder.safetensors"))
    assert own.keys() == written[0][2].keys()
    assert all(torch.equal(value, own[name]) for name, value in written[0][2].items())
    assert cli("inspect", state)["kind"] == "saved state of a post-training"
    told = cli("export", BASE, "--adapter", adapter, "--to", "peft", "-o", tmp_path / "named", "--dtype", "bfloat16")
    assert told["dtype"] == "bfloat16"
    with pytest.raises(PersistWorldError, match="without its run"):
        load_world_model(TINY.model, TINY.world, adapter=str(bad_state(state, tmp_path)))


def bad_state(state: Path, folder: Path) -> Path:
    """A saved state without its run around it."""
    (folder / "alone").mkdir()
    (folder / "alone" / "state.pt").write_bytes((state / "state.pt").read_bytes())
    return folder / "alone"


def test_export_refuses_what_cannot_be_meant(adapter: Path, tmp_path: Path) -> None:
    there, precious = tmp_path / "there.pt", tmp_path / "precious"
    there.write_bytes(b"old")
    (precious / "x").mkdir(parents=True)
    for arguments, message in [
        ((BASE, "--to", "csv", "-o", "x.pt"), "known: ctrl-world, peft, safetensors"),
        ((BASE, "--to", "ctrl-world", "-o", "x.pt", "--dtype", "int8"), "known: bfloat16"),
        ((BASE, "--to", "ctrl-world", "-o", tmp_path / "x.safetensors"), "writes a file ending in .pt"),
        ((BASE, "--to", "ctrl-world", "-o", there), "--force"),
        ((BASE, "--to", "peft", "-o", tmp_path / "a"), "cannot be taken out again"),
        ((adapter, "--adapter", ADAPTER, "--to", "safetensors", "-o", tmp_path / "a.safetensors"), "another one"),
        ((adapter, "--to", "peft", "-o", precious, "--force"), "a folder of another kind"),
    ]:
        assert message in cli("export", *arguments, code=2)
    assert there.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["precious", "there.pt"]
    cli("export", BASE, "--to", "ctrl-world", "-o", there, "--force")
    assert len(torch.load(there, weights_only=True)) == 914
    cli("export", adapter, "--to", "peft", "-o", tmp_path / "a")
    assert "--force" in cli("export", adapter, "--to", "peft", "-o", tmp_path / "a", code=2)
    cli("export", adapter, "--to", "peft", "-o", tmp_path / "a", "--force")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "precious", "there.pt"]
    assert "is not writable" in cli("export", BASE, "--to", "ctrl-world", "-o", there / "x" / "y.pt", code=1)
