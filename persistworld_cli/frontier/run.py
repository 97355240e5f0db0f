"""Subcommand frontier: how few network calls are enough? Tries sampling settings on a benchmark, with the same noise.

Every finished rollout is a file under ``<output>/rollouts``, as in `evaluation.run`: an interrupted run resumes there,
a larger grid keeps what is done, and several processes share it. Process 0 makes the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from persistworld_cli.checkpoints.references import refs_of_eval
from persistworld_cli.config.requests import FrontierRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note
from persistworld_cli.cost.interaction import count_interaction, meta_model
from persistworld_cli.evaluation.plan import RolloutPlan, Weights, make_folder, plan_rollouts
from persistworld_cli.evaluation.protocol import describe_sampling, provenance
from persistworld_cli.files import write_json, write_text
from persistworld_cli.frontier.compare import Trial, build_frontier
from persistworld_cli.frontier.fast_preset import require_writable, write_preset
from persistworld_cli.frontier.grid import Setting, make_grid
from persistworld_cli.frontier.report import frontier_plot, frontier_table
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.tables import plain
from persistworld_cli.rollout.closed_loop import batches
from persistworld_cli.rollout.finished import load_rollout, log_finished, pending, save_rollout
from persistworld_cli.rollout.recording import Item


@dataclass(frozen=True)
class Candidate:
    """A setting, its weights, and the folder of its rollouts."""

    setting: Setting
    weights: Weights
    folder: Path


@dataclass(frozen=True)
class FrontierPlan(RolloutPlan):
    """The plan of a frontier: the reference, and the settings to compare with it."""

    reference: Candidate
    grid: list[Candidate]


def run(settings: Settings, request: FrontierRequest) -> dict[str, Any]:
    """Roll out with every setting, compare, and choose; reads the same settings as an evaluation.

    Returns:
        A summary for the terminal; ``<output>/frontier.json`` has everything. {} on ranks other than 0.

    Raises:
        PersistWorldError: as for `evaluation.run.run`, an invalid grid, or a preset file that this command
            did not write. All of these are checked before anything is computed.
    """
    processes = PartialState(cpu=settings.launch.device == "cpu")
    output, target = request.output, request.write_preset
    if target:
        require_writable(target)
    plan = make_plan(settings, request, processes.device, quiet=not processes.is_main_process)
    if processes.is_main_process:
        plan.forget_changed(output / "rollouts")
    processes.wait_for_everyone()
    log_finished([one.folder for one in (plan.reference, *plan.grid)], plan.items)
    _roll_out(plan, plan.work(processes), quiet=not processes.is_main_process)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return {}
    result = _result(plan, request.percent)
    image = output / "frontier.png"
    frontier_plot(image, result)
    table = output / "table.txt"
    write_text(table, plain(frontier_table(result)))
    write_json(output / "frontier.json", result)
    keys = ("name", "calls", "calls_ratio", "within", "seconds_per_interaction", "worst_loss_high")
    rows = [{key: row[key] for key in keys} for row in result["settings"]]
    summary = {"text": table, "json": output / "frontier.json", "plot": image, "chosen": result["chosen"]}
    summary |= {"conclusion": result["conclusion"], "settings": rows}
    if target and result["chosen"] is None:
        note(f"no preset written: {result['conclusion']}")
        summary["exit_code"] = 1
    elif target:
        chosen = next(one.setting for one in plan.grid if one.setting.name == result["chosen"])
        summary["preset"] = write_preset(target, request.preset, chosen.sampling, result)
    return summary


def make_plan(
    settings: Settings, request: FrontierRequest, device: torch.device, *, quiet: bool = False
) -> FrontierPlan:
    """Resolve and check everything before anything is computed; raises as `run`. ``quiet``: as for an evaluation."""
    reference, grid = make_grid(settings, request)
    refs = refs_of_eval(settings.model, request.baseline)
    refs = refs if request.baseline else refs[-1:]
    plan = plan_rollouts(settings, refs, device, quiet=quiet)
    base, judged = plan.models[0], plan.models[-1]
    if base is not judged:
        reference = replace(reference, name=f"{reference.name} of {base.label}")

    def candidate(setting: Setting, weights: Weights) -> Candidate:
        folder = request.output / "rollouts" / f"setting-{plan.key(weights, setting.sampling)}"
        make_folder(folder)
        return Candidate(setting, weights, folder)

    candidates = [candidate(setting, judged) for setting in grid]
    return FrontierPlan(**vars(plan), reference=candidate(reference, base), grid=candidates)


def _roll_out(plan: FrontierPlan, work: Sequence[Sequence[Item]], quiet: bool) -> None:
    """Roll out what is missing; the bar counts network calls, so its time left is valid across settings."""
    ev = plan.settings.eval
    todo = [(one, items) for one in (plan.reference, *plan.grid) if (items := pending(one.folder, work))]
    total = sum(len(batches(items, ev.batch)) * ev.steps * one.setting.calls for one, items in todo)
    if not total:
        return
    model, loaded = None, None
    with Meter("frontier: network calls", total, quiet=quiet) as meter:
        for number, (one, items) in enumerate(todo, start=1):
            if model is None or one.weights is not loaded:
                model, loaded = plan.load(one.weights.ref), one.weights

            def progress(done: int, calls: int = one.setting.calls, number: int = number) -> None:
                meter.advance(done * calls, setting=number)

            for rollout in plan.loop(model, one.weights, one.setting.sampling).roll(items, progress=progress):
                save_rollout(one.folder, rollout)


def _result(plan: FrontierPlan, percent: float) -> dict[str, Any]:
    """The whole result, in types that JSON has."""
    settings, reference = plan.settings, plan.reference
    cost = count_interaction(meta_model(settings.model, settings.world), reference.setting.sampling, 1)

    def trial(one: Candidate) -> Trial:
        rollouts = [load_rollout(one.folder, item) for item in plan.items]
        return Trial(one.setting, rollouts, one.setting.calls * cost.network + cost.decoding)

    other = reference.weights is not plan.grid[0].weights
    trials = trial(reference), map(trial, plan.grid)
    found = build_frontier(settings, plan.scorer, plan.scoring, *trials, percent, other_weights=other)
    found["reference"]["model"] = reference.weights.describe()
    protocol = {key: value for key, value in plan.protocol.items() if key != "hash"}
    protocol["sampling"] = describe_sampling(reference.setting.sampling)
    return {
        **found,
        "benchmark": plan.benchmark,
        "model": plan.grid[0].weights.describe(),
        "protocol": protocol,
        **provenance(settings, plan.store, plan.device),
    }
