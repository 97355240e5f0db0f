"""The day with a GPU, on the CPU: the same parts at the smallest size, planted faults, processes that end or hang."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import Bench, Found, Part, parts
from benchmarks.ledger import Row, entry, shown

LEAST = """
extends = "tiny"
[world]
height = 32
width = 48
[model.unet]
in_channels = 8
out_channels = 4
block_out_channels = [32, 32]
down_block_types = ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"]
up_block_types = ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"]
num_attention_heads = [1, 1]
layers_per_block = 1
cross_attention_dim = 128
addition_time_embed_dim = 32
projection_class_embeddings_input_dim = 96
num_frames = 11
[model.vae]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"]
block_out_channels = [32, 32, 32]
layers_per_block = 1
latent_channels = 4
force_upcast = false
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random weights and recordings of the smallest size."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "least.toml").write_text(LEAST)
    return folder


@pytest.fixture
def bench(work: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    preset = str(work / "least.toml")
    monkeypatch.setitem(gpu_parts.SIZES, "least", gpu_parts.Size(preset, preset))
    return Bench("least", torch.device("cpu"), work, work / "world", time.time() + 600, most=0.0)


def rows(bench: Bench, table: dict[str, Part]) -> list[Row]:
    """The rows of some parts, in this process."""
    said: list[dict[str, Any]] = []
    assert gpu.measured(bench, table, lambda **message: said.append(message))
    assert [m["part"] for m in said if "part" in m] == [m["done"] for m in said if "done" in m] == list(table)
    found = [Found(**message["found"]) for message in said if "found" in message]
    peak = gpu.peak_of("NVIDIA H200")
    limits = {name: part.limit for name, part in table.items()}
    counted = dict.fromkeys(("call", "interaction 4", "pretraining", "update"), (1000000000000.0, 2**30))
    return [row for one in found for row in gpu.rows_of(one, lambda: counted, peak, limits.get(one.what))]


def test_the_parts_measure_what_their_names_say(bench: Bench) -> None:
    every = parts("least")
    names = [name for name in every if "float32, least" in name and name.startswith("gradient")]
    names += ["interaction, 4 calls", "pretraining step"]
    made = {row.what: row for row in rows(bench, {name: every[name] for name in names})}
    assert [row.value for row in made.values() if row.limit == 1e-4] == [0.0]  # against itself
    assert not any(row.fails for row in made.values())
    for name in names[1:]:
        row, share, memory = (made[name + end] for end in ("", ", share of peak", ", peak memory of the process"))
        assert row.value and row.n >= 1 and "TFLOP/s" in row.detail and "TF32: convolutions" in row.detail
        assert share.value == pytest.approx(1 / row.value / 989) and memory.detail == "a dry run states 1"


def test_a_wrong_weight_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    load = gpu_parts.load_for_sampling
    loaded: list[object] = []

    def wrong_once(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        if not loaded:  # the measured one, before those that it is compared with
            model.unet.conv_out.weight[0] *= 1.1
        loaded.append(model)
        return model

    monkeypatch.setattr(gpu_parts, "load_for_sampling", wrong_once)
    (name,) = [name for name in parts("least") if name.startswith("call in bf16, least")]
    (row,) = rows(bench, {name: parts("least")[name]})
    assert row.fails and row.value > 1e-2
    assert "FAILS (more than" in shown(entry(row, "gpu", "python", 0.0))


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(bench: Bench) -> None:
    def fails(bench: Bench, name: str) -> Iterator[Found]:
        yield Found(what=name, values=(1.0,))
        raise RuntimeError("no kernel image is available\nfor this device")

    def runs(bench: Bench, name: str) -> Iterator[Found]:
        yield Found(what=name, values=(2.0, 3.0, 7.0))

    table = {"one": Part(fails, 0, 9), "two": Part(runs, 0, 9, limit=2.5), "late": Part(runs, 700, 9, limit=9.0)}
    first, failed, second, late = rows(bench, table)
    assert (first.value, first.low) == (1.0, None)
    assert failed.what == "one: what else it measures" and failed.value is None
    assert failed.why == "RuntimeError: no kernel image is available"
    assert (second.value, second.low, second.high, second.n, second.fails) == (3.0, 2.0, 7.0, 3, True)
    assert late.fails and "s left, it needs 700" in late.why


CHILD = """
import json, os, signal, sys
for name in sys.argv[1:]:
    print(json.dumps({"part": name}), flush=True)
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        signal.pause()
    print(json.dumps({"found": {"what": name, "values": [1.0]}}), flush=True)
    print(json.dumps({"done": name}), flush=True)
"""


@pytest.fixture
def started() -> Callable[[Sequence[str]], gpu.Watched]:
    return lambda names: gpu.Watched([sys.executable, "-ISc", CHILD, *names])


def test_a_process_that_ends_or_hangs_costs_one_part(started: Callable[[Sequence[str]], gpu.Watched]) -> None:
    def part(most: float = 60.0) -> Part:
        return Part(lambda bench, name: iter(()), 0, most, limit=1.0)

    table = {"a": part(), "dies": part(), "b": part(), "hangs": part(0.05), "c": part()}

    def told(found: Found, limit: float | None) -> Iterator[Row]:
        return gpu.rows_of(found, dict, None, limit)

    made = {row.what: row for row in gpu.watch(table, started, time.time() + 60, told)}
    assert list(made) == list(table)
    assert [name for name, row in made.items() if row.fails] == ["dies", "hangs"]
    assert (made["dies"].why, made["hangs"].why) == ("its process ended with SIGKILL", "not done after 0 s")
    late = list(gpu.watch(table, started, time.time() - 1, told))
    assert [row.why for row in late] == ["out of time"] * len(table)
    broken = list(
        gpu.watch(
            table, lambda names: gpu.Watched([sys.executable, "-ISc", "raise SystemExit(3)"]), time.time() + 60, told
        )
    )
    assert [row.why for row in broken] == ["its process ended with 3"] * len(table)


def test_parts_are_chosen_by_their_names() -> None:
    assert list(gpu.chosen("full", "compiled, pretraining")) == ["pretraining step", "call, compiled"]
    assert list(gpu.chosen("full", None)) == list(parts("full"))
    with pytest.raises(SystemExit, match="no part's name contains gradeint; there are: imports"):
        gpu.chosen("full", "gradeint")


def test_a_device_is_known_by_its_name() -> None:
    assert gpu.peak_of("NVIDIA H200").name == "h200"
    assert gpu.peak_of("NVIDIA H100 PCIe").name == "h100-pcie"
    assert gpu.peak_of("NVIDIA GeForce RTX 4090").name == "rtx-4090"
    assert gpu.peak_of("Some other device") is None
