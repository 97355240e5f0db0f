"""Annotations: the one reader of an episode's JSON, and the one rule for its length.

An episode is as long as its states (T): ``video_length`` and ``joints``, if present, must have T frames, and latents at
least T (`scan.check_files`, `EpisodeStore.require_latents`). build-meta and every later reader refuse an episode whose
lengths disagree.

Reading is fast: of 300 kB, only the tenth with texts and states is parsed. Needs no torch: worker processes import it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import parse_json, require_unicode

KEYS = ("texts", "states", "joints", "video_length", "success")  # the keys of an annotation that are read
REDO = "delete the episode's annotation and run persistworld extract-latents again"
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


class Unreadable(PersistWorldError):
    """An episode that training cannot use; ``what`` is the same for all episodes with the same problem.

    ``detail`` has this episode's own numbers, ``kind`` is, for latents, one of `check_dataset.KINDS`.
    """

    def __init__(self, what: str, path: Path | str = "", detail: object = "", kind: str = "", fix: str = REDO) -> None:
        super().__init__(what, where=f"{path}: {detail}" if detail else str(path), fix=fix)
        self.detail, self.kind = str(detail), kind


def read_keys(text: str, wanted: Collection[str]) -> dict[str, Any]:
    """The ``wanted`` keys of a JSON object; lists of numbers under other keys are skipped, not parsed.

    In a skipped list only the brackets are checked, so a list with a word in place of a number passes unless its key is
    wanted. Everything else is parsed as `json` does.

    Raises:
        ValueError: no JSON object.
    """
    out: dict[str, Any] = {}
    at = _skip(text, 0)
    if text[at : at + 1] != "{":
        raise ValueError("no JSON object")
    at = _skip(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _DECODER.raw_decode(text, at)
        if not isinstance(key, str):
            raise ValueError("a key that is not text")
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise ValueError(f"no value for '{key}'")
        at = _skip(text, at + 1)
        beyond = None if key in wanted else _beyond_numbers(text, at)
        if beyond is None:
            value, beyond = _DECODER.raw_decode(text, at)
            if key in wanted:
                out[key] = value
        at = _skip(text, beyond)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "}":
            raise ValueError(f"the object is truncated after '{key}'")
    return out


def _beyond_numbers(text: str, at: int) -> int | None:
    """End of the list of (lists of) numbers that begins here; None if it is anything else."""
    if text[at : at + 1] != "[":
        return None
    quote = text.find('"', at)
    end = text.rfind("]", at, quote if quote >= 0 else None) + 1
    plain = end and text.count("[", at, end) == text.count("]", at, end) and text.find("{", at, end) < 0
    return end if plain else None


def _skip(text: str, at: int) -> int:
    """Index of the next character that is not white space."""
    while text[at : at + 1] in _SPACE and at < len(text):
        at += 1
    return at


def load_annotation(path: Path, wanted: Collection[str] | None = None) -> dict[str, Any]:
    """The ``wanted`` keys of an annotation, or all, strictly parsed. Raises Unreadable: absent, or no JSON object."""
    try:
        text = path.read_bytes().decode()
        raw = parse_json(text) if wanted is None else read_keys(text, wanted)
        if wanted is not None:
            require_unicode(raw, text)
    except FileNotFoundError as error:
        raise Unreadable("the annotation is gone", path, fix="run persistworld build-meta again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable("unreadable annotation", path, error) from error
    if not isinstance(raw, dict):
        raise Unreadable("unreadable annotation", path, "no JSON object")
    return raw


@dataclass(frozen=True)
class Annotation:
    """One episode: the instruction, and the states (T, D) and joints (T, J) or None at the model rate, float64."""

    episode_id: str
    text: str
    states: NDArray[np.float64]
    joints: NDArray[np.float64] | None
    success: bool | None

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.states)


def read_annotation(path: Path) -> Annotation:
    """An episode's annotation; only ``states`` is required. Raises Unreadable."""
    raw = load_annotation(path, KEYS)
    states, joints = read_states(raw, path)
    return Annotation(path.stem, read_text(raw), states, joints, read_success(raw))


def read_states(raw: Mapping[str, Any], path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The states (T, D) of an annotation, T its ``video_length``, and its joints (T, J) or None.

    Raises:
        Unreadable: no states, no rows of numbers of one width, or lengths that disagree.
    """
    if raw.get("states") is None:
        raise Unreadable("states are missing", path)
    states = _rows(raw["states"], "states", path)
    length = raw.get("video_length", len(states))
    if not isinstance(length, int) or length != len(states):
        detail = f"video_length is {length!r}, there are {len(states)} states"
        raise Unreadable("video_length is not the number of states", path, detail)
    joints = _rows(raw["joints"], "joints", path) if raw.get("joints") else None
    if joints is not None and len(joints) != len(states):
        detail = f"there are {len(joints)} joints and {len(states)} states"
        raise Unreadable("joints and states differ in number", path, detail)
    return states, joints


def _rows(value: Any, name: str, path: Path) -> NDArray[np.float64]:
    """Rows of numbers (T, D) under a key. Raises Unreadable."""
    try:
        rows = np.asarray(value, dtype=np.float64)
    except OverflowError as error:
        raise Unreadable(f"{name} hold a number that is too large", path) from error
    except (ValueError, TypeError) as error:
        raise Unreadable(f"{name} are not rows of numbers of one width", path) from error
    if not rows.size:
        raise Unreadable(f"{name} are empty", path)
    if rows.ndim != 2:
        raise Unreadable(f"{name} are not rows of numbers of one width", path)
    if not np.isfinite(rows).all():
        raise Unreadable(f"{name} hold NaN or infinite values", path)
    return rows


def read_text(raw: Mapping[str, Any]) -> str:
    """The instruction; '' if there is none."""
    texts = raw.get("texts")
    return str(texts[0]) if isinstance(texts, list) and texts else str(texts) if isinstance(texts, str) else ""


def read_success(raw: Mapping[str, Any]) -> bool | None:
    """Whether the episode succeeded, None if that is not recorded."""
    value = raw.get("success")
    known = isinstance(value, bool | int | float) and not (isinstance(value, float) and math.isnan(value))
    return bool(value) if known else None
