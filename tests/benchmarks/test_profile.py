"""``--profile``: stages over the whole run, operations and a trace of its beginning, and functions elsewhere."""

from __future__ import annotations

import gzip
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_world import fresh_model
from typer.testing import CliRunner

from persistworld_cli import profiling, worker
from persistworld_cli.commands import app as commands
from persistworld_cli.config.presets import to_json
from persistworld_cli.config.settings import LaunchSettings, SamplingSettings, Settings
from persistworld_cli.data.clips.store import ActionStat
from persistworld_cli.rollout.engine import RolloutEngine, rollout_noise


def test_stages_operations_and_trace_of_a_rollout(tmp_path: Path) -> None:
    model, sampling = fresh_model(0), SamplingSettings(steps=2, sigma_max=80.0, decode_chunk=5)
    engine = RolloutEngine(model, sampling, ActionStat(np.zeros(7), np.ones(7)))
    state = engine.start(torch.zeros(1, *model.latent_shape), np.zeros((1, 7)), ["push the block"])
    with profiling.profiling(tmp_path):
        for step in range(2):
            noise = rollout_noise([(0, "a", 0, step)], engine.noise_shape)
            model.draw(engine.step(state, np.zeros((1, 5, 7)), noise), sampling)

    model.decode_latents(torch.zeros(5, *model.latent_shape))  # no longer watched
    data = json.loads((tmp_path / "profile.json").read_text())
    stages = data["stages"]
    assert {name: stage["calls"] for name, stage in stages.items()} == {"sampling": 2, "network": 4, "decoding": 2}
    for stage in stages.values():
        assert 0 <= stage["self_s"] <= stage["total_s"] <= data["seconds"]
    inside = stages["sampling"]["total_s"] - stages["sampling"]["self_s"]
    assert inside == pytest.approx(stages["network"]["total_s"], rel=1e-6)
    assert sum(stage["self_s"] for stage in stages.values()) < data["seconds"]
    assert any(row["name"].startswith("aten::") for row in data["operations"])

    table = (tmp_path / "table.txt").read_text()
    assert re.search(r"^network +4 ", table, flags=re.MULTILINE) and "everything else" in table
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "network" and event.get("cat") == "user_annotation" for event in events) == 4


def test_the_worker_profiles_where_it_is_asked_to(tmp_path: Path) -> None:
    own, asked = to_json(Settings(launch=LaunchSettings(device="cpu"))), {"output": str(tmp_path), "profile": True}
    whole = {"task": "selfcheck", "settings": own, "request": asked}
    result = worker._run(whole, Path("config.json"))
    assert result["profile"] == tmp_path / "profile" / "table.txt" and result["world_size"] == 1
    assert "there is no trace" in result["profile"].read_text()
    without = worker._run({**whole, "request": {"output": str(tmp_path)}}, Path("config.json"))
    assert "profile" not in without


def test_the_trace_ends_while_the_run_goes_on(tmp_path: Path) -> None:
    profile = profiling._Profile(traced_s=0.0)
    for _ in range(3):
        with profile.stage("network"):
            torch.ones(3).sum()
    assert profile.stages["network"].calls == 3 and profile.traced_s > 0
    (counted,) = [row.count for row in profile.trace.key_averages() if row.key == "aten::sum"]
    assert counted == 1
    profile.write(tmp_path, 1.0)
    assert (tmp_path / "trace.json.gz").exists()


def test_stages_of_another_thread_are_timed_and_not_traced(tmp_path: Path) -> None:
    profile = profiling._Profile()
    thread = threading.Thread(target=profile.stage("network")(lambda: None))
    thread.start()
    thread.join()
    profile.write(tmp_path, 1.0)
    assert profile.stages["network"].calls == 1 and profile.trace is None
    assert "there is no trace" in (tmp_path / "table.txt").read_text() and not (tmp_path / "trace.json.gz").exists()


def test_a_run_that_fails_leaves_its_profile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="midway"), profiling.profiling(tmp_path):
        raise ValueError("midway")
    assert "everything else" in (tmp_path / "table.txt").read_text()


def test_commands_of_this_process_count_pythons_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands.app, ["inspect", "bundled:presets/tiny/base", "--profile", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)  # standard output is the command's alone
    folder = tmp_path / "outputs" / "profile-inspect"
    assert "No network was run" in (folder / "table.txt").read_text() and (folder / "calls.pstats").stat().st_size
    assert "outputs/profile-inspect/table.txt" in result.stderr


def test_the_flag_is_in_every_help_and_a_dry_run_profiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in set(commands.COMMANDS) - {"env"}:  # which has nothing to time
        assert "--profile" in CliRunner().invoke(commands.app, [name, "--help"]).stdout, name
    dry = CliRunner().invoke(commands.app, ["build-meta", "--profile", "--dry-run"])
    assert dry.exit_code == 0 and not list(tmp_path.iterdir())
    told = CliRunner().invoke(commands.app, ["eval", "--compare", "a", "--compare", "b", "--profile"])
    assert told.exit_code == 2 and "nothing is run" in told.stderr
