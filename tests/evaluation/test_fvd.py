"""The Fréchet video distance: its formula, its network's file, and an evaluation with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_world import make_world, settings
from scipy.linalg import sqrtm

from persistworld_cli.compat import ensure_torchvision
from persistworld_cli.config.requests import EvalRequest
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation import run as eval_run
from persistworld_cli.evaluation.fvd import frechet, load_feature_network

CPU = torch.device("cpu")
NET = "mc3_18"  # the smallest of them


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict of the network's own names and shapes; its numbers are random."""
    ensure_torchvision()
    from torchvision.models import video

    path = tmp_path_factory.mktemp("net") / "mc3_18.pth"
    torch.manual_seed(0)
    torch.save(video.mc3_18(weights=None).state_dict(), path)
    return path


def test_the_distance_is_that_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 1
    one, two = np.cov(a.T), np.cov(b.T)
    gap = a.mean(0) - b.mean(0)
    want = gap @ gap + np.trace(one + two - 2 * np.real(sqrtm(one @ two)))
    assert frechet(a, b) == pytest.approx(want, rel=1e-9) and frechet(b, a) == pytest.approx(want, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a, a + 2) == pytest.approx(20)
    few = rng.normal(size=(3, 50))  # fewer clips than features
    assert frechet(few, few[::-1]) == pytest.approx(0, abs=1e-9) and frechet(few, few + 1) == pytest.approx(50)
    assert np.isnan(frechet(few[:1], few))


def test_a_file_that_is_not_the_network_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="no feature network at"):
        load_feature_network(str(tmp_path / "none.pth"), NET, CPU)
    with pytest.raises(PersistWorldError, match="does not hold r3d_18"):
        load_feature_network(str(weights), "r3d_18", CPU)
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"no weights")
    with pytest.raises(PersistWorldError, match=f"does not hold {NET}"):
        load_feature_network(str(garbage), NET, CPU)


def test_videos_are_cut_into_clips(weights: Path) -> None:
    net = load_feature_network(str(weights), NET, CPU)
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 256, (1, 24, 40, 3), dtype=np.uint8), 40, 0)
    noisy = rng.integers(0, 256, (33, 24, 40, 3), dtype=np.uint8)
    found = net.features([still, noisy, still[:15]])
    assert found.shape == (4, 512)  # two of each, none of the short one
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert np.abs(found[2] - found[0]).max() > 1e-2


def test_an_evaluation_tells_it_and_pins_the_network(weights: Path, tmp_path: Path) -> None:
    make_world(tmp_path, {"9": 18, "19": 18})
    chosen = settings(tmp_path, steps=4, sheets=0, seeds=(0,), fvd=str(weights), fvd_net=NET)
    summary = eval_run.run(chosen, EvalRequest(output=tmp_path / "out"))
    rows = {(row["model"], row["cameras"]): row for row in summary["fvd"]["rows"]}
    assert set(rows) == {(m, c) for m in ("copy first frame", "base") for c in ("exterior", "wrist")}
    assert rows["base", "exterior"]["clips"] == 4 and rows["base", "wrist"]["clips"] == 2
    assert all(row["value"] > 0 for row in rows.values())
    assert "fvd (mc3_18)" in (tmp_path / "out" / "table.txt").read_text()
    protocol = json.loads((tmp_path / "out" / "eval.json").read_text())["protocol"]
    assert protocol["fvd"]["net"] == NET and len(protocol["fvd"]["weights_sha256"]) == 64
    plain = settings(tmp_path, steps=4, sheets=0, seeds=(0,))
    with pytest.raises(PersistWorldError, match=r"fvd\.net: nothing and mc3_18|fvd\.net: mc3_18 and nothing"):
        eval_run.run(plain, EvalRequest(output=tmp_path / "plain", compare=str(tmp_path / "out")))
