"""`pi-rollout`: a policy acts in the world model, in closed loop (method.md section 6).

In each interaction, each rollout's policy gets the predicted frames, and its answer becomes the world model's next
poses. The output is a video and a JSON with Ctrl-World's keys per rollout, and a LeRobot dataset of the complete
rollouts. Optionally a judge decides success, and the simulator repeats the rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.loading import load_model
from persistworld_cli.checkpoints.references import inference_ref
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.keys import dimensions_of
from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import PolicySettings, Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.data.metadata.adapter_fit import ADAPTER_FILES
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import jsonable, remove, write_json, write_text
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.policies.action_spaces import (
    DEFAULT_ACTIONS,
    ActionSpace,
    JointPosition,
    JointVelocity,
    ModelActions,
    Pose,
)
from persistworld_cli.policies.bundled_world.compare import Simulated, compare
from persistworld_cli.policies.bundled_world.scene import RecordedStart, find_recorded
from persistworld_cli.policies.bundled_world.simulator import check_simulator, roll_in_simulator
from persistworld_cli.policies.controller import PolicyController
from persistworld_cli.policies.embedded import ROWS
from persistworld_cli.policies.judge import Judge, Verdict, ask_judge, load_judge
from persistworld_cli.policies.observation import Policy, PolicyView
from persistworld_cli.policies.outputs import POLICY_HZ, PolicyRollout, save_rollout, write_episodes
from persistworld_cli.policies.source import check_policy, open_policies
from persistworld_cli.policies.summary_file import SUMMARY_FILE, earlier_run
from persistworld_cli.policies.tasks import Task, TaskStart, load_task, stop_under
from persistworld_cli.reports.policy_tables import rollout_tables
from persistworld_cli.reports.progress import Meter
from persistworld_cli.reports.tables import plain
from persistworld_cli.robot.adapter import JointVelocityAdapter, load_adapter
from persistworld_cli.robot.kinematics import load_kinematics
from persistworld_cli.rollout.interactive import InteractiveRollout, find_split, make_start, require_dimensions
from persistworld_cli.rollout.recording import Item, Start

BUNDLED_JUDGE = "bundled-world"  # compares with the simulator unless another judge is named

logger = logging.getLogger(__name__)


class Stopped(PersistWorldError):
    """Ctrl-C or another signal during a rollout: what is there is saved before the command ends."""


@dataclass(frozen=True)
class PolicyRolloutPlan:
    """The planned rollouts, checked before the model is read."""

    policy: str
    task: Task
    view: PolicyView
    steps: int
    starts: list[Start]
    missing: list[str]  # the task's episodes that are not in this dataset
    gripper_stops: Mapping[str, float]  # the task's, or none where `policy.gripper_cap` or the arm replaces them

    def gripper_stop(self, instruction: str) -> float:
        """Where a closing gripper stops in the world model under an instruction."""
        return stop_under(instruction, self.gripper_stops)

    @property
    def rows(self) -> int:
        """Rows that an embedded policy answers with."""
        return max(ROWS, self.view.advance)


@dataclass(frozen=True)
class JudgeSetup:
    """The judge, and the known scene of each start; `simulate`: repeat every rollout in the simulator."""

    name: str = ""
    judge: Judge | None = None
    scenes: Sequence[RecordedStart | None] = ()
    simulate: bool = False

    def verdict(self, rollout: PolicyRollout, scene: RecordedStart | None, cameras: Sequence[str]) -> Verdict | None:
        """None without a judge. Raises PersistWorldError: the judge failed."""
        if self.judge is None:
            return None
        return ask_judge(self.judge, rollout.evidence(cameras, scene.objects if scene else None), self.name)


@dataclass
class RolloutResults:
    """Collects rollouts, each with its verdict, its counterpart in the simulator, and its entry in the summary.

    `earlier`: what the folder holds of an earlier run (`earlier_run`).
    """

    settings: Settings
    plan: PolicyRolloutPlan
    judging: JudgeSetup
    output: Path
    earlier: tuple[str, list[Path]] = ("", [])
    rollouts: list[PolicyRollout] = field(default_factory=list)
    verdicts: list[Verdict | None] = field(default_factory=list)
    simulated: list[Simulated | None] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    error: PersistWorldError | None = None

    def record_rollout(self, rollout: PolicyRollout) -> None:
        """Judge a rollout, repeat it in the simulator if requested, and save it; a failure is kept in `error`."""
        plan, judging = self.plan, self.judging
        scene = judging.scenes[len(self.rollouts)] if judging.scenes else None
        verdict: Verdict | None = None
        simulated: Simulated | None = None
        try:
            if rollout.error is None:
                verdict = judging.verdict(rollout, scene, self.settings.world.cameras)
            if verdict is not None and judging.simulate and scene is not None and self.error is None:
                simulated = self._simulate(rollout.start, scene)
        except PersistWorldError as failed:
            self.error = self.error or failed
        if not self.entries:
            self._replace_earlier()
        extra: dict[str, Any] = {
            "policy": plan.policy,
            "task": plan.task.name,
            "actions": self.settings.policy.actions,
            "judge": judging.name or None,
            "steps_planned": plan.steps,
            "gripper_cap": plan.view.space.gripper_cap,
            "gripper_stop": plan.gripper_stop(rollout.start.text),
        }
        shown, images = {}, None
        if simulated is not None:
            extra["sim"], images = simulated.entry(), {"simulator": simulated.rolled.rollout.frames}
            shown = {"sim_success": extra["sim"]["success"], "sim_progress": extra["sim"]["progress"]}
        entry = save_rollout(self.output, self.settings, rollout, extra, verdict, images)
        self.rollouts.append(rollout)
        self.verdicts.append(verdict)
        self.simulated.append(simulated)
        self.entries.append({**entry, **shown})
        self.error = self.error or rollout.error

    def _replace_earlier(self) -> None:
        """Remove what an earlier run left here, with a note: its rollouts must not be taken for this run's."""
        found, files = self.earlier
        if found:
            logger.info("replacing %s in this folder", found)
        for file in files:
            remove(file)

    def _simulate(self, start: Start, scene: RecordedStart) -> Simulated | None:
        """The same rollout in the simulator, judged from the simulated images."""
        plan, settings = self.plan, self.settings
        with open_policies(plan.policy, settings.policy, 1, plan.rows) as (policy,):
            rolled = roll_in_simulator(settings, start, scene, policy, plan.view, plan.steps)
        verdict = self.judging.verdict(rolled.rollout, scene, settings.world.cameras)
        return Simulated(rolled, verdict) if verdict else None

    def summary(self) -> dict[str, Any]:
        """Write the LeRobot dataset; returns the summary of the run, the content of `SUMMARY_FILE`."""
        plan, folder = self.plan, self.output / "lerobot"
        numbers = write_episodes(folder, self.settings, self.rollouts)
        left_out = numbers.count(None)
        if left_out:
            logger.warning("%d of %d rollouts are incomplete and not in the LeRobot dataset", left_out, len(numbers))
        result: dict[str, Any] = {
            "policy": plan.policy,
            "task": plan.task.name,
            "actions": self.settings.policy.actions,
            "steps": plan.steps,
            "gripper": {"cap": plan.view.space.gripper_cap, "stops": dict(plan.gripper_stops)},
            "arm": _arm(self.settings, plan.view.skip),
            "weights": _weights(self.settings),
            "sampling": jsonable(self.settings.sampling),
            "complete": self.error is None,
            "not_started": len(plan.starts) - len(self.entries),
            "missing_episodes": plan.missing,
            "judge": self.judging.name or None,
        }
        judged = [verdict for verdict in self.verdicts if verdict is not None]
        if judged:
            result["undecided"] = sum(verdict.success is None for verdict in judged)
        both = [(v, s) for v, s in zip(self.verdicts, self.simulated, strict=True) if v is not None and s is not None]
        if both:
            result["against_sim"] = compare([v for v, _ in both], [s for _, s in both])
        result["rollouts"] = [{**entry, "lerobot": one} for entry, one in zip(self.entries, numbers, strict=True)]
        result["lerobot"] = str(folder) if left_out < len(numbers) else None
        return {**result, "json": str(self.output / SUMMARY_FILE)}


