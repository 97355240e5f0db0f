"""Subcommand eval: the closed-loop benchmark, base against post-trained, on held-out episodes with the same noise.

Every finished rollout is a file under ``<output>/rollouts``; an interrupted run continues there, and several processes
meet there. The report is made from those files by process 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from persistworld_cli.rollout.closed_loop import Commands, Rollout, check_cameras, iter_closed_loop
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.finished import batches, load_latents, load_rollout, pending, save_rollout, tell_finished
from persistworld_cli.rollout.recording import Item, load_recording
from persistworld_cli.rollout.scoring import Scores, ceiling_scores, floor_scores
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
        _score_references(settings, plan, model, references, quiet)
        for kind, items in todo.items():
            _score_model(settings, plan, model, ref, kind, items, quiet)
        del model
    processes.wait_for_everyone()
    return _collect(settings, plan, processes.device) if processes.is_main_process else None


def _todo(plan: Plan, ref: ModelRef, work: Sequence[Sequence[Item]]) -> dict[str, list[Item]]:
    """What is not there yet of one model: actions ("" as recorded, else the wrong ones) -> items."""
    folders = {"": plan.folders[ref.label], **plan.wrong[ref.label]}
    return {kind: pending(folder, work) for kind, folder in folders.items()}


def _collect(settings: Settings, plan: Plan, device: torch.device) -> EvalData:
    """All finished rollouts, read again."""

    def read(folder: Path) -> list[Rollout]:
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
    settings: Settings, plan: Plan, model: WorldModel, ref: ModelRef, kind: str, todo: Sequence[Item], quiet: bool
) -> None:
    """Roll out and save, under the recorded actions ("") or wrong ones, whose images nobody will want."""
    if not todo:
        return
    ev = settings.eval
    steps = min(ev.steps, ev.following_steps) if kind else ev.steps
    commands: Commands | None = None
    if kind:
        commands = commands_of(kind, plan.store, ev.split, plan.items, steps, settings.model.num_frames)
    folder = plan.wrong[ref.label][kind] if kind else plan.folders[ref.label]
    engine = RolloutEngine(model, settings.sampling, plan.scales[ref.label])
    what = f"eval: {ref.label}" + (f", {kind} actions" if kind else "")
    with Meter(what, -(-len(todo) // ev.batch) * steps, quiet=quiet) as meter:
        for rollout in iter_closed_loop(
            model,
            engine,
            plan.store,
            todo,
            split=ev.split,
            steps=steps,
            batch=ev.batch,
            scorer=plan.scorer,
            keep_latents=not kind,
            progress=lambda done, total: meter.advance(done - meter.done),
            scoring=plan.scoring,
            commands=commands,
        ):
            save_rollout(folder, rollout)


def _score_references(settings: Settings, plan: Plan, model: WorldModel, todo: Sequence[Item], quiet: bool) -> None:
    """Floor and ceiling of every item; they do not depend on the seed, which only names the file."""
    if not todo:
        return
    ev, rows = settings.eval, settings.model.num_frames
    seen: dict[tuple[str, int], tuple[Rollout, Rollout]] = {}
    with Meter("eval: floor and ceiling", len(todo), quiet=quiet) as meter:
        for item in todo:
            key = (item.episode, item.start)
            if key not in seen:
                seen[key] = _references(settings, plan, model, item, ev.steps, rows)
            for row, done in zip((FLOOR, CEILING), seen[key], strict=True):
                save_rollout(plan.folders[row], Rollout(item, done.valid, done.scores, None, 0.0))
            meter.advance()


def _references(
    settings: Settings, plan: Plan, model: WorldModel, item: Item, steps: int, rows: int
) -> tuple[Rollout, Rollout]:
    """Floor and ceiling of one item."""
    split = settings.eval.split
    recording = load_recording(plan.store, split, item, steps, rows)
    check_cameras(model, [recording])
    floor = floor_scores(plan.scorer, [recording], steps, rows, plan.scoring)
    ceiling = ceiling_scores(
        plan.scorer, [recording], model, plan.store, split, steps, rows, settings.sampling, plan.scoring
    )

    def one(scores: Scores) -> Rollout:
        return Rollout(item, recording.valid, {name: value[0] for name, value in scores.items()}, None, 0.0)

    return one(floor), one(ceiling)
