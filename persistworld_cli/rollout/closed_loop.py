"""The closed loop: from one recorded frame, the model sees only its own frames, and the recorded poses.

Shape legend: as in `recording`; B rollouts of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import RolloutEngine, rollout_noise
from persistworld_cli.rollout.recording import Item, Recording, crop_to, load_recording, require_same_shape, to_uint8
from persistworld_cli.rollout.scoring import PLAIN, Scores, ScoringOptions, score_images

Progress = Callable[[int, int], None]  # (interactions done, interactions in all)
Commands = Callable[[Recording], NDArray[np.float64]]  # -> poses (F + 1, D) from the start on


@dataclass(frozen=True)
class Rollout:
    """One rollout and its scores.

    Attributes:
        item: which one.
        valid: (F,) False where the recording had ended: NaN in every score.
        scores: name -> (F, V) float32.
        latents: (S, L, C, h, w) float16, the predicted interactions (row 0 draws the current frame again), or None.
        seconds: wall time of its batch divided by the batch.
    """

    item: Item
    valid: NDArray[np.bool_]
    scores: Scores
    latents: NDArray[np.float16] | None
    seconds: float


def iter_closed_loop(
    model: WorldModel,
    engine: RolloutEngine,
    store: EpisodeStore,
    items: Sequence[Item],
    *,
    split: str,
    steps: int,
    batch: int,
    scorer: Scorer,
    keep_latents: bool = False,
    progress: Progress | None = None,
    scoring: ScoringOptions = PLAIN,
    commands: Commands | None = None,
) -> Iterator[Rollout]:
    """Roll out and score, ``batch`` items at a time; yields each item when its batch is done.

    An item's noise depends on its seed, episode, start and interaction only, and its frames are decoded apart from the
    other items', so its numbers do not depend on what is in its batch (up to float rounding).

    Args:
        model: the world model, on its device.
        engine: the same model's rollout engine (sampler, history, decode chunk).
        store: the dataset with latents and metadata.
        items: rollouts to make.
        split: of the dataset.
        steps: interactions S.
        batch: items rolled out together.
        scorer: metrics.
        keep_latents: keep what was predicted, for images later (`draw_frames`).
        progress: called after every interaction.
        scoring: crop, colour range, masks of the metrics.
        commands: gives the poses that a rollout gets instead of the recorded ones.

    Raises:
        PersistWorldError: an absent episode, a start beyond its end, images of another size than the model draws.
    """
    rows = model.settings.num_frames
    total = steps * -(-len(items) // max(1, batch))
    for index, begin in enumerate(range(0, len(items), max(1, batch))):
        tick = time.perf_counter()
        recordings = [load_recording(store, split, item, steps, rows) for item in items[begin : begin + batch]]
        check_cameras(model, recordings)
        if commands:
            recordings = [replace(recording, commanded=commands(recording)) for recording in recordings]
        report = _counter(progress, index * steps, total)
        scores, latents = _roll(model, engine, scorer, recordings, steps, keep_latents, report, scoring)
        seconds = (time.perf_counter() - tick) / len(recordings)
        for row, recording in enumerate(recordings):
            own = {name: value[row] for name, value in scores.items()}
            kept = latents[row] if latents is not None else None
            yield Rollout(recording.item, recording.valid, own, kept, seconds)
        if progress:
            progress((index + 1) * steps, total)  # a batch of short recordings ends early


def _counter(progress: Progress | None, done: int, total: int) -> Callable[[int], None]:
    """A callback of the interaction within a batch."""
    return lambda step: progress(done + step + 1, total) if progress else None


@torch.no_grad()
def _roll(
    model: WorldModel,
    engine: RolloutEngine,
    scorer: Scorer,
    recordings: Sequence[Recording],
    steps: int,
    keep: bool,
    report: Callable[[int], None],
    scoring: ScoringOptions,
) -> tuple[Scores, NDArray[np.float16] | None]:
    """One batch: scores name -> (B, F, V), and the predicted latents (B, S, L, C, h, w) if kept."""
    rows = model.settings.num_frames
    first = torch.stack([recording.first_latent for recording in recordings]).to(model.device)
    poses = np.stack([recording.poses(0, rows)[0] for recording in recordings])
    state = engine.start(first, poses, [recording.annotation.text for recording in recordings])
    kept: list[Tensor] = []

    def draw(step: int) -> Tensor:
        keys = [(rec.item.seed, rec.item.episode, rec.item.start, step) for rec in recordings]
        ahead = np.stack([recording.poses(step, rows) for recording in recordings])
        predicted = engine.step(state, ahead, rollout_noise(keys, engine.noise_shape))
        if keep:
            kept.append(predicted.to("cpu", torch.float16))
        report(step)
        return model.draw(predicted, engine.sampling)[:, 1:]

    scores = score_images(scorer, recordings, draw, steps, rows, scoring)
    if not keep:
        return scores, None
    while len(kept) < steps:  # every recording had ended: nothing was predicted, and nothing will be shown
        kept.append(torch.zeros_like(kept[0]))
    return scores, torch.stack(kept, 1).numpy()


def check_cameras(model: WorldModel, recordings: Sequence[Recording]) -> None:
    """Refuse recordings whose cameras or latents are not the model's, before any compute.

    Raises:
        PersistWorldError: saying which numbers differ.
    """
    for recording in recordings:
        got, views = tuple(recording.first_latent.shape), recording.frames.shape[1]
        require_same_shape(recording.item.episode, views, got, len(model.world.cameras), tuple(model.latent_shape))


@dataclass(frozen=True)
class ClosedLoopResult:
    """All rollouts as arrays: I items, F frames, V cameras.

    Attributes:
        items: the rollouts, in the order they were asked for.
        scores: metric -> (I, F, V) float32, NaN where the recording had ended.
        valid: (I, F).
        latents: (I, S, L, C, h, w) float16 or None.
    """

    items: tuple[Item, ...]
    scores: Scores
    valid: NDArray[np.bool_]
    latents: NDArray[np.float16] | None

    @classmethod
    def collect(cls, rollouts: Sequence[Rollout]) -> ClosedLoopResult:
        """Stack rollouts of one length."""
        kept = [rollout.latents for rollout in rollouts if rollout.latents is not None]
        return cls(
            items=tuple(rollout.item for rollout in rollouts),
            scores={name: np.stack([r.scores[name] for r in rollouts]) for name in rollouts[0].scores},
            valid=np.stack([rollout.valid for rollout in rollouts]),
            latents=np.stack(kept) if len(kept) == len(rollouts) else None,
        )


def run_closed_loop(
    model: WorldModel,
    engine: RolloutEngine,
    store: EpisodeStore,
    items: Sequence[Item],
    *,
    split: str,
    steps: int,
    batch: int,
    scorer: Scorer,
    keep_latents: bool = False,
    progress: Progress | None = None,
) -> ClosedLoopResult:
    """`iter_closed_loop` as arrays.

    Raises:
        PersistWorldError: no items, or as `iter_closed_loop`.
    """
    if not items:
        raise PersistWorldError(
            "nothing to roll out", where="eval.episodes, eval.starts, eval.seeds", fix="name at least one"
        )
    return ClosedLoopResult.collect(
        list(
            iter_closed_loop(
                model,
                engine,
                store,
                items,
                split=split,
                steps=steps,
                batch=batch,
                scorer=scorer,
                keep_latents=keep_latents,
                progress=progress,
            )
        )
    )


def draw_frames(
    model: WorldModel, latents: NDArray[np.float16], sampling: SamplingSettings, height: int, width: int
) -> NDArray[np.uint8]:
    """Decode a rollout's kept latents (S, L, C, h, w) to its new frames, uint8 (F, V, H, W, 3)."""
    predicted = torch.from_numpy(np.asarray(latents, dtype=np.float32)).to(model.device)
    images = torch.cat([model.draw(step, sampling)[1:] for step in predicted])
    return to_uint8(crop_to(images, height, width, where="model.vae"), model.world.pixel_rounding)


def reward_of(scorer: Scorer, scores: Scores) -> NDArray[np.float64]:
    """The training reward of rollouts from their scores name -> (I, F, V): (I,), over the frames that were scored."""
    weighted = sum(weight * scores[name].astype(np.float64) for name, weight in scorer.weights.items())
    per_camera = np.nanmean(np.asarray(weighted), axis=1)
    return np.asarray(per_camera @ scorer.camera_weights.cpu().numpy().astype(np.float64))
