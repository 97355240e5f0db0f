"""What a policy is shown and what it answers: the DROID layouts of openpi (method.md section 6).

Shapes: R rows of a chunk at 15 Hz; each row is 7 joint velocities and 1 gripper position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from persistworld_cli.errors import PersistWorldError, UsageError, nearest

Float = NDArray[np.float64]

EXTERIOR = "observation/exterior_image_1_left"
WRIST = "observation/wrist_image_left"
JOINTS = "observation/joint_position"
GRIPPER = "observation/gripper_position"
PROMPT = "prompt"
ACTIONS = "actions"
_ANSWER = "serve a policy that answers {'actions': rows of joint velocities and gripper position}"
MOST = 100.0  # no command is larger: 1 is full speed, and full grip


@dataclass(frozen=True)
class Layout:
    """A policy family: how many rows of how many numbers it answers with. The observation is the same for all."""

    name: str
    rows: int
    width: int = 8


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (Layout("pi05", 15), Layout("pi0", 10), Layout("pi0-fast", 10))
}


def find_layout(name: str) -> Layout:
    """The layout called ``name``. Raises UsageError with the nearest known name."""
    if name not in LAYOUTS:
        raise UsageError(f"unknown policy layout '{name}'", where="policy.layout", fix=nearest(name, LAYOUTS))
    return LAYOUTS[name]


def resize_with_pad(image: NDArray[np.uint8], size: int, first: Sequence[int] = ()) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (size, size, 3): as large as fits, aspect kept, centred on black (bilinear).

    With ``first`` (height, width) the image is brought to that size, and so to its aspect, before.
    """
    if first:
        image = _resize(image, *first)
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = _resize(image, new_height, new_width)
    return canvas


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3) -> (height, width, 3), bilinear."""
    source = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))


def build_observation(
    exterior: NDArray[np.uint8],
    wrist: NDArray[np.uint8],
    joints: Float,
    prompt: str,
    size: int = 224,
    resize: Sequence[int] = (),
) -> dict[str, Any]:
    """One request.

    Args:
        exterior: (H, W, 3) uint8 image of the exterior camera shown to the policy.
        wrist: (H, W, 3) uint8.
        joints: (8,) seven joint angles (rad) and the gripper (0 open .. 1 closed).
        prompt: the instruction.
        size: side of the images sent.
        resize: (height, width) that they are brought to before they are padded; empty: none.
    """
    return {
        EXTERIOR: resize_with_pad(exterior, size, resize),
        WRIST: resize_with_pad(wrist, size, resize),
        JOINTS: np.array(joints[:7], dtype=np.float64),  # copies: a policy in this process may keep what it was shown
        GRIPPER: np.array(joints[7:8], dtype=np.float64),
        PROMPT: prompt,
    }


def check_actions(answer: Any, layout: Layout, source: str) -> Float:
    """The chunk in a policy's answer, checked.

    Args:
        answer: what `infer` gave back.
        layout: what the policy should answer with.
        source: the policy, for messages.

    Returns:
        (R, 8) float64: 7 joint velocities and the gripper position of each row.

    Raises:
        PersistWorldError: no ``actions``, not numbers, a wrong shape, a NaN, or one beyond `MOST`; says which.
    """
    if not isinstance(answer, Mapping):
        what = f"the policy answered with {type(answer).__name__}, not a map"
        raise PersistWorldError(what, where=source, fix=_ANSWER)
    if ACTIONS not in answer:
        got = ", ".join(sorted(str(key) for key in answer)) or "nothing"
        raise PersistWorldError(
            f"the policy's answer has no field 'actions' (it has: {got})", where=source, fix=_ANSWER
        )
    try:
        actions = np.asarray(answer[ACTIONS])
    except (ValueError, OverflowError) as error:  # rows of different lengths
        raise PersistWorldError(
            "field 'actions' is no array: its rows differ in length or kind",
            where=source,
            fix=f"answer with {layout.rows} rows of {layout.width} numbers",
        ) from error
    if actions.dtype.kind not in "iuf":
        raise PersistWorldError(f"field 'actions' holds {actions.dtype}, not numbers", where=source, fix=_ANSWER)
    if actions.shape != (layout.rows, layout.width):
        fitting = [known.name for known in LAYOUTS.values() if (known.rows, known.width) == actions.shape]
        raise PersistWorldError(
            f"field 'actions' has shape {actions.shape}, but layout '{layout.name}' is {(layout.rows, layout.width)}",
            where=source,
            fix=f"--set policy.layout={fitting[0]}"
            if fitting
            else "serve a policy with DROID's joint-velocity actions",
        )
    actions = actions.astype(np.float64)
    bad = np.argwhere(~(np.abs(actions) <= MOST))  # so put, NaN is bad
    if len(bad):
        row, column = (int(i) for i in bad[0])
        part = f"velocity of joint {column + 1}" if column < 7 else "gripper position"
        raise PersistWorldError(
            f"field 'actions' is {actions[row, column]} at [{row}, {column}] ({part} in row {row})",
            where=source,
            fix=f"answer with finite numbers between -{MOST:g} and {MOST:g}",
        )
    return actions
