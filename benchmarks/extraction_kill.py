"""`extract-latents` killed at random moments: does it still write the dataset of an unbroken run?

`python -m benchmarks.extraction_kill [--kills 20] [--episodes 0:12] [--seed 0] [--json]`

An unbroken run first, on the bundled world with the tiny preset. Then the same command into another folder, ended by
SIGKILL at a random moment after it began to stage episodes, and started again, until the kills are used up; every other
time the whole process group is killed, else only the encoder's process. A run that finishes before its kill is
compared and started again. Every file must be the same, byte for byte, except extract_report.json, which describes only
the last run; after every kill, an annotation may exist only if all files of its episode do.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.killing import kill, report, start


def tree(out: Path) -> dict[str, bytes]:
    """Every file with its bytes, less the report."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "extract_report.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def begin(episodes: str, folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """The command, on the bundled world."""
    flags = ["--preset", "tiny", "--device", "cpu", "--episodes", episodes, "--output", str(folder / "run")]
    flags += ["--restarts", "0"]  # the benchmark starts the command again itself
    return start(["extract-latents", "bundled:dataset_example/world", str(out), *flags])


def broken(out: Path, whole: dict[str, bytes]) -> list[str]:
    """Files that differ from the unbroken run's although their episode's annotation stands."""
    bad = []
    for path in (out / "annotation").glob("*/[0-9]*.json"):
        parts = [str(path.relative_to(out))]
        for kind in ("videos", "latent_videos"):
            parts += [name for name in whole if name.startswith(f"{kind}/{path.parent.name}/{path.stem}/")]
        bad += [p for p in parts if not (out / p).is_file() or (out / p).read_bytes() != whole[p]]
    return bad


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All kills and comparisons."""
    draw = random.Random(options.seed)
    begun = time.perf_counter()
    if begin(options.episodes, folder, folder / "unbroken").wait():
        raise RuntimeError("the unbroken run failed")
    whole = tree(folder / "unbroken")
    out, kills, finished, same, torn = folder / "killed", 0, 0, 0, 0
    window = options.window or (time.perf_counter() - begun) / 4
    moments: list[float] = []
    while True:
        process = begin(options.episodes, folder, out)
        if kills < options.kills:
            while process.poll() is None and not list((out / ".staging").glob("*")):
                time.sleep(0.005)
            moment = draw.uniform(0, window)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                kill(process, alone=kills % 2 == 1)
                kills += 1
                moments.append(round(moment, 2))
                torn += bool(broken(out, whole))
                continue
        if process.wait():
            raise RuntimeError("a run that nobody killed failed")
        finished += 1
        same += tree(out) == whole
        shutil.rmtree(out)
        if kills == options.kills:
            break
    return {
        "kills": kills,
        "seconds_after_staging_began": moments,
        "kills_that_left_a_torn_episode": torn,
        "files": len(whole),
        "trees_finished": finished,
        "trees_equal": same,
        "pass": same == finished and not torn,
    }


def main() -> int:
    """Measure and print; 1 where a tree differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--episodes", default="0:12")
    parser.add_argument("--window", type=float, help="latest moment, s; a quarter of the unbroken run by default")
    return report(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
