"""Which weights a command runs and compares, by name and by SHA-256."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from persistworld_cli.checkpoints.sources import adapter_at, locate
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.settings import ModelSettings
from persistworld_cli.config.weight_names import NO_ADAPTER, adapter_name, content_of, require_one_adapter
from persistworld_cli.errors import UsageError
from persistworld_cli.files import hash_files


@dataclass(frozen=True)
class ModelRef:
    """One model of a comparison.

    Attributes:
        label: its name in tables.
        ckpt: weights: a file, a folder, a hub id, ``bundled:NAME``.
        adapter: PEFT folder on top, or "".
    """

    label: str
    ckpt: str
    adapter: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """Adapter, then checkpoint, for `action_scale.scale_of`."""
        return tuple(part for part in (self.adapter, self.ckpt) if part)

    def fingerprint(self) -> dict[str, str]:
        """``{"ckpt": sha256, "adapter": sha256}`` of the files that are loaded; "" for none."""
        return {"ckpt": sha256_of(self.ckpt), "adapter": sha256_of(self.adapter)}


def weights_ref(weights: str, ckpt: str, adapter: str = "", label: str = "") -> ModelRef:
    """The model that a path or hub id means in every command: an adapter on `ckpt`, or whole weights.

    Args:
        weights: a file, a folder, a hub id, ``bundled:NAME``.
        ckpt: the settings' checkpoint.
        adapter: to put on `weights`.
        label: of the model.

    Raises:
        UsageError: two adapters, or an adapter without weights below.
        PersistWorldError: the hub does not answer.
    """
    own = adapter_at(weights)
    if not own:
        return ModelRef(label, weights, adapter)
    require_one_adapter(weights, own, adapter)
    if not ckpt:
        raise UsageError(
            f"'{weights}' is an adapter, but its base weights are not given",
            where="model.ckpt",
            fix="give them with --ckpt, and this one with --adapter",
        )
    return ModelRef(label, ckpt, own)


def inference_ref(model: ModelSettings, label: str = "") -> ModelRef:
    """The model that inference runs: ``model.inference``, or ``model.ckpt``, with ``model.adapter`` on top.

    Raises as `weights_ref`, and UsageError if no weights are named.
    """
    adapter = adapter_name(model.adapter)
    if model.inference:
        return weights_ref(model.inference, model.ckpt, adapter, label)
    if not model.ckpt:
        raise UsageError("no weights are named", where="model.ckpt", fix="give --ckpt, or a preset with weights")
    return ModelRef(label, model.ckpt, adapter)


def refs_of_eval(model: ModelSettings, baseline: str = "", *, alone: bool = False) -> list[ModelRef]:
    """The baseline, then the evaluated model; only the latter if there is nothing to compare it with.

    The evaluated model is the one that inference runs (`inference_ref`).

    Args:
        model: the settings.
        baseline: weights, or a PEFT folder on the evaluated checkpoint; "base" or "": the evaluated checkpoint without
            its adapter, or ``model.ckpt`` if whole weights are evaluated.
        alone: no baseline.

    Raises:
        UsageError: no weights at all, or a model compared with itself.
    """
    judged = inference_ref(model)
    if alone:
        return [replace(judged, label=_kind(judged, model))]
    base = ModelRef("", judged.ckpt if judged.adapter else model.ckpt or judged.ckpt)
    if baseline and baseline not in NO_ADAPTER:
        base = weights_ref(baseline, judged.ckpt)
    elif not baseline and judged == base:
        return [replace(judged, label="base")]
    if base == judged:
        raise UsageError(
            "the model would be compared with itself",
            where="--baseline",
            fix="give an adapter (--adapter), other weights (--ckpt), or leave --baseline out",
        )
    labels = _labels(base, judged)
    return [replace(base, label=labels[0]), replace(judged, label=labels[1])]


def refs_of_replay(model: ModelSettings, ckpts: Sequence[str] = (), adapters: Sequence[str] = ()) -> list[ModelRef]:
    """The models of a replay, one for each of ``ckpts`` and ``adapters``; without any, `inference_ref`.

    A single checkpoint is paired with every adapter, a single adapter with every checkpoint; equal numbers are paired
    in order. Without ``ckpts``, adapters go on ``model.ckpt``; without ``adapters``, ``model.adapter`` is not used. The
    adapter ``base`` means none.

    Raises:
        UsageError: numbers that do not pair up, or no weights.
    """
    if not ckpts and not adapters:
        ref = inference_ref(model)
        return [replace(ref, label=_kind(ref, model))]
    below, above = list(ckpts) or [model.ckpt], list(adapters) or [""]
    count = max(len(below), len(above))
    if len(below) not in (1, count) or len(above) not in (1, count):
        raise UsageError(
            f"{len(ckpts)} checkpoints and {len(adapters)} adapters do not pair up",
            where="--ckpt, --adapter",
            fix="give one of either, or the same number of both",
        )
    if not all(below):
        raise UsageError("no weights to replay in", where="model.ckpt", fix="give --ckpt, or a preset with weights")
    pairs = zip(below * (count // len(below)), above * (count // len(above)), strict=True)
    refs = [weights_ref(ckpt, model.ckpt, adapter_name(own)) for ckpt, own in pairs]
    kinds = [_kind(ref, model) for ref in refs]
    if len(refs) > 1 and (len(set(kinds)) < len(kinds) or any(ref.ckpt != model.ckpt for ref in refs)):
        kinds = names_of([ref.adapter or ref.ckpt for ref in refs])
    return [replace(ref, label=label) for ref, label in zip(refs, kinds, strict=True)]


def _kind(ref: ModelRef, model: ModelSettings) -> str:
    """``post-trained`` with an adapter, ``base`` for the settings' checkpoint, else the name of its weights."""
    if ref.adapter:
        return "post-trained"
    return "base" if ref.ckpt == model.ckpt else names_of([ref.ckpt])[0]


def _labels(baseline: ModelRef, judged: ModelRef) -> list[str]:
    """``base`` and ``post-trained`` if only the adapter differs, else the names of what differs."""
    if baseline.ckpt == judged.ckpt and not baseline.adapter:
        return ["base", "post-trained"]
    if baseline.ckpt == judged.ckpt:
        return names_of([baseline.adapter, judged.adapter or "base"])
    return names_of([baseline.ckpt, judged.ckpt])


def names_of(paths: list[str]) -> list[str]:
    """Short, different names for paths: the last parts that differ."""
    parts = [path.replace("bundled:", "").rstrip("/").split("/") for path in paths]
    for depth in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{index + 1}" for index, name in enumerate(names)]


def sha256_of(path: str) -> str:
    """SHA-256 of a file, of a folder's files and names in order, or of a hub id's files as fetched; "" for "".

    A folder's model card does not count.

    Raises:
        PersistWorldError: not on disk, and the hub cannot give it.
    """
    if not path:
        return ""
    root = resolve_path(path)
    if root.is_dir():
        files = [(file, str(file.relative_to(root))) for file in content_of(root)]
    else:
        source = None if root.is_file() else locate(path)
        found = [file for file, _ in source.files] if source else [root]
        files = [(file, file.name if len(found) > 1 else source.entry if source else "") for file in found]
    return hash_files(files)
