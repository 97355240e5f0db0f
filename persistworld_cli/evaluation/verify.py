"""`persistworld verify`: do these weights, on this data, give the figures that others measured with them?

The rollouts and their numbers are an evaluation's (`run.measure`, `results.build_result`).

When a figure fits: let m be the mean and s the standard deviation of the n episodes' means, and
``h = t(0.975, n - 1) s / sqrt(n)``. The published mean is of other episodes, and its own error is not published: it
fits where it lies within ``m - h - tolerance .. m + h + tolerance``. Where h is wider than the file of figures allows,
too few episodes were rolled out to say. Where the file has the very same rollouts, they are compared one by one
instead.
"""

from __future__ import annotations

import math
import resource
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from scipy.stats import t as student

from persistworld_cli.checkpoints.action_scale import Scale, check_poses, scale_differences, scale_of
from persistworld_cli.checkpoints.references import ModelRef
from persistworld_cli.checkpoints.sources import PARTS, locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import ActionStat, EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.evaluation.benchmarks import load_benchmark
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
from persistworld_cli.files import hash_of, write_json
from persistworld_cli.models.world_model import CARRIED
from persistworld_cli.statistics.paired import episode_means

COUNT = 8  # episodes, where the user says nothing
FITS, DIFFERS, UNDECIDED, TOLD = "fits", "DIFFERS", "too few", ""
_WIDTH = 80
_GIB = 2**30


