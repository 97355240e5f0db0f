"""An adapter says which weights it was trained on: on others of the same size, merging it warns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from checkpoint_files import TINY, cli

from persistworld_cli.checkpoints.adapters import merge_adapter, read_adapter
from persistworld_cli.checkpoints.base_sample import NOTE
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.world_model import WorldModel, build_world_model
from persistworld_cli.training.policy_switch import PolicySwitch


def random_model(seed: int) -> WorldModel:
    torch.manual_seed(seed)
    return build_world_model(TINY.model, TINY.world)


@pytest.fixture(scope="module")
def trained_on_7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random weights, as post-training writes it."""
    folder = tmp_path_factory.mktemp("base") / "adapter"
    PolicySwitch(random_model(7), TINY.post_train).save_adapter(folder)
    return folder


def said(model: WorldModel, adapter: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    merge_adapter(model, adapter)
    return caplog.text


def test_other_weights_of_the_same_size_are_told(trained_on_7: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "was trained on other weights than these" in said(random_model(8), trained_on_7, caplog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_own_weights_are_known_in_every_type(
    dtype: torch.dtype, trained_on_7: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert said(random_model(7).to(dtype).float(), trained_on_7, caplog) == ""


def test_weights_held_in_bfloat16_as_on_a_gpu_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    switch = PolicySwitch(random_model(7), TINY.post_train, torch.bfloat16)
    switch.save_adapter(tmp_path / "adapter")
    assert not [name for part in switch.state().values() for name in part if "exact" in name]
    assert said(random_model(7), tmp_path / "adapter", caplog) == ""


def test_further_trained_weights_are_told(trained_on_7: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(random_model(7))
    with torch.no_grad():
        for p in model.unet.parameters():
            p.add_(0.1 * p.std() * torch.randn_like(p) if p.numel() > 1 else 0.0)
    assert "they differ by" in said(model, trained_on_7, caplog)


def test_export_keeps_it_and_a_damaged_one_is_refused(trained_on_7: Path, tmp_path: Path) -> None:
    cli("export", trained_on_7, "--to", "peft", "--preset", "tiny", "--output", tmp_path / "again")
    base = read_adapter(locate(trained_on_7)).base
    assert base and read_adapter(locate(tmp_path / "again")).base == base
    file = tmp_path / "again" / "adapter_model.safetensors"
    lora = read_adapter(locate(tmp_path / "again")).lora
    save_safetensors(file, lora, {NOTE: "[1]"})
    with pytest.raises(PersistWorldError, match="damaged"):
        read_adapter(locate(tmp_path / "again"))
