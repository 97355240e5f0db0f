"""How well success in the world model predicts success in the simulator, over policies of graded skill.

`python -m benchmarks.sim_agreement [--dataset DIR] [--rollouts 20] [--steps 10] [--output DIR] [--json]`

Each policy (`benchmarks.policies` and the embedded ones) is rolled out by `persistworld pi-rollout --against sim` from
the same held-out starts, then `persistworld leaderboard --real sim` compares, and `bars` says which of the registered
bars are met. Finished runs are kept; an output folder belongs to one world model, dataset and size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persistworld_cli.checkpoints.references import sha256_of
from persistworld_cli.files import write_json
from persistworld_cli.statistics.paired import wilson

PARTS = ("true_positive", "false_positive", "false_negative", "true_negative", "undecided")
ROOT = Path(__file__).resolve().parents[1]
POLICIES = {
    "recorded": "benchmarks.policies:Recorded",
    "noisy": "benchmarks.policies:Noisy",
    "shaky": "benchmarks.policies:Shaky",
    "wild": "benchmarks.policies:Wild",
    "slow": "benchmarks.policies:Slow",
    "open": "benchmarks.policies:Open",
    "random": "random",
    "hold": "hold",
}


def persistworld(*arguments: str, capture: bool = False) -> str:
    """The command itself, in the repository's root."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "persistworld_cli", *arguments]
    done = subprocess.run(
        command, env=environment, text=True, check=True, stdout=subprocess.PIPE if capture else sys.stderr
    )
    return done.stdout or ""


def against_sim(path: Path) -> dict[str, Any]:
    """The comparison with the simulator in a run's summary."""
    found = json.loads(path.read_text())["against_sim"]
    if "true_positive" not in found["success"]:
        raise SystemExit(f"{path} is of an earlier version: remove {path.parent} and run again")
    return found


def finished(path: Path, rollouts: int) -> bool:
    """Whether a run has all its rollouts, none cut short."""
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return bool(found["complete"]) and len(found["rollouts"]) == rollouts


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The registered bars: what is asked, the number with its 95% interval, whether the number meets the bar.

    Args:
        result: of `leaderboard --real sim`, with ``against_sim``, each policy's comparison.
    """
    predicted, rows = result["predicted"], result["policies"]
    spans = predicted["intervals"]
    graded = sum(0.2 <= row["real"] <= 0.8 for row in rows)
    undecided, judged = sum(row["undecided"] for row in rows), sum(row["n"] + row["undecided"] for row in rows)
    counts = {part: sum(one["judge_on_simulated"][part] for one in result["against_sim"].values()) for part in PARTS}
    right = counts["true_positive"] + counts["true_negative"]
    seen = right + counts["false_positive"] + counts["false_negative"]
    found: list[tuple[str, float, Sequence[float | None], bool]] = [
        ("policies with simulated success 0.2 to 0.8: at least 5", graded, (None, None), graded >= 5),
        ("r of success: at least 0.8", r := predicted["pearson_r"] or 0.0, spans["pearson_r"], r >= 0.8),
        ("MMRV: at most 0.2", predicted["mmrv"], spans["mmrv"], predicted["mmrv"] <= 0.2),
        ("undecided: at most 0.15", share := undecided / judged, wilson(undecided, judged), share <= 0.15),
        (
            "mean absolute error of success: at most 0.15",
            predicted["mean_absolute_error"],
            spans["mean_absolute_error"],
            predicted["mean_absolute_error"] <= 0.15,
        ),
        ("judge right on simulated images: at least 0.95", share := right / seen, wilson(right, seen), share >= 0.95),
    ]
    return [
        {"bar": bar, "value": value, "low": low, "high": high, "met": met} for bar, value, (low, high), met in found
    ]


def main() -> None:
    """Roll out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--ckpt", help="the world model's weights; the preset's by default")
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/sim_agreement"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    world = ["--preset", options.preset]
    for flag, given in (("--dataset", options.dataset), ("--ckpt", options.ckpt)):
        world += [flag, given] if given else []
    sources = [ROOT / "benchmarks" / "policies.py", ROOT / "presets" / "tasks" / "bundled.toml"]
    sizes = [str(options.rollouts), str(options.steps)]
    identity = [*world, *sizes, sha256_of(options.ckpt or ""), *POLICIES.values(), *map(sha256_of, map(str, sources))]
    marker = options.output / "run.json"
    if marker.is_file() and json.loads(marker.read_text()) != identity:
        raise SystemExit(
            f"error: {options.output} is of another model, dataset, size or other policies\n  to do: another --output"
        )
    write_json(marker, identity)
    for name, policy in POLICIES.items():
        folder = options.output / name
        if not finished(folder / "rollouts.json", options.rollouts):
            sizes = ["--rollouts", str(options.rollouts), "--steps", str(options.steps), "--output", str(folder)]
            persistworld("pi-rollout", *world, "--policy", policy, "--against", "sim", *sizes)
    runs = [f"{name}={options.output / name}" for name in POLICIES]
    result: dict[str, Any] = json.loads(persistworld("leaderboard", *runs, "--real", "sim", "--json", capture=True))
    result["against_sim"] = {name: against_sim(options.output / name / "rollouts.json") for name in POLICIES}
    result["bars"] = bars(result)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(persistworld("leaderboard", *runs, "--real", "sim", capture=True))
    for key, what in (("success", "imagined"), ("judge_on_simulated", "simulated")):
        counts = [sum(one[key][part] for one in result["against_sim"].values()) for part in PARTS]
        words = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in zip(PARTS, counts, strict=True))
        print(f"judge on {what} images against the simulator's state: {words}")
    for bar in result["bars"]:
        span = "" if bar["low"] is None else f" [{bar['low']:.2f}, {bar['high']:.2f}]"
        print(f"{'met   ' if bar['met'] else 'missed'} {bar['bar']}: {bar['value']:.3g}{span}")


if __name__ == "__main__":
    main()
