"""Which weights a command takes: the post-trained ones of a preset in inference, its checkpoint in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_files import ADAPTER, BASE, TINY, Tensors, cli
from safetensors.torch import load_file

from persistworld_cli.checkpoints.loading import load_model, load_world_model
from persistworld_cli.checkpoints.references import inference_ref
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.config.presets import from_json, resolve_settings, to_json
from persistworld_cli.config.settings import ModelSettings

INFERENCE = ("eval", "frontier", "replay", "drive", "pi-rollout")
CTRL, POST, SVD = "yjguo/Ctrl-World", "jaibrdhn/persistworld", "stabilityai/stable-video-diffusion-img2vid"


@pytest.fixture(autouse=True)
def _no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run counts FLOPs of the full-size model for half a minute, which is tested elsewhere."""
    monkeypatch.setattr("persistworld_cli.commands.run.cost_report", lambda *_: None)


def taken(*arguments: str, code: int = 0) -> list[tuple[str, str, str]]:
    """Use, weights and adapter, as a dry run tells them."""
    told = cli(*arguments, "--dry-run", code=code)["weights"]
    return [(row["use"], row["weights"], row["adapter"]) for row in told]


@pytest.mark.parametrize("command", INFERENCE)
def test_the_post_trained_preset_runs_the_post_trained_weights(command: str) -> None:
    own = (command, "--preset", "persistworld")
    against = [("compared with", CTRL, "")] if command == "eval" else []
    assert taken(*own) == [("runs", POST, ""), *against]
    assert taken(*own, "--set", "model.ckpt=mine.pt")[0] == ("runs", "mine.pt", "")
    assert taken(*own, "--ckpt", ADAPTER)[0][1:] == (CTRL, ADAPTER)
    assert taken(*own, "--ckpt", "whole.pt")[0] == ("runs", "whole.pt", "")
    based = taken(*own, "--adapter", "base")
    assert based[0] == ("runs", CTRL, "")  # with nothing to compare it with
    assert len(based) == (2 if command == "replay" else 1)


def test_training_begins_from_the_checkpoint() -> None:
    assert taken("post-train", "--preset", "persistworld") == [("begins from", CTRL, "")]
    assert taken("pretrain", "--preset", "ctrl-world") == [("begins from", CTRL, "")]
    assert taken("pretrain", "--preset", "ctrl-world-svd") == [("begins from", SVD, "")]
    assert taken("pretrain", "--ckpt", ADAPTER) == [("begins from", BASE, ADAPTER)]
    assert taken("pretrain", "--ckpt", "whole.pt") == [("begins from", "whole.pt", "")]
    assert "export WEIGHTS --adapter" in cli("post-train", "--ckpt", ADAPTER, "--dry-run", code=2)


def test_later_weights_go_before_earlier_ones(tmp_path: Path) -> None:
    def model(text: str, *sets: str, **flags: str) -> ModelSettings:
        file = tmp_path / "mine.toml"
        file.write_text(text)
        keys = {f"model.{name}": value for name, value in flags.items()}
        resolved = resolve_settings(str(file), sets, keys, env={})
        if not resolved.settings.model.inference:
            assert "model.ckpt is set later" in resolved.origin["model.inference"] or "adapter" in text or flags
        assert from_json(to_json(resolved.settings)) == resolved.settings
        return resolved.settings.model

    top = 'extends = "persistworld"\n[model]\n'
    assert inference_ref(model(top + f'inference = "{BASE}"')).ckpt == BASE
    assert inference_ref(model(top + 'ckpt = "mine.pt"')).ckpt == "mine.pt"
    assert inference_ref(model(top + f'adapter = "{ADAPTER}"')).adapter == ADAPTER
    both = model(top + f'ckpt = "mine.pt"\ninference = "{ADAPTER}"')
    assert (inference_ref(both).ckpt, inference_ref(both).adapter) == ("mine.pt", ADAPTER)
    own = top + f'adapter = "{ADAPTER}"'
    assert inference_ref(model(own, inference="whole.pt")).adapter == ""  # it belongs on other weights
    paired = inference_ref(model(own, inference="whole.pt", adapter=ADAPTER))
    assert (paired.ckpt, paired.adapter) == ("whole.pt", ADAPTER)


def test_an_adapter_a_merged_file_and_a_folder_are_the_same_model(base: Tensors, tmp_path: Path) -> None:
    merged = tmp_path / "published" / "checkpoint-5760-merged.safetensors"
    merged.parent.mkdir()
    cli("export", ADAPTER, "--to", "safetensors", "-o", merged)  # on the checkpoint of the preset that it fits
    assert locate(str(merged.parent)).files == locate(str(merged)).files
    sampling, launch = replace(TINY.sampling, dtype="float32"), replace(TINY.launch, device="cpu")
    own = replace(TINY, model=replace(TINY.model, inference=str(merged.parent)), sampling=sampling, launch=launch)
    folder, file = load_model(own).state_dict(), load_file(str(merged))
    assert all(torch.equal(value, file[name]) for name, value in folder.items())
    ref = inference_ref(replace(TINY.model, inference=ADAPTER))
    assert (ref.ckpt, ref.adapter) == (BASE, ADAPTER)
    with_adapter = load_world_model(TINY.model, TINY.world, ckpt=ref.ckpt, adapter=ref.adapter).state_dict()
    assert all(torch.equal(value, file[name]) for name, value in with_adapter.items())
    assert any(not torch.equal(value, base[name]) for name, value in with_adapter.items())
