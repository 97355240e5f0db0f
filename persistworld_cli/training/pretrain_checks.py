"""What is looked at while pretraining goes on: held-out loss, closed loop, videos; always of the averaged weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.mixture import ClipMixture
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.training.action_margin import HeldOutLosses, clip_by_clip, held_out_losses
from persistworld_cli.training.run import Run
from persistworld_cli.training.samples import SampleVideos
from persistworld_cli.training.schedule import WeightAverage
from persistworld_cli.training.validation import ClosedLoopCheck, HeldOut
from persistworld_cli.training.warnings import IgnoredActions, Warnings

logger = logging.getLogger(__name__)
TOGETHER = 8  # rollouts of a check
_USE_ACTIONS = (
    "Check that actions and frames are of the same time, and that action_encoder is in pretrain.parts (build-meta "
    "--check tells of actions that never change); lower pretrain.token_drop, or train longer"
)


class PretrainChecks:
    """The checks that `pretrain` asks for, each at its own rate.

    Args:
        settings: the whole preset.
        model: in training.
        val: held-out clips; None where the dataset has none.
        parameters: those that learn.
        average: their average.
        work: the run.
        store: the dataset, with the percentiles that actions are scaled by.

    Raises:
        PersistWorldError: rollouts are asked for, and the split has no episodes.
    """

    def __init__(
        self,
        settings: Settings,
        model: WorldModel,
        val: ClipMixture | None,
        parameters: list[torch.nn.Parameter],
        average: WeightAverage,
        work: Run,
        store: EpisodeStore,
    ) -> None:
        self.settings, self.options, self.work = settings, settings.pretrain, work
        self.model, self.val, self.parameters, self.average = model, val, parameters, average
        self.loop: ClosedLoopCheck | None = None
        self.videos: SampleVideos | None = None
        self.warnings = Warnings([IgnoredActions(_USE_ACTIONS)], work)
        options = self.options
        if val is None and options.validate_every and work.main:
            logger.warning("no held-out episodes: neither their loss nor whether actions are used is measured")
        if options.check_every or options.video_every:
            engine = RolloutEngine(model, settings.sampling, store.stat())
            held = partial(HeldOut, settings, engine, store, work, steps=options.check_steps, batch=TOGETHER)
            if options.check_every:
                scorer = Scorer(settings.rewards, settings.world, work.device)
                self.loop = ClosedLoopCheck(held(count=options.check_rollouts), scorer)
            if options.video_every:
                self.videos = SampleVideos(held(count=options.video_rollouts))

    @property
    def caveat(self) -> str:
        """What anyone who reads the held-out reward must know, or ""."""
        return self.loop.scorer.caveat if self.loop else ""

    def begin(self) -> None:
        """Roll out the weights that training begins from, if rollouts will be compared with theirs."""
        if self.loop and self.loop.base is None:
            with self.averaged():
                self.loop.base = self.loop.scores()

    def look(self, done: int) -> dict[str, float]:
        """The numbers due after an update; videos are written, and warnings told."""
        numbers: dict[str, float] = {}
        if self.val is not None and _due(done, self.options.validate_every):
            losses = self.losses(self.val)
            numbers |= {"val_loss": float(losses.right.mean()), **losses.numbers()}
        if self.loop and _due(done, self.options.check_every):
            numbers |= self.loop.check(nullcontext, self.averaged)
        if self.videos and _due(done, self.options.video_every):
            self.videos.write(done, {"averaged weights": self.averaged})
        self.warnings.see(done, numbers)
        return numbers

    def losses(self, source: ClipMixture) -> HeldOutLosses:
        """Losses of the averaged weights over fixed validation clips and fixed draws, with right and wrong actions."""
        with self.averaged():
            return held_out_losses(self.model, source, self.options, self.work.accelerator.autocast)

    def loss(self, source: ClipMixture) -> float:
        """Mean loss of the averaged weights over the same clips."""
        with self.averaged(), self.work.accelerator.autocast():
            return float(clip_by_clip(self.model, source, self.options).mean())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place for a block, and the model at rest."""
        self.model.eval()
        self.model.forget_texts()
        try:
            with self.average.in_place_of(self.parameters):
                yield
        finally:
            self.model.forget_texts()
            self.model.train()

    def state(self) -> dict[str, Any]:
        """To resume from."""
        return {"val_base": self.loop.base if self.loop else None, "warnings": self.warnings.state()}

    def load_state(self, saved: dict[str, Any]) -> None:
        """What `state` gave."""
        self.warnings.load_state(saved.get("warnings", {}))
        if self.loop:
            self.loop.load_base(saved.get("val_base"))


def _due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0
