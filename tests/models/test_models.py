"""The world model against the golden numbers, and properties that need none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from golden_files import GoldenFiles, flat
from golden_model import golden_model, thinned, worst
from golden_table import close
from safetensors.torch import load_file
from torch.nn import functional

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import PretrainSettings, SamplingSettings
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models import text, vae
from persistworld_cli.models.cpu import attention
from persistworld_cli.models.diffusion import karras_sigmas, loss_weight, precondition
from persistworld_cli.models.precision import cpu_has_bfloat16
from persistworld_cli.models.samplers import SAMPLERS, euler
from persistworld_cli.models.tokens import ActionEncoder
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model
from persistworld_cli.objective.denoising import Draws, denoising_loss
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import to_uint8


@pytest.fixture(scope="module")
def tiny() -> WorldModel:
    """The tiny preset's model with random weights."""
    settings = load_settings("tiny", [], {})
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


def test_state_dict_has_the_reference_keys_in_order(golden: GoldenFiles) -> None:
    expected = flat(json.loads((golden / "tiny_model.json").read_text())["shapes"])
    assert [(k, list(v.shape)) for k, v in golden_model().state_dict().items()] == list(expected)


@torch.no_grad()
def test_unet_forward(golden: GoldenFiles) -> None:
    model, d = golden_model(), load_file(str(golden / "unet_forward.safetensors"))
    ids, generator = d["added_time_ids"], torch.Generator().manual_seed(1)
    shapes = (2, 11, 8, 24, 16), (2, 11, 1024), (2, 1, 1024), (1, 11, 8, 9, 7)
    sample, tokens, token, odd = drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    assert torch.equal(torch.stack([x.flatten()[:4] for x in drawn]), d["drawn"])  # the reference's own inputs

    def run(sample: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        rows = sample.shape[0]
        return thinned(model.unet(sample, d["timestep"][:rows], context[:rows], ids[:rows], return_dict=False)[0])

    close("B unet, one token per frame", run(sample, tokens), d["out_frame_level_true"], 1e-5)
    close("B unet, odd size", run(odd, tokens), d["out_odd_frame_level_true"], 1e-5)
    model.unet.frame_level = False
    try:
        close("B unet, 11 tokens", run(sample, tokens), d["out_frame_level_false_seq11"], 1e-5)
        close("B unet, one token", run(sample, token), d["out_frame_level_false_seq1"], 1e-5)
    finally:
        model.unet.frame_level = True


def test_sigma_schedules(golden: GoldenFiles) -> None:
    d = load_file(str(golden / "sigma_schedules.safetensors"))
    for name in [k for k in d if k.startswith("sigmas_")]:
        steps = int(name.split("_")[1])
        sigmas = karras_sigmas(steps)
        assert torch.allclose(sigmas, d[name], rtol=1e-6, atol=1e-7)
        close("B sigma schedules", sigmas, d[name], 1e-6, relative=True)
        close("B timesteps", precondition(sigmas[:-1]).c_noise, d[f"timesteps_{steps}"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tag", ["s4_g1", "s4_g2", "s4_g2_hiszero"])
def test_sampling_step_by_step(golden: GoldenFiles, tag: str) -> None:
    """The first of two clips that the reference sampled in 4 steps, with guidance 1 or 2."""
    d = load_file(str(golden / "sampling.safetensors"))
    model = golden_model(history_cond_zero=tag.endswith("hiszero"))
    generator = torch.Generator().manual_seed(504)
    noise, image, history = (torch.randn(2, n, 4, 24, 16, generator=generator)[:1] for n in (5, 1, 6))
    condition = Condition(0.9 * history, 0.9 * image[:, 0], d["action_hidden"], 0.02)
    sigmas = karras_sigmas(4)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return model.denoise_guided(x, sigma.expand(1), condition, float(tag[4]))

    x = noise * (sigmas[0] ** 2 + 1).sqrt()
    for i, expected in enumerate(d[f"{tag}.latents_after_step"]):
        x = euler(denoise, x, sigmas[i : i + 2])  # float32 at levels of hundreds: the bound grows with the numbers
        close(f"B sampling {tag}, every step", thinned(x), expected, 1e-5, relative=True)
    close(f"B sampling {tag}, end", thinned(x), d[f"{tag}.final"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tag", ["s4_g2_b1_aug0", "s10_g2"])
def test_other_ways_of_sampling_end_where_the_reference_does(golden: GoldenFiles, tag: str) -> None:
    d = load_file(str(golden / "tiny_sampling.safetensors"))
    meta = json.loads((golden / "tiny_sampling_meta.json").read_text())[tag]
    noise, history, image, tokens = (d[f"{tag}.{k}"][:1] for k in ("noise", "history", "image", "action_hidden"))
    sampling = SamplingSettings(
        steps=meta["num_inference_steps"], guidance=meta["max_guidance"], noise_aug=meta["noise_aug_strength"]
    )
    engine = RolloutEngine(golden_model(), sampling, ActionStat(-np.ones(7), np.ones(7)))
    sampled = engine.sample(Condition(history, image, tokens, sampling.noise_aug), noise)
    close(f"B sampling {tag}, end", sampled, d[f"{tag}.final"][:1], 1e-5)


def test_training_loss_and_gradients(golden: GoldenFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without text, from the reference's tokens: its action encoder is too large to ship."""
    d = load_file(str(golden / "training.safetensors"))
    model, generator = golden_model(text_cond=False), torch.Generator().manual_seed(31)
    latent, action = 0.9 * torch.randn(2, 11, 4, 24, 16, generator=generator), torch.zeros(2, 11, 7)
    monkeypatch.setattr(model, "tokens", lambda actions, text: d["tokens"])
    loss = training_loss(model, latent, action, None, reference_draws(31))
    close("B training text_off, loss", loss.view(1), d["loss"], 1e-5)
    named = dict(model.unet.named_parameters(prefix="unet"))
    for name, expected in ((k.removeprefix("grad."), v) for k, v in d.items() if k.startswith("grad.")):
        grad = named[name].grad
        grad = grad if grad.shape == expected.shape else thinned(grad)
        close("B training text_off, gradients", grad, expected, 1e-5)
    norms = [0.0 if p.grad is None else p.grad.norm().item() for p in named.values()]  # one key: no gradient of a query
    close("B training text_off, norms of all gradients", norms, d["norms"], 1e-5, relative=True)


@pytest.mark.parametrize("tag", ["text_on", "text_on_one_dropped", "text_on_hiszero_patched"])
def test_training_with_text_and_the_references_own_encoder(golden: GoldenFiles, tag: str) -> None:
    d = load_file(str(golden / "tiny_train_forward.safetensors"))
    meta = json.loads((golden / "tiny_train_forward_meta.json").read_text())[tag]
    model = golden_model(True, meta["his_cond_zero"], golden / "tiny_ctrl_world.safetensors")
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
    loss = training_loss(model, get["latent"], get["action"], get["text_embeds"], draws)
    close(f"B training {tag}, loss", loss, meta["loss"], 1e-5)
    named = dict(model.named_parameters())
    for name, expected in ((k.removeprefix("grad."), v) for k, v in get.items() if k.startswith("grad.")):
        close(f"B training {tag}, gradients", named[name].grad, expected, 1e-5)


def reference_draws(seed: int) -> Draws:
    """The random numbers of one of the reference's losses, in its order."""
    generator = torch.Generator().manual_seed(seed)
    current_u, current_noise = torch.rand(2, generator=generator), torch.randn(2, 4, 24, 16, generator=generator)
    keep_u, sigma_z = torch.rand(2, generator=generator), torch.randn(2, generator=generator)
    noise = torch.randn(2, 11, 4, 24, 16, generator=generator)[:, 6:]
    history_z = torch.randn(2, 6, generator=generator)
    return Draws(
        current_u, current_noise, keep_u, sigma_z, noise, history_z, torch.randn(2, 6, 4, 24, 16, generator=generator)
    )


def training_loss(
    model: WorldModel, latent: torch.Tensor, action: torch.Tensor, text: torch.Tensor | None, draws: Draws
) -> torch.Tensor:
    """The mean loss of a batch, its gradients left in the network and the action encoder."""
    model.zero_grad()
    model.requires_grad_(False)
    model.unet.requires_grad_(True)
    model.action_encoder.requires_grad_(True)
    loss = denoising_loss(model, latent, action, text, draws, PretrainSettings()).mean()
    loss.backward()
    return loss.detach()


def test_action_tokens(golden: GoldenFiles) -> None:
    d = load_file(str(golden / "action_encoder.safetensors"))
    encoder = ActionEncoder(7, 1024)
    encoder.load_state_dict({k.removeprefix("weights."): v for k, v in d.items() if k.startswith("weights.")})
    with torch.no_grad():
        close("C action tokens", encoder(d["action"]), d["out_no_text"], 1e-5)
        close("C action tokens with text", encoder(d["action"], d["text_embeds"]), d["out_text"], 1e-5)
        close("C action tokens, float64", encoder.double()(d["action"].double()), d["out64_no_text"], 1e-10)


@torch.no_grad()
def test_vae_encodes_and_decodes_in_chunks(golden: GoldenFiles) -> None:
    model, d = golden_model(), load_file(str(golden / "vae.safetensors"))
    generator = torch.Generator().manual_seed(8)
    pixels = torch.randint(0, 256, (3, 3, 64, 96), generator=generator, dtype=torch.uint8).permute(0, 2, 3, 1)
    noise = torch.randn(3, 4, 8, 12, generator=generator)
    latents = 0.8 * torch.randn(15, 4, 8, 12, generator=generator)
    encoded = vae.encode(model.vae, vae.pixels_to_unit(pixels))
    close("B vae, latents", thinned(encoded) / model.vae.config.scaling_factor, d["enc_mode"], 1e-5)
    drawn = vae.encode(model.vae, vae.pixels_to_unit(pixels), noise)
    close("B vae, latents drawn from the posterior", thinned(drawn), d["enc_sample_scaled"], 1e-5)
    for chunk in (7, 5, 15, 1):
        made = vae.decode(model.vae, latents, chunk)
        close(f"B vae, images in runs of {chunk}", thinned(made, 241), d[f"dec_chunk{chunk}"], 1e-5)
        if chunk == 7:  # a number just below a whole one may fall to either side: one level, seldom
            drawn = torch.from_numpy(to_uint8(made / 2 + 0.5, "down"))
            eight_bit = (thinned(drawn, 241).int() - d["dec_chunk7_uint8"].int()).abs()
            assert eight_bit.max() <= 1 and eight_bit.sum() <= 1
    runs = vae.decode(model.vae, latents, 5, 3)
    close("B vae, runs in one batch", thinned(runs, 241), d["dec_chunk5"], 1e-5)


def test_images_become_8_bit_as_in_the_reference(golden: GoldenFiles) -> None:
    d = load_file(str(golden / "vae.safetensors"))
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
    close("B pixels to [-1, 1]", vae.pixels_to_unit(levels).flatten(), d["lut_uint8_to_fp32_norm"], 1e-6)
    drawn = (d["lut_bf16_in"] / 2 + 0.5).view(3, -1, 1)
    ours = np.moveaxis(to_uint8(drawn, "down"), -1, 0).flatten()
    close("B pixels to 8 bit, fraction cut off", ours, d["lut_fp32_to_uint8"], 0.5)


def test_edm_constants(golden: GoldenFiles) -> None:
    d = np.load(golden / "edm_preconditioning.npz")
    sigma = torch.from_numpy(d["sigma"]).double()
    got = precondition(sigma)._asdict() | {"loss_weight": loss_weight(sigma)}
    checked = [k for k in ("c_skip", "c_out", "c_in", "c_noise", "loss_weight") if k in d]
    assert len(checked) == 5
    for name in checked:
        close("B preconditioning and loss weight", got[name], d[name], 1e-10, relative=True)


def test_full_size_model_has_the_published_keys(golden: GoldenFiles) -> None:
    expected = list(flat(json.loads((golden / "ctrl_world_shapes.json").read_text())))
    settings = load_settings("ctrl-world", [], {})
    with torch.device("meta"):
        model = build_world_model(settings.model, settings.world)
    assert [(k, list(v.shape)) for k, v in model.state_dict().items()] == expected and len(expected) == 2525


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.unet.block_out_channels=32,64,128", "block_out_channels"),  # text: the brackets are missing
        ("model.unet.num_attention_heads=[1,3,4]", "64 channels .block_out_channels. in 3 heads"),
        ("model.unet.widths=[32]", "unexpected keyword argument 'widths'"),
        ("model.norm_groups=5", "64 channels in 5 groups"),
        ("model.vae.latent_channels=four", "no such network can be built"),
        ("model.text.hidden_size=33", "no such network can be built"),
    ],
)
def test_a_network_that_cannot_be_is_one_error_that_names_its_table(setting: str, message: str) -> None:
    settings = load_settings("tiny", [setting], {})
    with torch.device("meta"), pytest.raises(PersistWorldError, match=message) as told:
        build_world_model(settings.model, settings.world)
    table = ".".join(setting.split(".")[:2])
    assert told.value.where == ("model.unet" if "norm_groups" in setting else table)


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
def test_what_temporal_attention_sees_is_a_setting_with_and_without_the_faster_blocks(
    tiny: WorldModel, monkeypatch: pytest.MonkeyPatch, choice: str, tokens_seen: int
) -> None:
    settings = replace(tiny.settings, temporal_token=choice)
    fast = build_world_model(settings, tiny.world).eval()
    for module in ("unet", "vae"):
        monkeypatch.setattr(f"persistworld_cli.models.{module}.speed_up", lambda model: None)
    plain = build_world_model(settings, tiny.world).eval()
    condition, shape = random_condition(tiny, 2), tiny.latent_shape
    x, sigma = torch.randn(2, 5, *shape, generator=torch.Generator().manual_seed(2)), torch.tensor([1.0, 30.0])
    outs, images = [], []
    for model in (fast, plain):
        model.load_state_dict(tiny.state_dict())
        shown: list[torch.Tensor] = []
        for module in model.unet.modules():
            if isinstance(module, TemporalBasicTransformerBlock):
                module.attn2.register_forward_pre_hook(
                    lambda attention, args, kwargs, shown=shown: shown.append(kwargs["encoder_hidden_states"]),
                    with_kwargs=True,
                )
        outs.append(model.network(x, sigma, condition))
        assert shown and all(context.shape[1] == tokens_seen for context in shown)
        assert all(torch.equal(context[-1], condition.tokens[1, :tokens_seen]) for context in shown)
        images.append(model.decode_latents(x, 5))
    assert worst(outs[0], outs[1]) < 1e-5 * outs[1].abs().max()
    assert worst(images[0], images[1]) < 1e-5
    assert torch.equal(outs[0], tiny.network(x, sigma, condition)) == (choice == "first")


def test_no_call_of_attention_has_more_sequences_than_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip has 2880 pixels, and temporal attention a sequence for each: 23 clips are more than 65,535."""
    batches: list[int] = []
    real = functional.scaled_dot_product_attention

    def recorded(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append(q.shape[0])
        return real(q, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    many = torch.empty(24 * 2880, 5, 11, 64, device="meta")
    assert attention.attend(many, many, many, 0.125).shape == many.shape
    assert sum(batches) == len(many) and max(batches) <= 65_535

    q, k, v = torch.randn(3, 5, 2, 300, 8, generator=torch.Generator().manual_seed(0))
    whole = attention.attend(q, k, v, 0.3)
    monkeypatch.setattr(attention, "MOST", 2)
    assert torch.equal(attention.attend(q, k, v, 0.3), whole)


def test_an_instruction_that_clip_cannot_hold_is_cut_with_one_warning(
    tiny: WorldModel, caplog: pytest.LogCaptureFixture
) -> None:
    long = "push the red cube towards the far edge of the table " * 20
    short = "push the red cube forward"
    ids, mask = text.tokenize(tiny.tokenizer, [long, short])
    text.tokenize(tiny.tokenizer, [short, long])
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
    assert str(told.value.fix).startswith("use the preset" if latent else "set model.action_dim = 8 ")


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
    drawn = vae.encode_images(tiny.vae, frames, tiny.device, "sample")
    mode = vae.encode_images(tiny.vae, frames, tiny.device)
    alone = torch.cat([vae.encode_images(tiny.vae, one[None], tiny.device, "sample") for one in frames])
    assert drawn.shape == mode.shape == (3, *tiny.latent_shape) and worst(drawn, alone) < 1e-5
    first, second, _ = vae.unstack_cameras(drawn, 3).unbind(1)
    assert worst(drawn, mode) > 1e-3 and worst(first, second) > 1e-3


@torch.no_grad()
def test_cameras_keep_their_order_through_stacking() -> None:
    latent = torch.arange(2 * 3 * 4 * 5 * 6.0).view(2, 3, 4, 5, 6)
    assert worst(vae.unstack_cameras(vae.stack_cameras(latent), 3), latent) == 0


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
