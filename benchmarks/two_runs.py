"""Two post-trainings at once on one machine: how much longer is an update than in a single run?

`python -m benchmarks.two_runs [--repeats 3] [--updates 3] [--dataset DIR] [--json]`

The bundled world and the tiny preset, small updates, on the CPU, with the real commands, which choose threads,
binding and waiting. In turn, one run alone, then two that start together. Measured are the seconds of a run's updates
after the first (metrics.jsonl); of two runs, the slower counts. OMP_* and GOMP_* are unset, so that the program itself
chooses how to use the cores. Gate: the median of the ratios is at most 2.5 (2 would be fair, as
two runs share the cores). Without --dataset, four episodes are extracted first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kill_training import extracted
from benchmarks.killing import report, start

GATE = 2.5
SMALL = {
    "groups": 1,
    "candidates": 4,
    "keep_best": 2,
    "keep_worst": 2,
    "prefix": "fixed",  # every update is as long
    "prefix_max": 2,
    "save_every": 100,
}


def seconds(outputs: Sequence[Path], dataset: str, updates: int) -> list[float]:
    """Runs that start together -> seconds of each one's updates, less the first."""
    sets = [word for key, value in SMALL.items() for word in ("--set", f"post_train.{key}={value}")]
    flags = ["--preset", "tiny", "--device", "cpu", "--tracker", "none", "--dataset", dataset]
    flags += ["--updates", str(updates + 1), *sets]
    runs = [start(["post-train", *flags, "--output", str(out)]) for out in outputs]
    codes = [run.wait() for run in runs]
    if any(codes):
        raise RuntimeError("a run failed")
    logs = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in outputs]
    return [sum(line["seconds"] for line in log[1:]) for log in logs]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All repeats."""
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_"))]:
        del os.environ[name]
    dataset = options.dataset or extracted(folder)
    alone, together = [], []
    for repeat in range(options.repeats):
        alone += seconds([folder / f"alone-{repeat}"], dataset, options.updates)
        pair = seconds([folder / f"{name}-{repeat}" for name in ("first", "second")], dataset, options.updates)
        together.append(pair)
        print(
            f"repeat {repeat + 1}: alone {alone[-1]:.1f} s, together {pair[0]:.1f} and {pair[1]:.1f} s", file=sys.stderr
        )
    ratios = [max(pair) / one for pair, one in zip(together, alone, strict=True)]
    return {
        "n": options.repeats,
        "updates": options.updates,
        "load_before": os.getloadavg()[0],
        "alone_s": [round(one, 2) for one in alone],
        "together_s": [[round(one, 2) for one in pair] for pair in together],
        "ratios": [round(ratio, 3) for ratio in ratios],
        "median": round(statistics.median(ratios), 3),
        "smallest": round(min(ratios), 3),
        "largest": round(max(ratios), 3),
        "gate": GATE,
        "pass": statistics.median(ratios) <= GATE,
    }


def main() -> int:
    """Measure and print; 1 where two runs take too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--dataset", help="a processed dataset of the tiny preset; by default one is extracted")
    return report(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
