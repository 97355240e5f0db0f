"""The blind study: its folder and key, the page clicked through in a real browser, the report, and users' mistakes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Page, wait_for
from eval_world import make_world, settings
from typer.testing import CliRunner, Result

from persistworld_cli.commands.app import app
from persistworld_cli.config.requests import EvalRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.raw.video import read_frames
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation import run as eval_run
from persistworld_cli.evaluation.plan import make_plan
from persistworld_cli.rollout.finished import load_latents
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.recording import Item, load_recording
from persistworld_cli.study.key import StudyKey, key_path, load_key, make_key
from persistworld_cli.study.page import GAP, LINE, pane, write_question, write_study_page
from persistworld_cli.study.responses import read_study, study_result
from persistworld_cli.study.write import plan_study

MODELS = ({"label": "base", "ckpt_sha256": "aa"}, {"label": "new", "ckpt_sha256": "bb"})
CPU = torch.device("cpu")
RED, GREEN, GREY = (200, 20, 20), (20, 200, 20), (120, 120, 120)


def small_key(secret: str = "s", episodes: int = 4, models: tuple[dict[str, str], ...] = MODELS) -> StudyKey:
    """A study of some episodes and two camera groups."""
    return make_key(secret, [(str(e), 0, 0) for e in range(episodes)], ["exterior", "wrist"], models, {"steps": 2})


def answers_of(key: StudyKey, rater: str, chosen: list[int]) -> dict[str, Any]:
    """A file as the page writes it; ``chosen``: a model for each trial in the key's order, -1 neither."""
    listed = []
    for trial, model in zip(key.trials, chosen, strict=False):
        choice = "neither" if model < 0 else "a" if trial.first == model else "b"
        side = "" if model < 0 else "left"
        listed.append({"trial": trial.id, "choice": choice, "side": side, "seconds": 3.0, "plays": 1})
    return {"kind": "persistworld study answers", "version": 1, "study": key.study, "rater": rater, "answers": listed}


def handed_in(folder: Path, key: StudyKey, **raters: list[int]) -> list[Path]:
    """Answer files, one a rater, and the key beside their folder."""
    key.save(folder / "study.key.json")
    files = [folder / "answers" / f"{rater}.json" for rater in raters]
    files[0].parent.mkdir(exist_ok=True)
    for path, (rater, chosen) in zip(files, raters.items(), strict=True):
        path.write_text(json.dumps(answers_of(key, rater, chosen)))
    return files


def report(*arguments: object) -> Result:
    """``persistworld study-report ARGUMENTS``."""
    return CliRunner().invoke(app, ["study-report", *map(str, arguments)])


# -- the key ------------------------------------------------------------------------------------------------------


def test_sides_are_even_drawn_from_the_secret_and_not_to_be_told_from_ids() -> None:
    key = small_key(episodes=20)
    assert key == small_key(episodes=20) and len(key.trials) == 40 == len({trial.id for trial in key.trials})
    assert sum(trial.first for trial in key.trials) == 20
    other = small_key("t", episodes=20)
    assert other.study != key.study and not {t.id for t in other.trials} & {t.id for t in key.trials}
    sides = {(t.episode, t.cameras): t.first for t in key.trials}
    assert any(sides[t.episode, t.cameras] != t.first for t in other.trials)
    by_id = [trial.first for trial in sorted(key.trials, key=lambda trial: trial.id)]
    assert by_id not in ([0, 1] * 20, [1, 0] * 20, [0] * 20 + [1] * 20)
    some = make_key("s", [(str(e), 0, 0) for e in range(20)], ["all"], MODELS, {}, limit=6)
    assert len(some.trials) == 6 and sum(trial.first for trial in some.trials) == 3


# -- eval --study -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    make_world(folder, {"29": 7})
    return folder


def request(root: Path, study: str = "study") -> EvalRequest:
    """Two models compared (`compared`), and a study of it."""
    return EvalRequest(output=root / "out", study=root / study)


def compared(root: Path, **ev: Any) -> Settings:
    """Settings under which ``other`` is compared with ``base``."""
    own = settings(root, **ev)
    return replace(own, model=replace(own.model, inference=str(root / "other.safetensors")))


