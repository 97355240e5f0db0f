"""What a policy sees and answers, the embedded policies, what a chunk means for the arm, and the tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_files import GoldenFiles
from golden_table import close
from policy_views import IMAGES, IMAGES_SHOWN, REST, VIEW, observation
from safetensors.numpy import load_file

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import RobotSettings, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.action_spaces import (
    ACTION_SPACES,
    CARTESIAN,
    ActionSpace,
    JointPosition,
    JointVelocity,
    ModelActions,
    Pose,
    at_joints,
)
from persistworld_cli.policies.controller import PolicyController
from persistworld_cli.policies.embedded import POLICIES, make_policy
from persistworld_cli.policies.observation import PolicyView, build_observation, check_actions, resize_with_pad
from persistworld_cli.policies.tasks import load_task, task_names
from persistworld_cli.robot.adapter import GainAdapter
from persistworld_cli.robot.kinematics import PANDA, forward

# -- observation and answer -------------------------------------------------------------------------------------------


def test_images_keep_their_aspect_and_are_padded() -> None:
    out = resize_with_pad(np.full((192, 320, 3), 200, np.uint8), 224)
    assert out.shape == (224, 224, 3)
    assert out.dtype == np.uint8
    assert (out[45:179] == 200).all()
    assert out[:45].max() == out[179:].max() == 0
    assert resize_with_pad(np.full((8, 4, 3), 9, np.uint8), 8)[:, 2:6].min() == 9
    droid = resize_with_pad(np.full((192, 320, 3), 200, np.uint8), 224, (180, 320))  # 180x320 is 126x224
    assert (droid[49:175] == 200).all() and droid[:49].max() == droid[175:].max() == 0


def test_observation_has_the_described_fields() -> None:
    obs = build_observation(replace(VIEW, image_size=224), np.zeros((3, 192, 320, 3), np.uint8), at_joints(REST), "go")
    shapes = {key: np.shape(value) for key, value in obs.items()}
    assert shapes == {
        "observation/exterior_image_1_left": (224, 224, 3),
        "observation/wrist_image_left": (224, 224, 3),
        "observation/joint_position": (7,),
        "observation/gripper_position": (1,),
        "prompt": (),
    }


def test_wrong_answers_name_the_field() -> None:
    good = np.zeros((15, 8), np.float32)
    assert check_actions({"actions": good}, VIEW, "p").dtype == np.float64
    bad = good.copy()
    bad[3, 2] = np.nan
    for answer, text in (
        ([1], "not a map"),
        ({"action": good}, "no field 'actions' .it has: action."),
        ({"actions": [["a"] * 8] * 15}, "not numbers"),
        ({"actions": good[:, :7]}, r"(?s)shape \(15, 7\), not rows of 8 numbers.*another --actions \(pose\)"),
        ({"actions": good[:7]}, r"(?s)7 rows, but an interaction takes 8 .frames: 4, skip: 2.* answer 8 rows .*skip=1"),
        ({"actions": good[:3]}, r"(?s)3 rows, .* answer 8 rows or more \(openpi: model.action_horizon\)$"),
        ({"actions": bad}, r"nan at \[3, 2\] .velocity of joint 3 in row 3."),
    ):
        with pytest.raises(PersistWorldError, match=text):
            check_actions(answer, VIEW, "p")
    arm = replace(VIEW, space=ModelActions(load_settings("one-camera", env={})))  # whose kinematics are not known
    with pytest.raises(PersistWorldError) as failed:
        check_actions({"actions": good}, arm, "p")
    assert failed.value.fix == "answer with rows of 6 numbers (base, ..., tool)"


# -- policies ---------------------------------------------------------------------------------------------------------


def act(policy: Any, joints: np.ndarray, rows: int = 12, held: float = 1.0) -> np.ndarray:
    """The joints after the first rows of an answer, as the gain adapter moves them; the gripper stops at `held`."""
    actions = check_actions(policy.infer(observation(joints)), VIEW, "p")
    arm = GainAdapter()(actions[:, :7], joints[:7])[rows - 1]
    return np.append(arm, np.clip(actions[rows - 1, 7], 0, held))


def pads(joints: np.ndarray) -> np.ndarray:
    frame = forward(joints[:7])
    return frame[:3, 3] + 0.15 * frame[:3, 2]


@pytest.mark.parametrize("held", [1.0, 0.2])
def test_scripted_policy_reaches_closes_and_lifts(held: float) -> None:
    policy = make_policy("scripted")
    path, low = [REST], []
    for _ in range(6):
        rows = [act(policy, path[-1], number, held) for number in range(1, 13)]
        low += [pads(joints)[2] for joints in rows if 0 < joints[7] < min(held, policy.closed)]
        path.append(rows[-1])
    assert max(low, default=0.0) < 0.05  # it stays down while the gripper closes
    assert min(pads(joints)[2] for joints in path) < 0.1 < pads(path[0])[2]
    assert path[-1][7] == held
    assert np.abs(pads(path[-1]) - [0.51, 0.0, 0.17]).max() < 0.01
    again = act(make_policy("scripted"), path[2], held=held)  # it follows from the joints alone
    assert np.array_equal(again, path[3])


def test_scripted_policy_rises_before_it_crosses_the_table() -> None:
    policy = make_policy("scripted")
    low = min((act(policy, act(policy, REST), rows) for rows in range(1, 13)), key=lambda joints: pads(joints)[2])
    assert pads(low)[2] < 0.06
    low[0] += 0.5  # beside the spot, at its height, the gripper open
    low[7] = 0.0
    actions = check_actions(policy.infer(observation(low)), VIEW, "p")
    first = pads(np.append(low[:7] + 0.054 * actions[0, :7], 0)) - pads(low)
    assert first[2] > 0.5 * np.linalg.norm(first)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_answers_any_number_of_rows(name: str) -> None:
    for rows in (10, 16):
        actions = check_actions(make_policy(name, rows=rows, seed=3).infer(observation()), VIEW, name)
        assert actions.shape == (rows, 8) and np.abs(actions[:, :7]).max() <= 1.0
    with pytest.raises(PersistWorldError, match="observation/joint_position"):
        make_policy(name).infer({"prompt": "x"})


def test_random_policy_depends_on_seed_call_and_episode_only() -> None:
    def draw(seed: int, calls: int, prompt: str = "a") -> np.ndarray:
        policy = make_policy("random", seed=seed)
        return [policy.infer(observation(prompt=prompt))["actions"] for _ in range(calls)][-1]

    assert np.array_equal(draw(1, 2), draw(1, 2))
    others = (draw(2, 2), draw(1, 1), draw(1, 2, "b"))
    assert not any(np.array_equal(draw(1, 2), other) for other in others)
    assert np.array_equal(make_policy("hold").infer(observation())["actions"], np.zeros((15, 8)))


# -- what a chunk means -----------------------------------------------------------------------------------------------


def reference_rollout(golden: GoldenFiles, tag: str) -> dict[str, np.ndarray]:
    """The reference's own rollout of a policy: chunks, joints and poses of four interactions."""
    data = load_file(golden / "rollouts.safetensors")
    return {k.removeprefix(f"pi.{tag}."): v for k, v in data.items() if k.startswith(f"pi.{tag}.")}


