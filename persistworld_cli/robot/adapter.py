"""Joint-velocity adapters: commanded joint velocities of a policy -> the arm's future joint angles.

DROID's controller scales a velocity of 1 to at most 0.2 rad per control step (15 Hz), and the arm lags behind: in real
episodes the motion per frame is about 0.054 of the velocity (method.md section 6). `GainAdapter` sums gain x velocity;
`MlpAdapter` is Ctrl-World's network, which has learnt the lag.
Shapes: velocities (R, J), joints (J,) now -> (R, J) after each row's control step; a Franka has J = 7 joints (rad), and
its network takes R = 15 rows at 15 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import read_json, reading
from persistworld_cli.torch_files import load_torch

Float = NDArray[np.float64]

NUM_JOINTS = 7
MLP_ROWS = 15
DEFAULT_GAIN = 0.054

# Percentiles (1st, 99th) of Ctrl-World's adapter: commanded velocity, joint change over the 15 rows.
_VELOCITY_P01 = (-0.4077107, -0.79047304, -0.47850373, -0.8666644, -0.6729502, -0.5602032, -0.692411)
_VELOCITY_P99 = (0.4900636, 0.7259861, 0.45910007, 0.79220384, 0.69864315, 0.648198, 0.810115)
_DELTA_P01 = (-0.2801219, -0.397792, -0.22935797, -0.3351759, -0.42025003, -0.36825255, -0.450706)
_DELTA_P99 = (0.2827909, 0.42184818, 0.33529875, 0.35958457, 0.375613, 0.44463825, 0.469769)


class JointVelocityAdapter(Protocol):
    """Joint velocities and the joints now -> joints after each row."""

    def __call__(self, velocities: ArrayLike, joints: ArrayLike) -> Float:
        """(R, J) velocities and (J,) joints -> (R, J) joints."""
        ...


class GainAdapter:
    """Joints move by ``gain x velocity`` in each row."""

    def __init__(self, gain: ArrayLike = DEFAULT_GAIN) -> None:
        """``gain``: one number, or one for each joint (rad per row for a velocity of 1)."""
        self.gain: Float = np.array(gain, dtype=np.float64)

    def __call__(self, velocities: ArrayLike, joints: ArrayLike) -> Float:
        """(R, J) velocities and (J,) joints -> (R, J) joints."""
        steps = self.gain * np.asarray(velocities, dtype=np.float64)
        return np.asarray(joints, dtype=np.float64) + np.cumsum(steps, axis=0)


class MlpAdapter(torch.nn.Module):
    """Ctrl-World's adapter: 112 -> 512 -> 512 -> 105 with SiLU.

    In: raw joints, then 15 x 7 velocities mapped to [-1, 1] by their percentiles (not clipped). Out: for each row and
    joint a share of the range of joint changes, added to the current joints.
    """

    def __init__(self) -> None:
        super().__init__()
        width, flat = 512, MLP_ROWS * NUM_JOINTS
        self.net = torch.nn.Sequential(
            torch.nn.Linear(NUM_JOINTS + flat, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, flat),
        )

    @torch.no_grad()
    def forward(self, velocities: ArrayLike, joints: ArrayLike) -> Float:
        """(R, 7) velocities and (7,) joints -> (R, 7) joints.

        The network takes exactly 15 rows: a shorter chunk (pi0, pi0-FAST) is padded with its last velocity, and only
        its own rows are returned; of a longer one, the rows after the fifteenth begin at the joints reached there.
        """
        rows = np.asarray(velocities, dtype=np.float64)
        if len(rows) > MLP_ROWS:
            reached = self(rows[:MLP_ROWS], joints)
            return np.concatenate([reached, self(rows[MLP_ROWS:], reached[-1])])
        held = np.concatenate([rows, np.repeat(rows[-1:], MLP_ROWS - len(rows), axis=0)])
        low, high = np.array(_VELOCITY_P01), np.array(_VELOCITY_P99)
        scaled = 2 * (held - low) / (high - low + 1e-8) - 1
        start = np.asarray(joints, dtype=np.float64)
        weight = self.net[0].weight
        assert isinstance(weight, torch.Tensor)
        inputs = torch.as_tensor(np.concatenate([start, scaled.reshape(-1)]), dtype=weight.dtype, device=weight.device)
        share = (self.net(inputs).reshape(MLP_ROWS, NUM_JOINTS).double().cpu().numpy() + 1) / 2
        delta_low, delta_high = np.array(_DELTA_P01), np.array(_DELTA_P99)
        return (start + share * (delta_high - delta_low) + delta_low)[: len(rows)]


def load_adapter(
    kind: str, gain: float = DEFAULT_GAIN, meta: Path | None = None, joints: int = NUM_JOINTS
) -> JointVelocityAdapter:
    """The adapter that the settings name.

    Args:
        kind: ``gain`` (one number for every joint), ``meta`` (fitted by build-meta), or an MLP's weights file.
        gain: for ``gain``.
        meta: build-meta's ``joint_velocity_adapter.json``, for ``meta``.
        joints: number of joints.

    Raises:
        PersistWorldError: the file is missing or invalid.
    """
    if kind == "gain":
        return GainAdapter(gain)
    if kind == "meta":
        return GainAdapter(_read_gain(meta, joints))
    if joints != NUM_JOINTS:
        what = f"an joint-velocity adapter's network has {NUM_JOINTS} joints, this arm {joints}"
        raise PersistWorldError(what, where="policy.joint_velocity_adapter", fix="give gain or meta")
    return _load_mlp(Path(kind).expanduser())


def _read_gain(path: Path | None, joints: int) -> Float:
    """(J,) gains out of build-meta's ``joint_velocity_adapter.json``: a number or a list under ``gain``."""
    fix = "run persistworld build-meta on the dataset, or set policy.joint_velocity_adapter to gain"
    if path is None or not path.is_file():
        where = str(path or "policy.joint_velocity_adapter")
        raise PersistWorldError("the dataset has no fitted joint-velocity adapter", where=where, fix=fix)
    with reading("not a joint-velocity adapter", path, fix):
        data = read_json(path, "not a joint-velocity adapter", fix)
        gain = np.broadcast_to(np.asarray(data["gain"], dtype=np.float64), (joints,))
    if not np.isfinite(gain).all():
        raise PersistWorldError("the fitted gains are not finite", where=str(path), fix=fix)
    return gain


