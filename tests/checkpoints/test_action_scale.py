"""The action scale: saved in every weights file, decided in one place, compared with the data."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, TINY, cli
from drive_world import write_preset
from eval_world import build, settings
from golden_files import GoldenFiles
from run_in_process import run_in_process
from safetensors.torch import load_file
from typer.testing import CliRunner

from persistworld_cli.checkpoints.action_scale import Poses, check_poses, pose_findings, scale_of, stored_scale
from persistworld_cli.checkpoints.saving import read_notes, save_safetensors, save_torch
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.commands.app import app
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import load_settings, resolve_settings
from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest, ReplayRequest
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.interact import replay
from persistworld_cli.launch import launcher
from persistworld_cli.training import post_train, pretrain

DROID = ActionStat.load(resolve_path("bundled:presets/ctrl-world/stat.json"))
OWN = {"state_01": [-2.0] * 7, "state_99": [2.0] * 7}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with three training episodes and one held out, and its untrained weights."""
    root = tmp_path_factory.mktemp("scale")
    build(root)
    return root


def poses(count: int = 2000, episodes: int = 50, **dimension: np.ndarray) -> Poses:
    """States that DROID's percentiles were made for, or others in some dimension."""
    rng = np.random.default_rng(0)
    low, high = DROID.p01, DROID.p99
    states = low + (high - low) * rng.uniform(-0.01, 1.01, (count, 7))
    for name, values in dimension.items():
        states[:, ("x", "y", "z", "roll", "pitch", "yaw", "gripper").index(name)] = values
    return Poses(states, episodes, "here")


def found(given: Poses, stat: ActionStat = DROID) -> dict[str, str]:
    return {line.split()[0]: line for line in pose_findings(stat, given)}


def test_presets_name_the_scale_of_the_published_weights(golden: GoldenFiles) -> None:
    published = json.loads((golden / "ctrl_world_stat.json").read_text())
    assert DROID.p01.tolist() == published["state_01"] and DROID.p99.tolist() == published["state_99"]
    for name in ("ctrl-world", "persistworld"):
        model = load_settings(name, env={}).model
        assert resolve_path(model.stat) == resolve_path("bundled:presets/ctrl-world/stat.json") and not model.stat_given


