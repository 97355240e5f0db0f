"""Subcommand frontier: how few network calls are enough? Sampling settings on a benchmark's rollouts, same noise.

Every finished rollout is a file under ``<output>/rollouts``, as in `evaluation.run`: an interrupted run goes on there,
a larger grid keeps what is done, and several processes meet there. Process 0 makes the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.checkpoints.references import ModelRef, refs_of_eval
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note
from persistworld_cli.cost.interaction import count_interaction, meta_model
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, open_store
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.plan import eval_items, make_scoring, require_weights, stores_of_models, subset_note
from persistworld_cli.evaluation.protocol import (
    check_metrics,
    describe_sampling,
    make_protocol,
    provenance,
    rollout_identity,
)
from persistworld_cli.files import hash_of, write_json, write_text, writing
from persistworld_cli.frontier.compare import Trial, build_frontier
from persistworld_cli.frontier.fast_preset import require_writable, write_preset
from persistworld_cli.frontier.grid import Setting, make_grid
from persistworld_cli.frontier.report import frontier_plot, frontier_table
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.tables import plain
from persistworld_cli.rollout.closed_loop import ClosedLoop, batches
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.finished import load_rollout, pending, save_rollout, tell_finished
from persistworld_cli.rollout.recording import Item
from persistworld_cli.rollout.scoring import SHOWN, ScoringOptions


@dataclass(frozen=True)
class Tried:
    """A setting, the weights that are sampled with it, their hashes and percentiles, the folder of its rollouts."""

    setting: Setting
    ref: ModelRef
    prints: dict[str, str] = field(hash=False)
    stat: ActionStat = field(hash=False, compare=False)
    folder: Path


@dataclass(frozen=True)
class Plan:
    """What there is to do, checked.

    Attributes:
        store: the dataset.
        items: the rollouts of every setting.
        scorer, scoring: metrics, on the device.
        reference: what the others are compared with.
        grid: the others.
        protocol: as of an evaluation under the reference setting.
        benchmark: which file pinned it, or None.
    """

    store: EpisodeStore
    items: list[Item]
    scorer: Scorer
    scoring: ScoringOptions
    reference: Tried
    grid: list[Tried]
    protocol: dict[str, Any]
    benchmark: dict[str, Any] | None


def run(settings: Settings, job: Mapping[str, Any]) -> dict[str, Any]:
    """Roll out under every setting, compare, and choose.

    Args:
        settings: ``world.dataset``, ``model``, ``sampling``, ``eval`` and ``rewards`` are read.
        job: ``output``; ``reference``, ``samplers``, ``calls``, ``vary`` (see `grid.make_grid`); ``percent``: by how
            much of the reference's figure a setting may be worse; optional ``baseline``; ``write_preset`` (a file, or
            None) and ``preset`` (what it extends).

    Returns:
        A summary for the terminal; all of it is in ``<output>/frontier.json``. {} on ranks other than 0.

    Raises:
        PersistWorldError: as for `evaluation.run.run`, or a grid that makes no sense, or a preset file that is not ours
            to write; all before any compute.
    """
    processes = PartialState(cpu=settings.launch.device == "cpu")
    output = Path(job["output"])
    target = Path(job["write_preset"]) if job.get("write_preset") else None
    if target:
        require_writable(target)
    plan = make_plan(settings, job, output, processes.device, quiet=not processes.is_main_process)
    if processes.is_main_process and (text := subset_note(plan.benchmark)):
        note(text)
    work = batches(plan.items, settings.eval.batch)[processes.process_index :: processes.num_processes]
    tell_finished([one.folder for one in (plan.reference, *plan.grid)], plan.items)
    _roll_out(settings, plan, work, processes.device, quiet=not processes.is_main_process)
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return {}
    result = _result(settings, plan, float(job["percent"]), processes.device)
    image = output / "frontier.png"
    frontier_plot(image, result)
    table = output / "table.txt"
    write_text(table, plain(frontier_table(result)))
    write_json(output / "frontier.json", result)
    keys = ("name", "calls", "fewer", "within", "seconds_per_interaction", "worst_loss_high")
    rows = [{key: row[key] for key in keys} for row in result["settings"]]
    summary = {"text": table, "json": output / "frontier.json", "plot": image, "chosen": result["chosen"]}
    summary |= {"words": result["words"], "settings": rows}
    if target and result["chosen"] is None:
        note(f"no preset was written: {result['words']}")
        summary["exit_code"] = 1
    elif target:
        chosen = next(one.setting for one in plan.grid if one.setting.name == result["chosen"])
        summary["preset"] = write_preset(target, job["preset"], chosen.sampling, result)
    return summary


def make_plan(
    settings: Settings, job: Mapping[str, Any], output: Path, device: torch.device, *, quiet: bool = False
) -> Plan:
    """Resolve and check everything before anything is computed; raises as `run`. ``quiet``: as for an evaluation."""
    reference, grid = make_grid(settings, job)
    store = open_store(settings)
    items = eval_items(store, settings, partly=True)
    scoring = make_scoring(settings, store, items)
    scorer = Scorer(settings.rewards, settings.world, device, names=SHOWN)
    benchmark = load_benchmark(settings.eval.benchmark)
    stamp = benchmark.stamp(settings, {item.episode for item in items}) if benchmark else None
    protocol = make_protocol(settings, store, items, scorer, scoring, stamp=stamp)
    if benchmark:
        check_metrics(benchmark.metrics, protocol["metrics"], str(benchmark.path))
    refs = refs_of_eval(settings.model, {"baseline": job.get("baseline")})
    slow, judged = refs[0] if job.get("baseline") else refs[-1], refs[-1]
    weights = list(dict.fromkeys((slow, judged)))
    require_weights(settings, store, items, weights)
    stores = stores_of_models(settings, store, items, weights, quiet=quiet)
    if slow != judged:
        reference = replace(reference, name=f"{reference.name} of {slow.label}")

    def tried(setting: Setting, ref: ModelRef, prints: dict[str, str]) -> Tried:
        own = stores[ref.label]
        asked = protocol | {"sampling": describe_sampling(setting.sampling)}
        same = rollout_identity(asked, own, settings.model)
        folder = output / "rollouts" / f"setting-{hash_of([same, prints, device.type])}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return Tried(setting, ref, prints, own.stat(), folder)

    first, prints = tried(reference, slow, slow.fingerprint()), judged.fingerprint()
    each = [tried(setting, judged, prints) for setting in grid]
    return Plan(store, items, scorer, scoring, first, each, protocol, stamp)


def _roll_out(
    settings: Settings, plan: Plan, work: Sequence[Sequence[Item]], device: torch.device, quiet: bool
) -> None:
    """Make what is not there yet; the bar counts network calls, so its time left is valid across settings."""
    ev = settings.eval
    todo = {one: items for one in (plan.reference, *plan.grid) if (items := pending(one.folder, work))}
    total = sum(len(batches(items, ev.batch)) * ev.steps * one.setting.calls for one, items in todo.items())
    if not total:
        return
    model, loaded = None, None
    with Meter("frontier: network calls", total, quiet=quiet) as meter:
        for number, (one, items) in enumerate(todo.items(), start=1):
            if model is None or one.ref != loaded:
                model = load_for_sampling(settings, ckpt=one.ref.ckpt, adapter=one.ref.adapter, device=device)
                loaded = one.ref
            engine = RolloutEngine(model, one.setting.sampling, one.stat)
            loop = ClosedLoop(engine, plan.store, ev.split, ev.steps, ev.batch, plan.scorer, plan.scoring)

            def progress(done: int, calls: int = one.setting.calls, number: int = number) -> None:
                meter.advance(done * calls, setting=number)

            for rollout in loop.roll(items, progress=progress):
                save_rollout(one.folder, rollout)


def _result(settings: Settings, plan: Plan, percent: float, device: torch.device) -> dict[str, Any]:
    """Everything as JSON holds it."""
    cost = count_interaction(meta_model(settings.model, settings.world), plan.reference.setting.sampling, 1)

    def trial(one: Tried) -> Trial:
        rollouts = [load_rollout(one.folder, item) for item in plan.items]
        return Trial(one.setting, rollouts, one.setting.calls * cost.network + cost.decoding)

    other = plan.reference.ref != plan.grid[0].ref
    trials = trial(plan.reference), map(trial, plan.grid)
    found = build_frontier(settings, plan.scorer, plan.scoring, *trials, percent, other_weights=other)
    found["reference"]["model"] = _described(plan.reference)
    protocol = {key: value for key, value in plan.protocol.items() if key != "hash"}
    protocol["sampling"] = describe_sampling(plan.reference.setting.sampling)
    return {
        **found,
        "benchmark": plan.benchmark,
        "model": _described(plan.grid[0]),
        "protocol": protocol,
        **provenance(settings, plan.store, device),
    }


def _described(one: Tried) -> dict[str, str]:
    """Where weights were and what they hash to."""
    hashes = {f"{part}_sha256": digest for part, digest in one.prints.items()}
    return {"ckpt": one.ref.ckpt, "adapter": one.ref.adapter, **hashes}
