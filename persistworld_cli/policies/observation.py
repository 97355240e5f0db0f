"""A policy's observation and its answer (method.md section 6); `action_spaces` has what its rows mean.

Shapes: R rows of an answer, W numbers in each; V cameras, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.policies.action_spaces import ACTION_SPACES, ActionSpace, ArmState

Float = NDArray[np.float64]

PROMPT = "prompt"
ACTIONS = "actions"


class Policy(Protocol):
    """Anything that turns an observation into a chunk of actions: a server connection or an object here.

    One with ``batched = True`` serves every rollout: ``infer_batch`` takes a list of observations and returns as many
    answers.
    """

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One observation -> a map with ``actions`` (R, W)."""
        ...

    def reset(self) -> None:
        """Forget the episode so far."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyView:
    """How a policy sees the world, and how its answer is read.

    Attributes:
        space: its action space.
        skip: every skip-th row of an answer is a pose of the world model.
        images: field of an observation -> index of the camera that it shows.
        resize: (height, width) to which images are resized before padding; empty: no resizing.
        image_size: side of the padded images.
        rows: L.
        rate_hz: rows of an answer per second.
    """

    space: ActionSpace
    skip: int = 2
    images: Mapping[str, int] = field(default_factory=dict)
    resize: tuple[int, ...] = ()
    image_size: int = 224
    rows: int = 5
    rate_hz: float = 15.0

    @property
    def advance(self) -> int:
        """Rows of an answer that one interaction uses."""
        return (self.rows - 1) * self.skip


def ask_policies(
    policies: Sequence[Policy],
    view: PolicyView,
    images: Iterable[NDArray[np.uint8]],
    states: Sequence[ArmState],
    prompts: Sequence[str],
) -> list[Float]:
    """Ask once for each of B rollouts: in one request if the policy takes several (`batched`), else in one each.

    Args:
        policies: one per rollout.
        view: their observation.
        images: B images (V, H, W, 3) uint8.
        states: the current states.
        prompts: the instructions.

    Returns:
        B arrays (R, W), each with the rows that cover the interaction, or more.

    Raises:
        PersistWorldError: a policy failed, or an answer does not fit.
    """
    shown = zip(images, states, prompts, strict=True)
    observations = [build_observation(view, *one) for one in shown]
    if getattr(policies[0], "batched", False):
        answers = cast("Any", policies[0]).infer_batch(observations)
    else:
        answers = [policy.infer(obs) for policy, obs in zip(policies, observations, strict=True)]
    if not isinstance(answers, Sequence) or len(answers) != len(observations):
        what = f"the policy did not answer a request of {len(observations)} observations with as many answers"
        raise PersistWorldError(what, where="the policy", fix="answer each observation, in their order")
    return [check_actions(answer, view, "the policy") for answer in answers]


def build_observation(view: PolicyView, images: NDArray[np.uint8], now: ArmState, prompt: str) -> dict[str, Any]:
    """The observation of one rollout; arguments as for `ask_policies`."""
    return {
        **{key: resize_with_pad(images[i], view.image_size, view.resize) for key, i in view.images.items()},
        **view.space.observe(now),
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


def check_actions(answer: Any, view: PolicyView, source: str) -> Float:
    """The rows in a policy's answer, checked.

    Args:
        answer: what `infer` returned.
        view: the expected rows.
        source: name of the policy, for messages.

    Returns:
        (R, W) float64.

    Raises:
        PersistWorldError: no ``actions``, not numbers, a wrong width, too few rows, a NaN, or a number beyond the
            action space's bound; names the entry.
    """
    space, fix = view.space, f"answer with {{'actions': rows of {len(view.space.parts)} numbers}}"
    if not isinstance(answer, Mapping):
        raise PersistWorldError(f"the policy answered with {type(answer).__name__}, not a map", where=source, fix=fix)
    if ACTIONS not in answer:
        keys = ", ".join(sorted(str(key) for key in answer)) or "nothing"
        what = f"the policy's answer has no field 'actions' (it has: {keys})"
        raise PersistWorldError(what, where=source, fix=fix)
    try:
        actions = np.asarray(answer[ACTIONS])
    except (ValueError, OverflowError) as error:  # rows of different lengths
        what = "field 'actions' is not an array: its rows differ in length or type"
        raise PersistWorldError(what, where=source, fix=fix) from error
    if actions.dtype.kind not in "iuf":
        raise PersistWorldError(f"field 'actions' holds {actions.dtype}, not numbers", where=source, fix=fix)
    _check_shape(actions.shape, view, source)
    actions = actions.astype(np.float64)
    bad = np.argwhere(~(np.abs(actions) <= space.most))  # written this way, NaN is bad too
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise PersistWorldError(
            f"field 'actions' is {actions[row, column]} at [{row}, {column}] ({space.parts[column]} in row {row})",
            where=source,
            fix=f"answer with finite numbers between -{space.most:g} and {space.most:g}",
        )
    return actions


def _check_shape(shape: tuple[int, ...], view: PolicyView, source: str) -> None:
    """Any number of rows that covers an interaction is taken."""
    parts = view.space.parts
    if len(shape) != 2 or shape[1] != len(parts):
        width = shape[-1] if len(shape) == 2 else 0
        kinds = ACTION_SPACES.items() if view.space.is_franka and width else ()
        others = [name for name, kind in kinds if len(getattr(kind, "parts", ())) == width]
        own = f"rows of {len(parts)} numbers ({parts[0]}, ..., {parts[-1]})"
        fix = f"answer with {own}" + (f", or take another --actions ({', '.join(others)})" if others else "")
        raise PersistWorldError(f"field 'actions' has shape {shape}, not {own}", where=source, fix=fix)
    if shape[0] < view.advance:
        frames = view.rows - 1
        fix = f"answer {view.advance} rows or more (openpi: model.action_horizon)"
        if shape[0] >= frames:
            fewer = shape[0] // frames
            fix += f", or take {fewer} rows per frame, which replays the policy slower: --set policy.skip={fewer}"
        raise PersistWorldError(
            f"the policy answered {shape[0]} rows, but an interaction takes {view.advance} (frames: {frames}, skip: "
            f"{view.skip})",
            where=source,
            fix=fix,
        )
