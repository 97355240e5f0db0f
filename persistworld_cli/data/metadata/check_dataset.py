"""`build-meta --check`: is a dataset fit for training, and what must be fixed, in plain words.

It parses every annotation and reads every folder and every latent file's header. For an evenly spread sample of
episodes it also opens the videos and reads all latents. Nothing is written.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persistworld_cli.config.keys import state_names
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.sizes import latent_size
from persistworld_cli.data.metadata.check_episode import Seen, inspect
from persistworld_cli.data.metadata.index import INDEX_FILE, ActionStat, IndexFile
from persistworld_cli.data.metadata.index_rows import signatures
from persistworld_cli.data.metadata.scan import AnnotationStat, extraction_notes, list_annotations, other_world
from persistworld_cli.data.processes import in_order
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.statistics.paired import FEWEST

_REDO = "delete these annotations and run persistworld extract-latents again: it extracts only missing episodes"
_META = "run persistworld build-meta DATASET"
_PRESET = "or name the preset it was extracted with: --preset"
TOO_FEW = (
    f"no comparison can decide: extract another dataset with --split-rule every-N, N at most its episodes / {FEWEST}"
)
_NAMED = 5
# kind -> (must be fixed, what is wrong, what to do)
KINDS: dict[str, tuple[bool, str, str]] = {
    "no-annotation": (True, "folder annotation/ is missing", "give the folder that holds annotation/ and videos/"),
    "no-train": (True, "split train is empty", "extract more episodes, or use another --split-rule"),
    "no-val": (False, "split val is empty", "evaluation needs one: extract more episodes, or use another --split-rule"),
    "few-val": (False, f"under {FEWEST} episodes are held out", TOO_FEW),
    "no-videos": (False, "folder videos/ is missing", "rewards, evaluation and replay compare with it"),
    "no-latents": (False, "folder latent_videos/ is missing", "training needs it: run persistworld extract-latents"),
    "nothing": (True, "neither videos/ nor latent_videos/ is there", "copy the rest of the dataset here"),
    "two-splits": (True, "episode is in two splits", "delete it from one: training would see test data"),
    "unreadable": (True, "annotation is not readable JSON", _REDO),
    "other-id": (False, "annotation names another episode", "the file's name counts; was it copied or renamed?"),
    "states": (True, "states cannot be used", _REDO),
    "state-width": (
        True,
        "states differ in width from most episodes",
        "keep other robots' episodes in another dataset",
    ),
    "raw-lists": (False, "lists at the raw rate differ in length", "the joint-velocity adapter is not fitted on them"),
    "no-instruction": (False, "no instruction", "the model gets an empty text there; that may be intended"),
    "video-missing": (True, "video of a camera is missing", _REDO),
    "video-unreadable": (True, "video cannot be decoded", _REDO),
    "video-length": (True, "video is shorter than the states", _REDO),
    "video-longer": (False, "video is longer than the states", "frames beyond the states are not used"),
    "latent-missing": (True, "latents of a camera are missing", _REDO),
    "latent-unreadable": (True, "latent file is damaged", _REDO),
    "latent-old": (True, "latents in torch's format from before 1.6", "torch.load and torch.save each of them again"),
    "latent-shape": (True, "latents are not of shape (T, C, h, w)", _REDO),
    "latent-type": (True, "latents are neither float16 nor float32", "save them as float32, or extract again"),
    "latent-length": (True, "latents are fewer than the states", _REDO),
    "latent-longer": (False, "latents are more than the states", "latents beyond the states are not used"),
    "latent-cameras": (True, "cameras of an episode have latents of different size", _REDO),
    "latent-size": (True, "latents differ in size from most episodes", "one dataset, one encoder and image size"),
    "latent-values": (True, "latents hold NaN or infinite values", f"was the encoder in fp16? {_REDO}"),
    "latent-constant": (False, "latents are the same everywhere", "look at the video: is it black?"),
    "cameras": (True, "number of cameras differs from most episodes", _REDO),
    "preset-cameras": (True, "not the preset's cameras", f"set world.cameras to the dataset's, {_PRESET}"),
    "preset-numbers": (True, "not the preset's action_dim", "set model.action_dim to the states' numbers"),
    "preset-latent": (True, "not the preset's latent size", f"set world.height and width to the dataset's, {_PRESET}"),
    "preset-image": (True, "not the preset's image size", f"set world.height and width to the dataset's, {_PRESET}"),
    "preset-rate": (True, "not the preset's rate", f"set world.rate_hz to the dataset's, {_PRESET}"),
    "preset-split": (False, "not the preset's val_rule", "the split is the extraction's: for another, extract again"),
    "no-preset": (False, "not compared with a preset", "add --preset NAME (its cameras, sizes, rate, action_dim)"),
    "no-index": (False, "no metadata yet", _META),
    "bad-index": (True, "metadata cannot be read", _META),
    "stale-index": (True, "metadata is older than the episodes", _META),
    "stat-width": (True, "percentiles are not of the states' width", _META),
    "stat-order": (True, "percentiles are not finite, or out of order", _META),
    "stat-constant": (False, "1st and 99th percentile are the same", "this number never changes: is it recorded?"),
}


@dataclass
class Report:
    """Findings by kind as (episode or part, detail), and what was checked."""

    found: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    checked: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, name: str, detail: str = "") -> None:
        """Add a finding: where it is, and details."""
        self.found.setdefault(kind, []).append((name, detail))

    @property
    def errors(self) -> int:
        """Kinds of findings that must be fixed."""
        return sum(KINDS[kind][0] for kind in self.found)

    def rows(self) -> list[dict[str, Any]]:
        """One row per kind; those that must be fixed come first."""
        order = sorted(self.found, key=lambda kind: (not KINDS[kind][0], list(KINDS).index(kind)))
        return [
            {
                "level": "error" if KINDS[kind][0] else "warning",
                "finding": KINDS[kind][1],
                "count": len(self.found[kind]),
                "first": [f"{name} ({detail})" if detail else name for name, detail in self.found[kind][:_NAMED]],
                "to do": KINDS[kind][2],
                "kind": kind,
            }
            for kind in order
        ]


def check_dataset(
    root: Path,
    settings: Settings | None = None,
    preset: str = "",
    *,
    sample: int = 100,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check a whole dataset.

    Args:
        root: its folder.
        settings: of the preset to compare with, if any.
        preset: name of that preset.
        sample: episodes whose videos are opened and whose latents are read whole; 0: all.
        workers: processes; one per core by default.
        progress: called with (episodes checked, episodes in all).
    """
    report = Report()
    if not (root / "annotation").is_dir():
        report.add("no-annotation", str(root))
        return report
    listed = list_annotations(root)
    there = ((root / "videos").is_dir(), (root / "latent_videos").is_dir())
    _folders(report, listed, there)
    wanted = min(sample, len(listed)) if sample else len(listed)
    chosen = set(np.linspace(0, len(listed) - 1, wanted).round().astype(int).tolist())  # evenly spread
    seen: list[Seen] = []
    requests = [(item, number in chosen) for number, item in enumerate(listed)]
    with closing(in_order(functools.partial(inspect, root, there), requests, workers)) as found:
        for item, one in zip(listed, found, strict=True):
            seen.append(one)
            for kind, detail in one.troubles:
                report.add(kind, item.name, detail)
            if progress:
                progress(len(seen), len(listed))
    usual = _compare(report, listed, seen)
    if settings is None:
        report.add("no-preset", "")
    else:
        _preset(report, usual, extraction_notes(root), settings, f"preset {preset}")
    _metadata(report, root, listed, usual.numbers, settings)
    report.checked = {
        "annotations parsed": len(listed),
        "latent headers read": sum(one.cameras for one in seen) if there[1] else 0,
        "episodes whose videos were opened and whose latents were read whole": len(chosen),
    }
    return report


