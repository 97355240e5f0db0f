"""LPIPS (Zhang et al. 2018) by the lpips package, with its backbone loaded from a file.

The package would download ImageNet weights in its constructor. Here the backbone is built untrained and filled from a
file: the shipped AlexNet features (alexnet/README.md), or another file that the settings name. An untrained backbone,
drawn from a fixed seed, is used only where the settings say ``untrained``; it is not a perceptual distance, and its
label is ``lpips (untrained)`` everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from persistworld_cli.compat import ensure_torchvision
from persistworld_cli.config.settings import RewardSettings
from persistworld_cli.errors import PersistWorldError, UsageError, nearest
from persistworld_cli.torch_files import load_torch

logger = logging.getLogger(__name__)
SHIPPED = Path(__file__).parent / "alexnet" / "features_fp16.safetensors"
SHIPPED_SHA256 = "1e79dbde62a13caeaf6d1d6491a66ee816a833dfa42fb3532b5a74ed1cda2da2"
# torchvision's ImageNet weights, under the same names in torch's hub cache. AlexNet's are shipped instead.
DOWNLOADS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
NETS = ("alex", *DOWNLOADS)
SMALLEST = 31  # pixels: below this AlexNet's second pooling has nothing left
UNTRAINED_SEED = 20180111
LABEL, LABEL_UNTRAINED = "lpips", "lpips (untrained)"
UNTRAINED_WARNING = (
    "rewards.lpips_backbone is 'untrained': lpips (untrained) compares images by a random AlexNet. It is not a "
    "perceptual distance, prefers blur to a small shift, and is not comparable with LPIPS"
)


def find_backbone(net: str, choice: str) -> Path | None:
    """The file of ImageNet weights to use, or None for the untrained backbone.

    Args:
        net: alex | vgg | squeeze.
        choice: ``auto`` (AlexNet: the shipped file; the others: torchvision's, from torch's hub cache or
            downloaded into it), ``untrained``, or a path.

    Raises:
        PersistWorldError: no such path, or a failed download.
    """
    if choice == "untrained":
        return None
    if choice == "auto":
        return SHIPPED if net == "alex" else _torchvision_file(DOWNLOADS[net], net)
    path = Path(choice).expanduser()
    if not path.is_file():
        raise PersistWorldError(
            f"no LPIPS backbone at {path}",
            where="rewards.lpips_backbone",
            fix="give torchvision's state dict (e.g. alexnet-owt-7be5be79.pth) or 'auto'",
        )
    return path


def _torchvision_file(url: str, net: str) -> Path:
    """A file of torch's hub cache, downloaded once per machine."""
    from filelock import FileLock
    from huggingface_hub.constants import HF_HUB_OFFLINE

    from persistworld_cli.hub import TIMEOUT_S, within

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    try:
        if HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        within(TIMEOUT_S, lambda: urllib.request.urlopen(url, timeout=TIMEOUT_S).close())
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{path.name}.lock"):
            if not path.is_file():
                logger.info("downloading %s", url)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2])
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash does not fit
        raise PersistWorldError(
            f"the ImageNet weights of LPIPS's '{net}' are not on this machine and could not be downloaded: {error}",
            where="rewards.lpips_net",
            fix=f"copy {url} to {path}, name a file in rewards.lpips_backbone, or use 'alex', which is shipped",
        ) from error
    return path


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    """Fill the lpips package's slices (``slice2.3.weight``) from torchvision's names (``features.3.weight``)."""
    try:
        stored = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else load_torch(path)
        wanted = {key: stored["features." + key.split(".", 1)[1]] for key in backbone.state_dict()}
        backbone.load_state_dict(wanted)
    except Exception as error:  # torch.load raises half a dozen types for a broken or foreign file
        raise PersistWorldError(
            f"{path} does not hold this LPIPS backbone: {error}",
            where="rewards.lpips_backbone",
            fix="give torchvision's ImageNet state dict of the same network, or 'auto'",
        ) from error