class RecordedAdapter:
    """Answers as the reference's adapter did to the same input; its weights are too large to ship."""

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        self._data = data

    def __call__(self, velocities: np.ndarray, joints: np.ndarray) -> np.ndarray:
        given = np.abs(self._data["chunk"][:, :, :7] - velocities).max(axis=(1, 2))
        assert given.min() < 1e-6 and np.abs(self._data["joint_in"][given.argmin(), :7] - joints).max() < 1e-5
        return self._data["adapter_joints"][given.argmin()]


@pytest.mark.parametrize(("tag", "skip"), [("skip2", 2), ("skip3", 3)])
def test_chunks_become_poses_as_in_the_reference(golden: GoldenFiles, tag: str, skip: int) -> None:
    data = reference_rollout(golden, tag)
    view = PolicyView(space=JointVelocity(RecordedAdapter(data), 0.75), skip=skip)
    taken = slice(0, view.advance + 1, skip)
    for i, (actions, joints) in enumerate(zip(data["chunk"], data["joint_in"], strict=True)):
        motion = view.space.follow(actions, at_joints(joints), view.advance)
        arm, states = motion.joints[:-1], motion.pose[:-1]
        close(f"I policy {tag}, joints", arm[:, :7], data["fk_joints"][i], 1e-6)
        close(f"I policy {tag}, states", states, data["fk_states"][i], 1e-6)
        close(f"I policy {tag}, poses of a chunk", states[taken], data["poses_taken"][i], 1e-6)
        close(f"I policy {tag}, joints of a chunk", arm[taken], data["joints_taken"][i], 1e-6)


