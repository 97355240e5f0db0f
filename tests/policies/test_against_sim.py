"""`pi-rollout --against sim`: the simulator restored at recorded starts, driven by policies, and compared."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled_starts import STEP, extract, recorded_start, recorder, require_drawing

from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import PolicySettings, Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.video import count_frames, read_frames
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies import run as policy_rollout
from persistworld_cli.policies.action_spaces import JointPosition
from persistworld_cli.policies.bundled_world.rules import Outcome
from persistworld_cli.policies.bundled_world.scene import find_recorded
from persistworld_cli.policies.bundled_world.simulator import check_simulator, restored, roll_in_simulator
from persistworld_cli.policies.run import make_plan

PICK, PUSH = 60, 65
COLUMNS = ("sim.object_pose", "observation.state.joint_position", "action")
POLICY = '''
import numpy as np
from persistworld_cli.data.raw.lerobot import RawDataset

class Recorded:
    """Answers with what was recorded in episode {episode}."""
    column = "action.joint_velocity"
    def __init__(self):
        self.reset()
    def reset(self):
        self.row = 0
        columns = RawDataset({raw!r}).read({episode}, [self.column, "action.gripper_position"])
        self.rows = np.column_stack([columns[self.column], columns["action.gripper_position"]])
    def infer(self, obs):
        begun, self.row = self.row, self.row + 12
        return {{"actions": self.rows[begun : begun + 15]}}

class Positions(Recorded):
    column = "action.joint_position"
'''


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return extract(tmp_path_factory.mktemp("bundled"), (PICK, PUSH))


@pytest.fixture(scope="module")
def live() -> Any:
    """The recorder's simulated world."""
    return recorder("live")


@pytest.fixture(scope="module")
def drawing() -> None:
    require_drawing()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


# -- reset ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("episode", "start"), [(PICK, 0), (PICK, 12), (PUSH, 9)])
def test_a_recorded_start_is_restored_and_repeats_the_recording(
    live: Any, bundled: Settings, episode: int, start: int
) -> None:
    """Objects and arm as recorded; driven along the recorded targets, they stay so for the next 2 s."""
    recorded = find_recorded(bundled, recorded_start(bundled, episode, start))
    columns = recorded.raw.read(episode, list(COLUMNS))
    with restored(recorded) as (world, error):
        assert error < 1e-3  # m and rad: this MuJoCo repeats the recorded motion
        for tick in range(31):
            row = recorded.row + tick
            now = world.observe()
            places, true = (
                np.reshape(one, (3, 7))[:, :3] for one in (now["sim.object_pose"], columns[COLUMNS[0]][row])
            )
            assert np.abs(now[COLUMNS[1]] - columns[COLUMNS[1]][row]).max() < 0.03
            assert np.linalg.norm(places - true, axis=1).max() < 0.01
            world.tick(columns["action"][row, :7], columns["action"][row, 7])


def test_a_restored_start_looks_as_recorded(drawing: None, bundled: Settings) -> None:
    recorded = find_recorded(bundled, recorded_start(bundled, PICK, 12))
    videos = [recorded.raw.video(PICK, camera)[0] for camera in bundled.world.cameras]
    images = np.stack([read_frames(video, [recorded.row])[0] for video in videos])
    with restored(recorded) as (world, _):
        assert psnr(world.images(), images) > 28  # the recording went through a video codec


def test_a_simulator_that_does_not_repeat_is_put_right(live: Any, bundled: Settings) -> None:
    recorded = find_recorded(bundled, recorded_start(bundled, PICK, 12))
    poses = recorded.raw.read(PICK, list(COLUMNS))[COLUMNS[0]][recorded.row].reshape(3, 7)
    joints = recorded.raw.read(PICK, [COLUMNS[1]])[COLUMNS[1]][recorded.row]
    there = {"joints": joints, "gripper": 0.2, "objects": poses}
    world, error = live.restore(0, PICK, 0, design="varied", **there)  # the start of the motion
    now = world.observe()
    assert error > 0.01
    assert np.abs(now["sim.object_pose"].reshape(3, 7)[:, :3] - poses[:, :3]).max() < 1e-6
    assert np.abs(now[COLUMNS[1]] - joints).max() < 1e-6
    assert now["observation.state.gripper_position"] == pytest.approx(0.2)


# -- rolling out ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    raw = str(Path(__file__).resolve().parents[2] / "dataset_example" / "world")
    (tmp_path / "replaying.py").write_text(POLICY.format(episode=PUSH, raw=raw))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "replaying", raising=False)
    return "replaying:Recorded"