def _arm(settings: Settings, skip: int) -> dict[str, Any]:
    """How answers move the arm, and what the policy sees of it."""
    own = jsonable(settings.policy)
    names = ("rate_hz", "cap_current", "joint_limits", "joint_velocity_adapter", "gain", "position_gain")
    return {"skip": skip} | {name: own[name] for name in (*names, "images", "resize", "image_size")}


def _weights(settings: Settings) -> dict[str, str]:
    """SHA-256 of the world model's files."""
    return inference_ref(settings.model).fingerprint()


def run(settings: Settings, request: PolicyRolloutRequest) -> dict[str, Any]:
    """Roll out a policy and write the results.

    Args:
        settings: resolved settings; `policy` has server, actions, task, joint-velocity adapter.
        request: the policy, its starts and its judge.

    Returns:
        `RolloutResults.summary`, and ``text`` (path).

    Raises:
        UsageError: an unknown policy, task or judge, or a policy without this action space.
        PersistWorldError: no server in time; no data to judge by; no simulator; an earlier run's summary is damaged;
            or a policy or judge failed. In the last case the rollouts are saved first (incomplete ones marked
            ``"complete": false``).
        KeyboardInterrupt: on a signal, after the rollouts were saved in the same way.
    """
    store = open_store(settings)
    plan = make_plan(settings, request, store)
    earlier = earlier_run(request.output)  # before anything is rolled out, since it may be damaged
    results = RolloutResults(settings, plan, _judge_setup(settings, request, plan), request.output, earlier)
    try:
        _roll_all(results, store)
    except KeyboardInterrupt:
        if not results.entries:
            raise
        results.error = Stopped("interrupted")  # between rollouts
    output, summary = results.output, results.summary()
    write_json(output / SUMMARY_FILE, summary)
    write_text(output / "rollouts.txt", plain(*rollout_tables(summary)))
    summary["text"] = str(output / "rollouts.txt")
    if isinstance(results.error, Stopped):
        raise KeyboardInterrupt
    if (error := results.error) is not None:
        whole = all(entry["complete"] for entry in results.entries)
        state = "" if whole else " up to the error (marked incomplete)"
        saved = f"{len(results.entries)} of {len(plan.starts)} rollouts saved{state} in {output}"
        raise PersistWorldError(f"{error.what}\n{saved}", where=error.where, fix=error.fix) from error
    return summary


