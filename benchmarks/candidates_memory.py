"""Peak memory of a post-training update at each number of candidates K: measured here, estimated at full size.

`python -m benchmarks.candidates_memory [--dataset DIR] [--candidates 2,4,8,16,32] [--micro-batch 8] [--json]`

Measured: the largest resident size of the tiny preset's worker on the CPU after one update of one group (prefix 0, all
candidates kept up to 8), each in a process of its own, with glibc's own allocation. Estimated: what `post-train
--dry-run` reports for one process of the full-size preset, with 8 processes and groups.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_CHILD = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); \
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
_GIB = 2.0**30


def post_train(*flags: str) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "persistworld_cli", "post-train", *flags]


def measured(candidates: int, micro_batch: int, dataset: str | None) -> float:
    """Peak of one update on the CPU, GiB."""
    kept = min(candidates, 8)
    sets = {"keep_best": kept // 2, "keep_worst": kept // 2, "prefix_max": 0, "micro_batch": micro_batch}
    flags = [word for key, value in sets.items() for word in ("--set", f"post_train.{key}={value}")]
    flags += ["--preset", "tiny", "--device", "cpu", "--tracker", "none", "--groups", "1", "--updates", "1"]
    flags += ["--candidates", str(candidates), *(["--dataset", dataset] if dataset else [])]
    plain = ["env", "MALLOC_MMAP_MAX_=65536", "MALLOC_TRIM_THRESHOLD_=131072", "MALLOC_TOP_PAD_=131072"]
    with TemporaryDirectory() as folder:
        command = [*plain, *post_train(*flags, "--output", str(Path(folder) / "run"))]
        done = subprocess.run([sys.executable, "-c", _CHILD, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout) * 1024 / _GIB


def estimated(candidates: int) -> float:
    """Peak of a process at full size by the cost report, GiB."""
    flags = ["--preset", "persistworld", "--num-processes", "8", "--groups", "8", "--candidates", str(candidates)]
    if candidates < 16:  # the preset keeps 8 and 8
        flags += [word for key in ("best", "worst") for word in ("--set", f"post_train.keep_{key}={candidates // 2}")]
    done = subprocess.run(
        post_train(*flags, "--device", "cpu", "--dry-run", "--json"), check=True, stdout=subprocess.PIPE, text=True
    )
    cost = json.loads(done.stdout)["cost"]
    return float(cost["peak_bytes"]) / _GIB


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--candidates", default="2,4,8,16,32")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for count in map(int, options.candidates.split(",")):
        tiny = measured(count, options.micro_batch, options.dataset)
        rows.append({"candidates": count, "tiny_cpu_gib": tiny, "full_size_estimated_gib": estimated(count)})
        if not options.json:
            full = rows[-1]["full_size_estimated_gib"]
            print(f"K {count:>3}  tiny, measured {tiny:.2f} GiB   full size, estimated {full:.1f} GiB", flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