def _load_mlp(path: Path) -> MlpAdapter:
    """The network, with weights from safetensors or a torch file (``weights_only``)."""
    if not path.is_file():
        raise PersistWorldError(
            f"no joint-velocity adapter '{path}'",
            where="policy.joint_velocity_adapter",
            fix="give gain, meta, or the path of Ctrl-World's model2_15_9.pth (or the same as safetensors)",
        )
    tensors = _read_tensors(path)
    model = MlpAdapter()
    found: dict[str, torch.Tensor] = {}
    for name, expected in model.state_dict().items():
        # whatever prefix it was saved under (``weights.``, ``module.``)
        matches = [tensor for key, tensor in tensors.items() if key == name or key.endswith("." + name)]
        if len(matches) != 1 or matches[0].shape != expected.shape:
            got = f"has shape {tuple(matches[0].shape)}" if len(matches) == 1 else "is missing"
            fix = "this is not Ctrl-World's joint-velocity adapter (112-512-512-105)"
            raise PersistWorldError(f"'{name}' {got}; expected {tuple(expected.shape)}", where=str(path), fix=fix)
        found[name] = matches[0].float()
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, by name; those of a torch file may be nested one level."""
    with reading("cannot read the joint-velocity adapter", path, "give safetensors, or a plain state dict"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        data = load_torch(path)
    flat: dict[str, torch.Tensor] = {}
    for key, value in data.items() if isinstance(data, Mapping) else ():
        if isinstance(value, torch.Tensor):
            flat[str(key)] = value
        elif isinstance(value, Mapping):
            flat.update({str(k): v for k, v in value.items() if isinstance(v, torch.Tensor)})
    return flat
