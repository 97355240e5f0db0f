"""`persistworld verify`: do these weights, on this data, reproduce the published figures?

Rollouts and numbers are those of an evaluation (`run.measure`, `results.build_result`).

Let m be the mean and s the standard deviation of the n episodes' means, and ``h = t(0.975, n - 1) s / sqrt(n)``. A
published mean is of other episodes, and its error is not published: it fits if it lies within
``m - h - tolerance .. m + h + tolerance``. If h is wider than the file of figures allows, there are too few episodes to
decide. If the file has the same rollouts, they are compared one by one instead.
"""

from __future__ import annotations

import math
import resource
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from scipy.stats import t as student

from persistworld_cli.checkpoints.action_scale import Scale, check_poses, scale_differences, scale_of
from persistworld_cli.checkpoints.references import ModelRef
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.requests import VerifyRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import USED_PARTS
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.comparing import rollout_values
from persistworld_cli.evaluation.plan import make_plan
from persistworld_cli.evaluation.published import (
    METRICS,
    TRAINED,
    UNTRAINED,
    Published,
    load_published,
    write_published,
)
from persistworld_cli.evaluation.results import build_result
from persistworld_cli.evaluation.run import measure
from persistworld_cli.files import hash_of, write_json, write_text
from persistworld_cli.reports.tables import benchmark_name
from persistworld_cli.statistics.paired import episode_means

COUNT = 8  # missing episodes named in an error
FITS, DIFFERS, UNDECIDED, NOTE = "fits", "DIFFERS", "too few", ""
_WIDTH = 80
_GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """A measured figure and the published one.

    Attributes:
        kind: ``mean``; ``gain`` over the base; ``same``: the mean difference from the file's own rollouts.
        measured, half: mean, and half the width of its 95% interval (0 for ``same``).
        published, tolerance: those of the file.
        verdict: FITS, DIFFERS or UNDECIDED.
    """

    kind: str
    group: str
    metric: str
    measured: float
    half: float
    published: float
    tolerance: float
    verdict: str


@dataclass(frozen=True)
class Check:
    """A line of the block that is not a figure; a NOTE has no verdict."""

    name: str
    verdict: str
    text: str


def _check(name: str, differences: str, otherwise: str) -> Check:
    """DIFFERS with the differences, or FITS with the text for that case."""
    return Check(name, DIFFERS if differences else FITS, differences or otherwise)


def run(settings: Settings, request: VerifyRequest) -> dict[str, Any]:
    """Roll out, and compare the measured figures with the published ones.

    Args:
        settings: as for an evaluation; ``eval.published`` names the figures.
        request: its ``count`` episodes are spread over those in the dataset; None: the episodes of ``eval.episodes``.

    Returns:
        ``fits``, ``checks``, ``figures`` and more; ``text`` is the file with the block; ``exit_code`` is 1 if something
        does not fit. {} on ranks other than 0.

    Raises:
        PersistWorldError: as `plan.make_plan`; fewer than two episodes.
    """
    output, write = request.output, request.write_published
    published = None if write else load_published(settings.eval.published)
    if published and published.lpips != _backbone(settings):
        raise UsageError(
            f"the figures use the {published.lpips} LPIPS, the settings the {_backbone(settings)} one",
            where=f"{published.path}, rewards.lpips_backbone",
            fix="leave rewards.lpips_backbone at auto, or name other figures",
        )
    store = open_store(settings)
    settings = _few(settings, store, request.count)
    processes = PartialState(cpu=settings.launch.device == "cpu")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    alone = request.alone or not (write or (published and published.gain))
    plan = make_plan(settings, output, processes.device, alone=alone, quiet=not processes.is_main_process)
    data = measure(plan, processes)
    if data is None:
        return {}
    memory, refs = _peak_memory(), [weights.ref for weights in plan.models]
    title = settings.model.inference or settings.model.adapter or settings.model.ckpt
    measured = Measured(build_result(data, {}))
    files = WeightFiles(locate(refs[-1].ckpt, USED_PARTS))
    if write:
        return _write(write, title, _backbone(settings), measured, files)
    assert published is not None
    scale = scale_of(settings, store, refs[-1].parts, quiet=True)
    result = measured.result
    checks = [
        *_weights(refs, result, published),
        _types(files, published),
        *_actions(settings, store, scale, result, published),
        _data(result, published),
    ]
    figures = compare_figures(result, published)
    if published.gain and not request.alone:
        prints = {(model["ckpt_sha256"], model["adapter_sha256"]) for model in result["models"]}
        checks.append(_check("base", "these are the base's weights" if len(prints) < 2 else "", "not the base's"))
    verdicts = [*(check.verdict for check in checks), *(figure.verdict for figure in figures)]
    fits = not {DIFFERS, UNDECIDED} & set(verdicts)
    text = block(measured, checks, figures, title=title, published=published.description, memory=memory)
    write_text(output / "verify.txt", text)
    summary = {
        "fits": fits,
        "undecided": DIFFERS not in verdicts and not fits,
        "checks": [asdict(check) for check in checks],
        "figures": [asdict(figure) for figure in figures],
        "seconds_per_step": measured.seconds_per_step,
        "peak_memory_bytes": memory,
        **{key: result[key] for key in ("device", "device_name", "dtype", "versions")},
        "models": result["models"],
        "protocol_hash": result["protocol"]["hash"],
    }
    whole = summary | {"rollouts": result["rollouts"], "items": result["protocol"]["items"]}
    write_json(output / "verify.json", whole)
    written = {"text": str(output / "verify.txt"), "json": str(output / "verify.json")}
    return {**summary, **written, "exit_code": 0 if fits else 1}


