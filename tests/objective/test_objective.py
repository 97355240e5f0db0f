"""DiffusionNFT's objective against golden section G, in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from golden_files import GoldenFiles
from golden_table import close

from persistworld_cli.models.diffusion import precondition
from persistworld_cli.objective.nft import kl_to_reference, nft_loss, sampling_decay


@pytest.mark.parametrize("case", range(4))
def test_nft_flow_cases(golden: GoldenFiles, case: int) -> None:
    data = np.load(golden / "nft.npz")
    settings = json.loads((golden / "nft_cases.json").read_text())["flow"][case]
    assert settings["adv_mode"] == "all"
    x0, noise = (torch.from_numpy(data[k]) for k in ("x0", "noise"))
    t = torch.from_numpy(data["t"]).view(-1, *[1] * (x0.ndim - 1))
    x_t = (1 - t) * x0 + t * noise
    theta = (x_t - t * torch.from_numpy(data["v_theta"])).requires_grad_()
    old = x_t - t * torch.from_numpy(data["v_old"])
    r = torch.from_numpy(data[f"flow{case}.r"])
    loss = nft_loss(theta, old, x0, r, beta=settings["beta"], weighting="self")
    close("G objective, flow", loss, data[f"flow{case}.per_sample"], 1e-10)
    close("G objective, flow", settings["adv_clip_max"] * loss.mean(), settings["policy_loss"], 1e-10)
    reference = x_t - t * torch.from_numpy(data["v_ref"])
    kl = kl_to_reference(theta, reference)
    close("G KL, flow", kl, data[f"flow{case}.kl"], 1e-10)
    total = settings["adv_clip_max"] * loss.mean() + settings["kl_beta"] * kl.mean()
    total.backward()
    close("G gradient, flow", theta.grad, data[f"flow{case}.grad"], 1e-10)


@pytest.mark.parametrize("case", range(4))
def test_nft_edm_cases(golden: GoldenFiles, case: int) -> None:
    """Clean predictions of a preconditioned network; the gradient goes back to its output F."""
    data = np.load(golden / "nft.npz")
    settings = json.loads((golden / "nft_cases.json").read_text())["edm"][case]
    x0, noise, output = (torch.from_numpy(data[k]) for k in ("x0", "noise", "F_theta"))
    sigma = torch.from_numpy(data["sigma"]).view(-1, 1, 1, 1, 1)
    noisy, scale = x0 + sigma * noise, precondition(sigma)
    output.requires_grad_()
    theta = scale.c_skip * noisy + scale.c_out * output
    old, reference = (scale.c_skip * noisy + scale.c_out * torch.from_numpy(data[k]) for k in ("F_old", "F_ref"))
    close("G clean prediction, edm", theta, data["D_theta"], 1e-10)
    r = torch.from_numpy(data[f"edm{case}.r"])
    loss = nft_loss(theta, old, x0, r, beta=settings["beta"], weighting="self")
    close("G objective, edm", loss, data[f"edm{case}.per_sample"], 1e-10)
    kl = kl_to_reference(theta, reference)
    close("G KL, edm", kl, data[f"edm{case}.kl"], 1e-10)
    total = settings["adv_clip_max"] * loss.mean() + settings["kl_beta"] * kl.mean()
    close("G objective, edm", total, settings["total_klD"], 1e-10)
    total.backward()
    close("G gradient, edm", output.grad, data[f"edm{case}.grad"], 1e-10)


def test_plain_weighting_is_the_paper_s_formula() -> None:
    g = torch.Generator().manual_seed(0)
    theta, old, x0 = (torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(3))
    r, beta = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), 0.5
    plus, minus = (1 - beta) * old + beta * theta, (1 + beta) * old - beta * theta
    expected = r * ((plus - x0) ** 2).mean(1) + (1 - r) * ((minus - x0) ** 2).mean(1)
    assert torch.allclose(nft_loss(theta, old, x0, r, beta=beta, weighting="plain"), expected)


def test_good_candidates_pull_and_bad_ones_push() -> None:
    old = torch.zeros(1, 4)
    x0 = torch.ones(1, 4)
    for r, direction in ((1.0, -1.0), (0.0, 1.0)):
        theta = old.clone().requires_grad_()
        nft_loss(theta, old, x0, torch.tensor([r]), beta=1.0).sum().backward()
        assert (theta.grad.sign() == direction).all()


def test_sampling_decay_schedules(golden: GoldenFiles) -> None:
    decay = np.load(golden / "nft_schedule_advantage.npz")["decay"]
    kinds = [("ramp", 0.0, 0.0), ("ramp", 0.001, 0.5), ("late-ramp", 0.0075, 0.999)]
    for row, (kind, rate, maximum) in zip(decay, kinds, strict=True):
        ours = [sampling_decay(step, kind, rate, maximum) for step in range(len(row))]
        close("G decay of the sampling policy", ours, row, 1e-12)
