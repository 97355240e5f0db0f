"""The plan of an evaluation or a frontier, resolved and checked as a whole before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.adapters import require_adapter
from persistworld_cli.checkpoints.compatibility import require_fit, shapes_of
from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.checkpoints.references import ModelRef, refs_of_eval
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.settings import EvalSettings, SamplingSettings, Settings
from persistworld_cli.config.weight_names import USED_PARTS
from persistworld_cli.console import note
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.action_following import partners, wrong_kinds
from persistworld_cli.evaluation.benchmarks import Benchmark, load_benchmark
from persistworld_cli.evaluation.comparing import load_result
from persistworld_cli.evaluation.fvd import FeatureNet, load_feature_network
from persistworld_cli.evaluation.protocol import (
    check_metrics,
    describe_sampling,
    make_protocol,
    record_hash,
    require_same,
    rollout_identity,
)
from persistworld_cli.evaluation.results import CEILING, FLOOR
from persistworld_cli.files import hash_of, jsonable, write_json, writing
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.metrics.user_masks import open_masks
from persistworld_cli.models.world_model import WorldModel, build_world_model
from persistworld_cli.read_files import read_json
from persistworld_cli.reports.tables import benchmark_name
from persistworld_cli.rollout.closed_loop import ClosedLoop, batches
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.recording import Item, make_items, require_episodes, row_ids
from persistworld_cli.rollout.scoring import SHOWN, ScoringOptions

logger = logging.getLogger(__name__)
_RECORD = "record.json"  # under the rollouts: episode -> digest of its recording, when it was rolled out


@dataclass(frozen=True)
class Weights:
    """A model of a run.

    Attributes:
        ref: where its weights are.
        store: the dataset, with the percentiles that scale poses for these weights.
        sha256: part -> hash of its files.
    """

    ref: ModelRef
    store: EpisodeStore
    sha256: dict[str, str]

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.ref.label

    def describe(self) -> dict[str, Any]:
        """Paths and hashes, for result files."""
        hashes = {f"{part}_sha256": digest for part, digest in self.sha256.items()}
        return {"ckpt": self.ref.ckpt, "adapter": self.ref.adapter, **hashes}


@dataclass(frozen=True)
class RolloutPlan:
    """What all rollouts of a run share, checked before anything is computed.

    Attributes:
        settings: resolved settings.
        device: where the models run.
        store: the dataset.
        items: the rollouts, episodes first.
        models: the models to compare, the baseline first.
        scorer, scoring: metrics, on the device.
        protocol: everything that two results must share to be comparable.
        benchmark: the file that pinned the protocol (`Benchmark.stamp`), or None.
    """

    settings: Settings
    device: torch.device
    store: EpisodeStore
    items: list[Item]
    models: list[Weights]
    scorer: Scorer
    scoring: ScoringOptions
    protocol: dict[str, Any]
    benchmark: dict[str, Any] | None

    def identity(self, weights: Weights, sampling: SamplingSettings | None = None) -> dict[str, Any]:
        """What finished rollouts depend on besides the weights' hashes; ``sampling`` replaces that of the settings."""
        own = {"sampling": describe_sampling(sampling or self.settings.sampling)}
        return rollout_identity(self.protocol | own, weights.store, self.settings.model)

    def key(self, weights: Weights, sampling: SamplingSettings | None = None) -> str:
        """Key of the folder for finished rollouts of these weights."""
        return hash_of([self.identity(weights, sampling), weights.sha256, self.device.type])

    def load(self, ref: ModelRef) -> WorldModel:
        """The model, ready to sample."""
        return load_for_sampling(self.settings, ckpt=ref.ckpt, adapter=ref.adapter, device=self.device)

    def loop(self, model: WorldModel, weights: Weights, sampling: SamplingSettings | None = None) -> ClosedLoop:
        """The closed loop of a loaded model; ``sampling`` replaces that of the settings."""
        ev = self.settings.eval
        engine = RolloutEngine(model, sampling or self.settings.sampling, weights.store.stat())
        return ClosedLoop(engine, self.store, ev.split, ev.steps, ev.batch, self.scorer, self.scoring)

    def forget_changed(self, root: Path) -> None:
        """Delete finished rollouts under `root` whose episodes were recorded or extracted anew since; on rank 0.

        Compared are instruction, poses and length, and size and time of latent and video files. Folders of rollouts are
        named by what all of them depend on, so that an evaluation can be extended; this is what a single one does.
        """
        file, split = root / _RECORD, self.settings.eval.split
        keys = {item.episode: f"{self.store.root}/{split}/{item.episode}" for item in self.items}
        known = read_json(file, "record of the rollouts' episodes", f"delete {root}") if file.is_file() else {}
        now: dict[str, str] = {}
        for episode, key in keys.items():
            videos = sorted((self.store.root / "videos" / split / episode).glob("*.mp4"))
            stats = [path.stat() for path in [*self.store.latent_files(split, episode), *videos]]
            stamps = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
            now[key] = hash_of([record_hash(self.store, split, [Item(episode)]), stamps])
        changed = [episode for episode, key in keys.items() if known.get(key, now[key]) != now[key]]
        for path in root.glob("*/*.npz"):
            if path.stem.rsplit("_", 2)[0] in changed:
                path.unlink()
        if changed:
            names = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
            logger.warning("%d episodes changed since their rollouts: made again (%s)", len(changed), names)
        if now.items() - known.items():
            write_json(file, known | now)

    def work(self, processes: PartialState) -> list[list[Item]]:
        """This process's share of the items, in batches."""
        return batches(self.items, self.settings.eval.batch)[processes.process_index :: processes.num_processes]


