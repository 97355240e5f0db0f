"""The world model against the golden numbers, and properties that need none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_model import golden_model, worst
from safetensors.torch import load_file

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import PretrainSettings
from persistworld_cli.models import vae as vae_room
from persistworld_cli.models.diffusion import karras_sigmas, loss_weight, precondition
from persistworld_cli.models.samplers import SAMPLERS, euler
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model
from persistworld_cli.objective.denoising import Draws, denoising_loss


@pytest.fixture(scope="module")
def tiny() -> WorldModel:
    """The tiny preset's model with random weights."""
    settings = load_settings("tiny", [], {}).settings
    torch.manual_seed(0)
    return build_world_model(settings.model, settings.world).eval()


def random_condition(model: WorldModel, batch: int = 1) -> Condition:
    """Random history, current frame and tokens."""
    g = torch.Generator().manual_seed(1)
    c, h, w = model.latent_shape
    n = model.settings.num_history + model.settings.num_frames
    return Condition(
        history=torch.randn(batch, model.settings.num_history, c, h, w, generator=g),
        current=torch.randn(batch, c, h, w, generator=g),
        tokens=torch.randn(batch, n, model.settings.token_dim, generator=g),
        noise_aug=0.02,
    )


# -- golden ---------------------------------------------------------------------------------------------------------


def test_state_dict_has_the_reference_keys_in_order(golden: Path) -> None:
    order = json.loads((golden / "tiny_configs.json").read_text())["order"]
    assert list(golden_model(golden).state_dict()) == order


