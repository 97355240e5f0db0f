"""Subcommand replay: replay recorded actions in the world model from one real frame, next to the recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.checkpoints.references import ModelRef, refs_of_replay
from persistworld_cli.config.requests import ReplayRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.errors import UsageError
from persistworld_cli.files import jsonable, write_json, write_text
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.tables import plain, steps_tables
from persistworld_cli.reports.videos import ComparedRollout
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, batches
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import Item, load_recording, make_items, require_episodes
from persistworld_cli.rollout.scoring import SHOWN, metric_infos
from persistworld_cli.statistics.paired import mean


def run(settings: Settings, request: ReplayRequest) -> dict[str, Any]:
    """Replay episodes and write videos, contact sheets, a table and JSON.

    Reads these settings: ``world.dataset``, ``model``, ``sampling``, ``rewards``, and the split, episodes, starts,
    steps, seeds and batch of ``eval``.

    Returns:
        A summary for the terminal; ``<output>/replay.json`` has everything.

    Raises:
        PersistWorldError: missing episodes, a start after the end of an episode, unreadable weights.
    """
    if not settings.world.dataset:
        raise UsageError("no dataset to replay from", where="world.dataset", fix="give --dataset, or use a preset")
    store = open_store(settings)
    split = settings.eval.split
    items, steps = replay_items(store, settings), settings.eval.steps
    refs = refs_of_replay(settings.model, request.ckpts, request.adapters)
    device = PartialState(cpu=settings.launch.device == "cpu").device
    scorer = Scorer(settings.rewards, settings.world, device, names=SHOWN)
    scores: dict[Item, dict[str, ScoredRollout]] = {item: {} for item in items}
    drawn: dict[Item, dict[str, NDArray[np.uint8]]] = {item: {} for item in items}
    episodes, batch = [item.episode for item in items], settings.eval.batch
    stores = weights_stores(settings, store, [ref.parts for ref in refs], split=split, episodes=episodes)
    for ref, own in zip(refs, stores, strict=True):
        model = load_for_sampling(settings, ckpt=ref.ckpt, adapter=ref.adapter, device=device)
        engine = RolloutEngine(model, settings.sampling, own.stat())
        loop = ClosedLoop(engine, own, split, steps, batch, scorer)
        with Meter(f"replay: {ref.label}", len(batches(items, batch)) * steps) as meter:
            for rollout in loop.roll(items, keep_latents=True, progress=meter.advance):
                assert rollout.latents is not None
                size = own.frames(split, rollout.item.episode, [rollout.item.start]).shape[2:4]
                scores[rollout.item][ref.label] = rollout
                drawn[rollout.item][ref.label] = draw_frames(model, rollout.latents, settings.sampling, size)
    return _write(settings, store, items, steps, refs, scorer, scores, drawn, request.output)


def replay_items(store: EpisodeStore, settings: Settings) -> list[Item]:
    """The rollouts that the settings name; without episodes, those of the first episode of the split.

    Raises:
        PersistWorldError: an empty split, a missing episode, a start after its end.
    """
    ev, split = settings.eval, settings.eval.split
    episodes = ev.episodes or require_episodes(store, split)[:1]
    return make_items(store, split, episodes, ev.starts, ev.seeds)


def _write(
    settings: Settings,
    store: EpisodeStore,
    items: list[Item],
    steps: int,
    refs: list[ModelRef],
    scorer: Scorer,
    scores: Mapping[Item, Mapping[str, ScoredRollout]],
    drawn: Mapping[Item, Mapping[str, NDArray[np.uint8]]],
    output: Path,
) -> dict[str, Any]:
    """Videos, sheets, table and JSON."""
    infos = metric_infos(scorer)
    metrics = [{"name": name, **asdict(info)} for name, info in infos.items()]
    entries = []
    for item in items:
        recording = load_recording(store, settings.eval.split, item, steps, settings.model.num_frames)
        length = int(recording.valid.sum())
        done = -(-length // (settings.model.num_frames - 1))  # the last step may be a part
        if done < steps:
            note(
                f"replay: episode {item.episode} ends at frame {item.start + length}, in step {done} of {steps} from "
                f"frame {item.start}: no actions are recorded after it, so the other steps are not predicted"
            )
        frames = {label: images[:length] for label, images in drawn[item].items()}
        title = f"episode {item.episode}, frame {item.start}, seed {item.seed}: {recording.annotation.text}"
        stem = f"episode-{item.episode}_start-{item.start}_seed-{item.seed}"
        video, sheet = output / f"{stem}.mp4", output / f"{stem}.png"
        shown = ComparedRollout(title, settings, recording, frames, scores[item])
        shown.write_video(video)
        shown.write_sheet(sheet)
        rows = step_rows(settings, scores[item], {name: info.label for name, info in infos.items()})
        files = {"video": str(video), "sheet": str(sheet)}
        entries.append({**asdict(item), "title": title, **files, "frames": length, "rows": rows})
    record = {"kind": "replay", "models": [asdict(ref) for ref in refs], "metrics": metrics, "steps": steps}
    record["replays"] = entries
    write_text(output / "steps.txt", plain(*steps_tables(record)))
    write_json(output / "replay.json", record)
    return {
        "output": str(output),
        "episodes": len({item.episode for item in items}),
        "steps": steps,
        "rows": list(jsonable(entries[0]["rows"])),
        "videos": [entry["video"] for entry in entries],
        "sheets": [entry["sheet"] for entry in entries],
        "json": str(output / "replay.json"),
        "text": str(output / "steps.txt"),
    }


def step_rows(
    settings: Settings, scores: Mapping[str, ScoredRollout], labels: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row per interaction and model: the mean over frames and cameras, by label."""
    new_frames, rate = settings.model.num_frames - 1, settings.world.rate_hz
    first = next(iter(scores.values()))
    rows: list[dict[str, Any]] = []
    for step in range(len(first.valid) // new_frames):
        part = slice(step * new_frames, (step + 1) * new_frames)
        if not first.valid[part].any():
            break
        for model, rollout in scores.items():
            values = {
                label: float(mean(rollout.scores[name][part].astype(np.float64).reshape(-1), 0))
                for name, label in labels.items()
            }
            rows.append(
                {"step": step + 1, "time_s": round((step + 1) * new_frames / rate, 6), "model": model, **values}
            )
    return rows