def test_the_users_word_is_known_from_a_shipped_presets(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('extends = "ctrl-world"\n')
    assert not load_settings(str(mine), env={}).model.stat_given
    for resolved in (
        resolve_settings("ctrl-world", ["model.stat=other.json"], env={}),
        resolve_settings("ctrl-world", env={"PERSISTWORLD_MODEL__STAT": "other.json"}),
    ):
        assert resolved.settings.model.stat_given
    assert not load_settings("ctrl-world", ['model.stat=""'], env={}).model.stat_given  # nobody's word
    mine.write_text('extends = "ctrl-world"\n[model]\nstat = "other.json"\n')
    assert load_settings(str(mine), env={}).model.stat_given


def test_right_poses_are_quiet_and_wrong_ones_are_told_by_dimension() -> None:
    assert found(poses()) == {}
    assert set(found(poses(x=np.full(2000, 2.0)))) == {"x"}
    small = found(Poses(poses().states / 55, 50, "here"))
    assert set(small) >= {"x", "y", "z", "pitch", "yaw", "gripper"}
    assert "clipped" in small["x"] and "0.01" in small["y"]
    assert "times" in found(poses(y=np.linspace(-1.2, 1.2, 2000)))["y"]
    degrees = poses()
    degrees.states[:, 3:6] *= 180 / np.pi
    assert set(found(degrees)) == {"roll", "pitch", "yaw"}
    assert "7 numbers" in str(pose_findings(ActionStat(np.zeros(8), np.ones(8)), poses()))


def test_angles_are_measured_around_the_circle() -> None:
    rng = np.random.default_rng(1)
    near_pi = (np.pi + rng.normal(0, 0.1, 2000) + np.pi) % (2 * np.pi) - np.pi  # on both sides of the jump
    assert found(poses(roll=near_pi)) == {} == found(poses(roll=np.abs(near_pi)))
    narrow = ActionStat(np.array([0.0] * 3 + [2.8, -1, -1, 0]), np.array([1.0] * 3 + [3.1, 1, 1, 1]))
    given = Poses(narrow.p01 + (narrow.p99 - narrow.p01) * rng.uniform(0, 1, (2000, 7)), 50, "here")
    assert found(given, narrow) == {}
    beyond = np.arange(2000) % 5 == 0  # a fifth lies just across the jump: clipped, but near on the circle
    given.states[beyond, 3] = rng.uniform(-np.pi, -3.1, beyond.sum())
    told = found(given, narrow)
    assert set(told) == {"roll"} and "20% of the values are clipped" in told["roll"] and "times" not in told["roll"]


def test_real_droid_is_quiet_one_episode_as_well_as_all(shared_data: Path) -> None:
    store = EpisodeStore(shared_data / "droid_subset")
    own = load_settings("ctrl-world", [f"world.dataset={store.root}", "model.strict_actions=true"], env={})

    scale = scale_of(own, open_store(own), [])
    for split in store.splits:
        for episodes in ([], *([name] for name in store.episodes(split))):
            assert check_poses(own, store, scale, split=split, episodes=episodes) == []


# -- carried ------------------------------------------------------------------------------------------------------


def test_every_file_carries_it_and_torch_reads_it_as_before(tmp_path: Path) -> None:
    tensors = {"unet.a": torch.arange(6.0).view(2, 3), "unet.b": torch.ones(3)}
    notes = {"action_scale": json.dumps(OWN), "other": "x"}
    save_safetensors(tmp_path / "a.safetensors", tensors, notes)
    for name, kept in (("a.pt", notes), ("plain.pt", {})):
        save_torch(tmp_path / name, tensors, kept)
    for name in ("a.safetensors", "a.pt"):
        path = tmp_path / name
        stat = stored_scale(path)
        assert stat is not None and stat.p01.tolist() == OWN["state_01"]
        assert WeightFiles(locate(path)).metadata["other"] == "x"
        shutil.copy(path, tmp_path / f"renamed-{name}")
        assert stored_scale(tmp_path / f"renamed-{name}") is not None
    assert stored_scale(tmp_path / "plain.pt") is None
    for mapped in (False, True):
        again = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
        assert list(again) == list(tensors) and all(torch.equal(again[k], tensors[k]) for k in tensors)
    save_safetensors(tmp_path / "bad.safetensors", tensors, {"action_scale": '{"state_01": [1]}'})
    with pytest.raises(PersistWorldError, match="damaged action scale"):
        stored_scale(tmp_path / "bad.safetensors")


def test_export_carries_the_scale_in_every_form(tmp_path: Path, adapter: Path) -> None:
    tiny = ActionStat.load(resolve_path(TINY.model.stat))
    for to, name in (("ctrl-world", "a.pt"), ("safetensors", "a.safetensors")):
        done = cli("export", BASE, "--preset", "tiny", "--to", to, "--output", tmp_path / name)
        stat = stored_scale(tmp_path / name)
        assert stat is not None and stat.p99.tolist() == tiny.p99.tolist() == done["action_scale"]["p99"]
    assert cli("inspect", tmp_path / "a.pt")["action_scale"]["state_01"] == tiny.p01.tolist()
    # an adapter of which nobody says its scale gets none; one that is named, or carried, travels on
    assert cli("export", adapter, "--to", "peft", "--output", tmp_path / "bare")["action_scale"] is None
    assert stored_scale(tmp_path / "bare") is None
    own = tmp_path / "own.json"
    own.write_text(json.dumps(OWN))
    cli("export", adapter, "--to", "peft", "--set", f"model.stat={own}", "--output", tmp_path / "own")
    merged = cli("export", BASE, "--adapter", tmp_path / "own", "--to", "safetensors", "-o", tmp_path / "m.safetensors")
    assert merged["action_scale"] == {"p01": OWN["state_01"], "p99": OWN["state_99"]}


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """What was said of actions."""
    own = [record for record in caplog.records if record.name.endswith("action_scale")]
    return "\n".join(record.getMessage() for record in own if record.levelno >= logging.WARNING)


def test_trained_weights_carry_their_scale_and_later_commands_take_it(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(OWN))
    sets = [
        *("pretrain.updates=1", "pretrain.batch=2", "clips.workers=0", "pretrain.validate_every=0"),
        *("post_train.updates=1", "post_train.groups=1", "post_train.candidates=2", "post_train.keep_best=1"),
        *("post_train.keep_worst=1", "post_train.prefix_max=0", "post_train.lora_rank=2"),
        "post_train.validate_every=0",
    ]
    preset = str(write_preset(tmp_path / "small.toml", settings(world)))
    given = load_settings(preset, [*sets, f"model.stat={own}"], env={})
    with caplog.at_level(logging.WARNING, "persistworld_cli"):
        trained = Path(pretrain.run(given, PretrainRequest(output=tmp_path / "pre"))["weights"])
    state = next((tmp_path / "pre" / "state").glob("*/state.pt"))
    for file in (trained, state):
        stat = stored_scale(file)
        assert stat is not None and stat.p01.tolist() == OWN["state_01"]
    assert warned(caplog) == ""
    # without model.stat the weights' own scale goes before the dataset's
    plain = load_settings(preset, [*sets, f"model.ckpt={trained}"], env={})
    adapter = Path(post_train.run(plain, PostTrainRequest(output=tmp_path / "post"))["adapter"])
    stat = stored_scale(adapter)
    assert stat is not None and stat.p99.tolist() == OWN["state_99"]
    assert scale_of(plain, open_store(plain), [adapter, trained]).origin == f"carried by {adapter}"
    # a shipped preset's word is overridden, the user's own is not; both are told by dimension
    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps({"state_01": [-2.0] * 6 + [-1], "state_99": [2.0] * 7}))
    for said, used in ((False, -2.0), (True, -1.0)):
        caplog.clear()
        asked = _unsaid(plain, str(shipped), said)
        with caplog.at_level(logging.WARNING, "persistworld_cli"):
            assert scale_of(asked, open_store(asked), [trained]).stat.p01[6] == used
        assert "gripper" in warned(caplog) and "roll" not in warned(caplog)


