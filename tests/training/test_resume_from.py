"""`--resume-from`: a run continues from a state that is not its newest, or not its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.config.settings import PostTrainSettings, Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.training import post_train

ADAPTER = "weights/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """A small recorded world; three short updates, every state kept."""
    options = PostTrainSettings(
        updates=3, groups=1, candidates=2, keep_best=1, keep_worst=1, prefix_max=0, lora_rank=4, save_every=1, keep=9
    )
    return replace(small_world, post_train=options)


@pytest.fixture(scope="module")
def whole(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("whole")
    post_train.run(world, PostTrainRequest(output=output))
    return output


def steps(output: Path) -> list[int]:
    """Updates that were logged."""
    return [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, two: Path) -> bool:
    return (one / ADAPTER).read_bytes() == (two / ADAPTER).read_bytes()


def test_an_earlier_state_of_the_same_run(world: Settings, whole: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    first = again / "state" / "step-00000001"
    two = replace(world, post_train=replace(world.post_train, updates=2))
    post_train.run(two, PostTrainRequest(output=again, resume_from=first))
    assert steps(again) == [1, 2] and not (again / "state" / "step-00000003").exists()
    post_train.run(world, PostTrainRequest(output=again))
    assert steps(again) == [1, 2, 3] and same(again, whole)


def test_a_state_of_another_run_is_copied_with_its_log(world: Settings, whole: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in (whole / "state").iterdir())
    second = whole / "state" / "step-00000002"
    for number, given in enumerate((whole, second, second / "state.pt")):
        output = tmp_path / str(number)
        post_train.run(world, PostTrainRequest(output=output, resume_from=given))
        assert steps(output) == [1, 2, 3] and len(load_file(str(output / ADAPTER)))
        assert same(output, whole)
    assert sorted(path.name for path in (whole / "state").iterdir()) == before


def test_what_cannot_be_gone_on_from_is_refused(world: Settings, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(PersistWorldError, match="no training state") as missing:
        post_train.run(world, PostTrainRequest(output=tmp_path, resume_from=whole / "state" / "step-00000007"))
    assert "step-00000003" in str(missing.value.fix)
    wider = replace(world, post_train=replace(world.post_train, lora_rank=8))
    with pytest.raises(PersistWorldError, match=r"is \(4, \d+\) there, \(8, \d+\) here") as other:
        post_train.run(wider, PostTrainRequest(output=tmp_path, resume_from=whole))
    assert "lora_rank" in str(other.value.fix)
    told = CliRunner().invoke(app, ["post-train", "--no-resume", "--resume-from", str(whole)])
    assert told.exit_code == 2 and "contradict" in told.output


def test_a_run_stopped_in_its_last_update_gets_its_adapter(world: Settings, whole: Path, tmp_path: Path) -> None:
    """Its state is saved, but the adapter is of an earlier and shorter run in the folder."""
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    stale = again / ADAPTER
    stale.write_bytes(stale.read_bytes()[:-4] + bytes(4))
    assert not same(again, whole)
    post_train.run(world, PostTrainRequest(output=again))
    for file in ("adapter_model.safetensors", "action_encoder.safetensors", "adapter_config.json"):
        ours, theirs = (folder / "weights" / "adapter" / file for folder in (again, whole))
        assert ours.read_bytes() == theirs.read_bytes()