@dataclass(frozen=True)
class Figure:
    """One figure beside the published one.

    Attributes:
        kind: ``mean``; ``gain`` over the base; ``same``: the mean difference from the file's own rollouts.
        measured, half: mean, and half the width of its 95% interval (0 for ``same``).
        published, tolerance: of the file.
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
    """One line of the block that is no figure."""

    name: str
    verdict: str
    text: str


def run(settings: Settings, job: Mapping[str, Any]) -> dict[str, Any]:
    """Roll out, and hold what was measured against what was published.

    Args:
        settings: as for an evaluation; ``eval.published`` names the figures.
        job: ``output`` (folder); optional ``count`` (episodes at most, spread over those that are there; None: those of
            ``eval.episodes``), ``alone`` (without the base, where the figures have a gain over it), ``write`` (a file:
            what is measured is written there as figures, and compared with none).

    Returns:
        ``fits``, ``checks``, ``figures`` and more; ``text`` is the file with the block; ``exit_code`` 1 where it does
        not fit. {} on ranks other than 0.

    Raises:
        PersistWorldError: as `plan.make_plan`; fewer than two episodes.
    """
    output = Path(job["output"])
    write = job.get("write")
    published = None if write else load_published(settings.eval.published)
    if published and published.lpips != _backbone(settings):
        raise UsageError(
            f"the figures are of a {published.lpips} LPIPS, the settings take a {_backbone(settings)} one",
            where=f"{published.path}, rewards.lpips_backbone",
            fix="leave rewards.lpips_backbone at auto, or name other figures",
        )
    store = open_store(settings)
    settings = _few(settings, store, job.get("count"))
    processes = PartialState(cpu=settings.launch.device == "cpu")
    _reset_memory()
    own = {"alone": job.get("alone") or not (write or (published and published.gain))}
    plan = make_plan(settings, own, output, processes.device, quiet=not processes.is_main_process)
    data = measure(plan, processes)
    if data is None:
        return {}
    memory, refs = _peak_memory(), [weights.ref for weights in plan.models]
    result = build_result(data, {})
    files = WeightFiles(locate(refs[-1].ckpt, [part for part in PARTS if part != CARRIED]))
    if write:
        return _write(Path(write), settings, result, files)
    assert published is not None
    scale = scale_of(settings, store, refs[-1].parts, quiet=True)
    checks = [
        *_weights(refs, result),
        _types(files, published),
        *_actions(settings, store, scale, result, published),
        _record(result, published),
    ]
    figures = compare_figures(result, published)
    if published.gain and not job.get("alone"):
        checks.append(_other_than_base(result))
    verdicts = [*(check.verdict for check in checks), *(figure.verdict for figure in figures)]
    fits = not any(verdict in (DIFFERS, UNDECIDED) for verdict in verdicts)
    title = _title(settings)
    text = block(result, checks, figures, fits, title=title, published=published.description, memory=memory)
    (output / "verify.txt").write_text(text, encoding="utf-8")
    summary = {
        "fits": fits,
        "undecided": DIFFERS not in verdicts and not fits,
        "checks": [asdict(check) for check in checks],
        "figures": [asdict(figure) for figure in figures],
        "seconds_per_step": _seconds(result),
        "peak_memory_bytes": memory,
        **{key: result[key] for key in ("device", "device_name", "dtype", "versions")},
        "models": result["models"],
        "protocol": result["protocol"]["hash"],
        "rollouts": result["rollouts"],
        "items": result["protocol"]["items"],
    }
    write_json(output / "verify.json", summary)
    for name in ("rollouts", "items"):  # of use in the file alone
        del summary[name]
    written = {"text": str(output / "verify.txt"), "json": str(output / "verify.json")}
    return {**summary, **written, "exit_code": 0 if fits else 1}


def _few(settings: Settings, store: EpisodeStore, count: int | None) -> Settings:
    """The settings with a few of the episodes that are there, one seed, and nothing but recorded actions."""
    ev = settings.eval
    named = list(dict.fromkeys(ev.episodes)) or store.episodes(ev.split)
    if count is not None:
        there = set(store.episodes(ev.split))
        found = [episode for episode in named if episode in there]
        if len(found) >= 2:
            places = np.unique(np.linspace(0, len(found) - 1, min(max(2, count), len(found))).round().astype(int))
            named = [found[i] for i in places]
        elif found:
            named = found
    if len(named) < 2:
        benchmark = load_benchmark(ev.benchmark) if count is not None else None
        absent = [episode for episode in ev.episodes if episode not in named][:COUNT]
        fetch = benchmark.fetch(absent) if benchmark else ""
        raise PersistWorldError(
            f"episode '{named[0]}' alone gives no interval" if named else "no episode to roll out",
            where=str(store.root),
            fix="name two or more: --episodes 99,1999" + (f"; or fetch more: {fetch}" if fetch else ""),
        )
    return replace(
        settings, eval=replace(ev, episodes=tuple(named), seeds=ev.seeds[:1], following=(), masks=(), fvd="")
    )


def _title(settings: Settings) -> str:
    return settings.model.inference or settings.model.adapter or settings.model.ckpt


# -- checks -------------------------------------------------------------------------------------------------------


def _weights(refs: Sequence[ModelRef], result: Mapping[str, Any]) -> list[Check]:
    """What was loaded. Keys and shapes were compared before anything was computed: another model is an error."""
    lines = []
    for ref, model in zip(refs, result["models"], strict=True):
        name = "weights" if ref == refs[-1] else "base"
        parts = [f"{ref.ckpt} {model['ckpt_sha256'][:12]}"]
        if ref.adapter:
            parts.append(f"adapter {ref.adapter} {model['adapter_sha256'][:12]}")
        lines.append(Check(name, TOLD, ", ".join(parts)))
    return lines


def _types(files: WeightFiles, published: Published) -> Check:
    counts: dict[str, int] = {}
    for info in files.info.values():
        name = str(info.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + 1
    own = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    text = f"{len(files.info)} tensors, all that the preset has; {own}"
    if not published.dtype:
        return Check("keys", FITS, text + " (published type unknown)")
    other = set(counts) != {published.dtype}
    return Check("keys", DIFFERS if other else FITS, text + (f", published {published.dtype}" if other else ""))


def _actions(
    settings: Settings, store: EpisodeStore, scale: Scale, result: Mapping[str, Any], published: Published
) -> list[Check]:
    """The scale that was used beside the published one, and the data's poses beside the scale."""
    low, high = (np.asarray(part) for part in result["models"][-1]["state_percentiles"])
    used = ActionStat(low, high)
    checks = []
    if published.stat:
        apart = scale_differences(used, ActionStat.load(resolve_path(published.stat)))
        told = "; ".join(f"{name} {own}, published {other}" for name, own, other in apart)
        checks.append(Check("scale", DIFFERS if apart else FITS, told or scale.origin))
    else:
        checks.append(Check("scale", TOLD, scale.origin))
    free = replace(settings, model=replace(settings.model, strict_actions=False))
    lines = check_poses(free, store, scale, split=settings.eval.split, episodes=settings.eval.episodes, quiet=True)
    told = "; ".join(" ".join(line.split()) for line in lines)
    checks.append(Check("poses", DIFFERS if lines else FITS, told or "look like those that the weights know"))
    return checks


def _record(result: Mapping[str, Any], published: Published) -> Check:
    """Whether the stored latents decode to the recorded videos well enough for the published figures."""
    short = []
    for row in result["table"]:
        wanted = published.figures.get(row["cameras"], {}).get("psnr")
        if wanted is not None and row["model"] == result["ceiling"] and not (row["psnr"] or 0) > wanted:
            short.append(f"{row['cameras']} decodes at {row['psnr']:.2f} dB, below the published {wanted:.2f}")
    told = "; ".join(short) or "latents decode to the recorded videos"
    return Check("data", DIFFERS if short else FITS, told)


