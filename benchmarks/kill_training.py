"""`post-train` (or `pretrain`, `eval`) killed at random moments and resumed: is the result that of an unbroken run?

`python -m benchmarks.kill_training [--task post-train] [--kills 10] [--updates 6] [--processes 1] [--dataset DIR]`

The bundled world and the tiny preset with small updates, closed-loop checks in between, on the CPU. It starts with an
unbroken run. Then the same command into another folder, ended by SIGKILL at a random moment of its life (while it
imports, loads, draws, learns, saves) and started again, until the kills are used up; every other time the whole process
group is killed, else only the worker. A run that finishes before its kill is compared and started again. metrics.jsonl
(without times) and the weights, or an evaluation's rollouts (without times), must be the same, byte for byte. With
`--processes 2`, starts after a kill alternate between two processes and one; numbers are then compared to 1e-4. With
`--stop`, a rank is stopped (SIGSTOP) for ten seconds before it is killed. Without --dataset, four episodes are
extracted first.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.torch import load_file

from benchmarks.killing import kill, report, start
from persistworld_cli.config.bundled import bundled_root

SMALL = {
    "groups": 1,
    "candidates": 2,
    "keep_best": 1,
    "keep_worst": 1,
    "prefix_max": 1,
    "lora_rank": 4,
    "lora_targets": "to_q,to_v",
    "save_every": 1,
    "validate_every": 2,
    "validate_rollouts": 1,
    "validate_steps": 1,
}
SMALL_CHECKS = {"check_every": 2, "check_rollouts": 1, "check_steps": 1}
SMALL_PRETRAINING = {"batch": 2, "log_every": 1, "save_every": 1, **SMALL_CHECKS}
SMALL_EVALUATION = {"steps": 2, "batch": 1, "seeds": "0,1,2", "sheets": 0}
SETS = {"post-train": SMALL, "pretrain": SMALL_PRETRAINING, "eval": SMALL_EVALUATION}
EPISODES = "0,1,60,61"  # two to train on, two held out


def begin(options: argparse.Namespace, dataset: str, out: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    """The command, with a copy of the preset: whoever edits that meanwhile must not change half of the runs."""
    preset = out.parent / "tiny.toml"
    if not preset.exists():
        shutil.copy(bundled_root() / "presets" / "tiny.toml", preset)
    table = options.task.replace("-", "_")
    sets = [word for key, value in SETS[options.task].items() for word in ("--set", f"{table}.{key}={value}")]
    flags = ["--preset", str(preset), "--device", "cpu", "--threads", "1", "--num-processes", str(processes)]
    flags += ["--restarts", "0"]  # the benchmark starts the command again itself
    if options.task == "eval":
        flags += ["--benchmark", "none"]
    else:
        flags += ["--tracker", "none", "--updates", str(options.updates)]
    if options.task == "post-train" and options.processes > 1:
        flags += ["--split-groups"]
    return start([options.task, *flags, *sets, "--dataset", dataset, "--output", str(out)])


def traces(out: Path) -> dict[str, Any]:
    """What a finished run leaves, to be compared: logged numbers without times, the weights' or rollouts' bytes."""
    if (out / "rollouts").is_dir():
        rollouts = sorted((out / "rollouts").glob("*/*.npz"))
        return {"log": sorted(str(path.relative_to(out)) for path in rollouts)} | {
            f"{path.relative_to(out)} {name}": data[name]
            for path in rollouts
            for data in [np.load(path)]
            for name in data.files
            if name != "seconds"
        }
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("share_")} for line in lines]
    files = sorted((out / "weights").rglob("*.safetensors"))
    tensors = {f"{path.name} {name}": value.numpy() for path in files for name, value in load_file(path).items()}
    return {"log": numbers, **tensors}


def same_numbers(one: Any, two: Any, exact: bool) -> bool:
    """Whether two of the things that `traces` gives are equal, or nearly so where processes were changed."""
    if isinstance(one, np.ndarray):
        if one.shape != two.shape:
            return False
        # where a gradient is all but zero, rounding is blown up to whole steps by the optimisers
        return bool(np.array_equal(one, two, equal_nan=True) if exact else np.abs(one - two).mean() < 1e-4)
    if not isinstance(one, dict | list | float) or (exact and isinstance(one, float)):
        return bool(one == two)
    if isinstance(one, float):
        return math.isclose(one, two, abs_tol=1e-3, rel_tol=1e-2)
    keys = one.keys() if isinstance(one, dict) else range(len(one))
    return len(one) == len(two) and all(same_numbers(one[key], two[key], exact) for key in keys)


def stop_a_rank(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP to one of the workers: the others wait for it, and nothing may be written that is not whole."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if "persistworld_cli.worker" in p.cmdline()]
    if workers:
        workers[-1].suspend()
        time.sleep(10)


def reached(out: Path) -> int:
    """The update of the last whole state, or the number of finished rollouts."""
    if (out / "rollouts").is_dir():
        return len(list((out / "rollouts").glob("*/[!.]*.npz")))
    states = sorted((out / "state").glob("step-*"))
    return int(states[-1].name.removeprefix("step-")) if states else 0


def extracted(folder: Path) -> str:
    """A small dataset of the bundled world."""
    out = folder / "world"
    source = ["bundled:dataset_example/world", str(out), "--episodes", EPISODES, "--output", str(folder / "extract")]
    if start(["extract-latents", "--preset", "tiny", "--device", "cpu", *source]).wait():
        raise RuntimeError("extraction failed")
    if start(["build-meta", str(out), "--preset", "tiny"]).wait():
        raise RuntimeError("build-meta failed")
    return str(out)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All kills and comparisons."""
    draw = random.Random(options.seed)
    dataset = options.dataset or extracted(folder)
    begun = time.perf_counter()
    if begin(options, dataset, folder / "unbroken").wait():
        raise RuntimeError("the unbroken run failed")
    life = time.perf_counter() - begun
    whole = traces(folder / "unbroken")
    out, finished, same_log, same_weights = folder / "killed", 0, 0, 0
    starts, exact = 0, options.processes == 1
    kills: list[dict[str, float]] = []
    while True:
        process = begin(options, dataset, out, options.processes if starts % 2 else 1)
        starts += 1
        if len(kills) < options.kills:
            moment = draw.uniform(0, life)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                if options.stop:
                    stop_a_rank(process)
                kill(process, alone=len(kills) % 2 == 1)
                kills.append({"seconds": round(moment, 1), "resumes_at_update": reached(out)})
                print(f"kill {len(kills)} after {moment:.0f} s: state of update {reached(out)}", file=sys.stderr)
                continue
        if process.wait():
            raise RuntimeError("a run that nobody killed failed")
        found = traces(out)
        finished += 1
        same_log += same_numbers(found.pop("log"), whole["log"], exact)
        weights = {name: data for name, data in whole.items() if name != "log"}
        same_weights += found.keys() == weights.keys() and same_numbers(found, weights, exact)
        shutil.rmtree(out)
        if len(kills) == options.kills:
            break
    return {
        "task": options.task,
        "updates": options.updates,
        "processes": options.processes,
        "unbroken_seconds": round(life, 1),
        "kills": len(kills),
        "killed_after_s": [entry["seconds"] for entry in kills],
        "resumed_at_update": [entry["resumes_at_update"] for entry in kills],
        "runs_finished": finished,
        "logs_equal": same_log,
        "weights_equal": same_weights,
        "pass": same_log == same_weights == finished,
    }


def main() -> int:
    """Measure and print; 1 where a run differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(SETS), default="post-train")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--stop", action="store_true", help="stop a rank before it is killed")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--dataset", help="a processed dataset of the tiny preset; by default one is extracted")
    return report(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
