"""The closed loop: from one recorded frame on, the model sees only its own frames and the recorded poses.

Shape legend: B rollouts of a batch, S interactions, L frames of an interaction, F = S (L-1) new frames, V cameras,
C latent channels, h, w latent, H, W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_images, to_unit
from persistworld_cli.rollout.recording import Item, Recording, load_recording
from persistworld_cli.rollout.scoring import PLAIN, Scores, ScoringOptions, score_frames

Progress = Callable[[int], None]  # interactions done since the last call
Commands = Callable[[Recording], NDArray[np.float64]]  # -> poses (F + 1, D) from the start on


@dataclass(frozen=True)
class ScoredRollout:
    """One rollout and its scores.

    Attributes:
        item: which one.
        valid: (F,) False where the recording had ended: NaN in every score.
        scores: name -> (F, V) float32.
        latents: (S, L, C, h, w) float16, the predicted interactions (row 0 repeats the current frame), or None.
        seconds: wall time of its batch divided by the batch.
    """

    item: Item
    valid: NDArray[np.bool_]
    scores: Scores
    latents: NDArray[np.float16] | None
    seconds: float


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Items cut into batches, the same for every process.

    Rounding depends on what is computed together, so several processes and resumed runs work by whole batches. Then one
    process or many, interrupted or not, give the same numbers.
    """
    size = max(1, size)
    return [list(items[begin : begin + size]) for begin in range(0, len(items), size)]


@dataclass(frozen=True)
class ClosedLoop:
    """Rolls out and scores items of one dataset with one model under one sampling setting.

    Attributes:
        engine: model, sampling, percentiles of the poses.
        store: the dataset with latents and metadata.
        split: of the dataset.
        steps: interactions S.
        batch: items rolled out together.
        scorer: metrics.
        scoring: crop, colour range, masks of the metrics.
    """

    engine: RolloutEngine
    store: EpisodeStore
    split: str
    steps: int
    batch: int
    scorer: Scorer
    scoring: ScoringOptions = PLAIN

    @property
    def num_frames(self) -> int:
        """Frames L of an interaction."""
        return self.engine.model.settings.num_frames

    def roll(
        self,
        items: Sequence[Item],
        *,
        keep_latents: bool = False,
        progress: Progress = lambda done: None,
        commands: Commands | None = None,
    ) -> Iterator[ScoredRollout]:
        """Roll out and score, a batch at a time; yields each item when its batch is done.

        An item's noise depends on its noise key and the interaction only, and its frames are decoded separately, so
        its numbers do not depend on the other items of its batch (up to float rounding).

        Args:
            items: rollouts to make.
            keep_latents: keep the predicted latents, to decode later (`draw_frames`).
            progress: called after every interaction of a batch.
            commands: returns the poses that replace a rollout's recorded ones.

        Raises:
            PersistWorldError: an absent episode, a start beyond its end, images of another size than the model draws.
        """
        for part in batches(items, self.batch):
            began = time.perf_counter()
            recordings = [self.recording(item) for item in part]
            if commands:
                recordings = [replace(recording, commanded=commands(recording)) for recording in recordings]
            scores, latents = self._roll(recordings, keep_latents, progress)
            seconds = (time.perf_counter() - began) / len(recordings)
            for row, recording in enumerate(recordings):
                own = {name: value[row] for name, value in scores.items()}
                kept = None if latents is None else latents[row]
                yield ScoredRollout(recording.item, recording.valid, own, kept, seconds)

    def recording(self, item: Item) -> Recording:
        """The recorded frames of an item."""
        return load_recording(self.store, self.split, item, self.steps, self.num_frames)

    def references(self, item: Item) -> tuple[ScoredRollout, ScoredRollout]:
        """Lower and upper reference of an item: the start frame, copied over the whole horizon; and the recording's
        latents, decoded in the same chunks as predictions.
        """
        recording, model = self.recording(item), self.engine.model
        copied = to_unit([recording.first])[:, None].expand(-1, self.num_frames - 1, -1, -1, -1, -1)

        def decoded(step: int) -> Tensor:
            ids = recording.row_ids(step, self.num_frames)
            latents = self.store.latents(self.split, item.episode, ids)[None]
            return draw_images(model, latents, self.engine.sampling, recording.size)[:, 1:]

        def scored(draw: Callable[[int], Tensor]) -> ScoredRollout:
            scores = {name: value[0] for name, value in self._score([recording], draw).items()}
            return ScoredRollout(item, recording.valid, scores, None, 0.0)

        return scored(lambda step: copied), scored(decoded)

    @torch.no_grad()
    def _roll(
        self, recordings: Sequence[Recording], keep_latents: bool, progress: Progress
    ) -> tuple[Scores, NDArray[np.float16] | None]:
        """One batch: scores name -> (B, F, V), and the predicted latents (B, S, L, C, h, w) if kept."""
        engine, size = self.engine, recordings[0].size
        state = engine.start_from(self.store, recordings)
        kept: list[Tensor] = []

        def draw(step: int) -> Tensor:
            poses = np.stack([recording.poses(step, self.num_frames) for recording in recordings])
            predicted = engine.step(state, poses, engine.noise(state))
            if keep_latents:
                kept.append(predicted.to("cpu", torch.float16))
            progress(1)
            return draw_images(engine.model, predicted, engine.sampling, size)[:, 1:]

        scores = self._score(recordings, draw)
        left = self.steps - state.steps  # interactions after the end of every recording are not predicted
        progress(left)
        if not keep_latents:
            return scores, None
        return scores, torch.stack([*kept, *[torch.zeros_like(kept[0])] * left], 1).numpy()

    @torch.no_grad()
    def _score(self, recordings: Sequence[Recording], draw: Callable[[int], Tensor]) -> Scores:
        """Scores, name -> (B, F, V), of the images (B, L-1, V, 3, H, W) in [0, 1] that ``draw`` gives for each
        interaction. It is called in order, until every recording has ended; NaN where one has.
        """
        new, cameras = self.num_frames - 1, recordings[0].frames.shape[1]
        shape = (len(recordings), self.steps * new, cameras)
        out: Scores = {}
        first = to_unit([recording.first for recording in recordings])
        for step in range(self.steps):
            frames = slice(step * new, (step + 1) * new)
            valid = np.stack([recording.valid[frames] for recording in recordings])
            if not valid.any():
                break
            target = to_unit([recording.frames[frames] for recording in recordings])
            marked = {
                masks.name: torch.from_numpy(
                    np.stack([masks.load(rec.item.episode, rec.frame_ids[frames]) for rec in recordings])
                )
                for masks in self.scoring.masks
            }
            for name, value in score_frames(self.scorer, draw(step), target, first, self.scoring, marked).items():
                scores = out.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
                scores[:, frames] = np.where(valid[:, :, None], value.cpu().numpy(), np.nan)
        return out


def reward_of(scorer: Scorer, scores: Scores) -> NDArray[np.float64]:
    """The training reward of rollouts from their scores name -> (I, F, V): (I,), over the frames that were scored."""
    weighted = sum(weight * scores[name].astype(np.float64) for name, weight in scorer.weights.items())
    per_camera = np.nanmean(np.asarray(weighted), axis=1)
    return np.asarray(per_camera @ scorer.camera_weights.cpu().numpy().astype(np.float64))
