"""The rollout engine: one batched autoregressive step, whoever acts (a recording, a keyboard, a policy).

Shapes: B rollouts, P history frames, L predicted frames, C, h, w latent, D pose numbers.
Row 0 of an interaction is the current frame again; rows 1..L-1 are new (method.md sections 1 and 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from persistworld_cli.config.settings import SamplingSettings
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.models.diffusion import karras_sigmas
from persistworld_cli.models.precision import small_products
from persistworld_cli.models.samplers import find_sampler
from persistworld_cli.models.world_model import Condition, WorldModel
from persistworld_cli.rollout.history import Memory
from persistworld_cli.seeding import generator


def rollout_noise(keys: Iterable[tuple[int | str, ...]], shape: tuple[int, ...]) -> torch.Tensor:
    """Unit noise (B, *shape), float32, row by row a pure function of (seed, episode, start, interaction[, branch]).

    So a rollout gets the same noise in any batch, on any machine, and for every model it is compared under.
    """
    return torch.stack([torch.randn(shape, generator=generator(*key)) for key in keys])


@dataclass
class RolloutState:
    """B rollouts in progress: their memory and their instructions' embeddings (B, E), or none."""

    memory: Memory
    text: torch.Tensor | None

    def copy(self) -> RolloutState:
        """The same rollouts, to be advanced apart from here on."""
        return RolloutState(self.memory.copy(), self.text)

    def select(self, rows: list[int]) -> RolloutState:
        """A private copy of some rows; a row may be named several times (branching)."""
        return RolloutState(self.memory.select(rows), None if self.text is None else self.text[rows])

    @classmethod
    def join(cls, states: list[RolloutState]) -> RolloutState:
        """States of equal length as one batch."""
        texts = [s.text for s in states]
        text = None if any(t is None for t in texts) else torch.cat([t for t in texts if t is not None])
        return cls(Memory.join([s.memory for s in states]), text)


class Inputs(NamedTuple):
    """What one interaction of B rollouts is predicted from, before the action encoder.

    history (B, P, C, h, w), current (B, C, h, w), actions (B, P + L, D) normalised, text (B, E) or none.
    """

    history: torch.Tensor
    current: torch.Tensor
    actions: torch.Tensor
    text: torch.Tensor | None

    def select(self, rows: torch.Tensor | list[int] | slice) -> Inputs:
        """Some rows, a row as often as named."""
        text = None if self.text is None else self.text[rows]
        return Inputs(self.history[rows], self.current[rows], self.actions[rows], text)

    @classmethod
    def join(cls, parts: list[Inputs]) -> Inputs:
        """Several as one batch."""
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
        self.sampler = find_sampler(sampling.sampler)
        self.entries = history or sampling.history
        self.sigmas = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(L, C, h, w): the noise one rollout needs for one interaction."""
        return (self.model.settings.num_frames, *self.model.latent_shape)

    @torch.no_grad()
    def start(self, first_latent: torch.Tensor, first_pose: np.ndarray, texts: list[str]) -> RolloutState:
        """B fresh rollouts from latents (B, C, h, w), raw poses (B, D) and instructions.

        Raises:
            PersistWorldError: data of another preset.
        """
        self.model.check_data(tuple(first_latent.shape[1:]), first_pose.shape[-1])
        text = self.model.text_embeds(texts) if self.model.settings.text_cond else None
        return RolloutState(Memory(first_latent.to(self.model.device), first_pose, self.sampling.buffer_fill), text)

    @torch.no_grad()
    def inputs(self, state: RolloutState, poses: np.ndarray) -> Inputs:
        """What an interaction with raw poses (B, L, D), row 0 the current pose, is predicted from."""
        history, past_poses = state.memory.history(self.entries)
        current, _ = state.memory.current
        actions = self.stat.normalise(np.concatenate([past_poses, poses], axis=1))
        return Inputs(history, current, torch.as_tensor(actions, device=self.model.device), state.text)

    def condition(self, inputs: Inputs) -> Condition:
        """The same with its tokens made by the model's present action encoder (gradients flow into it)."""
        return Condition(
            history=inputs.history,
            current=inputs.current,
            tokens=self.model.tokens(inputs.actions, inputs.text),
            noise_aug=self.sampling.noise_aug,
        )

    @torch.no_grad()
    def sample(self, condition: Condition, noise: torch.Tensor) -> torch.Tensor:
        """One clip (B, L, C, h, w) from unit noise of that shape."""
        sigmas = self.sigmas.to(self.model.device)
        guidance = self.sampling.guidance

        def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            with self._autocast():
                return self.model.denoise_guided(x, sigma.expand(x.shape[0]), condition, guidance).float()

        x = noise.to(self.model.device) * (sigmas[0] ** 2 + 1).sqrt()
        return self.sampler(denoise, x, sigmas)

    @torch.no_grad()
    def step(self, state: RolloutState, poses: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Predict an interaction (B, L, C, h, w) and remember its last frame and pose; `state` advances in place."""
        predicted = self.sample(self.condition(self.inputs(state, poses)), noise)
        state.memory.append(predicted[:, -1], poses[:, -1])
        return predicted

    def _autocast(self) -> AbstractContextManager[object]:
        return small_products(self.model.device, getattr(torch, self.sampling.dtype), self.model.dtype)


def row_ids(length: int, start: int, interaction: int, rows: int) -> NDArray[np.int64]:
    """Recorded frames (rows,) of interaction i: row k is frame start + (rows - 1) i + k, clipped to the last one."""
    return np.clip(start + (rows - 1) * interaction + np.arange(rows), 0, length - 1)


def recorded_poses(states: NDArray[np.float64], start: int, interaction: int, rows: int) -> NDArray[np.float64]:
    """Poses (rows, D) of interaction i along a recording (T, D), at `row_ids`."""
    return states[row_ids(len(states), start, interaction, rows)]
