"""Training of a small world's VAE from recorded images (the full-size model uses SVD's).

Short clips of one camera, as long as the rollout engine decodes at once, so that the temporal decoder learns too. The
loss is L1 with more weight on saturated pixels (small coloured objects cover few pixels, and a plain mean loses them
first), L1 on image gradients, and a small KL.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persistworld_cli.checkpoints.loading import SCALING_NOTE, load_vae
from persistworld_cli.checkpoints.saving import save_safetensors
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.requests import PretrainVaeRequest
from persistworld_cli.config.settings import Settings, VaeSettings, WorldSettings
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.resize import resize
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import hash_of, whole_file, write_json
from persistworld_cli.models.vae import AutoencoderKLTemporalDecoder, build_vae, pixels_to_unit
from persistworld_cli.read_files import reading
from persistworld_cli.reports.progress import Meter
from persistworld_cli.stages import stage
from persistworld_cli.training.optim import Optimizers, WeightAverage, inputs_and_outputs, lr_factor
from persistworld_cli.training.run import FREE_DISK, Run, Trainer

logger = logging.getLogger(__name__)


def load_images(raw: Path, world: WorldSettings, cache: Path, quiet: bool) -> np.ndarray:
    """All images of a raw dataset at the model's rate and size, uint8 (episodes * V, N, H, W, 3), cached as .npy.

    Episodes are cut to the shortest one's length. Those that cannot be read are named and left out, as extraction does.
    Raises PersistWorldError if none is left.
    """
    if cache.exists():
        return read_images(cache)
    dataset, rows, bad = RawDataset(raw), dict[int, np.ndarray](), dict[int, PersistWorldError]()
    for episode in dataset.episodes:
        try:
            rows[episode] = dataset.clock(episode).rows(world.rate_hz)
        except PersistWorldError as error:
            bad[episode] = error
    length, count = min(map(len, rows.values()), default=0), len(dataset.episodes)
    if rows and length < (longest := max(map(len, rows.values()))):
        short = next(episode for episode, ids in rows.items() if len(ids) == length)
        message = "images: episodes are cut to their first %d frames, as many as episode %s has (the longest: %d)"
        logger.warning(message, length, short, longest)
    # written, not memory-mapped: on a full disk a memory map kills the process
    with whole_file(cache) as partial, partial.open("wb") as file:

        def write_header() -> None:  # of the same size for every number of episodes
            shape = ((count - len(bad)) * len(world.cameras), length, world.height, world.width, 3)
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

        write_header()
        with Meter("reading images", len(rows), quiet=quiet) as meter:
            for episode, ids in rows.items():
                try:
                    views = [list(dataset.images(episode, name, ids[:length].tolist())) for name in world.cameras]
                except PersistWorldError as error:
                    bad[episode], views = error, []
                for frames in views:
                    file.write(np.ascontiguousarray(resize(np.stack(frames), world.height, world.width)).data)
                meter.advance()
        reasons = "".join(f"\n  episode {k}: {bad[k].what} ({bad[k].where})" for k in sorted(bad))
        if len(bad) == count:
            what = f"none of {count} episodes can be read:{reasons}"
            raise PersistWorldError(what, where=str(raw), fix="name a LeRobot dataset: --set world.raw=FOLDER")
        if bad:
            logger.warning("warning: %d of %d episodes cannot be read and are left out:%s", len(bad), count, reasons)
        write_header()
    return read_images(cache)


def read_images(cache: Path) -> np.ndarray:
    """The cached images, memory-mapped. Raises PersistWorldError where the file is damaged."""
    with reading("unreadable cache of images", cache, "delete the file: it is made again"):
        images = np.load(cache, mmap_mode="r", allow_pickle=False)
        if images.dtype != np.uint8 or images.ndim != 5 or not images.size:
            raise ValueError(f"{images.dtype} of shape {images.shape} instead of uint8 (M, N, H, W, 3)")
        return images


def reconstruction_loss(made: torch.Tensor, real: torch.Tensor, settings: VaeSettings) -> torch.Tensor:
    """Scalar loss between images (M, 3, H, W) in [-1, 1]."""
    saturation = (real.amax(1, keepdim=True) - real.amin(1, keepdim=True)) / 2
    weight = 1 + settings.colour_weight * (saturation - 0.35).clamp(min=0) / 0.65
    loss = (weight * (made - real).abs()).mean()
    for dim in (-1, -2):
        loss = loss + settings.edge_weight * (made.diff(dim=dim) - real.diff(dim=dim)).abs().mean()
    return loss


def draw_batch(images: np.ndarray, settings: VaeSettings, step: int) -> torch.Tensor:
    """uint8 clips (batch * clip, H, W, 3): a pure function of (seed, step)."""
    rng = np.random.default_rng((settings.seed, step))
    length = clip_length(settings, step)
    count = settings.batch * settings.clip // length
    rows = rng.integers(0, images.shape[0], count)
    firsts = rng.integers(0, images.shape[1] - length + 1, count)
    clips = [images[r, f : f + length] for r, f in zip(rows, firsts, strict=True)]
    return torch.from_numpy(np.concatenate(clips))


def clip_length(settings: VaeSettings, step: int) -> int:
    """Every fifth batch is of single images: the temporal decoder must also work on one frame."""
    return 1 if step % 5 == 4 else settings.clip


class VaeTrainer(Trainer):
    """Everything that one update of the VAE needs; ``images`` are those of `load_images`."""

    shown = ("loss", "psnr")

    def __init__(self, settings: Settings, work: Run, images: np.ndarray) -> None:
        self.options, self.work, self.images = settings.vae, work, images
        torch.manual_seed(self.options.seed)
        vae = build_vae({**settings.model.vae, "scaling_factor": 1.0}, settings.model.norm_groups).to(work.device)
        if not self.options.train_encoder:
            vae.load_state_dict(load_vae(settings.model, settings.model.ckpt).state_dict())
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.vae = vae
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        self.optimizers = Optimizers(
            self.parameters,
            self.options.optimizer,
            lr=self.options.lr,
            weight_decay=1e-4,
            betas=(0.9, 0.99),
            by_adamw=inputs_and_outputs(vae),
        )
        self.average = WeightAverage(self.parameters, 0.998)

    def update(self, step: int) -> dict[str, float]:
        """One update; returns numbers if it is one to log."""
        options, device = self.options, self.work.device
        self.optimizers.set_lr(options.lr * lr_factor(step, options.updates, 50, "cosine"))
        real = pixels_to_unit(draw_batch(self.images, options, step).to(device))
        with self.work.accelerator.autocast():
            posterior = self.vae.encode(real).latent_dist
            latent = posterior.sample(generator=torch.Generator(device).manual_seed(step))
            made = self.vae.decode(latent, num_frames=clip_length(options, step)).sample.float()
        kl = posterior.kl().mean() / latent[0].numel()
        loss = reconstruction_loss(made, real, options) + options.kl * kl
        with stage("backward"):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizers.step()
        self.average.update(self.parameters)
        if (step + 1) % 20:
            return {}
        psnr = -10 * torch.log10(((made.clamp(-1, 1) - real) / 2).pow(2).mean())
        return {"loss": loss.item(), "psnr": psnr.item(), "kl": kl.item()}

    def state(self) -> dict[str, Any]:
        """As `Trainer`."""
        return {"vae": self.vae.state_dict(), "optimizers": self.optimizers.state(), **self.average.state()}

    def load_state(self, saved: dict[str, Any]) -> None:
        """As `Trainer`."""
        self.vae.load_state_dict(saved["vae"])
        self.optimizers.load_state(saved["optimizers"])
        self.average.load_state({"count": saved["step"], **saved}, self.parameters)


def run(settings: Settings, request: PretrainVaeRequest) -> dict[str, Any]:
    """Train `settings.model.vae` on the raw dataset `settings.world.raw`; one process. Resumes from its output folder.

    Writes `weights/vae.safetensors` (the averaged weights) and `weights/vae.json` with the measured `scaling_factor`,
    1 / standard deviation of the latents (SVD's 0.18215 is the same for its VAE). The weights carry it too, and
    `load_vae` compares it with the preset's.
    """
    raw, world = resolve_path(settings.world.raw), settings.world
    with Run.of(settings, settings.vae, request) as work:
        drawn = hash_of([str(raw.absolute()), world.cameras, world.height, world.width, world.rate_hz])
        images = load_images(raw, world, work.output / f"images-{drawn}.npy", not work.main)
        trainer = VaeTrainer(settings, work, images)
        work.train(trainer, work.resume(trainer), "pretrain vae", settings.vae.save_every)
        trainer.average.copy_to(trainer.parameters)
        return finish(trainer.vae, images, work, settings.vae)


def finish(vae: AutoencoderKLTemporalDecoder, images: np.ndarray, work: Run, options: VaeSettings) -> dict[str, Any]:
    """Measure the latents' scale and write the weights."""
    with torch.no_grad():
        probe = torch.cat([draw_batch(images, options, 10**9 + 5 * k) for k in range(16)])
        latents = torch.cat([vae.encode(pixels_to_unit(p).to(work.device)).latent_dist.mode() for p in probe.split(16)])
    scaling = 1 / latents.std().item()
    folder = work.output / "weights"
    tensors = {f"vae.{k}": v.contiguous().cpu() for k, v in vae.state_dict().items()}
    save_safetensors(folder / "vae.safetensors", tensors, {SCALING_NOTE: f"{scaling:.5f}"}, fix=FREE_DISK)
    result = {
        "scaling_factor": round(scaling, 5),
        "updates": options.updates,
        "latent_mean": latents.mean().item(),
        "parameters": sum(p.numel() for p in vae.parameters()),
        "weights": str(folder / "vae.safetensors"),
    }
    write_json(folder / "vae.json", result, fix=FREE_DISK)
    return result
