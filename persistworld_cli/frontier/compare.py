"""Compute the frontier from all rollouts: paired losses against the reference, and which settings are close enough.

A loss is how much worse a figure is than the reference's, in percent of the reference's; a negative loss is a gain. A
setting is close enough if the worse end of every loss's interval is: to find no difference is not enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
from persistworld_cli.rollout.scoring import SHOWN, ScoringOptions, camera_groups, metric_infos
from persistworld_cli.statistics.paired import FEWEST, compare, mean

YES, NO, OPEN, FEW = "yes", "no", "open", "too few"


@dataclass(frozen=True)
class Trial:
    """A setting, its rollouts in the order of the items, and the FLOPs of one interaction of one rollout."""

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
        reference: the reference setting.
        trials: the settings to compare with it.
        percent: largest loss, in percent of the reference's figure, that is close enough.
        other_weights: the reference was sampled with other weights than the trials.
    """
    infos, groups = metric_infos(scorer, scoring), camera_groups(settings.world)
    episodes = [rollout.item.episode for rollout in reference.rollouts]

    def means(trial: Trial, metric: str, cameras: Sequence[int]) -> NDArray[np.float64]:
        return mean(frame_scores(trial.rollouts, metric, cameras), axis=1)  # of every rollout (I,)

    def described(trial: Trial) -> dict[str, Any]:
        """A setting and its cost; the time includes decoding and scoring of a whole batch."""
        return {
            "name": trial.setting.name,
            "sampling": describe_sampling(trial.setting.sampling),
            "calls": trial.setting.calls,
            "flops_per_interaction": trial.flops,
            "seconds_per_interaction": float(np.mean([r.seconds for r in trial.rollouts])) / settings.eval.steps,
        }

    def row(trial: Trial) -> dict[str, Any]:
        """One setting: its losses by camera group and metric, and whether it is close enough."""
        losses: list[dict[str, Any]] = []
        deciding: list[dict[str, Any]] = []
        for group, cameras in groups.items():
            for name, info in infos.items():
                base, new, up = means(reference, name, cameras), means(trial, name, cameras), info.higher_is_better
                pair = compare(base, new, episodes, higher_is_better=up, samples=settings.eval.bootstrap)
                change = (pair.change, pair.change_low, pair.change_high)
                loss, low, high = _loss(pair.base, change, up)
                losses.append(
                    {"cameras": group, "metric": info.label, "reference": pair.base, "value": pair.new}
                    | dict(zip(("change", "change_low", "change_high"), change, strict=True))
                    | {"loss": loss, "loss_low": low, "loss_high": high}
                    | {"within": _verdict(low, high, percent, pair.episodes)}
                )
                deciding += losses[-1:] if name in SHOWN else []
        verdicts = {loss["within"] for loss in deciding}
        return described(trial) | {
            "calls_ratio": reference.setting.calls / trial.setting.calls,
            "flops_ratio": reference.flops / trial.flops,
            "within": next((word for word in (FEW, NO, OPEN) if word in verdicts), YES),
            "worst_loss_high": max(loss["loss_high"] for loss in deciding),
            "losses": losses,
        }

    rows = [row(trial) for trial in trials]
    near = [row for row in rows if row["within"] == YES and row["calls"] < reference.setting.calls]
    chosen = min(near, key=lambda row: (row["calls"], row["worst_loss_high"]), default=None)
    figures = {
        group: {info.label: mean(means(reference, name, cameras), 0) for name, info in infos.items()}
        for group, cameras in groups.items()
    }
    n = {"rollouts": len(episodes), "episodes": len(set(episodes)), "steps": settings.eval.steps}
    result: dict[str, Any] = jsonable(
        {
            "kind": "frontier",
            "n": n,
            "percent": percent,
            "groups": list(groups),
            "metrics": [{"name": name, "decides": name in SHOWN, **asdict(info)} for name, info in infos.items()],
            "reference": described(reference) | {"figures": figures},
            "settings": rows,
            "chosen": chosen["name"] if chosen else None,
            "conclusion": _conclusion(reference.setting, chosen, n["episodes"], percent, other_weights),
        }
    )
    return result


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


def _conclusion(
    reference: Setting, chosen: Mapping[str, Any] | None, episodes: int, percent: float, other_weights: bool
) -> str:
    """The conclusion in a sentence or two."""
    if episodes < FEWEST:
        return f"{episodes} episodes are too few to decide: use at least {FEWEST}"
    if chosen is None:
        return f"no setting with fewer network calls is shown to be within {percent:g}% of {reference.name}"
    text = (
        f"{chosen['name']}: {chosen['calls']} network calls per clip instead of {reference.calls} "
        f"({chosen['calls_ratio']:.3g}x fewer), within {percent:g}% of {reference.name} in every figure"
    )
    if chosen["worst_loss_high"] < 0:
        text += ", and better in every one" + ("" if other_weights else ": more calls do not make this model better")
    return text
