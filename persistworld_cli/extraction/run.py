"""`persistworld extract-latents` in one process: encode its share of the episodes with the VAE."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import torch

from persistworld_cli.checkpoints.loading import load_vae, vae_source
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.inputs import describe_content
from persistworld_cli.config.requests import ExtractRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.extraction.pipeline import ExtractCallbacks, Progress, extract_latents
from persistworld_cli.extraction.publish import Changing, Encoder
from persistworld_cli.extraction.report import ExtractReport, merge_reports, path_of
from persistworld_cli.models.vae import encode_images
from persistworld_cli.reports.progress import Meter
from persistworld_cli.stages import stage
from persistworld_cli.training.run import Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_POLL_S = 0.5


def parse_episodes(text: str | None, present: list[int]) -> set[int] | None:
    """`0:100,199` as a set: a range gives its episodes on disk, single numbers stay as they are. None: all.

    Raises:
        UsageError: not of this form, or it names no episode on disk.
    """
    if not text:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        try:
            if ":" in part:
                first, end = part.split(":")
                chosen |= {e for e in present if int(first or 0) <= e and (not end.strip() or e < int(end))}
            else:
                chosen.add(int(part))
        except ValueError as error:
            raise UsageError(f"cannot read episodes '{part}'", where="--episodes", fix="write 0:100,199") from error
    if not chosen:
        there = f"{present[0]} to {present[-1]}" if present else "none"
        raise UsageError(
            f"'{text}' names no episode on disk", where="--episodes", fix=f"on disk are {there}; 0:100 ends at 99"
        )
    return chosen


class Vae:
    """The VAE of the settings with weights ``source``, in fp32 | bf16 | fp16; decoding begins before it is loaded."""

    def __init__(self, settings: Settings, source: str, dtype: str, device: torch.device) -> None:
        self._settings, self._source, self._dtype, self._device = settings, source, DTYPES[dtype], device
        self._vae: Any = None

    def load(self) -> None:
        """Read the weights."""
        vae = load_vae(self._settings.model, self._source)
        torch.nn.Module.to(vae, self._device, self._dtype)  # diffusers' own warns about layers that this VAE lacks
        self._vae = vae

    @stage("encoding")
    def __call__(self, frames_u8: torch.Tensor) -> torch.Tensor:
        """uint8 (N, V, H, W, 3) to latents (N, C, h, w), float32, on the encoder's device."""
        return encode_images(self._vae, frames_u8, self._device, self._settings.model.posterior)


def run(settings: Settings, request: ExtractRequest) -> dict[str, Any]:
    """Extract `settings.world.raw` into `settings.world.dataset`; continues where an earlier run stopped.

    Returns counts of done, skipped, failed and absent episodes over all processes, the failures with reasons, and the
    share of the time in which the encoder was idle.
    """
    work = Run(request.output, cpu=settings.launch.device == "cpu")
    raw, out = resolve_path(settings.world.raw), Path(resolve_path(settings.world.dataset))
    source = vae_source(request.vae, settings.model)
    dataset = RawDataset(raw)
    chosen = parse_episodes(request.episodes, dataset.episodes)
    run = work.gather([secrets.token_hex(4)])[0]  # several runs may write to this dataset
    _extract(settings, request, work, source, run, chosen)
    report = _joined(out, work, run)
    if work.main and report.other_fps:
        rates = ", ".join(f"{fps:g}" for fps in sorted(set(report.other_fps.values()))[:4])
        note(
            f"info.json says {dataset.fps:g} fps, timestamps say {rates} fps in {len(report.other_fps)} episodes: "
            "the timestamps were used"
        )
    if work.main and not report.done and not report.failed:
        note(f"finished; nothing was extracted: all {len(report.skipped)} episodes exist already")
    if not report.done and not report.skipped:
        raise PersistWorldError(
            "no episode could be read",
            where=report.failed[0]["reason"] if report.failed else str(raw),
            fix=f"all reasons are in {path_of(out)}",
        )
    return {
        "dataset": str(out),
        "done": len(report.done),
        "skipped": len(report.skipped),
        "failed": report.failed,
        "without_instruction": len(report.without_instruction),
        "other fps than info.json": len(report.other_fps),
        "absent": report.absent,
        "seconds": round(report.wall_s, 2),
        "frames": report.frames,
        "encoder_idle": round(report.waited_s / report.wall_s, 4) if report.wall_s else 0.0,
        "report": str(path_of(out)),
        "exit_code": 1 if report.failed else 0,
    }


def _extract(
    settings: Settings, request: ExtractRequest, work: Run, source: str, run: str, chosen: set[int] | None
) -> ExtractReport:
    """This process's share, encoded with the VAE of ``source``."""
    encoder, posterior = Vae(settings, source, request.dtype, work.device), settings.model.posterior
    weights = resolve_path(source)
    content = (
        str(describe_content(weights).get("sha256", "")) if weights.exists() else ""
    )  # weights from a hub: by name
    label = "extract-latents" if work.world == 1 else f"extract-latents, process 1 of {work.world}"
    with Meter(label, 0, unit="frames", quiet=not work.main) as meter:

        def progress(now: Progress) -> None:
            meter.total = now.of_frames
            episodes, idle = f"{now.episodes}/{now.of_episodes}", f"{now.waited:.0%}"
            meter.advance(now.frames - meter.done, episodes=episodes, encoder_idle=idle)

        return extract_latents(
            settings.world,
            resolve_path(settings.world.raw),
            Path(resolve_path(settings.world.dataset)),
            encoder,
            episodes=chosen,
            numbers=settings.model.action_dim,
            layout=request.layout,
            rank=work.rank,
            world_size=work.world,
            workers=_workers(settings, request),
            batch_frames=max(1, request.batch // len(settings.world.cameras)),
            strict=request.strict,
            callbacks=ExtractCallbacks(ready=encoder.load, progress=progress, stop=work.should_stop_here),
            encoder=Encoder(
                source if posterior == "mode" else f"{source}, posterior {posterior}", request.dtype, content
            ),
            changes=Changing(request.with_changes, request.command, settings.world.dataset),
            run=run,
        )


def _workers(settings: Settings, request: ExtractRequest) -> int:
    """Decoder processes beside this one: as requested, or this machine's cores shared among its processes."""
    if request.workers is not None:
        return request.workers
    local = max(1, settings.launch.num_processes // settings.launch.num_machines)
    return max(1, request.cores // local)


def _joined(out: Path, work: Run, run: str) -> ExtractReport:
    """The report over all processes, on each of them.

    Each process polls for the others' report files. A collective would time out after minutes: one process may need
    hours longer than another.
    """
    while not all(path_of(out, rank, run).exists() for rank in range(work.world)):
        if work.should_stop_here():
            raise KeyboardInterrupt
        time.sleep(_POLL_S)
    work.accelerator.wait_for_everyone()
    report = merge_reports(out, work.world, run)
    work.accelerator.wait_for_everyone()
    if work.main:
        report.write(path_of(out))
    path_of(out, work.rank, run).unlink()
    return report
