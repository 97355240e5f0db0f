"""Pushes by driving, in the world model and in the simulator: does the object go where it should?

`python -m benchmarks.driving_pushes [--dataset DIR] [--ckpt PATH] [--output DIR]`

`Push` moves as a driver does by keys, 8 cm an interaction: down beside the object with the fingers shut, then against
it (`driving_pushes.toml`). Prints how far each object moved in the world model, as the judge locates it there, and in
the simulator, as its state says and as the judge locates it on simulated images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sim_agreement import persistworld
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.policies.action_spaces import CARTESIAN
from persistworld_cli.policies.bundled_world.judge import locate
from persistworld_cli.policies.bundled_world.rules import DIRECTIONS, pad_positions, read_instruction
from persistworld_cli.policies.judge import Evidence, Verdict
from persistworld_cli.policies.observation import PROMPT
from persistworld_cli.statistics.ranking import pearson

ROWS = 12  # of an interaction, at the task's skip of 3
KEY = 0.08  # m an interaction: `drive.step`
LOW = 0.05  # m over the table: where the pads push
SHUT = 0.9  # the gripper, as recorded pushes have it
LAST = 3  # frames whose median is where an object ended


class Push:
    """Down, then in the instruction's direction, from where it commanded last: the arm of the simulator lags."""

    def __init__(self) -> None:
        self.reset()

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        pose = np.asarray(obs[CARTESIAN], dtype=np.float64) if self._goal is None else self._goal
        height = float(pad_positions(pose[None])[0, 2]) - LOW
        way = next(way for name, way in DIRECTIONS.items() if str(obs[PROMPT]).endswith(name))
        step = np.array([0, 0, -min(KEY, height)]) if height > 0.01 else np.append(KEY * way, 0)
        rows = np.repeat(np.append(pose, SHUT)[None], ROWS, axis=0)
        rows[:, :3] += step * (np.arange(1, ROWS + 1) / ROWS)[:, None]
        self._goal = rows[-1, :6]
        return {"actions": rows}

    def reset(self) -> None:
        self._goal: np.ndarray | None = None


class Moved:
    """A judge whose progress is 0.5 and how far the object moved in the instruction's direction, m."""

    wants_objects = True

    def judge(self, evidence: Evidence) -> Verdict:
        objects = evidence.objects or ()
        task = read_instruction(evidence.instruction, [item.name for item in objects])
        assert not isinstance(task, str), task
        places = locate(evidence, [task.target])[-LAST:, task.target]
        if np.isnan(places).any(axis=1).all():
            return Verdict(success=None, progress=None, reason="not seen at the end")
        way = (np.nanmedian(places, axis=0) - objects[task.target].position)[:2] @ DIRECTIONS[task.direction]
        return Verdict(
            success=bool(way > KEY / 2), progress=float(np.clip(0.5 + way, 0, 1)), reason=f"moved {way:.3f} m"
        )


def line(entry: dict[str, Any]) -> dict[str, Any]:
    """One rollout: metres that its object moved, None where it is not seen."""
    record = json.loads(Path(entry["json"]).read_text())
    names = json.loads(_episodes().read_text().splitlines()[int(record["episode"])])["objects"]
    task = read_instruction(record["instructions"], [f"{one['colour']} {one['shape']}" for one in names])
    assert not isinstance(task, str), task
    places = np.array(record["sim"]["object_positions"])[:, task.target]
    true = float((np.median(places[-LAST:], axis=0) - places[0])[:2] @ DIRECTIONS[task.direction])
    seen = {"world model": record["progress"], "judge on simulated": record["sim"]["judged_progress"]}
    moved = {where: None if progress is None else round(progress - 0.5, 3) for where, progress in seen.items()}
    return {
        "episode": record["episode"],
        "instruction": record["instructions"],
        "simulator": round(true, 3),
        **moved,
    }


def _episodes() -> Path:
    return bundled_root() / "dataset_example" / "world" / "meta" / "episodes.jsonl"


def main() -> None:
    """Drive and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--ckpt", help="the world model's weights; the preset's by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/driving_pushes"))
    options = parser.parse_args()
    more = ["--set", "policy.position_gain=1"]  # as a key's poses: they are where the arm is
    for flag, given in (("--dataset", options.dataset), ("--ckpt", options.ckpt)):
        more += [flag, given] if given else []
    task = Path(__file__).with_suffix(".toml")
    persistworld(
        *("pi-rollout", "--policy", "benchmarks.driving_pushes:Push", "--actions", "pose", "--task", str(task)),
        *("--judge", "benchmarks.driving_pushes:Moved", "--against", "sim", "--rollouts", "99"),
        *("--output", str(options.output), *more),
    )
    lines = [line(entry) for entry in json.loads((options.output / "rollouts.json").read_text())["rollouts"]]
    for one in lines:
        print(json.dumps(one))
    both = [(one["world model"], one["simulator"]) for one in lines if one["world model"] is not None]
    print(f"{len(both)} of {len(lines)} seen at the end of the world model's rollout")
    if both:
        off = [100 * abs(a - b) for a, b in both]
        r = pearson(*map(list, zip(*both, strict=True)))
        print(f"off by {float(np.median(off)):.1f} cm (median), at most {max(off):.1f}; r of the distances {r}")


if __name__ == "__main__":
    main()
