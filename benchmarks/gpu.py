"""The day with a GPU: whether it computes what the CPU computes, then how fast, in minutes; each row as it is measured.

`python -m benchmarks --gpu [--minutes 8] [--size full|tiny] [--device cuda|cpu] [--dataset DIR] [--ledger FILE]`

Correctness first: a network call, decoding, and the gradient of a post-training update, of the bundled model and of the
preset with random weights (at full size: its whole network on small images, which a CPU can follow), in float32 without
TF32 and as the presets compute (bf16). `apart` is the distance from the CPU's float32 result, divided by that result's
norm: at most 1e-4 in float32. In bf16 at most 1e-2, or three times the CPU's own distance where that is more (on a CPU
rounding moves a call of the bundled model by 0.007, of the full-size network by 0.09), and never more than 0.3. Then
speed, the most informative first, through the engine and the trainers that every command uses: time, share of the data
sheet's peak, and peak memory with what a dry run states.

A part that fails, takes too long or no longer fits into the minutes is a row with the reason. All parts run in one
process, which starts again where a part ended it. `--size tiny --device cpu` runs the same code on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu_parts import CALLS, GIB, SIZES, TOGETHER, UPDATE, Bench, Found, Part, parts, pretrain_sets
from benchmarks.ledger import Row
from persistworld_cli.compat import free_main_thread
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.cost.accelerators import ACCELERATORS, Accelerator
from persistworld_cli.cost.report import CostReport, cost_report
from persistworld_cli.launch.environment import worker_environment

Counted = Mapping[str, tuple[float, float]]  # FLOPs and peak bytes
START_S, GRACE_S = 120.0, 10.0  # until the process begins its first part; after the last minute


# -- rows -------------------------------------------------------------------------------------------------------------


def stated(size: str) -> Counted:
    """FLOPs and peak bytes of each part, as dry runs count them."""
    one = SIZES[size]

    def report(task: str, preset: str, *sets: str) -> CostReport:
        found = cost_report(task, load_settings(preset, [*sets, "model.adapter=none"], env={}))
        assert found is not None
        return found

    drive = report("drive", one.preset)
    flops, memory = {row.key: row.flops for row in drive.work}, {row.key: row.bytes for row in drive.memory}
    together = report("eval", one.preset, "sampling.steps=8", f"eval.batch={TOGETHER}")
    learned = report("post-train", one.preset, *UPDATE)
    pretrained = report("pretrain", one.pretrain, *pretrain_sets())
    calls = 1 if load_settings(one.preset, env={}).sampling.guidance == 1.0 else 2
    return {
        "call": (calls * flops["network"], memory["weights"] + memory["sampling"]),
        "decoding": (flops["decoding"], memory["weights"] + memory["decoding"]),
        **{f"interaction {n}": (calls * n * flops["network"] + flops["decoding"], drive.peak) for n in CALLS},
        "together": (next(row.flops for row in together.work if row.key == "batch"), together.peak),
        "update": (next(row.flops for row in learned.work if row.key == "update"), learned.peak),
        "pretraining": (next(row.flops for row in pretrained.work if row.key == "update"), pretrained.peak),
    }


def peak_of(name: str) -> Accelerator | None:
    """The accelerator whose name is in the device's, the longest of them; None where it is not listed."""
    words = name.lower().replace(" ", "-")
    known = sorted((one for one in ACCELERATORS if one in words), key=len)
    return ACCELERATORS[known[-1]] if known else None


def rows_of(
    found: Found, counted: Callable[[], Counted], peak: Accelerator | None, limit: float | None
) -> Iterator[Row]:
    """A measurement's rows: itself, its share of the device's peak, its memory beside the dry run's."""
    limit = limit if found.limit is None else found.limit
    if not found.values:
        yield Row(what=found.what, value=None, unit=found.unit, why=found.why, limit=limit)
        return
    middle, several = statistics.median(found.values), len(found.values) > 1
    flops, memory = counted().get(found.key, (0.0, 0.0)) if found.key else (0.0, 0.0)
    rate = f"{flops / middle / 1e12:.3g} TFLOP/s, " if flops else ""
    yield Row(
        what=found.what,
        value=middle,
        unit=found.unit,
        low=min(found.values) if several else None,
        high=max(found.values) if several else None,
        n=len(found.values),
        limit=limit,
        detail=rate + found.detail,
    )
    if flops and peak:
        share = flops / middle / 1e12 / peak.tflops
        yield Row(what=f"{found.what}, share of peak", value=share, unit="share", n=len(found.values))
    if found.bytes and memory:
        kind, told = "peak memory of the process", f"a dry run states {memory / GIB:.3g}"
        if found.reserved:
            kind = "peak memory"
            told += f", {found.bytes / memory - 1:+.0%}; the allocator held {found.reserved / GIB:.3g}"
        yield Row(what=f"{found.what}, {kind}", value=found.bytes / GIB, unit="GiB", n=1, detail=told)


# -- the process that measures, and the one that watches it -----------------------------------------------------------


