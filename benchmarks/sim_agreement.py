"""How well success in the world model predicts success in the simulator, over policies of graded skill.

`python -m benchmarks.sim_agreement [--dataset DIR] [--rollouts 20] [--steps 10] [--output DIR] [--json]`

Each policy (`benchmarks.policies` and the embedded ones) is rolled out by `persistworld pi-rollout --against sim` from
the same held-out starts, then `persistworld leaderboard --real sim` compares. Finished runs are kept; a run of an
earlier version is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PARTS = ("true_positive", "false_positive", "false_negative", "true_negative", "undecided")
ROOT = Path(__file__).resolve().parents[1]
POLICIES = {
    "recorded": "benchmarks.policies:Recorded",
    "noisy": "benchmarks.policies:Noisy",
    "shaky": "benchmarks.policies:Shaky",
    "slow": "benchmarks.policies:Slow",
    "open": "benchmarks.policies:Open",
    "scripted": "scripted",
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


def main() -> None:
    """Roll out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/sim_agreement"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dataset = ["--dataset", options.dataset] if options.dataset else []
    for name, policy in POLICIES.items():
        folder = options.output / name
        if not (folder / "rollouts.json").is_file():
            sizes = ["--rollouts", str(options.rollouts), "--steps", str(options.steps), "--output", str(folder)]
            persistworld("pi-rollout", "--preset", "tiny", "--policy", policy, "--against", "sim", *sizes, *dataset)
    runs = [f"{name}={options.output / name}" for name in POLICIES]
    result: dict[str, Any] = json.loads(persistworld("leaderboard", *runs, "--real", "sim", "--json", capture=True))
    result["against_sim"] = {name: against_sim(options.output / name / "rollouts.json") for name in POLICIES}
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(persistworld("leaderboard", *runs, "--real", "sim", capture=True))
    for key, what in (("success", "imagined"), ("judge_on_simulated", "simulated")):
        counts = [sum(one[key][part] for one in result["against_sim"].values()) for part in PARTS]
        words = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in zip(PARTS, counts, strict=True))
        print(f"judge on {what} images against the simulator's state: {words}")


if __name__ == "__main__":
    main()