@dataclass(frozen=True)
class EvalPlan(RolloutPlan):
    """The plan of an evaluation.

    Attributes:
        video_net: the network of the Fréchet video distance, if one was given.
        folders: row of the table -> folder of its finished rollouts.
        wrong: model -> wrong actions -> folder of its finished rollouts under them.
    """

    video_net: FeatureNet | None
    folders: dict[str, Path]
    wrong: dict[str, dict[str, Path]]


def make_plan(
    settings: Settings,
    output: Path,
    device: torch.device,
    *,
    baseline: str = "",
    alone: bool = False,
    compare: str = "",
    quiet: bool = False,
) -> EvalPlan:
    """Plan an evaluation and create its folders. Arguments and errors: see `refs_of_eval` and `plan_rollouts`."""
    ev = settings.eval
    video_net = load_feature_network(ev.fvd, ev.fvd_net, device) if ev.fvd else None
    fvd = video_net.describe() if video_net else None
    refs = refs_of_eval(settings.model, baseline, alone=alone)
    plan = plan_rollouts(settings, refs, device, fvd=fvd, compare=compare, quiet=quiet)
    base, root = plan.models[0], output / "rollouts"
    same, keys = plan.identity(base), {weights.label: plan.key(weights) for weights in plan.models}
    folders = {
        FLOOR: root / f"floor-{hash_of(same)}",
        **{label: root / f"model-{key}" for label, key in keys.items()},
        CEILING: root / f"ceiling-{hash_of([same, base.sha256])}",
    }
    driven = hash_of([partners(plan.items), ev.following_steps])
    kinds = wrong_kinds(ev.following, plan.items)
    wrong = {label: {kind: root / f"{kind}-{key}-{driven}" for kind in kinds} for label, key in keys.items()}
    for folder in [*folders.values(), *(folder for own in wrong.values() for folder in own.values())]:
        make_folder(folder)
    return EvalPlan(**vars(plan), video_net=video_net, folders=folders, wrong=wrong)


def plan_rollouts(
    settings: Settings,
    refs: Sequence[ModelRef],
    device: torch.device,
    *,
    fvd: Mapping[str, Any] | None = None,
    compare: str = "",
    quiet: bool = False,
) -> RolloutPlan:
    """Resolve and check everything: dataset, episodes, starts, masks, metrics, weights, a result to compare with.

    Args:
        settings, device: those of the run.
        refs: the models, the baseline first.
        fvd: the protocol's entry for the Fréchet video distance.
        compare: another result's eval.json, which must have the same protocol; "" for none.
        quiet: say nothing about actions and subsets (ranks other than 0).

    Raises:
        PersistWorldError: one of these is wrong.
    """
    store = open_store(settings)
    items = eval_items(store, settings, partly=True)
    scoring = make_scoring(settings, store, items)
    scorer = Scorer(settings.rewards, settings.world, device, names=SHOWN)
    benchmark = load_benchmark(settings.eval.benchmark)
    stamp = benchmark.stamp(settings, {item.episode for item in items}) if benchmark else None
    protocol = make_protocol(settings, store, items, scorer, scoring, fvd, stamp)
    if benchmark:
        check_metrics(benchmark.metrics, protocol["metrics"], str(benchmark.path))
    if compare:
        require_same(load_result(compare)["protocol"], jsonable(protocol), f"this run and {compare}")
    require_weights(settings, store, items, refs)
    split, episodes = settings.eval.split, [item.episode for item in items]
    stores = weights_stores(settings, store, [r.parts for r in refs], split=split, episodes=episodes, quiet=quiet)
    models = [Weights(ref, own, ref.fingerprint()) for ref, own in zip(refs, stores, strict=True)]
    if not quiet and (text := subset_note(stamp)):
        note(text)
    return RolloutPlan(settings, device, store, items, models, scorer, scoring, protocol, stamp)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises PersistWorldError if that fails."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def make_scoring(settings: Settings, store: EpisodeStore, items: list[Item]) -> ScoringOptions:
    """Crop, colour range and masks. Raises PersistWorldError if masks are missing or have another size."""
    ev, world = settings.eval, settings.world
    frames: dict[str, set[int]] = {}
    for item in items:
        last = store.annotation(ev.split, item.episode).num_frames - 1
        ids = row_ids(item.start, 0, settings.model.num_frames, ev.steps)[1:]
        frames.setdefault(item.episode, set()).update(ids[ids <= last].tolist())
    needed = {episode: sorted(own) for episode, own in frames.items()}
    masks = tuple(open_masks(text, needed, world.cameras, world.height, world.width) for text in ev.masks)
    names = [own.name for own in masks]
    if len(set(names)) < len(names):
        raise PersistWorldError(
            f"two sets of masks are called '{names[0]}'", where="--masks", fix="name them: --masks object=DIR"
        )
    levels = world.pixel_rounding if ev.colour_range == "8bit" else ""
    return ScoringOptions(tuple(ev.crop), levels, ev.moving_threshold, masks)


