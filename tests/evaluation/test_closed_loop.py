"""The closed loop, eval and replay with an untrained tiny model of the real classes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_world import HEIGHT, WIDTH, make_world, settings
from PIL import Image

from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.config.requests import EvalRequest, ReplayRequest
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation import plan
from persistworld_cli.evaluation import run as eval_run
from persistworld_cli.interact.replay import run as replay
from persistworld_cli.metrics.referees import load_referees
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.closed_loop import ClosedLoop, reward_of
from persistworld_cli.rollout.engine import RolloutEngine, rollout_noise
from persistworld_cli.rollout.images import draw_frames, to_uint8
from persistworld_cli.rollout.recording import Item, load_recording
from persistworld_cli.rollout.scoring import MOVING, SHOWN

BUNDLED = tuple(str(episode) for episode in range(60, 80))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_world(folder, {"9": 14, "19": 12, "29": 7})
    return folder


@pytest.fixture(scope="module")
def store(root: Path) -> EpisodeStore:
    return EpisodeStore(root / "world")


@pytest.fixture(scope="module")
def model(root: Path) -> WorldModel:
    s = settings(root)
    return load_world_model(s.model, s.world, adapter="")


def test_recording_lines_up_with_the_rollout(store: EpisodeStore) -> None:
    recording = load_recording(store, "val", Item("29", 1, 0), steps=2, num_frames=5)
    assert recording.frame_ids.tolist() == [2, 3, 4, 5, 6, 6, 6, 6]
    assert recording.valid.tolist() == [True] * 5 + [False] * 3
    assert recording.row_ids(0, 5).tolist() == [1, 2, 3, 4, 5] and recording.row_ids(1, 5).tolist() == [5, 6, 6, 6, 6]
    np.testing.assert_array_equal(recording.poses(1, 5)[1], recording.annotation.states[6])
    np.testing.assert_array_equal(recording.frames[0], store.frames("val", "29", [2])[0])
    with pytest.raises(PersistWorldError, match="frame 6 cannot be a start"):
        load_recording(store, "val", Item("29", 6, 0), steps=1, num_frames=5)


def test_closed_loop_is_the_engine_stepped_by_hand_and_does_not_depend_on_the_batch(
    root: Path, store: EpisodeStore, model: WorldModel
) -> None:
    s = settings(root)
    engine = RolloutEngine(model, s.sampling, store.stat())
    scorer = Scorer(replace(s.rewards, weights={"psnr": 1.0}), s.world, "cpu")
    scorer = scorer.with_referees(load_referees(("sharpness_gap",), torch.device("cpu")))
    items = [Item("9", 0, 0), Item("19", 2, 1), Item("29", 1, 0)]
    loop = ClosedLoop(engine, store, "val", steps=2, batch=3, scorer=scorer)
    done: list[int] = []
    batched = list(loop.roll(items, keep_latents=True, progress=done.append))
    alone = list(replace(loop, batch=1).roll(items, keep_latents=True))
    assert [rollout.item for rollout in batched] == items and sum(done) == 2
    assert batched[0].scores.keys() == {"psnr", MOVING, "sharpness_gap"}
    for together, one in zip(batched, alone, strict=True):
        assert together.scores["psnr"].shape == (8, 3) and np.isfinite(together.scores["psnr"][:5]).all()
        for name, value in together.scores.items():
            np.testing.assert_allclose(value, one.scores[name], atol=1e-3, err_msg=name)
    assert np.isnan(batched[2].scores["psnr"][5:]).all()

    recording = load_recording(store, "val", items[1], 2, 5)
    first = store.latents("val", "19", [2])
    state = engine.start(first, recording.poses(0, 5)[:1], ["push the red block"])
    for step in range(2):
        noise = rollout_noise([(1, "19", 2, step)], engine.noise_shape)
        predicted = engine.step(state, recording.poses(step, 5)[None], noise)
    images = to_uint8(model.decode_latents(predicted, 5)[0, 1:])
    assert batched[1].latents is not None
    drawn = draw_frames(model, batched[1].latents, engine.sampling)
    assert drawn.shape == (8, 3, 32, 48, 3)
    assert np.abs(drawn[4:].astype(int) - images.astype(int)).max() <= 2  # latents are kept as float16
    mse = np.square(images[0].astype(float) - recording.frames[4].astype(float)).mean(axis=(1, 2, 3)) / 255**2
    np.testing.assert_allclose(batched[1].scores["psnr"][4], -10 * np.log10(mse), atol=0.02)


def test_reward_of_scores_is_the_scorers(root: Path) -> None:
    s = settings(root)
    scorer = Scorer(replace(s.rewards, camera_weights=(1.0, 1.0, 2.0)), s.world, "cpu", names=SHOWN)
    pred, target = torch.rand(2, 3, 3, 3, 32, 48), torch.rand(2, 3, 3, 3, 32, 48)
    metrics = scorer.metrics(pred, target)
    got = reward_of(scorer, {name: value.numpy() for name, value in metrics.items()})
    np.testing.assert_allclose(got, scorer.reward(metrics).numpy(), rtol=1e-5)


def test_eval_end_to_end_continues_and_gives_the_same_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = settings(root, seeds=(0, 1), episodes=("9", "29"), sheets=2, following=("swapped", "null"), following_steps=1)
    s = replace(s, model=replace(s.model, inference=str(root / "other.safetensors")))
    request = EvalRequest(output=root / "out", baseline=str(root / "base.safetensors"))
    loaded: list[str] = []
    real = plan.load_for_sampling

    def counting(*args: object, **kwargs: object) -> WorldModel:
        loaded.append(str(kwargs["ckpt"]))
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "load_for_sampling", counting)
    summary = eval_run.run(s, request)
    out = root / "out"
    result = json.loads((out / "eval.json").read_text())
    labels = [metric["label"] for metric in result["metrics"]]
    assert labels == ["ssim", "psnr", "lpips (untrained)", "psnr (moving)"]
    assert result["n"]["rollouts"] == 4 and result["n"]["episodes"] == 2 and len(result["times_s"]) == 8
    rows = [(row["cameras"], row["model"]) for row in result["table"]]
    assert rows[:4] == [
        ("exterior", "copy first frame"),
        ("exterior", "base.safetensors"),
        ("exterior", "other.safetensors"),
        ("exterior", "recording through VAE"),
    ]
    assert {row["verdict"] for row in result["paired"]} == {"too few"}
    assert len(result["models"][0]["ckpt_sha256"]) == 64
    with (out / "steps.csv").open() as handle:
        steps = list(csv.DictReader(handle))
    assert len(steps) == 4 * 4 * 2 * 3  # rows of the table, rollouts, steps, cameras
    for name in ("report.html", "table.txt", "curves.png", "changes.png", "rollouts.csv"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "sheets").glob("*.png"))) == 2 and len(list((out / "videos").glob("*.mp4"))) == 2
    assert "lpips (untrained)" in (out / "table.txt").read_text() and " lpips↓" not in (out / "table.txt").read_text()
    assert json.dumps(summary, allow_nan=False)
    check_conduct(result)
    assert "gain over swapped actions" in (out / "table.txt").read_text()

    victim = next((out / "rollouts").glob("model-*/9_0_1.npz"))
    victim.unlink()
    loaded.clear()
    again = eval_run.run(s, replace(request, compare=str(out)))
    for before, after in zip(summary["table"], again["table"], strict=True):
        for label in labels:  # the whole batch was done again, so the same numbers
            assert after[label] == pytest.approx(before[label], abs=1e-7)
    assert {row["change"] for row in again["compared"]} == {0.0}
    with pytest.raises(PersistWorldError, match=r"steps: 2 and 1") as refused:
        eval_run.run(replace(s, eval=replace(s.eval, steps=1)), replace(request, compare=str(out)))
    assert "sampling" not in str(refused.value)
    assert again["videos"] == summary["videos"] and again["sheets"] == summary["sheets"]
    # One to roll out what was missing, and each checkpoint, whose VAE draws its own images; nothing else again.
    assert len(loaded) == 3 and [Path(path).stem for path in loaded[1:]] == ["base", "other"]


def check_conduct(result: dict[str, Any]) -> None:
    """Action following and trust of the run above: two episodes, two seeds, following over one interaction."""
    following, trust = result["action_following"], result["uncertainty"]
    assert following["kinds"] == ["swapped", "null"] and following["steps"] == 1
    assert len(following["rows"]) == 2 * 2 * 2 * 4 and {row["verdict"] for row in following["rows"]} == {"too few"}
    margins = {(row["model"], row["actions"]): row["margin"] for row in following["rows"] if row["metric"] == "psnr"}
    assert all(margin != 0 for margin in margins.values())  # other actions, other images
    own = np.array(result["rollouts"]["exterior"]["psnr"]["base.safetensors"])
    assert own.shape == (4,) and np.isfinite(own).all()
    assert len(result["rollouts"]["all"]["reward"]["base.safetensors"]) == 4
    assert trust["seeds"] == 2 and trust["pairs"] == 2 and "too few" in trust["note"]
    for row in trust["rows"]:
        variance = np.array(row["points"]["variance"], dtype=float)
        assert variance.shape == (2, 2) and (variance[np.isfinite(variance)] > 0).all()


def test_floor_and_ceiling_by_hand(root: Path, store: EpisodeStore, model: WorldModel) -> None:
    for frame in range(1, 5):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:, :20] = 255
        path = root / "masks" / "9" / "wrist_left" / f"{frame:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    s = settings(root, episodes=("9",), steps=1, sheets=0, masks=(f"left={root / 'masks'}",), crop=(0, 0, 0, 8))
    eval_run.run(s, EvalRequest(output=root / "alone"))
    result = json.loads((root / "alone" / "eval.json").read_text())
    assert result["paired"] == [] and [model["label"] for model in result["models"]] == ["base"]
    frames = store.frames("val", "9", range(5)).astype(float)[..., : WIDTH - 8, :] / 255
    table = {(row["cameras"], row["model"]): row for row in result["table"]}
    floor = -10 * np.log10(np.square(frames[1:, 2] - frames[:1, 2]).mean(axis=(1, 2, 3))).mean()
    assert table["wrist", "copy first frame"]["psnr"] == pytest.approx(floor, abs=1e-3)
    left = -10 * np.log10(np.square(frames[1:, 2, :, :20] - frames[:1, 2, :, :20]).mean(axis=(1, 2, 3))).mean()
    assert table["wrist", "copy first frame"]["psnr (left)"] == pytest.approx(left, abs=1e-3)
    assert table["exterior", "copy first frame"]["psnr (left)"] is None
    through = model.decode_latents(store.latents("val", "9", range(5)), 5)[1:, 2].movedim(1, -1).numpy()
    through = through[..., : WIDTH - 8, :]
    ceiling = -10 * np.log10(np.square(frames[1:, 2] - through).mean(axis=(1, 2, 3))).mean()
    assert table["wrist", "recording through VAE"]["psnr"] == pytest.approx(ceiling, abs=1e-3)


def test_eval_mistakes_are_named_before_any_compute(root: Path) -> None:
    out = EvalRequest(output=root / "never")
    cases = [
        (settings(root, episodes=("77",)), "no episode '77'"),
        (settings(root, episodes=BUNDLED, benchmark="bundled"), "'60', '61'.* of 20 that benchmark 'bundled' names"),
        (settings(root, masks=(str(root / "no-masks"),)), "no folder of masks"),
        (settings(root, split="test"), "no episodes"),
        (settings(root, starts=(40,)), "frame 40 cannot be a start"),
        (settings(root, seeds=()), "nothing to roll out"),
        (replace(settings(root), model=replace(settings(root).model, ckpt="")), "no weights"),
    ]
    for wrong, words in cases:
        with pytest.raises(PersistWorldError, match=words):
            eval_run.run(wrong, out)
    with pytest.raises(UsageError, match="compared with itself"):
        eval_run.run(settings(root), replace(out, baseline="base"))
    small = settings(root)
    small = replace(small, world=replace(small.world, height=64))
    with pytest.raises(PersistWorldError, match="latents"):
        eval_run.run(small, out)
    foreign = replace(small, model=replace(small.model, token_dim=16), world=settings(root).world)
    with pytest.raises(PersistWorldError, match="does not fit this preset"):
        eval_run.run(foreign, out)
    with pytest.raises(PersistWorldError, match="cannot read the result"):
        eval_run.run(settings(root), replace(out, compare=str(root / "nothing.json")))
    assert not list((root / "never").rglob("*.npz"))


def test_replay_end_to_end(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    s = settings(root, episodes=("29",), starts=(1,), steps=3, seeds=(4,))
    both = (str(root / "base.safetensors"), str(root / "other.safetensors"))
    summary = replay(s, ReplayRequest(output=root / "replay", ckpts=both))
    assert "episode 29 ends at frame 6, in step 2 of 3 from frame 1: no actions" in capsys.readouterr().err
    record = json.loads((root / "replay" / "replay.json").read_text())
    entry = record["replays"][0]
    assert entry["frames"] == 5 and [row["step"] for row in entry["rows"]] == [1, 1, 2, 2]  # frame 6 is the last
    assert {row["model"] for row in entry["rows"]} == {"base.safetensors", "other.safetensors"}
    assert "lpips (untrained)" in entry["rows"][0] and MOVING not in entry["rows"][0]
    for file in (*summary["videos"], *summary["sheets"], summary["json"], summary["text"]):
        assert Path(file).stat().st_size > 0
    with pytest.raises(UsageError, match="do not pair up"):
        replay(s, ReplayRequest(output=root / "x", ckpts=("a", "b"), adapters=("c", "d", "e")))
