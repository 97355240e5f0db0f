"""``python -m benchmarks``: rows go into a ledger that tells how they were measured, and nothing of whose machine."""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.ledger import ROOT, Row, append, entry, load, render


def options(path: Path, **changed: Any) -> argparse.Namespace:
    whole = {"only": None, "gpu": False, "minutes": 5.0, "dataset": None, "ledger": path / "ledger.json"}
    whole |= {"size": "full", "device": "cuda", "json": False}
    return argparse.Namespace(**{**whole, **changed})


def test_every_benchmark_is_a_script_of_the_folder() -> None:
    for name, benchmark in benchmarks.BENCHMARKS.items():
        assert callable(importlib.import_module(f"benchmarks.{benchmark.module or name}").main)
        assert benchmark.expected


def test_a_benchmark_is_run_read_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    nothing = benchmarks.Benchmark("--dataset nowhere --cold-gb 0", ("speed",), benchmarks._loading_clips)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"loader": nothing})
    rows = [new for _, new in benchmarks.measure(options(tmp_path))]
    assert [(row["value"], row["why"][:10]) for row in rows] == [(None, "no dataset")]
    assert rows[0]["command"] == "python -m benchmarks.loader --dataset nowhere --cold-gb 0"
    assert load(tmp_path / "ledger.json") == rows
    text = (tmp_path / "ledger.json").read_text() + (tmp_path / "ledger.md").read_text()
    private = (platform.node(), f"/{getpass.getuser()}/", str(Path.home()), str(tmp_path), str(ROOT))
    assert not [name for name in private if name and name in text]
    assert rows[0]["machine"].keys() == {"cpu", "cores"} and rows[0]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "seconds", "why"), [("--no-such", 60.0, "ended with 2"), ("", 0.0, "out of time")]
)
def test_what_fails_or_takes_too_long_says_so(
    arguments: str, seconds: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    one = benchmarks.Benchmark(arguments, ("this", "that"), lambda told: pytest.fail("there is nothing to read"))
    rows, command = benchmarks.run_one("build_meta", one, None, seconds)
    assert [(row.what, row.value, row.why) for row in rows] == [("this", None, why), ("that", None, why)]
    assert command == f"python -m benchmarks.build_meta {arguments}".strip()


def test_an_unknown_benchmark_is_refused() -> None:
    with pytest.raises(SystemExit, match="no benchmark 'loder'; there are: loader"):
        benchmarks.chosen("loder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_shown_to_be_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--gpu", "--ledger", str(ledger)])
    for _ in range(2):
        with pytest.raises(SystemExit, match="not shown to be right"):
            benchmarks.main()
    assert len(load(ledger)) == 1 and "not measured: no GPU here" in ledger.with_suffix(".md").read_text()
    assert "not measured: no GPU here" in capsys.readouterr().out


def test_a_number_takes_the_place_of_its_absence_and_earlier_numbers_stay(tmp_path: Path) -> None:
    def told(value: float | None, why: str = "") -> dict[str, Any]:
        row = Row(what="speed", value=value, unit="ratio", low=value, high=value, n=3, why=why)
        return entry(row, "one", "python", 0.1)

    path = tmp_path / "ledger.json"
    for value in (None, 0.5, None, None):
        append(path, [told(value, "new" if load(path) else "old")])
    assert [(row["value"], row["why"]) for row in load(path)] == [(0.5, "new"), (None, "new")]
    append(path, [told(0.4)])
    assert [row["value"] for row in load(path)] == [0.5, 0.4]
    assert "| 0.5 (0.5 .. 0.5) | 3 |" in render(load(path))
    assert json.loads(path.read_text())[0]["load"] == 0.1