def _roll_all(results: RolloutResults, store: EpisodeStore) -> None:
    """All starts, batch by batch, each saved when it is done; an error after the first batch is kept, not raised."""
    settings, plan = results.settings, results.plan
    batch = max(1, settings.eval.batch)
    model: WorldModel | None = None
    with Meter("pi-rollout", plan.steps * -(-len(plan.starts) // batch)) as meter:
        for first in range(0, len(plan.starts), batch):
            starts = plan.starts[first : first + batch]
            try:
                # A connection is a new episode: connect before the weights are read, to report a missing server early.
                with open_policies(plan.policy, settings.policy, len(starts), plan.rows) as policies:
                    if model is None:
                        store = _scaled(settings, store, plan)  # before the weights are read, since it may refuse
                        model = load_model(settings)
                    world = InteractiveRollout(model, store, starts, settings, policy=True)
                    rollouts = _roll(world, plan, starts, policies, meter)
            except PersistWorldError as failed:
                if not results.entries:
                    raise
                results.error = failed  # the server stopped between two batches
                break
            for rollout in rollouts:
                results.record_rollout(rollout)
            if results.error is not None:
                break


def _roll(
    world: InteractiveRollout, plan: PolicyRolloutPlan, starts: list[Start], policies: Sequence[Policy], meter: Meter
) -> list[PolicyRollout]:
    """Roll out one batch, to the end or to a policy's error."""
    states = [plan.view.space.begin(start) for start in starts]
    texts = [start.text for start in starts]
    controller = PolicyController(policies, plan.view, states, texts, [plan.gripper_stop(text) for text in texts])
    frames, steps = [world.images[:, None]], []
    error: PersistWorldError | None = None
    for policy in dict.fromkeys(policies):  # a batched one is there for every rollout
        policy.reset()
    for _ in range(plan.steps):
        try:
            step = world.step(controller.poses(world.images))
        except PersistWorldError as failed:
            error = failed
            break
        except KeyboardInterrupt:
            error = Stopped("interrupted")
            break
        steps.append(step)
        frames.append(step.images)
        meter.advance(seconds_per_step=step.seconds)
    controller.keep(len(steps))
    return [
        PolicyRollout(
            start=start,
            frames=np.concatenate([part[row] for part in frames]),
            poses=np.array([step.poses[row] for step in steps]).reshape(-1, world.num_frames, world.poses.shape[1]),
            trace=controller.traces[row],
            joints_end=controller.states[row].joints,
            skip=plan.view.skip,
            rate_hz=plan.view.rate_hz,
            seconds=[step.seconds / len(starts) for step in steps],
            error=error,
        )
        for row, start in enumerate(starts)
    ]


def _scaled(settings: Settings, store: EpisodeStore, plan: PolicyRolloutPlan) -> EpisodeStore:
    """The dataset with the weights' percentiles; checks the plan's poses against them."""
    first = plan.starts[0].split
    episodes = [start.item.episode for start in plan.starts if start.split == first]
    (scaled,) = weights_stores(settings, store, [inference_ref(settings.model).parts], split=first, episodes=episodes)
    return scaled


def _judge_setup(settings: Settings, request: PolicyRolloutRequest, plan: PolicyRolloutPlan) -> JudgeSetup:
    """The judge, checked before anything is computed. Raises UsageError and PersistWorldError."""
    against = request.against
    name = request.judge or (BUNDLED_JUDGE if against else "")
    if not name:
        return JudgeSetup()
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
        if settings.policy.rate_hz != POLICY_HZ:
            fix = f"leave policy.rate_hz at {POLICY_HZ:g}"
            raise UsageError(f"the simulator runs at {POLICY_HZ:g} Hz", where="policy.rate_hz", fix=fix)
        if settings.policy.actions == "model":
            fix = "take a policy that answers joint velocities, joint positions or poses"
            raise UsageError("the simulator cannot follow --actions model", where="--against sim", fix=fix)
        check_simulator()
    return JudgeSetup(name, judge, scenes, bool(against))


def make_plan(settings: Settings, request: PolicyRolloutRequest, store: EpisodeStore) -> PolicyRolloutPlan:
    """Check everything that can be wrong before the model is read. Raises UsageError and PersistWorldError."""
    own = settings.policy
    check_policy(request.policy, own.actions)
    task = load_task(own.task)
    starts, missing = _starts(settings, request, store, task)
    for start in starts:
        require_dimensions(settings, start)
    view = PolicyView(
        space=_action_space(settings, store, own.gripper_cap or task.gripper_cap),
        skip=own.skip or task.skip,
        images={key: _camera(name, key, settings) for key, name in own.images.items()},
        resize=own.resize,
        image_size=own.image_size,
        rows=settings.model.num_frames,
        rate_hz=own.rate_hz,
    )
    _check_rate(settings, view)
    for start in starts:
        view.space.begin(start)  # before the weights are read
    stops: Mapping[str, float] = {} if own.gripper_cap or view.space.gripper_cap is None else task.gripper_stops
    for beginning, position in stops.items():
        said = "task '%s': in the world model the gripper stops at %g where an instruction begins with '%s'"
        logger.info(said, task.name, position, beginning)
    return PolicyRolloutPlan(request.policy, task, view, own.steps or task.steps, starts, missing, stops)


def _action_space(settings: Settings, store: EpisodeStore, gripper_cap: float) -> ActionSpace:
    """The policy's action space."""
    own = settings.policy
    if own.actions == "model":
        return ModelActions(settings)
    arm = load_kinematics(settings)
    body = gripper_cap, own.cap_current, own.joint_limits == "stop", arm, dimensions_of(settings)
    if own.actions == DEFAULT_ACTIONS:
        return JointVelocity(_adapter(own, store, len(arm.joint_low)), *body)
    kind = Pose if own.actions == "pose" else JointPosition
    return kind(own.position_gain, *body)


def _adapter(settings: PolicySettings, store: EpisodeStore, joints: int) -> JointVelocityAdapter:
    """The joint-velocity adapter that the settings name."""
    kind = settings.joint_velocity_adapter
    path = kind if kind in ("gain", "meta") else str(resolve_path(kind))
    fitted = next((file for file in (store.meta / name for name in ADAPTER_FILES) if file.exists()), None)
    return load_adapter(path, settings.gain, fitted, joints)


def _camera(name: str, key: str, settings: Settings) -> int:
    """The index of a camera, checked. Raises UsageError."""
    cameras = settings.world.cameras
    if name not in cameras:
        what = f"policy.images: no camera '{name}', which '{key}' shows"
        fix = f'world.cameras has {", ".join(cameras)}: images = {{ "{key}" = "{cameras[0]}" }}'
        raise UsageError(what, where="policy.images", fix=fix)
    return cameras.index(name)


def _check_rate(settings: Settings, view: PolicyView) -> None:
    """Refuse frames of another rate than the world's. Ctrl-World's tasks have such frames, a Franka may."""
    rate, world = view.rate_hz / view.skip, settings.world.rate_hz
    if settings.robot.dimensions and abs(rate - world) > 0.01 * world:
        raise UsageError(
            f"every {view.skip}. row of {view.rate_hz:g} per second makes {rate:g} frames per second; "
            f"the world has {world:g}",
            where="policy.rate_hz, policy.skip",
            fix=f"rows as far apart as frames: --set policy.rate_hz={world:g} --set policy.skip=1",
        )


def _starts(
    settings: Settings, request: PolicyRolloutRequest, store: EpisodeStore, task: Task
) -> tuple[list[Start], list[str]]:
    """The starts of a task in this dataset, and the task's episodes that are missing."""
    split = settings.eval.split
    wanted = [TaskStart(episode=name) for name in request.episodes] or list(task.starts)
    spread = [
        replace(entry, episode=name)
        for entry in wanted
        for name in ([entry.episode] if entry.episode else store.episodes(split))
    ]
    absent = [entry.episode for entry in spread if find_split(store, entry.episode, split) is None]
    missing = [] if request.episodes else absent  # `make_start` refuses a requested one
    found = [entry for entry in spread if entry.episode not in missing][: request.rollouts]
    if not found:
        raise PersistWorldError(
            f"no episode of task '{task.name}' is in this dataset ({', '.join(missing) or f'split {split} is empty'})",
            where=str(store.root),
            fix="name the task's dataset (--dataset), another --task, or --episode",
        )
    if missing:
        logger.warning("task '%s': episodes %s are not in this dataset", task.name, ", ".join(missing))
    starts = []
    for entry in found:
        frame = entry.start if request.start is None else request.start
        item = Item(entry.episode, frame, settings.policy.seed)
        starts.append(make_start(store, item, split, request.instruction or entry.instruction))
    for other in dict.fromkeys(start.split for start in starts if start.split != split):
        names = ", ".join(dict.fromkeys(start.item.episode for start in starts if start.split == other))
        said = "of split '%s', not '%s', so the world model may have learned it by heart: episode %s"
        logger.warning(said, other, split, names)
    return starts, missing
