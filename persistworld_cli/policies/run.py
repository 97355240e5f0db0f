"""`pi-rollout`: a policy acts in the world, in closed loop (method.md section 6).

Each interaction the policy is asked once for each rollout, shown the world's own frames, and its joint velocities
become the world model's next poses. Written for each rollout: the mp4 and a JSON with Ctrl-World's keys; of all that
are whole, a LeRobot dataset. A judge may say what came of them, and the simulator what would have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.loading import load_model
from persistworld_cli.checkpoints.references import inference_ref
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import PolicySettings, Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import write_json, write_text
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.policies.bundled_world.compare import Simulated, compare, simulate
from persistworld_cli.policies.bundled_world.scene import RecordedStart, find_recorded
from persistworld_cli.policies.bundled_world.simulator import check_simulator
from persistworld_cli.policies.controller import ActingPolicy, PolicyController, PolicyView
from persistworld_cli.policies.judge import Judge, Verdict
from persistworld_cli.policies.judges import ask_judge, load_judge
from persistworld_cli.policies.observation import find_layout
from persistworld_cli.policies.outputs import Rollout, save_rollout, write_episodes
from persistworld_cli.policies.source import check_policy, open_policies
from persistworld_cli.policies.tasks import Task, TaskStart, load_task
from persistworld_cli.reports.policy_tables import rollout_tables
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.tables import plain
from persistworld_cli.robot.adapter import ActionAdapter, load_adapter
from persistworld_cli.rollout.interactive import InteractiveRollout, find_split, make_start
from persistworld_cli.rollout.recording import Item, Start

BUNDLED_JUDGE = "bundled-world"  # judges what is compared with the simulator, if no other is named

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


@dataclass(frozen=True)
class Court:
    """Who judges, and what is known of each start's scene; `simulate`: the simulator is asked too."""

    name: str = ""
    judge: Judge | None = None
    scenes: Sequence[RecordedStart | None] = ()
    simulate: bool = False


@dataclass
class Gathered:
    """Rollouts as they come, each with its verdict, what the simulator made of it, and its entry in the summary."""

    rollouts: list[Rollout] = field(default_factory=list)
    verdicts: list[Verdict | None] = field(default_factory=list)
    simulated: list[Simulated] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    error: PersistWorldError | None = None


def run(settings: Settings, request: PolicyRolloutRequest) -> dict[str, Any]:
    """Roll a policy out and write what happened.

    Args:
        settings: resolved settings; `policy` tells server, layout, task, adapter.
        request: the policy, its starts and who judges them.

    Returns:
        ``rollouts`` (one entry each, with the paths), ``complete``, ``policy``, ``task``, ``judge``, the paths
        ``lerobot`` and ``json``, and ``against_sim`` (see `against_sim.compare`) where it was asked for.

    Raises:
        UsageError: a policy, task, judge or layout that means nothing, a skip that the layout is too short for.
        PersistWorldError: no server in time; nothing to judge by; no simulator; or policy or judge failed in
            mid-rollout, after what was rolled out has been saved (what is not whole marked ``"complete": false``).
    """
    store = open_store(settings)
    plan = make_plan(settings, request, store)
    court = _court(settings, request, plan)
    output = request.output
    gathered = _roll_all(settings, store, plan, court, output)
    result = _summary(settings, plan, court, gathered, output)
    write_json(output / "rollouts.json", result)
    if court.judge is not None:
        write_text(output / "rollouts.txt", plain(rollout_tables(result)))
        result["text"] = str(output / "rollouts.txt")
    error = gathered.error
    if error is not None:
        whole = all(entry["complete"] for entry in gathered.entries)
        state = "" if whole else " as far as they came (marked incomplete)"
        saved = f"{len(gathered.entries)} of {len(plan.starts)} rollouts saved{state} in {output}"
        raise PersistWorldError(f"{error.what}\n{saved}", where=error.where, fix=error.fix) from error
    return result