def _other_than_base(result: Mapping[str, Any]) -> Check:
    """The figures have a gain over the base: the weights must be others than its."""
    prints = [(model["ckpt_sha256"], model["adapter_sha256"]) for model in result["models"]]
    same = len(prints) < 2 or prints[0] == prints[1]
    return Check("base", DIFFERS if same else FITS, "these are the base's weights" if same else "other weights than it")


# -- figures ------------------------------------------------------------------------------------------------------


def compare_figures(result: Mapping[str, Any], published: Published) -> list[Figure]:
    """Every figure of the file beside what an evaluation measured (``eval.json``)."""
    episodes = [item[0] for item in result["protocol"]["items"]]
    labels = [model["label"] for model in result["models"]]
    names = _labels(result)
    out = []
    twin = _twin(result, published)
    for group, own in published.figures.items():
        for metric, wanted in own.items():
            values = _rollouts(result, group, names[metric], labels[-1])
            tolerance, widest = published.tolerance[group][metric], published.widest[group][metric]
            if twin:
                theirs = [published.rollouts[group][metric][twin[tuple(item)]] for item in _items(result)]
                apart = float(np.mean(np.abs(values - np.array(theirs))))
                limit = published.same[group][metric]
                verdict = FITS if apart <= limit else DIFFERS
                out.append(Figure("same", group, metric, apart, 0.0, 0.0, limit, verdict))
            else:
                out.append(_figure("mean", group, metric, values, episodes, wanted, tolerance, widest))
            gain = published.gain.get(group, {}).get(metric)
            if gain is not None and len(labels) > 1 and not twin:
                base = _rollouts(result, group, names[metric], labels[0])
                out.append(_figure("gain", group, metric, values - base, episodes, gain, tolerance, widest))
    return out


def _figure(
    kind: str,
    group: str,
    metric: str,
    values: np.ndarray,
    episodes: Sequence[str],
    published: float,
    tolerance: float,
    widest: float,
) -> Figure:
    mean, half = interval(values, episodes)
    verdict = FITS if abs(published - mean) <= half + tolerance else DIFFERS
    if kind == "gain" and abs(mean) <= half and verdict == FITS:
        verdict = UNDECIDED  # no gain at all fits as well
    if half > widest and verdict == FITS:
        verdict = UNDECIDED
    return Figure(kind, group, metric, mean, half, published, tolerance, verdict)


def interval(values: np.ndarray, episodes: Sequence[str]) -> tuple[float, float]:
    """Mean over episodes of values (I,), and half the width of its 95% t interval; infinite below two episodes."""
    _, means = episode_means(values, episodes)
    means = means[np.isfinite(means)]
    if len(means) < 2:
        return (float(means[0]) if len(means) else math.nan), math.inf
    half = float(student.ppf(0.975, len(means) - 1)) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return float(means.mean()), half