def test_policy_controller_follows_the_reference_through_a_rollout(golden: GoldenFiles) -> None:
    tag, skip = "skip3", 3
    data = reference_rollout(golden, tag)

    class Recorded:
        def __init__(self) -> None:
            self.asked: list[dict[str, Any]] = []

        def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(obs)
            return {"actions": data["chunk"][len(self.asked) - 1]}

        def reset(self) -> None: ...

        def close(self) -> None: ...

    view = PolicyView(space=JointVelocity(RecordedAdapter(data), 0.75), skip=skip, images=IMAGES_SHOWN)
    policies = [Recorded(), Recorded()]
    controller = PolicyController(policies, view, [at_joints(data["joint_in"][0])] * 2, ["a", "b"])
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    images[:, 1], images[:, 2] = 10, 20
    for i in range(4):
        poses = controller.poses(images)
        assert np.abs(poses - data["poses_taken"][i]).max() < 1e-5
    assert np.abs(policies[1].asked[3]["observation/joint_position"] - data["joint_in"][3, :7]).max() < 1e-5
    assert policies[1].asked[0]["prompt"] == "b"
    assert policies[0].asked[0]["observation/exterior_image_1_left"].max() == 10
    assert policies[0].asked[0]["observation/wrist_image_left"].max() == 20
    trace = controller.traces[0]
    for name in ("joint_pos", "joint_vel", "state_fk"):
        expected = data[f"info_{name}"].reshape(-1, 7)
        close(f"I policy {tag}, saved {name}", np.asarray(getattr(trace, name)), expected, 1e-5)


def test_the_gripper_of_now_is_capped_only_where_asked() -> None:
    now = np.append(REST[:7], 0.9)
    actions = np.ones((15, 8)) * [0, 0, 0, 0, 0, 0, 0, 1.5]
    states = JointVelocity(GainAdapter(), 0.75).follow(actions, at_joints(now), 8).pose
    assert np.allclose(states[:9:2, 6], [0.9, 0.75, 0.75, 0.75, 0.75])
    capped = JointVelocity(GainAdapter(), 0.75, cap_current=True).follow(actions, at_joints(now), 8).pose
    assert np.allclose(capped[:9:2, 6], 0.75)


def test_a_closing_gripper_stops_at_what_it_holds_and_one_closed_further_stays_so_until_it_opens() -> None:
    def follow(now: float, *commands: float) -> list[float]:
        rows = np.array([[0, 0, 0, 0, 0, 0, 0, one] for one in commands], dtype=float)
        state = at_joints(np.append(REST[:7], now))
        return JointVelocity(GainAdapter()).follow(rows, state, len(rows), 0.25).pose[1:, 6].round(6).tolist()

    assert follow(0.0, 0.1, 0.2, 0.6, 1.0) == [0.1, 0.2, 0.25, 0.25]
    assert follow(0.9, 0.9, 1.0, 0.5, 0.9, 0.0, 1.0) == [0.9, 0.9, 0.5, 0.5, 0.0, 0.25]


# -- action spaces ----------------------------------------------------------------------------------------------------

MOVED = REST + np.append(np.linspace(-0.1, 0.1, 7), 0.5)
HELD = {"joint-velocity": np.append(np.zeros(7), 0.5), "joint-position": MOVED, "pose": at_joints(MOVED).pose}


