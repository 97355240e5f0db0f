"""Subcommand eval: compare base and post-trained model in closed loop, on held-out episodes with the same noise.

Every finished rollout is a file under ``<output>/rollouts``; an interrupted run continues there, and several processes
share the folder. Process 0 makes the report from those files.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persistworld_cli.checkpoints.references import ModelRef
from persistworld_cli.config.requests import EvalRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.evaluation.action_following import commands_of
from persistworld_cli.evaluation.comparing import compare_files
from persistworld_cli.evaluation.plan import EvalPlan, Weights, make_plan
from persistworld_cli.evaluation.protocol import provenance
from persistworld_cli.evaluation.report import animate, write_comparison, write_report
from persistworld_cli.evaluation.results import CEILING, FLOOR, Drawn, EvalData
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, batches
from persistworld_cli.rollout.finished import load_latents, load_rollout, log_finished, pending, save_rollout
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import Item, load_recording
from persistworld_cli.study.key import StudyKey
from persistworld_cli.study.write import plan_study, write_study


def run(settings: Settings, request: EvalRequest) -> dict[str, Any]:
    """Evaluate; reads ``world.dataset``, ``model``, ``sampling``, ``eval`` and ``rewards`` of the settings.

    Returns:
        A summary for the terminal (`report.summary`); ``<output>/eval.json`` has everything. {} on ranks other than 0.

    Raises:
        PersistWorldError: absent episodes, masks that do not fit, weights or a dataset of another preset, a result of
            another protocol. All of these are checked before anything is computed.
    """
    processes = PartialState(cpu=settings.launch.device == "cpu")
    output, other, quiet = request.output, request.compare, not processes.is_main_process
    plan = make_plan(settings, output, processes.device, baseline=request.baseline, compare=other, quiet=quiet)
    study: StudyKey | None = None
    if request.study and processes.is_main_process:
        study = plan_study(request.study, settings, plan.items, _describe_models(plan), plan.protocol)
    data = measure(plan, processes)
    if data is None:
        return {}
    data.provenance["command"] = shlex.join(request.command)
    summary = write_report(data, output, plan.video_net)
    if request.animation:
        animate(data, request.animation)
        summary["animation"] = str(request.animation)
    if other:
        summary |= write_comparison(*compare_files(other, str(output / "eval.json")), output)
    if study and request.study:
        summary["study"] = write_study(study, request.study, settings, data.items, data.labels, data.draw)
    return summary


def measure(plan: EvalPlan, processes: PartialState) -> EvalData | None:
    """Roll out and score this process's share of the missing rollouts. Returns all on rank 0, None on other ranks."""
    work, quiet = plan.work(processes), not processes.is_main_process
    if processes.is_main_process:
        plan.forget_changed(plan.folders[CEILING].parent)
    processes.wait_for_everyone()
    log_finished([*plan.folders.values(), *(f for own in plan.wrong.values() for f in own.values())], plan.items)
    for weights in plan.models:
        folders = {"": plan.folders[weights.label], **plan.wrong[weights.label]}
        todo = {actions: pending(folder, work) for actions, folder in folders.items()}
        references = pending(plan.folders[CEILING], work) if weights is plan.models[0] else []
        if not any(todo.values()) and not references:
            continue
        loop = plan.loop(plan.load(weights.ref), weights)
        if references:
            _score_references(plan, loop, references, quiet)
        for actions, items in todo.items():
            if items:
                _score_model(plan, loop, weights, actions, folders[actions], items, quiet)
        del loop
    processes.wait_for_everyone()
    return _collect(plan) if processes.is_main_process else None


def _score_model(
    plan: EvalPlan, loop: ClosedLoop, weights: Weights, actions: str, folder: Path, todo: Sequence[Item], quiet: bool
) -> None:
    """Roll out and save, under the recorded actions ("") or wrong ones (their latents are not kept)."""
    what, commands = f"eval: {weights.label}", None
    if actions:
        what = f"{what}, {actions} actions"
        loop = replace(loop, steps=min(loop.steps, plan.settings.eval.following_steps))
        commands = commands_of(actions, plan.store, loop.split, plan.items)
    with Meter(what, len(batches(todo, loop.batch)) * loop.steps, quiet=quiet) as meter:
        for rollout in loop.roll(todo, keep_latents=not actions, progress=meter.advance, commands=commands):
            save_rollout(folder, rollout)


def _score_references(plan: EvalPlan, loop: ClosedLoop, todo: Sequence[Item], quiet: bool) -> None:
    """Floor and ceiling of every item; the seed only names the file and does not affect them."""
    seen: dict[tuple[str, int], tuple[ScoredRollout, ScoredRollout]] = {}
    with Meter("eval: floor and ceiling", len(todo), quiet=quiet) as meter:
        for item in todo:
            key = (item.episode, item.start)
            if key not in seen:
                seen[key] = loop.references(item)
            for row, done in zip((FLOOR, CEILING), seen[key], strict=True):
                save_rollout(plan.folders[row], replace(done, item=item))
            meter.advance()


def _collect(plan: EvalPlan) -> EvalData:
    """All finished rollouts, read again."""
    settings, ckpts = plan.settings, {weights.label: weights.ref.ckpt for weights in plan.models}

    def read(folder: Path) -> list[ScoredRollout]:
        return [load_rollout(folder, item) for item in plan.items]

    def latents(label: str, item: Item) -> Any:
        return load_latents(plan.folders[label], item)

    @cache
    def decoder(ckpt: str) -> WorldModel:
        return plan.load(ModelRef("", ckpt))  # an adapter does not change the VAE

    def draw(item: Item) -> Drawn:
        ev = settings.eval
        recording = load_recording(plan.store, ev.split, item, ev.steps, settings.model.num_frames)
        length = int(recording.valid.sum())
        drawn = {
            label: draw_frames(decoder(ckpt), latents(label, item), settings.sampling, recording.size)[:length]
            for label, ckpt in ckpts.items()
        }
        return recording, drawn

    return EvalData(
        settings=settings,
        items=plan.items,
        models=_describe_models(plan),
        rollouts={row: read(folder) for row, folder in plan.folders.items()},
        wrong={label: {kind: read(folder) for kind, folder in own.items()} for label, own in plan.wrong.items()},
        latents=latents,
        draw=draw,
        scorer=plan.scorer,
        scoring=plan.scoring,
        protocol=plan.protocol,
        benchmark=plan.benchmark,
        provenance=provenance(settings, plan.store, plan.device),
    )


def _describe_models(plan: EvalPlan) -> list[dict[str, Any]]:
    """Labels, paths and hashes of the compared models, and the percentiles that scale poses."""
    described = []
    for weights in plan.models:
        stat = weights.store.stat()
        own = weights.describe() | {"state_percentiles": [stat.p01.tolist(), stat.p99.tolist()]}
        described.append({"label": weights.label, **own})
    return described
