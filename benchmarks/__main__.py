"""Run all speed benchmarks and add their numbers to the ledger.

`python -m benchmarks [--only NAME,...] [--minutes 15] [--dataset DIR] [--list]` measures on the CPU, with quick sizes
`python -m benchmarks --gpu [--minutes 8] [--size full|tiny] [--device cuda|cpu]` is the day with a GPU
(`benchmarks.gpu`): whether it computes what the CPU computes (if not, the exit code is 1), then its speed

Rows are added to benchmarks/ledger.json, and benchmarks/ledger.md shows them. Each benchmark runs in a process of its
own, as `python -m benchmarks.NAME` would; one that exceeds the time limit is stopped, and its rows say so. Measure
on an otherwise idle machine: the load at the start is recorded, and reported if it is high. Some need the extracted
world: without `--dataset` it is extracted into outputs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu, sampling
from benchmarks.ledger import LEDGER, Row, append, entry, load, machine, shown

WORLD = Path("outputs/benchmarks/world")
_DATASET = "DATASET"  # stands for the extracted world in a benchmark's arguments
_BUSY = 0.3  # load for each core above which numbers say little
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One script with its quick arguments, what it is expected to give, and how its rows are read from its JSON."""

    arguments: str
    expected: tuple[str, ...]
    read: Callable[[Result], list[Row]]
    module: str = ""  # where it is not the benchmark's name

    def command(self, name: str) -> str:
        """As anyone can give it."""
        return f"python -m benchmarks.{self.module or name} {self.arguments}".strip()


def _ratio(what: str, ratios: Sequence[float]) -> Row:
    """A ratio and its spread."""
    return Row(
        what=what, value=statistics.median(ratios), unit="ratio", low=min(ratios), high=max(ratios), n=len(ratios)
    )


def _batching(told: Result) -> list[Row]:
    times = told["seconds"]
    ways = {"plain": _BATCHED_PLAIN, "alone": _BATCHED_ALONE}
    return [
        _ratio(what, [whole / one for one, whole in zip(times[name], times["batched"], strict=True)])
        for name, what in ways.items()
    ]


def _sampling(kind: str, told: Result) -> list[Row]:
    times = told["seconds_a_rollout"]
    ways = {"one": _SAMPLED_ONE, "several": _SAMPLED_SEVERAL}
    rows = [
        _ratio(what + kind, [a / b for a, b in zip(times["plain"], times[name], strict=True)])
        for name, what in ways.items()
    ]
    return [*rows, *(_ratio(_WITHOUT.format(name), ratios) for name, ratios in told["without"].items())]


def _post_training(told: Result) -> list[Row]:
    times = told["seconds"]
    return [_ratio(_UPDATED, [a / b for a, b in zip(times["plain"], times["ours"], strict=True)])]


def _extraction(told: Result) -> list[Row]:
    """The script gives mean and standard deviation: the spread is one of those to either side."""
    row = told["speed"][-1]
    mean, deviation = row["wall_ratio"]
    spread = {"low": mean - deviation, "high": mean + deviation}
    return [Row(what=_EXTRACTED, value=mean, unit="ratio", n=row["n"], **spread)]


def _metadata(told: Result) -> list[Row]:
    run = told["runs"][0]
    return [Row(what=what, value=run[key], unit=unit, n=1) for what, key, unit in _BUILT]


def _loading_clips(told: Result) -> list[Row]:
    if "warm" not in told:
        return [Row(what=_LOADED, value=None, unit="ratio", why="no dataset with .pt latents beside the repository")]
    rate = told["warm"]["ratio"]["per_s"]
    spread = {"value": rate["median"], "low": rate["min"], "high": rate["max"]}
    return [Row(what=_LOADED, unit="ratio", n=told["repeats"], **spread)]


def _forward(told: Result) -> list[Row]:
    rates = [told["flops"] / seconds / 1e9 for seconds in told["seconds"]]
    one = _ratio(_FORWARD, rates)
    return [Row(what=one.what, value=one.value, unit="GFLOP/s", low=one.low, high=one.high, n=one.n)]