def _labels(result: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> its label in the result."""
    names = {metric["name"]: metric["label"] for metric in result["metrics"]}
    return {metric: names[metric] for metric in METRICS}


def _backbone(settings: Settings) -> str:
    """Of LPIPS: an untrained one is another metric."""
    return UNTRAINED if settings.rewards.lpips_backbone == UNTRAINED else TRAINED


def _rollouts(result: Mapping[str, Any], group: str, label: str, model: str) -> np.ndarray:
    if group not in result["rollouts"]:
        raise PersistWorldError(f"the world has no {group} cameras", where="world", fix="take figures of this world")
    values = result["rollouts"][group][label][model]
    return np.array([math.nan if value is None else value for value in values])


def _items(result: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    return [(str(episode), int(start), int(seed)) for episode, start, seed in result["protocol"]["items"]]


def _protocol_of_one(result: Mapping[str, Any]) -> str:
    """Hash of the protocol, whichever episodes of it were rolled out."""
    return hash_of({k: v for k, v in result["protocol"].items() if k not in ("items", "record", "hash", "subset")})


def _twin(result: Mapping[str, Any], published: Published) -> dict[tuple[Any, ...], int]:
    """Item -> its place in the file, where the file has every rollout that was made, under this protocol; else {}."""
    places: dict[tuple[Any, ...], int] = {item: place for place, item in enumerate(published.items)}
    known = published.protocol == _protocol_of_one(result) and all(item in places for item in _items(result))
    return places if known else {}


def _write(path: Path, settings: Settings, result: Mapping[str, Any], files: WeightFiles) -> dict[str, Any]:
    """What was measured as a file of figures (with its scale beside)."""
    labels = [model["label"] for model in result["models"]]
    episodes, names = [item[0] for item in _items(result)], _labels(result)
    figures: dict[str, dict[str, float]] = {}
    gain: dict[str, dict[str, float]] = {}
    rollouts: dict[str, dict[str, list[float]]] = {}
    for group in result["groups"]:
        own = {metric: _rollouts(result, group, names[metric], labels[-1]) for metric in METRICS}
        figures[group] = {metric: interval(values, episodes)[0] for metric, values in own.items()}
        rollouts[group] = {metric: values.tolist() for metric, values in own.items()}
        if len(labels) > 1:
            base = {metric: _rollouts(result, group, names[metric], labels[0]) for metric in METRICS}
            gain[group] = {metric: interval(own[metric] - base[metric], episodes)[0] for metric in METRICS}
    low, high = result["models"][-1]["state_percentiles"]
    stat = path.absolute().with_suffix(".stat.json")
    write_json(stat, {"state_01": low, "state_99": high})
    kinds = {str(info.dtype).removeprefix("torch.") for info in files.info.values()}
    write_published(
        path,
        description=f"{_title(settings)}, measured here",
        figures=figures,
        gain=gain,
        rollouts=rollouts,
        items=_items(result),
        protocol=_protocol_of_one(result),
        dtype=kinds.pop() if len(kinds) == 1 else "",
        lpips=_backbone(settings),
        stat=stat,
    )
    return {"published": str(path), "figures": figures, "gain": gain}


# -- cost ---------------------------------------------------------------------------------------------------------


def _seconds(result: Mapping[str, Any]) -> float:
    """Of an interaction step of one rollout."""
    label = result["models"][-1]["label"]
    return float(result["seconds_per_rollout"][label]) / int(result["n"]["steps"])


def _reset_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> int:
    """Bytes: of the GPU where one computed, else of this process."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return int(peak)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


# -- the block ----------------------------------------------------------------------------------------------------


def block(
    result: Mapping[str, Any],
    checks: Sequence[Check],
    figures: Sequence[Figure],
    fits: bool,
    *,
    title: str,
    published: str,
    memory: int,
) -> str:
    """The result as one block of text, 80 columns wide, to be pasted into an issue."""
    verdicts = [*(check.verdict for check in checks), *(figure.verdict for figure in figures)]
    said = "FITS" if fits else "DOES NOT FIT" if DIFFERS in verdicts else "UNDECIDED: too few episodes"
    n, stamp = result["n"], result.get("benchmark")
    items = _items(result)
    shown = ", ".join(dict.fromkeys(item[0] for item in items))
    lines = [f"persistworld verify: {said}", *_wrap("of", title), *_wrap("against", published)]
    for check in checks:
        lines += _wrap(check.name, f"{check.verdict + ': ' if check.verdict else ''}{check.text}")
    lines += _wrap("episodes", f"{n['episodes']}: {shown}")
    named = f"benchmark {stamp['name']} v{stamp['version']}" if stamp else "no benchmark"
    changed = f", changed in {', '.join(stamp['changed'])}" if stamp and stamp["changed"] else ""
    sampler = f"{n['steps']} steps, {n['sampler']} {n['sampling_steps']}"
    lines += _wrap("protocol", f"{named}{changed}; {sampler}; {result['protocol']['hash']}")
    lines.append(f"{'':20}{'measured':>10}{'+-':>9}{'published':>11}{'tolerance':>11}")
    for one in figures:
        name = f"{one.group} {one.metric}" + ("" if one.kind == "mean" else f" {one.kind}")
        half = "" if one.kind == "same" else f"{one.half:.3f}"
        lines.append(
            f"{name:20}{one.measured:>10.4f}{half:>9}{one.published:>11.3f}{one.tolerance:>11.3f}  {one.verdict}"
        )
    for row in result["table"]:
        if row["model"] in (result["floor"], result["ceiling"]):
            numbers = ", ".join(f"{metric} {_number(row[label])}" for metric, label in _labels(result).items())
            lines += _wrap("", f"{row['cameras']}, {row['model']}: {numbers}")
    kind = "GPU memory" if str(result["device"]).startswith("cuda") else "memory"
    lines += _wrap("time", f"{_seconds(result):.3g} s per step and rollout; peak {kind} {memory / _GIB:.2f} GiB")
    lines += _wrap("machine", f"{result['device_name']} ({result['device']}), {result['dtype']}")
    lines += _wrap("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _wrap(name: str, text: str) -> list[str]:
    """``name  text`` in lines of at most 80 columns; words longer than a line (paths) are cut."""
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{name:10}", subsequent_indent=" " * 10) or [name]
