"""The rollout engine: one batched autoregressive step along poses of a recording, a keyboard or a policy.

Shapes: B rollouts, P history frames, L predicted frames, C, h, w latent, D pose numbers.
Row 0 of an interaction repeats the current frame; rows 1..L-1 are new (method.md sections 1 and 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.diffusion import karras_sigmas
from persistworld_cli.models.precision import small_products
from persistworld_cli.models.samplers import find_sampler
from persistworld_cli.models.world_model import Condition, WorldModel
from persistworld_cli.rollout.clipped_poses import ClippedPoses
from persistworld_cli.rollout.history import Memory, on_device
from persistworld_cli.rollout.recording import NoiseKey, Start
from persistworld_cli.seeding import generator
from persistworld_cli.stages import stage


def rollout_noise(keys: Iterable[NoiseKey], shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise (B, *shape), float32: each row a pure function of its key, on any machine."""
    return torch.stack([torch.randn(shape, generator=generator(*key)) for key in keys])


@dataclass
class RolloutState:
    """B rollouts in progress.

    Attributes:
        memory: their latents and poses.
        text: embeddings (B, E) of their instructions, or none.
        keys: each rollout's noise key.
        steps: interactions done; with the key it decides an interaction's noise.
    """

    memory: Memory
    text: torch.Tensor | None
    keys: Sequence[NoiseKey] = ()
    steps: int = 0

    def copy(self) -> RolloutState:
        """An independent copy."""
        return replace(self, memory=self.memory.copy())

    def select(self, rows: list[int]) -> RolloutState:
        """An independent copy of some rows; a row may repeat."""
        text = None if self.text is None else self.text[on_device(rows, self.text.device)]
        keys = [self.keys[row] for row in rows] if self.keys else ()
        return RolloutState(self.memory.select(rows), text, keys, self.steps)

    def branch(self, keys: Sequence[NoiseKey]) -> RolloutState:
        """Copies of a single rollout, one for each noise key; their interactions count from 0 again."""
        return replace(self.select([0] * len(keys)), keys=keys, steps=0)

    def noise_keys(self, branch: int = 0) -> list[NoiseKey]:
        """Noise keys of the next interaction, for `rollout_noise`; a ``branch`` other than 0 gives other noise."""
        return [(*key, self.steps, *((branch,) if branch else ())) for key in self.keys]

    def append(self, latents: torch.Tensor, poses: np.ndarray) -> None:
        """Complete an interaction: store its last latents (B, C, h, w) and poses (B, D)."""
        self.memory.append(latents, poses)
        self.steps += 1


class Inputs(NamedTuple):
    """Inputs of one interaction of B rollouts, before the action encoder.

    history (B, P, C, h, w), current (B, C, h, w), actions (B, P + L, D) normalised, text (B, E) or none.
    """

    history: torch.Tensor
    current: torch.Tensor
    actions: torch.Tensor
    text: torch.Tensor | None

    def select(self, rows: torch.Tensor | list[int] | slice) -> Inputs:
        """Some rows; a row may repeat."""
        text = None if self.text is None else self.text[rows]
        return Inputs(self.history[rows], self.current[rows], self.actions[rows], text)

    @classmethod
    def join(cls, parts: list[Inputs]) -> Inputs:
        """Join several into one batch."""
        texts = [p.text for p in parts if p.text is not None]
        return cls(
            torch.cat([p.history for p in parts]),
            torch.cat([p.current for p in parts]),
            torch.cat([p.actions for p in parts]),
            torch.cat(texts) if texts else None,
        )