_BATCHED_PLAIN = "eight rollouts together / the plain way, one at a time (time)"
_BATCHED_ALONE = "eight rollouts together / this program, one at a time (time)"
_SAMPLED_ONE = "guided sampling of one rollout, times as fast as the plain way"
_SAMPLED_SEVERAL = "guided sampling of eight rollouts, times as fast a rollout as the plain way"
_WITHOUT = "guided sampling of one rollout, without {} / with it (time)"
_UPDATED = "post-training, updates an hour / those of the plain way"
_EXTRACTED = "extraction with two decoding processes / with none (time)"
_BUILT = (("build-meta, 3,000 episodes", "seconds", "s"), ("build-meta, 3,000 episodes, peak", "GiB", "GiB"))
_LOADED = "reading clips / the straightforward way (samples a second)"
_FORWARD = "full-size network in bfloat16, one clip"


def _sampled(arguments: str, kind: str = "", parts: tuple[str, ...] = ()) -> Benchmark:
    """`benchmarks.sampling` in one of its ways; ``kind`` ends its rows' names."""
    expected = (_SAMPLED_ONE + kind, _SAMPLED_SEVERAL + kind, *parts)
    return Benchmark(arguments, expected, partial(_sampling, kind), module="sampling")


# A benchmark of speed that should be in the ledger is one line here, cheapest first.
BENCHMARKS: dict[str, Benchmark] = {
    "loader": Benchmark("--cold-gb 0 --repeats 5", (_LOADED,), _loading_clips),
    "build_meta": Benchmark("--episodes 3000 --distinct 300", tuple(row[0] for row in _BUILT), _metadata),
    "extraction": Benchmark("--only speed --episodes 0:6 --workers 0,2 --runs 3", (_EXTRACTED,), _extraction),
    "eval_batching": Benchmark(
        f"--dataset {_DATASET} --episodes 8 --steps 3 --repeats 3", (_BATCHED_PLAIN, _BATCHED_ALONE), _batching
    ),
    "sampling": _sampled("--steps 6 --repeats 3", parts=tuple(_WITHOUT.format(name) for name in sampling.WITHOUT)),
    "sampling_compiled": _sampled("--steps 6 --repeats 3 --compile", ", compiled"),
    "post_training": Benchmark(f"--dataset {_DATASET} --updates 3", (_UPDATED,), _post_training),
    "full_forward": Benchmark("--repeats 2", (_FORWARD,), _forward),
    "sampling_50": _sampled("--steps 50 --repeats 2 --whole", ", 50 steps"),
}


def run_one(name: str, benchmark: Benchmark, dataset: str | None, seconds: float) -> tuple[list[Row], str]:
    """Run a benchmark in a process of its own.

    Args:
        name: its key, and the module in this package if it names no other.
        benchmark: its arguments and how to read it.
        dataset: the extracted world; made where it is needed and None.
        seconds: after which it is stopped.

    Returns:
        Its rows (without numbers where it failed), and the command as anyone can give it.
    """
    command = benchmark.command(name)
    deadline = time.monotonic() + seconds

    def missing(why: str) -> list[Row]:
        return [Row(what=what, value=None, unit="", why=why) for what in benchmark.expected]

    try:
        given = command
        if _DATASET in given:
            given = given.replace(_DATASET, dataset or str(extracted(deadline - time.monotonic())))
        words = [sys.executable, *given.split()[1:], "--json"]
        left = deadline - time.monotonic()
        out = _bounded(words, left)
    except subprocess.TimeoutExpired:
        return missing("out of time"), command
    except subprocess.CalledProcessError as error:
        return missing(f"ended with {error.returncode}"), command
    return benchmark.read(json.loads(out)), command


