"""Going on in a folder that holds finished work: it is said, changed settings are refused, and never mixed."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_groups import small_groups
from typer.testing import CliRunner

from persistworld_cli import command_line
from persistworld_cli.checkpoints.compatibility import preset_shapes
from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import flatten
from persistworld_cli.config.requests import (
    EvalRequest,
    ExtractRequest,
    PostTrainRequest,
    PretrainRequest,
    ReplayRequest,
    TaskRequest,
)
from persistworld_cli.config.resume import USES, is_free, used_keys
from persistworld_cli.config.settings import FREE, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation import run as evaluation
from persistworld_cli.evaluation.plan import make_plan
from persistworld_cli.files import write_json
from persistworld_cli.launch.continuing import HISTORY, find_earlier_run, find_finished_work, what_remains
from persistworld_cli.launch.launcher import _record, run_task
from persistworld_cli.rollout.finished import log_finished
from persistworld_cli.rollout.recording import Item
from persistworld_cli.training import post_train

COMMAND = ["persistworld", "post-train", "--set", "post_train.beta=0.1", "--output", "runs/first"]


@pytest.fixture(scope="module")
def world(small_world: Settings) -> Settings:
    """A small recorded world; two short updates."""
    options = small_groups(
        updates=2,
        prefix_max=0,
        lora_rank=4,
        save_every=1,
        beta=0.5,
        lr=0.002,
    )
    launch = replace(small_world.launch, trackers=("none",))
    return replace(small_world, post_train=options, launch=launch)


@contextmanager
def only_what_counts(task: str) -> Iterator[None]:
    """Every setting that is read meanwhile must count for the task: else a change of it would go unseen."""
    preset_shapes("ctrl-world")  # of which weights' names are recognised: from presets, read once in a process
    seen: set[str] = set()

    def recorder(table: str, names: set[str]) -> Callable[[Any, str], Any]:
        def get(self: Any, name: str) -> Any:
            if name in names:
                seen.add(f"{table}.{name}")
            return object.__getattribute__(self, name)

        return get

    with pytest.MonkeyPatch.context() as patch:
        for table in dataclasses.fields(Settings):
            cls: Any = table.default_factory
            own = {field.name for field in dataclasses.fields(cls)}
            patch.setattr(cls, "__getattribute__", recorder(table.name, own))
        yield
    uncounted = {key for key in seen if not key.startswith("launch.")} - set(used_keys(task))
    uncounted -= {"sampling.history_policy"}  # a protocol takes all of the table but this one
    uncounted -= {"robot.name", "robot.dimensions", "robot.limits", "world.state_fields"}  # in messages and the card
    assert len(seen) > 50 and not uncounted, f"{task} reads what does not count for it: {sorted(uncounted)}"


@pytest.fixture(scope="module")
def finished(world: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its record; not to be written to."""
    output = tmp_path_factory.mktemp("runs") / "first"
    with only_what_counts("post-train"):
        post_train.run(world, PostTrainRequest(output=output))
    write_json(output / "config.json", record(world, output))
    return output


def record(
    settings: Settings, output: Path, kind: type[TaskRequest] = PostTrainRequest, **request: Any
) -> dict[str, Any]:
    return _record(settings, kind(output=output, **request), "20260101-000000-abcdef")


def changed(settings: Settings, **options: Any) -> Settings:
    return replace(settings, post_train=replace(settings.post_train, **options))


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time it was written."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_changed_setting_is_refused_by_name_with_two_ways_on_and_nothing_is_written(
    world: Settings, finished: Path
) -> None:
    before = tree(finished)
    asked = changed(world, beta=0.1, lr=0.5, updates=9, save_every=7)
    with pytest.raises(UsageError) as refusal:
        run_task(asked, PostTrainRequest(output=finished, command=COMMAND))
    text = str(refusal.value)
    assert "post_train.beta: 0.5 -> 0.1" in text and "post_train.lr: 0.002 -> 0.5" in text
    assert "updates:" not in text and "save_every" not in text
    assert "update 2, saved at 20" in text
    fresh = shlex.join([*COMMAND[:-1], str(finished.with_name("first-2"))])
    assert fresh in text and shlex.join([*COMMAND, "--continue-with-changes"]) in text
    assert tree(finished) == before


