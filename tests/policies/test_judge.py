"""The rules of the bundled world, its judge on recorded images, and judges as plug-ins."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundled_starts import STEP, extract, recorded_evidence, recorded_start
from drive_world import arm_world
from eval_world import settings

from persistworld_cli.config.requests import PolicyRolloutRequest
from persistworld_cli.config.settings import PolicySettings, Settings
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.video import count_frames
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.launch.continuing import what_remains
from persistworld_cli.policies import run as policy_rollout
from persistworld_cli.policies.bundled_world import rules
from persistworld_cli.policies.bundled_world.judge import BundledJudge, find_condition, locate
from persistworld_cli.policies.bundled_world.scene import find_recorded, true_positions
from persistworld_cli.policies.bundled_world.triangulate import nominal_camera
from persistworld_cli.policies.judge import Evidence, SceneObject, Verdict, ask_judge, load_judge
from persistworld_cli.rollout.interactive import InteractiveRollout

PICK, PUSH = 71, 65  # to the right, to the left


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return extract(tmp_path_factory.mktemp("bundled"), (PICK, PUSH))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return arm_world(tmp_path_factory.mktemp("judged"))


def thing(name: str, x: float, y: float, half: float = 0.03) -> SceneObject:
    colour, shape = name.split()
    return SceneObject(
        name=name,
        colour=colour,
        shape=shape,
        rgb=(1.0, 0.0, 0.0),
        size=(2 * half,) * 3,
        position=np.array([x, y, half]),
        quaternion=np.array([1.0, 0, 0, 0]),
    )


SCENE = (thing("red cube", 0.5, 0.0), thing("blue cylinder", 0.45, 0.1), thing("green box", 0.55, -0.1, 0.055))


# -- rules ------------------------------------------------------------------------------------------------------------


def test_instructions_are_understood_or_told_not_to_be() -> None:
    names = [item.name for item in SCENE]
    for text, task in (
        ("pick up the red cube and place it further to the left", rules.Task("pick", 0, "to the left")),
        ("Push the green box back.", rules.Task("push", 2, "back")),
        ("move the gripper above the blue cylinder", rules.Task("reach", 1)),
        ("put the red cube on top of the green box", rules.Task("stack", 0, onto=2)),
    ):
        assert rules.read_instruction(text, names) == task
    assert find_condition("push the cyan cube back", SCENE) == (
        "there is no 'cyan cube' in the scene (red cube, blue cylinder, green box)"
    )
    assert "the bundled world has no instruction" in str(find_condition("fold the towel", SCENE))


def test_a_condition_must_be_kept_and_unknown_frames_do_not_count() -> None:
    condition = find_condition("push the red cube to the left", SCENE)
    assert isinstance(condition, rules.Condition)
    places = np.tile(np.stack([item.position for item in SCENE]), (8, 1, 1))
    pads = np.zeros((8, 3))
    places[:, 0, 1] = [0.0, 0.02, 0.06, 0.06, 0.04, 0.04, 0.04, 0.04]
    told = condition.outcome(places, pads, 5.0)
    assert told is not None and not told.success  # two frames at 5 Hz are passing by
    assert told.progress == pytest.approx(0.04 / 0.05)
    places[4, 0, 1] = 0.07
    assert condition.outcome(places, pads, 5.0) == rules.Outcome(True, 1.0)
    places[4, 0, 2] = 0.2  # in the air
    assert condition.outcome(places, pads, 5.0) != rules.Outcome(True, 1.0)
    places[2:, 0] = np.nan
    assert condition.outcome(places, pads, 5.0) is None


def test_a_condition_holds_where_it_should() -> None:
    """Each kind of task at its bounds: 5 cm of moving, nearness and offset, 2 cm of height, on the table."""
    start, pads = np.stack([item.position for item in SCENE]), np.zeros((1, 3))

    def holds(text: str, moved: tuple[float, float, float] = (0, 0, 0), pads: np.ndarray = pads) -> bool:
        condition = find_condition(text, SCENE)
        assert isinstance(condition, rules.Condition)
        places = start.copy()
        places[0] += moved
        if condition.task.onto is not None:
            places[0] += start[2] - start[0] + [0, 0, 0.03 + 0.055]
        return bool(condition.holds(places[None], pads)[0] == 1)

    pick = "pick up the red cube and place it further to the left"
    assert holds(pick, (0, 0.051, 0)) and not holds(pick, (0, 0.049, 0)) and not holds(pick, (0.2, -0.051, 0))
    assert holds(pick, (0, 0.06, 0.014)) and not holds(pick, (0, 0.06, 0.016))
    assert holds("push the red cube back", (-0.051, 0, 0)) and not holds("push the red cube back", (0.051, 0, 0))
    stack = "put the red cube on top of the green box"
    assert holds(stack, (0.03, 0.03, 0.019)) and not holds(stack, (0.04, 0.04, 0)) and not holds(stack, (0, 0, -0.021))
    reach = "move the gripper above the red cube"
    near, far = (start[:1] + np.array(gap) for gap in ((0.03, 0.03, 0.5), (0.04, 0.04, 0.0)))
    assert holds(reach, pads=near) and not holds(reach, pads=far)


def test_every_instruction_is_read_as_it_is_written() -> None:
    texts = rules.all_instructions()
    assert len(set(texts)) == len(texts) == 288
    names = [item.name for item in SCENE]
    read = {text: task for text in texts if isinstance(task := rules.read_instruction(text, names), rules.Task)}
    assert len(read) == 8 + 12 + 3 + 2
    assert all(rules.instruction(task, names) == text for text, task in read.items())


# -- triangulation ----------------------------------------------------------------------------------------------------


def test_a_camera_looks_back_along_its_own_rays() -> None:
    for name in rules.EXTERIOR_VIEWS:
        camera = nominal_camera(name)
        point = np.array([0.45, 0.12, 0.03])
        ray = camera.ray(camera.project(point[None])[0])
        assert np.allclose(np.cross(ray, point - camera.position), 0, atol=1e-9)
        assert ray @ (point - camera.position) > 0


def true_places(own: Settings, episode: int) -> np.ndarray:
    """(F, N, 3): the simulator's own record."""
    return true_positions(find_recorded(own, recorded_start(own, episode)))[::STEP][:40]


