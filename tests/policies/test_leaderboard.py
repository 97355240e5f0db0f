"""Leaderboard of policies: r, MMRV and confusion matrix against values computed by hand, files, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.leaderboard import build_leaderboard, read_real, read_runs
from persistworld_cli.statistics.ranking import confusion, mmrv, pearson


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])


def write_run(folder: Path, policy: str, success: list[bool | None], task: str = "cubes", **keys: Any) -> Path:
    """A run as pi-rollout leaves it, without its rollouts' own files."""
    entries = [
        {"complete": True, "success": one, "progress": None if one is None else 0.5 + 0.5 * one, **keys}
        for one in success
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rollouts.json").write_text(json.dumps({"policy": policy, "task": task, "rollouts": entries}))
    return folder


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_mmrv_by_hand() -> None:
    # The order of the last two is wrong, and they are 0.5 apart in reality: (0 + 0.5 + 0.5) / 3.
    assert mmrv([0.1, 0.5, 0.3], [0.2, 0.4, 0.9]) == pytest.approx(1 / 3)
    assert mmrv([0.1, 0.2, 0.3], [0.2, 0.4, 0.9]) == 0
    # All turned round: 0.2 and 0.9 are each other's worst (0.7); for 0.4 it is 0.9 (0.5).
    assert mmrv([0.3, 0.2, 0.1], [0.2, 0.4, 0.9]) == pytest.approx((0.7 + 0.5 + 0.7) / 3)
    assert mmrv([0.3, 0.3], [0.2, 0.6]) == pytest.approx(0.2)  # level on one side: the lower one's order disagrees
    assert mmrv([0.3, 0.4], [0.6, 0.6]) == 0  # level in reality costs nothing


def test_pearson_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-0.3, -0.1, 0.4): 0.7 / sqrt(2 * 0.26).
    assert pearson([1, 2, 3], [0.2, 0.4, 0.9]) == pytest.approx(0.7 / (2 * 0.26) ** 0.5)
    assert pearson([0, 1], [0.9, 0.1]) == pytest.approx(-1)
    assert pearson([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) is None
    assert pearson([0.5], [0.5]) is None
    assert pearson([0, 8e-8, 3e-8], [0.1, 0.2, 0.3]) is None  # rounding


def test_confusion_by_hand() -> None:
    matrix = confusion([True, True, False, None, False, False], [True, False, True, True, False, False])
    assert matrix == {
        "n": 5,
        "undecided": 1,
        "true_positive": 1,
        "false_positive": 1,
        "false_negative": 1,
        "true_negative": 2,
        "accuracy": 0.6,
    }
    assert confusion([None], [True])["accuracy"] is None


# -- files ------------------------------------------------------------------------------------------------------------


def test_other_action_spaces_are_not_compared_in_silence(tmp_path: Path) -> None:
    for name, actions in (("old", {}), ("new", {"actions": "pose"})):
        folder = write_run(tmp_path / name, "mine", [True, False])
        record = json.loads((folder / "rollouts.json").read_text())
        (folder / "rollouts.json").write_text(json.dumps(record | actions))
    with pytest.raises(PersistWorldError, match="answers joint-velocity in one run and pose in another"):
        read_runs([str(tmp_path / "old"), str(tmp_path / "new")])
    table = command(tmp_path / "old", f"poses={tmp_path / 'new'}").output
    assert "mine (joint-velocity)" in table and "poses (pose)" in table


def test_a_leaderboard_by_hand(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "good", [True, True, True, False]),
        write_run(tmp_path / "b", "fair", [True, False, False, False, None]),
        write_run(tmp_path / "c", "poor", [False, False, True, True]),
        write_run(tmp_path / "d", "new", [True]),
    ]
    real = tmp_path / "real.csv"
    real.write_text(
        "policy,task,success,n\ngood,cubes,0.9,20\nfair,cubes,0.6,20\npoor,cubes,0.2,10\nold,cubes,0.5,10\n"
    )
    result = build_leaderboard(read_runs([str(run) for run in runs])[0], read_real(real))
    assert [row["policy"] for row in result["policies"]] == ["new", "good", "poor", "fair"]
    good, fair = result["policies"][1], result["policies"][3]
    assert (good["n"], good["success"], good["progress"]) == (4, 0.75, pytest.approx(0.875))
    # Wilson, 3 of 4: centre (0.75 + 0.4802) / 1.9604, half (1.96 sqrt(0.75 * 0.25 / 4 + 0.06002)) / 1.9604
    assert (good["low"], good["high"]) == (pytest.approx(0.3006, abs=1e-4), pytest.approx(0.9544, abs=1e-4))
    assert (fair["n"], fair["undecided"], fair["success"]) == (4, 1, 0.25)
    assert (good["real"], good["real_n"]) == (0.9, 20)
    told = result["predicted"]
    assert told["policies"] == ["good", "fair", "poor"]
    assert told["mmrv"] == pytest.approx((0 + 0.4 + 0.4) / 3)
    # imagined (0.75, 0.25, 0.5), real (0.9, 0.6, 0.2): deviations (0.25, -0.25, 0) and (1, 0.1, -1.1) / 3
    assert told["pearson_r"] == pytest.approx((0.25 * 0.9 / 3) / (0.125 * (1 + 0.01 + 1.21) / 9) ** 0.5)
    assert told["mean_absolute_error"] == pytest.approx((0.15 + 0.35 + 0.3) / 3)
    for name, (low, high) in told["intervals"].items():
        assert low <= told[name] <= high and high - low > 0.1
    assert (told["without_real"], told["without_imagined"]) == (["new"], ["old"])
    assert build_leaderboard(read_runs([str(runs[0])])[0], None)["policies"][0]["policy"] == "good"


