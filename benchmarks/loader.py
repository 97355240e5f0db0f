"""Reading clips for training: compared with the simple way, with worker processes, and from more data than memory.

`python -m benchmarks.loader [--dataset DIR] [--repeats 5] [--workers 4] [--cold-gb 2] [--folder DIR] [--json]`

One process, warm cache, ways in turn within each repeat. The simple way parses the episode's JSON, loads the three
whole latent files, takes the frames and normalises. Gates: 20 times its samples per second in one process; with
workers, the samples of 2 GB/s of latents from a disk. CPU time per sample (of all processes) is given too, since wall
time on a shared machine is unreliable.

Then a dataset of `--cold-gb` is generated in a temporary folder and read from the disk (its pages dropped from the
cache before each repeat), by this loader and by memory maps, in a child process that is limited to 256 MiB of data
besides its libraries. Reported are samples, bytes read from the disk per sample, and the growth of the child's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persistworld_cli.config.settings import ClipSettings
from persistworld_cli.data.clips.clips import ClipSource
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import ClipMixture
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.meta import build_meta

DATASET = Path(__file__).resolve().parents[2] / "shared" / "data" / "droid_subset"
RATIO_GATE, DISK = 20.0, 2e9
FRAME, LENGTH, CAMERAS = (4, 24, 40), 110, 3  # of the generated dataset: DROID's at 5 Hz
DATA_LIMIT = 256 * 2**20


def open_mixture(root: Path, meta: Path) -> ClipMixture:
    """The training clips of one dataset as Ctrl-World draws them."""
    return ClipMixture([ClipSource(EpisodeStore(root, meta=meta), "train", ClipSettings())])


def straightforward(clips: ClipMixture, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample without index or positioned reads."""
    source = clips.sources[0]
    _, row, ids = clips.draw(0, number)
    root, episode = source.store.root, source.index.ids[row]
    note = json.loads((root / "annotation" / "train" / f"{episode}.json").read_text())
    files = [root / "latent_videos" / "train" / episode / f"{camera}.pt" for camera in range(CAMERAS)]
    latents = torch.cat([torch.load(file, weights_only=True)[list(ids)] for file in files], dim=2)
    return latents, torch.from_numpy(source.stat.normalise(np.array(note["states"])[list(ids)]))


