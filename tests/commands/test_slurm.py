"""The SLURM scripts, run by bash: stand-ins for the cluster's programs, and its command line before the real CLI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from processes import make_pipe, read_lines
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings
from persistworld_cli.training.sharing import Share

SCRIPTS = Path(__file__).resolve().parents[2] / "docs" / "slurm"
SCRIPT = SCRIPTS / "post_train.sbatch"
STAND_INS = {
    "srun": """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
code=0
for pid in $pids; do
  wait $pid; own=$?
  while kill -0 $pid 2>/dev/null; do wait $pid; own=$?; done
  [ $own -gt $code ] && code=$own
done
exit $code
""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "$@" >> "$NOTES/requeued"; fi
""",
    "persistworld": """#!/bin/bash
trap 'kill $!; exit 130' USR1
printf '%s\\n' "$@" > "$NOTES/$SLURM_NODEID.words"
codes=($CODES)
[ "$LIFE" = 0 ] && exit ${codes[$SLURM_NODEID]:-0}
sleep infinity &
echo "$SLURM_NODEID" > "$NOTES/started"
wait
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job of two nodes."""
    for name, text in STAND_INS.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    own = {"NOTES": str(tmp_path), "LIFE": "0", "CODES": "0 0", "OUTPUT": str(tmp_path / "run")}
    return {**os.environ, **job, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def run(script: Path, env: dict[str, str]) -> int:
    return subprocess.run(["bash", str(script)], env=env, cwd=SCRIPTS.parents[1]).returncode


def test_each_node_runs_a_command_that_the_program_takes(
    cluster: dict[str, str], tmp_path: Path, counted_once: None
) -> None:
    assert run(SCRIPT, cluster) == 0
    for node in (0, 1):
        words = (tmp_path / f"{node}.words").read_text().splitlines()
        result = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
        assert result.exit_code == 0, result.output
        settings = json.loads(result.stdout)["settings"]
        launch = {key: settings[f"launch.{key}"]["value"] for key in ("num_processes", "num_machines", "machine_rank")}
        assert launch == {"num_processes": 16, "num_machines": 2, "machine_rank": node}
        assert settings["launch.main_process_ip"]["value"] == "node-a"
    options = replace(load_settings("persistworld", env={}).post_train, split_groups=True)
    own = {key: settings[f"post_train.{key}"] for key in ("groups", "candidates", "split_groups")}
    assert own["groups"]["value"] == options.groups and own["candidates"]["value"] == options.candidates
    assert own["split_groups"]["value"]
    for rank in range(16):
        Share.of(options, rank, 16)  # divides evenly
    assert not (tmp_path / "requeued").exists()


def test_the_signal_before_the_time_limit_reaches_the_launchers_and_requeues_the_job(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    started = make_pipe(tmp_path / "started")
    with subprocess.Popen(["bash", str(SCRIPT)], env={**cluster, "LIFE": "1"}, cwd=SCRIPTS.parents[1]) as job:
        assert sorted(read_lines(started, 2)) == ["0", "1"]
        job.send_signal(signal.SIGUSR1)
        assert job.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"


@pytest.mark.parametrize("script", ["post_train.sbatch", "extract.sbatch"])
def test_a_machine_that_fails_requeues_the_job_so_often_and_a_mistake_never(
    cluster: dict[str, str], tmp_path: Path, script: str
) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_CPUS_PER_TASK": "16"}
    job = {**cluster, **array, "SLURM_NODEID": "1", "RESTARTS": "2"}
    for codes in ("1 2", "2 1", "0 130"):
        assert run(SCRIPTS / script, {**job, "CODES": codes}) in (1, 2, 130)
    assert not (tmp_path / "requeued").exists()
    found = [run(SCRIPTS / script, {**job, "CODES": codes}) for codes in ("1 75", "1 137", "1 75")]
    assert found == [0, 0, 75]
    assert (tmp_path / "requeued").read_text() == "requeue 41\n" * 2


def test_the_tasks_of_an_array_divide_the_episodes(cluster: dict[str, str], tmp_path: Path) -> None:
    ranges = []
    for task in range(3):
        array = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "16"}
        job = {**cluster, **array, "SLURM_NODEID": str(task), "EPISODES": "10"}
        assert run(SCRIPTS / "extract.sbatch", job) == 0
        words = (tmp_path / f"{task}.words").read_text().splitlines()
        result = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
        assert result.exit_code == 0, result.output
        ranges.append(json.loads(result.stdout)["request"]["episodes"])
    assert ranges == ["0:4", "4:8", "8:12"]
