"""Memory of a rollout: one latent and one pose per interaction, and the entries that the model sees.

Shapes: B rollouts, C, h, w latent, D pose numbers.
"""

from __future__ import annotations

import copy

import numpy as np
import torch


def on_device(rows: list[int], device: torch.device) -> torch.Tensor:
    """Row numbers as an index that selects without a wait for a GPU."""
    return torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)


class Memory:
    """The buffer of B rollouts that advance together (as in Ctrl-World's loops).

    It starts as `fill` copies of the first entry; every interaction appends its last frame and pose. History is read by
    position from the end (negative) or the start (0: the first real frame).

    Args:
        latents: (B, C, h, w) first latents.
        poses: (B, D) first poses, raw units.
        fill: copies to start with.
    """

    def __init__(self, latents: torch.Tensor, poses: np.ndarray, fill: int) -> None:
        self._latents = [latents] * fill
        self._poses = [np.asarray(poses, dtype=np.float64)] * fill

    def __len__(self) -> int:
        return len(self._latents)

    @property
    def current(self) -> tuple[torch.Tensor, np.ndarray]:
        """Last latent (B, C, h, w) and pose (B, D)."""
        return self._latents[-1], self._poses[-1]

    def history(self, entries: tuple[int, ...]) -> tuple[torch.Tensor, np.ndarray]:
        """Latents (B, P, C, h, w) and poses (B, P, D) at `entries`."""
        return torch.stack([self._latents[e] for e in entries], 1), np.stack([self._poses[e] for e in entries], 1)

    def append(self, latents: torch.Tensor, poses: np.ndarray) -> None:
        """Store an interaction's last frame (B, C, h, w) and pose (B, D)."""
        self._latents.append(latents)
        self._poses.append(np.asarray(poses, dtype=np.float64))

    def copy(self) -> Memory:
        """An independent copy. Entries are shared: they are never written to."""
        other = copy.copy(self)
        other._latents, other._poses = list(self._latents), list(self._poses)
        return other

    def select(self, rows: list[int]) -> Memory:
        """An independent copy of some of the rollouts, in the given order; a row may repeat."""
        other = copy.copy(self)
        there = on_device(rows, self._latents[0].device)
        other._latents = [latent[there] for latent in self._latents]
        other._poses = [pose[rows] for pose in self._poses]
        return other
