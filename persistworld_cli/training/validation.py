"""Closed-loop validation while a run trains: fixed held-out starts, fixed noise, the weights it began from beside.

Shapes: I rollouts (shared out over the ranks), V cameras.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, reward_of
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.recording import Item, make_items
from persistworld_cli.training.run import Run

Active = Callable[[], AbstractContextManager[object]]  # puts some weights in place for a block


@dataclass(frozen=True)
class HeldOut:
    """Fixed rollouts of the held-out split; each rank makes its share of them.

    Attributes:
        settings: `eval` names split, first start and seed.
        engine: of the model in training.
        store: the dataset.
        work: the run.
        count: rollouts at most, of episodes spread over the split.
        steps: interactions of each.
        batch: rollouts made together.
    """

    settings: Settings
    engine: RolloutEngine
    store: EpisodeStore
    work: Run
    count: int
    steps: int
    batch: int

    def items(self) -> list[Item]:
        """The rollouts: the same ones each time.

        Raises:
            PersistWorldError: the split has no episodes.
        """
        split = self.settings.eval.split
        episodes = self.store.episodes(split)
        if not episodes:
            raise PersistWorldError(
                f"no '{split}' episodes to roll out",
                where=str(self.store.root),
                fix="add held-out episodes, or switch off what rolls them out (validate_every, check_every, "
                "video_every = 0)",
            )
        count = min(self.count, len(episodes))
        chosen = [episodes[i * len(episodes) // count] for i in range(count)]
        return make_items(self.store, split, chosen, self.settings.eval.starts[:1], self.settings.eval.seeds[:1])

    def roll(self, scorer: Scorer, *, keep_latents: bool = False) -> list[ScoredRollout]:
        """This rank's rollouts (every n-th) with the weights that are in place."""
        loop = ClosedLoop(self.engine, self.store, self.settings.eval.split, self.steps, self.batch, scorer)
        return list(loop.roll(self.items()[self.work.rank :: self.work.world], keep_latents=keep_latents))


Checked = dict[str, list[float]]  # REWARD and each referee's name -> (I,) one number a rollout
REWARD = "reward"


class ClosedLoopCheck:
    """Scores weights on the same few held-out rollouts each time.

    Args:
        held: which rollouts.
        scorer: metrics, reward, referees.

    Attributes:
        base: of the weights that training began from, once it was needed.

    Raises:
        PersistWorldError: the split has no episodes.
    """

    def __init__(self, held: HeldOut, scorer: Scorer) -> None:
        self.held, self.scorer = held, scorer
        self.base: Checked | None = None
        held.items()  # told before anything is trained

    def scores(self) -> Checked:
        """Reward and referees of the rollouts of the weights in place, on every rank."""
        work = self.held.work
        found = [
            (work.rank + work.world * row, self._numbers(rollout))
            for row, rollout in enumerate(self.held.roll(self.scorer))
        ]
        ordered = [numbers for _, numbers in sorted(work.gather(found), key=lambda pair: pair[0])]
        return {name: [numbers[name] for numbers in ordered] for name in (REWARD, *self.scorer.referees)}

    def check(self, base: Active, now: Active) -> dict[str, float]:
        """Numbers to log: the mean reward of the weights ``now``, that of ``base``, the share of rollouts won, and the
        means of each referee.
        """
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

    def load_base(self, saved: Checked | list[float] | None) -> None:
        """What was saved of `base`; rolled out again where it lacks a referee of now (or is an older run's list)."""
        saved = {REWARD: saved} if isinstance(saved, list) else saved
        self.base = saved if saved and {REWARD, *self.scorer.referees} <= saved.keys() else None

    def _numbers(self, rollout: ScoredRollout) -> dict[str, float]:
        means = {name: float(np.nanmean(rollout.scores[name])) for name in self.scorer.referees}
        return {REWARD: self._reward(rollout), **means}

    def _reward(self, rollout: ScoredRollout) -> float:
        return float(reward_of(self.scorer, {name: value[None] for name, value in rollout.scores.items()})[0])
