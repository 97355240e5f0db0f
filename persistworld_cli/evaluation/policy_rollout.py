"""`pi-rollout`: a policy acts in the world, in closed loop (method.md section 6).

Each interaction the policy is asked once for each rollout, shown the world's own frames, and its joint velocities
become the world model's next poses. Written for each rollout: the mp4 and a JSON with Ctrl-World's keys.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import PolicySettings, Settings
from persistworld_cli.data.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation.film import write_film, write_film_sheet, write_json
from persistworld_cli.evaluation.living import LivingWorld, Start, find_split, load_model, make_start
from persistworld_cli.evaluation.recording import Item
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.reports.progress import Meter
from persistworld_cli.robot.adapter import ActionAdapter, load_adapter
from persistworld_cli.rollout.controllers import PolicyController, PolicyTrace, PolicyView
from persistworld_cli.rollout.observation import find_layout
from persistworld_cli.rollout.policy_source import check_policy, open_policies
from persistworld_cli.rollout.tasks import Task, TaskStart, load_task

POLICY_HZ = 15.0  # rows of a chunk a second (DROID)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What will be rolled out, settled before the model is read."""

    policy: str
    task: Task
    view: PolicyView
    steps: int
    starts: list[Start]
    absent: list[str]  # the task's episodes that this dataset does not hold


