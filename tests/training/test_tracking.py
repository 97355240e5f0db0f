"""A run's numbers, in its log and in trackers: nothing twice and nothing lost when it is resumed."""

from __future__ import annotations

import importlib.util
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import LaunchSettings, Settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import CannotWrite
from persistworld_cli.reports.curves import POST_TRAIN_PANELS, training_curves
from persistworld_cli.training.run import Run
from persistworld_cli.training.tracking import wanted_trackers

SETTINGS = Settings(launch=LaunchSettings(device="cpu"))


def begin(output: Path, resume: bool = True, settings: Settings = SETTINGS) -> Run:
    return Run(output, cpu=True, resume=resume, settings=settings)


def logged(output: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())]


def shown(output: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(output / "tensorboard" / "persistworld"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def broken_run(output: Path, saved: int | None) -> None:
    """Three updates, a state after one of them (or none), and an end."""
    with begin(output) as work:
        for step in (1, 2, 3):
            work.log(step, {"loss": float(step)})
            if step == saved:
                work.save(step, {})
    for file in output.rglob("events.out.tfevents.*"):  # TensorBoard orders files by the second in which they began
        began = file.name.split(".")[3]
        file.rename(file.with_name(file.name.replace(began, str(int(began) - 1), 1)))


def test_a_resumed_run_goes_on_in_its_log_and_in_tensorboard(tmp_path: Path) -> None:
    broken_run(tmp_path, saved=2)
    with begin(tmp_path) as work:
        assert work.load() == {"step": 2}
        for step in (3, 4):
            work.log(step, {"loss": 10.0 * step})
    assert logged(tmp_path) == shown(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_what_was_logged_before_the_first_state_is_logged_again(tmp_path: Path) -> None:
    broken_run(tmp_path, saved=None)
    with begin(tmp_path) as work:
        assert work.load() is None
        work.log(1, {"loss": 5.0})
    assert logged(tmp_path) == shown(tmp_path) == [(1, 5.0)]


def test_a_line_and_a_state_that_were_cut_off_are_dropped(tmp_path: Path) -> None:
    broken_run(tmp_path, saved=2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    (tmp_path / "state" / ".step-00000004.99.partial").mkdir()
    with begin(tmp_path) as work:
        work.load()
        assert [entry["step"] for entry in work.history()] == [1, 2]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000002"]


def test_a_run_begun_anew_is_another_one(tmp_path: Path) -> None:
    broken_run(tmp_path, saved=2)
    before = (tmp_path / "tracker.json").read_text()
    with begin(tmp_path, resume=False) as work:
        assert work.load() is None
        work.log(1, {"loss": 7.0})
    assert logged(tmp_path) == shown(tmp_path) == [(1, 7.0)]
    assert (tmp_path / "tracker.json").read_text() != before


def test_without_trackers_there_is_the_log_alone(tmp_path: Path) -> None:
    none = replace(SETTINGS, launch=replace(SETTINGS.launch, trackers=("none",)))
    with begin(tmp_path, settings=none) as work:
        work.log(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    settings = replace(SETTINGS, launch=replace(SETTINGS.launch, trackers=("tensorboard", name)))
    with pytest.raises(PersistWorldError, match=f"needs the package '{name}'") as caught:
        begin(tmp_path / "run", settings=settings)
    assert f"pip install {name}" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


def test_trackio_has_every_number_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not importlib.util.find_spec("trackio"):
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import sqlite3

    own = replace(SETTINGS, launch=replace(SETTINGS.launch, trackers=("trackio",)))
    for steps in ((1, 2), (2, 3)):
        with begin(tmp_path / "run", settings=own) as work:
            for step in steps:
                work.log(step, {"loss": float(step)})
    with sqlite3.connect(tmp_path / "trackio" / "persistworld.db") as base:
        assert [row[0] for row in base.execute("select step from metrics order by step")] == [1, 2, 3]


def test_names_of_trackers() -> None:
    assert wanted_trackers(("tensorboard", "tensorboard")) == ("tensorboard",) and wanted_trackers(("none",)) == ()
    assert load_settings("tiny", ["launch.trackers=wandb,trackio"], env={}).launch.trackers[0] == "wandb"
    for wrong, message in (("wanb", "'wanb' is not one of tensorboard"), ("none,wandb", "'none' excludes the others")):
        with pytest.raises(UsageError, match=message):
            load_settings("tiny", [f"launch.trackers={wrong}"], env={})


@pytest.mark.parametrize("updates", [1, 60])
def test_curves_of_what_was_logged(tmp_path: Path, updates: int) -> None:
    history = [{"step": step, "reward": 1.0 + 0.1 * (step % 7), "group_spread": 0.1} for step in range(1, updates + 1)]
    history[-1] |= {"val_reward": 1.1, "val_base": 1.0}
    training_curves(tmp_path / "curves.png", "post-training", history, POST_TRAIN_PANELS)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1200
    training_curves(tmp_path / "none.png", "post-training", [{"step": 1, "lr": 0.1}], POST_TRAIN_PANELS)
    assert not (tmp_path / "none.png").exists()


def test_a_full_disk_is_told_once_by_tensorboard_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(CannotWrite, match="File too large") as told, begin(tmp_path) as work:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))  # of any file: as on a full disk
        try:
            for step in range(1, 9):
                work.log(step, {"loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(told.value.where).endswith("tensorboard") and "Traceback" not in capfd.readouterr().err