def space(name: str, gain: float = 1.0) -> ActionSpace:
    return {
        "joint-velocity": JointVelocity(GainAdapter()),
        "joint-position": JointPosition(gain),
        "pose": Pose(gain),
        "model": ModelActions(replace(Settings(), robot=RobotSettings(limits={"gripper": (0.0, 0.6)}))),
    }[name]


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_each_action_space_moves_the_arm_where_the_policy_says(name: str) -> None:
    """The same motion in each action space: one that starts at REST and ends at MOVED."""
    path = np.linspace(REST, MOVED, 17)[1:]
    steps = np.diff(path, axis=0, prepend=REST[None])
    rows = {
        "joint-velocity": np.concatenate([steps[:, :7] / 0.054, path[:, 7:]], axis=1),
        "joint-position": path,
        "pose": np.array([at_joints(row).pose for row in path]),
    }
    rows["model"] = rows["pose"]
    view = replace(VIEW, space=space(name), skip=3)
    start = at_joints(REST)
    now = start if name != "model" else replace(start, joints=np.empty(0))

    class Served:
        def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
            self.seen = obs
            return {"actions": rows[name].astype(np.float32)}  # 16 rows, as openpi's pi05_droid_finetune

        def reset(self) -> None: ...

    policy = Served()
    controller = PolicyController([policy], view, [now], ["go"])
    poses = controller.poses(IMAGES[None])[0]
    assert np.allclose(poses, [at_joints(row).pose for row in (REST, *path[2:12:3])], atol=2e-5)
    assert np.allclose(controller.states[0].pose, at_joints(path[11]).pose, atol=2e-5)
    assert np.allclose(controller.traces[0].answers, rows[name][:12], atol=1e-6)
    assert bool(controller.traces[0].joint_vel) == (name == "joint-velocity")
    seen = {key: value for key, value in policy.seen.items() if "image" not in key and key != "prompt"}
    if name == "model":
        assert list(seen) == ["observation/state"] and np.allclose(seen["observation/state"], start.pose)
    else:
        assert np.allclose(seen["observation/joint_position"], REST[:7])
        assert (CARTESIAN in seen) == (name == "pose")
    held = make_policy("hold", name).infer(build_observation(view, IMAGES, controller.states[0], "go"))
    after = view.space.follow(check_actions(held, view, "hold"), controller.states[0], 12)
    assert np.allclose(after.pose, after.pose[0], atol=1e-5)


@pytest.mark.parametrize("name", ["joint-position", "pose"])
def test_the_arm_lags_behind_commanded_positions(name: str) -> None:
    """As in DROID: it covers a share of the way in each row."""
    goal = MOVED if name == "joint-position" else at_joints(MOVED).pose
    moved = space(name, 0.27).follow(np.tile(goal, (3, 1)), at_joints(REST), 3).joints
    assert np.allclose(moved[:, :7], MOVED[:7] - 0.73 ** np.arange(4)[:, None] * (MOVED - REST)[:7], atol=2e-2)
    assert np.allclose(moved[:, 7], [0.0, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "columns", "gain", "bound"),
    [
        ("joint-velocity", "joint_velocity", 1.0, 26),
        ("joint-position", "joint_position", 0.27, 10),
        ("joint-position", "joint_position", 1.0, 23),
        ("pose", "cartesian_position", 0.27, 13),
    ],
)
def test_each_action_space_follows_the_commands_of_real_episodes(
    shared_data: Path, name: str, columns: str, gain: float, bound: float
) -> None:
    """DROID's recorded commands bring the flange near to where it was recorded: mean distance in mm over 12 rows."""
    errors = []
    for path in sorted((shared_data / "droid_subset" / "annotation").glob("*/*.json")):
        note = {key: np.array(value) for key, value in json.loads(path.read_text()).items() if "." in key}
        state, action = (
            [note[f"{side}.{key}"].reshape(len(note["action.joint_velocity"]), -1) for key in (one, "gripper_position")]
            for side, one in (("observation.state", "joint_position"), ("action", columns))
        )
        joints, commands = np.concatenate(state, axis=1), np.concatenate(action, axis=1)
        for row in range(0, len(joints) - 13, 24):
            moved = space(name, gain).follow(commands[row : row + 12], at_joints(joints[row]), 12).pose
            there = note["observation.state.cartesian_position"][row : row + 13]
            errors.append(np.linalg.norm(moved[1:, :3] - there[1:, :3], axis=1).mean() * 1e3)
    assert 0.8 * bound < np.mean(errors) < bound


