"""Subcommand eval: the closed-loop benchmark, base against post-trained, on held-out episodes with the same noise.

Every finished rollout is a file under ``<output>/rollouts``; an interrupted run continues there, and several processes
meet there. The report is made from those files by process 0.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation.closed_loop import Rollout, check_cameras, iter_closed_loop
from persistworld_cli.evaluation.metrics import SHOWN, Scores, ceiling_scores, floor_scores
from persistworld_cli.evaluation.recording import Item, check_item, load_recording
from persistworld_cli.evaluation.report import EvalData, write_report
from persistworld_cli.evaluation.weights import ModelRef, hash_of, refs_of_eval
from persistworld_cli.models.checkpoints import load_world_model
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rewards.score import Scorer
from persistworld_cli.rollout.engine import RolloutEngine

PROTOCOL = 1  # raise it when the same settings would give other numbers
FLOOR, CEILING = "copy first frame", "recording through VAE"


@dataclass(frozen=True)
class Plan:
    """What there is to do, validated before any compute.

    Attributes:
        store: the dataset.
        items: the rollouts, episodes first.
        models: the baseline, and what is compared with it.
        scorer: metrics, on the device.
        protocol: everything that two results must share to be comparable.
        folders: row of the table -> folder of its finished rollouts.
        fingerprints: label -> hashes of its weights.
    """

    store: EpisodeStore
    items: list[Item]
    models: list[ModelRef]
    scorer: Scorer
    protocol: dict[str, Any]
    folders: dict[str, Path]
    fingerprints: dict[str, dict[str, str]]


def run(settings: Settings, job: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate.

    Args:
        settings: ``world.dataset``, ``model``, ``sampling``, ``eval`` and ``rewards`` are read.
        job: ``output`` (folder); optional ``ckpt``, ``baseline``, ``baseline_adapter``, ``labels`` (see
            `weights.refs_of_eval`), ``videos`` (False: no mp4s).

    Returns:
        A summary for the terminal (`report.summary`); all of it is in ``<output>/eval.json``. {} on ranks other than 0.

    Raises:
        PersistWorldError: absent episodes, a dataset of another preset, unreadable weights.
    """
    processes = PartialState(cpu=settings.launch.device == "cpu")
    output = Path(job["output"])
    plan = make_plan(settings, job, output, processes.device)
    own = plan.items[processes.process_index :: processes.num_processes]
    for index, ref in enumerate(plan.models):
        todo = pending(plan.folders[ref.label], own)
        references = pending(plan.folders[CEILING], own) if index == 0 else []
        if not todo and not references:
            continue
        model = _load(settings, ref, processes.device)
        _score_references(settings, plan, model, references, not processes.is_main_process)
        _score_model(settings, plan, model, ref, todo, not processes.is_main_process)
        del model
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return {}
    data = EvalData(
        settings=settings,
        items=plan.items,
        labels=[ref.label for ref in plan.models],
        rollouts={row: [load_rollout(folder, item) for item in plan.items] for row, folder in plan.folders.items()},
        latents=lambda label, item: load_latents(plan.folders[label], item),
        floor=FLOOR,
        ceiling=CEILING,
        scorer=plan.scorer,
        protocol=plan.protocol,
        models=[
            {"label": ref.label, "ckpt": ref.ckpt, "adapter": ref.adapter, **_sha(plan, ref)} for ref in plan.models
        ],
        device=str(processes.device),
    )
    return write_report(
        data, plan.store, output, lambda: _load(settings, plan.models[0], processes.device), job.get("videos", True)
    )


def _sha(plan: Plan, ref: ModelRef) -> dict[str, str]:
    return {f"{part}_sha256": digest for part, digest in plan.fingerprints[ref.label].items()}


def make_plan(settings: Settings, job: Mapping[str, Any], output: Path, device: torch.device) -> Plan:
    """Resolve and check everything (dataset, episodes, starts, weights, metrics) before any compute."""
    ev, world = settings.eval, settings.world
    if not world.dataset:
        raise UsageError("no dataset to evaluate on", where="world.dataset", fix="give --dataset, or take a preset")
    store = EpisodeStore(resolve_path(world.dataset))
    items = eval_items(store, settings)
    models = refs_of_eval(settings.model, job)
    scorer = Scorer(settings.rewards, world, device, names=SHOWN)
    stat = store.stat()
    protocol = {
        "protocol": PROTOCOL,
        "dataset": str(store.root),
        "split": ev.split,
        "steps": ev.steps,
        "sampling": settings.sampling,
        "metrics": scorer.describe(),
        "cameras": list(world.cameras),
        "state_percentiles": [stat.p01, stat.p99],
        "items": [[item.episode, item.start, item.seed] for item in items],
    }
    same = {key: value for key, value in protocol.items() if key != "items"}  # more episodes later keep what is done
    prints = {ref.label: ref.fingerprint() for ref in models}
    root = output / "rollouts"
    folders = {
        FLOOR: root / f"floor-{hash_of(same)}",
        **{ref.label: root / f"model-{hash_of([same, prints[ref.label], device.type])}" for ref in models},
        CEILING: root / f"ceiling-{hash_of([same, prints[models[0].label]])}",
    }
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return Plan(store, items, models, scorer, {**protocol, "hash": hash_of(protocol)}, folders, prints)