def test_eval_writes_a_study_whose_videos_are_the_key_s(world: Path) -> None:
    s = compared(world, sheets=0)
    told = eval_run.run(s, request(world))["study"]
    folder, key = world / "study", load_key(world / "study.key.json")
    assert (
        told["questions"] == 2 and told["page"] == str(folder / "index.html") and told["key"] == str(key_path(folder))
    )
    handed_out = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for secret in (key.secret, "base.safetensors", "other.safetensors", *(m["ckpt_sha256"] for m in key.models)):
        assert secret.encode() not in handed_out
    assert {path.name for path in (folder / "videos").iterdir()} == {f"{trial.id}.mp4" for trial in key.trials}

    plan = make_plan(s, world / "out", CPU)
    trial = next(t for t in key.trials if t.cameras == "exterior" and t.episode == "29")
    item = Item(trial.episode, trial.start, trial.seed)
    recording = load_recording(plan.store, "val", item, 2, 5)
    film = read_frames(folder / "videos" / f"{trial.id}.mp4", range(7))  # the start, and what was recorded after it
    wide = pane(recording.first[None, :2]).shape[2]
    high = pane(recording.first[None, :1]).shape[1]
    assert film.shape[1:3] == (2 * high + LINE, 3 * wide + 2 * GAP)
    order = [plan.models[trial.first].label, plan.models[1 - trial.first].label]
    models = {weights.label: plan.load(weights.ref) for weights in plan.models}
    drawn = [draw_frames(models[name], load_latents(plan.folders[name], item), s.sampling)[:6] for name in order]
    for place in range(3):
        left = place * (wide + GAP)
        shown = film[1:, :, left : left + wide].astype(float)
        errors = [np.abs(shown - pane(other[:, :2])).mean() for other in (recording.frames[:6], *drawn)]
        assert int(np.argmin(errors)) == place and errors[place] < 4

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    again = eval_run.run(s, request(world))["study"]
    assert again == told and load_key(key_path(folder)) == key
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == before


def test_a_study_shows_all_cameras_at_once_or_fewer_questions(world: Path) -> None:
    s = compared(world, sheets=0, study_cameras="all", study_trials=1)
    assert eval_run.run(s, request(world, "all"))["study"]["questions"] == 1
    key = load_key(world / "all.key.json")
    assert [trial.cameras for trial in key.trials] == ["all"]
    assert "exterior 1 left, exterior 2 left, wrist left" in (world / "all" / "index.html").read_text()


