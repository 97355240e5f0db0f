"""Fréchet video distance, computed only if the user gives the weights of a feature network.

The FVD of papers uses the features of an I3D graph, and loading that graph runs code from the file. Here the network is
one of torchvision's video classifiers, built from code and filled from its Kinetics-400 state dict. The number
therefore carries the network's name, ``fvd (r3d_18)``, and is comparable only with numbers of that name.

Shape legend: N clips, T frames, H, W pixels, E features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from persistworld_cli.checkpoints.references import sha256_of
from persistworld_cli.compat import ensure_torchvision
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.results import FLOOR, EvalData
from persistworld_cli.reports.progress import Meter
from persistworld_cli.torch_files import load_torch

CLIP, SIDE = 16, 112  # frames and pixels a side: what these networks were trained on
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of Kinetics-400, as torchvision gives them
FEW = 256  # clips: with fewer clips the distance is biased upwards
Videos = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class FeatureNet:
    """A video network without its classifier, and its entry in the protocol."""

    name: str
    sha256: str
    model: nn.Module

    @property
    def label(self) -> str:
        """The metric's name in tables."""
        return f"fvd ({self.name})"

    def describe(self) -> dict[str, Any]:
        """Its entry in the protocol: two distances are comparable only if all of it is equal."""
        return {"net": self.name, "weights_sha256": self.sha256, "clip": CLIP, "side": SIDE, "resize": "bilinear"}

    @torch.no_grad()
    def features(self, videos: Videos, batch: int = 8) -> NDArray[np.float64]:
        """Features (N, E) of uint8 videos (T, H, W, 3), cut into clips of 16 frames; a shorter rest is not used."""
        clips = [video[i : i + CLIP] for video in videos for i in range(0, len(video) - CLIP + 1, CLIP)]
        device = next(self.model.parameters()).device
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1, 1) for v in (MEAN, STD))
        out = []
        for begin in range(0, len(clips), batch):
            images = torch.from_numpy(np.stack(clips[begin : begin + batch])).to(device)
            flat = images.flatten(0, 1).movedim(-1, 1).float() / 255
            small = functional.interpolate(flat, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
            ready = small.unflatten(0, (-1, CLIP)).movedim(1, 2)  # (N, 3, T, H, W)
            out.append(self.model((ready - mean) / std).double().cpu().numpy())
        return np.concatenate(out) if out else np.zeros((0, 0))


def load_feature_network(path: str, net: str, device: torch.device) -> FeatureNet:
    """One of torchvision's networks with weights from a file.

    Raises:
        PersistWorldError: no such file, or it does not hold this network's state dict.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PersistWorldError(
            f"no feature network at {file}",
            where="--fvd",
            fix=f"give torchvision's Kinetics-400 state dict of {net} (a .pth file)",
        )
    ensure_torchvision()
    from torchvision.models import video  # needs the line above

    model: nn.Module = getattr(video, net)(weights=None)
    try:
        model.load_state_dict(load_torch(file))
    except Exception as error:  # torch.load raises half a dozen types for a broken or foreign file
        reason = str(error).splitlines()[0]
        raise PersistWorldError(
            f"{file} does not hold {net}: {reason}",
            where="--fvd",
            fix="give torchvision's state dict of this network, or name another network: --set eval.fvd_net=mc3_18",
        ) from error
    model.fc = nn.Identity()
    model.requires_grad_(False).eval().to(device)
    return FeatureNet(net, sha256_of(str(file)), model)


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Fréchet distance of two sets of features (N, E), (M, E) taken as Gaussians (Heusel et al. 2017, equation 6).

    tr (S_a S_b)^(1/2) is the sum of the singular values of A B^T, where A and B are the centred features over
    (n - 1)^(1/2): exact with fewer clips than features, and without the root of a large matrix. NaN below two clips.
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    gap = a.mean(0) - b.mean(0)
    left, right = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    cross = np.linalg.svd(left @ right.T, compute_uv=False).sum()
    return float(max(0.0, gap @ gap + (left**2).sum() + (right**2).sum() - 2 * cross))


def fvd_result(data: EvalData, net: FeatureNet | None) -> dict[str, Any]:
    """The distance of every model's rollouts, and of the repeated first frame, from the recordings.

    Returns:
        ``{"label", "rows": [{model, cameras, value, clips}], "note"}``; without a network there are
        no rows, and ``note`` gives the reason.
    """
    if net is None:
        return {"label": "", "rows": [], "note": "needs a feature network: --fvd PATH"}
    recorded = ""
    found: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    with Meter("eval: fvd", len(data.items)) as meter:
        for item in data.items:
            recording, drawn = data.draw(item)
            frames = recording.frames[: int(recording.valid.sum())]
            videos = {recorded: frames, FLOOR: np.repeat(recording.first[None], len(frames), 0), **drawn}
            for row, video in videos.items():
                for group, cameras in data.groups.items():
                    if len(own := net.features([video[:, camera] for camera in cameras])):
                        found.setdefault((row, group), []).append(own)
            meter.advance()
    rows: list[dict[str, Any]] = []
    for row in [FLOOR, *data.labels]:
        for group in data.groups:
            known, made = (np.concatenate(found.get((name, group), [np.zeros((0, 1))])) for name in (recorded, row))
            rows.append({"model": row, "cameras": group, "value": frechet(known, made), "clips": len(made)})
    clips, note = min(row["clips"] for row in rows), ""
    if clips < 2:
        note = f"needs two clips of {CLIP} recorded frames: use longer or more rollouts"
    elif clips < FEW:
        note = f"{clips} clips of {CLIP} frames are few: biased upwards, comparable only at this number of clips"
    return {"label": net.label, "rows": rows, "note": note}
