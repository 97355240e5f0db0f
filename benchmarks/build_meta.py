"""Metadata at the size of DROID: time, memory and output size of `persistworld build-meta`, and the time to open it.

`python -m benchmarks.build_meta [--episodes 95600] [--folder DIR] [--distinct 0] [--json] [--keep]`

The annotations have DROID's lengths (5 Hz frames, lognormal, mean about 107) and all contents of real ones: the lists
at 15 Hz with all their digits, 2.8 kB per frame. Latents are sparse .npy files of the full size, videos empty files
(build-meta checks that they exist). That is 29 GB of JSON; `--distinct N` writes N annotations and hard-links the
others to them, so the work is the same, but the files are read from memory. Files are dropped from the page cache
before the first build. Every row is a `persistworld` process of its own; `cpu` is the CPU time of it and its children
(other work on the machine hardly changes it), memory is the largest sum of their resident sizes, sampled every 50 ms
(shared pages count once per process).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

_FRAME_BYTES = 3000  # of JSON, roughly
_BARS = {"build, s": 900.0, "build, GiB": 1.0, "open, s": 1.0}
_LISTS = {
    "observation.state.cartesian_position": 6,
    "observation.state.joint_position": 7,
    "observation.state.gripper_position": 1,
    "action.cartesian_position": 6,
    "action.joint_position": 7,
    "action.gripper_position": 1,
    "action.joint_velocity": 7,
}
_VERBS = ("Put", "Move", "Take", "Place", "Pick up", "Slide", "Push", "Turn", "Open", "Wipe with")
_THINGS = ("cup", "towel", "marker", "lid", "bowl", "spoon", "can", "block", "bottle", "plate", "drawer", "tape")
_PLACES = ("into the bowl", "to the left", "on the plate", "from the table", "next to the sink", "in the box", "")


class Tree:
    """A dataset as large as DROID. Rows of numbers are rendered once and cut out anew for every episode."""

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.rng = root, np.random.default_rng(seed)
        length = 6000
        self._rows: dict[str, list[str]] = {}
        velocity = np.zeros((length, 7))
        for t in range(1, length):
            velocity[t] = 0.97 * velocity[t - 1] + self.rng.normal(0, 0.04, 7)
        joints = 0.054 * np.cumsum(velocity, axis=0)
        for name, width in _LISTS.items():
            values = np.cumsum(self.rng.normal(0, 0.01, (length, width)), axis=0)
            values = np.abs(np.sin(values)) if width == 1 else np.sin(values) * 3.14
            if name.endswith("joint_velocity"):
                values = velocity
            elif "joint" in name:
                values = joints
            self._rows[name] = [json.dumps(row) for row in values.astype(np.float32).astype(float).tolist()]
        for name in ("observation.state.gripper_position", "action.gripper_position"):
            self._rows[name] = [row.strip("[]") for row in self._rows[name]]
        pose = zip(*(self._rows[f"observation.state.{k}_position"] for k in ("cartesian", "gripper")), strict=True)
        self._poses = [f"{place[:-1]}, {grip}]" for place, grip in pose]

    def add(self, ids: Sequence[int], distinct: int = 0) -> int:
        """Write episodes, with hard links beyond ``distinct`` (0: none); returns the annotations' bytes."""
        lengths = np.clip(self.rng.lognormal(4.5, 0.6, len(ids)), 8, 900).astype(int)
        for split in ("train", "val"):
            for folder in ("annotation", "videos", "latent_videos"):
                (self.root / folder / split).mkdir(parents=True, exist_ok=True)
        written: list[tuple[str, int]] = []
        size = 0
        for number, (episode, length) in enumerate(zip(ids, lengths.tolist(), strict=True)):
            split = "val" if episode % 100 == 99 else "train"
            path = f"{self.root}/annotation/{split}/{episode}.json"
            if distinct and number >= distinct:
                source, length = written[number % distinct]
                os.link(source, path)
            else:
                with open(path, "w") as file:
                    file.write(self._annotation(episode, split, length))
            written.append((path, length))
            size += os.stat(path).st_size
            self._files(split, episode, length)
        return size

    def _annotation(self, episode: int, split: str, length: int) -> str:
        raw = 3 * length
        at = int(self.rng.integers(0, 6000 - raw))
        states = ", ".join(self._poses[at : at + raw : 3])
        lists = [f'"{name}": [{", ".join(rows[at : at + raw])}]' for name, rows in self._rows.items()]
        head = {
            "texts": [self._text()],
            "episode_id": episode,
            "success": int(self.rng.integers(2)),
            "video_length": length,
            "state_length": length,
            "raw_length": raw,
            "videos": [{"video_path": f"videos/{split}/{episode}/{c}.mp4"} for c in range(3)],
            "latent_videos": [{"latent_video_path": f"latent_videos/{split}/{episode}/{c}.npy"} for c in range(3)],
        }
        return f'{json.dumps(head)[:-1]}, "states": [{states}], {", ".join(lists)}}}'

    def _text(self) -> str:
        """Some 50,000 different ones, many of them often."""
        if self.rng.random() < 0.4:
            return ""
        verb, thing, place = (words[int(len(words) * self.rng.random() ** 2)] for words in (_VERBS, _THINGS, _PLACES))
        rest = "" if self.rng.random() < 0.3 else f" and then number {int(self.rng.zipf(1.3)) % 100_000}"
        return f"{verb} the {thing} {place}{rest}".strip()

    def _files(self, split: str, episode: int, length: int) -> None:
        videos = f"{self.root}/videos/{split}/{episode}"
        latents = f"{self.root}/latent_videos/{split}/{episode}"
        os.mkdir(videos)
        os.mkdir(latents)
        header = np.lib.format.magic(1, 0) + _npy_header(length)
        for camera in range(3):
            os.close(os.open(f"{videos}/{camera}.mp4", os.O_CREAT))
            with open(f"{latents}/{camera}.npy", "wb") as file:
                file.write(header)
                file.truncate(len(header) + length * 4 * 24 * 40 * 2)

    def forget(self) -> None:
        """Drop the annotations from the page cache."""
        os.sync()
        for path in self.root.glob("annotation/*/*.json"):
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _npy_header(length: int) -> bytes:
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({length}, 4, 24, 40), }}"
    return (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def run(what: str, *arguments: str) -> dict[str, Any]:
    """A command's seconds, its processor's seconds, peak resident size of it and its children in GiB, and its JSON."""
    command = [sys.executable, "-m", "persistworld_cli", *arguments]
    print(f"{what}: persistworld {' '.join(arguments)}", file=sys.stderr, flush=True)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak: list[int] = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
        watcher.start()
        out, _ = process.communicate()
    seconds = time.perf_counter() - begun
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{what} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"what": what, "seconds": round(seconds, 1), "cpu": round(cpu, 1), "GiB": round(peak[0] / 2**30, 3)}
    print(row, file=sys.stderr, flush=True)
    return {**row, "result": json.loads(out)}


