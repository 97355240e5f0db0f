"""Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022), with the weights of the package stlpips_pytorch.

LPIPS penalises a shift by one pixel heavily, this metric only slightly: a useful referee for a reward with LPIPS.
Only the package's weights are read (AlexNet, BSD 2-clause). Its code is not imported: that needs IPython and
torchsummary, and its blurred pooling is not for commercial use. The network here is written from the paper;
``tests/metrics/test_referees.py`` compares it with values of the package.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.lpips import Lpips

PACKAGE, EXTRA = "stlpips_pytorch", "pip install stlpips-pytorch"
_WEIGHTS = Path("weights") / "vST0.0" / "alex_shift_tolerant.pth"
_CONVOLUTIONS = ("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13")
_PADDING = (2, 2, 1, 1, 1)
_POOLED = (1, 2)  # layers whose input is pooled


def find_weights() -> Path | None:
    """The weights in the installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((folder / _WEIGHTS for folder in folders if (folder / _WEIGHTS).is_file()), None)


class StLpips(Lpips):
    """Shift-tolerant LPIPS as a metric: 0 for identical images, larger is worse.

    Raises:
        PersistWorldError: the package is not installed, or its weights have other names or types.
    """

    label = "st_lpips"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        path = find_weights()
        if path is None:
            raise PersistWorldError("st_lpips is not installed", where=PACKAGE, fix=EXTRA)
        self.device, self.source = torch.device(device), path
        try:
            stored = torch.load(path, map_location=self.device, weights_only=True)
            self.layers = [(stored[f"net.{name}.weight"], stored[f"net.{name}.bias"]) for name in _CONVOLUTIONS]
            lins = [stored[f"lin{i}.model.1.weight"] for i in range(len(self.layers))]
            self.shift, self.scale = stored["scaling_layer.shift"], stored["scaling_layer.scale"]
        except Exception as error:  # torch.load raises half a dozen types for a broken or foreign file
            raise PersistWorldError(
                f"these are not the weights of shift-tolerant LPIPS: {error}", where=str(path), fix=EXTRA
            ) from error
        self.weights = [partial(functional.conv2d, weight=weight) for weight in lins]

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of every layer of images in [0, 1]."""
        out = (2.0 * images.float() - 1.0 - self.shift) / self.scale
        taken = []
        for number, ((weight, bias), padding) in enumerate(zip(self.layers, _PADDING, strict=True)):
            if number in _POOLED:
                out = _blurred(functional.max_pool2d(out, 3, stride=1))
            out = functional.conv2d(out, weight, bias, padding=padding)
            out = functional.relu(_blurred(out) if number == 0 else out)
            taken.append(out / (out.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taken

    def describe(self) -> dict[str, object]:
        """Network and where its weights came from."""
        return {"label": self.label, "net": "alex", "version": "ST0.0", "weights": PACKAGE}


def _blurred(features: Tensor) -> Tensor:
    """Downsample by 2 after a binomial 3x3 filter, so that a shift by one pixel changes features little."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=features.dtype, device=features.device)
    channels = features.shape[1]
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    return functional.conv2d(functional.pad(features, (2, 2, 2, 2), "reflect"), kernel, stride=2, groups=channels)