def test_objects_are_found_where_they_were(bundled: Settings) -> None:
    """Recorded images: within 3 cm of the simulator's own record in nine of ten frames where they are found."""
    for episode in (PICK, PUSH):
        seen = locate(recorded_evidence(bundled, episode), (0, 1, 2))
        apart = np.linalg.norm(seen - true_places(bundled, episode), axis=-1)
        assert np.isfinite(apart).mean() > 0.8
        assert np.nanmedian(apart) < 0.015
        assert np.nanpercentile(apart, 90) < 0.03


def test_recorded_successes_and_failures_are_reported(bundled: Settings) -> None:
    for episode in (PICK, PUSH):
        own = recorded_evidence(bundled, episode)
        sides = ("the left", "the right") if "left" in own.instruction else ("the right", "the left")
        for text, success in ((own.instruction, True), (own.instruction.replace(*sides), False)):
            verdict = BundledJudge().judge(replace(own, instruction=text))
            condition = find_condition(text, own.objects or ())
            assert isinstance(condition, rules.Condition)
            truth = condition.outcome(true_places(bundled, episode), rules.pad_positions(own.poses), own.rate_hz)
            assert truth is not None
            assert verdict.success is truth.success is success, (verdict, truth)
            assert verdict.progress == pytest.approx(truth.progress, abs=0.25)
            assert "cm to the" in verdict.reason and "at the end" in verdict.reason


def test_what_is_not_seen_is_not_guessed(bundled: Settings) -> None:
    evidence, judge = recorded_evidence(bundled, PICK), BundledJudge()
    grey = evidence.frames.copy()
    grey[2:] = 128
    gone = judge.judge(replace(evidence, frames=grey))
    assert (gone.success, gone.progress) == (None, None)
    assert re.fullmatch(r"undecided: red cube seen in \d of 40 frames", gone.reason)
    towel = judge.judge(replace(evidence, instruction="fold the towel"))
    assert towel.success is None and "fold the towel" in towel.reason
    with pytest.raises(PersistWorldError, match="needs camera exterior_1_left"):
        judge.judge(replace(evidence, cameras=("a", "b", "c")))


# -- judges as plug-ins -----------------------------------------------------------------------------------------------


