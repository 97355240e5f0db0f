"""GPU memory and time of the full-size model's commands, by what a dry run counts: docs/requirements.md's tables.

`python -m benchmarks.requirements` prints Markdown: for each size of GPU, the largest setting that fits, its peak and
the least time. Nothing is measured on a GPU. `RESERVE` is left free for what a dry run does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache

from persistworld_cli.config.presets import load_settings
from persistworld_cli.cost.accelerators import Accelerator, find_accelerator
from persistworld_cli.cost.report import BYTES, GIB, SECONDS, CostReport, amount, cost_report

RESERVE = 3 * GIB  # CUDA context, kernel workspaces, fragmentation
GPUS = tuple(map(find_accelerator, ("rtx-4090", "a100-40gb", "l40s", "h100", "h200")))
# command, preset and settings, what varies, its values (largest first), processes, row of the dry run's work
COMMANDS = (
    ("replay, drive, pi-rollout", "drive", "persistworld", "", (1,), 1, "interaction"),
    ("eval", "eval", "persistworld", "eval.batch", (32, 16, 8, 4, 2, 1), 1, "interaction"),
    ("post-train, 1 GPU", "post-train", "persistworld", "post_train.micro_batch", (16, 8, 4, 2, 1), 1, "update"),
    ("post-train, 8 GPUs", "post-train", "persistworld", "post_train.micro_batch", (16, 8, 4, 2, 1), 8, "update"),
    ("pretrain, 8 GPUs", "pretrain", "ctrl-world", "pretrain.batch", (64, 32, 16, 8), 8, "update"),
    ("the same, sharded", "pretrain", "ctrl-world pretrain.shard=true", "pretrain.batch", (64, 32, 16, 8), 8, "update"),
)


@cache
def report(task: str, preset: str, key: str, value: int, processes: int) -> CostReport:
    """What a dry run counts; a pretraining's update has 64 clips whatever its batch."""
    preset, *sets = preset.split()
    sets += [f"{key}={value}"] if key else []
    if key == "pretrain.batch":
        sets.append(f"pretrain.accumulate={64 // value}")
    found = cost_report(task, load_settings(preset, [*sets, f"launch.num_processes={processes}"], env={}))
    assert found
    return found


def cell(gpu: Accelerator, task: str, preset: str, key: str, values: Iterable[int], processes: int, row: str) -> str:
    """The largest value that fits, with peak and least time; what is missing if none fits."""
    assert gpu.memory_gib
    for value in values:
        cost = report(task, preset, key, value, processes)
        if cost.peak + RESERVE <= gpu.memory_gib * GIB:
            seconds = next(one.floor(gpu) for one in cost.work if one.key == row)
            setting = f"{key.partition('.')[2]} {value}: " if key else ""
            return f"{setting}{amount(cost.peak, BYTES)}, {amount(seconds, SECONDS)}"
    return f"does not fit: {amount(cost.peak, BYTES)}"


def main(write: Callable[[str], object] = print) -> int:
    write("| | " + " | ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in GPUS) + " |")
    write("|---|" + "---|" * len(GPUS))
    for name, *rest in COMMANDS:
        write(f"| {name} | " + " | ".join(cell(gpu, *rest) for gpu in GPUS) + " |")
    encoding = next(one for one in report(*COMMANDS[0][1:4], 1, 1).work if one.key == "encoding")
    rates = ", ".join(f"{gpu.name} {encoding.floor(gpu) * 1e3:.2g}" for gpu in GPUS)
    write(f"\nEncoding one frame of all cameras: {encoding.flops / 1e12:.2f} TFLOP; least milliseconds: {rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
