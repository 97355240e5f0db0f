"""`post-train` killed at random moments and resumed each time: is it in the end the run that nobody killed?

`python -m benchmarks.kill_training [--kills 10] [--updates 6] [--dataset DIR] [--seed 0] [--json]`

The bundled world and the tiny preset with small updates, closed-loop checks in between, on the CPU. An unbroken run
first. Then the same command into another folder, ended by SIGKILL at a random moment of its life (while it imports,
loads, draws, learns, saves) and started again, until the kills are used up; every other time the whole process group is
killed, else the worker alone. A run that finishes before its moment comes is compared and begun anew. metrics.jsonl
(less the times) and the adapter's files must be the same, byte for byte. Without --dataset, four episodes are
extracted first.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
EPISODES = "0,1,60,61"  # two to train on, two held out


def begin(options: argparse.Namespace, dataset: str, out: Path) -> subprocess.Popen[bytes]:
    """The command, with a copy of the preset: whoever edits that meanwhile must not change half of the runs."""
    preset = out.parent / "tiny.toml"
    if not preset.exists():
        shutil.copy(bundled_root() / "presets" / "tiny.toml", preset)
    sets = [word for key, value in SMALL.items() for word in ("--set", f"post_train.{key}={value}")]
    flags = ["--preset", str(preset), "--device", "cpu", "--threads", "1", "--tracker", "none"]
    flags += ["--updates", str(options.updates)]
    return start(["post-train", *flags, *sets, "--dataset", dataset, "--output", str(out)])


def traces(out: Path) -> dict[str, Any]:
    """What a finished run leaves, to be compared: logged numbers without times, the adapter's bytes."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in line.items() if k != "seconds" and not k.startswith("share_")} for line in lines]
    files = sorted((out / "weights" / "adapter").glob("*.safetensors"))
    return {"log": numbers, **{path.name: path.read_bytes() for path in files}}


def reached(out: Path) -> int:
    """The update of the last whole state."""
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
    kills: list[dict[str, float]] = []
    while True:
        process = begin(options, dataset, out)
        if len(kills) < options.kills:
            moment = draw.uniform(0, life)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                kill(process, alone=len(kills) % 2 == 1)
                kills.append({"seconds": round(moment, 1), "resumes_at_update": reached(out)})
                print(f"kill {len(kills)} after {moment:.0f} s: state of update {reached(out)}", file=sys.stderr)
                continue
        if process.wait():
            raise RuntimeError("a run that nobody killed failed")
        found = traces(out)
        finished += 1
        same_log += found.pop("log") == whole["log"]
        same_weights += found == {name: data for name, data in whole.items() if name != "log"}
        shutil.rmtree(out)
        if len(kills) == options.kills:
            break
    return {
        "updates": options.updates,
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
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--dataset", help="a processed dataset of the tiny preset; by default one is extracted")
    return report(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
