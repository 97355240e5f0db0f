"""`persistworld extract-latents`, the work of one process: its share of the episodes through the VAE.

It stands among the trainings because it needs what they need: processes, weights and progress.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.extract import Progress, extract_latents, merge_reports
from persistworld_cli.data.lerobot import RawDataset
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.models import vae as vae_room
from persistworld_cli.models.checkpoints import load_vae
from persistworld_cli.reports.progress import Meter
from persistworld_cli.training.run import Run


def parse_episodes(text: str | None, present: list[int]) -> set[int] | None:
    """`0:100,199` as a set: of a range, what is on disk; single numbers as they are. None for all."""
    if not text:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        try:
            if ":" in part:
                first, end = (int(x) for x in part.split(":"))
                chosen |= {e for e in present if first <= e < end}
            else:
                chosen.add(int(part))
        except ValueError as error:
            raise UsageError(f"cannot read episodes '{part}'", where="--episodes", fix="write 0:100,199") from error
    return chosen


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Extract `settings.world.raw` into `settings.world.dataset`; continues where an earlier run stopped.

    Returns counts of done, skipped, failed and absent episodes over all processes, and the failures with reasons.
    """
    work = Run(Path(job["output"]), cpu=settings.launch.device == "cpu")
    world = settings.world
    raw, out = resolve_path(world.raw), Path(resolve_path(world.dataset))
    source = job.get("vae") or settings.model.ckpt
    vae = load_vae(settings.model, source).to(work.device)

    @torch.no_grad()
    def encode(frames_u8: torch.Tensor) -> torch.Tensor:
        n, v = frames_u8.shape[:2]
        images = vae_room.pixels_to_unit(frames_u8.flatten(0, 1).to(work.device))
        return vae_room.stack_cameras(vae_room.encode(vae, images).unflatten(0, (n, v)).float()).cpu()

    present = RawDataset(raw).episodes
    chosen = parse_episodes(job.get("episodes"), present)
    share = len(present if chosen is None else chosen) // work.world
    with Meter("extract-latents", share, quiet=not work.main) as meter:

        def progress(at: Progress) -> None:
            meter.total = at.total
            meter.advance(at.settled - meter.done)
            if work.should_stop_here():
                raise KeyboardInterrupt

        report = extract_latents(
            world,
            raw,
            out,
            encode,
            episodes=chosen,
            layout=job.get("layout", "native"),
            rank=work.rank,
            world_size=work.world,
            batch_frames=max(1, int(job.get("batch", 32)) // len(world.cameras)),
            progress=progress,
            strict=bool(job.get("strict")),
            encoder_id=str(source),
        )
    work.accelerator.wait_for_everyone()
    if work.main and work.world > 1:
        merge_reports(out, work.world)
    failed = work.gather(report.failed)
    done, skipped = len(work.gather(report.done)), len(work.gather(report.skipped))
    if not done + skipped:
        raise PersistWorldError(
            "not one episode could be read", where=str(raw), fix=f"see {out / 'extract_report.json'}"
        )
    return {
        "dataset": str(out),
        "done": done,
        "already there": skipped,
        "failed": failed,
        "not on disk": report.absent,
        "exit_code": 1 if failed else 0,
    }