def _few(settings: Settings, store: EpisodeStore, count: int | None) -> Settings:
    """The settings with a few of the dataset's episodes, one seed, and recorded actions only."""
    ev = settings.eval
    there = store.episodes(ev.split)
    named = list(dict.fromkeys(ev.episodes)) or there
    if count is not None and (found := [episode for episode in named if episode in there]):
        places = np.linspace(0, len(found) - 1, min(max(2, count), len(found))).round().astype(int)
        named = [found[place] for place in np.unique(places)]
    if len(named) < 2:
        benchmark = load_benchmark(ev.benchmark) if count is not None else None
        absent = [episode for episode in ev.episodes if episode not in named][:COUNT]
        fetch = benchmark.fetch(absent) if benchmark else ""
        raise PersistWorldError(
            f"episode '{named[0]}' alone gives no interval" if named else "no episode to roll out",
            where=str(store.root),
            fix="name two or more: --episodes 99,1999" + (f"; or fetch more: {fetch}" if fetch else ""),
        )
    few = replace(ev, episodes=tuple(named), seeds=ev.seeds[:1], following=(), masks=(), fvd="")
    return replace(settings, eval=few)


def _backbone(settings: Settings) -> str:
    """The LPIPS backbone: with an untrained one, LPIPS is another metric."""
    return UNTRAINED if settings.rewards.lpips_backbone == UNTRAINED else TRAINED


class Measured:
    """An evaluation's result (``eval.json``), read rollout by rollout.

    Attributes:
        result: the whole of it.
        items: the rollouts: episode, start, seed.
        episodes: of each rollout.
        labels: names of the models, the evaluated one last.
        metrics: name -> label in the result.
        protocol: hash of the protocol; it does not depend on which of the episodes were rolled out.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        own = result["protocol"]
        self.result = result
        self.items = [(str(episode), int(start), int(seed)) for episode, start, seed in own["items"]]
        self.episodes = [item[0] for item in self.items]
        self.labels = [model["label"] for model in result["models"]]
        labels = {metric["name"]: metric["label"] for metric in result["metrics"]}
        self.metrics = {name: labels[name] for name in METRICS}
        self.protocol = hash_of({k: v for k, v in own.items() if k not in ("items", "record", "hash", "subset")})

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one rollout's interaction."""
        return float(self.result["seconds_per_rollout"][self.labels[-1]]) / int(self.result["n"]["steps"])

    def values(self, group: str, metric: str, model: int = -1) -> np.ndarray:
        """Mean of every rollout (I,). Raises PersistWorldError for cameras that the world does not have."""
        if group not in self.result["rollouts"]:
            raise PersistWorldError(
                f"the world has no {group} cameras", where="world", fix="take figures of this world"
            )
        return rollout_values(self.result, group, self.metrics[metric], self.labels[model])

    def gain(self, group: str, metric: str) -> np.ndarray:
        """Gain of the evaluated model over the base, rollout by rollout."""
        return self.values(group, metric) - self.values(group, metric, 0)


# -- checks -------------------------------------------------------------------------------------------------------


def _hashes(model: Mapping[str, Any]) -> str:
    """SHA-256 of a model's weights, and of its adapter after a +."""
    return "+".join(filter(None, (model["ckpt_sha256"], model["adapter_sha256"])))


