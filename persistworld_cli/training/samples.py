"""Videos of fixed held-out rollouts while a run trains: the record, the base and the sampling policy as rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.evaluation.closed_loop import Rollout, draw_frames, iter_closed_loop
from persistworld_cli.evaluation.pictures import write_rollout_video
from persistworld_cli.evaluation.recording import load_recording
from persistworld_cli.models.lora import PolicySwitch
from persistworld_cli.rewards.score import Scorer
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.training.run import Run
from persistworld_cli.training.validation import fixed_starts

Drawn = tuple[NDArray[np.uint8], Rollout]  # frames (n, V, H, W, 3) of a rollout, n as many as were recorded


class SampleVideos:
    """Writes `<output>/videos/step-N/EPISODE_START_SEED.mp4`; each rank those of its share of the starts.

    Raises:
        PersistWorldError: the split has no episodes.
    """

    def __init__(self, settings: Settings, engine: RolloutEngine, store: EpisodeStore, work: Run) -> None:
        self.settings, self.engine, self.store, self.work = settings, engine, store, work
        starts = fixed_starts(settings, store, settings.post_train.video_rollouts)
        self.items = starts[work.rank :: work.world]
        shown = replace(settings.rewards, weights={"psnr": 1.0, "ssim": 1.0})  # the numbers drawn on every frame
        self.scorer = Scorer(shown, settings.world, work.device)
        self.base: list[Drawn] = []

    def write(self, step: int, switch: PolicySwitch) -> list[Path]:
        """The videos after an update."""
        if not self.base:
            with switch.use("reference"):
                self.base = self._roll()
        with switch.use("old"):
            now = self._roll()
        return [self._video(step, base, policy) for base, policy in zip(self.base, now, strict=True)]

    def _roll(self) -> list[Drawn]:
        """The active policy's rollouts."""
        options, world = self.settings.post_train, self.settings.world
        model = self.engine.model
        rollouts = iter_closed_loop(
            model,
            self.engine,
            self.store,
            self.items,
            split=self.settings.eval.split,
            steps=options.validate_steps,
            batch=options.micro_batch * 4,
            scorer=self.scorer,
            keep_latents=True,
        )
        drawn = []
        for rollout in rollouts:
            assert rollout.latents is not None  # kept, as asked
            frames = draw_frames(model, rollout.latents, self.engine.sampling, world.height, world.width)
            drawn.append((frames[: int(rollout.valid.sum())], replace(rollout, latents=None)))
        return drawn

    def _video(self, step: int, base: Drawn, policy: Drawn) -> Path:
        item, split = base[1].item, self.settings.eval.split
        steps, rows = self.settings.post_train.validate_steps, self.settings.model.num_frames
        path = self.work.output / "videos" / f"step-{step:08d}" / f"{item.name}.mp4"
        write_rollout_video(
            path,
            f"episode {item.episode}, after update {step}",
            self.settings,
            load_recording(self.store, split, item, steps, rows),
            {"base": base[0], "post-trained": policy[0]},
            {"base": base[1], "post-trained": policy[1]},
        )
        return path
