"""The proof's registered bars, on numbers whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.proof import MARKER, Numbers, Proof, bars, measured, registered, row
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.files import write_json

UPWARDS = {
    "reward": True,
    "exterior lpips": False,
    "exterior psnr": True,
    "wrist psnr": True,
    "wrist sharpness_gap": False,
}
EPISODES = [str(index // 2) for index in range(40)]  # two noise seeds each


def numbers(seed: int, **shift: float) -> Numbers:
    """40 rollouts; ``shift`` is added to a number, its name with a space for ``_``."""
    rng = np.random.default_rng(0)
    base = {name: 0.2 + 0.01 * rng.normal(size=40) for name in UPWARDS}
    noise = np.random.default_rng(seed + 1)
    return {name: base[name] + 0.001 * noise.normal(size=40) + shift.get(name.replace(" ", "_"), 0.0) for name in base}


def met(**shift: float) -> dict[str, bool]:
    """Which bars a post-trained model meets that differs from its base by so much; the control does not differ."""
    base = [numbers(seed) for seed in (0, 1)]
    control = [numbers(seed) for seed in (2, 3)]
    ours = [numbers(seed, **shift) for seed in (4, 5)]
    less = {name: row(other, ours, EPISODES, UPWARDS) for name, other in (("base", base), ("recorded", control))}
    means = {name: float(value.mean()) for name, value in base[0].items()}
    found = bars(less["base"], {"recorded": less["recorded"]}, less["base"]["exterior lpips"], means, UPWARDS)
    return {bar.what: bar.met for bar in found}


def test_every_bar_is_met_by_a_model_that_is_better_everywhere() -> None:
    better = {
        "reward": 0.05,
        "exterior_lpips": -0.02,
        "exterior_psnr": 0.7,
        "wrist_psnr": 0.1,
        "wrist_sharpness_gap": -0.1,
    }
    found = met(**better)
    assert len(found) == 8 and all(found.values())


def test_each_bar_is_missed_alone() -> None:
    better = {"reward": 0.05, "exterior_lpips": -0.02, "exterior_psnr": 0.7}
    assert all(met(**better).values())  # no change of the wrist is no harm
    for changed, missed in (
        ({"exterior_lpips": -0.01}, {"exterior LPIPS at least 8% lower"}),
        ({"exterior_psnr": 0.5}, {"exterior PSNR at least 0.6 dB higher"}),
        ({"wrist_psnr": -0.1}, {"wrist psnr not worse"}),
        ({"wrist_sharpness_gap": 0.1}, {"wrist sharpness_gap not worse"}),
        ({"reward": 0.0}, {"reward above base", "reward above recorded", "90% of pairs won (reward)"}),
        (
            {"exterior_lpips": 0.01},
            {"exterior LPIPS at least 8% lower", "exterior LPIPS no worse than the base's best"},
        ),
    ):
        assert {name for name, good in met(**better | changed).items() if not good} == missed


def test_only_arms_that_are_trained_to_the_end_from_this_base_are_compared(tmp_path: Path) -> None:
    settings = resolve_settings("tiny").settings
    proof = Proof("tiny", "", settings, tmp_path, updates=3)
    arm = registered(settings)[0]
    with pytest.raises(SystemExit, match="not trained to the end: post-trained-seed-0, post-trained-seed-2"):
        measured(proof, settings, tmp_path, [arm], [0, 2])
    write_json(proof.folder(arm, 0) / MARKER, proof.identity(arm, 0))
    assert proof.done(arm, 0) and not proof.done(arm, 2)
    longer = replace(settings, post_train=replace(settings.post_train, lr=1.0))
    for other in (replace(proof, updates=4), replace(proof, settings=longer)):
        with pytest.raises(SystemExit, match="take another --output"):
            other.done(arm, 0)