def test_study_mistakes_are_named_before_any_compute(world: Path, tmp_path: Path) -> None:
    s, items = settings(world), [Item("9", 0, 0)]
    with pytest.raises(UsageError, match="compares two models"):
        plan_study(tmp_path / "s", s, items, MODELS[:1], {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_text("x")
    with pytest.raises(UsageError, match="something else"):
        plan_study(tmp_path / "full", s, items, MODELS, {})
    plan_study(tmp_path / "s", s, items, MODELS, {}).save(tmp_path / "s.key.json")
    with pytest.raises(PersistWorldError, match="other rollouts"):
        plan_study(tmp_path / "s", s, [Item("9", 1, 0)], MODELS, {})
    with pytest.raises(PersistWorldError, match="other rollouts"):
        plan_study(tmp_path / "s", replace(s, eval=replace(s.eval, study_trials=1)), items, MODELS, {})
    assert plan_study(tmp_path / "s", s, items, MODELS, {}) == load_key(tmp_path / "s.key.json")
    (tmp_path / "t.key.json").write_text("[]")
    with pytest.raises(PersistWorldError, match="not the key of a study"):
        plan_study(tmp_path / "t", s, items, MODELS, {})


# -- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def coloured(tmp_path: Path) -> tuple[Path, StudyKey]:
    """A study in which the baseline's videos are red, the new model's green and the recording grey."""
    key, folder = small_key(episodes=3), tmp_path / "study"
    colours = [np.full((4, 1, 48, 80, 3), colour, np.uint8) for colour in (RED, GREEN, GREY)]
    questions = [
        write_question(folder, t.id, [colours[2], colours[t.first], colours[1 - t.first]], t.cameras, "</script>", 5.0)
        for t in key.trials
    ]
    write_study_page(folder, key.study, questions, 5.0)
    key.save(key_path(folder))
    return folder, key


def green_side(page: Page) -> str:
    """Where the new model is, as a person sees it."""
    seen = {side: page.colour(f"#{side}") for side in ("recorded", "left", "right")}
    near = {
        side: min((RED, GREEN, GREY), key=lambda c: np.abs(np.subtract(c, rgb)).sum()) for side, rgb in seen.items()
    }
    assert near["recorded"] == GREY and {near["left"], near["right"]} == {RED, GREEN}
    return "left" if near["left"] == GREEN else "right"


def asked(page: Page, index: int) -> None:
    """Wait for a question, counted from 0."""
    page.wait(f"at === {index} && phase === 'asking' && document.getElementById('end').hidden")


def sign_in(page: Page, name: str) -> None:
    page.wait("document.activeElement.id === 'name'")
    page.js("document.getElementById('name').value = ''")
    page.type(name)
    page.key("Enter")


def saved(page: Page) -> Path:
    """Press "save the answers" and wait for the file."""
    page.click("#end .save")
    name = page.js("document.getElementById('saved').textContent.match(/saved as (.*\\.json),/)[1]")
    path = page.downloads / name
    wait_for(path.exists, f"download of {name}")
    return path


def test_a_rater_clicks_through_the_page_and_the_report_says_what_was_preferred(
    coloured: tuple[Path, StudyKey], new_page: Callable[[], Page]
) -> None:
    folder, key = coloured
    page = new_page()
    page.open(folder / "index.html")
    sign_in(page, "Änne <b>")
    sides, last = [], len(key.trials) - 1
    for index in range(len(key.trials)):
        asked(page, index)
        sides.append(green_side(page))
        if index == 1:  # the wrong one; then back, where it is marked, and the right one
            page.key("1" if sides[1] == "right" else "2")
            asked(page, 2)
            page.key("ArrowLeft")
            asked(page, 1)
            assert page.js("document.querySelectorAll('button.chosen').length") == 1 and green_side(page) == sides[1]
        if index == 3:  # the tab is closed and opened again
            page.open(folder / "index.html")
            assert page.js("document.getElementById('name').value") == "Änne <b>"
            assert "3 of 6 are answered" in page.js("document.getElementById('again').textContent")
            page.key("Enter")
            asked(page, 3)
            assert green_side(page) == sides[3]
        if index == last:
            page.key("0")
        elif index % 2:
            page.key("1" if sides[index] == "left" else "2")
        else:
            page.click(f"button[data-answer={sides[index]}]" if index else f"#{sides[0]}")
    page.wait("!document.getElementById('end').hidden")
    file = saved(page)
    assert not page.errors and sides.count("left") in (2, 3, 4)

    sheet = json.loads(file.read_text(encoding="utf-8"))
    assert sheet["rater"] == "Änne <b>" and len(sheet["answers"]) == 6
    result = report(file, "--key", key_path(folder), "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    row = next(row for row in told["preference"] if row["cameras"] == "all")
    assert (row["new"], row["prefer_new"], row["prefer_base"], row["cannot_tell"]) == ("new", 5, 0, 1)
    assert told["incomplete"] == 0 and row["kappa"] is None
    assert told["raters"][0]["left"] == pytest.approx(sides[:last].count("left") / last)


def test_sides_and_order_differ_between_raters_and_who_only_presses_one_key_prefers_nobody(
    coloured: tuple[Path, StudyKey], new_page: Callable[[], Page]
) -> None:
    folder, key = coloured
    page = new_page()
    page.open(folder / "index.html")
    files, orders = [], []
    for rater in ("ada", "bob"):
        sign_in(page, rater)
        for index in range(len(key.trials)):
            asked(page, index)
            page.key("1")
        page.wait("!document.getElementById('end').hidden")
        files.append(saved(page))
        orders.append([answer["trial"] for answer in json.loads(files[-1].read_text())["answers"]])
        page.click("#other")
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    keys, read = read_study(files, [key_path(folder)])
    told = study_result(keys, read, samples=50)
    assert [row["left"] for row in told["raters"]] == [1.0, 1.0]
    for file in read:  # each saw each video's "a" on the left in half of the trials
        letters = Counter(one.chosen == one.trial.first for one in file.responses)
        assert letters == {True: 3, False: 3}


def test_the_page_plays_pauses_steps_and_says_where_a_video_is_missing(
    coloured: tuple[Path, StudyKey], new_page: Callable[[], Page]
) -> None:
    folder = coloured[0]
    page = new_page()
    page.open(folder / "index.html")
    sign_in(page, "eve")
    asked(page, 0)
    page.wait("plays >= 1")  # to its end, and again from its start
    page.wait("!film.ended && film.currentTime > 0")
    page.key(" ")
    page.wait("film.paused")
    page.js("film.currentTime = 0")
    page.call("Input.dispatchKeyEvent", type="keyDown", key=".", text=".")
    page.wait("Math.abs(film.currentTime - 0.2) < 0.01")
    page.key(" ")
    page.wait("!film.paused")
    for width, height in ((1920, 1080), (1280, 720), (800, 600)):
        page.size(width, height)
        page.wait(f"innerWidth === {width}")
        page.wait("document.documentElement.scrollWidth <= innerWidth")
        page.wait("document.querySelector('button[data-answer=left]').getBoundingClientRect().bottom < innerHeight")
    page.size(1280, 800)
    assert not page.errors
    for path in (folder / "videos").iterdir():
        path.unlink()
    page.key("1")
    page.wait("at === 1 && !document.getElementById('broken').hidden")
    assert "cannot be played" in page.js("document.getElementById('broken').textContent")
    page.key("1")
    assert page.js("Object.keys(answers).length") == 1  # nobody judges what was not to be seen


# -- the report ---------------------------------------------------------------------------------------------------


def test_report_counts_by_camera_group_and_says_who_is_not_done(tmp_path: Path) -> None:
    key = small_key(episodes=8)
    wrist = [index for index, trial in enumerate(key.trials) if trial.cameras == "wrist"]
    anna = [0 if index in wrist else 1 for index in range(16)]  # the new model outside, the old one at the wrist
    files = handed_in(tmp_path, key, anna=anna, bob=[*anna[:11], -1], carl=[])
    shown = report(*files)
    assert shown.exit_code == 0, shown.stderr
    assert "new against base" in shown.stdout and "12 of 16" in shown.stdout and "0 of 16" in shown.stdout
    assert "incomplete, counted so far: bob (12 of 16), carl (0 of 16)" in shown.stdout
    told = json.loads(report(*files, "--json").stdout)
    rows = {row["cameras"]: row for row in told["preference"]}
    neither = key.trials[11].cameras
    for group, model in (("exterior", "prefer_new"), ("wrist", "prefer_base")):
        own = 8 + sum(trial.cameras == group for trial in key.trials[:12])
        assert rows[group]["responses"] == own and rows[group][model] == own - (group == neither)
        assert rows[group]["raters"] == 2 and rows[group]["episodes"] == 8
    assert rows["exterior"]["verdict"] == "better" and rows["wrist"]["verdict"] == "worse"
    assert rows["all"]["responses"] == 28 and 0.5 < rows["all"]["kappa"] < 1
    assert rows["exterior"]["low"] < rows["exterior"]["rate"] <= rows["exterior"]["high"]
    assert [row["model"] for row in told["elo"]].count("new") == 1 and told["incomplete"] == 2


def test_report_rates_models_of_several_studies_together(tmp_path: Path) -> None:
    third = {"label": "new", "ckpt_sha256": "cccccccc"}
    first, second = small_key(), small_key("t", models=(MODELS[1], third))
    keys, files = read_study(
        [*handed_in(tmp_path / "1", first, ann=[1] * 8), *handed_in(tmp_path / "2", second, ann=[1] * 8)]
    )
    told = study_result(keys, files, samples=20)
    assert [row["model"] for row in told["elo"]] == ["new cccccc", "new bb", "base"] and told["elo_comparable"]
    assert {tuple(study["models"]) for study in told["studies"]} == {("base", "new bb"), ("new bb", "new cccccc")}
    apart = study_result(
        {**{first.study: first}, "x": replace(small_key("u", models=(third, {"label": "z"})), study="x")},
        files[:1],
        samples=20,
    )
    assert not apart["elo_comparable"]


def test_report_refuses_what_it_cannot_count(tmp_path: Path) -> None:
    key = small_key()
    good = handed_in(tmp_path, key, anna=[1] * 8)[0]
    wrong = tmp_path / "wrong.json"

    def told(change: dict[str, Any], *more: object) -> str:
        wrong.write_text(json.dumps({**json.loads(good.read_text()), "rater": "zoe", **change}))
        result = report(good, wrong, *more)
        assert result.exit_code in (1, 2) and not result.stdout
        return result.stderr

    given = ("--key", tmp_path / "study.key.json")
    other = small_key("another")
    assert "answers to study elsewhere" in told({"study": "elsewhere"}, *given)
    assert "no key of study elsewhere" in told({"study": "elsewhere"})
    assert "two files of rater 'Anna'" in told({"rater": "Anna"}, *given)
    assert "holds no answers" in told({"kind": "shopping list"}, *given)
    assert "lacks the study's id or the rater's name" in told({"rater": " "}, *given)
    answer = {"trial": key.trials[0].id, "choice": "a"}
    for bad in ([{**answer, "trial": other.trials[0].id}], [{**answer, "choice": "left"}], [answer, answer], ["a"]):
        assert "an answer that the study does not have" in told({"answers": bad}, *given)
    for arguments, words in (
        ([tmp_path / "absent.json"], "cannot be read: there is no such file"),
        ([tmp_path], "this is a folder"),
        ([tmp_path / "study.key.json"], "is a study's key, not answers"),
        ([good, "--key", good], "not the key of a study"),
        ([good, "--key", tmp_path / "absent"], "not the key of a study: there is no such file"),
    ):
        result = report(*arguments)
        assert result.exit_code in (1, 2) and words in result.stderr, result.stderr
    good.write_text(json.dumps(answers_of(key, "anna", [])))
    assert "no file holds an answer" in report(good, *given).stderr
    good.write_text("{")
    assert "cannot be read" in report(good, *given).stderr