def _sha256(path: Path) -> str:
    """Hash of a backbone's file. Raises PersistWorldError if the shipped one is damaged."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if path == SHIPPED and found != SHIPPED_SHA256:
        raise PersistWorldError(
            "the shipped LPIPS backbone is damaged", where=str(path), fix="install persistworld again"
        )
    return found


def _draw_backbone(backbone: nn.Module) -> None:
    """He-normal weights and zero biases from a private generator: the same on every machine and torch version."""
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    with torch.no_grad():
        for name, value in sorted(backbone.named_parameters()):
            if name.endswith("bias"):
                value.zero_()
            else:
                value.normal_(0.0, math.sqrt(2.0 / value[0].numel()), generator=generator)


class Lpips:
    """LPIPS v0.1 as a registered reward: 0 for identical images, larger is worse.

    Attributes:
        label: ``lpips``, or ``lpips (untrained)`` where the settings ask for a backbone without ImageNet weights.
        source: the backbone's file, or None.
        sha256: its hash, or "".
    """

    unit = ""
    higher_is_better = False

    def __init__(self, net: str = "alex", backbone: str = "auto", device: torch.device | str = "cpu") -> None:
        """Build on ``device``. ``backbone`` as in `find_backbone`. The global random state is unchanged."""
        if net not in NETS:
            raise UsageError(f"unknown LPIPS network '{net}'", where="rewards.lpips_net", fix=nearest(net, NETS))
        ensure_torchvision()
        import lpips  # needs torchvision, which the line above makes importable

        self.net = net
        self.source = find_backbone(net, backbone)
        self.sha256 = _sha256(self.source) if self.source else ""
        self.label = LABEL if self.source else LABEL_UNTRAINED
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package uses torchvision's old keyword
            self.model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if self.source:
            _load_backbone(self.model.net, self.source)
        else:
            _draw_backbone(self.model.net)
            if os.environ.get("RANK", "0") == "0":
                logger.warning(UNTRAINED_WARNING)
        self.model.requires_grad_(False).eval().to(device)
        self.weights: list[Callable[[Tensor], Tensor]] = list(self.model.lins)
        self.device = torch.device(device)

    @classmethod
    def from_settings(cls, settings: RewardSettings, device: torch.device) -> Lpips:
        """From the settings' network and backbone."""
        return cls(settings.lpips_net, settings.lpips_backbone, device)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of every layer of images in [0, 1]."""
        layers = self.model.net(self.model.scaling_layer(2.0 * images.float() - 1.0))
        # The package's own epsilon (1e-10) is added outside the root.
        return [layer / (layer.square().sum(1, keepdim=True).sqrt() + 1e-10) for layer in layers]

    @torch.no_grad()
    def __call__(self, pred: Tensor, target: Tensor, *, chunk: int = 64) -> Tensor:
        """Images (M,3,H,W) and (T,3,H,W) in [0,1], M a multiple of T -> (M,). ``chunk`` images at a time."""
        return self._sum(pred, target, chunk, lambda gap: gap.mean(dim=(1, 2, 3)))

    @torch.no_grad()
    def maps(self, pred: Tensor, target: Tensor, grid: tuple[int, int], *, chunk: int = 64) -> Tensor:
        """As `__call__`, of each cell of the grid: (M, *grid)."""
        return self._sum(pred, target, chunk, lambda gap: functional.adaptive_avg_pool2d(gap, grid)[:, 0])

    def slope(self, value: Tensor) -> Tensor:
        """As `registry.Metric`: an image's value is the mean over its cells."""
        return torch.ones_like(value)

    def _sum(self, pred: Tensor, target: Tensor, chunk: int, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over layers of weighted distances (m, 1, h, w), pooled; a shared target's features are computed once."""
        if min(pred.shape[-2:]) < SMALLEST:
            raise PersistWorldError(
                f"LPIPS needs images of at least {SMALLEST} pixels a side, got {pred.shape[-2]}x{pred.shape[-1]}",
                where="rewards.weights",
                fix="leave lpips out, or use larger images",
            )
        share = pred.shape[0] // target.shape[0]
        per = max(1, chunk // share)
        sums = []
        for known, drawn in zip(target.split(per), pred.split(per * share), strict=True):
            pairs = zip(self.weights, self._features(known), self._features(drawn), strict=True)
            pooled = [
                pool(weight((b.unflatten(0, (a.shape[0], share)) - a.unsqueeze(1)).square().flatten(0, 1)))
                for weight, a, b in pairs
            ]
            sums.append(torch.stack(pooled).sum(dim=0))
        return torch.cat(sums)

    def describe(self) -> dict[str, object]:
        """Network, version and where its backbone came from."""
        backbone = self.source.name if self.source else f"untrained, seed {UNTRAINED_SEED}"
        backbone = "shipped" if self.source == SHIPPED else backbone
        named = {"label": self.label, "net": self.net, "version": "0.1"}
        return {**named, "backbone": backbone, "backbone_sha256": self.sha256}
