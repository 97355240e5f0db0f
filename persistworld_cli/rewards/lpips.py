"""LPIPS (Zhang et al. 2018) by the lpips package, with its backbone loaded without a network.

The package would fetch ImageNet weights while it is built. Here the backbone is built untrained and then filled from a
file: one given in the settings, or one that torchvision has left in torch's hub cache. Where there is none, the
backbone stays untrained, drawn from a fixed seed: still a distance between pictures, the same on every machine, but no
perceptual one, and its label says so everywhere: ``lpips (untrained)``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from persistworld_cli.compat import ensure_torchvision
from persistworld_cli.config.settings import RewardSettings
from persistworld_cli.errors import PersistWorldError, UsageError, nearest

# Names of torchvision's files in the hub cache; the first one is what current releases use.
CACHED = {
    "alex": ("alexnet-owt-7be5be79.pth", "alexnet-*.pth"),
    "vgg": ("vgg16-397923af.pth", "vgg16-*.pth"),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", "squeezenet1_1-*.pth"),
}
SMALLEST = 31  # pixels: below this AlexNet's second pooling has nothing left
UNTRAINED_SEED = 20180111
LABEL, LABEL_UNTRAINED = "lpips", "lpips (untrained)"


def find_backbone(net: str, choice: str) -> Path | None:
    """The file of ImageNet weights to use, or None for the untrained backbone.

    Args:
        net: alex | vgg | squeeze.
        choice: ``auto`` (torch's hub cache, else None), ``untrained``, or a path.

    Raises:
        PersistWorldError: a path that is not there.
    """
    if choice == "untrained":
        return None
    if choice == "auto":
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        for pattern in CACHED[net]:
            found = sorted(folder.glob(pattern))
            if found:
                return found[0]
        return None
    path = Path(choice).expanduser()
    if not path.is_file():
        raise PersistWorldError(
            f"no LPIPS backbone at {path}",
            where="rewards.lpips_backbone",
            fix="give torchvision's state dict (e.g. alexnet-owt-7be5be79.pth), 'auto' or 'untrained'",
        )
    return path


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    """Fill the lpips package's slices (``slice2.3.weight``) from torchvision's names (``features.3.weight``)."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {key: stored["features." + key.split(".", 1)[1]] for key in backbone.state_dict()}
        backbone.load_state_dict(wanted)
    except Exception as error:  # torch.load raises half a dozen types for a broken or foreign file
        raise PersistWorldError(
            f"{path} does not hold this LPIPS backbone: {error}",
            where="rewards.lpips_backbone",
            fix="give torchvision's ImageNet state dict of the same network, or 'untrained'",
        ) from error


def _draw_backbone(backbone: nn.Module) -> None:
    """He-normal weights and zero biases from a private generator: the same on every machine and torch version."""
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    with torch.no_grad():
        for name, value in sorted(backbone.named_parameters()):
            if name.endswith("bias"):
                value.zero_()
            else:
                value.normal_(0.0, math.sqrt(2.0 / value[0].numel()), generator=generator)


def _total(layers: Iterable[Tensor]) -> Tensor:
    """Sum of the layers' parts."""
    return torch.stack(list(layers)).sum(dim=0)


class Lpips:
    """LPIPS v0.1 as a registered reward: 0 for identical pictures, larger is worse.

    Attributes:
        label: ``lpips``, or ``lpips (untrained)`` where the backbone has no ImageNet weights.
        source: the backbone's file, or None.
    """

    unit = ""
    higher_is_better = False

    def __init__(self, net: str = "alex", backbone: str = "auto", device: torch.device | str = "cpu") -> None:
        """Build on ``device``. ``backbone`` as in `find_backbone`. The global random state is left alone."""
        if net not in CACHED:
            raise UsageError(f"unknown LPIPS network '{net}'", where="rewards.lpips_net", fix=nearest(net, CACHED))
        ensure_torchvision()
        import lpips  # needs torchvision, which the line above makes importable

        self.net = net
        self.source = find_backbone(net, backbone)
        self.label = LABEL if self.source else LABEL_UNTRAINED
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package uses torchvision's old keyword
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if self.source:
            _load_backbone(self.model.net, self.source)
        else:
            _draw_backbone(self.model.net)
        self.model.requires_grad_(False).eval().to(device)
        self.device = torch.device(device)

    @classmethod
    def from_settings(cls, settings: RewardSettings, device: torch.device) -> Lpips:
        """The network and backbone that the settings name."""
        return cls(settings.lpips_net, settings.lpips_backbone, device)

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """Unit-length features of every layer of pictures in [0, 1]."""
        layers = self.model.net(self.model.scaling_layer(2.0 * pictures.float() - 1.0))
        # The package's own epsilon (1e-10) is added outside the root.
        return [layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10) for layer in layers]

    @torch.no_grad()
    def __call__(self, pred: Tensor, target: Tensor, *, chunk: int = 64) -> Tensor:
        """Pictures (M,3,H,W) and (T,3,H,W) in [0,1], M a multiple of T -> (M,). ``chunk`` pictures at a time."""
        parts = [_total(layer.mean(dim=(1, 2, 3)) for layer in gaps) for gaps in self._gaps(pred, target, chunk)]
        return torch.cat(parts)

    @torch.no_grad()
    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int], *, chunk: int = 64) -> Tensor:
        """As `__call__`, of each cell of the grid: (M, *grid)."""
        pool = functional.adaptive_avg_pool2d
        parts = [_total(pool(layer, grid)[:, 0] for layer in gaps) for gaps in self._gaps(pred, target, chunk)]
        return torch.cat(parts)

    def _gaps(self, pred: Tensor, target: Tensor, chunk: int) -> Iterator[list[Tensor]]:
        """Weighted distances (some pictures, 1, h, w) of every layer; a shared target's features are computed once."""
        if min(pred.shape[-2:]) < SMALLEST:
            raise PersistWorldError(
                f"LPIPS needs pictures of at least {SMALLEST} pixels a side, got {pred.shape[-2]}x{pred.shape[-1]}",
                where="rewards.weights",
                fix="leave lpips out, or use larger pictures",
            )
        share = pred.shape[0] // target.shape[0]
        per = max(1, chunk // share)
        for begin in range(0, target.shape[0], per):
            known = self._features(target[begin : begin + per])
            drawn = self._features(pred[begin * share : (begin + per) * share])
            yield [
                weight((b.unflatten(0, (a.shape[0], share)) - a.unsqueeze(1)).square().flatten(0, 1))
                for weight, a, b in zip(self.model.lins, known, drawn, strict=True)
            ]

    def describe(self) -> dict[str, object]:
        """Network, version and where its backbone came from."""
        source = self.source.name if self.source else f"untrained, seed {UNTRAINED_SEED}"
        return {"label": self.label, "net": self.net, "version": "0.1", "backbone": source}
