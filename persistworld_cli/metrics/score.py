"""Metrics of predicted images, and the reward of a rollout, computed from them.

Shape legend: B rollouts, N frames, V cameras, H x W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from persistworld_cli.config.plugins import running
from persistworld_cli.config.settings import RewardSettings, WorldSettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.metrics.referees import Referee
from persistworld_cli.metrics.registry import Metric, make_reward
from persistworld_cli.stages import stage


class _Images:
    """Rollouts as the flat images that metrics take.

    drawn (M, 3, H, W) and known (T, 3, H, W) in [0, 1], M a multiple of T, in the order that `Metric` requires.
    """

    def __init__(self, pred: Tensor, target: Tensor) -> None:
        if pred.shape[1:] != target.shape[1:] or pred.shape[0] % max(1, target.shape[0]):
            raise PersistWorldError(
                f"predicted {tuple(pred.shape)} and recorded {tuple(target.shape)} images do not fit together",
                where="rewards",
                fix="give the same frames, cameras and size; rollouts a multiple of recordings",
            )
        self.shape = pred.shape[:3]
        self.groups = target.shape[0]
        self.drawn = pred.clamp(0.0, 1.0).unflatten(0, (self.groups, -1)).movedim(1, 3).flatten(0, 3)
        self.known = target.flatten(0, 2)

    def score(self, metric: Callable[..., Tensor], label: str, *grid: tuple[int, int]) -> Tensor:
        """A metric's values in the rollouts' order: (B, N, V, ...). Raises PersistWorldError where a user's fails."""
        with running("metric", label):
            value = metric(self.drawn, self.known, *grid)
        batch, frames, views = self.shape
        if (shape := tuple(getattr(value, "shape", ())))[:1] != self.drawn.shape[:1]:
            raise PersistWorldError(
                f"{label} gives values of shape {shape} for {len(self.drawn)} images",
                where="rewards.weights",
                fix="return one value per predicted image",
            )
        apart = value.to(self.drawn.device).unflatten(0, (self.groups, frames, views, batch // self.groups))
        return apart.movedim(3, 1).flatten(0, 1)


def _with_its_sign(name: str, weight: float, metric: Metric) -> float:
    """The weight of a reward. Raises UsageError if it rewards what the metric calls worse."""
    if weight and (weight > 0) != metric.higher_is_better:
        better = "higher" if metric.higher_is_better else "lower"
        raise UsageError(
            f"the reward's weight of {name} is {weight:g}, but {better} is better: worse images would be rewarded",
            where="rewards.weights",
            fix=f"give {-weight:g}",
        )
    return weight


def _require_finite(values: Sequence[Tensor], labels: Iterable[str]) -> None:
    """Raise PersistWorldError for the first metric that is not finite; one wait for a GPU in all."""
    if not values:
        return
    for label, finite in zip(labels, torch.stack([torch.isfinite(v).all() for v in values]).tolist(), strict=True):
        if not finite:
            raise PersistWorldError(
                f"{label} is not finite",
                where="rewards",
                fix="the predicted images hold NaN: check the weights, the learning rate and the precision",
            )


class Scorer:
    """Scores rollouts against the recording.

    Attributes:
        names: the computed metrics, in the order of tables.
        labels: name -> label (``lpips (untrained)`` for that one).
        registered: name -> metric.
        referees: name -> metric that is computed but is not part of the reward (`with_referees`).
        caveat: what a reader of the reward must know (``lpips (untrained)``), or "".
    """

    def __init__(
        self,
        rewards: RewardSettings,
        world: WorldSettings,
        device: torch.device | str = "cpu",
        names: Iterable[str] | None = None,
    ) -> None:
        """Build the metrics that have a weight, and those in ``names`` (for reports).

        Raises:
            UsageError: an unknown name, or camera weights that do not match the cameras.
        """
        self.device = torch.device(device)
        cameras = len(world.cameras)
        given = tuple(rewards.camera_weights) or (1.0,) * cameras
        if len(given) != cameras or min(given) < 0 or sum(given) <= 0:
            raise UsageError(
                f"{len(given)} camera weights {list(given)} for {cameras} cameras",
                where="rewards.camera_weights",
                fix="give one weight >= 0 per camera, not all 0, or none at all for equal weights",
            )
        self.camera_weights = torch.tensor(given, dtype=torch.float32, device=self.device) / sum(given)
        self.weights: dict[str, float] = {}
        self.registered: dict[str, Metric] = {}
        for name in dict.fromkeys([*(names or ()), *rewards.weights]):
            key, metric = make_reward(name, rewards, self.device)
            if key in self.registered:
                raise UsageError(f"two rewards have the label '{key}'", where="rewards.weights", fix="change one")
            self.registered[key] = metric
            if name in rewards.weights:
                self.weights[key] = _with_its_sign(name, rewards.weights[name], metric)
        self.names = tuple(self.registered)
        self.labels = {name: metric.label for name, metric in self.registered.items()}
        self.referees: dict[str, Referee] = {}
        self.caveat = ", ".join(label for label in self.labels.values() if "untrained" in label)

    def with_referees(self, referees: Mapping[str, Referee]) -> Scorer:
        """A copy that computes referees too. Raises UsageError if one has a metric's label."""
        for label in referees:
            if label in self.registered:
                what = f"the referee '{label}' has the label of a reward"
                raise UsageError(what, where="post_train.referees", fix="leave it out, or change its label")
        scorer = copy.copy(self)
        scorer.referees = dict(referees)
        scorer.names = (*self.names, *referees)
        return scorer

    def place(self, images: Tensor) -> Tensor:
        """Images on the scorer's device; a GPU copies them from the CPU without a wait."""
        return images.to(self.device, non_blocking=self.device.type == "cuda")

    @torch.no_grad()
    @stage("scoring")
    def metrics(self, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Every metric of every image.

        Args:
            pred: (B, N, V, 3, H, W) in [0, 1].
            target: the same shape, or (B/k, N, V, 3, H, W): each recording then belongs to k consecutive rollouts
                (the candidates of a group), and what depends only on it is computed once.

        Returns:
            name -> (B, N, V) float32.

        Raises:
            PersistWorldError: shapes that do not match, or a metric that is not finite.
        """
        images = _Images(self.place(pred), self.place(target))
        metrics = {**self.registered, **self.referees}
        values = {name: images.score(metric, metric.label) for name, metric in metrics.items()}
        _require_finite([*values.values()], [metric.label for metric in metrics.values()])
        return values

    @torch.no_grad()
    @stage("scoring")
    def local(self, pred: Tensor, target: Tensor, grid: tuple[int, int], level: Mapping[str, Tensor]) -> Tensor:
        """How much of the reward of an image comes from each cell of a grid of rows x columns: (B, N, V, *grid).

        By the chain rule around a level: only differences between images of the same level and cell mean something;
        their mean over the cells is, to first order, the difference of `by_image`.

        Args:
            pred, target: as for `metrics`, and so are the errors.
            grid: rows and columns.
            level: metric -> (B, N, V), the value around which its slope is taken.

        Camera weights are not applied.
        """
        images = _Images(self.place(pred), self.place(target))
        metrics = {name: self.registered[name] for name in self.weights}
        maps = {name: images.score(metric.maps, metric.label, grid) for name, metric in metrics.items()}
        _require_finite([*maps.values()], [metric.label for metric in metrics.values()])
        slopes = {name: metric.slope(self.place(level[name]))[..., None, None] for name, metric in metrics.items()}
        return torch.stack([self.weights[name] * slopes[name] * maps[name] for name in metrics]).sum(dim=0)

    def by_image(self, metrics: dict[str, Tensor]) -> Tensor:
        """The weighted sum of metrics of every image: (B, N, V)."""
        if not self.weights:
            raise UsageError("no reward has a weight", where="rewards.weights", fix="give at least one")
        return torch.stack([weight * metrics[name] for name, weight in self.weights.items()]).sum(dim=0)

    def reward(self, metrics: dict[str, Tensor]) -> Tensor:
        """Mean over frames, weighted mean over cameras, of `by_image`: (B,) (method.md section 4)."""
        return (self.by_image(metrics).mean(dim=1) * self.camera_weights).sum(dim=1)

    def describe(self) -> dict[str, object]:
        """The exact parameters of every metric, for result files."""
        return {name: metric.describe() for name, metric in self.registered.items()}
