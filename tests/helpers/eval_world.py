"""A world for tests of the closed loop: mp4s, an untrained tiny model of the real classes, latents by its VAE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.settings import (
    EvalSettings,
    LaunchSettings,
    ModelSettings,
    RewardSettings,
    SamplingSettings,
    Settings,
    WorldSettings,
)
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.data.raw.video import write_mp4
from persistworld_cli.models.world_model import WorldModel, build_world_model

HEIGHT, WIDTH, VIEWS = 32, 48, 3
STATE_LOW, STATE_HIGH = -1.0, 1.0


def model_settings() -> ModelSettings:
    """The smallest network of the real classes; 4x VAE."""
    return ModelSettings(
        token_dim=32,
        tokenizer=str(bundled_root() / "presets" / "tiny" / "tokenizer"),
        unet={
            "in_channels": 8,
            "out_channels": 4,
            "block_out_channels": [32, 32],
            "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
            "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
            "num_attention_heads": [1, 1],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_frames": 11,
        },
        vae={
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "block_out_channels": [32, 32, 32],
            "layers_per_block": 1,
            "latent_channels": 4,
            "scaling_factor": 1.0,
            "force_upcast": False,
        },
        text={
            "vocab_size": 600,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "projection_dim": 16,
            "bos_token_id": 598,
            "eos_token_id": 599,
            "pad_token_id": 599,
        },
    )


def settings(root: Path, **ev: object) -> Settings:
    """Settings of the world under ``root``."""
    return Settings(
        world=WorldSettings(dataset=str(root / "world"), height=HEIGHT, width=WIDTH),
        model=replace(model_settings(), ckpt=str(root / "base.safetensors")),
        sampling=SamplingSettings(steps=2, sigma_max=80.0, decode_chunk=5),
        rewards=RewardSettings(lpips_backbone="untrained"),
        eval=replace(EvalSettings(steps=2, batch=2, sheets=3, bootstrap=100), **ev),  # type: ignore[arg-type]
        launch=LaunchSettings(device="cpu"),
    )


def fresh_model(seed: int) -> WorldModel:
    """An untrained model whose output layer is small, so that rollouts stay images."""
    torch.manual_seed(seed)
    world = WorldSettings(height=HEIGHT, width=WIDTH)
    return build_world_model(model_settings(), world).eval().requires_grad_(False)


def moving_block(length: int, seed: int) -> np.ndarray:
    """uint8 (T, V, H, W, 3): a grey table with a red block that moves to the right."""
    frames = np.full((length, VIEWS, HEIGHT, WIDTH, 3), 150, np.uint8)
    ramp = np.linspace(0, 40, WIDTH).astype(np.uint8)
    frames[..., 0] += ramp
    for frame in range(length):
        left = 4 + 2 * frame + seed
        frames[frame, :, 10:22, left : left + 12] = (210, 30, 25)
    return frames


def add_episode(data: Path, vae_model: WorldModel, split: str, episode: str, index: int, length: int) -> None:
    """Write one recorded episode: videos, latents, annotation."""
    frames = moving_block(length, index)
    for camera in range(VIEWS):
        write_mp4(data / "videos" / split / episode / f"{camera}.mp4", frames[:, camera], 5.0)
    latents = vae_model.encode_frames(torch.from_numpy(frames)).numpy()
    high = latents.shape[2] // VIEWS
    folder = data / "latent_videos" / split / episode
    folder.mkdir(parents=True)
    for camera in range(VIEWS):
        np.save(folder / f"{camera}.npy", latents[:, :, camera * high : (camera + 1) * high].astype(np.float16))
    states = np.linspace(-0.5, 0.5, length)[:, None] * np.ones(7)
    note = {"texts": ["push the red block"], "states": states.tolist(), "video_length": length, "success": True}
    (data / "annotation" / split).mkdir(parents=True, exist_ok=True)
    (data / "annotation" / split / f"{episode}.json").write_text(json.dumps(note))


def build(root: Path) -> EpisodeStore:
    """A world to train on: three training episodes and one held out, with metadata."""
    store = make_world(root, {"9": 10})
    for index in range(3):
        add_episode(store.root, fresh_model(0), "train", str(index), index, 12)
    build_meta(store.root)
    return EpisodeStore(store.root)


def make_world(root: Path, lengths: dict[str, int]) -> EpisodeStore:
    """Write a dataset with one val episode for each of ``lengths``, and two checkpoints, under ``root``."""
    data = root / "world"
    for name, seed in (("base", 0), ("other", 1)):
        model = fresh_model(seed)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(root / f"{name}.safetensors"))
    vae_model = fresh_model(0)
    for index, (episode, length) in enumerate(lengths.items()):
        add_episode(data, vae_model, "val", episode, index, length)
    (data / "meta").mkdir(parents=True)
    (data / "meta" / "stat.json").write_text(json.dumps({"state_01": [STATE_LOW] * 7, "state_99": [STATE_HIGH] * 7}))
    return EpisodeStore(data)