def test_a_policy_acts_in_the_simulator(drawing: None, bundled: Settings, recorded_policy: str) -> None:
    """Recorded velocities push the drum as they did; asked for something else, that is no success."""
    from persistworld_cli.policies.embedded import LocalPolicy, make_policy

    start = recorded_start(bundled, PUSH)
    recorded = find_recorded(bundled, start)
    view = make_plan(bundled, PolicyRolloutRequest(policy="hold"), open_store(bundled)).view

    def load(name: str) -> LocalPolicy:
        return LocalPolicy(make_policy(name), name)

    rolled = roll_in_simulator(bundled, start, recorded, load(recorded_policy), view, 6)
    assert rolled.truth == Outcome(True, 1.0)
    assert rolled.rollout.frames.shape == (25, 3, bundled.world.height, bundled.world.width, 3)
    true = RawDataset(recorded.raw.path).read(PUSH, list(COLUMNS))[COLUMNS[0]].reshape(-1, 3, 7)[::STEP][:25, :, :3]
    assert np.linalg.norm(rolled.positions - true, axis=-1).max() < 0.04
    assert np.shape(rolled.rollout.trace.joint_vel) == (72, 7)
    joints = recorded.raw.read(PUSH, [COLUMNS[1]])[COLUMNS[1]][:72]
    assert np.abs(rolled.rollout.trace.joint_pos - joints).max() < 0.03  # velocities move the arm as they did
    asked_of = replace(start, text=start.text.replace("to the left", "forward"))
    assert roll_in_simulator(bundled, asked_of, recorded, load(recorded_policy), view, 2).truth != rolled.truth
    positions = replace(view, space=JointPosition(0.5))
    moved = roll_in_simulator(bundled, start, recorded, load("replaying:Positions"), positions, 1).rollout.trace
    assert np.abs(moved.joint_pos - joints[:12]).max() < 0.03 and not moved.joint_vel
    towel = replace(start, text="fold the towel")
    assert roll_in_simulator(bundled, towel, recorded, load(recorded_policy), view, 1).truth is None


def test_imagined_and_simulated_are_compared(drawing: None, bundled: Settings, tmp_path: Path) -> None:
    output, own = tmp_path / "run", replace(bundled, policy=PolicySettings(steps=1))
    result = policy_rollout.run(own, PolicyRolloutRequest(policy="scripted", against="sim", output=output))
    assert "Predicted success against the simulator's own state" in Path(result["text"]).read_text()
    summary = json.loads((output / "rollouts.json").read_text())
    against, entry = summary["against_sim"], summary["rollouts"][0]
    assert against["rollouts"] == 1 and against["reset_error"] < 1e-3
    assert sum(against["success"][key] for key in ("n", "undecided")) == 1
    assert entry["sim_success"] is False and 0 <= entry["sim_progress"] <= 1
    record = json.loads(Path(entry["json"]).read_text())
    assert np.shape(record["sim"]["object_positions"]) == (5, 3, 3)
    assert np.shape(record["sim"]["joint_pos"]) == np.shape(record["joint_pos"]) == (12, 7)
    assert count_frames(Path(entry["video"])) == 5
    image = read_frames(Path(entry["video"]), [0])[0]
    rows = 2 * (26 + 4 * bundled.world.height)  # two rows under each other, each view four times as large
    assert image.shape[0] == pytest.approx(52 + rows, abs=2)


class Closing:
    """Stays where it is and closes the gripper."""

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.repeat(np.append(np.zeros(7), 1.0)[None], 15, axis=0)}

    def reset(self) -> None: ...


def test_a_task_stops_the_gripper_in_the_world_model_but_not_in_the_simulator(
    drawing: None, bundled: Settings, tmp_path: Path
) -> None:
    policy = f"{__name__}:Closing"
    request = PolicyRolloutRequest(policy=policy, against="sim", rollouts=2, output=tmp_path / "run")
    own = replace(bundled, policy=PolicySettings(steps=1, task="bundled"))
    result = policy_rollout.run(own, request)
    assert result["gripper"] == {"cap": 1.0, "stops": {"pick up": 0.25, "put": 0.25}}
    assert result["arm"]["position_gain"] == 0.27 and result["arm"]["skip"] > 0
    records = [json.loads(Path(entry["json"]).read_text()) for entry in result["rollouts"]]
    ends = {one["instructions"].split()[0]: (one["gripper_stop"], one["poses"][-1][-1][6]) for one in records}
    assert ends == {"pick": (0.25, 0.25), "push": (1.0, 1.0)}
    assert all(one["sim"]["state_fk"][-1][6] > 0.8 for one in records)  # nothing is between its fingers
    plan = policy_rollout.make_plan(own, request, open_store(own))
    for text, stop in (("  Put the cube away", 0.25), ("putty is pushed", 1.0), ("do not put it", 1.0)):
        assert plan.gripper_stop(text) == stop, text
    capped = replace(own, policy=replace(own.policy, gripper_cap=0.6))
    plan = policy_rollout.make_plan(capped, request, open_store(own))
    assert (plan.view.space.gripper_cap, plan.gripper_stop("pick up the red cube")) == (0.6, 1.0)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_no_mujoco_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dataset_example.recorder")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(PersistWorldError, match="MuJoCo is not installed") as absent:
        check_simulator()
    assert "pip install -e '.[sim]'" in str(absent.value)


def test_only_the_bundled_world_has_a_simulator(bundled: Settings, tmp_path: Path) -> None:
    own = replace(bundled, policy=PolicySettings(steps=1))
    request = PolicyRolloutRequest(policy="hold", against="sim", output=tmp_path / "out")
    with pytest.raises(PersistWorldError, match="no raw recording of the bundled world"):
        policy_rollout.run(replace(own, world=replace(own.world, raw="")), request)
    other = tmp_path / "world"
    for kind in ("annotation", "videos"):
        (other / kind).mkdir(parents=True)
        (other / kind / "val").symlink_to(Path(own.world.dataset) / kind / "val")
    note = json.loads((other / "annotation" / "val" / "60.json").read_text())
    (other / "annotation" / "val").unlink()
    (other / "annotation" / "val").mkdir()
    (other / "annotation" / "val" / "61.json").write_text(json.dumps(note))  # an episode by another's name
    elsewhere = replace(own, world=replace(own.world, dataset=str(other)))
    with pytest.raises(PersistWorldError, match="episode '61' of the dataset is not episode 61 of the recording"):
        policy_rollout.run(elsewhere, replace(request, episodes=("61",)))
    assert not (tmp_path / "out").exists()
