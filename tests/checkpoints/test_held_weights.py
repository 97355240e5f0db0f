"""What is held in memory and in which type: the image encoder that checkpoints carry, sampling weights, averages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from checkpoint_files import BASE, TINY, Tensors, cli
from safetensors.torch import load_file
from torch import nn

from persistworld_cli.checkpoints.loading import load_for_sampling, load_world_model, open_passthrough
from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.cost.interaction import interaction_report, meta_model, weight_bytes
from persistworld_cli.cost.training import pretrain_report
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models import precision
from persistworld_cli.models.precision import cpu_has_bfloat16, product_type, small_products
from persistworld_cli.models.world_model import build_world_model
from persistworld_cli.rollout.engine import RolloutEngine, rollout_noise
from persistworld_cli.training.optim import WeightAverage
from persistworld_cli.training.pretrain import save_weights
from persistworld_cli.training.run import Run

IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 16,
}
CARRYING = replace(TINY, model=replace(TINY.model, adapter="", image=IMAGE))


@pytest.fixture(scope="module")
def with_image(base: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's weights and a random image encoder, in the order of the model that has one."""
    torch.manual_seed(0)
    tensors = {**build_world_model(CARRYING.model, TINY.world).state_dict(), **base}
    path = tmp_path_factory.mktemp("carrying") / "with-image.pt"
    torch.save(tensors, path)
    return path


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """A preset of the tiny model with an image encoder."""
    lines = [f"{key} = {value}" for key, value in IMAGE.items()]
    (tmp_path / "mine.toml").write_text("\n".join(['extends = "tiny"', "[model.image]", *lines]))
    return tmp_path / "mine.toml"


# -- the image encoder that checkpoints carry --------------------------------------------------------------------------


def test_what_nothing_computes_with_stays_on_disk(with_image: Path, base: Tensors) -> None:
    held = load_world_model(CARRYING.model, TINY.world, ckpt=str(with_image)).state_dict()
    assert list(held) == list(base) and all(torch.equal(held[k], v) for k, v in base.items())
    whole = load_world_model(CARRYING.model, TINY.world, ckpt=str(with_image), passthrough=True).state_dict()
    stored = torch.load(with_image, weights_only=True)
    assert list(whole) == list(stored) and all(torch.equal(whole[k], v) for k, v in stored.items())
    counted = meta_model(CARRYING.model, TINY.world)
    assert weight_bytes(counted) == sum(v.nbytes for v in base.values())


def test_a_carried_part_of_another_shape_is_refused_all_the_same(with_image: Path, tmp_path: Path) -> None:
    stored = torch.load(with_image, weights_only=True)
    stored["image_encoder.visual_projection.weight"] = torch.zeros(3, 3)
    torch.save(stored, tmp_path / "other.pt")
    with pytest.raises(PersistWorldError, match="1 of another shape"):
        load_world_model(CARRYING.model, TINY.world, ckpt=str(tmp_path / "other.pt"))


def test_export_writes_it_from_the_file(with_image: Path, preset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    cli("export", with_image, "--preset", preset, "--to", "ctrl-world", "-o", out)
    written, stored = torch.load(out, weights_only=True), torch.load(with_image, weights_only=True)
    assert list(written) == list(stored) and all(torch.equal(written[k], v) for k, v in stored.items())
    told = cli("export", BASE, "--preset", preset, "--to", "ctrl-world", "-o", tmp_path / "x.pt", code=1)
    assert "strict=True and needs an image encoder; this checkpoint has none" in told
    assert not (tmp_path / "x.pt").exists()
    cli("export", BASE, "--preset", preset, "--to", "safetensors", "-o", tmp_path / "x.safetensors")


def test_pretraining_hands_it_on_as_it_was(with_image: Path, tmp_path: Path) -> None:
    model = load_world_model(CARRYING.model, TINY.world, ckpt=str(with_image))
    path = save_weights(model, tmp_path, open_passthrough(str(with_image)))
    saved, stored = load_file(str(path)), torch.load(with_image, weights_only=True)
    assert saved.keys() == stored.keys() and all(torch.equal(saved[k], v) for k, v in stored.items())
    assert not open_passthrough(BASE).info


# -- types for sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "cast", "unet", "vae"),
    [
        ("bfloat16", "model", torch.bfloat16, torch.bfloat16),
        ("float16", "model", torch.float16, torch.float32),  # SVD's VAE overflows in float16
        ("bfloat16", "autocast", torch.float32, torch.float32),
    ],
)
def test_sampling_holds_weights_in_the_type_asked_for(
    dtype: str, cast: str, unet: torch.dtype, vae: torch.dtype
) -> None:
    settings = replace(TINY, sampling=replace(TINY.sampling, dtype=dtype, cast=cast))
    model = load_for_sampling(settings, ckpt=BASE, adapter="")
    assert {p.dtype for p in model.unet.parameters()} == {p.dtype for p in model.action_encoder.parameters()} == {unet}
    assert {p.dtype for p in model.vae.parameters()} == {vae}
    held = {row.key: row.bytes for row in interaction_report(settings, 1).memory}["weights"]
    assert held == sum(p.nbytes for p in model.parameters())


