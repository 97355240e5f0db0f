"""What a dry run says a run would cost: against the golden FLOPs, and against the memory of real tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_files import GoldenFiles, flat
from golden_table import close
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, SamplingSettings
from persistworld_cli.cost.accelerators import ACCELERATORS, find_accelerator
from persistworld_cli.cost.flops import checkpointing, measure
from persistworld_cli.cost.interaction import (
    META,
    InteractionCost,
    count_interaction,
    interaction_report,
    meta_model,
    part_sizes,
    sampler_calls,
)
from persistworld_cli.cost.report import BYTES, FLOPS, SECONDS, CostReport, MemoryRow, WorkRow, amount
from persistworld_cli.cost.training import mean_prefix, post_train_report, pretrain_report, slowest_process
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.models.cpu import attention
from persistworld_cli.models.cpu.native.build import without_kernels
from persistworld_cli.models.world_model import Condition, WorldModel, build_world_model
from persistworld_cli.training.fsdp import gathered, shard
from persistworld_cli.training.policy_switch import PolicySwitch
from persistworld_cli.training.pretrain import clips_per_process, trained_parameters

TINY = load_settings("tiny", [], {})


@pytest.fixture(scope="module")
def full() -> tuple[WorldModel, InteractionCost]:
    """The full-size model on the meta device, and its interaction as Ctrl-World samples (guidance)."""
    settings = load_settings("ctrl-world", [], {})
    model = meta_model(settings.model, settings.world)
    return model, count_interaction(model, settings.sampling, 1)


def test_flops_are_the_golden_ones(golden: GoldenFiles, full: tuple[WorldModel, InteractionCost]) -> None:
    known, cost = json.loads((golden / "flops.json").read_text()), full[1]

    def agree(what: str, ours: float, theirs: float) -> None:
        close(f"H FLOPs, {what} (ratio)", ours / theirs, 1.0, 0.01)

    agree("network", cost.network_reference, known["unet_b1_sdpa"]["flops"])
    agree("decoding", cost.decoding, known["vae_decode15_chunks_7_7_1_sdpa"]["flops"])
    agree("encoding", cost.encoding, known["vae_encode3_sdpa"]["flops"])
    agree("interaction with guidance", cost.flops_reference, known["derived"]["total"])
    accelerator = find_accelerator("800")  # the golden floors are for 800 TFLOP/s
    row = WorkRow("interaction", "", cost.flops_reference)
    agree("floor with guidance", row.floor(accelerator), known["derived"]["by_steps"]["50"])
    plain = replace(cost, calls=50)
    row = WorkRow("interaction", "", plain.flops_reference)
    agree("floor without guidance", row.floor(accelerator), known["derived"]["by_steps_no_cfg"]["50"])
    # What is computed once a row instead of at every pixel is what the golden breakdown calls avoidable, and a little
    # more: the temporal token is projected once an item, the frames' places are embedded once a call.
    saved = cost.network_reference - cost.network
    assert 0.9 < saved / known["derived"]["avoidable_single_key_cross_attention_flops_b1"] < 1.01


def test_parameters_are_the_published_ones(golden: GoldenFiles, full: tuple[WorldModel, InteractionCost]) -> None:
    parts = json.loads((golden / "ctrl_world_shapes.json").read_text())
    numbers = {name: sum(math.prod(shape) for _, shape in flat(part)) for name, part in parts.items()}
    assert part_sizes(full[0]) == numbers


# -- counting ---------------------------------------------------------------------------------------------------------


def allocated(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator had given out during a call beyond what it had before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def clip(model: WorldModel, device: str) -> torch.Tensor:
    """One clip through the network."""
    settings, frame = model.settings, model.latent_shape

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(1, *shape, device=device)

    tokens = model.tokens(empty(11, 7), empty(settings.token_dim))
    condition = Condition(empty(settings.num_history, *frame), empty(*frame), tokens, 0.0)
    return model.denoise(empty(settings.num_frames, *frame), torch.ones(1, device=device), condition)


@pytest.mark.parametrize("recompute", [False, True])
def test_counted_bytes_are_those_of_real_tensors(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)  # fused attention on the CPU too, as it is counted
    # at widths 64, 64, 64 the CPU kernels' workspaces, which are not counted, are 2.3% with recomputation
    unet = {**TINY.model.unet, "block_out_channels": [32, 64, 128], "num_attention_heads": [1, 2, 4]}
    model = replace(TINY.model, unet=unet)
    counted, real = meta_model(model, TINY.world), build_world_model(model, TINY.world).eval()
    options = PostTrainSettings(lora_rank=4, lora_alpha=4, lora_targets=("to_q", "to_v"))
    with META:
        PolicySwitch(counted, options)
    PolicySwitch(real, options)
    for p in real.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    if recompute:
        real.unet.enable_gradient_checkpointing()
        with checkpointing(counted.unet, torch.float32):
            work = measure(lambda: clip(counted, "meta"), counted.parameters(), torch.float32, backward=True)
    else:
        work = measure(lambda: clip(counted, "meta"), counted.parameters(), torch.float32, backward=True)
    with without_kernels():  # a GPU has none
        there = allocated(lambda: clip(real, "cpu").square().mean().backward())
    assert work.peak == pytest.approx(there, rel=0.02)


def test_checkpointing_saves_memory_and_costs_work() -> None:
    model = meta_model(TINY.model, TINY.world)
    model.unet.requires_grad_(True)

    def learn() -> tuple[int, int]:
        work = measure(lambda: clip(model, "meta"), model.parameters(), torch.bfloat16, backward=True)
        return work.flops, work.peak

    flops, peak = learn()
    with checkpointing(model.unet, torch.bfloat16):
        more, less = learn()
    assert more > 1.1 * flops and less < 0.8 * peak
    assert learn() == (flops, peak)  # and it is off again
    whole = measure(lambda: clip(model, "meta"), model.parameters(), torch.float32, backward=True)
    assert whole.flops == flops and whole.peak > peak


def test_samplers_calls_are_counted() -> None:
    assert sampler_calls(SamplingSettings(steps=50)) == 50
    assert sampler_calls(SamplingSettings(steps=50, guidance=2.0)) == 100
    assert sampler_calls(SamplingSettings(steps=5, sampler="heun")) == 9
    with pytest.raises(UsageError, match="unknown sampler 'eulr'"):
        sampler_calls(SamplingSettings(sampler="eulr"))


def test_prefixes_are_averaged_over_the_run() -> None:
    assert mean_prefix(PostTrainSettings(prefix="uniform", prefix_max=9)) == 4.5
    assert mean_prefix(PostTrainSettings(prefix="fixed", prefix_max=9)) == 9
    growing = PostTrainSettings(prefix="curriculum", prefix_max=8, updates=4)  # up to 2, 4, 6, 8
    assert mean_prefix(growing) == 2.5


@pytest.mark.parametrize(
    ("processes", "groups", "most"),  # interactions of the slowest process; with whole groups 45.1, 24.3, 16.4, 24.8
    [(4, 8, 41.5), (8, 8, 21.1), (16, 8, 13.1), (16, 16, 21.1)],
)
def test_the_slowest_process_hardly_waits(processes: int, groups: int, most: float) -> None:
    options = PostTrainSettings(groups=groups, candidates=16, split_groups=True)
    calls, learned = slowest_process(options, SamplingSettings(steps=50), processes)
    assert 20.4 * groups / processes < calls / 50 < most
    assert (learned == 10 * groups / processes) == (groups >= processes)  # else a team's kept candidates are divided


# -- reports ----------------------------------------------------------------------------------------------------------


def rows(report: CostReport) -> dict[str, float]:
    return {row.key: row.flops for row in report.work}


def test_an_update_is_the_sum_of_its_parts() -> None:
    post = replace(TINY.post_train, steps=2 * TINY.sampling.steps)  # candidates by twice the calls
    report = post_train_report(replace(TINY, post_train=post))
    work = rows(report)
    parts = ("prefixes", "candidates", "images", "learning")
    assert work["update"] == pytest.approx(sum(work[key] for key in parts))
    assert work["run"] == pytest.approx(post.updates * work["update"])
    drawn = post.groups * post.candidates
    assert work["images"] == drawn * work["decoding"]
    assert work["candidates"] == 2 * drawn * (work["interaction"] - work["decoding"])  # adapters are merged
    model = build_world_model(TINY.model, TINY.world)
    switch = PolicySwitch(model, post)
    assert sum(report.trained.values()) == sum(p.numel() for p in switch.trainable())


def test_processes_share_the_work_and_not_the_weights() -> None:
    alone, shared = (post_train_report(replace(TINY, launch=replace(TINY.launch, num_processes=n))) for n in (1, 2))
    assert rows(alone)["update"] == pytest.approx(
        rows(shared)["update"], rel=1e-3
    )  # merged adapters and frame places: once a call
    h100 = find_accelerator("h100")
    updates = [next(row for row in report.work if row.key == "update") for report in (alone, shared)]
    assert updates[0].floor(h100) == updates[0].even(h100) == pytest.approx(2 * updates[1].even(h100), rel=1e-3)
    assert updates[1].floor(h100) > updates[1].even(h100)
    held = [{r.key: r.bytes for r in report.memory} for report in (alone, shared)]
    assert held[0]["weights"] == held[1]["weights"] and held[0]["candidates"] == 2 * held[1]["candidates"]


def test_pretraining_counts_gradients_and_both_optimisers() -> None:
    held = {}
    for kind in ("adamw", "muon"):
        report = pretrain_report(replace(TINY, pretrain=replace(TINY.pretrain, optimizer=kind)))
        held[kind] = {row.key: row.bytes for row in report.memory}
    gradients = held["adamw"]["gradients"]
    assert held["adamw"]["optimizer"] == 2 * gradients > held["muon"]["optimizer"] > gradients


@pytest.fixture
def ranks() -> Iterator[int]:
    """A process group of so many ranks of which there is only this one: what it is sent is made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield 8
    torch.distributed.destroy_process_group()


