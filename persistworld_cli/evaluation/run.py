"""Subcommand eval: the closed-loop benchmark, base against post-trained, on held-out episodes with the same noise.

Every finished rollout is a file under ``<output>/rollouts``; an interrupted run continues there, and several processes
meet there. The report is made from those files by process 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.checkpoints.references import ModelRef
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note
from persistworld_cli.evaluation.action_following import commands_of
from persistworld_cli.evaluation.comparing import compare_results, load_result
from persistworld_cli.evaluation.plan import CEILING, FLOOR, Plan, make_plan, subset_note
from persistworld_cli.evaluation.protocol import provenance
from persistworld_cli.evaluation.report import EvalData, write_comparison, write_report
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, batches
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.finished import load_latents, load_rollout, pending, save_rollout, tell_finished
from persistworld_cli.rollout.recording import Item
from persistworld_cli.study.key import StudyKey
from persistworld_cli.study.write import plan_study, write_study


def run(settings: Settings, job: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate.

    Args:
        settings: ``world.dataset``, ``model``, ``sampling``, ``eval`` and ``rewards`` are read.
        job: ``output`` (folder); optional ``baseline``, ``baseline_adapter``, ``labels`` (see
            `weights.refs_of_eval`), ``videos`` (False: no mp4s), ``study`` (folder of a blind study to write),
            ``compare`` (another result's eval.json).

    Returns:
        A summary for the terminal (`report.summary`); all of it is in ``<output>/eval.json``. {} on ranks other than 0.

    Raises:
        PersistWorldError: absent episodes, masks that do not fit, weights or a dataset of another preset, a result of
            another protocol; all before any compute.
    """
    processes = PartialState(cpu=settings.launch.device == "cpu")
    output = Path(job["output"])
    plan = make_plan(settings, job, output, processes.device, quiet=not processes.is_main_process)
    if processes.is_main_process and (text := subset_note(plan.benchmark)):
        note(text)
    study = _plan_study(settings, job, plan) if processes.is_main_process else None
    data = measure(settings, plan, processes)
    if data is None:
        return {}
    sources = {ref.label: ref.ckpt for ref in plan.models}
    bare = cache(lambda ckpt: _load(settings, ModelRef("", ckpt), processes.device))  # an adapter leaves the VAE alone

    def painter(label: str) -> WorldModel:
        model: WorldModel = bare(sources[label])
        return model

    summary = write_report(data, plan.store, output, painter, job.get("videos", True), plan.video_net)
    if other := job.get("compare"):
        own = str(output / "eval.json")
        against = compare_results(load_result(other), load_result(own), f"{other} and {own}")
        summary |= write_comparison(against, output)
    if study:
        summary["study"] = write_study(
            study,
            Path(job["study"]),
            settings,
            data.items,
            data.labels,
            lambda item: data.draw(item, plan.store, painter),
        )
    return summary


def measure(settings: Settings, plan: Plan, processes: PartialState) -> EvalData | None:
    """Roll out and score what is not there yet, this process's share of it; all of it on rank 0, None on the others."""
    work = batches(plan.items, settings.eval.batch)[processes.process_index :: processes.num_processes]
    tell_finished([*plan.folders.values(), *(f for own in plan.wrong.values() for f in own.values())], plan.items)
    quiet = not processes.is_main_process
    for index, ref in enumerate(plan.models):
        todo = _todo(plan, ref, work)
        references = pending(plan.folders[CEILING], work) if index == 0 else []
        if not any(todo.values()) and not references:
            continue
        model = _load(settings, ref, processes.device)
        engine, ev = RolloutEngine(model, settings.sampling, plan.scales[ref.label]), settings.eval
        loop = ClosedLoop(engine, plan.store, ev.split, ev.steps, ev.batch, plan.scorer, plan.scoring)
        _score_references(plan, loop, references, quiet)
        for kind, items in todo.items():
            _score_model(settings, plan, loop, ref, kind, items, quiet)
        del model
    processes.wait_for_everyone()
    return _collect(settings, plan, processes.device) if processes.is_main_process else None


