"""Accuracy of the bundled world's judge on recorded images, whose ground truth is known.

`python -m benchmarks.judging [--dataset DIR] [--raw DIR] [--episodes 80] [--json]`

No simulator and no model: frames are decoded from the extracted world, the truth is the raw recording's
`sim.object_pose`. Reported are (1) the distance of located objects from their true positions, (2) each episode's own
instruction against `is_episode_successful` (decided when the instructed motion ends; later motions may undo or do it)
and against the same rule on the true positions, and (3) every instruction that the scene's objects allow, after 4, 8
and 14 s, against that rule: most of those did not succeed, so failures are tested as well.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.policies.bundled_world.judge import decide, find_condition, locate
from persistworld_cli.policies.bundled_world.rules import DIRECTIONS, Condition, pad_positions
from persistworld_cli.policies.bundled_world.scene import find_recorded, true_positions
from persistworld_cli.policies.judge import Evidence, SceneObject
from persistworld_cli.rollout.interactive import make_start
from persistworld_cli.rollout.recording import Item
from persistworld_cli.statistics.ranking import pearson

CUTS = (20, 40, 70)  # frames at 5 Hz


def instructions(objects: tuple[SceneObject, ...]) -> list[str]:
    """Every instruction that these objects allow."""
    small, large = ([item.name for item in objects if item.graspable is kind] for kind in (True, False))
    texts = [f"pick up the {name} and place it further {way}" for name in small for way in DIRECTIONS]
    texts += [f"push the {name} {way}" for name in large for way in DIRECTIONS]
    texts += [f"move the gripper above the {name}" for name in small + large]
    return texts + [f"put the {name} on top of the {below}" for name in small for below in large]


def judge_episode(settings: Settings, store: EpisodeStore, split: str, episode: str) -> dict[str, Any]:
    """One episode: distances of places seen from true ones (m), and rows (instruction's kind, judged, true, ...)."""
    start = make_start(store, Item(episode, 0, 0), split)
    recorded, count = find_recorded(settings, start), start.annotation.num_frames
    rows = recorded.raw.clock(recorded.index).rows(settings.world.rate_hz)
    true = true_positions(recorded)[rows][:count]
    evidence = Evidence(
        episode=episode,
        start=0,
        seed=0,
        instruction=start.text,
        cameras=settings.world.cameras,
        rate_hz=settings.world.rate_hz,
        frames=store.frames(split, episode, list(range(count))),
        poses=start.annotation.states[:count],
        joint_pos=np.empty((0, 7)),
        joint_vel=np.empty((0, 7)),
        objects=recorded.objects,
    )
    seen, pads = locate(evidence, range(len(recorded.objects))), pad_positions(evidence.poses)

    def row(text: str, frames: int) -> dict[str, Any]:
        condition, rate_hz = find_condition(text, recorded.objects), settings.world.rate_hz
        assert isinstance(condition, Condition)
        verdict = decide(condition, recorded.objects, seen[:frames], pads[:frames], rate_hz)
        truth = condition.outcome(true[:frames], pads[:frames], rate_hz)
        assert truth is not None
        return {
            "kind": condition.task.kind,
            "frames": frames,
            "judged": verdict.success,
            "true": truth.success,
            "progress": verdict.progress,
            "true_progress": truth.progress,
        }

    return {
        "apart": np.linalg.norm(seen - true, axis=-1),
        "own": {**row(start.text, count), "recorded": start.annotation.success},
        "all": [row(text, frames) for text in instructions(recorded.objects) for frames in CUTS],
    }


def table(rows: list[dict[str, Any]], against: str = "true") -> dict[str, int]:
    """Confusion table: judged / true."""
    counts = Counter((row["judged"], row[against]) for row in rows)
    names = {True: "success", False: "failure", None: "undecided"}
    return {f"{names[a]} / {names[b]}": counts[a, b] for a in (True, False, None) for b in (True, False)}


def accuracy(rows: list[dict[str, Any]], against: str = "true") -> float:
    """Accuracy over the decided rows."""
    return float(np.mean([row["judged"] == row[against] for row in rows if row["judged"] is not None]))


def measure(dataset: str | None, raw: str | None, episodes: int) -> dict[str, Any]:
    """All episodes of all splits, the held-out ones first."""
    settings = load_settings("tiny", flags={"world.dataset": dataset, "world.raw": raw})
    store = open_store(settings)
    wanted = [(split, name) for split in reversed(store.splits) for name in store.episodes(split)][:episodes]
    found = [judge_episode(settings, store, *one) for one in wanted]
    apart = np.concatenate([one["apart"].ravel() for one in found])
    own, rows = [one["own"] for one in found], [row for one in found for row in one["all"]]
    decided = [row for row in rows if row["judged"] is not None]
    known = apart[np.isfinite(apart)]
    return {
        "episodes": len(found),
        "located": {
            "share": len(known) / apart.size,
            "median_cm": 100 * float(np.median(known)),
            "p90_cm": 100 * float(np.percentile(known, 90)),
            "beyond_5_cm": float((known > 0.05).mean()),
        },
        "own_instruction": {
            "against_recorded": table(own, "recorded"),
            "against_rule": table(own),
            "accuracy_recorded": accuracy(own, "recorded"),
            "accuracy_rule": accuracy(own),
        },
        "any_instruction": {
            "n": len(rows),
            "decided": len(decided),
            "accuracy": accuracy(rows),
            "progress_r": pearson([r["progress"] for r in decided], [r["true_progress"] for r in decided]),
            "table": table(rows),
            "kinds": {
                kind: table([r for r in rows if r["kind"] == kind]) for kind in ("pick", "push", "reach", "stack")
            },
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--raw", help="the recording that it was made from; the preset's by default")
    parser.add_argument("--episodes", type=int, default=80)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.dataset, options.raw, options.episodes)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    located, own, every = result["located"], result["own_instruction"], result["any_instruction"]
    print(f"{result['episodes']} recorded episodes; tables read judged / true")
    print(
        f"objects located in {located['share']:.0%} of frames: median error {located['median_cm']:.1f} cm, 90% within "
        f"{located['p90_cm']:.1f} cm, {located['beyond_5_cm']:.1%} beyond 5 cm"
    )
    for key, what in (("recorded", "is_episode_successful"), ("rule", "rule on true positions")):
        print(f"own instruction against {what}: accuracy {own[f'accuracy_{key}']:.1%}; {own[f'against_{key}']}")
    print(
        f"any instruction: accuracy {every['accuracy']:.1%} of {every['decided']} decided "
        f"(n = {every['n']}), progress r {every['progress_r']:.3f}; {every['table']}"
    )
    for kind, counts in every["kinds"].items():
        print(f"  {kind:>5}: {counts}")


if __name__ == "__main__":
    main()
