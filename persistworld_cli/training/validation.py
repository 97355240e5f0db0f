"""Closed-loop validation during training: fixed held-out starts and noise, scored and as videos.

Shapes: I rollouts (distributed over the ranks), V cameras.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.videos import ComparedRollout
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, reward_of
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import load_recording, make_items
from persistworld_cli.training.run import Run

Active = Callable[[], AbstractContextManager[object]]  # puts some weights in place for a block
Scores = dict[str, list[float]]  # REWARD and each referee's name -> (I,) one number per rollout
REWARD = "reward"


class HeldOut:
    """Fixed rollouts of the held-out split, of which each rank makes its share.

    Args:
        settings: `eval` gives split, first start and seed.
        engine: of the model in training.
        store: the dataset.
        work: the run.
        count: rollouts at most, of episodes spread over the split.
        steps: interactions of each.
        batch: rollouts made together.

    Raises:
        PersistWorldError: the split has no episodes.
    """

    def __init__(
        self,
        settings: Settings,
        engine: RolloutEngine,
        store: EpisodeStore,
        work: Run,
        *,
        count: int,
        steps: int,
        batch: int,
    ) -> None:
        self.settings, self.engine, self.store, self.work = settings, engine, store, work
        self.split, self.steps, self.batch = settings.eval.split, steps, batch
        if not (episodes := store.episodes(self.split)):
            raise PersistWorldError(
                f"no '{self.split}' episodes to roll out",
                where=str(store.root),
                fix="add held-out episodes, or switch the rollouts off (validate_every, check_every, video_every = 0)",
            )
        count = min(count, len(episodes))
        chosen = [episodes[i * len(episodes) // count] for i in range(count)]
        self.items = make_items(store, self.split, chosen, settings.eval.starts[:1], settings.eval.seeds[:1])

    def roll(self, scorer: Scorer, *, keep_latents: bool = False) -> list[ScoredRollout]:
        """This rank's rollouts (every n-th) with the current weights."""
        loop = ClosedLoop(self.engine, self.store, self.split, self.steps, self.batch, scorer)
        return list(loop.roll(self.items[self.work.rank :: self.work.world], keep_latents=keep_latents))


class ClosedLoopCheck:
    """Scores weights on the same few held-out rollouts each time; ``base``: scores of the initial weights."""

    def __init__(self, held: HeldOut, scorer: Scorer) -> None:
        self.held, self.scorer = held, scorer
        self.base: Scores | None = None

    def scores(self) -> Scores:
        """Reward and referees of the rollouts with the current weights, on every rank."""
        work, found = self.held.work, []
        for row, rollout in enumerate(self.held.roll(self.scorer)):
            reward = reward_of(self.scorer, {name: value[None] for name, value in rollout.scores.items()})
            means = {name: float(np.nanmean(rollout.scores[name])) for name in self.scorer.referees}
            found.append((work.rank + work.world * row, {REWARD: float(reward[0]), **means}))
        ordered = [numbers for _, numbers in sorted(work.gather(found), key=lambda pair: pair[0])]
        return {name: [numbers[name] for numbers in ordered] for name in (REWARD, *self.scorer.referees)}

    def check(self, base: Active, now: Active) -> dict[str, float]:
        """Numbers to log: mean reward of the weights ``now`` and ``base``, share of rollouts won, means of referees."""
        if self.base is None:
            with base():
                self.base = self.scores()
        with now():
            scores = self.scores()
        numbers = {
            "val_reward": float(np.mean(scores[REWARD])),
            "val_base": float(np.mean(self.base[REWARD])),
            "val_won": float(np.mean(np.asarray(scores[REWARD]) > np.asarray(self.base[REWARD]))),
        }
        for name in self.scorer.referees:
            numbers[f"val_{name}"] = float(np.mean(scores[name]))
            numbers[f"val_base_{name}"] = float(np.mean(self.base[name]))
        return numbers

    def load_base(self, saved: Scores | list[float] | None) -> None:
        """Load a saved `base`; recomputed if it lacks a current referee (or is an older run's list)."""
        saved = {REWARD: saved} if isinstance(saved, list) else saved
        self.base = saved if saved and {REWARD, *self.scorer.referees} <= saved.keys() else None


class SampleVideos:
    """Writes `<output>/videos/step-N/EPISODE_START_SEED.mp4`, recording over predictions; each rank its share.

    ``base``: label -> weights that do not change during training; they are rolled out once.
    """

    def __init__(self, held: HeldOut, base: Mapping[str, Active] | None = None) -> None:
        self.held, self.base = held, dict(base or {})
        shown = replace(held.settings.rewards, weights={"psnr": 1.0, "ssim": 1.0})  # the numbers drawn on every frame
        self.scorer = Scorer(shown, held.settings.world, held.work.device)
        self._fixed: dict[str, list[tuple[ScoredRollout, NDArray[np.uint8]]]] = {}

    def write(self, step: int, now: Mapping[str, Active]) -> None:
        """Write the videos after an update, with the weights ``now`` (by label) below those of `base`."""
        held, settings = self.held, self.held.settings
        self._fixed |= {name: self._roll(weights) for name, weights in self.base.items() if name not in self._fixed}
        rows = self._fixed | {name: self._roll(weights) for name, weights in now.items()}
        for row in zip(*rows.values(), strict=True):
            item = row[0][0].item
            shown = ComparedRollout(
                f"episode {item.episode}, after update {step}",
                settings,
                load_recording(held.store, held.split, item, held.steps, settings.model.num_frames),
                {name: frames for name, (_, frames) in zip(rows, row, strict=True)},
                {name: rollout for name, (rollout, _) in zip(rows, row, strict=True)},
            )
            shown.write_video(held.work.output / "videos" / f"step-{step:08d}" / f"{item.name}.mp4")

    def _roll(self, weights: Active) -> list[tuple[ScoredRollout, NDArray[np.uint8]]]:
        """This rank's rollouts of some weights, each with its frames (n, V, H, W, 3), n as many as were recorded."""
        engine, drawn = self.held.engine, []
        with weights():
            rollouts = self.held.roll(self.scorer, keep_latents=True)
        for rollout in rollouts:
            assert rollout.latents is not None
            frames = draw_frames(engine.model, rollout.latents, engine.sampling)
            drawn.append((replace(rollout, latents=None), frames[: int(rollout.valid.sum())]))
        return drawn
