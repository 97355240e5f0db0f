"""Videos of fixed held-out rollouts while a run trains: the record and some weights' predictions as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.videos import write_rollout_video
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import load_recording
from persistworld_cli.training.validation import Active, HeldOut

Drawn = tuple[NDArray[np.uint8], ScoredRollout]  # frames (n, V, H, W, 3) of a rollout, n as many as were recorded


class SampleVideos:
    """Writes `<output>/videos/step-N/EPISODE_START_SEED.mp4`; each rank those of its share of the starts.

    Args:
        held: which rollouts.
        base: label -> weights that do not change while the run trains: rolled out once.

    Raises:
        PersistWorldError: the split has no episodes.
    """

    def __init__(self, held: HeldOut, base: Mapping[str, Active] | None = None) -> None:
        self.held, self.base = held, dict(base or {})
        settings = held.settings
        shown = replace(settings.rewards, weights={"psnr": 1.0, "ssim": 1.0})  # the numbers drawn on every frame
        self.scorer = Scorer(shown, settings.world, held.work.device)
        self._fixed: dict[str, list[Drawn]] = {}
        held.items()  # told before anything is trained

    def write(self, step: int, now: Mapping[str, Active]) -> list[Path]:
        """The videos after an update, with the weights ``now`` (by label) below those of `base`."""
        for label, weights in self.base.items():
            if label not in self._fixed:
                self._fixed[label] = self._roll(weights)
        rows = self._fixed | {label: self._roll(weights) for label, weights in now.items()}
        count = min(len(own) for own in rows.values())
        return [self._video(step, {label: own[i] for label, own in rows.items()}) for i in range(count)]

    def _roll(self, weights: Active) -> list[Drawn]:
        """Rollouts of some weights."""
        engine = self.held.engine
        drawn = []
        with weights():
            rollouts = self.held.roll(self.scorer, keep_latents=True)
        for rollout in rollouts:
            assert rollout.latents is not None  # kept, as asked
            frames = draw_frames(engine.model, rollout.latents, engine.sampling)
            drawn.append((frames[: int(rollout.valid.sum())], replace(rollout, latents=None)))
        return drawn

    def _video(self, step: int, rows: Mapping[str, Drawn]) -> Path:
        settings = self.held.settings
        item = next(iter(rows.values()))[1].item
        path = self.held.work.output / "videos" / f"step-{step:08d}" / f"{item.name}.mp4"
        write_rollout_video(
            path,
            f"episode {item.episode}, after update {step}",
            settings,
            load_recording(self.held.store, settings.eval.split, item, self.held.steps, settings.model.num_frames),
            {label: frames for label, (frames, _) in rows.items()},
            {label: rollout for label, (_, rollout) in rows.items()},
        )
        return path