@torch.no_grad()
def test_unet_forward(golden: Path) -> None:
    model, d = golden_model(golden), load_file(str(golden / "tiny_unet_forward.safetensors"))
    ids = d["added_time_ids"]

    def run(sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        rows = sample.shape[0]
        return model.unet(sample, d["timestep"][:rows], context[:rows], ids[:rows], return_dict=False)[0]

    assert worst(run(d["sample"], d["ehs_frame"]), d["out_frame_level_true"]) < 1e-5
    assert worst(run(d["sample_odd"], d["ehs_frame"]), d["out_odd_frame_level_true"]) < 1e-5
    model.unet.frame_level = False
    try:
        assert worst(run(d["sample"], d["ehs_frame"]), d["out_frame_level_false_seq11"]) < 1e-5
        assert worst(run(d["sample"], d["ehs_single"]), d["out_frame_level_false_seq1"]) < 1e-5
    finally:
        model.unet.frame_level = True


def test_sigma_schedules(golden: Path) -> None:
    d = load_file(str(golden / "sigma_schedules.safetensors"))
    for name in [k for k in d if k.startswith("sigmas_")]:
        steps = int(name.split("_")[1])
        sigmas = karras_sigmas(steps)
        assert torch.allclose(sigmas, d[name], rtol=1e-6, atol=1e-7)
        assert worst(precondition(sigmas[:-1]).c_noise, d[f"timesteps_{steps}"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("tag", ["s4_g1", "s4_g2", "s4_g2_hiszero", "s4_g2_b1_aug0", "s10_g2"])
def test_sampling_step_by_step(golden: Path, tag: str) -> None:
    d = load_file(str(golden / "tiny_sampling.safetensors"))
    meta = json.loads((golden / "tiny_sampling_meta.json").read_text())[tag]
    model = golden_model(golden, history_cond_zero=tag.endswith("hiszero"))
    get = {k.split(".", 1)[1]: v for k, v in d.items() if k.startswith(f"{tag}.")}
    condition = Condition(get["history"], get["image"], get["action_hidden"], meta["noise_aug_strength"])
    sigmas = karras_sigmas(meta["num_inference_steps"])

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model.denoise_guided(x, sigma.expand(x.shape[0]), condition, meta["max_guidance"])

    x = get["noise"] * (sigmas[0] ** 2 + 1).sqrt()
    for i, expected in enumerate(get["latents_after_step"]):
        x = euler(denoise, x, sigmas[i : i + 2])
        # float32 at a noise level of hundreds: the bound grows with the numbers themselves
        assert worst(x, expected) < 1e-5 * max(1.0, expected.abs().max().item())
    assert worst(x, get["final"]) < 1e-5


@pytest.mark.parametrize("tag", ["text_off", "text_on", "text_on_one_dropped", "text_on_hiszero_patched"])
def test_training_loss_and_gradients(golden: Path, tag: str) -> None:
    d = load_file(str(golden / "tiny_train_forward.safetensors"))
    meta = json.loads((golden / "tiny_train_forward_meta.json").read_text())[tag]
    model = golden_model(golden, text_cond=meta["text_cond"], history_cond_zero=meta["his_cond_zero"])
    get = {k.split(".", 1)[1]: v for k, v in d.items() if k.startswith(f"{tag}.")}
    draws = Draws(
        current_u=get["draw.cond_sigma_uniform"].flatten(),
        current_noise=get["draw.cond_noise"],
        keep_u=get["draw.text_keep_uniform"].flatten(),
        sigma_z=get["draw.sigma_normal"].flatten(),
        noise=get["draw.latent_noise"][:, 6:],
        history_z=get["draw.history_sigma_normal"].flatten(1),
        history_noise=get["draw.history_noise"],
    )
    model.zero_grad()
    model.requires_grad_(False)
    model.unet.requires_grad_(True)
    model.action_encoder.requires_grad_(True)
    loss = denoising_loss(model, get["latent"], get["action"], get.get("text_embeds"), draws, PretrainSettings()).mean()
    assert abs(loss.item() - meta["loss"]) < 1e-5
    loss.backward()
    named = dict(model.named_parameters())
    for name, expected in ((k.removeprefix("grad."), v) for k, v in get.items() if k.startswith("grad.")):
        assert worst(named[name].grad, expected) < 1e-5, name
    for name, norm in meta.get("grad_l2", {}).items():
        grad = named[name].grad  # a query that meets one key gets no gradient here, rounding noise in the reference
        assert abs((0.0 if grad is None else grad.norm().item()) - norm) < 1e-5 * max(1.0, norm), name


def test_action_tokens(golden: Path) -> None:
    d = load_file(str(golden / "action_encoder.safetensors"))
    encoder = ActionEncoder(7, 1024)
    encoder.load_state_dict({k.removeprefix("weights."): v for k, v in d.items() if k.startswith("weights.")})
    with torch.no_grad():
        assert worst(encoder(d["action"]), d["out_no_text"]) < 1e-5
        assert worst(encoder(d["action"], d["text_embeds"]), d["out_text"]) < 1e-5
        assert worst(encoder.double()(d["action"].double()), d["out64_no_text"].double()) < 1e-10


@torch.no_grad()
def test_vae_encodes_and_decodes_in_chunks(golden: Path) -> None:
    model, d = golden_model(golden), load_file(str(golden / "tiny_vae.safetensors"))
    pixels = d["enc_image_uint8"]
    if pixels.shape[1] == 3:
        pixels = pixels.permute(0, 2, 3, 1)
    scale = model.vae.config.scaling_factor
    assert worst(vae_room.encode(model.vae, vae_room.pixels_to_unit(pixels)), d["enc_mode"] * scale) < 1e-5
    flat = d["dec_latents"].flatten(0, 1)
    for chunk in (7, 5, 15, 1):
        made = vae_room.decode(model.vae, flat, chunk)
        assert worst(made, d[f"dec_chunk{chunk}"].flatten(0, 1)) < 2e-5
    assert worst(vae_room.decode_clips(model.vae, flat, 5), d["dec_chunk5"].flatten(0, 1)) < 2e-5


def test_edm_constants(golden: Path) -> None:
    d = np.load(golden / "edm_preconditioning.npz")
    sigma = torch.from_numpy(d["sigma"]).double()
    got = precondition(sigma)._asdict() | {"loss_weight": loss_weight(sigma)}
    checked = [k for k in ("c_skip", "c_out", "c_in", "c_noise", "loss_weight") if k in d]
    assert len(checked) == 5
    for name in checked:
        assert np.allclose(got[name].numpy(), d[name], rtol=1e-10, atol=1e-10)


def test_full_size_model_has_the_published_keys(golden: Path) -> None:
    expected = json.loads((golden / "ctrl_world_full_keys.json").read_text())
    settings = load_settings("ctrl-world", [], {}).settings
    with torch.device("meta"):
        model = build_world_model(settings.model, settings.world)
    shapes = {e["key"]: tuple(e["shape"]) for part in expected["parts"].values() for e in part["entries"]}
    state = model.state_dict()
    assert list(state) == expected["order"] and len(state) == 2525
    assert {k: tuple(v.shape) for k, v in state.items()} == shapes


# -- properties -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_frame_depends_on_its_own_action_and_on_the_first(tiny: WorldModel) -> None:
    condition = random_condition(tiny)
    c, h, w = tiny.latent_shape
    x, sigma = torch.randn(1, 5, c, h, w, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0])
    base = tiny.network(x, sigma, condition)
    for frame in (0, 8):  # the oldest history frame (temporal attention's token), and the third predicted one
        tokens = condition.tokens.clone()
        tokens[:, frame] += 1.0
        changed = tiny.network(x, sigma, Condition(condition.history, condition.current, tokens, 0.02))
        assert (changed - base)[:, 2].abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_recover_a_known_clip_from_a_perfect_denoiser(name: str) -> None:
    x0 = torch.randn(2, 5, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    sigmas = karras_sigmas(12)
    x = x0 + torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)) * sigmas[0]
    assert worst(SAMPLERS[name](lambda x, sigma: x0, x, sigmas), x0) < 1e-3


@torch.no_grad()
def test_second_order_samplers_follow_a_gaussian_better_than_euler() -> None:
    spread = 0.5  # data N(0, 0.5^2): the ideal denoiser is x s^2/(s^2 + sigma^2), the exact ODE end is known

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * spread**2 / (spread**2 + sigma**2)

    sigmas = karras_sigmas(10, sigma_max=80.0)
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)) * (spread**2 + sigmas[0] ** 2).sqrt()
    exact = x * spread / (spread**2 + sigmas[0] ** 2).sqrt()
    errors = {name: worst(sampler(denoise, x, sigmas), exact) for name, sampler in SAMPLERS.items()}
    assert errors["heun"] < errors["euler"] and errors["dpmpp-2m"] < errors["euler"]