def _watch(pid: int, peak: list[int]) -> None:
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for member in (process, *process.children(recursive=True)):
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


_OPEN = """
import json, sys, time
from persistworld_cli.data.metadata.index import IndexFile, ActionStat
from pathlib import Path
begun = time.perf_counter()
index = IndexFile(Path(sys.argv[1]) / "index.safetensors").split("train")
stat = ActionStat.load(Path(sys.argv[1]) / "stat.json")
print(json.dumps({"seconds": time.perf_counter() - begun, "episodes": len(index.ids), "frames": len(index.states)}))
"""


def opening(meta: Path, times: int = 5) -> list[dict[str, Any]]:
    """Seconds from having imported to having the training split and its percentiles, each in a new process."""
    command = [sys.executable, "-c", _OPEN, str(meta)]
    return [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(times)]


def measure(root: Path, episodes: int, distinct: int) -> dict[str, Any]:
    """Generate, run everything, tell."""
    tree = Tree(root)
    begun = time.perf_counter()
    size = tree.add(range(episodes), distinct)
    made = time.perf_counter() - begun
    print(f"generated {size / 1e9:.1f} GB of annotations in {made:.0f} s", file=sys.stderr)
    tree.forget()
    base = ("build-meta", str(root), "--preset", "ctrl-world", "--json")
    rows = [run("build", *base)]
    index = root / "meta" / "index.safetensors"
    built = index.stat().st_size
    rows.append(run("nothing new", *base))
    tree.add(range(episodes, episodes + 100))
    rows.append(run("100 episodes more", *base))
    updated = [
        (root / "meta" / name).read_bytes()
        for name in ("index.safetensors", "stat.json", "joint_velocity_adapter.json")
    ]
    opened = opening(root / "meta")
    rows.append(run("all again (--fresh)", *base, "--fresh"))
    again = [
        (root / "meta" / name).read_bytes()
        for name in ("index.safetensors", "stat.json", "joint_velocity_adapter.json")
    ]
    rows.append(run("with export", *base, "--export", "ctrl-world"))
    lists = root / "meta_info" / root.resolve().name
    rows.append(run("with import", *base, "--import", str(lists)))
    told = rows[0]["result"]
    return {
        "episodes": told["episodes"],
        "frames": told["frames"],
        "instructions": told["health"]["instructions"],
        "annotations, GB": round(size / 1e9, 2),
        "distinct annotations": distinct or episodes,
        "cores": len(os.sched_getaffinity(0)),
        "index, MB": round(built / 1e6, 1),
        "lists, MB": round(sum(p.stat().st_size for p in lists.iterdir()) / 1e6, 1),
        "opening, s": [round(o["seconds"], 3) for o in opened],
        "update equals rebuild": updated == again,
        "read": {row["what"]: row["result"]["read"] for row in rows},
        "runs": [{k: v for k, v in row.items() if k != "result"} for row in rows],
        "pass": {
            "build within 15 min": rows[0]["seconds"] <= _BARS["build, s"],
            "peak within 1 GiB": max(row["GiB"] for row in rows) <= _BARS["build, GiB"],
            "opens within 1 s": max(o["seconds"] for o in opened) <= _BARS["open, s"],
        },
    }


def main() -> None:
    """Check the disk, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=95_600)
    parser.add_argument("--distinct", type=int, default=0, help="annotations with contents of their own; 0: all")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--keep", action="store_true", help="leave the tree")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="build_meta-", dir=options.folder))
    try:
        need = (options.distinct or options.episodes) * 107 * _FRAME_BYTES + options.episodes * 40_000
        free = shutil.disk_usage(folder).free
        if free < 1.2 * need:
            raise SystemExit(
                f"{need / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free: give --distinct or --folder"
            )
        result = measure(folder, options.episodes, options.distinct)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        if name != "runs":
            print(f"{name:24} {value}")
    print(f"\n{'':24} {'s':>8} {'cpu s':>8} {'GiB':>8}")
    for row in result["runs"]:
        print(f"{row['what']:24} {row['seconds']:8.1f} {row['cpu']:8.1f} {row['GiB']:8.3f}")


if __name__ == "__main__":
    main()