def _folders(report: Report, listed: Sequence[AnnotationStat], there: tuple[bool, bool]) -> None:
    """Check splits and folders."""
    splits = Counter(item.split for item in listed)
    for split in ("train", "val"):
        if not splits[split]:
            report.add(f"no-{split}", f"annotation/{split}", f"found: {dict(splits) or 'no annotation'}")
    if 0 < splits["val"] < FEWEST:
        report.add("few-val", "annotation/val", f"{splits['val']} of {len(listed)}")
    if not any(there):
        report.add("nothing", "videos/, latent_videos/")
    elif not there[0]:
        report.add("no-videos", "videos/")
    elif not there[1]:
        report.add("no-latents", "latent_videos/")
    homes: dict[str, str] = {}
    for item in listed:
        if homes.setdefault(item.episode, item.split) != item.split:
            report.add("two-splits", item.episode, f"{homes[item.episode]} and {item.split}")


def _compare(report: Report, listed: Sequence[AnnotationStat], seen: Sequence[Seen]) -> Seen:
    """Report the episodes that differ from most; returns the common values."""
    usual = Seen()
    for name, kind in (("cameras", "cameras"), ("numbers", "state-width"), ("latent", "latent-size"), ("images", "")):
        values = [getattr(one, name) for one in seen]
        if not any(values):
            continue
        common = Counter(value for value in values if value).most_common(1)[0][0]
        setattr(usual, name, common)
        for item, value in zip(listed, values, strict=True):
            if kind and value and value != common:
                report.add(kind, item.name, f"{value}, most have {common}")
    return usual


