"""From the rollouts of every setting to the frontier: paired losses against the reference, and who is close enough.

A loss is how much worse a figure is than the reference's, in percent of the reference's; below 0 it is better. A
setting is close enough where the worse end of every loss's interval is: that no difference was found is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.config.settings import Settings
from persistworld_cli.evaluation.protocol import describe_sampling
from persistworld_cli.evaluation.results import frame_scores
from persistworld_cli.files import jsonable
from persistworld_cli.frontier.grid import Setting
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.scoring import SHOWN, MetricInfo, ScoringOptions, camera_groups, metric_infos
from persistworld_cli.statistics.paired import FEWEST, compare, mean

YES, NO, OPEN, FEW = "yes", "no", "open", "too few"


@dataclass(frozen=True)
class Trial:
    """A setting, its rollouts in the order of the items, and FLOPs of an interaction step of one rollout, decoded."""

    setting: Setting
    rollouts: list[ScoredRollout]
    flops: int


def build_frontier(
    settings: Settings,
    scorer: Scorer,
    scoring: ScoringOptions,
    reference: Trial,
    trials: Iterable[Trial],
    percent: float,
    other_weights: bool = False,
) -> dict[str, Any]:
    """Every setting against the reference, and the choice.

    Args:
        settings: camera groups, interactions, bootstrap.
        scorer, scoring: the metrics; SSIM, PSNR and LPIPS decide, the others are shown.
        reference: what is compared with.
        trials: the others.
        percent: how much worse than the reference's figure, in percent of it, is close enough.
        other_weights: the reference was sampled with other weights than the trials.
    """
    infos = metric_infos(scorer, scoring)
    groups = camera_groups(settings.world)
    rows = [_row(settings, infos, groups, reference, trial, percent) for trial in trials]
    near = [row for row in rows if row["within"] == YES and row["calls"] < reference.setting.calls]
    chosen = min(near, key=lambda row: (row["calls"], row["worst_loss_high"]), default=None)
    n = {
        "rollouts": len(reference.rollouts),
        "episodes": len({rollout.item.episode for rollout in reference.rollouts}),
        "steps": settings.eval.steps,
    }
    told = jsonable(
        {
            "kind": "frontier",
            "n": n,
            "percent": percent,
            "groups": list(groups),
            "metrics": [{"name": name, "decides": name in SHOWN, **asdict(info)} for name, info in infos.items()],
            "reference": _described(settings, reference) | {"figures": _figures(infos, groups, reference)},
            "settings": rows,
            "chosen": chosen["name"] if chosen else None,
            "words": _words(reference.setting, rows, chosen, n, percent, other_weights),
        }
    )
    assert isinstance(told, dict)
    return told


def _described(settings: Settings, trial: Trial) -> dict[str, Any]:
    """What a setting is and what it costs; the time is that of a whole batch, with decoding and scoring."""
    return {
        "name": trial.setting.name,
        "sampling": describe_sampling(trial.setting.sampling),
        "calls": trial.setting.calls,
        "flops_per_interaction": trial.flops,
        "seconds_per_interaction": float(np.mean([r.seconds for r in trial.rollouts])) / settings.eval.steps,
    }


def _means(trial: Trial, metric: str, cameras: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean over frames and cameras of every rollout: (I,)."""
    return mean(frame_scores(trial.rollouts, metric, cameras), axis=1)


def _figures(
    infos: Mapping[str, MetricInfo], groups: Mapping[str, tuple[int, ...]], trial: Trial
) -> dict[str, dict[str, float]]:
    return {
        group: {info.label: float(mean(_means(trial, name, cams), 0)) for name, info in infos.items()}
        for group, cams in groups.items()
    }


def _row(
    settings: Settings,
    infos: Mapping[str, MetricInfo],
    groups: Mapping[str, tuple[int, ...]],
    reference: Trial,
    trial: Trial,
    percent: float,
) -> dict[str, Any]:
    """One setting: its losses by camera group and metric, and whether it is close enough."""
    episodes = [rollout.item.episode for rollout in trial.rollouts]
    losses, verdicts, highest = [], [], []
    for group, cams in groups.items():
        for name, info in infos.items():
            pair = compare(
                _means(reference, name, cams),
                _means(trial, name, cams),
                episodes,
                higher_is_better=info.higher_is_better,
                samples=settings.eval.bootstrap,
            )
            change = (pair.change, pair.change_low, pair.change_high)
            loss, low, high = _loss(pair.base, change, info.higher_is_better)
            verdict = _verdict(low, high, percent, pair.episodes)
            if name in SHOWN:
                verdicts.append(verdict)
                highest.append(high)
            losses.append(
                {"cameras": group, "metric": info.label, "reference": pair.base, "value": pair.new}
                | dict(zip(("change", "change_low", "change_high"), change, strict=True))
                | {"loss": loss, "loss_low": low, "loss_high": high, "within": verdict}
            )
    return _described(settings, trial) | {
        "fewer": reference.setting.calls / trial.setting.calls,
        "less_work": reference.flops / trial.flops,
        "within": next((word for word in (FEW, NO, OPEN) if word in verdicts), YES),
        "worst_loss_high": max(highest),
        "losses": losses,
    }


def _loss(base: float, change: tuple[float, float, float], higher_is_better: bool) -> tuple[float, float, float]:
    """A change and its interval as a loss in percent of the reference's figure, low before high."""
    middle, low, high = (100 * part / abs(base) if base else math.nan for part in change)
    return (-middle, -high, -low) if higher_is_better else (middle, low, high)


def _verdict(low: float, high: float, percent: float, episodes: int) -> str:
    if episodes < FEWEST:
        return FEW
    if high <= percent:
        return YES
    return NO if low > percent else OPEN


def _words(
    reference: Setting,
    rows: list[dict[str, Any]],
    chosen: dict[str, Any] | None,
    n: Mapping[str, int],
    percent: float,
    other: bool,
) -> str:
    """The outcome in a sentence or two."""
    if n["episodes"] < FEWEST:
        return f"{n['episodes']} episodes are too few to tell: use at least {FEWEST}"
    if chosen is None:
        return f"no setting with fewer network calls is shown to be within {percent:g}% of {reference.name}"
    text = (
        f"{chosen['name']}: {chosen['calls']} network calls a clip instead of {reference.calls} "
        f"({chosen['fewer']:.3g}x fewer), within {percent:g}% of {reference.name} in every figure"
    )
    if chosen["worst_loss_high"] < 0:
        text += ", and better in every one" + ("" if other else ": more calls do not make this model better")
    return text
