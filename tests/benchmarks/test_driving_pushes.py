"""The pushing policy's rows and the judge that measures how far an object moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundled_starts import extract, recorded_evidence

from benchmarks.driving_pushes import KEY, LOW, SHUT, Moved, Push
from persistworld_cli.policies.action_spaces import CARTESIAN
from persistworld_cli.policies.bundled_world.rules import DIRECTIONS, pad_positions
from persistworld_cli.policies.observation import PROMPT

DOWN = np.array([0.5, 0.0, 0.4, np.pi, 0.0, np.pi / 2])  # a hand that points straight down


@pytest.mark.parametrize("way", DIRECTIONS)
def test_the_hand_goes_down_and_then_moves_a_key_an_interaction(way: str) -> None:
    policy, rows = Push(), []
    for interaction in range(8):
        lag = 0.01 * (interaction > 0)  # the arm is not where it was commanded; its path is as long
        obs = {CARTESIAN: (rows[-1][-1, :6] if rows else DOWN) - lag, PROMPT: f"push the red box {way}"}
        rows.append(policy.infer(obs)["actions"])
        assert rows[-1].shape[1] == 7 and (rows[-1][:, 6] == SHUT).all()
    lowest = pad_positions(rows[-1])[:, 2]
    assert np.allclose(lowest, LOW, atol=0.011)
    moved = rows[-1][-1, :2] - rows[-2][-1, :2]
    assert np.allclose(moved, KEY * DIRECTIONS[way])


def test_how_far_a_recorded_object_was_pushed(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = extract(tmp_path_factory.mktemp("pushes"), [66], frames=40)
    verdict = Moved().judge(recorded_evidence(settings, 66))
    assert verdict.success and verdict.progress and 0.6 < verdict.progress < 0.8, verdict


def test_an_object_that_is_gone_at_the_end_has_not_moved_nor_stayed(tmp_path: Path) -> None:
    evidence = recorded_evidence(extract(tmp_path, [66], frames=10), 66)
    verdict = Moved().judge(replace(evidence, frames=np.concatenate([evidence.frames[:1], 0 * evidence.frames[1:]])))
    assert verdict.success is None and verdict.progress is None