def eval_items(store: EpisodeStore, settings: Settings, *, partly: bool = False) -> list[Item]:
    """Every (episode, start, seed); with `partly`, only those benchmark episodes that the dataset has (`subset_note`).

    Raises PersistWorldError: an empty split, absent episodes, a start beyond an episode's end.
    """
    ev = settings.eval
    there = store.episodes(ev.split)
    episodes = list(dict.fromkeys(ev.episodes)) or require_episodes(store, ev.split)
    absent = sorted(set(episodes) - set(there), key=episodes.index)
    benchmark = _named_by_benchmark(ev) if absent else None
    if absent and not (partly and benchmark and len(absent) < len(episodes)):
        raise _absent(benchmark, absent, len(episodes), ev.split, there, store)
    return make_items(store, ev.split, [e for e in episodes if e not in absent], ev.starts, ev.seeds)


def _named_by_benchmark(ev: EvalSettings) -> Benchmark | None:
    """The benchmark whose episodes these are; None for the user's own."""
    benchmark = load_benchmark(ev.benchmark)
    own = benchmark is not None and dict(benchmark.pinned.values)["eval.episodes"] == list(ev.episodes)
    return benchmark if own else None


def subset_note(stamp: Mapping[str, Any] | None) -> str:
    """The note of a run on only some of its benchmark's episodes, with the command for the rest; "" otherwise."""
    part = stamp.get("subset") if stamp else None
    if not part:
        return ""
    rest = f"; the rest: {part['fetch']}" if part["fetch"] else f"; absent: {', '.join(part['absent'])}"
    return f"benchmark {benchmark_name(stamp or {})}: a subset is not comparable with the whole{rest}"


def _absent(
    benchmark: Benchmark | None, absent: list[str], count: int, split: str, there: list[str], store: EpisodeStore
) -> PersistWorldError:
    """The error for episodes that the dataset does not have."""
    some = ", ".join(f"'{name}'" for name in absent[:6]) + (" ..." if len(absent) > 6 else "")
    what = f"no episode{'s' if len(absent) > 1 else ''} {some} in split '{split}'"
    fix = store.instead_of(split, absent)
    if benchmark:
        what += f", of {count} that benchmark '{benchmark.name}' names"
        own = f", or name your own: --episodes {','.join(there[:3])}" if there else ""
        fix = f"take --benchmark none (all {len(there)} of the split){own}"
        if fetch := benchmark.fetch(absent):
            fix += f"; or fetch them (some are enough), then extract-latents and build-meta: {fetch}"
    return PersistWorldError(what, where=str(store.root / "annotation" / split), fix=fix)


def require_weights(settings: Settings, store: EpisodeStore, items: Sequence[Item], refs: Sequence[ModelRef]) -> None:
    """Refuse weights or a dataset of another preset, from names and shapes alone. Raises PersistWorldError."""
    with torch.device("meta"):
        model = build_world_model(settings.model, settings.world)
    for source in dict.fromkeys(ref.ckpt for ref in refs):
        require_fit(shapes_of(model.state_dict()), WeightFiles(locate(source, USED_PARTS)).shapes, source)
    for overlay in dict.fromkeys(ref.adapter for ref in refs if ref.adapter):
        require_adapter(overlay, settings.model)
    for episode in dict.fromkeys(item.episode for item in items):
        poses = store.annotation(settings.eval.split, episode).states
        model.check_data(store.latent_shape(settings.eval.split, episode), poses.shape[1])
