"""How much of a gradient is signal: known mixtures, and the training's own gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gradient_signal import ALL, ENCODER, layers, of_group, signal
from benchmarks.post_training import trainer
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import PostTrainSettings, Settings
from persistworld_cli.training.run import Run


def test_the_share_of_a_known_mixture_is_found() -> None:
    rng = np.random.default_rng(0)
    common, noise = rng.normal(size=5000), rng.normal(size=(40, 5000))
    for share in (0.0, 0.1, 0.5):
        made = share**0.5 * common + (1 - share) ** 0.5 * noise
        found = signal(made.astype(np.float32))
        assert found.share == pytest.approx(share, abs=0.02)
        assert found.z > 5 or not share
    assert abs(signal(noise.astype(np.float32)).z) < 3
    assert found.groups == pytest.approx(1, abs=0.1)


def test_it_is_the_gradient_of_an_update(small_world: Settings, tmp_path: Path) -> None:
    options = PostTrainSettings(
        groups=1,
        candidates=2,
        keep_best=1,
        keep_worst=1,
        prefix_max=1,
        credit="patch",
        lora_rank=4,
        lora_alpha=4,
        max_grad_norm=1e6,
    )
    settings = replace(small_world, post_train=options)
    with Run.of(settings, options, PostTrainRequest(output=tmp_path)) as work:
        own, caught = trainer(settings, work)
        found = of_group(own, 3)
        own.update(3)
        places = layers(own.switch)
    theirs = caught.gradient.numpy()
    assert np.abs(found["patch, own noise"] - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert not np.allclose(found["patch, own noise"], found["patch, shared noise"])
    assert len(places[ALL]) == len(theirs) and 0 < len(places[ENCODER]) < len(theirs)
    assert sum(map(len, places.values())) == 2 * len(theirs)  # every parameter is in one layer, and in all