def eval_items(store: EpisodeStore, settings: Settings) -> list[Item]:
    """Every (episode, start, seed) of the benchmark.

    Raises:
        PersistWorldError: an empty split, an absent episode, a start beyond an episode's end.
    """
    ev = settings.eval
    episodes = list(ev.episodes) or store.episodes(ev.split)
    if not episodes:
        raise PersistWorldError(
            f"split '{ev.split}' has no episodes",
            where=str(store.root / "annotation"),
            fix=f"set eval.split to one of: {', '.join(store.splits)}",
        )
    items = [Item(episode, start, seed) for episode in episodes for start in ev.starts for seed in ev.seeds]
    if not items:
        raise PersistWorldError("nothing to roll out", where="eval.starts, eval.seeds", fix="name at least one of each")
    for item in items:
        check_item(store, ev.split, item)
    return items


def _load(settings: Settings, ref: ModelRef, device: torch.device) -> WorldModel:
    return load_world_model(settings.model, settings.world, ckpt=ref.ckpt, adapter=ref.adapter, device=device)


def _score_model(
    settings: Settings, plan: Plan, model: WorldModel, ref: ModelRef, todo: Sequence[Item], quiet: bool
) -> None:
    """Roll out and save what is not there yet."""
    if not todo:
        return
    ev = settings.eval
    engine = RolloutEngine(model, settings.sampling, plan.store.stat())
    batches = -(-len(todo) // ev.batch)
    with Meter(f"eval: {ref.label}", batches * ev.steps, quiet=quiet) as meter:
        for rollout in iter_closed_loop(
            model,
            engine,
            plan.store,
            todo,
            split=ev.split,
            steps=ev.steps,
            batch=ev.batch,
            scorer=plan.scorer,
            keep_latents=True,
            progress=lambda done, total: meter.advance(done - meter.done),
        ):
            save_rollout(plan.folders[ref.label], rollout)


def _score_references(settings: Settings, plan: Plan, model: WorldModel, todo: Sequence[Item], quiet: bool) -> None:
    """Floor and ceiling of every item; they do not depend on the seed, which only names the file."""
    if not todo:
        return
    ev, rows = settings.eval, settings.model.num_frames
    with Meter("eval: floor and ceiling", len(todo), quiet=quiet) as meter:
        for item in todo:
            recording = load_recording(plan.store, ev.split, item, ev.steps, rows)
            check_cameras(model, [recording])
            chunk = settings.sampling.decode_chunk
            floor = floor_scores(plan.scorer, [recording], ev.steps, rows)
            ceiling = ceiling_scores(plan.scorer, [recording], model, plan.store, ev.split, ev.steps, rows, chunk)
            for row, scores in ((FLOOR, floor), (CEILING, ceiling)):
                own: Scores = {name: value[0] for name, value in scores.items()}
                save_rollout(plan.folders[row], Rollout(item, recording.valid, own, None, 0.0))
            meter.advance()


# -- finished rollouts on disk ------------------------------------------------------------------------------------


def pending(folder: Path, items: Sequence[Item]) -> list[Item]:
    """The items that have no finished file yet."""
    return [item for item in items if not (folder / f"{item.name}.npz").is_file()]


def save_rollout(folder: Path, rollout: Rollout) -> None:
    """One file, whole or absent (written beside, then renamed)."""
    path = folder / f"{rollout.item.name}.npz"
    beside = folder / f".{rollout.item.name}.{os.getpid()}.npz"
    arrays: dict[str, Any] = {f"score.{name}": value for name, value in rollout.scores.items()}
    if rollout.latents is not None:
        arrays["latents"] = rollout.latents
    np.savez(beside, valid=rollout.valid, seconds=rollout.seconds, **arrays)
    beside.replace(path)


def load_rollout(folder: Path, item: Item) -> Rollout:
    """Read what `save_rollout` wrote, without the latents.

    Raises:
        PersistWorldError: a damaged file.
    """
    with _opened(folder, item) as data:
        scores = {key.removeprefix("score."): data[key] for key in data.files if key.startswith("score.")}
        return Rollout(item, data["valid"], scores, None, float(data["seconds"]))


def load_latents(folder: Path, item: Item) -> NDArray[np.float16]:
    """The predicted latents (S, L, C, h, w) of a finished rollout. Raises PersistWorldError for a damaged file."""
    with _opened(folder, item) as data:
        latents: NDArray[np.float16] = data["latents"]
        return latents


@contextmanager
def _opened(folder: Path, item: Item) -> Iterator[Any]:
    path = folder / f"{item.name}.npz"
    try:
        with np.load(path, allow_pickle=False) as data:
            yield data
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise PersistWorldError(
            f"unreadable rollout: {error}", where=str(path), fix="delete the file and run again"
        ) from error
