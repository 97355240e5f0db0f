"""Poses far outside the training's percentiles: one warning that names the number, and none for ordinary poses."""

from __future__ import annotations

import numpy as np
import pytest

from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.rollout.clipped_poses import ClippedPoses

STAT = ActionStat(np.array([0.0, -1.0]), np.array([1.0, 1.0]), ("x", "yaw"))


def test_many_far_poses_are_told_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    seen = ClippedPoses(STAT)
    seen.watch(np.array([[[0.5, 0.0], [0.5, 2.0]]]))  # half of them: yaw by half of its range
    seen.watch(np.full((1, 4, 2), 9.0))
    assert len(caplog.records) == 1
    assert "yaw: 1 of 2 poses, up to 1 outside -1 .. 1" in caplog.text and "x:" not in caplog.text


def test_poses_a_little_outside_and_a_few_far_ones_are_ordinary(caplog: pytest.LogCaptureFixture) -> None:
    seen = ClippedPoses(STAT)
    poses = np.tile([1.2, 0.0], (1, 100, 1))
    poses[0, 96:] = 5.0  # 4%
    seen.watch(poses)
    assert not caplog.records
    seen.watch(np.full((1, 10, 2), 5.0))
    assert "x: 14 of 110 poses" in caplog.text