def _weights(refs: Sequence[ModelRef], result: Mapping[str, Any], published: Published) -> list[Check]:
    """The loaded weights, and whether the figures are of the same files: the same weights may lie in others.

    Keys and shapes are compared before anything is computed: another model is an error.
    """
    lines = []
    for ref, model in zip(refs, result["models"], strict=True):
        adapter = f", adapter {ref.adapter} {model['adapter_sha256'][:12]}" if ref.adapter else ""
        text = f"{ref.ckpt} {model['ckpt_sha256'][:12]}{adapter}"
        if ref == refs[-1] and published.weights:
            told = "+".join(one[:12] for one in published.weights.split("+"))
            same = _hashes(model) == published.weights
            text += ", the files of the figures" if same else f": other files than those of the figures, {told}"
        lines.append(Check("weights" if ref == refs[-1] else "base", NOTE, text))
    return lines


def _dtypes(files: WeightFiles) -> Counter[str]:
    """Type -> number of tensors of that type."""
    return Counter(str(info.dtype).removeprefix("torch.") for info in files.info.values())


def _types(files: WeightFiles, published: Published) -> Check:
    counts = _dtypes(files)
    own = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    text = f"{len(files.info)} tensors, complete for the preset; {own}"
    if not published.dtype:
        return Check("keys", FITS, text + " (published type unknown)")
    return _check("keys", f"{text}, published {published.dtype}" if set(counts) != {published.dtype} else "", text)


def _actions(
    settings: Settings, store: EpisodeStore, scale: Scale, result: Mapping[str, Any], published: Published
) -> list[Check]:
    """Compare the scale that was used with the published one, and the data's poses with the scale."""
    scaling = Check("scale", NOTE, scale.origin)
    if published.stat:
        low, high = map(np.asarray, result["models"][-1]["state_percentiles"])
        apart = scale_differences(ActionStat(low, high), ActionStat.load(resolve_path(published.stat)))
        differences = "; ".join(f"{name} {own}, published {other}" for name, own, other in apart)
        scaling = _check("scale", differences, scale.origin)
    free = replace(settings, model=replace(settings.model, strict_actions=False))
    lines = check_poses(free, store, scale, split=settings.eval.split, episodes=settings.eval.episodes, quiet=True)
    poses = "; ".join(" ".join(line.split()) for line in lines)
    return [scaling, _check("poses", poses, "in the range that the weights were trained on")]


def _data(result: Mapping[str, Any], published: Published) -> Check:
    """Whether the stored latents decode to the recorded videos well enough for the published figures."""
    short = []
    for row in result["table"]:
        wanted = published.figures.get(row["cameras"], {}).get("psnr")
        if wanted is not None and row["model"] == result["ceiling"] and not (row["psnr"] or 0) > wanted:
            short.append(f"{row['cameras']} decodes at {row['psnr']:.2f} dB, below the published {wanted:.2f}")
    return _check("data", "; ".join(short), "latents decode to the recorded videos")


# -- figures ------------------------------------------------------------------------------------------------------


def compare_figures(result: Mapping[str, Any], published: Published) -> list[Figure]:
    """Compare every figure of the file with the measured one (``eval.json``)."""
    measured, out = Measured(result), []
    places = {item: place for place, item in enumerate(published.items)}
    same = published.protocol == measured.protocol and all(item in places for item in measured.items)
    for group, own in published.figures.items():
        for metric, wanted in own.items():
            values = measured.values(group, metric)
            if same:  # the file has every one of these rollouts, under this protocol
                theirs = [published.rollouts[group][metric][places[item]] for item in measured.items]
                apart, limit = float(np.mean(np.abs(values - np.array(theirs)))), published.same[group][metric]
                verdict = FITS if apart <= limit else DIFFERS
                out.append(Figure("same", group, metric, apart, 0.0, 0.0, limit, verdict))
                continue
            kinds = [("mean", values, wanted)]
            gain = published.gain.get(group, {}).get(metric)
            if gain is not None and len(measured.labels) > 1:
                kinds.append(("gain", measured.gain(group, metric), gain))
            for kind, numbers, figure in kinds:
                mean, half = interval(numbers, measured.episodes)
                tolerance = published.tolerance[group][metric]
                verdict = FITS if abs(figure - mean) <= half + tolerance else DIFFERS
                no_gain_fits_too = kind == "gain" and abs(mean) <= half
                if verdict == FITS and (no_gain_fits_too or half > published.widest[group][metric]):
                    verdict = UNDECIDED
                out.append(Figure(kind, group, metric, mean, half, figure, tolerance, verdict))
    return out


