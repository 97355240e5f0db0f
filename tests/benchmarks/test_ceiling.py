"""Rollouts with help: without any, they are the closed loop's; with candidates, the best of them stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_world import make_world, settings

from benchmarks.ceiling import SPREAD, helped
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ClosedLoop
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_images, to_unit
from persistworld_cli.rollout.recording import Item


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> ClosedLoop:
    folder = tmp_path_factory.mktemp("ceiling")
    make_world(folder, {"9": 14})
    s = settings(folder)
    store = EpisodeStore(folder / "world")
    engine = RolloutEngine(load_world_model(s.model, s.world, adapter=""), s.sampling, store.stat())
    return ClosedLoop(engine, store, "val", steps=3, batch=1, scorer=Scorer(s.rewards, s.world, names=("psnr",)))


def test_without_help_it_is_the_closed_loop(loop: ClosedLoop) -> None:
    (alone,) = loop.roll([Item("9")])
    own = helped(loop, loop.scorer, Item("9"))
    assert (own.scores[SPREAD] == 0).all()
    for name in loop.scorer.names:
        np.testing.assert_allclose(own.scores[name], alone.scores[name], atol=1e-4, err_msg=name)


def test_the_best_candidate_stays(loop: ClosedLoop) -> None:
    own = helped(loop, loop.scorer, Item("9"))
    best = helped(loop, loop.scorer, Item("9"), candidates=3)
    reward = {
        name: loop.scorer.by_image({n: torch.from_numpy(v[:4]) for n, v in made.scores.items() if n != SPREAD}).mean()
        for name, made in (("own", own), ("best", best))
    }  # of the first interaction: both start from the same history, and the first candidate is the own one
    assert best.scores[SPREAD].min() > 0 and reward["best"] >= reward["own"] - 1e-6


def test_with_recorded_history_every_interaction_starts_from_the_recording(loop: ClosedLoop) -> None:
    item, engine, new = Item("9"), loop.engine, loop.num_frames - 1
    made = helped(loop, loop.scorer, item, recorded_history=True)
    recording = loop.recording(item)
    state = engine.start_from(loop.store, [recording])
    for step in range(2):
        poses = recording.poses(step, loop.num_frames)
        state.append(loop.store.latents("val", "9", [new * (step + 1)]), poses[None, -1])
    clip = engine.step(state, recording.poses(2, loop.num_frames)[None], engine.noise(state))
    images = draw_images(engine.model, clip, engine.sampling, recording.size)[:, 1:]
    expected = loop.scorer.metrics(images, to_unit([recording.frames[2 * new : 3 * new]]))["psnr"][0]
    np.testing.assert_allclose(made.scores["psnr"][2 * new :], expected.numpy(), atol=1e-4)