def memory_maps(clips: ClipMixture, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sample through numpy's memory maps of .npy files, and the same index."""
    source = clips.sources[0]
    _, row, ids = clips.draw(0, number)
    folder = source.store.root / "latent_videos" / "train" / source.index.ids[row]
    parts = [np.load(folder / f"{camera}.npy", mmap_mode="r")[list(ids)] for camera in range(CAMERAS)]
    states = source.index.states[np.array(ids) + int(source.index.offsets[row])]
    return torch.cat([torch.from_numpy(part).float() for part in parts], 2), torch.from_numpy(
        source.stat.normalise(states)
    )


def ours(clips: ClipMixture, number: int) -> None:
    """One sample as the loader reads it."""
    clips.batch(0, number, 1)


def timed(read: Callable[[int], object], samples: int, first: int, cpu: Callable[[], float]) -> dict[str, float]:
    """Samples a second, and CPU microseconds a sample, of reading samples first, first + 1, ..."""
    begun, spent = time.perf_counter(), cpu()
    for number in range(first, first + samples):
        read(number)
    return {
        "per_s": samples / (time.perf_counter() - begun),
        "cpu_us": (cpu() - spent) / samples * 1e6,
    }


def family_cpu() -> float:
    """CPU seconds of this process and its living children."""
    ticks = os.sysconf("SC_CLK_TCK")
    children = Path("/proc/self/task").glob("*/children")
    pids = [pid for file in children for pid in file.read_text().split()]
    stats = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids]
    return time.process_time() + sum(int(s[11]) + int(s[12]) for s in stats) / ticks


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median and range over the repeats."""
    out: dict[str, Any] = {"n": len(runs)}
    for key in runs[0]:
        values = [run[key] for run in runs]
        out[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return out


def warm(clips: ClipMixture, repeats: int, workers: int, batch: int) -> dict[str, Any]:
    """The two ways in turns, then worker processes."""
    for number in range(len(clips)):
        ours(clips, number)
    ways: dict[str, tuple[Callable[[int], object], int, int]] = {  # how, samples a call, calls a repeat
        "straightforward": (lambda n: straightforward(clips, n), 1, 20),
        "one process": (lambda n: clips.batch(0, n, batch), batch, 50),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    ratios = []
    for repeat in range(repeats):
        for name, (way, size, calls) in ways.items():
            run = timed(way, calls, repeat * 1000, time.process_time)
            runs[name].append({"per_s": run["per_s"] * size, "cpu_us": run["cpu_us"] / size})
        last = {name: run[-1] for name, run in runs.items()}
        ratios.append(
            {
                "per_s": last["one process"]["per_s"] / last["straightforward"]["per_s"],
                "cpu": last["straightforward"]["cpu_us"] / last["one process"]["cpu_us"],
            }
        )
    many = []
    with ClipLoader(clips, batch, workers=workers, ahead=2) as loader:
        batches = loader.batches(0, 0)
        for _ in range(8 * workers):
            next(batches)
        for _ in range(repeats):
            run = timed(lambda _: next(batches), 200, 0, family_cpu)
            many.append({"per_s": run["per_s"] * batch, "cpu_us": run["cpu_us"] / batch})
    size = clips.num_frames * int(np.prod(clips.frame_shape)) * 4  # .pt is float32
    return {
        **{name: summary(values) for name, values in runs.items()},
        "ratio": summary(ratios),
        f"{workers} workers": summary(many),
        "sample_bytes": size,
        "at_2_gb_per_s": DISK / size,
    }


def generate(root: Path, gigabytes: float) -> int:
    """A dataset of float16 .npy of about that size; how many bytes its latents take."""
    rng = np.random.default_rng(0)
    count = max(2, int(gigabytes * 1e9 / (CAMERAS * LENGTH * np.prod(FRAME) * 2)))
    for episode in range(count):
        folder = root / "latent_videos" / "train" / str(episode)
        folder.mkdir(parents=True)
        for camera in range(CAMERAS):
            np.save(
                folder / f"{camera}.npy", rng.standard_normal((LENGTH, *FRAME), dtype=np.float32).astype(np.float16)
            )
        note = {"texts": [""], "states": rng.normal(size=(LENGTH, 7)).round(4).tolist(), "video_length": LENGTH}
        path = root / "annotation" / "train" / f"{episode}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note))
    build_meta(root)
    os.sync()
    return count * CAMERAS * LENGTH * int(np.prod(FRAME)) * 2


def drop_cache(root: Path) -> None:
    """Ask the kernel to forget the latent files' pages."""
    for path in (root / "latent_videos").rglob("*.npy"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def memory(key: str) -> int:
    """Bytes of one entry of this process's /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def disk_bytes() -> int:
    """Bytes that were fetched from disks for this process."""
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


def cold(root: Path, repeats: int, samples: int) -> dict[str, Any]:
    """In this (child) process: read from disk by both ways in turns, with little memory."""
    clips = open_mixture(root, root / "meta")
    ours(clips, 0)
    data = memory("VmData") + DATA_LIMIT
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    before = memory("RssAnon")
    ways = {"this loader": ours, "memory maps": memory_maps}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            drop_cache(root)
            fetched = disk_bytes()
            run = timed(lambda n, way=way: way(clips, n), samples, repeat * samples, time.process_time)
            runs[name].append({**run, "disk_kb": (disk_bytes() - fetched) / samples / 1e3})
    grown = memory("RssAnon") - before
    return {**{name: summary(values) for name, values in runs.items()}, "memory_grew_bytes": grown}


def table(result: dict[str, Any]) -> str:
    """The numbers for people."""
    lines = [f"{'way':34}{'samples/s (min..max)':>26}{'CPU us':>9}{'disk KB':>9}"]
    for group in ("warm", "cold"):
        for name, row in result.get(group, {}).items():
            if not isinstance(row, dict) or "per_s" not in row or name == "ratio":
                continue
            rate = row["per_s"]
            spread = f"{rate['median']:.0f} ({rate['min']:.0f}..{rate['max']:.0f})"
            disk = f"{row['disk_kb']['median']:.0f}" if "disk_kb" in row else ""
            lines.append(f"{group + ', ' + name:34}{spread:>26}{row['cpu_us']['median']:>9.0f}{disk:>9}")
    if "warm" in result:
        ratio, size = result["warm"]["ratio"], result["warm"]["sample_bytes"]
        for key, words in (("per_s", "samples per second"), ("cpu", "CPU time")):
            r = ratio[key]
            lines.append(f"one process / straightforward, {words}: {r['median']:.0f} ({r['min']:.0f}..{r['max']:.0f})")
        lines.append(f"2 GB/s of {size / 1e3:.0f} KB a sample: {result['warm']['at_2_gb_per_s']:.0f} samples/s")
    if "cold" in result:
        row = result["cold"]
        lines.append(
            f"read from {row['dataset_bytes'] / 1e9:.1f} GB with {DATA_LIMIT >> 20} MiB to spend: "
            f"memory grew by {row['memory_grew_bytes'] / 2**20:.0f} MiB"
        )
    return "\n".join([*lines, f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, n = {result['repeats']}"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DATASET, help="processed dataset with .pt latents")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="clips of a batch")
    parser.add_argument("--cold-gb", type=float, default=2.0, help="size of the generated dataset; 0: none")
    parser.add_argument("--samples", type=int, default=300, help="samples a repeat from the cold dataset")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cold-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cold_child:
        print(json.dumps(cold(options.cold_child, options.repeats, options.samples)))
        return
    result: dict[str, Any] = {"repeats": options.repeats}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.dataset.is_dir():
            build_meta(options.dataset, meta=Path(folder) / "meta")
            clips = open_mixture(options.dataset, Path(folder) / "meta")
            result["warm"] = warm(clips, options.repeats, options.workers, options.batch)
            many = result["warm"][f"{options.workers} workers"]["per_s"]["median"]
            result["pass"] = {
                "ratio": result["warm"]["ratio"]["per_s"]["median"] >= RATIO_GATE,
                "workers": many >= result["warm"]["at_2_gb_per_s"],
            }
        else:
            print(f"no dataset at {options.dataset}: give --dataset", file=sys.stderr)
        if options.cold_gb:
            size = generate(Path(folder) / "cold", options.cold_gb)
            command = [sys.executable, "-m", "benchmarks.loader", "--repeats", str(options.repeats)]
            command += ["--samples", str(options.samples), "--cold-child", str(Path(folder) / "cold")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result["cold"] = {"dataset_bytes": size, **json.loads(done.stdout)}
    print(json.dumps(result, indent=1) if options.json else table(result))


if __name__ == "__main__":
    main()
