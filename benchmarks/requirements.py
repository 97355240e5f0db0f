"""GPU memory and time of the full-size model's commands, by what a dry run counts: docs/requirements.md's tables.

`python -m benchmarks.requirements` prints Markdown: for each size of GPU, the largest setting that fits, its peak and
the least time; then how long the processes of a post-training sample. Nothing is measured on a GPU. `RESERVE` is left
free for what a dry run does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product

import numpy as np

from persistworld_cli.config.presets import load_settings
from persistworld_cli.cost.accelerators import Accelerator, find_accelerator
from persistworld_cli.cost.report import BYTES, GIB, SECONDS, CostReport, amount, cost_report
from persistworld_cli.cost.training import DRAWN, slowest_process
from persistworld_cli.training.sharing import Share

RESERVE = 3 * GIB  # CUDA context, kernel workspaces, fragmentation
GPUS = tuple(map(find_accelerator, ("rtx-4090", "a100-40gb", "l40s", "h100", "h200")))
# GPU -> the post_train.micro_batch of its column, whose peak tests/traces compares with the dry run's
TRACED = {"rtx-4090": 1, "l40s": 4}
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
            traced = " (traced)" if task == "post-train" and value in TRACED.values() else ""
            return f"{setting}{amount(cost.peak, BYTES)}{traced}, {amount(seconds, SECONDS)}"
    return f"does not fit: {amount(cost.peak, BYTES)}"


def waiting(groups: int, processes: int) -> str:
    """A line: mean sampling of a process in interactions, and the slowest one's: as it is, and with its own alone."""
    settings = load_settings("persistworld", [f"post_train.groups={groups}", "post_train.split_groups=true"], env={})
    options, roll = settings.post_train, settings.sampling.steps
    shares = [Share.of(options, rank, processes) for rank in range(processes)]
    drawn = len(shares[0].draws)
    lengths = np.random.default_rng(0).integers(options.prefix_max + 1, size=(DRAWN, groups))
    alone = np.mean([max(sum(row[list(share.groups)]) for share in shares) + drawn for row in lengths])
    mean = len(shares[0].groups) * options.prefix_max / 2 + drawn
    slowest = slowest_process(options, settings.sampling, processes)[0] / roll
    split = " (`split_groups`)" if len(shares[0].team) > 1 else ""
    return f"| {groups} | {processes}{split} | {mean:.1f} | {slowest:.1f} | {alone:.1f} |"


def main(write: Callable[[str], object] = print) -> int:
    write("| | " + " | ".join(f"{gpu.name} ({gpu.memory_gib:g} GiB)" for gpu in GPUS) + " |")
    write("|---|" + "---|" * len(GPUS))
    for name, *rest in COMMANDS:
        write(f"| {name} | " + " | ".join(cell(gpu, *rest) for gpu in GPUS) + " |")
    write("\n| groups | processes | mean | slowest | slowest, if each sampled its own |\n|---|---|---|---|---|")
    for groups, processes in product((8, 16), (2, 4, 8, 16)):
        write(waiting(groups, processes))
    encoding = next(one for one in report(*COMMANDS[0][1:4], 1, 1).work if one.key == "encoding")
    rates = ", ".join(f"{gpu.name} {encoding.floor(gpu) * 1e3:.2g}" for gpu in GPUS)
    write(f"\nEncoding one frame of all cameras: {encoding.flops / 1e12:.2f} TFLOP; least milliseconds: {rates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
