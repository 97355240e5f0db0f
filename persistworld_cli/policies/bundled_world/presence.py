"""Object presence: a referee for training on the bundled world (``post_train.referees``).

The world's objects have six saturated colours. Each colour should fill about as many
pixels in a predicted image as in the recorded one, at any place: a lost or faded object counts, a shifted one does not.

Shape legend: as in `metrics.registry.Metric`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from persistworld_cli.data.metadata.annotations import load_annotation
from persistworld_cli.errors import UsageError
from persistworld_cli.metrics.masks import HUE_OF_OBJECT, SATURATION, VALUE, hsv, hue_distance
from persistworld_cli.policies.bundled_world.scene import OBJECT_POSE

HUES = {"red": 1.0, "yellow": 50.0, "green": 124.0, "cyan": 187.0, "blue": 232.0, "magenta": 316.0}  # degrees
SMALLEST = 8  # pixels: fewer in the recording are ignored


class ObjectsKept:
    """Share of the recording's coloured area that the prediction shows, mean over colours, each at most 1."""

    label = "objects_kept"
    higher_is_better = True

    def check_dataset(self, root: Path) -> None:
        """Raise UsageError unless the dataset's annotations have the objects' poses, as only the bundled world's do."""
        path = next(iter(sorted(root.glob("annotation/*/*.json"))), None)
        if path is None or OBJECT_POSE not in load_annotation(path, (OBJECT_POSE,)):
            raise UsageError(
                f"referee {self.label} counts the bundled world's coloured objects, which this dataset does not have",
                where=f"post_train.referees; no {OBJECT_POSE} in {path or root}",
                fix='leave it out: --set \'post_train.referees=["sharpness_gap", "st_lpips"]\'',
            )

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W) in [0,1] -> (M,); 1 where the recording shows no object."""
        known = _areas(target).repeat(pred.shape[0] // target.shape[0], axis=0)
        there = known >= SMALLEST
        share = np.where(there, np.minimum(1.0, _areas(pred) / np.maximum(known, 1)), 0.0).sum(axis=1)
        kept = np.where(there.any(axis=1), share / np.maximum(there.sum(axis=1), 1), 1.0)
        return torch.from_numpy(kept).float().to(pred.device)


def _areas(images: Tensor) -> NDArray[np.int64]:
    """(M, colours): pixels of each colour in images (M,3,H,W)."""
    hue, saturation, value = hsv(images.movedim(1, -1).cpu().numpy())
    coloured = (saturation >= SATURATION) & (value >= VALUE)
    areas = [(coloured & (hue_distance(hue, own) <= HUE_OF_OBJECT)).sum(axis=(1, 2)) for own in HUES.values()]
    return np.stack(areas, axis=1)
