"""Compare two finished results without rolling anything out; refuse results of different protocols."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from persistworld_cli.checkpoints.references import names_of
from persistworld_cli.evaluation.protocol import require_same
from persistworld_cli.evaluation.results import ALL
from persistworld_cli.files import jsonable
from persistworld_cli.read_files import read_json, reading
from persistworld_cli.reports.tables import eval_table
from persistworld_cli.statistics.paired import FloatArray, compare

NEEDED = ("protocol", "models", "rollouts", "metrics", "groups", "n")


def load_result(path: str) -> dict[str, Any]:
    """Read a result's ``eval.json`` (or the folder that holds it).

    Raises:
        PersistWorldError: the file is missing, damaged, or of another kind.
    """
    file = Path(path).expanduser()
    file = file / "eval.json" if file.is_dir() else file
    what, fix = "cannot read the result", "give the eval.json of a finished evaluation"
    with reading(what, file, fix):
        result = read_json(file, what, fix)
        lacking = [key for key in NEEDED if key not in result]
        if result.get("kind") != "eval" or lacking:
            raise ValueError("not a result of persistworld eval" + (f" (no '{lacking[0]}')" if lacking else ""))
    return result


def compare_files(first: str, second: str) -> tuple[dict[str, Any], Table]:
    """Compare two finished results by their paths (the first is the baseline); returns `compare_results` and its table.

    Raises:
        PersistWorldError: as `load_result`; the protocols differ; or a result is damaged.
    """
    where = f"{first} and {second}"
    results = load_result(first), load_result(second)
    with reading("cannot compare the results", where, "give the eval.json of two finished evaluations"):
        against = compare_results(*results, where)
        return against, eval_table(against)


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Compare the evaluated models of two results rollout by rollout; the first is the baseline.

    Returns:
        A result that `reports.tables.eval_table` shows; with the numbers of their common baseline if they have one.

    Raises:
        PersistWorldError: the protocols differ; ``where`` names the results.
    """
    require_same(first["protocol"], second["protocol"], where)
    models = [first["models"][-1], second["models"][-1]]
    labels = [str(model["label"]) for model in models]
    if labels[0] == labels[1]:
        labels = names_of([str(model["adapter"] or model["ckpt"]) for model in models])
    episodes = [item[0] for item in second["protocol"]["items"]]
    own = [(first, models[0]["label"]), (second, models[1]["label"])]
    reward = {"label": "reward", "higher_is_better": True}
    compared = [(group, metric) for group in second["groups"] for metric in [*second["metrics"], reward]]
    if all(ALL in result["rollouts"] for result in (first, second)):  # older results lack it
        compared.append((ALL, reward))
    paired = []
    for group, metric in compared:
        label = metric["label"]
        base, new = (rollout_values(result, group, label, model) for result, model in own)
        pair = compare(base, new, episodes, higher_is_better=metric["higher_is_better"])
        paired.append({"cameras": group, "metric": label, **vars(pair)})
    baseline = _common_baseline(first, second)
    shown = [*([(second, baseline, baseline)] if baseline and baseline not in labels else [])]
    shown += [(result, name, label) for (result, name), label in zip(own, labels, strict=True)]
    references = [row for row in second["table"] if row["model"] in (second["floor"], second["ceiling"])]
    table = []
    for group in second["groups"]:
        rows = {row["model"]: row for row in references if row["cameras"] == group}
        table.append(rows[second["floor"]])
        for result, name, label in shown:
            row = next(r for r in result["table"] if r["cameras"] == group and r["model"] == name)
            table.append({**row, "model": label})
        table.append(rows[second["ceiling"]])  # by the second result's VAE
    out = {
        "kind": "compare",
        **{key: second[key] for key in ("n", "metrics", "groups", "floor", "ceiling", "protocol")},
        "benchmark": second.get("benchmark"),
        "models": [{**model, "label": label} for model, label in zip(models, labels, strict=True)],
        "table": table,
        "paired": paired,
        "made_on": [{key: result.get(key) for key in ("device", "device_name", "versions")} for result, _ in own],
    }
    cleaned: dict[str, Any] = jsonable(out)
    return cleaned


def _common_baseline(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The label of the baseline that both results have, by its hashes; "" if they have none or different ones."""
    if min(len(first["models"]), len(second["models"])) < 2:
        return ""
    mine, other = first["models"][0], second["models"][0]
    same = all(mine.get(key) == other.get(key) for key in ("ckpt_sha256", "adapter_sha256"))
    return str(other["label"]) if same and mine.get("ckpt_sha256") else ""


def rollout_values(result: Mapping[str, Any], group: str, label: str, model: str) -> FloatArray:
    """One number per rollout, NaN where it is missing."""
    values = result["rollouts"][group][label][model]
    return np.array([np.nan if value is None else value for value in values])