def test_another_action_space_than_the_policys_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """Joint positions read as velocities, velocities as positions, and a pose out of reach."""
    now, velocity = at_joints(REST), np.append(np.full(7, -0.3), 0.0)
    with pytest.raises(PersistWorldError, match=r"reaches -3.1\d* rad at joint 4, .* -3.0718 and -0.0698") as refused:
        space("joint-velocity").follow(np.tile(REST, (15, 1)), now, 12)
    assert "--actions joint-position" in str(refused.value)
    assert "velocity of joint 4 in row 0 of the policy's answer is -2.25, outside DROID's -1 to 1" in caplog.text
    with pytest.raises(PersistWorldError, match=r"commands -0\.3 rad at joint 6") as refused:
        space("joint-position").follow(velocity[None], now, 1)
    assert "row 0" in str(refused.value) and "--actions joint-velocity" in str(refused.value)
    assert "position of joint 3 in row 0 of the policy's answer is -0.3, over 0.5 rad from" in caplog.text
    with pytest.raises(PersistWorldError, match=r"cannot reach pose \(0.300, 0.000, 2.000"):
        space("pose").follow(np.array([[0.3, 0, 2, 3.1, 0, 0, 0]]), now, 1)
    with pytest.raises(PersistWorldError, match=r"gripper = 0\.9, limited to 0 to 0\.6"):
        space("model").follow(np.full((1, 7), 0.9), now, 1)
    caplog.clear()
    kept = space("joint-velocity")
    for _ in range(2):  # a run is warned once; unused rows are not checked
        kept.follow(np.concatenate([np.tile(velocity * 5, (1, 1)), np.tile(REST, (11, 1)) * 9]), now, 1)
    assert len(caplog.records) == 1
    caplog.clear()
    for grip in (-0.05, 1.05):  # a network's last digits
        kept.follow(np.append(np.zeros(7), grip)[None], now, 1)
    assert not caplog.records
    for grip in (85.0, -1.0):
        kept.follow(np.append(np.zeros(7), grip)[None], now, 1)
    assert (
        len(caplog.records) == 1 and "gripper position in row 0 of the policy's answer is 85, and is cut" in caplog.text
    )
    push = np.tile(np.append(np.ones(7), 0), (99, 1))  # a wrong policy, not another action space
    with pytest.raises(PersistWorldError, match=r"policy\.joint_limits=stop"):
        space("joint-velocity").follow(push, now, 99)
    assert np.allclose(JointVelocity(GainAdapter(), stop=True).follow(push, now, 99).joints[99, :7], PANDA.joint_high)


def test_random_and_scripted_policies_keep_away_from_the_joints_limits() -> None:
    for name in ("random", "scripted"):
        policy, now, kept = make_policy(name), at_joints(REST), space("joint-velocity")
        for _ in range(40):
            now = kept.follow(check_actions(policy.infer(observation(now.joints)), VIEW, name), now, 15)[15]


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_the_six_tasks_and_those_of_whole_datasets_are_there() -> None:
    caps = {
        "pickplace": 0.75,
        "towel_fold": 0.95,
        "wipe_table": 0.95,
        "tissue": 0.97,
        "close_laptop": 0.95,
        "stack": 0.75,
    }
    assert set(task_names()) == {*caps, "bundled", "episodes"}
    assert not any(load_task(name).gripper_stops for name in {*task_names()} - {"bundled"})
    for name, cap in caps.items():
        task = load_task(name)
        assert task.gripper_cap == cap
        assert task.skip == (3 if name in ("tissue", "close_laptop") else 2)
        assert all(start.episode and start.instruction for start in task.starts)
    assert load_task("bundled").starts[0].episode == ""


def test_task_files_are_checked(tmp_path: Path, shared_data: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('skip = 1\n[[starts]]\nepisode = "7"\n')
    assert load_task(str(own)).starts[0].episode == "7"
    for text, message in (
        ("skips = 1", "skips.*\n.*\n.*skip"),
        ("skip = 1.5", "expected a whole number"),
        ("skip = 0", "must be at least 1"),
        ("gripper_cap = 1.5", "must be more than 0 and at most 1"),
        ("gripper_stops = { put = 1.5 }", "must be more than 0 and at most 1"),
        ('gripper_stops = { "" = 0.5 }', "an empty beginning"),
        ("[[starts]]\nstart = -1", "must be at least 0"),
        ("starts = 3", "tables"),
        ("skip =", "not TOML"),
    ):
        own.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_task(str(own))
    with pytest.raises(UsageError, match="stack"):
        load_task("stacks")
    annotations = shared_data / "droid_new_setup" / "annotation" / "val"
    texts = {"wipe_table": "0006", "tissue": "0008", "close_laptop": "0011"}
    for name, episode in texts.items():
        start = next(s for s in load_task(name).starts if s.episode == episode)
        assert start.instruction in (annotations / f"{episode}.json").read_text()
