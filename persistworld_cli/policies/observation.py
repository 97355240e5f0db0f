"""A policy's observation and answer: the DROID layouts of openpi (method.md section 6).

Shapes: R rows of a chunk at 15 Hz, each 7 joint velocities and 1 gripper position; V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.robot.adapter import ActionAdapter

Float = NDArray[np.float64]

EXTERIOR = "observation/exterior_image_1_left"
WRIST = "observation/wrist_image_left"
JOINTS = "observation/joint_position"
GRIPPER = "observation/gripper_position"
PROMPT = "prompt"
ACTIONS = "actions"
MOST = 100.0  # bound of a command: 1 is full speed and full grip
_ANSWER = "serve a policy that answers {'actions': rows of joint velocities and gripper position}"


class Policy(Protocol):
    """Anything that turns an observation into a chunk of actions: a server connection or an object here."""

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One observation -> a map with ``actions`` (R, 8)."""
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...


@dataclass(frozen=True)
class ActionLayout:
    """A policy family: rows of its answer, and numbers per row. The observation is the same for all."""

    name: str
    rows: int
    width: int = 8


LAYOUTS: Mapping[str, ActionLayout] = {
    layout.name: layout for layout in (ActionLayout("pi05", 15), ActionLayout("pi0", 10), ActionLayout("pi0-fast", 10))
}


@dataclass(frozen=True, kw_only=True)
class PolicyView:
    """How a policy sees the world, and how its answer is read.

    Attributes:
        layout: layout of its answers.
        adapter: joint velocities -> joints.
        skip: every skip-th row of an answer is a pose of the world model.
        gripper_cap: largest gripper position.
        cap_current: whether the cap also limits the current gripper position.
        camera, wrist_camera: index of the exterior and of the wrist camera that it sees.
        resize: (height, width) to which images are resized before padding; empty: no resizing.
        image_size: side of the padded images.
        rows: L.

    Raises:
        UsageError: the layout has too few rows for the skip.
    """

    layout: ActionLayout
    adapter: ActionAdapter
    skip: int = 2
    gripper_cap: float = 1.0
    cap_current: bool = False
    camera: int = 1
    wrist_camera: int = 2
    resize: tuple[int, ...] = ()
    image_size: int = 224
    rows: int = 5

    def __post_init__(self) -> None:
        if self.advance >= self.layout.rows:
            raise UsageError(
                f"skip {self.skip} needs {self.advance + 1} rows of actions, "
                f"layout '{self.layout.name}' has {self.layout.rows}",
                where="policy.skip, or the task's",
                fix=f"--set policy.skip={(self.layout.rows - 1) // (self.rows - 1)}",
            )

    @property
    def advance(self) -> int:
        """Rows of an answer that one interaction uses."""
        return (self.rows - 1) * self.skip


def ask_policy(policy: Policy, view: PolicyView, images: NDArray[np.uint8], joints: Float, prompt: str) -> Float:
    """Ask a policy once.

    Args:
        policy: the policy.
        view: its observation.
        images: (V, H, W, 3) uint8.
        joints: (8,) seven joint angles (rad) and the gripper (0 open .. 1 closed).
        prompt: the instruction.

    Returns:
        (R, 8) joint velocities and gripper position.

    Raises:
        PersistWorldError: the policy failed, or its answer does not fit the layout.
    """
    return check_actions(policy.infer(build_observation(view, images, joints, prompt)), view.layout, "the policy")


def build_observation(view: PolicyView, images: NDArray[np.uint8], joints: Float, prompt: str) -> dict[str, Any]:
    """One request; arguments as for `ask_policy`."""
    return {
        EXTERIOR: resize_with_pad(images[view.camera], view.image_size, view.resize),
        WRIST: resize_with_pad(images[view.wrist_camera], view.image_size, view.resize),
        JOINTS: np.array(joints[:7], dtype=np.float64),  # copies: a policy in this process may keep its observations
        GRIPPER: np.array(joints[7:8], dtype=np.float64),
        PROMPT: prompt,
    }


def resize_with_pad(image: NDArray[np.uint8], size: int, first: Sequence[int] = ()) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (size, size, 3): as large as fits, aspect kept, centred on black (bilinear).

    With ``first`` (height, width) the image is resized to that size (and aspect) first.
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


def check_actions(answer: Any, layout: ActionLayout, source: str) -> Float:
    """The chunk in a policy's answer, checked.

    Args:
        answer: what `infer` returned.
        layout: the expected layout.
        source: name of the policy, for messages.

    Returns:
        (R, 8) float64: 7 joint velocities and the gripper position of each row.

    Raises:
        PersistWorldError: no ``actions``, not numbers, a wrong shape, a NaN, or one beyond `MOST`; names the entry.
    """
    if not isinstance(answer, Mapping):
        what = f"the policy answered with {type(answer).__name__}, not a map"
        raise PersistWorldError(what, where=source, fix=_ANSWER)
    if ACTIONS not in answer:
        keys = ", ".join(sorted(str(key) for key in answer)) or "nothing"
        what = f"the policy's answer has no field 'actions' (it has: {keys})"
        raise PersistWorldError(what, where=source, fix=_ANSWER)
    try:
        actions = np.asarray(answer[ACTIONS])
    except (ValueError, OverflowError) as error:  # rows of different lengths
        raise PersistWorldError(
            "field 'actions' is not an array: its rows differ in length or type",
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
            fix=f"--set policy.layout={fitting[0]}" if fitting else "serve a policy with DROID's joint velocities",
        )
    actions = actions.astype(np.float64)
    bad = np.argwhere(~(np.abs(actions) <= MOST))  # written this way, NaN is bad too
    if len(bad):
        row, column = (int(i) for i in bad[0])
        part = f"velocity of joint {column + 1}" if column < 7 else "gripper position"
        raise PersistWorldError(
            f"field 'actions' is {actions[row, column]} at [{row}, {column}] ({part} in row {row})",
            where=source,
            fix=f"answer with finite numbers between -{MOST:g} and {MOST:g}",
        )
    return actions
