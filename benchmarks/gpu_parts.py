"""What the day with a GPU measures (`benchmarks.gpu`), part by part: correctness, then speed."""

from __future__ import annotations

import gc
import platform
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import post_training
from benchmarks.full_size import peak_bytes, random_checkpoint, recorded_world
from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest, TrainingRequest
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, Settings
from persistworld_cli.data.clips.loader import ClipLoader
from persistworld_cli.data.clips.mixture import open_clips
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.models.compiling import compile_network
from persistworld_cli.models.precision import allow_tf32, cpu_has_bfloat16
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.images import draw_images
from persistworld_cli.rollout.interactive import InteractiveRollout, make_start
from persistworld_cli.rollout.recording import Item
from persistworld_cli.stages import observe
from persistworld_cli.training.post_train import PostTrainer
from persistworld_cli.training.pretrain import Pretrainer
from persistworld_cli.training.run import Run

GIB = 2**30
BUNDLED = "bundled"  # the tiny preset with its own weights; other models have random ones
CHECKS = {  # type -> the largest distance that passes, and what differs from the preset
    "float32": (
        1e-4,
        (
            *("sampling.dtype=float32", "sampling.cast=autocast", "sampling.decode_dtype=float32"),
            *("post_train.mixed_precision=no", "launch.tf32=none"),
        ),
    ),
    "bf16": (1e-2, ()),
}
ALONE = tuple(f"post_train.{name}=0" for name in ("margin_every", "validate_every", "video_every"))
ALONE += ("post_train.referees=[]", "launch.trackers=none")
ONE_GROUP = (*ALONE, "post_train.groups=1", "post_train.prefix=fixed")
CHECKED = (
    *(*ONE_GROUP, "post_train.prefix_max=0", "post_train.micro_batch=2", "sampling.steps=1"),
    *("post_train.candidates=2", "post_train.keep_best=1", "post_train.keep_worst=1"),
    *("post_train.explore=3", "post_train.credit=rollout"),  # two that rounding cannot exchange
)
ROUNDING, FAR = 3.0, 0.3  # times the CPU's own distance in bf16, which pass; but no more than this
UPDATE = (*ONE_GROUP, "post_train.prefix_max=1", "post_train.candidates=16")
CLIPS = 4  # of a pretraining step: the share of one process in ctrl-world's batch on eight
CALLS = {50: "euler", 8: "dpmpp-2m", 6: "dpmpp-2m", 4: "dpmpp-2m"}  # calls of an interaction -> sampler
TOGETHER = 8
UPDATES = 100


@dataclass(frozen=True)
class Size:
    """The presets of sampling with post-training and of pretraining, and settings of the checks' images."""

    preset: str
    pretrain: str
    small: tuple[str, ...] = ()