@dataclass
class Taken:
    """A batch as far as it came."""

    starts: list[Start]
    traces: list[PolicyTrace]
    frames: list[NDArray[np.uint8]]  # each (B, n, V, H, W, 3): the opening, then what every interaction brought
    poses: list[NDArray[np.float64]] = field(default_factory=list)  # each (B, L, 7)
    seconds: list[float] = field(default_factory=list)
    error: PersistWorldError | None = None


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Roll a policy out and write what happened.

    Args:
        settings: resolved settings; `policy` tells server, layout, task, adapter.
        job: ``policy`` (see `open_policies`) and ``output`` (folder); optional ``task`` (else `policy.task`),
            ``episodes``, ``start``, ``instruction`` (instead of the task's), ``seeds`` (else [`policy.seed`]),
            ``limit`` (at most so many of the starts, each of which is rolled out with every seed), ``ckpt``,
            ``adapter`` (of the model: see `load_model`).

    Returns:
        ``rollouts`` (one entry each, with the paths), ``complete``, ``policy``, ``task`` and the path ``json``.

    Raises:
        UsageError: a policy, task or layout that means nothing, a skip that the layout is too short for.
        PersistWorldError: no server in time; or the policy failed in mid-rollout, after what was rolled out has been
            saved (marked ``"complete": false``).
    """
    store = open_store(settings)
    plan = make_plan(settings, job, store)
    store.stat()  # missing metadata should be told before the weights are read
    output, batch = Path(job["output"]), max(1, settings.eval.batch)
    model: WorldModel | None = None
    entries: list[dict[str, Any]] = []
    error: PersistWorldError | None = None
    with Meter("pi-rollout", plan.steps * -(-len(plan.starts) // batch)) as meter:
        for first in range(0, len(plan.starts), batch):
            starts = plan.starts[first : first + batch]
            try:
                # A connection is a new episode. It is opened before the weights are read: no server, no minutes lost.
                with open_policies(plan.policy, settings.policy, len(starts)) as policies:
                    model = load_model(settings, job) if model is None else model
                    taken = _roll(model, store, settings, plan, starts, list(policies), meter)
            except PersistWorldError as failed:
                if not entries:
                    raise
                error = failed  # the server went between two batches
                break
            entries += [_save(output, settings, plan, taken, row) for row in range(len(starts))]
            error = taken.error
            if error is not None:
                break
    result = {
        "policy": plan.policy,
        "task": plan.task.name,
        "steps": plan.steps,
        "complete": error is None,
        "not_started": len(plan.starts) - len(entries),
        "absent_episodes": plan.absent,
        "rollouts": entries,
        "json": str(output / "rollouts.json"),
    }
    write_json(output / "rollouts.json", result)
    if error is not None:
        saved = f"{len(entries)} rollouts saved as far as they came (marked incomplete) in {output}"
        raise PersistWorldError(f"{error.what}\n{saved}", where=error.where, fix=error.fix) from error
    return result


def make_plan(settings: Settings, job: dict[str, Any], store: EpisodeStore) -> Plan:
    """Settle everything that can be wrong before the model is read. Raises UsageError and PersistWorldError."""
    policy = str(job.get("policy") or "server")
    check_policy(policy)
    own = settings.policy
    task = load_task(str(job.get("task") or own.task))
    layout = find_layout(own.layout)
    view = PolicyView(
        layout=layout,
        adapter=_adapter(own, store),
        skip=own.skip or task.skip,
        gripper_cap=own.gripper_cap or task.gripper_cap,
        cap_current=own.cap_current,
        camera=_camera(own.camera, "policy.camera", settings),
        wrist_camera=_camera(own.wrist_camera, "policy.wrist_camera", settings),
        picture=own.picture,
        image_size=own.image_size,
        rows=settings.model.num_frames,
    )
    needed = (view.rows - 1) * view.skip + 1
    if needed > layout.rows:
        raise UsageError(
            f"skip {view.skip} needs {needed} rows of actions, layout '{layout.name}' has {layout.rows}",
            where="policy.skip" if own.skip else f"task '{task.name}'",
            fix=f"--set policy.skip={(layout.rows - 1) // (view.rows - 1)}",
        )
    starts, absent = _starts(settings, job, store, task)
    return Plan(policy, task, view, own.steps or task.steps, starts, absent)


def _adapter(settings: PolicySettings, store: EpisodeStore) -> ActionAdapter:
    """The action adapter that the settings name."""
    kind = settings.adapter
    path = kind if kind in ("gain", "meta") else str(resolve_path(kind))
    return load_adapter(path, settings.gain, store.meta / "adapter.json")


def _camera(index: int, key: str, settings: Settings) -> int:
    """A camera of the world. Raises UsageError for one that it has not."""
    if not 0 <= index < len(settings.world.cameras):
        raise UsageError(
            f"{key} = {index}, but there are {len(settings.world.cameras)} cameras", where=key, fix="count from 0"
        )
    return index


def _starts(settings: Settings, job: dict[str, Any], store: EpisodeStore, task: Task) -> tuple[list[Start], list[str]]:
    """The starts of a task in this dataset, each with every seed; and the task's episodes that the dataset lacks."""
    split = settings.eval.split
    wanted = [TaskStart(episode=str(name)) for name in job.get("episodes") or ()] or list(task.starts)
    spread = [
        (entry, name) for entry in wanted for name in ([entry.episode] if entry.episode else store.episodes(split))
    ]
    absent = [name for _, name in spread if find_split(store, name, split) is None]
    if absent and job.get("episodes"):
        raise PersistWorldError(f"no episode '{absent[0]}' in this dataset", where=str(store.root))
    found = [(entry, name) for entry, name in spread if name not in absent][: job.get("limit")]
    if not found:
        raise PersistWorldError(
            f"no episode of task '{task.name}' is in this dataset ({', '.join(absent) or f'split {split} is empty'})",
            where=str(store.root),
            fix="name the task's dataset (--dataset), another --task, or --episode",
        )
    if absent:
        logger.warning("task '%s': episodes %s are not in this dataset", task.name, ", ".join(absent))
    starts = []
    for entry, name in found:
        frame = entry.start if job.get("start") is None else int(job["start"])
        for seed in job.get("seeds") or (settings.policy.seed,):
            start = make_start(
                store, Item(name, frame, int(seed)), split, str(job.get("instruction") or entry.instruction)
            )
            _ = start.joints  # told now, not after the weights are read
            starts.append(start)
    return starts, absent


def _roll(
    model: WorldModel,
    store: EpisodeStore,
    settings: Settings,
    plan: Plan,
    starts: list[Start],
    policies: list[Any],
    meter: Meter,
) -> Taken:
    """One batch, as far as the policy answers."""
    world = LivingWorld(model, store, starts, settings, policy=True)
    joints = np.stack([start.joints for start in starts])
    controller = PolicyController(policies, plan.view, joints, [start.text for start in starts])
    taken = Taken(starts, controller.traces, [world.pictures[:, None]])
    for policy in policies:
        policy.reset()
    for step in range(plan.steps):
        try:
            poses = controller.poses(step, world.poses, world.pictures)
        except PersistWorldError as error:
            taken.error = error
            break
        moved = world.step(poses)
        taken.frames.append(moved.pictures)
        taken.poses.append(poses)
        taken.seconds.append(moved.seconds)
        meter.advance(seconds_a_step=moved.seconds)
    return taken


def _save(output: Path, settings: Settings, plan: Plan, taken: Taken, row: int) -> dict[str, Any]:
    """Write one rollout's video, contact sheet and JSON; returns its entry in the summary."""
    start, trace = taken.starts[row], taken.traces[row]
    frames = np.concatenate([part[row] for part in taken.frames])
    done = len(taken.poses)
    title = f"{plan.policy}, {plan.task.name}: episode {start.item.episode}, frame {start.item.start}: {start.text}"
    name = f"{plan.task.name}_{start.item.name}"
    video, sheet, record = (output / f"{name}.{suffix}" for suffix in ("mp4", "png", "json"))
    fps = POLICY_HZ / plan.view.skip
    write_film(video, title, settings, frames, [plan.policy] * done, fps)
    write_film_sheet(sheet, title, settings, frames, [f"step {i}" for i in range(1, done + 1)])
    entry: dict[str, Any] = {
        "success": None,  # to be judged: by a person, or by a judge
        "start_idx": 0,  # of the video
        "end_idx": len(frames) - 1,
        "instructions": start.text,
        "complete": taken.error is None,
        "error": None if taken.error is None else str(taken.error),
        "episode": start.item.episode,
        "split": start.split,
        "start": start.item.start,
        "seed": start.item.seed,
        "policy": plan.policy,
        "task": plan.task.name,
        "steps": done,
        "steps_planned": plan.steps,
        "skip": plan.view.skip,
        "gripper_cap": plan.view.gripper_cap,
        "fps": fps,
        "seconds": [round(seconds / len(taken.starts), 4) for seconds in taken.seconds],
    }
    arrays = {
        "joint_pos": trace.joint_pos,
        "joint_vel": trace.joint_vel,
        "state_fk": trace.state_fk,
        "poses": [poses[row].tolist() for poses in taken.poses],
    }
    write_json(record, {**entry, **arrays})
    shown = {key: entry[key] for key in ("episode", "start", "seed", "steps", "complete")}
    return {**shown, "video": str(video), "sheet": str(sheet), "json": str(record)}
