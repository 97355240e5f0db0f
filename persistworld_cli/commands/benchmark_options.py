"""The options of a benchmark's rollouts, which the commands that measure on one share (eval, frontier)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from persistworld_cli.commands.options import COMPILE, STRICT, Adapter, Common, Compile, Dataset, StrictActions
from persistworld_cli.commands.run import episode_list
from persistworld_cli.config.presets import Pinned, load_settings
from persistworld_cli.evaluation.benchmarks import load_benchmark

BENCHMARK_NAMES = {"eval.starts": "--start", "eval.seeds": "--seed"}  # spellings that are not their settings'


@dataclass(kw_only=True)
class BenchmarkRollouts:
    """What a benchmark fixes and its user may change; None where a flag was not given."""

    adapter: Adapter = None
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="What is measured, and how: bundled, droid, a TOML file, or none.  \\[the preset's]",
            metavar="NAME|PATH",
        ),
    ] = None
    dataset: Dataset = None
    episodes: Annotated[str | None, typer.Option(help="Episode ids, as 99,199; all of the split by default.")] = None
    starts: Annotated[list[int] | None, typer.Option("--start", help="Start frame; may be repeated.")] = None
    steps: Annotated[int | None, typer.Option(help="Interaction steps of a rollout.")] = None
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the noise; may be repeated.")] = None
    split: Annotated[str | None, typer.Option(help="train or val.")] = None
    batch: Annotated[int | None, typer.Option(help="Rollouts at once.")] = None
    compiled: Compile = False
    strict_actions: StrictActions = False

    def flags(self) -> dict[str, Any]:
        """The settings that the options stand for; `BENCHMARK_NAMES` has their spellings."""
        return {
            "model.adapter": self.adapter,
            "world.dataset": self.dataset,
            "eval.episodes": episode_list(self.episodes),
            "eval.starts": self.starts or None,
            "eval.steps": self.steps,
            "eval.seeds": self.seeds or None,
            "eval.split": self.split,
            "eval.batch": self.batch,
            "eval.benchmark": self.benchmark,
            COMPILE: self.compiled or None,
            STRICT: self.strict_actions or None,
        }

    def pinned(self, common: Common) -> Pinned | None:
        """What the named benchmark sets, or the preset's own; None without one. Raises UsageError."""
        name = self.benchmark or load_settings(common.preset, common.sets or ()).settings.eval.benchmark
        found = load_benchmark(name)
        return found.pinned if found else None