SIZES = {
    "full": Size("persistworld", "ctrl-world", ("world.height=64", "world.width=64")),
    "tiny": Size("tiny", "tiny"),
    BUNDLED: Size("tiny", "tiny"),
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a part measured.

    Attributes:
        what, unit, why, detail: as in the ledger's row.
        values: of the repeats; none: not measured.
        key: of the dry run's FLOPs and bytes (`stated`).
        bytes: peak memory of the device, 0 if it is not of interest.
        reserved: bytes that a GPU's allocator held; 0: the memory is that of the process.
        limit: of a check, if it is not its part's.
    """

    what: str
    values: tuple[float, ...] = ()
    unit: str = "s"
    why: str = ""
    detail: str = ""
    key: str = ""
    bytes: int = 0
    reserved: int = 0
    limit: float | None = None


@dataclass(frozen=True)
class Part:
    """A few rows, the first of which has the part's name; seconds that it needs at least, and may take at most."""

    run: Callable[[Bench, str], Iterator[Found]]
    needs: float
    most: float
    limit: float | None = None


# -- what is measured on ----------------------------------------------------------------------------------------------


class Bench:
    """The models, data and device of the parts.

    Args:
        size: of `SIZES`.
        device: what is measured.
        work: folder for random weights and recordings; kept between processes.
        dataset: the bundled world, extracted.
        until: when it must end, by `time.time`.
        most: seconds that a part's runs may take (an update's: three times as long); at least one is made.
    """

    def __init__(
        self, size: str, device: torch.device, work: Path, dataset: Path, until: float, most: float = 20.0
    ) -> None:
        self.size, self.device, self.work, self.dataset, self.until = size, device, work, dataset, until
        self.most = most
        self.models: dict[bool, tuple[str, WorldModel]] = {}  # at most one for the checks' CPU, and one measured
        self.references: dict[tuple[str, str, str], torch.Tensor] = {}  # by model, result and type

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.time()

    def settings(self, kind: str, *sets: str, preset: str = "", device: str = "") -> Settings:
        """A preset with this kind's weights, and a recorded world of its images."""
        preset = preset or SIZES[kind].preset
        tokenizer = bundled_root() / "presets" / "tiny" / "tokenizer"
        given = [f"launch.device={device or self.device.type}", "model.adapter=none", f"model.tokenizer={tokenizer}"]
        if kind != BUNDLED:
            weights = self.work / f"{kind}.safetensors"
            if not weights.exists():
                random_checkpoint(weights, load_settings(preset, env={}))
            given += [f"model.ckpt={weights}"]
        settings = load_settings(preset, [*given, *sets], env={})
        world = self.work / f"{kind}-{settings.world.height}x{settings.world.width}"
        if not (world / "meta" / "stat.json").exists():
            shutil.rmtree(world, ignore_errors=True)
            recorded_world(world, settings)
        return replace(settings, world=replace(settings.world, dataset=str(world)))

    def model(self, settings: Settings, *, reference: bool = False) -> WorldModel:
        """The model as commands load it to sample from; the last one is kept."""
        key = repr((settings.model, settings.world, settings.sampling.dtype, settings.sampling.cast, settings.launch))
        if reference not in self.models or self.models[reference][0] != key:
            self.models.pop(reference, None)
            self.free()
            ckpt = settings.model.ckpt
            made = load_for_sampling(settings, ckpt=ckpt, adapter="", device=settings.launch.device)
            self.models[reference] = key, made
        allow_tf32(settings.launch.tf32)
        return self.models[reference][1]

    def engine(self, settings: Settings, *, reference: bool = False) -> tuple[RolloutEngine, EpisodeStore]:
        """The engine of that model, and its recordings."""
        store = open_store(settings)
        return RolloutEngine(self.model(settings, reference=reference), settings.sampling, store.stat()), store

    def forget(self) -> None:
        """Free all models."""
        self.models.clear()
        self.free()

    def free(self) -> None:
        """Give memory of dead tensors back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], object], repeats: int, *, warm: int = 1, longer: float = 1.0) -> dict[str, Any]:
        """Seconds of the repeats after ``warm`` runs, peak memory, types; as many runs as fit into the time.

        If the runs before the repeats already take so long, the last of them is what was measured.
        """
        seconds: list[float] = []
        for number in range(warm + repeats):
            if number == warm and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begun)
            if sum(seconds) + seconds[-1] > longer * self.most:
                break
        once = "with what happens once, " if len(seconds) <= warm else ""
        told: dict[str, Any] = {"values": tuple(seconds[warm:] or seconds[-1:]), "detail": once + types()}
        told["bytes"] = peak_bytes()
        if self.device.type == "cuda":
            told["bytes"] = torch.cuda.max_memory_allocated(self.device)
            told["reserved"] = torch.cuda.max_memory_reserved(self.device)
        return told


def types() -> str:
    """Which float32 products use TF32 now."""
    products = {"convolutions": torch.backends.cudnn.allow_tf32, "matrices": torch.backends.cuda.matmul.allow_tf32}
    return f"TF32: {' and '.join(name for name, on in products.items() if on) or 'none'}"


@contextmanager
def training(
    settings: Settings, options: PostTrainSettings | PretrainSettings, request: type[TrainingRequest]
) -> Iterator[tuple[Run, TrainingRequest]]:
    """A run in a folder that is deleted afterwards. accelerate has one precision and device a process: it is reset."""
    AcceleratorState._reset_state(True)
    try:
        with TemporaryDirectory() as folder:
            wanted = request(output=Path(folder))
            with Run.of(settings, options, wanted) as work:
                yield work, wanted
    finally:
        AcceleratorState._reset_state(True)


# -- correctness ------------------------------------------------------------------------------------------------------


def first_use(bench: Bench, name: str) -> Iterator[Found]:
    """What is here, and how long the process took to begin."""
    said = [f"torch {torch.__version__}", platform.python_version()]
    if bench.device.type == "cuda":
        found = torch.cuda.get_device_properties(bench.device)
        said += [found.name, f"{found.total_memory / GIB:.0f} GiB", f"CUDA {torch.version.cuda}"]
        said += [f"cuDNN {torch.backends.cudnn.version()}"]
    torch.ones(1, device=bench.device).sum().item()
    yield Found(what=name, values=(time.time() - psutil.Process().create_time(),), detail=", ".join(map(str, said)))


def forward(bench: Bench, settings: Settings, reference: bool) -> torch.Tensor:
    """One call, by the engine."""
    engine, store = bench.engine(settings, reference=reference)
    start = make_start(store, Item(store.episodes("val")[0]), "val")
    state = engine.start_from(store, [start])
    return engine.step(state, start.poses(0, settings.model.num_frames)[None], engine.noise(state))


def decode(bench: Bench, settings: Settings, reference: bool) -> torch.Tensor:
    """The images of a recorded clip."""
    engine, store = bench.engine(settings, reference=reference)
    clip = store.latents("val", store.episodes("val")[0], list(range(settings.model.num_frames)))
    return draw_images(engine.model, clip[None].float(), settings.sampling)


def gradient(bench: Bench, settings: Settings, reference: bool) -> torch.Tensor:
    """The gradient of a post-training update: sampling, decoding, scores, loss."""
    bench.forget()
    with training(settings, settings.post_train, PostTrainRequest) as (work, _):
        trainer, caught = post_training.trainer(settings, work)
        trainer.update(0)
        return caught.gradient


RESULTS = {"call": forward, "decoding": decode, "gradient of an update": gradient}


def apart(bench: Bench, name: str, *, kind: str, result: str, dtype: str) -> Iterator[Found]:
    """The distance of a result from the CPU's in float32, over its norm."""

    def made(dtype: str, device: str, *, reference: bool) -> torch.Tensor:
        torch.manual_seed(0)
        settings = bench.settings(kind, *SIZES[kind].small, *CHECKED, *CHECKS[dtype][1], device=device)
        return RESULTS[result](bench, settings, reference).detach().float().cpu()

    def on_cpu(dtype: str) -> torch.Tensor:
        key = kind, result, dtype
        if key not in bench.references:
            bench.references[key] = made(dtype, "cpu", reference=True)
        return bench.references[key]

    def far(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).norm() / other.norm())

    here, exact, limit, told = made(dtype, bench.device.type, reference=False), on_cpu("float32"), None, types()
    if not here.isfinite().all():
        yield Found(what=name, why=f"{int((~here.isfinite()).sum())} of {here.numel()} numbers are not finite")
        return
    if dtype == "bf16" and cpu_has_bfloat16():  # without it a full-size model in bfloat16 takes minutes on a CPU
        own = far(on_cpu(dtype), exact)
        limit = min(max(CHECKS[dtype][0], ROUNDING * own), FAR)
        told = f"the CPU's bf16 {own:.2g} from its float32, {far(here, on_cpu(dtype)):.2g} from this; {told}"
    told = f"{here.numel()} numbers; {told}"
    yield Found(what=name, values=(far(here, exact),), unit="ratio", limit=limit, detail=told)