def interval(values: np.ndarray, episodes: Sequence[str]) -> tuple[float, float]:
    """Mean over episodes of values (I,), and half the width of its 95% t interval; infinite below two episodes."""
    _, means = episode_means(values, episodes)
    means = means[np.isfinite(means)]
    if len(means) < 2:
        return (float(means[0]) if len(means) else math.nan), math.inf
    half = float(student.ppf(0.975, len(means) - 1)) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return float(means.mean()), half


def _write(path: Path, title: str, lpips: str, measured: Measured, files: WeightFiles) -> dict[str, Any]:
    """Write the measured figures as a file of figures, and the scale beside it."""
    groups = measured.result["groups"]

    def means(values: Callable[[str, str], np.ndarray]) -> dict[str, dict[str, float]]:
        return {
            group: {metric: interval(values(group, metric), measured.episodes)[0] for metric in METRICS}
            for group in groups
        }

    figures = means(measured.values)
    gain = means(measured.gain) if len(measured.labels) > 1 else {}
    low, high = measured.result["models"][-1]["state_percentiles"]
    stat = path.absolute().with_suffix(".stat.json")
    write_json(stat, {"state_01": low, "state_99": high})
    dtypes = list(_dtypes(files))
    write_published(
        path,
        description=f"{title}, measured here",
        figures=figures,
        gain=gain,
        rollouts={g: {metric: measured.values(g, metric).tolist() for metric in METRICS} for g in groups},
        items=measured.items,
        protocol=measured.protocol,
        dtype=dtypes[0] if len(dtypes) == 1 else "",
        weights=_hashes(measured.result["models"][-1]),
        lpips=lpips,
        stat=stat,
    )
    return {"published": str(path), "figures": figures, "gain": gain}


def _peak_memory() -> int:
    """Bytes: of the GPU if one was used, else of this process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return int(peak)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


# -- the block ----------------------------------------------------------------------------------------------------


def block(
    measured: Measured, checks: Sequence[Check], figures: Sequence[Figure], *, title: str, published: str, memory: int
) -> str:
    """The result as one block of text, 80 columns wide, to paste into an issue."""
    result, n, stamp = measured.result, measured.result["n"], measured.result.get("benchmark")
    verdicts = {*(check.verdict for check in checks), *(figure.verdict for figure in figures)}
    outcomes = {DIFFERS: "DOES NOT FIT", UNDECIDED: "UNDECIDED: too few episodes"}
    outcome = next((words for verdict, words in outcomes.items() if verdict in verdicts), "FITS")
    lines = [f"persistworld verify: {outcome}", *_wrap("of", title), *_wrap("against", published)]
    for check in checks:
        lines += _wrap(check.name, f"{check.verdict + ': ' if check.verdict else ''}{check.text}")
    lines += _wrap("episodes", f"{n['episodes']}: {', '.join(dict.fromkeys(measured.episodes))}")
    named = f"benchmark {benchmark_name(stamp)}" if stamp else "no benchmark"
    sampler = f"{n['steps']} steps, {n['sampler']} {n['sampling_steps']}"
    lines += _wrap("protocol", f"{named}; {sampler}; {result['protocol']['hash']}")
    lines.append(f"{'':20}{'measured':>10}{'+-':>9}{'published':>11}{'tolerance':>11}")
    for one in figures:
        name = f"{one.group} {one.metric}" + ("" if one.kind == "mean" else f" {one.kind}")
        half = "" if one.kind == "same" else f"{one.half:.3f}"
        lines.append(
            f"{name:20}{one.measured:>10.4f}{half:>9}{one.published:>11.3f}{one.tolerance:>11.3f}  {one.verdict}"
        )
    for row in result["table"]:
        if row["model"] in (result["floor"], result["ceiling"]):
            known = {metric: row[label] for metric, label in measured.metrics.items()}
            numbers = ", ".join(f"{metric} {'-' if v is None else format(v, '.3f')}" for metric, v in known.items())
            lines += _wrap("", f"{row['cameras']}, {row['model']}: {numbers}")
    kind = "GPU memory" if str(result["device"]).startswith("cuda") else "memory"
    cost = f"{measured.seconds_per_step:.3g} s per step and rollout; peak {kind} {memory / _GIB:.2f} GiB"
    lines += _wrap("time", cost)
    lines += _wrap("machine", f"{result['device_name']} ({result['device']}), {result['dtype']}")
    lines += _wrap("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    return "\n".join(lines) + "\n"


def _wrap(name: str, text: str) -> list[str]:
    """``name  text`` in lines of at most 80 columns; words longer than a line (paths) are cut."""
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10) or [name]