def measured(bench: Bench, table: Mapping[str, Part], say: Callable[..., None]) -> bool:
    """Run parts, and say what they begin, find and end; False where the device no longer works."""
    for name, part in table.items():
        say(part=name)
        if bench.left < part.needs:
            say(found=asdict(Found(what=name, why=f"{bench.left:.0f} s left, it needs {part.needs:.0f}")))
            say(done=name)
            continue
        whole = name
        try:
            for found in part.run(bench, name):
                say(found=asdict(found))
                whole = rest(name)
        except Exception as error:
            traceback.print_exc()
            text = (str(error).splitlines() or [""])[0][:200]
            say(found=asdict(Found(what=whole, why=f"{type(error).__name__}: {text}")))
            if not works(bench.device):
                say(done=name)
                return False
            bench.forget()
        say(done=name)
    return True


def rest(name: str) -> str:
    """What a part did not measure that ended after its first row."""
    return f"{name}: what else it measures"


def works(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access no later call in the process does."""
    try:
        return bool(torch.ones(2, device=device).sum().item() == 2)
    except RuntimeError:
        return False


def main() -> None:
    """The process that measures: a message a line on standard output, everything else on standard error."""
    parser = argparse.ArgumentParser()
    for name in ("--size", "--device", "--work", "--dataset", "--until", "--names"):
        parser.add_argument(name, required=True)
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    free_main_thread()
    bench = Bench(
        options.size, torch.device(options.device), Path(options.work), Path(options.dataset), float(options.until)
    )
    table = parts(options.size)
    names = json.loads(options.names)
    if not measured(bench, {name: table[name] for name in names}, lambda **m: print(json.dumps(m), file=out)):
        raise SystemExit(1)


class Watched:
    """A process and the messages that it prints; it and what it started end with the block."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.messages.put(json.loads(line))
        self.messages.put(None)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def watch(
    table: Mapping[str, Part],
    start: Callable[[Sequence[str]], Watched],
    until: float,
    rows: Callable[[Found, float | None], Iterator[Row]],
) -> Iterator[Row]:
    """The rows of all parts, in one process or, where a part ends it or exceeds its time, in several.

    Args:
        table: the parts.
        start: a process that measures those of the given names.
        until: when all must end, by `time.time`.
        rows: of a measurement and its part's limit.
    """
    waiting = list(table)

    def missing(name: str, why: str, *, begun: bool = False) -> Iterator[Row]:
        return rows(Found(what=rest(name) if begun else name, why=why), table[name].limit)

    while waiting and until > time.time():
        first, begun, some = waiting[0], "", False
        with start(waiting) as child:
            deadline = time.time() + START_S
            while True:
                try:
                    message = child.messages.get(timeout=max(0.0, min(deadline, until + GRACE_S) - time.time()))
                except queue.Empty:
                    why = f"not done after {table[begun].most:.0f} s" if begun else "its process did not start"
                    why = "out of time" if until + GRACE_S <= time.time() else why
                    break
                if message is None:
                    code = child.process.wait()
                    why = f"its process ended with {signal.Signals(-code).name if code < 0 else code}"
                    break
                if "found" in message:
                    yield from rows(Found(**message["found"]), table[begun].limit)
                    some = True
                elif "part" in message:
                    begun, some = message["part"], False
                    deadline = time.time() + table[begun].most
                else:
                    waiting.remove(message["done"])
                    begun, deadline = "", time.time() + START_S
        if begun:
            yield from missing(begun, why, begun=some)
            waiting.remove(begun)
        elif waiting and waiting[0] == first:  # nothing was done: another process would do no more
            for name in waiting:
                yield from missing(name, why)
            return
    for name in waiting:
        yield from missing(name, "out of time")


def chosen(size: str, only: str | None) -> dict[str, Part]:
    """The parts whose names contain one of the texts in ``only``, which commas separate; all without it."""
    every = parts(size)
    texts = [text.strip() for text in (only or "").split(",") if text.strip()]
    table = {name: part for name, part in every.items() if not texts or any(text in name for text in texts)}
    if not table:
        raise SystemExit(f"no part's name contains {' or '.join(texts)}; there are: {'; '.join(every)}")
    return table


def day(table: Mapping[str, Part], size: str, device: str, minutes: float, dataset: Path) -> Iterator[Row]:
    """The rows of some parts, each as soon as it is known; without a CUDA device one that says so."""
    if device == "cuda" and not torch.cuda.is_available():
        yield Row(what=next(iter(table)), value=None, unit="s", why="no GPU here")
        return
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    environment = worker_environment(LaunchSettings(device="cpu"))  # the CPU computes what is compared with
    if device == "cuda":
        del environment["ACCELERATE_USE_CPU"]
    until = time.time() + 60 * minutes
    with TemporaryDirectory() as work, ThreadPoolExecutor(1) as beside:
        counted: Future[Counted] = beside.submit(stated, size)

        def start(names: Sequence[str]) -> Watched:
            words = ["--size", size, "--device", device, "--work", work, "--dataset", str(dataset)]
            words += ["--until", str(until), "--names", json.dumps(list(names))]
            return Watched([sys.executable, "-m", "benchmarks.gpu", *words], environment)

        yield from watch(table, start, until, lambda found, limit: rows_of(found, counted.result, peak, limit))


if __name__ == "__main__":
    main()