def _todo(plan: Plan, ref: ModelRef, work: Sequence[Sequence[Item]]) -> dict[str, list[Item]]:
    """What is not there yet of one model: actions ("" as recorded, else the wrong ones) -> items."""
    folders = {"": plan.folders[ref.label], **plan.wrong[ref.label]}
    return {kind: pending(folder, work) for kind, folder in folders.items()}


def _collect(settings: Settings, plan: Plan, device: torch.device) -> EvalData:
    """All finished rollouts, read again."""

    def read(folder: Path) -> list[ScoredRollout]:
        return [load_rollout(folder, item) for item in plan.items]

    return EvalData(
        settings=settings,
        items=plan.items,
        labels=[ref.label for ref in plan.models],
        rollouts={row: read(folder) for row, folder in plan.folders.items()},
        latents=lambda label, item: load_latents(plan.folders[label], item),
        floor=FLOOR,
        ceiling=CEILING,
        scorer=plan.scorer,
        scoring=plan.scoring,
        protocol=plan.protocol,
        benchmark=plan.benchmark,
        models=_models(plan),
        provenance=provenance(settings, plan.store, device),
        wrong={label: {kind: read(folder) for kind, folder in own.items()} for label, own in plan.wrong.items()},
    )


def _models(plan: Plan) -> list[dict[str, Any]]:
    """Labels, paths and hashes of what is compared, and the percentiles that actions were scaled by."""
    scales = {label: [stat.p01.tolist(), stat.p99.tolist()] for label, stat in plan.scales.items()}
    return [
        {
            "label": ref.label,
            "ckpt": ref.ckpt,
            "adapter": ref.adapter,
            **_sha(plan, ref),
            "state_percentiles": scales[ref.label],
        }
        for ref in plan.models
    ]


def _plan_study(settings: Settings, job: Mapping[str, Any], plan: Plan) -> StudyKey | None:
    """The blind study that ``--study`` asks for, checked before any compute."""
    if not job.get("study"):
        return None
    return plan_study(Path(job["study"]), settings, plan.items, _models(plan), plan.protocol)


def _sha(plan: Plan, ref: ModelRef) -> dict[str, str]:
    return {f"{part}_sha256": digest for part, digest in plan.fingerprints[ref.label].items()}


def _load(settings: Settings, ref: ModelRef, device: torch.device) -> WorldModel:
    return load_for_sampling(settings, ckpt=ref.ckpt, adapter=ref.adapter, device=device)


def _score_model(
    settings: Settings, plan: Plan, loop: ClosedLoop, ref: ModelRef, kind: str, todo: Sequence[Item], quiet: bool
) -> None:
    """Roll out and save, under the recorded actions ("") or wrong ones, whose latents are not kept."""
    if not todo:
        return
    folder, what, commands = plan.folders[ref.label], f"eval: {ref.label}", None
    if kind:
        folder, what = plan.wrong[ref.label][kind], f"{what}, {kind} actions"
        loop = replace(loop, steps=min(loop.steps, settings.eval.following_steps))
        commands = commands_of(kind, loop.store, loop.split, plan.items)
    with Meter(what, len(batches(todo, loop.batch)) * loop.steps, quiet=quiet) as meter:
        for rollout in loop.roll(todo, keep_latents=not kind, progress=meter.advance, commands=commands):
            save_rollout(folder, rollout)


def _score_references(plan: Plan, loop: ClosedLoop, todo: Sequence[Item], quiet: bool) -> None:
    """Floor and ceiling of every item; they do not depend on the seed, which only names the file."""
    if not todo:
        return
    seen: dict[tuple[str, int], tuple[ScoredRollout, ScoredRollout]] = {}
    with Meter("eval: floor and ceiling", len(todo), quiet=quiet) as meter:
        for item in todo:
            key = (item.episode, item.start)
            if key not in seen:
                seen[key] = loop.references(item)
            for row, done in zip((FLOOR, CEILING), seen[key], strict=True):
                save_rollout(plan.folders[row], replace(done, item=item))
            meter.advance()