class Patient:
    """Succeeds when the arm ended elsewhere; keeps what it was shown."""

    shown: list[Evidence] = []  # noqa: RUF012

    def judge(self, evidence: Evidence) -> Verdict:
        self.shown.append(evidence)
        moved = float(np.linalg.norm(evidence.poses[-1] - evidence.poses[0]))
        return Verdict(success=moved > 0, progress=min(1.0, moved), reason=f"moved {moved:.2f}")


class Broken:
    def judge(self, evidence: Evidence) -> Any:
        raise ZeroDivisionError("my mistake")


class Vague:
    def judge(self, evidence: Evidence) -> Any:
        return Verdict(success=True, progress=1.5, reason="")


class Unfit:
    pass


def roll(root: Path, output: Path, **request: Any) -> dict[str, Any]:
    own = replace(settings(root), policy=PolicySettings(wait_s=5.0, steps=2))
    return policy_rollout.run(own, PolicyRolloutRequest(output=output, rollouts=9, **request))


def test_a_judge_of_ones_own_is_shown_the_rollout(root: Path, tmp_path: Path) -> None:
    Patient.shown.clear()
    result = roll(root, tmp_path, judge=f"{__name__}:Patient")
    # `module:Class` was imported by that name: it may be another copy of this module than pytest's
    shown = sys.modules[__name__].Patient.shown
    assert [evidence.episode for evidence in shown] == ["7", "8"]
    evidence = shown[0]
    assert evidence.frames.shape[0] == evidence.poses.shape[0] == 9
    assert evidence.joint_pos.shape == evidence.joint_vel.shape == (24, 7)
    assert evidence.objects is None
    entry = result["rollouts"][0]
    record = json.loads(Path(entry["json"]).read_text())
    assert record["success"] is entry["success"] is True
    assert record["judged"].startswith("moved") and record["judge"].endswith("Patient")
    assert "moved" in Path(result["text"]).read_text()


