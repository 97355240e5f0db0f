"""Write the chosen setting as a small preset that extends the measured one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persistworld_cli.config.presets import load_settings, to_json
from persistworld_cli.config.settings import SamplingSettings, Settings
from persistworld_cli.errors import UsageError
from persistworld_cli.files import write_text

_MARK = "# Written by persistworld frontier"


def require_writable(path: Path) -> None:
    """Refuse a path that is not a TOML file, or a file that this command did not write. Raises UsageError."""
    if path.suffix != ".toml":
        raise UsageError(
            f"'{path.name}' is not a TOML file", where="--write-preset", fix="write --write-preset fast.toml"
        )
    if path.is_dir() or (path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MARK)):
        raise UsageError(
            "the file exists and was not written by this command", where=str(path), fix="take another name"
        )


def write_preset(path: Path, extends: str, sampling: SamplingSettings, result: Mapping[str, Any]) -> Path:
    """Write the sampling settings that differ from the preset that it ``extends``, and their origin as a comment.

    Args:
        path: the file.
        extends: name or path of the preset that the measurement was made with.
        sampling: the chosen settings.
        result: `build_frontier`'s, for the comment.
    """
    parent = load_settings(extends, env={})
    before, after = (to_json(Settings(sampling=one))["sampling"] for one in (parent.sampling, sampling))
    values = {key: value for key, value in after.items() if key in ("sampler", "steps") or value != before[key]}
    if extends.endswith(".toml"):
        extends = os.path.relpath(Path(extends).absolute(), path.parent)
    n, chosen = result["n"], next(row for row in result["settings"] if row["name"] == result["chosen"])
    lines = [
        f"{_MARK} (frontier.json has the numbers).",
        f"# {chosen['name']}: {chosen['calls']} network calls per clip, {result['reference']['calls']} with "
        f"{result['reference']['name']}.",
        f"# Within {result['percent']:g}% of it: by 95% intervals over {n['episodes']} episodes of {n['steps']} steps, "
        f"its worst figure is at most {chosen['worst_loss_high']:+.2f}% off (above 0: worse).",
        f"# Weights: {result['model']['ckpt']} {result['model']['adapter']}".rstrip(),
        "# persistworld eval: a benchmark pins its own sampler, so add --benchmark none there.",
        f"extends = {json.dumps(extends, ensure_ascii=False)}",
        "",
        "[sampling]",
        *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()),
    ]
    write_text(path, "\n".join(lines) + "\n")
    load_settings(str(path), env={})  # refuses a preset that does not load
    return path