def test_the_flag_goes_on_and_keeps_the_settings_update_by_update(
    world: Settings, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    asked = changed(world, beta=0.1, updates=3)
    code, result = run_task(asked, PostTrainRequest(output=output, command=COMMAND, with_changes=True))
    told = capfd.readouterr().err
    assert code == 0 and result["updates"] == 3
    assert "changed on request since update 2, saved at" in told and "post_train.beta: 0.5 -> 0.1" in told
    assert "changed since update 2" in told and "post_train.updates: 2 -> 3" in told
    assert "resuming from update 2 of 3, saved at 20" in told
    assert json.loads((output / "config.json").read_text())["settings"]["post_train"]["beta"] == 0.1
    history = json.loads((output / HISTORY).read_text())
    assert [(entry["from"], entry["settings"]["post_train"]["beta"]) for entry in history] == [(0, 0.5), (2, 0.1)]
    assert history[1]["changed"] == {"post_train.beta": [0.5, 0.1], "post_train.updates": [2, 3]}
    with pytest.raises(UsageError, match=r"post_train\.beta: 0\.1 -> 0\.5"):  # the first settings are changed ones now
        run_task(changed(world, updates=3), PostTrainRequest(output=output, command=COMMAND))
    with caplog.at_level(logging.INFO, "persistworld_cli"):
        post_train.run(asked, PostTrainRequest(output=output))
    assert "finished; nothing was trained: the run is at update 3, saved at 20" in caplog.text


def test_what_a_task_does_not_use_may_change_and_what_the_run_did_not_know_is_listed(
    world: Settings, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(world, drive=replace(world.drive, seed=5), pretrain=replace(world.pretrain, lr=7.0))
    past = find_earlier_run(record(asked, finished), finished)
    assert past is not None and not past.changes and capsys.readouterr().err == ""
    old = tmp_path / "old"  # of a version that knew neither the inputs nor one of the settings
    shutil.copytree(finished, old)
    whole = json.loads((old / "config.json").read_text())
    del whole["inputs"], whole["settings"]["post_train"]["credit"]
    whole["settings"]["post_train"]["gone"] = 3
    write_json(old / "config.json", whole)
    assert find_earlier_run(record(world, old), old) is not None
    told = capsys.readouterr().err
    assert "not known to the saved run since update 2" in told and "post_train.credit: none -> rollout" in told
    assert "no longer a setting" in told and "post_train.gone: 3 -> none" in told


def test_a_record_of_before_that_says_job_is_read(world: Settings, tmp_path: Path) -> None:
    """As the program wrote it until requests had classes: ``job`` with null for what was not given."""
    (tmp_path / "rollouts" / "model-a").mkdir(parents=True)
    (tmp_path / "rollouts" / "model-a" / "9_0_0.npz").touch()
    old = record(world, tmp_path, EvalRequest, baseline=world.model.ckpt)
    del old["request"]
    old["job"] = {"baseline": world.model.ckpt, "study": None, "compare": None, "output": str(tmp_path)}
    old["inputs"]["job.baseline"] = old["inputs"].pop("request.baseline")
    write_json(tmp_path / "config.json", old)
    same = find_earlier_run(record(world, tmp_path, EvalRequest, baseline=world.model.ckpt), tmp_path)
    assert same is not None and not same.changes
    with pytest.raises(UsageError, match=r"request\.baseline: .*base\.safetensors -> none"):
        find_earlier_run(record(world, tmp_path, EvalRequest), tmp_path)


def test_weights_count_by_what_they_hold_and_data_by_its_scale(world: Settings, tmp_path: Path) -> None:
    root = Path(world.model.ckpt).parent
    ckpt, moved = tmp_path / "base.safetensors", tmp_path / "moved.safetensors"
    for copy in (ckpt, moved):
        shutil.copyfile(world.model.ckpt, copy)
    (tmp_path / "state" / "step-00000001").mkdir(parents=True)
    (tmp_path / "state" / "step-00000001" / "state.pt").touch()
    own = replace(world, model=replace(world.model, ckpt=str(ckpt)))
    write_json(tmp_path / "config.json", record(own, tmp_path))
    there = replace(own, model=replace(own.model, ckpt=str(moved)))
    assert find_earlier_run(record(there, tmp_path), tmp_path) is not None  # the same weights in another place
    shutil.copyfile(root / "other.safetensors", ckpt)
    with pytest.raises(UsageError, match=r"model\.ckpt, what .*base\.safetensors holds: \w{12} -> \w{12}"):
        find_earlier_run(record(own, tmp_path), tmp_path)
    shutil.copyfile(moved, ckpt)
    data = tmp_path / "data"
    shutil.copytree(world.world.dataset, data)
    (data / "meta" / "stat.json").write_text("{}")
    other = replace(own, world=replace(own.world, dataset=str(data)))
    with pytest.raises(UsageError, match=r"world\.dataset: .*world -> .*data"):
        find_earlier_run(record(other, tmp_path), tmp_path)


def test_resuming_from_another_run_compares_with_that_one(world: Settings, finished: Path, tmp_path: Path) -> None:
    state = finished / "state" / "step-00000001"
    past = find_earlier_run(record(world, tmp_path, resume_from=state), tmp_path)
    assert past is not None and past.work.count == 1 and not past.changes
    with pytest.raises(UsageError, match=r"post_train\.beta: 0\.5 -> 0\.1") as refusal:
        find_earlier_run(record(changed(world, beta=0.1), tmp_path, resume_from=state, command=COMMAND), tmp_path)
    assert "leave --resume-from out" in str(refusal.value)
    assert find_earlier_run(record(changed(world, beta=0.1), finished, resume=False), finished) is None


def test_a_folder_with_the_work_of_another_task_is_refused(world: Settings, finished: Path) -> None:
    for kind in (PretrainRequest, EvalRequest, ReplayRequest):
        with pytest.raises(UsageError, match="holds the work of post-train") as refusal:
            find_earlier_run(record(world, finished, kind, command=("persistworld", kind.task)), finished)
        assert f"persistworld {kind.task} --output {finished.with_name('first-2')}" in str(refusal.value)


def test_an_evaluation_says_what_is_there_and_refuses_another_question(
    world: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.safetensors"
    model = replace(world.model, inference=str(own))
    asked = replace(world, model=model, eval=replace(world.eval, steps=1, sheets=0))
    baseline = world.model.ckpt
    shutil.copyfile(Path(world.model.ckpt).with_name("other.safetensors"), own)
    output = tmp_path / "out"
    with only_what_counts("eval"):
        evaluation.run(asked, EvalRequest(output=output, baseline=baseline))
    write_json(output / "config.json", record(asked, output, EvalRequest, baseline=baseline))
    device = torch.device("cpu")
    plan = make_plan(asked, output, device, baseline=baseline)
    with caplog.at_level(logging.INFO, "persistworld_cli"):
        log_finished(list(plan.folders.values()), plan.items)
        log_finished(list(plan.folders.values()), [*plan.items, Item("9", 0, 1)])
    said = ["finished; nothing was rolled out: all 4 rollouts exist already", "resuming: 4 of 8 rollouts are finished"]
    assert caplog.messages[-2:] == said
    other = replace(asked, model=replace(asked.model, motion_bucket_id=9))
    with pytest.raises(UsageError, match=r"model\.motion_bucket_id: 127 -> 9"):
        find_earlier_run(record(other, output, EvalRequest, baseline=baseline), output)
    # with --continue-with-changes: not one rollout is taken for another
    apart = make_plan(other, output, device, baseline=baseline)
    assert not set(plan.folders.values()) & set(apart.folders.values())
    bare = replace(asked, model=world.model)
    with pytest.raises(UsageError, match=r"model\.inference: .*own\.safetensors -> none"):
        find_earlier_run(record(bare, output, EvalRequest, baseline=baseline), output)
    more = replace(asked, eval=replace(asked.eval, seeds=(0, 1), bootstrap=7))
    shutil.copyfile(world.model.ckpt, own)  # the training that is evaluated has gone on
    past = find_earlier_run(record(more, output, EvalRequest, baseline=baseline), output)
    assert past is not None and len(past.changes.free) == 3 and "eval.seeds: 0 -> 0, 1" in capsys.readouterr().err


def test_the_command_refuses_and_prints_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = Path("outputs/post-train-tiny/state/step-00000002")
    state.mkdir(parents=True)
    (state / "state.pt").touch()
    from persistworld_cli.config.presets import load_settings

    first = load_settings("tiny", ["post_train.beta=0.5"])
    write_json(state.parents[1] / "config.json", record(first, state.parents[1]))
    words = ["post-train", "--set", "post_train.beta=0.1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["persistworld", *words])
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 2 and "post_train.beta: 0.5 -> 0.1" in told.output
    assert f"persistworld {shlex.join(words)} --output outputs/post-train-tiny-2\n" in told.output
    assert f"persistworld {shlex.join(words)} --continue-with-changes\n" in told.output
    assert sorted(path.name for path in state.parents[1].iterdir()) == ["config.json", "state"]


def test_a_fresh_folder_and_the_same_command() -> None:
    command = ["persistworld", "eval", "-o", "a", "--steps", "3", "--output=b", "--continue-with-changes"]
    assert command_line.with_output(command, Path("c")) == "persistworld eval --steps 3 --output c"
    extract = ["persistworld", "extract-latents", "raw", "out", "--dtype", "bf16"]
    assert (
        command_line.with_dataset(extract, "out", Path("out-2"))
        == "persistworld extract-latents raw out-2 --dtype bf16"
    )
    assert command_line.with_dataset(extract[:2], "out", Path("out-2")).endswith("--set world.dataset=out-2")


def test_fresh_folders_are_numbered_from_two(tmp_path: Path) -> None:
    for name, fresh in (("run", "run-2"), ("run-2", "run-3"), ("run-3", "run-4"), ("lr-4", "lr-4-2")):
        (tmp_path / name).mkdir()
        assert command_line.unused_folder(tmp_path / name).name == fresh


def test_every_setting_is_classified() -> None:
    """By a table or by itself as free, or used by a task that keeps work; what neither says is for extraction alone."""
    counted = {key for task in USES for key in used_keys(task)}
    kept = ("world.state_fields", "world.joint_fields", "world.val_rule")  # extract.json has them
    for table in dataclasses.fields(Settings):
        assert dict(table.metadata) in ({}, FREE), table.name
        for field in dataclasses.fields(table.default_factory):  # type: ignore[arg-type]
            key = f"{table.name}.{field.name}"
            assert dict(field.metadata) in ({}, FREE), key
            free = FREE in (dict(table.metadata), dict(field.metadata))
            assert free or key in counted or key in (*kept, "sampling.history_policy"), f"{key} is not classified"
    assert all(is_free("post-train", f"post_train.{name}") for name in ("updates", "save_every", "keep", "micro_batch"))
    assert is_free("eval", "eval.starts") and not is_free("post-train", "eval.starts")
    known = flatten(Settings())
    assert all(key in known for key in counted if not key.startswith("request."))


def test_work_is_found_by_its_kind(tmp_path: Path) -> None:
    assert find_finished_work("post-train", tmp_path) is None and find_finished_work("drive", tmp_path) is None
    for step in ("step-00000003", "step-00000012", "step-backup"):
        (tmp_path / "state" / step).mkdir(parents=True)
    found = find_finished_work("pretrain", tmp_path)
    assert found is not None and found.count == 12


@pytest.mark.parametrize(
    "damaged", [b"[" * 100_000, b'{"settings": 3}', b"17", b'{"settings": {"world": 3}}', b"\xff\xfe"]
)
def test_a_damaged_record_is_one_error(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "config.json").write_bytes(damaged)
    (tmp_path / "state" / "step-00000001").mkdir(parents=True)
    with pytest.raises(PersistWorldError, match="record of the folder's run cannot be read") as error:
        find_earlier_run({"task": "post-train", "request": {}, "settings": {}}, tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_an_interrupted_run_says_what_is_saved_and_how_to_continue(tmp_path: Path) -> None:
    command = ("persistworld", "post-train", "--no-resume", "--resume-from", "x", "--resume-from=y", "--lr", "1 e")
    request = PostTrainRequest(output=tmp_path, command=command)
    assert what_remains(request).startswith("post-train: stopped; nothing was saved")
    (tmp_path / "state" / "step-00000012").mkdir(parents=True)
    kept, _, again = what_remains(request).partition("\n")
    assert f"{tmp_path} holds update 12, saved at" in kept
    assert again == "    persistworld post-train --lr '1 e'"
    extraction = ExtractRequest(output=tmp_path, command=("persistworld", "extract-latents"))
    assert "finished episodes are kept" in what_remains(extraction)