def test_a_sharded_pretraining_holds_what_is_counted(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(attention, "SHORT", 0)
    options = PretrainSettings(batch=ranks, ema=0.9, gradient_checkpointing=True, shard=True)
    settings = replace(TINY, pretrain=options, launch=replace(TINY.launch, num_processes=ranks))
    stated = {row.key: row.bytes for row in pretrain_report(settings).memory}
    model = build_world_model(TINY.model, TINY.world)
    learned = sum(p.numel() for p in trained_parameters(model, options))
    frozen = sum(p.numel() for p in model.parameters()) - learned
    shard(model, options.parts, ranks)
    model.unet.enable_gradient_checkpointing()
    own = sum(p.to_local().numel() for p in model.parameters() if p.requires_grad)
    held = {"weights": frozen + own, "gradients": own, "optimizer": 2 * own, "average": own}
    for key, numbers in held.items():  # of a tensor that does not divide evenly the first rank has more
        assert 4 * numbers == pytest.approx(stated[key], rel=0.02), key
    with without_kernels():
        clip(model, "cpu").square().mean().backward()  # the gradients' shares are there afterwards
        step = allocated(lambda: clip(model, "cpu").square().mean().backward())
        with torch.no_grad():
            whole = allocated(lambda: enter_and_leave(model))
    assert step == pytest.approx(stated["learning"], rel=0.15) and whole == pytest.approx(4 * learned, rel=0.15)


def enter_and_leave(model: WorldModel) -> None:
    with gathered(model):
        pass


def test_clips_are_shared_evenly() -> None:
    with pytest.raises(PersistWorldError, match="32 clips cannot be shared by 3 processes"):
        clips_per_process(load_settings("ctrl-world", [], {}).pretrain, 3)


def test_the_peak_takes_the_largest_of_what_passes() -> None:
    report = CostReport(
        {}, [], [MemoryRow("a", "", 5), MemoryRow("b", "", 7, passing=True), MemoryRow("c", "", 3, passing=True)]
    )
    assert report.peak == 12
    assert report.fits(ACCELERATORS["h100"]) and report.fits(find_accelerator("100")) is None


def test_settings_that_make_no_model_are_told() -> None:
    broken = replace(TINY, model=replace(TINY.model, norm_groups=7))
    with pytest.raises(PersistWorldError, match=r"no such network can be built: .*7 groups"):
        interaction_report(broken, 1)


# -- the command ------------------------------------------------------------------------------------------------------


def dry(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    data: dict[str, object] = json.loads(result.stdout)
    return data


def test_the_full_size_dry_run_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(
        app, ["post-train", "--preset", "persistworld", "--num-processes", "8", "--dry-run", "--accelerator", "h200"]
    )
    assert result.exit_code == 0, result.output
    text = result.stdout
    for words in ("1,524,623,082", "LoRA, rank 64", "28,665,856", "9.54 TFLOP", "floor (h200, 989 TFLOP/s)"):
        assert words in text, words
    assert "checkpointed" in text and "fits into the 139 GiB of h200" in text
    assert "estimated" in text and "counted" in text
    assert not list(tmp_path.iterdir())


def test_json_and_a_speed_of_ones_own() -> None:
    cost = dry("eval", "--accelerator", "100")["cost"]
    assert isinstance(cost, dict)
    assert cost["accelerator"] == {"name": "100 TFLOP/s", "tflops": 100.0, "memory_gib": None}
    step = cost["work"]["interaction"]
    assert step["floor_s"] == pytest.approx(step["flops"] / 1e14)
    assert cost["fits"] is None and cost["peak_bytes"] > cost["memory"]["weights"]["bytes"]


@pytest.mark.parametrize(
    "arguments", [["pretrain", "--part", "vae"], ["extract-latents"], ["build-meta"], ["policy-server"]]
)
def test_what_has_no_cost_section_stays_as_it_was(arguments: list[str]) -> None:
    assert "cost" not in dry(*arguments)


def test_accelerators_are_checked() -> None:
    assert find_accelerator(" H100 ") is ACCELERATORS["h100"]
    for text, words in (("h10", "unknown accelerator"), ("-3", "not a speed"), ("inf", "not a speed")):
        with pytest.raises(UsageError, match=words):
            find_accelerator(text)
    for arguments, words in ((["--dry-run", "--accelerator", "h10"], "h100"), (["--accelerator", "h100"], "--dry-run")):
        result = CliRunner().invoke(app, ["eval", *arguments])
        assert result.exit_code == 2 and words in result.stderr


def test_amounts_are_written_with_their_unit() -> None:
    assert amount(9.1395e12, FLOPS) == "9.14 TFLOP" and amount(954.4e12, FLOPS) == "954 TFLOP"
    assert amount(3 * 2**30, BYTES) == "3 GiB" and amount(10.27, SECONDS) == "10.3 s"
    assert amount(0.0, SECONDS) == "0 µs"