def _roll_all(settings: Settings, store: EpisodeStore, plan: Plan, court: Court, output: Path) -> Gathered:
    """All starts, batch by batch, each saved when it is done; an error after the first batch is kept, not raised."""
    batch = max(1, settings.eval.batch)
    model: WorldModel | None = None
    gathered = Gathered()
    with Meter("pi-rollout", plan.steps * -(-len(plan.starts) // batch)) as meter:
        for first in range(0, len(plan.starts), batch):
            starts = plan.starts[first : first + batch]
            try:
                # A connection is a new episode. It is opened before the weights are read: no server, no minutes lost.
                with open_policies(plan.policy, settings.policy, len(starts)) as policies:
                    if model is None:
                        store = _scaled(settings, store, plan)  # missing percentiles are told before the weights load
                        model = load_model(settings)
                    rollouts = _roll(model, store, settings, plan, starts, list(policies), meter)
            except PersistWorldError as failed:
                if not gathered.entries:
                    raise
                gathered.error = failed  # the server went between two batches
                break
            for rollout in rollouts:
                _settle(gathered, settings, plan, court, rollout, output)
            gathered.error = gathered.error or rollouts[0].error
            if gathered.error is not None:
                break
    return gathered


def _scaled(settings: Settings, store: EpisodeStore, plan: Plan) -> EpisodeStore:
    """The dataset with the weights' own percentiles, the plan's poses held against them."""
    first = plan.starts[0].split
    episodes = [start.item.episode for start in plan.starts if start.split == first]
    (scaled,) = weights_stores(settings, store, [inference_ref(settings.model).parts], split=first, episodes=episodes)
    return scaled


def _settle(gathered: Gathered, settings: Settings, plan: Plan, court: Court, rollout: Rollout, output: Path) -> None:
    """Judge a rollout, roll it out in the simulator if that is asked for, and save it, whatever fails on the way."""
    scene = court.scenes[len(gathered.rollouts)] if court.scenes else None
    verdict: Verdict | None = None
    beside: Simulated | None = None
    try:
        if court.judge is not None and rollout.error is None:
            evidence = rollout.evidence(settings.world.cameras, scene.objects if scene else None)
            verdict = ask_judge(court.judge, evidence, court.name)
            if court.simulate and scene is not None and gathered.error is None:
                asked = (plan.policy, plan.view, plan.steps, court.judge, court.name)
                beside = simulate(settings, rollout.start, scene, *asked)
    except PersistWorldError as failed:
        gathered.error = gathered.error or failed
    told: dict[str, Any] = {
        "policy": plan.policy,
        "task": plan.task.name,
        "judge": court.name or None,
        "steps_planned": plan.steps,
        "gripper_cap": plan.view.gripper_cap,
    }
    shown: dict[str, Any] = {}
    if beside is not None:
        told["sim"] = beside.entry()
        shown = {"sim_success": told["sim"]["success"], "sim_progress": told["sim"]["progress"]}
        gathered.simulated.append(beside)
    images = {"simulator": beside.rolled.rollout.frames} if beside is not None else None
    entry = save_rollout(output, settings, rollout, told, verdict, images)
    gathered.rollouts.append(rollout)
    gathered.verdicts.append(verdict)
    gathered.entries.append({**entry, **shown})


def _summary(settings: Settings, plan: Plan, court: Court, gathered: Gathered, output: Path) -> dict[str, Any]:
    """What is told of the whole run; writes the LeRobot dataset."""
    numbers = write_episodes(output / "lerobot", settings, gathered.rollouts)
    left_out = numbers.count(None)
    if left_out:
        logger.warning("not in the LeRobot dataset, since they broke off: %d of %d rollouts", left_out, len(numbers))
    entries = [{**entry, "lerobot": number} for entry, number in zip(gathered.entries, numbers, strict=True)]
    told = [verdict for verdict in gathered.verdicts if verdict is not None]
    result: dict[str, Any] = {
        "policy": plan.policy,
        "task": plan.task.name,
        "steps": plan.steps,
        "complete": gathered.error is None,
        "not_started": len(plan.starts) - len(entries),
        "absent_episodes": plan.absent,
        "judge": court.name or None,
    }
    if told:
        result["cannot_tell"] = sum(verdict.success is None for verdict in told)
    if gathered.simulated:
        pairs = zip(gathered.verdicts, gathered.entries, strict=True)
        result["against_sim"] = compare([v for v, entry in pairs if v and "sim_success" in entry], gathered.simulated)
    paths = {"lerobot": str(output / "lerobot") if left_out < len(numbers) else None}
    return {**result, "rollouts": entries, **paths, "json": str(output / "rollouts.json")}


def _court(settings: Settings, request: PolicyRolloutRequest, plan: Plan) -> Court:
    """Who judges, looked for before anything is computed. Raises UsageError and PersistWorldError."""
    against = request.against
    name = request.judge or (BUNDLED_JUDGE if against else "")
    if not name:
        return Court()
    judge = load_judge(name)
    scenes: list[RecordedStart | None] = []
    for start in plan.starts:
        try:
            scenes.append(find_recorded(settings, start))
        except PersistWorldError:
            if against or getattr(judge, "wants_objects", False):
                raise
            scenes.append(None)
    if against:
        check_simulator()
    return Court(name, judge, scenes, bool(against))


def make_plan(settings: Settings, request: PolicyRolloutRequest, store: EpisodeStore) -> Plan:
    """Settle everything that can be wrong before the model is read. Raises UsageError and PersistWorldError."""
    check_policy(request.policy)
    own = settings.policy
    task = load_task(own.task)
    layout = find_layout(own.layout)
    view = PolicyView(
        layout=layout,
        adapter=_adapter(own, store),
        skip=own.skip or task.skip,
        gripper_cap=own.gripper_cap or task.gripper_cap,
        cap_current=own.cap_current,
        camera=_camera(own.camera, "policy.camera", settings),
        wrist_camera=_camera(own.wrist_camera, "policy.wrist_camera", settings),
        resize=own.resize,
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
    starts, absent = _starts(settings, request, store, task)
    return Plan(request.policy, task, view, own.steps or task.steps, starts, absent)


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


def _starts(
    settings: Settings, request: PolicyRolloutRequest, store: EpisodeStore, task: Task
) -> tuple[list[Start], list[str]]:
    """The starts of a task in this dataset, and the task's episodes that the dataset lacks."""
    split = settings.eval.split
    wanted = [TaskStart(episode=name) for name in request.episodes] or list(task.starts)
    spread = [
        (entry, name) for entry in wanted for name in ([entry.episode] if entry.episode else store.episodes(split))
    ]
    absent = [name for _, name in spread if find_split(store, name, split) is None]
    if absent and request.episodes:
        raise PersistWorldError(f"no episode '{absent[0]}' in this dataset", where=str(store.root))
    found = [(entry, name) for entry, name in spread if name not in absent][: request.rollouts]
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
        frame = entry.start if request.start is None else request.start
        item = Item(name, frame, settings.policy.seed)
        start = make_start(store, item, split, request.instruction or entry.instruction)
        _ = start.joints  # told now, not after the weights are read
        starts.append(start)
    return starts, absent


def _roll(
    model: WorldModel,
    store: EpisodeStore,
    settings: Settings,
    plan: Plan,
    starts: list[Start],
    policies: list[ActingPolicy],
    meter: Meter,
) -> list[Rollout]:
    """One batch, as far as the policy answers."""
    world = InteractiveRollout(model, store, starts, settings, policy=True)
    joints = np.stack([start.joints for start in starts])
    controller = PolicyController(policies, plan.view, joints, [start.text for start in starts])
    frames, moves, error = [world.images[:, None]], [], None
    for policy in policies:
        policy.reset()
    for step in range(plan.steps):
        try:
            poses = controller.poses(step, world.poses, world.images)
        except PersistWorldError as failed:
            error = failed
            break
        moves.append(world.step(poses))
        frames.append(moves[-1].images)
        meter.advance(seconds_a_step=moves[-1].seconds)
    return [
        Rollout(
            start=start,
            frames=np.concatenate([part[row] for part in frames]),
            poses=np.array([moved.poses[row] for moved in moves]).reshape(-1, world.num_frames, 7),
            trace=controller.traces[row],
            joints_end=controller.joints[row],
            skip=plan.view.skip,
            seconds=[moved.seconds / len(starts) for moved in moves],
            error=error,
        )
        for row, start in enumerate(starts)
    ]