def _bounded(words: Sequence[str], seconds: float) -> str:
    """What a program prints; it and the processes that it started end when it takes longer, or we are interrupted."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            out, _ = child.communicate(timeout=max(0.0, seconds))
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, list(words))
    return out


def extracted(seconds: float) -> Path:
    """Training and held-out episodes of the bundled world with metadata, made where they are not there yet."""
    program = [sys.executable, "-m", "persistworld_cli"]
    extract = ["extract-latents", "bundled:dataset_example/world", str(WORLD), "--preset", "tiny"]
    more = ["--episodes", "0:12,60:80", "--output", str(WORLD.parent / "extract"), "--json"]
    _bounded([*program, *extract, *more], seconds)
    _bounded([*program, "build-meta", str(WORLD), "--json"], seconds)
    return WORLD


def chosen(text: str | None) -> list[str]:
    """The benchmarks that ``--only`` names; all without it."""
    names = list(BENCHMARKS) if text is None else [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown or not names:
        raise SystemExit(f"no benchmark '{', '.join(unknown)}'; there are: {', '.join(BENCHMARKS)}")
    return names


def measure(options: argparse.Namespace) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Run what was requested: rows and their entries, as soon as each is in the ledger."""
    minutes = options.minutes or (8 if options.gpu else 15)
    deadline = time.monotonic() + 60 * minutes
    load_before = os.getloadavg()[0]
    if load_before > _BUSY * machine()["cores"]:
        print(f"load {load_before:.1f}: this machine is busy, and its numbers say little", file=sys.stderr)

    def keep(row: Row, name: str, command: str, accelerator: str = "") -> tuple[Row, dict[str, Any]]:
        new = entry(row, name, command, load_before, accelerator)
        append(options.ledger, [new])
        return row, new

    if options.gpu:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
        table = gpu.chosen(options.size, options.only)
        command = f"python -m benchmarks --gpu --minutes {minutes:g} --size {options.size} --device {options.device}"
        name = "gpu" if (options.size, options.device) == ("full", "cuda") else f"gpu, {options.size}, {options.device}"
        accelerator = torch.cuda.get_device_name() if options.device == "cuda" and torch.cuda.is_available() else ""
        with ThreadPoolExecutor(1) as beside:
            if options.dataset is None and (options.device == "cpu" or accelerator):
                beside.submit(extracted, 60 * minutes)
            for row in gpu.day(table, options.size, options.device, minutes, Path(options.dataset or WORLD)):
                yield keep(row, name, command, accelerator)
        return
    names = chosen(options.only)
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", file=sys.stderr, flush=True)
        rows, command = run_one(name, BENCHMARKS[name], options.dataset, deadline - time.monotonic())
        yield from [keep(row, name, command) for row in rows]


def main() -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="some of them, as a,b; with --gpu parts whose names contain a or b")
    parser.add_argument("--gpu", action="store_true", help="the day with a GPU instead")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of its models")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="that it measures")
    parser.add_argument("--minutes", type=float, help="for all of them together; 15, with --gpu 8")
    parser.add_argument("--dataset", help="the bundled world, extracted")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    parser.add_argument("--list", action="store_true", help="name the benchmarks and do nothing")
    parser.add_argument("--json", action="store_true", help="print the new rows as JSON")
    options = parser.parse_args()
    if options.list and options.gpu:
        print(*gpu.chosen(options.size, options.only), sep="\n")
        return
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:20}{benchmark.command(name)}")
        return
    entries, rows = [], []
    for row, new in measure(options):
        rows.append(row)
        entries.append(new)
        if not options.json:
            count = f", n = {row.n}" if row.n else ""
            print(f"{new['benchmark']:20}{row.what:76} {shown(new)}{count}", flush=True)
    if options.json:
        print(json.dumps(entries, indent=1))
    else:
        print(f"{len(load(options.ledger))} rows in {options.ledger}")
    checks = [row for row in rows if row.limit is not None]
    if options.gpu and (not (checks or options.only) or any(row.fails for row in checks)):
        raise SystemExit("not shown to be right: a check fails, or was not made")


if __name__ == "__main__":
    main()