# -- speed ------------------------------------------------------------------------------------------------------------


def call(bench: Bench, name: str) -> Iterator[Found]:
    """One call of the network for one clip."""
    yield Found(what=name, key="call", **bench.timed(one_call(bench), 10, warm=2))


def one_call(bench: Bench) -> Callable[[], torch.Tensor]:
    """A sampling of one step from one recorded frame."""
    engine, store = bench.engine(bench.settings(bench.size, "sampling.steps=1"))
    start = make_start(store, Item(store.episodes("val")[0]), "val")
    state = engine.start_from(store, [start])
    with torch.no_grad():
        condition = engine.condition(engine.inputs(state, start.poses(0, engine.model.settings.num_frames)[None]))
    noise = engine.noise(state).to(bench.device)
    return lambda: engine.sample(condition, noise)


class Kernels(TorchDispatchMode):
    """Counts the attention kernels that torch chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("_scaled_dot_product"):
            self.chosen[name.removeprefix("_scaled_dot_product_")] += 1
        return func(*args, **(kwargs or {}))


def attention(bench: Bench, name: str) -> Iterator[Found]:
    """The attention kernels of one call; without a fused one the whole matrix of weights is written to memory."""
    run = one_call(bench)
    with Kernels() as kernels:
        run()
    if not (total := kernels.chosen.total()):
        yield Found(what=name, why="torch chose no attention kernel")
        return
    fused = total - sum(count for kernel, count in kernels.chosen.items() if "math" in kernel)
    detail = ", ".join(f"{kernel} {count}" for kernel, count in kernels.chosen.most_common())
    yield Found(what=name, values=(fused / total,), unit="share", detail=detail)


def interaction(bench: Bench, name: str, *, calls: int, rollouts: int = 1) -> Iterator[Found]:
    """From poses to images on the host, as `drive` and `replay` do."""
    settings = bench.settings(bench.size, f"sampling.sampler={CALLS[calls]}", f"sampling.steps={calls}")
    found = driven(bench, settings, rollouts)
    seconds = rollouts * (settings.model.num_frames - 1) / settings.world.rate_hz
    said = f"{CALLS[calls]}, {statistics.median(found['values']) / seconds:.2f} of real time a rollout"
    key = f"interaction {calls}" if rollouts == 1 else "together"
    yield Found(what=name, key=key, **{**found, "detail": f"{said}, {found['detail']}"})


def driven(bench: Bench, settings: Settings, rollouts: int) -> dict[str, Any]:
    """`Bench.timed` of an interaction of rollouts that start from the same frame with other noise."""
    model, store = bench.model(settings), open_store(settings)
    starts = [make_start(store, Item(store.episodes("val")[0], seed=seed), "val") for seed in range(rollouts)]
    rollout = InteractiveRollout(model, store, starts, settings)
    begun = rollout.snapshot
    poses = starts[0].poses(0, settings.model.num_frames)[None].repeat(rollouts, axis=0)

    def run() -> None:
        rollout.restore(begun)
        rollout.step(poses)

    found = bench.timed(run, 5)
    assert rollout.snapshot.state.memory.current[0].isfinite().all(), "latents are not finite"
    return found


def decoding(bench: Bench, name: str) -> Iterator[Found]:
    """The images of one clip."""
    settings = bench.settings(bench.size)
    model = bench.model(settings)
    clip = torch.randn(1, settings.model.num_frames, *model.latent_shape, device=bench.device)
    yield Found(what=name, key="decoding", **bench.timed(lambda: draw_images(model, clip, settings.sampling), 10))


def update(bench: Bench, name: str) -> Iterator[Found]:
    """A whole update of one group, and how its time is divided."""
    bench.forget()
    settings = bench.settings(bench.size, *UPDATE)
    with training(settings, settings.post_train, PostTrainRequest) as (work, _):
        trainer, steps = PostTrainer(settings, work), iter(range(UPDATES))
        stages: dict[str, float] = {}

        @contextmanager
        def clock(stage: str) -> Iterator[None]:
            bench.wait()
            begun = time.perf_counter()
            yield
            bench.wait()
            stages[stage] = stages.get(stage, 0.0) + time.perf_counter() - begun

        def observer(stage: str) -> AbstractContextManager[None]:
            return clock(stage) if stage in ("sampling", "decoding", "scoring", "update") else nullcontext()

        def run() -> None:
            stages.clear()
            trainer.update(next(steps))

        with observe(observer):
            found = bench.timed(run, 2, longer=3.0)
        told = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in stages.items())
        yield Found(what=name, key="update", **{**found, "detail": f"the last: {told}, {found['detail']}"})


def pretraining(bench: Bench, name: str) -> Iterator[Found]:
    """An update of a few clips."""
    bench.forget()
    settings = bench.settings(bench.size, *pretrain_sets(), preset=SIZES[bench.size].pretrain)
    store = open_store(settings)
    with (
        training(settings, settings.pretrain, PretrainRequest) as (work, request),
        ClipLoader(open_clips(settings, stat=store.stat()), settings.pretrain.batch) as loader,
    ):
        assert isinstance(request, PretrainRequest)
        trainer, steps = Pretrainer(settings, request, work, loader, None, store), iter(range(UPDATES))
        trainer.begin(0)
        yield Found(what=name, key="pretraining", **bench.timed(lambda: trainer.update(next(steps)), 4))


def pretrain_sets() -> list[str]:
    """Settings of that step: no checks, the clips of one process."""
    checks = [f"pretrain.{name}=0" for name in ("validate_every", "check_every", "video_every")]
    return [*checks, f"pretrain.batch={CLIPS}", "pretrain.accumulate=1", "launch.trackers=none"]


def compiled(bench: Bench, name: str) -> Iterator[Found]:
    """Compilation, then a call and few-call interactions."""
    bench.forget()
    run = one_call(bench)
    ((_, model),) = bench.models.values()
    compile_network(model)
    begun = time.perf_counter()
    for _ in range(3):  # CUDA graphs are recorded in the second, and first used in the third
        run()
    bench.wait()
    once = time.perf_counter() - begun
    yield Found(what=name, key="call", **bench.timed(run, 10))
    yield Found(what="compiling the network, with its first three calls", values=(once,))
    for calls in [calls for calls in CALLS if calls <= 8]:
        settings = bench.settings(bench.size, f"sampling.sampler={CALLS[calls]}", f"sampling.steps={calls}")
        found = driven(bench, settings, 1)
        yield Found(what=f"interaction, {calls} calls, compiled", key=f"interaction {calls}", **found)
    del run, model
    bench.forget()
    torch._dynamo.reset()


def bundled_updates(bench: Bench, name: str) -> Iterator[Found]:
    """The bundled preset's post-training, and whether its reward rises."""
    bench.forget()
    sets = [*ALONE, f"world.dataset={bench.dataset}", f"post_train.updates={UPDATES}", "model.adapter=none"]
    settings = load_settings("tiny", [*sets, f"launch.device={bench.device.type}"], env={})
    with training(settings, settings.post_train, PostTrainRequest) as (work, _):
        trainer, seconds, rewards = PostTrainer(settings, work), list[float](), list[float]()
        while len(rewards) < UPDATES and bench.left > 5 + 2 * max(
            seconds, default=0.0
        ):  # the longest prefix is yet to come
            begun = time.perf_counter()
            rewards.append(trainer.update(len(rewards))["reward"])
            bench.wait()
            seconds.append(time.perf_counter() - begun)
        yield Found(what=name, values=tuple(seconds), detail=f"{types()}; {len(rewards)} of {UPDATES} fitted")
        few = max(1, len(rewards) // 4)
        first, last = statistics.mean(rewards[:few]), statistics.mean(rewards[-few:])
        what = f"{UPDATES} updates of the bundled preset, reward of the last quarter less that of the first"
        yield Found(what=what, values=(last - first,), unit="", detail=f"{first:.4f} to {last:.4f}, n {len(rewards)}")


# -- their order -------------------------------------------------------------------------------------------------------


def parts(size: str) -> dict[str, Part]:
    """All parts in their order, by name."""
    made = {"imports and the device's first use": Part(first_use, 0, 60)}
    for kind in (BUNDLED, size):
        for dtype, (limit, _) in CHECKS.items():
            for result in RESULTS:
                check = partial(apart, kind=kind, result=result, dtype=dtype)
                who = f"{kind} model" if kind == BUNDLED else f"{kind}-size model"
                made[f"{result} in {dtype}, {who}, apart from the CPU's"] = Part(check, 5, 90, limit)
    several = partial(interaction, calls=8, rollouts=TOGETHER)
    return {
        **made,
        "call": Part(call, 10, 60),
        **{f"interaction, {calls} calls": Part(partial(interaction, calls=calls), 5, 60) for calls in CALLS},
        "decoding": Part(decoding, 3, 30),
        f"interaction, 8 calls, {TOGETHER} rollouts together": Part(several, 5, 60),
        "share of attention in fused kernels": Part(attention, 3, 30),
        "post-training update, K = 16": Part(update, 40, 120),
        "pretraining step": Part(pretraining, 20, 60),
        "call, compiled": Part(compiled, 60, 180),
        f"{UPDATES} updates of the bundled preset, each": Part(bundled_updates, 20, 150),
    }
