"""Waiting time of the encoder, gain of decoding in other processes, and loss through float16 latents.

`python -m benchmarks.extraction [--episodes 0:12] [--runs 3] [--workers 0,1,2] [--preset tiny] [--json]`

1. speed: the preset's raw dataset through `extract-latents`, decoding in this many processes (0: in the encoder's own),
   in turn, each run in its own process. `waited` is the share of the wall time, from when the encoder is loaded until
   the last episode is on the disk, in which it is idle; `wall_ratio` is relative to the first number of the same
   round; `cpu_s` is the CPU time of encoder and decoders (other work on the machine hardly changes it).
   Means and standard deviations over the rounds. Memory: the peak of the encoder's process (VmHWM, with torch and
   the weights), and the largest decoding process, checked after every episode.
2. float16: images of held-out episodes encoded and decoded with the latents as computed (float32) and as they are
   stored by default (float16), both compared with the image, in dB of PSNR; mean and standard deviation over images.
   The same for an encoder that computes in bf16 or fp16.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.gates import to_unit
from benchmarks.loading import peak_bytes
from persistworld_cli.checkpoints.loading import load_vae
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.extraction.pipeline import ExtractCallbacks, Progress, extract_latents
from persistworld_cli.extraction.run import DTYPES, Vae, parse_episodes
from persistworld_cli.metrics.psnr import psnr
from persistworld_cli.models.vae import decode, encode_images, unstack_cameras

_MIB = 2**20
_BATCH = 10  # frames of all cameras: what --batch 32 gives for three
# not by -m: decoding processes import the main module, and this one loads torch
_CHILD = """
import json, sys
from pathlib import Path
from benchmarks.extraction import child
print(json.dumps(child(*sys.argv[1:3], int(sys.argv[3]), Path(sys.argv[4]))))
"""


def _settings(preset: str) -> Settings:
    return load_settings(preset, [], {}, env={})


def child(preset: str, episodes: str, workers: int, out: Path) -> dict[str, Any]:
    """One extraction in this process."""
    settings = _settings(preset)
    raw = resolve_path(settings.world.raw)
    encoder = Vae(settings, settings.model.ckpt, "fp32", torch.device("cpu"))
    chosen = parse_episodes(episodes, RawDataset(raw).episodes)
    largest = [0]

    def look(progress: Progress) -> None:
        largest[0] = max([largest[0], *(p.memory_info().rss for p in psutil.Process().children())])

    callbacks = ExtractCallbacks(ready=encoder.load, progress=look)
    report = extract_latents(
        settings.world, raw, out, encoder, episodes=chosen, workers=workers, batch_frames=_BATCH, callbacks=callbacks
    )
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "wall_s": report.wall_s,
        "waited": report.waited_s / report.wall_s,
        "cpu_s": sum(part.ru_utime + part.ru_stime for part in spent),
        "encoder_mib": peak_bytes() / _MIB,
        "decoder_mib": largest[0] / _MIB,
        "frames": report.frames,
    }


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the first table: mean and standard deviation of each measure."""
    kinds = [int(number) for number in options.workers.split(",")]
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in kinds}
    for _ in range(options.runs):
        for number in kinds:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-c", _CHILD, options.preset, options.episodes, str(number), folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[number].append(json.loads(done.stdout))
    rows = []
    for number, runs in found.items():
        ratios = [run["wall_s"] / base["wall_s"] for run, base in zip(runs, found[kinds[0]], strict=True)]
        row: dict[str, Any] = {"workers": number, "n": len(runs), "frames": runs[0]["frames"]}
        measures = {name: [run[name] for run in runs] for name in runs[0] if name != "frames"}
        for name, values in {**measures, "wall_ratio": ratios}.items():
            row[name] = [round(float(np.mean(values)), 4), round(float(np.std(values, ddof=1)), 4)]
        rows.append(row)
    return rows


def storage(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the second table."""
    settings = _settings(options.preset)
    with tempfile.TemporaryDirectory() as folder:
        raw, out = resolve_path(settings.world.raw), Path(folder)
        # the images alone are of interest: an encoder of zeros costs nothing
        zeros = extract_latents(
            settings.world, raw, out, lambda f: torch.zeros(len(f), 4, 3 * len(settings.world.cameras), 4),
            episodes=parse_episodes(options.held_out, RawDataset(raw).episodes),
        )  # fmt: skip
        store = EpisodeStore(out)
        split = {episode: name for name in store.splits for episode in store.episodes(name)}
        frames = [store.frames(split[e], e, range(0, store.annotation(split[e], e).num_frames, 10)) for e in zeros.done]
    images = np.concatenate(frames)
    vae = load_vae(settings.model, settings.model.ckpt)
    real = to_unit(images).flatten(0, 1)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            torch.nn.Module.to(vae, dtype)
            stacked = encode_images(vae, torch.from_numpy(images), torch.device("cpu"))
            latents = unstack_cameras(stacked, len(settings.world.cameras)).flatten(0, 1)
            torch.nn.Module.to(vae, torch.float32)
            whole, half = (_decoded(vae, part) for part in (latents, latents.half().float()))
            best = [psnr(image, real) for image in (whole, half)]
            if not rows:
                reference = best[0]
            rows.append(
                {
                    "encoder": name,
                    "n": len(real),
                    "float32_db": _spread(best[0]),
                    "float16_db": _spread(best[1]),
                    "float16_minus_float32_db": _spread(best[1] - best[0]),
                    "minus_fp32_encoder_db": _spread(best[1] - reference),
                    "between_the_two_db": _spread(psnr(half, whole)),
                }
            )
    return rows


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images (M, 3, H, W) in [0, 1], in 8 bits as they are shown."""
    made = torch.cat([decode(vae, part, 1) for part in latents.split(16)])
    return ((made.clamp(-1, 1) + 1) * 127.5).round() / 255


def _spread(values: torch.Tensor) -> list[float]:
    return [round(float(values.mean()), 5), round(float(values.std()), 5)]


def show(rows: list[dict[str, Any]]) -> None:
    """A small table: a mean with its standard deviation as ``mean ± sd``."""
    cells = [[f"{v[0]:.4g} ± {v[1]:.2g}" if isinstance(v, list) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *cells, strict=True)]
    for line in ([*rows[0]], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--episodes", default="0:12", help="extracted in the first table")
    parser.add_argument("--held-out", default="60:66", help="whose images are decoded in the second")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--runs", type=int, default=3, help="rounds, 2 or more")
    parser.add_argument("--only", choices=("speed", "storage"), help="one table alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tables = {"speed": speed, "storage": storage}
    result = {name: make(options) for name, make in tables.items() if options.only in (None, name)}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for rows in result.values():
        show(rows)


if __name__ == "__main__":
    main()