class RolloutEngine:
    """Autoregressive rollouts of one model under one sampling setting.

    Args:
        model: the world model.
        sampling: sampler, steps, guidance, history entries, dtype.
        stat: action percentiles of the training set.
        history: the history entries to use; default `sampling.history`.
    """

    def __init__(
        self, model: WorldModel, sampling: SamplingSettings, stat: ActionStat, history: tuple[int, ...] | None = None
    ) -> None:
        self.model, self.sampling, self.stat = model, sampling, stat
        self._clipped = ClippedPoses(stat)
        self.sampler = find_sampler(sampling.sampler)
        self.entries = history or sampling.history
        self.sigmas = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(L, C, h, w): the noise one rollout needs for one interaction."""
        return (self.model.settings.num_frames, *self.model.latent_shape)

    def noise(self, state: RolloutState, branch: int = 0) -> torch.Tensor:
        """Noise (B, L, C, h, w) of the rollouts' next interaction (`RolloutState.noise_keys`)."""
        return rollout_noise(state.noise_keys(branch), self.noise_shape)

    @torch.no_grad()
    def start(
        self, first_latent: torch.Tensor, first_pose: np.ndarray, texts: list[str], keys: Sequence[NoiseKey] = ()
    ) -> RolloutState:
        """B rollouts from latents (B, C, h, w), raw poses (B, D), instructions and noise keys.

        Raises:
            PersistWorldError: data of another preset.
        """
        self.model.check_data(tuple(first_latent.shape[1:]), first_pose.shape[-1])
        text = self.model.text_embeds(texts) if self.model.settings.text_cond else None
        memory = Memory(first_latent.to(self.model.device), first_pose, self.sampling.buffer_fill)
        return RolloutState(memory, text, keys)

    def start_from(
        self,
        store: EpisodeStore,
        starts: Sequence[Start],
        keys: Sequence[NoiseKey] | None = None,
        encode_missing: bool = False,
    ) -> RolloutState:
        """B rollouts from recorded frames; ``keys``: noise keys, by default those of the starts' items.

        Raises:
            PersistWorldError: data of another preset; latents missing, unless ``encode_missing`` makes them.
        """
        first = torch.stack([first_latent(self.model, store, start, encode_missing) for start in starts])
        own = [start.item.noise_key for start in starts]
        return self.start(first, np.stack([s.pose for s in starts]), [s.text for s in starts], keys or own)

    @torch.no_grad()
    def inputs(self, state: RolloutState, poses: np.ndarray) -> Inputs:
        """Inputs of an interaction with raw poses (B, L, D); row 0 is the current pose."""
        history, past_poses = state.memory.history(self.entries)
        current, _ = state.memory.current
        actions = self.stat.normalise(np.concatenate([past_poses, poses], axis=1))
        self._clipped.watch(poses)
        return Inputs(history, current, torch.as_tensor(actions).to(self.model.device, non_blocking=True), state.text)

    def condition(self, inputs: Inputs) -> Condition:
        """The model's condition, with tokens from the current action encoder (gradients flow into it)."""
        return Condition(
            history=inputs.history,
            current=inputs.current,
            tokens=self.model.tokens(inputs.actions, inputs.text),
            noise_aug=self.sampling.noise_aug,
        )

    @torch.no_grad()
    @stage("sampling")
    def sample(self, condition: Condition, noise: torch.Tensor) -> torch.Tensor:
        """One clip (B, L, C, h, w) from unit noise of that shape."""
        sigmas = self.sigmas  # on the CPU: a GPU takes them as arguments of its kernels, and no one waits for it
        guidance = self.sampling.guidance

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                levels = x.new_full(x.shape[:1], float(sigma))
                return self.model.denoise_guided(x, levels, condition, guidance).float()

        x = noise.to(self.model.device, non_blocking=True) * (sigmas[0] ** 2 + 1).sqrt()
        clip = self.sampler(denoise, x, sigmas)
        if clip.shape != x.shape:
            raise PersistWorldError(
                f"the sampler returned {tuple(clip.shape)} for a clip of {tuple(x.shape)}", where="sampling.sampler"
            )
        return clip

    @torch.no_grad()
    def step(self, state: RolloutState, poses: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Predict an interaction (B, L, C, h, w) and store its last frame and pose; `state` advances in place."""
        predicted = self.sample(self.condition(self.inputs(state, poses)), noise)
        state.append(predicted[:, -1], poses[:, -1])
        return predicted

    def _autocast(self) -> AbstractContextManager[object]:
        return small_products(self.model.device, getattr(torch, self.sampling.dtype), self.model.dtype)


def first_latent(model: WorldModel, store: EpisodeStore, start: Start, encode_missing: bool = False) -> torch.Tensor:
    """(C, h, w): the stored latent of a start's frame; ``encode_missing``: from the videos where none was extracted.

    Raises:
        PersistWorldError: latents missing, or data of another preset.
    """
    split, episode, frame = start.split, start.item.episode, [start.item.start]
    try:
        store.latent_files(split, episode)
    except PersistWorldError:
        if not encode_missing:
            raise
        images = resize(store.frames(split, episode, frame)[0], model.world.height, model.world.width)
        latent = model.encode_frames(torch.from_numpy(images)[None])[0].cpu()
    else:
        latent = store.latents(split, episode, frame)[0]
    model.check_data(tuple(latent.shape), len(start.pose))
    return latent