@torch.no_grad()
def test_whole_model_in_bfloat16_draws_nearly_the_same() -> None:
    drawn = {}
    for dtype, cast in (("float32", "autocast"), ("bfloat16", "model"), ("bfloat16", "autocast")):
        sampling = SamplingSettings(steps=2, sigma_max=80.0, dtype=dtype, cast=cast)
        model = load_for_sampling(replace(TINY, sampling=sampling), ckpt=BASE, adapter="")
        engine = RolloutEngine(model, sampling, ActionStat(-np.ones(7), np.ones(7)))
        first = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        state = engine.start(first, np.zeros((1, 7)), ["push the red block"])
        clip = engine.step(state, np.zeros((1, 5, 7)), rollout_noise([(0, "a", 0, 0)], engine.noise_shape))
        assert clip.dtype == torch.float32
        drawn[dtype, cast] = torch.cat([clip.flatten(), model.decode_latents(clip, 5).flatten()])
    exact = drawn["float32", "autocast"]
    for key in (("bfloat16", "model"), ("bfloat16", "autocast")):
        if key[1] == "autocast" and not cpu_has_bfloat16():
            assert torch.equal(drawn[key], exact)
            continue
        assert 0 < (drawn[key] - exact).pow(2).mean().sqrt() < 0.03 * exact.pow(2).mean().sqrt(), key


def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, half = torch.device("cpu"), torch.bfloat16
    for has in (True, False):
        monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda has=has: has)
        assert product_type(cpu, half) is (half if has else torch.float32)
        assert product_type(torch.device("cuda"), half) is half and product_type(cpu, torch.float16) is torch.float16
        with small_products(cpu, half, torch.float32):
            assert torch.is_autocast_enabled("cpu") is has
        with small_products(cpu, half, half):  # weights that are held so compute so
            assert not torch.is_autocast_enabled("cpu")
        AcceleratorState._reset_state(reset_partial_state=True)
        with Run(tmp_path, mixed_precision="bf16", cpu=True) as run:
            assert run.accelerator.mixed_precision == ("bf16" if has else "no")
        AcceleratorState._reset_state(reset_partial_state=True)


# -- averaged weights --------------------------------------------------------------------------------------------------


def test_an_average_that_nobody_wants_is_not_kept() -> None:
    learned = [nn.Parameter(torch.ones(3))]
    none, some = WeightAverage(learned, 0.0), WeightAverage(learned, 0.9)
    with torch.no_grad():
        learned[0].add_(1)
    for average in (none, some):
        average.update(learned)
    assert none.state()["average"] == [] and len(some.state()["average"]) == 1
    with none.in_place_of(learned):
        assert learned[0].eq(2).all()
    with some.in_place_of(learned):
        assert learned[0].gt(1).all() and learned[0].lt(2).all()
    assert learned[0].eq(2).all()
    later = WeightAverage(learned, 0.9)  # from now on wanted: begins with what there is
    later.load_state(none.state(), learned)
    assert later.shadow[0].eq(2).all() and later.count == 0
    later.load_state(some.state(), learned)
    assert torch.equal(later.shadow[0], some.shadow[0]) and later.count == 1
    without = WeightAverage(learned, 0.0)
    without.load_state(some.state(), learned)
    assert not without.shadow


def test_the_dry_run_counts_an_average_only_where_there_is_one() -> None:
    for ema, there in ((0.0, False), (0.99, True)):
        report = pretrain_report(replace(TINY, pretrain=replace(TINY.pretrain, ema=ema)))
        assert any(row.key == "average" for row in report.memory) == there