def _preset(report: Report, usual: Seen, noted: dict[str, Any], settings: Settings, name: str) -> None:
    """Compare the common values, and the notes of extract-latents, with the preset."""
    world, numbers = settings.world, settings.model.action_dim
    other = other_world(noted, world)
    cameras, latent = len(world.cameras), latent_size(settings.model.vae, world.height, world.width)
    if usual.cameras not in (0, cameras):
        names = ", ".join(world.cameras)
        report.add("preset-cameras", name, f"the dataset has {usual.cameras} cameras, the preset {cameras}: {names}")
    elif "cameras" in other:
        report.add("preset-cameras", name, f"{', '.join(noted['cameras'])} against {', '.join(world.cameras)}")
    if usual.numbers not in (0, numbers):
        report.add("preset-numbers", name, f"states of {usual.numbers} numbers, the preset takes {numbers}")
    if usual.latent not in ((), latent):
        report.add("preset-latent", name, f"{usual.latent} per camera, the preset takes {latent}")
    size = (noted["height"], noted["width"]) if {"height", "width"} <= set(noted) else usual.images
    if size not in ((), (world.height, world.width)):
        report.add("preset-image", name, f"{size[0]}x{size[1]}, the preset takes {world.height}x{world.width}")
    if "rate_hz" in other:
        report.add("preset-rate", name, f"{noted['rate_hz']:g} Hz, the preset's is {world.rate_hz:g}")
    if (rule := noted.get("val_rule", world.val_rule)) != world.val_rule:
        report.add("preset-split", name, f"split by {rule}, the preset has {world.val_rule}")


def _metadata(
    report: Report, root: Path, listed: Sequence[AnnotationStat], numbers: int, settings: Settings | None
) -> None:
    """Check index and percentiles."""
    path = root / "meta" / INDEX_FILE
    if not path.is_file():
        report.add("no-index", str(path))
        return
    try:
        index = IndexFile(path)
        known = signatures(index)
        stat = ActionStat.load(root / "meta" / "stat.json")
    except PersistWorldError as error:
        report.add("bad-index", error.where or "", error.what)
        return
    now = {(item.split, item.episode): item for item in listed}
    before = {(item.split, item.episode): item for item in known}
    imported = bool(index.info.get("imported"))
    for label, names in (
        ("new", [] if imported else [n for n in now if n not in before]),  # imported lists leave episodes out
        ("changed", [n for n, item in now.items() if n in before and before[n] != item]),
        ("deleted", [n for n in before if n not in now]),
    ):
        for split, episode in names:
            report.add("stale-index", f"{split}/{episode}", label)
    if numbers and len(stat.p01) != numbers:
        report.add("stat-width", "stat.json", f"{len(stat.p01)} numbers, the states have {numbers}")
        return
    for number, name in enumerate(state_names(len(stat.p01), settings)):
        low, high = stat.p01[number], stat.p99[number]
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            report.add("stat-order", name, f"{low:g} .. {high:g}")
        elif low == high:
            report.add("stat-constant", name, f"{low:g}")
