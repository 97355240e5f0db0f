"""Closed-loop validation during post-training: fixed held-out starts, fixed noise, the base beside.

Shapes: I rollouts (shared out over the ranks), V cameras.
"""

from __future__ import annotations

import numpy as np

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.closed_loop import Rollout, iter_closed_loop, reward_of
from persistworld_cli.evaluation.recording import Item, check_item
from persistworld_cli.models.lora import PolicySwitch
from persistworld_cli.rewards.score import Scorer
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.training.run import Run


def fixed_starts(settings: Settings, store: EpisodeStore, count: int) -> list[Item]:
    """At most `count` held-out rollouts, of episodes spread over the split: the same ones each time.

    Raises:
        PersistWorldError: the split has no episodes.
    """
    split = settings.eval.split
    episodes = store.episodes(split)
    if not episodes:
        raise PersistWorldError(
            f"no '{split}' episodes to roll out",
            where=str(store.root),
            fix="add held-out episodes, or set post_train.validate_every = 0 and post_train.video_every = 0",
        )
    count = min(count, len(episodes))
    chosen = [episodes[i * len(episodes) // count] for i in range(count)]
    items = [Item(episode, settings.eval.starts[0], settings.eval.seeds[0]) for episode in chosen]
    for item in items:
        check_item(store, split, item)
    return items


class ClosedLoopCheck:
    """Scores a policy on the same few held-out rollouts each time.

    Attributes:
        base: (I,) reward of the model before post-training, once it was needed.

    Raises:
        PersistWorldError: the split has no episodes.
    """

    def __init__(
        self, settings: Settings, engine: RolloutEngine, store: EpisodeStore, scorer: Scorer, work: Run
    ) -> None:
        self.settings, self.engine, self.store, self.scorer, self.work = settings, engine, store, scorer, work
        self.items = fixed_starts(settings, store, settings.post_train.validate_rollouts)
        self.base: list[float] | None = None

    def rewards(self) -> list[float]:
        """Reward (I,) of the active policy's rollouts, on every rank."""
        work, options = self.work, self.settings.post_train
        mine = list(range(work.rank, len(self.items), work.world))
        rollouts = iter_closed_loop(
            self.engine.model,
            self.engine,
            self.store,
            [self.items[i] for i in mine],
            split=self.settings.eval.split,
            steps=options.validate_steps,
            batch=options.micro_batch * 4,
            scorer=self.scorer,
        )
        found = [(i, self._reward(rollout)) for i, rollout in zip(mine, rollouts, strict=True)]
        return [reward for _, reward in sorted(work.gather(found))]

    def check(self, switch: PolicySwitch) -> dict[str, float]:
        """Numbers to log: the sampling policy's mean reward, the base's, and the share of rollouts it wins."""
        if self.base is None:
            with switch.use("reference"):
                self.base = self.rewards()
        with switch.use("old"):
            now = self.rewards()
        return {
            "val_reward": float(np.mean(now)),
            "val_base": float(np.mean(self.base)),
            "val_won": float(np.mean(np.asarray(now) > np.asarray(self.base))),
        }

    def _reward(self, rollout: Rollout) -> float:
        return float(reward_of(self.scorer, {name: value[None] for name, value in rollout.scores.items()})[0])