def test_an_episode_of_another_split_is_told(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = replace(settings(root), policy=PolicySettings(steps=1))
    own = replace(own, eval=replace(own.eval, split="held-out"))
    result = policy_rollout.run(own, PolicyRolloutRequest(policy="hold", output=tmp_path, episodes=("7",)))
    assert [entry["episode"] for entry in result["rollouts"]] == ["7"]
    assert "of split 'val', not 'held-out'" in caplog.text and "episode 7" in caplog.text
    with pytest.raises(PersistWorldError, match="no episode '99'"):
        policy_rollout.run(own, PolicyRolloutRequest(policy="hold", output=tmp_path, episodes=("99",)))


def test_the_bundled_judge_wants_the_bundled_world(root: Path, tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="no raw recording of the bundled world"):
        roll(root, tmp_path, judge="bundled-world")
    own = settings(root)
    own = replace(own, world=replace(own.world, raw="bundled:dataset_example/world"))
    with pytest.raises(PersistWorldError, match="episode '7' of the dataset is not episode 7 of the recording"):
        policy_rollout.run(own, PolicyRolloutRequest(policy="hold", output=tmp_path, judge="bundled-world"))
    assert not any(tmp_path.iterdir())


def test_bad_judges_are_reported(root: Path, tmp_path: Path) -> None:
    for name, text in (
        ("bundled", "did you mean 'bundled-world'"),
        ("nowhere_x:A", "no module 'nowhere_x'"),
        (f"{__name__}:Nobody", "has no class 'Nobody'"),
        (f"{__name__}:Unfit", "has no 'judge'"),
        ("json:loads", "cannot be made without arguments"),
    ):
        with pytest.raises(UsageError, match=text):
            load_judge(name)
    with pytest.raises(UsageError, match="against = 'real' is not one of sim"):
        roll(root, tmp_path, against="real")
    evidence: Any = None
    with pytest.raises(PersistWorldError, match=r"progress 1\.5, not a number from 0 to 1"):
        ask_judge(Vague(), evidence, "Vague")
    with pytest.raises(PersistWorldError, match=r"(?s)the judge failed.*my mistake\n2 of 2 rollouts saved in"):
        roll(root, tmp_path, judge=f"{__name__}:Broken")
    summary = json.loads((tmp_path / "rollouts.json").read_text())
    assert summary["complete"] is False
    assert [entry["complete"] for entry in summary["rollouts"]] == [True, True]  # rolled out, not judged
    assert [entry["success"] for entry in summary["rollouts"]] == [None, None]


# -- what is left behind ----------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_rollouts_so_far(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the second interaction: one is kept, without answers that led nowhere; the earlier run is gone."""
    caplog.set_level(logging.INFO)
    roll(root, tmp_path)
    request = PolicyRolloutRequest(output=tmp_path, rollouts=9, policy="hold", command=("pi-rollout",))
    (tmp_path / "config.json").write_text("{}")  # as the launcher writes it at the start
    assert "nothing was saved" in what_remains(request)
    step, calls = InteractiveRollout.step, []

    def stopped(world: InteractiveRollout, poses: np.ndarray) -> Any:
        calls.append(poses)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(world, poses)

    monkeypatch.setattr(InteractiveRollout, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        roll(root, tmp_path, policy="hold")
    summary = json.loads((tmp_path / "rollouts.json").read_text())
    assert summary["policy"] == "hold" and summary["complete"] is False
    assert [(entry["complete"], entry["steps"]) for entry in summary["rollouts"]] == [(False, 1)] * 2
    record = json.loads(Path(summary["rollouts"][1]["json"]).read_text())
    assert len(record["answers"]) == len(record["joint_pos"]) == len(record["state_fk"]) == 12
    assert np.shape(record["poses"])[:2] == (1, 5) and record["error"] == "interrupted"
    assert not (tmp_path / "lerobot").exists()
    assert "replacing 2 rollouts of policy 'scripted'" in caplog.text
    assert "holds 2 rollouts, 2 of them incomplete. To start again" in what_remains(request)


def test_a_damaged_summary_of_an_earlier_run_ends_the_next_before_it_rolls(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names may be any path; what is no rollout stays where it is."""
    output, other = tmp_path / "run", tmp_path / "run" / "notes.txt"
    output.mkdir()
    other.write_text("mine")
    monkeypatch.setattr(InteractiveRollout, "step", lambda *_: pytest.fail("rolled out"))
    for content in ("{", '{"policy": "hold", "task": "bundled", "rollouts": [7]}'):
        (output / "rollouts.json").write_text(content)
        with pytest.raises(PersistWorldError, match=r"not a run's rollouts\.json"):
            roll(root, output)
    monkeypatch.undo()
    entries = [{"video": "..", "sheet": "notes.txt", "json": "a\0.json"}, {}]
    (output / "rollouts.json").write_text(json.dumps({"policy": "hold", "task": "bundled", "rollouts": entries}))
    roll(root, output)
    assert other.read_text() == "mine"


def test_rollouts_are_a_lerobot_dataset_too(root: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second run replaces what the first wrote
        result = roll(root, tmp_path)
    raw = RawDataset(Path(result["lerobot"]))
    assert raw.episodes == [0, 1] == [entry["lerobot"] for entry in result["rollouts"]]
    assert raw.version == "v3.0" and raw.fps == 5.0
    record = json.loads(Path(result["rollouts"][1]["json"]).read_text())
    assert raw.instruction(1) == record["instructions"]
    assert count_frames(raw.video(1, "wrist_left")[0]) == raw.episode(1).length == 9
    names = ("cartesian_position", "gripper_position", "joint_position")
    columns = raw.read(1, [f"{side}.{name}" for side in ("observation.state", "action") for name in names])
    poses = np.concatenate([np.array(record["poses"])[:1, 0], *np.array(record["poses"])[:, 1:]])
    assert np.allclose(columns["observation.state.cartesian_position"], poses[:, :6], atol=1e-6)
    assert np.allclose(columns["action.cartesian_position"][:-1], poses[1:, :6], atol=1e-6)
    assert np.allclose(columns["observation.state.joint_position"][:-1], record["joint_pos"][::3], atol=1e-6)
    assert np.allclose(columns["action.joint_position"][:-1], columns["observation.state.joint_position"][1:])
    velocity = raw.read(1, ["action.joint_velocity"])["action.joint_velocity"]
    assert np.allclose(velocity[0], np.mean(record["joint_vel"][:3], axis=0), atol=1e-6)