def test_no_rollout_counts_twice_and_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    """The same run twice, or runs of one name whose judge or length differ, are refused; of two names, told."""
    one = write_run(tmp_path / "one", "p", [True], episode="7", start=0, seed=0)
    again = write_run(tmp_path / "again", "p", [True, False], episode="7", start=0, seed=1)
    for runs in ((one, one), (again,)):
        refused = command(*runs)
        assert refused.exit_code == 1 and "the same rollout twice: episode 7, frame 0, seed" in refused.stderr
    for name, keys in (
        (
            "long",
            {
                "steps": 9,
                "judge": "a",
                "weights": {"ckpt": "1234567890", "adapter": ""},
                "sampling": {"steps": 4},
                "arm": {"skip": 2},
            },
        ),
        (
            "short",
            {
                "steps": 3,
                "judge": "a",
                "weights": {"ckpt": "abcdefghij", "adapter": ""},
                "sampling": {"steps": 1},
                "arm": {"skip": 3},
            },
        ),
    ):
        record = json.loads((write_run(tmp_path / name, "p", [True]) / "rollouts.json").read_text())
        (tmp_path / name / "rollouts.json").write_text(json.dumps(record | keys))
    refused = command(tmp_path / "long", tmp_path / "short")
    assert refused.exit_code == 1 and "policy 'p' has steps 9 in one run and 3 in another" in refused.stderr
    shown = " ".join(command(tmp_path / "long", f"q={tmp_path / 'short'}").output.split())
    assert "steps in task cubes: p 9, q 3" in shown and "weights in task cubes: p 12345678, q abcdefgh" in shown
    assert "sampling.steps in task cubes: p 4, q 1" in shown and "judge in task" not in shown
    assert "arm.skip in task cubes: p 2, q 3" in shown
    assert command(one, tmp_path / "long").exit_code == 0  # an older run does not say how it was made


def test_rollouts_without_a_judge_are_not_undecided(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "p", [None, None])
    record = json.loads((run / "rollouts.json").read_text())
    (run / "rollouts.json").write_text(json.dumps(record | {"judge": None}))
    row = build_leaderboard(read_runs([str(run)])[0], None)["policies"][0]
    assert (row["undecided"], row["unjudged"], row["n"]) == (0, 2, 0)
    assert "Rollouts without a judge: p (2)" in " ".join(command(run).output.split())


def test_intervals_come_from_rollouts_alone(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, name, [name == "good"] * 4) for name in ("good", "poor")]
    real = tmp_path / "real.csv"
    real.write_text("policy,task,success\ngood,cubes,0.9\npoor,cubes,0.2\n")  # without n: taken as it is
    told = build_leaderboard(read_runs([str(run) for run in runs])[0], read_real(real))["predicted"]
    assert told["intervals"] == {"pearson_r": [1, 1], "mmrv": [0, 0], "mean_absolute_error": [pytest.approx(0.15)] * 2}
    real.write_text("policy,task,success,n\ngood,cubes,0.9,100\npoor,cubes,0.2,100\n")
    told = build_leaderboard(read_runs([str(run) for run in runs])[0], read_real(real))["predicted"]
    low, high = told["intervals"]["mean_absolute_error"]  # a standard error of (0.03^2 + 0.04^2)^0.5 / 2 = 0.025
    assert low == pytest.approx(0.15 - 1.96 * 0.025, abs=0.01) and high == pytest.approx(0.15 + 1.96 * 0.025, abs=0.01)
    shown = command(*runs, "--real", str(real)).output
    assert "+1.000" in shown and f"[{low:.2f}, {high:.2f}]" in shown