@pytest.mark.parametrize("sigma", [0.002, 0.5, 1.0, 20.0, 700.0])
def test_preconditioning_keeps_unit_variance(sigma: float) -> None:
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(200_000, generator=g), torch.randn(200_000, generator=g)
    level = torch.tensor(sigma)
    scale = precondition(level)
    noisy = x0 + level * noise
    assert abs((scale.c_in * noisy).std().item() - 1) < 0.01
    target = (x0 - scale.c_skip * noisy) / scale.c_out  # what F has to learn
    assert abs(target.std().item() - 1) < 0.01
    assert abs((loss_weight(level) * scale.c_out**2).item() - 1) < 1e-3


@torch.no_grad()
def test_decoding_in_batches_equals_one_by_one(tiny: WorldModel) -> None:
    c, h, w = tiny.latent_shape
    latents = torch.randn(3, 4, c, h, w, generator=torch.Generator().manual_seed(3))
    together = tiny.decode_latents(latents, 0)
    alone = torch.stack([tiny.decode_latents(item, 0) for item in latents])
    assert together.shape == (3, 4, 3, 3, 48, 80)
    assert worst(together, alone) < 1e-5


@torch.no_grad()
def test_cameras_keep_their_order_through_stacking() -> None:
    latent = torch.arange(2 * 3 * 4 * 5 * 6.0).view(2, 3, 4, 5, 6)
    assert worst(vae_room.unstack_cameras(vae_room.stack_cameras(latent), 3), latent) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite(tiny: WorldModel, dtype: torch.dtype) -> None:
    condition = random_condition(tiny, 2)
    c, h, w = tiny.latent_shape
    x = torch.randn(2, 5, c, h, w, generator=torch.Generator().manual_seed(4))
    tiny.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        out = tiny.denoise(x, torch.tensor([0.5, 3.0]), condition)
        pictures = tiny.vae.decode(x[0], num_frames=5).sample
    (out.float().pow(2).mean() + pictures.float().pow(2).mean()).backward()
    grads = [p.grad for p in [*tiny.unet.parameters(), *tiny.vae.decoder.parameters()] if p.grad is not None]
    assert len(grads) > 100 and all(g.isfinite().all() for g in grads)