def _unsaid(own: Any, stat: str = "", said: bool = False) -> Any:

    return replace(own, model=replace(own.model, stat=stat, stat_given=said))


# -- the commands -------------------------------------------------------------------------------------------------


def shrink(world: Path, root: Path, index: bool) -> Path:
    """The world with poses 55 times too small, beside the weights' own percentiles; returns its preset."""
    shutil.copytree(world / "world", root / "world")
    for file in (root / "world" / "annotation").rglob("*.json"):
        note = json.loads(file.read_text())
        note["states"] = (np.array(note["states"]) / 55).tolist()
        file.write_text(json.dumps(note))
    tensors = load_file(world / "base.safetensors")
    save_safetensors(root / "base.safetensors", tensors, {"action_scale": (world / "world/meta/stat.json").read_text()})
    if not index:
        (root / "world" / "meta" / "index.safetensors").unlink()
    return write_preset(root / "small.toml", settings(root))


def test_a_command_says_that_poses_are_55_times_too_small(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    preset = shrink(world, tmp_path, index=False)

    monkeypatch.setattr(launcher, "run_task", run_in_process)
    arguments = ["--preset", str(preset), "--output", str(tmp_path / "out"), "--steps", "1"]
    for command in (["replay"], ["eval", "--benchmark", "none"], ["frontier", "--benchmark", "none", "--calls", "1"]):
        done = CliRunner().invoke(app, [*command, *arguments, "--strict-actions"])
        assert done.exit_code == 1 and "--strict" not in done.stdout, (done.stderr, done.exception)
        for name in ("x", "y", "z"):
            assert f"  {name:8}data -0.00" in done.stderr, done.stderr
        assert "carried by" in done.stderr and "Traceback" not in done.stderr
    with caplog.at_level(logging.WARNING, "persistworld_cli"):
        done = CliRunner().invoke(app, ["replay", *arguments])
    assert (
        done.exit_code == 0 and warned(caplog).count("do not look like") == 1 and "--strict-actions" in warned(caplog)
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING, "persistworld_cli"):  # the same world as it was
        replay.run(settings(world, steps=1), ReplayRequest(output=tmp_path / "right"))
    assert warned(caplog) == ""


def test_training_refuses_wrong_poses_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:

    preset = shrink(world, tmp_path, index=True)
    own = load_settings(str(preset), ["model.strict_actions=true", "clips.workers=0"], env={})
    for task, kind in ((pretrain.run, PretrainRequest), (post_train.run, PostTrainRequest)):
        with pytest.raises(PersistWorldError, match="do not look like") as refused:
            task(own, kind(output=tmp_path / "run"))
        assert "index.safetensors" in str(refused.value.where)
    assert pose_findings(open_store(own).stat(), Poses(np.zeros((5, 7)), 3, "")) != []
    free = replace(own, model=replace(own.model, strict_actions=False))
    assert scale_of(free, open_store(free), []).origin.startswith("the dataset's own")


def test_every_dataset_of_a_mixture_is_compared_with_the_scale_of_the_first(world: Path, tmp_path: Path) -> None:
    shrink(world, tmp_path, index=True)
    own = settings(world)
    own = replace(
        own,
        model=replace(own.model, strict_actions=True),
        clips=replace(own.clips, workers=0, datasets={own.world.dataset: 0.8, str(tmp_path / "world"): 0.2}),
    )
    with pytest.raises(PersistWorldError, match="do not look like") as refused:
        pretrain.run(own, PretrainRequest(output=tmp_path / "run", scratch=True))
    assert str(tmp_path / "world") in str(refused.value.where)


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """A run that is resumed writes what an unbroken one would: the library's order of notes changes from run to run."""
    notes = {"action_scale": json.dumps(OWN), "name": "größer", **{str(i): "x" for i in range(9)}}
    save_safetensors(tmp_path / "one.safetensors", {"a": torch.ones(3)}, notes)
    save_safetensors(tmp_path / "two.safetensors", {"a": torch.ones(3)}, dict(reversed(notes.items())))
    whole = (tmp_path / "one.safetensors").read_bytes()
    assert whole == (tmp_path / "two.safetensors").read_bytes()
    assert load_file(tmp_path / "one.safetensors")["a"].tolist() == [1, 1, 1]
    assert read_notes(tmp_path / "one.safetensors") == notes
