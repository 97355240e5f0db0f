"""The world model against the golden numbers, and properties that need none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from golden_model import golden_model, worst
from golden_table import close
from safetensors.torch import load_file

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import PretrainSettings, SamplingSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models import text as text_room
from persistworld_cli.models import vae as vae_room
from persistworld_cli.models.cpu.convolutions import ChannelsLastConv
from persistworld_cli.models.diffusion import karras_sigmas, loss_weight, precondition
from persistworld_cli.models.precision import cpu_has_bfloat16
from persistworld_cli.models.samplers import SAMPLERS, euler
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model
from persistworld_cli.objective.denoising import Draws, denoising_loss
from persistworld_cli.rollout.images import to_uint8


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

    close("B unet, a token a frame", run(d["sample"], d["ehs_frame"]), d["out_frame_level_true"], 1e-5)
    close("B unet, odd size", run(d["sample_odd"], d["ehs_frame"]), d["out_odd_frame_level_true"], 1e-5)
    model.unet.frame_level = False
    try:
        close("B unet, 11 tokens", run(d["sample"], d["ehs_frame"]), d["out_frame_level_false_seq11"], 1e-5)
        close("B unet, one token", run(d["sample"], d["ehs_single"]), d["out_frame_level_false_seq1"], 1e-5)
    finally:
        model.unet.frame_level = True


def test_sigma_schedules(golden: Path) -> None:
    d = load_file(str(golden / "sigma_schedules.safetensors"))
    for name in [k for k in d if k.startswith("sigmas_")]:
        steps = int(name.split("_")[1])
        sigmas = karras_sigmas(steps)
        assert torch.allclose(sigmas, d[name], rtol=1e-6, atol=1e-7)
        close("B sigma schedules", sigmas, d[name], 1e-6, relative=True)
        close("B timesteps", precondition(sigmas[:-1]).c_noise, d[f"timesteps_{steps}"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "tag",
    ["s4_g1", "s4_g2", "s4_g2_hiszero", "s4_g2_b1", "s4_g2_b1_aug0", "s10_g1", "s10_g2", "s50_g2_b1"],
)
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
    steps = get.get("latents_after_step", ())  # of the longest run, only the end was kept
    for i in range(meta["num_inference_steps"]):
        x = euler(denoise, x, sigmas[i : i + 2])
        if len(steps):  # float32 at a noise level of hundreds: the bound grows with the numbers themselves
            close(f"B sampling {tag}, every step", x, steps[i], 1e-5, relative=True)
    close(f"B sampling {tag}, end", x, get["final"], 1e-5)


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
    close(f"B training {tag}, loss", loss, meta["loss"], 1e-5)
    loss.backward()
    named = dict(model.named_parameters())
    for name, expected in ((k.removeprefix("grad."), v) for k, v in get.items() if k.startswith("grad.")):
        close(f"B training {tag}, gradients", named[name].grad, expected, 1e-5)
    for name, norm in meta.get("grad_l2", {}).items():
        grad = named[name].grad  # a query that meets one key gets no gradient here, rounding noise in the reference
        ours = 0.0 if grad is None else grad.norm().item()
        close(f"B training {tag}, norms of all gradients", ours, norm, 1e-5, relative=True)


def test_action_tokens(golden: Path) -> None:
    d = load_file(str(golden / "action_encoder.safetensors"))
    encoder = ActionEncoder(7, 1024)
    encoder.load_state_dict({k.removeprefix("weights."): v for k, v in d.items() if k.startswith("weights.")})
    with torch.no_grad():
        close("C action tokens", encoder(d["action"]), d["out_no_text"], 1e-5)
        close("C action tokens with text", encoder(d["action"], d["text_embeds"]), d["out_text"], 1e-5)
        close("C action tokens, float64", encoder.double()(d["action"].double()), d["out64_no_text"], 1e-10)


@torch.no_grad()
def test_vae_encodes_and_decodes_in_chunks(golden: Path) -> None:
    model, d = golden_model(golden), load_file(str(golden / "tiny_vae.safetensors"))
    pixels = d["enc_image_uint8"]
    if pixels.shape[1] == 3:
        pixels = pixels.permute(0, 2, 3, 1)
    scale = model.vae.config.scaling_factor
    close("B vae, latents", vae_room.encode(model.vae, vae_room.pixels_to_unit(pixels)), d["enc_mode"] * scale, 1e-5)
    drawn = vae_room.encode(model.vae, vae_room.pixels_to_unit(pixels), d["enc_noise"])
    close("B vae, latents drawn from the posterior", drawn, d["enc_sample_scaled"], 1e-5)
    flat = d["dec_latents"].flatten(0, 1)
    for chunk in (7, 5, 15, 1):
        made = vae_room.decode(model.vae, flat, chunk)
        close(f"B vae, images in runs of {chunk}", made, d[f"dec_chunk{chunk}"].flatten(0, 1), 1e-5)
        if chunk == 7:  # a number just below a whole one may fall to either side: one level, seldom
            eight_bit = to_uint8(made / 2 + 0.5, "down").astype(int) - d["dec_chunk7_uint8"].flatten(0, 1).numpy()
            assert np.abs(eight_bit).max() <= 1
            close("B vae, 8-bit images that differ (share)", np.mean(eight_bit != 0), 0.0, 1e-4)
    close("B vae, runs in one batch", vae_room.decode_clips(model.vae, flat, 5), d["dec_chunk5"].flatten(0, 1), 1e-5)


def test_images_become_8_bit_as_in_the_reference(golden: Path) -> None:
    d = load_file(str(golden / "tiny_vae.safetensors"))
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
    close("B pixels to [-1, 1]", vae_room.pixels_to_unit(levels).flatten(), d["lut_uint8_to_fp32_norm"], 1e-6)
    drawn = (d["lut_bf16_in"] / 2 + 0.5).view(3, -1, 1)
    ours = np.moveaxis(to_uint8(drawn, "down"), -1, 0).flatten()
    close("B pixels to 8 bit, fraction cut off", ours, d["lut_fp32_to_uint8"], 0.5)


def test_edm_constants(golden: Path) -> None:
    d = np.load(golden / "edm_preconditioning.npz")
    sigma = torch.from_numpy(d["sigma"]).double()
    got = precondition(sigma)._asdict() | {"loss_weight": loss_weight(sigma)}
    checked = [k for k in ("c_skip", "c_out", "c_in", "c_noise", "loss_weight") if k in d]
    assert len(checked) == 5
    for name in checked:
        close("B preconditioning and loss weight", got[name], d[name], 1e-10, relative=True)


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
@pytest.mark.parametrize(("choice", "tokens_seen"), [("first", 1), ("all", 11)])
def test_what_temporal_attention_sees_is_a_setting(tiny: WorldModel, choice: str, tokens_seen: int) -> None:
    model = build_world_model(replace(tiny.settings, temporal_token=choice), tiny.world).eval()
    model.load_state_dict(tiny.state_dict())
    condition, (c, h, w) = random_condition(model), model.latent_shape
    shown: list[torch.Tensor] = []
    for module in model.unet.modules():
        if isinstance(module, TemporalBasicTransformerBlock):
            module.attn2.register_forward_pre_hook(
                lambda attention, args, kwargs: shown.append(kwargs["encoder_hidden_states"]), with_kwargs=True
            )
    out = model.network(torch.zeros(1, 5, c, h, w), torch.tensor([1.0]), condition)
    assert shown and all(context.shape[1] == tokens_seen for context in shown)
    assert all(torch.equal(context[-1], condition.tokens[0, :tokens_seen]) for context in shown)
    same = tiny.network(torch.zeros(1, 5, c, h, w), torch.tensor([1.0]), condition)
    assert torch.equal(out, same) == (choice == "first")


def test_an_instruction_that_clip_cannot_hold_is_cut_with_one_warning(
    tiny: WorldModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = "push the red cube towards the far edge of the table " * 20
    short = "push the red cube forward"
    ids, mask = text_room.tokenize(tiny.tokenizer, [long, short])
    text_room.tokenize(tiny.tokenizer, [short, long])
    assert ids.shape == mask.shape == (2, 77) and mask[0].all() and not mask[1].all()
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    message = warned[0].getMessage()
    assert "cut to CLIP's 77" in message and long[:60] in message


@pytest.mark.parametrize(
    ("latent", "numbers", "words"), [((4, 24, 20), 7, "3 cameras of 48x80"), (None, 8, "8 numbers")]
)
def test_data_of_another_preset_is_refused_before_any_compute(
    tiny: WorldModel, latent: tuple[int, int, int] | None, numbers: int, words: str
) -> None:
    shape = (2, 11, *(latent or tiny.latent_shape))
    draws = Draws.sample(shape, 6, torch.Generator(), torch.device("cpu"))
    with pytest.raises(PersistWorldError, match=words) as told:
        denoising_loss(tiny, torch.zeros(shape), torch.zeros(2, 11, numbers), None, draws, PretrainSettings())
    assert "preset" in str(told.value.where) or "action_dim" in str(told.value.where)
    assert "extracted with" in str(told.value.fix)


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
def test_a_draw_from_the_posterior_depends_on_camera_and_image_alone(tiny: WorldModel) -> None:
    frames = torch.randint(0, 256, (3, 3, 48, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    frames[:, 1] = frames[:, 0]  # two cameras that see the same
    drawn = vae_room.encode_images(tiny.vae, frames, tiny.device, "sample")
    mode = vae_room.encode_images(tiny.vae, frames, tiny.device)
    alone = torch.cat([vae_room.encode_images(tiny.vae, one[None], tiny.device, "sample") for one in frames])
    assert drawn.shape == mode.shape == (3, *tiny.latent_shape) and worst(drawn, alone) < 1e-5
    first, second, _ = vae_room.unstack_cameras(drawn, 3).unbind(1)
    assert worst(drawn, mode) > 1e-3 and worst(first, second) > 1e-3


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
        images = tiny.vae.decode(x[0, :, :, : h // 3], num_frames=5).sample  # of one camera, as they are decoded
    (out.float().pow(2).mean() + images.float().pow(2).mean()).backward()
    grads = [p.grad for p in [*tiny.unet.parameters(), *tiny.vae.decoder.parameters()] if p.grad is not None]
    assert len(grads) > 100 and all(g.isfinite().all() for g in grads)


def test_images_are_drawn_in_the_type_and_layout_asked_for(tiny: WorldModel) -> None:
    latents = torch.randn(2, 5, *tiny.latent_shape, generator=torch.Generator().manual_seed(5))
    plain = tiny.decode_latents(latents, 5)
    drawn = {d: tiny.draw(latents, SamplingSettings(decode_chunk=5, decode_dtype=d)) for d in ("float32", "bfloat16")}
    assert torch.equal(drawn["float32"], plain)
    if cpu_has_bfloat16():
        assert 1e-5 < (drawn["bfloat16"] - plain).abs().max() < 0.05
    else:
        assert torch.equal(drawn["bfloat16"], plain)
    channels_last = [m for m in tiny.vae.modules() if isinstance(m, ChannelsLastConv)]
    for module in channels_last:
        module.__class__ = torch.nn.Conv2d
    torch.testing.assert_close(tiny.decode_latents(latents, 5), plain, atol=1e-5, rtol=0)
    for module in channels_last:
        module.__class__ = ChannelsLastConv
    assert channels_last
