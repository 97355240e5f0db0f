"""Processed datasets without images, whose latents tell where they are from, for tests of reading clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from persistworld_cli.data.metadata.meta import build_meta

FRAME = (4, 3, 5)  # C, h1, w
CAMERAS = 3


def camera_latents(episode: int, camera: int, length: int) -> np.ndarray:
    """float32 (length, C, h1, w) of numbers that float16 holds: 256 episode + 64 camera + frame, and halves between."""
    place = np.arange(np.prod(FRAME)).reshape(FRAME) % 2 / 2
    first = 256 * (episode % 4) + 64 * camera
    return (first + np.arange(length)[:, None, None, None] + place).astype(np.float32)


def episode_latents(episode: int, length: int) -> torch.Tensor:
    """All cameras of an episode stacked: (length, C, 3 h1, w)."""
    return torch.from_numpy(np.concatenate([camera_latents(episode, c, length) for c in range(CAMERAS)], axis=2))


def latent_path(root: Path, episode: int, camera: int, suffix: str = ".npy", split: str = "train") -> Path:
    return root / "latent_videos" / split / str(episode) / f"{camera}{suffix}"


def states(episode: int, length: int) -> np.ndarray:
    return np.random.default_rng(episode).normal(size=(length, 7)).astype(np.float32)


def write_dataset(root: Path, lengths: dict[int, int], suffix: str = ".npy") -> Path:
    """A dataset of training episodes {number: frames} with metadata; latents as float16 .npy or float32 .pt."""
    for episode, length in lengths.items():
        note = {"texts": [f"task {episode}"], "states": states(episode, length).tolist(), "video_length": length}
        path = root / "annotation" / "train" / f"{episode}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note))
        for camera in range(CAMERAS):
            path = latent_path(root, episode, camera, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            latents = camera_latents(episode, camera, length)
            if suffix == ".npy":
                np.save(path, latents.astype(np.float16))
            else:
                torch.save(torch.from_numpy(latents), path)
    build_meta(root)
    return root
