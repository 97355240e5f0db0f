"""The full-size model on CUDA, without a card: no mixed devices or types, no wait in a loop, memory as a dry run says.

Everything runs through the package's own engine, trainers and scorer, on a small recorded world of full-size images;
the weights have shapes alone. `.ci/traces` runs this where torch is no CUDA build.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from cuda_trace import CUDA, CudaTrace, cuda_trace, require_no_wait_in_a_loop, without_weights

from benchmarks.full_size import recorded_world
from benchmarks.requirements import TRACED
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.cost.report import CostReport, cost_report
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import open_clips
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_images
from persistworld_cli.rollout.recording import Item, Start
from persistworld_cli.rollout.scoring import score_frames
from persistworld_cli.stages import observe
from persistworld_cli.training import post_train, pretrain
from persistworld_cli.training.run import Run

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is no CUDA build (.ci/traces gets one)")
GIB = 2**30


# -- a world of full-size images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What a scorer imports must not be imported under a trace."""
    settings = load_settings("ctrl-world", [], {})
    Scorer(settings.rewards, settings.world)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("full-size") / "world"
    recorded_world(root, load_settings("ctrl-world", [], {}))
    return str(root)


def full_size(preset: str, dataset: str, *sets: str) -> Settings:
    """A preset on that world, with a tokenizer that is on this machine; every loop is run through twice."""
    tokenizer = bundled_root() / "presets" / "tiny" / "tokenizer"
    given = [f"world.dataset={dataset}", f"model.tokenizer={tokenizer}", "sampling.steps=2", "launch.trackers=none"]
    return load_settings(preset, [*given, *sets], {})


# -- what is expected of a trace --------------------------------------------------------------------------------------


class Peaks(dict[str, int]):
    """Most bytes alive on the device in each stage, beyond those at its beginning."""

    @contextmanager
    def watch(self, trace: CudaTrace) -> Iterator[None]:
        @contextmanager
        def observer(name: str) -> Iterator[None]:
            before, outer = trace.bytes.alive, trace.bytes.peak
            trace.bytes.peak = before
            try:
                yield
            finally:
                self[name] = max(self.get(name, 0), trace.bytes.peak - before)
                trace.bytes.peak = max(outer, trace.bytes.peak)

        with observe(observer):
            yield


def stated(report: CostReport, key: str) -> int:
    return next(row.bytes for row in report.memory if row.key == key)


def agree(what: str, traced: int, said: int) -> None:
    print(f"{what}: traced {traced / GIB:.2f} GiB, stated {said / GIB:.2f} GiB, {traced / said - 1:+.1%}")
    assert traced == pytest.approx(said, rel=0.15), what


# -- the traces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["persistworld", "ctrl-world"])  # without and with guidance
def test_an_interaction_is_sampled_decoded_and_scored(preset: str, dataset: str) -> None:
    settings = full_size(preset, dataset)
    report, store, peaks = cost_report("drive", settings), EpisodeStore(Path(dataset)), Peaks()
    assert report is not None
    with cuda_trace() as trace, peaks.watch(trace):
        dtype = getattr(torch, settings.sampling.dtype)
        model = without_weights(settings.model, settings.world, dtype=dtype)
        agree("weights", trace.bytes.alive, stated(report, "weights"))
        scorer = Scorer(settings.rewards, settings.world, CUDA)
        engine = RolloutEngine(model, settings.sampling, store.stat())
        note = store.annotation("val", "1")
        start = Start(Item("1", 0, 0), "val", note, note.text)
        state = engine.start_from(store, [start])
        frames = torch.rand(1, engine.noise_shape[0] - 1, len(settings.world.cameras), 3, 192, 320)
        trace.waits.clear()
        predicted = engine.step(state, start.poses(0, settings.model.num_frames)[None], engine.noise(state))
        images = draw_images(model, predicted, settings.sampling)
        score_frames(scorer, images[:, 1:], frames, frames[:, 0])
        assert images.device.type == "cuda" and images.shape[1:] == (5, 3, 3, 192, 320)
    agree("sampling", peaks["sampling"], stated(report, "sampling"))
    agree("decoding", peaks["decoding"], stated(report, "decoding"))
    agree("peak", trace.bytes.peak, report.peak)
    require_no_wait_in_a_loop(trace)


@contextmanager
def on_cuda(settings: Settings, request: Any, options: Any) -> Iterator[Run]:
    """The run of a training whose device is CUDA, though there is none."""
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = CUDA
    try:
        with Run.of(settings, options, request) as work:
            assert work.device == CUDA and work.accelerator.mixed_precision == options.mixed_precision
            yield work
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("micro_batch", TRACED.values(), ids=TRACED)
def test_a_post_training_update(
    micro_batch: int, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [f"{name}=0" for name in ("margin_every", "validate_every", "video_every")]
    sets = [f"{name}={micro_batch}" for name in ("micro_batch", "keep_best", "keep_worst")]  # two passes
    sets += ["groups=1", "prefix=fixed", "prefix_max=2", "referees=[]", *checks]
    settings = full_size("persistworld", dataset, "launch.device=cpu", *(f"post_train.{one}" for one in sets))
    report, peaks = cost_report("post-train", settings), Peaks()
    assert report is not None
    monkeypatch.setattr(post_train, "load_world_model", without_weights)
    monkeypatch.setattr(post_train, "weights_stores", lambda settings, store, *_, **__: (store,))
    with on_cuda(settings, PostTrainRequest(output=tmp_path), settings.post_train) as work, cuda_trace() as trace:
        trainer = post_train.PostTrainer(settings, work)
        held = sum(stated(report, key) for key in ("weights", "adapters"))
        agree("weights and adapters", trace.bytes.alive, held)
        trace.waits.clear()
        with peaks.watch(trace):
            trainer.update(0)
        print("waits:", *trace.waits)
    agree("sampling", peaks["sampling"], stated(report, "sampling"))
    agree("learning", peaks["update"], sum(stated(report, key) for key in ("learning", "gradients", "optimizer")))
    agree("peak", trace.bytes.peak, report.peak)
    require_no_wait_in_a_loop(trace)


def test_a_pretraining_step(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [f"pretrain.{name}=0" for name in ("validate_every", "check_every", "video_every")]
    settings = full_size(
        "ctrl-world", dataset, "launch.device=cpu", "pretrain.batch=4", "pretrain.log_every=1", *checks
    )
    report = cost_report("pretrain", settings)
    assert report is not None
    monkeypatch.setattr(pretrain, "load_world_model", without_weights)
    request = PretrainRequest(output=tmp_path)
    store = EpisodeStore(Path(dataset))
    with (
        on_cuda(settings, request, settings.pretrain) as work,
        ClipLoader(open_clips(settings, stat=store.stat()), settings.pretrain.batch) as loader,
        cuda_trace() as trace,
    ):
        trainer = pretrain.Pretrainer(settings, request, work, loader, None, store)
        trainer.begin(0)
        trainer.update(0)  # the optimisers get their state
        trace.waits.clear()
        trainer.update(1)
        print("waits:", *trace.waits)
    agree("peak", trace.bytes.peak, report.peak)
    require_no_wait_in_a_loop(trace)