def test_only_tasks_that_all_have_are_compared(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", "p", [True], "cubes"),
        write_run(tmp_path / "b", "p", [False], "towel"),
        write_run(tmp_path / "c", "q", [False], "cubes"),
    ]
    real = tmp_path / "real.csv"
    real.write_text("policy, task, success\np, cubes, 0.8\np, towel, 0.1\nq, cubes, 0.3\nq, towel, 0.9\n")
    imagined, _ = read_runs([str(run) for run in runs])
    told = build_leaderboard(imagined, read_real(real))["predicted"]
    assert (told["on_tasks"], told["same_tasks"], told["mmrv"]) == (["cubes"], True, 0)
    assert told["pearson_r"] == pytest.approx(1)
    assert [row["task"] for row in told["tasks"]] == ["cubes"]


def test_a_person_may_judge_in_the_rollouts_own_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "p", [None], json="elsewhere/cubes_7_0_0.json")
    assert read_runs([str(run)])[0]["p"]["cubes"].undecided == 1
    (run / "cubes_7_0_0.json").write_text(json.dumps({"success": True, "progress": None}))
    assert read_runs([f"mine={run}"])[0]["mine"]["cubes"].success == [True]
    (run / "cubes_7_0_0.json").write_text(json.dumps({"success": "yes"}))
    with pytest.raises(PersistWorldError, match="success is 'yes'"):
        read_runs([str(run)])


def test_the_simulator_may_be_what_is_real(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "p", [True, False], sim_success=True, sim_progress=1.0)
    write_run(tmp_path / "b", "q", [False, False], sim_success=False, sim_progress=0.0)
    result = command(tmp_path / "a", tmp_path / "b", "--real", "sim", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [(row["policy"], row["real"], row["real_n"]) for row in told["policies"]] == [("p", 1.0, 2), ("q", 0.0, 2)]
    assert told["predicted"]["pearson_r"] == pytest.approx(1)
    shown = command(tmp_path / "a", tmp_path / "b", "--real", "sim").output
    assert "predicts simulated success" in shown and "real" not in shown


# -- the command ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_said_is_said(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", "p", [True]), write_run(tmp_path / "b", "q", [True])
    real = tmp_path / "real.csv"
    real.write_text("policy,task,success\np,cubes,0.4\nq,cubes,0.7\n")
    shown = command(one, two, "--real", real)
    assert shown.exit_code == 0, shown.output
    assert "r is undefined: all policies have the same imagined success." in shown.output
    assert "2 policies: r over so few says little." in shown.output
    assert "100% of 1" in shown.output and "[21, 100]" in shown.output
    alone = command(one, "--real", real)
    assert alone.exit_code == 1
    assert "1 policies have judged rollouts and real results" in alone.output
    assert command(one).exit_code == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("policy,success\np,0.4\n", "no column 'task'"),
        ("", "no column 'policy' (there: none)"),
        ("policy,task,success\np,cubes,40%\n", "line 2"),
        ("policy,task,success\np,cubes,40\n", "success from 0 to 1"),
        ("policy,task,success,n\np,cubes,0.4,0\n", "n from 1"),
        ("policy,task,success\np,cubes,0.4\np,cubes,0.5\n", "appears twice"),
        ("policy,task,success\npi05,cubes,0.4\npi0,cubes,0.5\n", "did you mean 'pi05'?"),
    ],
)
def test_bad_real_results_are_reported(tmp_path: Path, text: str, told: str) -> None:
    runs = [write_run(tmp_path / name, name, [True]) for name in ("pi-05", "pi-0")]
    real = tmp_path / "real.csv"
    real.write_text(text)
    result = command(*runs, "--real", real)
    assert result.exit_code == 1
    assert told in result.output.replace("\n", " ").replace("  ", " ")


def test_bad_runs_are_reported(tmp_path: Path) -> None:
    assert "no rollouts.json here" in command(tmp_path / "nowhere").output
    (tmp_path / "rollouts.json").write_text("{}")
    result = command(tmp_path)
    assert result.exit_code == 1 and "not a run's rollouts.json" in result.output
    assert command().exit_code == 2
