"""Benchmark files, what they pin, and when two results may be compared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from persistworld_cli import commands
from persistworld_cli.commands import app as _app  # noqa: F401  (fills commands.app)
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import load_settings, resolve_settings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation.benchmarks import METRICS, benchmark_names, load_benchmark
from persistworld_cli.evaluation.comparing import compare_results, load_result
from persistworld_cli.evaluation.protocol import check_metrics, differences
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import batches
from persistworld_cli.rollout.finished import pending
from persistworld_cli.rollout.recording import Item
from persistworld_cli.rollout.scoring import ScoringOptions

TEXT = (bundled_root() / "presets" / "benchmarks" / "bundled.toml").read_text()


@pytest.mark.parametrize("name", ["bundled", "droid"])
def test_shipped_benchmarks_pin_what_this_version_computes(name: str) -> None:
    assert name in benchmark_names()
    benchmark = load_benchmark(name)
    assert benchmark is not None and len(benchmark.sha256) == 64
    preset = "tiny" if name == "bundled" else "persistworld"
    resolved = resolve_settings(preset, pinned=benchmark.pinned)
    assert load_settings(preset).eval.benchmark == name
    assert (
        resolved.origin["sampling.steps"] == f"benchmark {name}"
        and not benchmark.stamp(resolved.settings, resolved.settings.eval.episodes)["changed"]
    )
    settings = resolved.settings
    scorer = Scorer(settings.rewards, settings.world, "cpu", names=("ssim", "psnr", "lpips"))
    described = {**scorer.describe(), **ScoringOptions(motion=settings.eval.moving_threshold).describe()}
    check_metrics(benchmark.metrics, described, name)
    assert set(benchmark.metrics) == set(METRICS)
    with pytest.raises(UsageError, match="window = 11, this version computes it with 7"):
        check_metrics({"ssim": {"window": 11}}, described, name)


def test_benchmark_lies_between_preset_and_flags() -> None:
    benchmark = load_benchmark("bundled")
    assert benchmark is not None and load_benchmark("none") is None and load_benchmark("") is None
    env = {"PERSISTWORLD_SAMPLING__STEPS": "9"}
    resolved = resolve_settings("ctrl-world", ["eval.steps=3"], {"eval.seeds": (1,)}, env, pinned=benchmark.pinned)
    changed = benchmark.stamp(resolved.settings, resolved.settings.eval.episodes)["changed"]
    pinned = dict(benchmark.pinned.values)["sampling.steps"]
    assert changed == {"sampling.steps": [pinned, 9], "eval.steps": [14, 3], "eval.seeds": [[0], [1]]}
    assert resolved.settings.world.height == 48


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("version = 3", "version = 0", "not a whole number"),
        ("guidance = 1.0\n", "", "does not set sampling.guidance"),
        ("[rewards]", "[model]\nckpt = 'x'\n[rewards]", "cannot set 'model.ckpt'"),
        ("[metrics.psnr]", "[metrics.pnsr]", r"\[metrics.psnr\] is missing"),
        ("steps = 14", "stepz = 14", "cannot set 'eval.stepz'"),
        ("steps = 14", "steps = 14 14", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UsageError, match=words) as error:
        load_benchmark(str(path))
    assert "mine.toml" in str(error.value)


def test_values_of_the_wrong_type_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace("steps = 14", 'steps = "many"'))
    benchmark = load_benchmark(str(path))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "many" in text)
    with pytest.raises(UsageError, match=r"eval\.steps = 'many'") as error:
        resolve_settings("tiny", pinned=benchmark.pinned if benchmark else None)
    assert f"mine.toml:{line}" in str(error.value)


def result(model: str, shift: float) -> dict[str, Any]:
    """A finished result of seven episodes, as far as comparing reads it."""
    items = [[str(episode), 0, 0] for episode in range(7)]
    rows = ("floor", model, "ceiling")
    values = [20.0 + index + shift * (1 + index / 10) for index in range(7)]
    return {
        "kind": "eval",
        "n": {
            "rollouts": 7,
            "episodes": 7,
            "steps": 1,
            "frames_per_step": 4,
            "rate_hz": 5.0,
            "sampler": "euler",
            "sampling_steps": 2,
        },
        "metrics": [{"name": "psnr", "label": "psnr", "unit": "dB", "higher_is_better": True}],
        "groups": ["exterior"],
        "floor": "floor",
        "ceiling": "ceiling",
        "models": [{"label": model}],
        "table": [{"cameras": "exterior", "model": row, "psnr": 20.0} for row in rows],
        "rollouts": {"exterior": {label: dict.fromkeys(rows, values) for label in ("psnr", "reward")}},
        "protocol": {"sampling": {"steps": 2, "dtype": "float32"}, "items": items, "hash": "abc"},
        "versions": {"torch": "2"},
        "device": "cpu",
    }


def test_results_of_one_protocol_are_compared_and_others_refused(tmp_path: Path) -> None:
    first, second = result("base", 0.0), result("mine", 1.0)
    second["versions"] = {"torch": "3"}  # another machine is no other protocol
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, one in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(one))
    against = compare_results(load_result(str(paths[0])), load_result(str(paths[1])), "a and b")
    assert [row["verdict"] for row in against["paired"]] == ["better", "better"]
    assert against["paired"][0]["change"] == pytest.approx(1.3)
    for one in (first, second):
        one["rollouts"]["all"] = {"reward": one["rollouts"]["exterior"]["reward"]}
    whole = compare_results(first, second, "a and b")["paired"]
    assert [(row["cameras"], row["metric"]) for row in whole[2:]] == [("all", "reward")]
    assert [row["model"] for row in against["table"]] == ["floor", "base", "mine", "ceiling"]
    bases = [{"label": "base", "ckpt_sha256": digest, "adapter_sha256": ""} for digest in ("ab", "cd")]
    for digests, rows in (((0, 0), ["floor", "base", "a", "b", "ceiling"]), ((0, 1), ["floor", "a", "b", "ceiling"])):
        both = [copy.deepcopy(one) for one in (first, second)]
        for one, digest, label in zip(both, digests, "ab", strict=True):
            own = next(row for row in one["table"] if row["model"] == one["models"][-1]["label"])
            one["table"] += [{**own, "model": label}] + ([] if own["model"] == "base" else [{**own, "model": "base"}])
            for values in one["rollouts"]["exterior"].values():
                values[label] = values[own["model"]]
            one["models"] = [bases[digest], {**one["models"][-1], "label": label}]
        assert [row["model"] for row in compare_results(*both, "a and b")["table"]] == rows
    flags = [part for path in paths for part in ("--compare", str(path))]
    shown = CliRunner().invoke(commands.app.app, ["eval", *flags])
    assert shown.exit_code == 0
    assert all(part in shown.stdout for part in ("+1.30", "[+1.14, +1.44]", "100% of 7", "[65, 100]"))

    other = copy.deepcopy(second)
    other["protocol"]["sampling"]["steps"] = 50
    other["protocol"]["items"] = other["protocol"]["items"][:5]
    with pytest.raises(PersistWorldError) as refused:
        compare_results(first, other, "a and b")
    assert "sampling.steps: 2 and 50" in str(refused.value) and "7 rollouts and 5, 5 of them the same" in str(
        refused.value
    )
    paths[1].write_text(json.dumps(other))
    told = CliRunner().invoke(commands.app.app, ["eval", *flags])
    assert told.exit_code == 1 and "sampling.steps" in told.stderr
    assert CliRunner().invoke(commands.app.app, ["eval", *flags, *flags]).exit_code == 2
    with pytest.raises(PersistWorldError, match="not a result of persistworld eval"):
        paths[0].write_text("{}")
        load_result(str(paths[0]))


def test_differences_are_dotted_keys() -> None:
    one = {"a": {"b": 1, "c": [1, 2]}, "hash": "x"}
    two = {"a": {"b": 2, "c": [1, 2]}, "d": 3, "hash": "y"}
    assert differences(one, two) == {"a.b": (1, 2), "d": (None, 3)}
    assert differences(one, one) == {}


def test_batches_do_not_depend_on_who_does_them(tmp_path: Path) -> None:
    items = [Item(str(index), 0, 0) for index in range(7)]
    work = batches(items, 3)
    assert [len(batch) for batch in work] == [3, 3, 1]
    shares = [work[rank::2] for rank in range(2)]
    assert sorted(item for share in shares for batch in share for item in batch) == sorted(items)
    for item in items[:4]:
        (tmp_path / f"{item.name}.npz").touch()
    assert pending(tmp_path, work) == items[3:]  # the second batch as a whole
