"""Reset error of the simulator: restored at a recorded start, how closely it repeats the recording along its targets.

`python -m benchmarks.sim_reset [--dataset DIR] [--episodes 20] [--starts 0 9] [--json]`

The targets are known at 15 Hz, the recorder moved them at 60 Hz: the arm follows almost the same path, and contacts
make small differences larger with time. Distances are those of the object that is farthest off; PSNR (the least of
three cameras) is against the recorded video, which went through a lossy codec.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.policies.bundled_world.scene import find_recorded
from persistworld_cli.policies.bundled_world.simulator import check_simulator, restored
from persistworld_cli.rollout.interactive import make_start
from persistworld_cli.rollout.recording import Item

TICKS = (0, 30, 90)  # 15 Hz frames after the start
_FIELDS = ("sim.object_pose", "action")


def repeat(settings: Settings, store: EpisodeStore, split: str, item: Item) -> list[tuple[float, float, float]]:
    """At each of `TICKS`: the farthest object (m), the least PSNR (dB), and the reset error at the start."""
    recorded = find_recorded(settings, make_start(store, item, split))
    columns = recorded.raw.read(recorded.index, list(_FIELDS))
    shown = [recorded.row + tick for tick in TICKS]
    views = [recorded.raw.images(recorded.index, camera, shown) for camera in settings.world.cameras]
    rows = []
    with restored(recorded) as (world, error):
        for tick in range(TICKS[-1] + 1):
            row = recorded.row + tick
            if tick in TICKS:
                gap = (world.observe()[_FIELDS[0]] - columns[_FIELDS[0]][row]).reshape(3, 7)[:, :3]
                true = np.stack([next(view) for view in views]).astype(np.float64)
                squared = ((world.images() - true) ** 2).mean(axis=(1, 2, 3))
                rows.append(
                    (float(np.linalg.norm(gap, axis=1).max()), float(10 * np.log10(255**2 / squared.max())), error)
                )
            world.tick(columns[_FIELDS[1]][row, :7], columns[_FIELDS[1]][row, 7])
    return rows


def measure(dataset: str | None, episodes: int, starts: list[int]) -> dict[str, Any]:
    """Held-out episodes, every start of each."""
    check_simulator()
    settings = load_settings("tiny", flags={"world.dataset": dataset})
    store, split = open_store(settings), settings.eval.split
    items = [Item(name, start, 0) for name in store.episodes(split)[:episodes] for start in starts]
    found = np.array([repeat(settings, store, split, item) for item in items])  # (n, ticks, 3)
    rows = []
    for index, tick in enumerate(TICKS):
        apart, close = 1000 * found[:, index, 0], found[:, index, 1]
        quantiles = dict(zip(("median_mm", "p90_mm", "max_mm"), np.percentile(apart, [50, 90, 100]), strict=True))
        rows.append({"seconds": tick / 15, **quantiles, "median_db": np.median(close), "least_db": close.min()})
    return {"n": len(items), "reset_error": float(found[..., 2].max()), "rows": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--starts", type=int, nargs="+", default=[0, 9])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.dataset, options.episodes, options.starts)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['n']} starts; reset within {result['reset_error']:.1g} (m, rad) of the recording")
    for row in result["rows"]:
        apart = f"{row['median_mm']:.1f} mm (median), {row['p90_mm']:.1f} (p90), {row['max_mm']:.1f} (max)"
        close = f"{row['median_db']:.1f} dB (median), {row['least_db']:.1f} (least)"
        print(f"after {row['seconds']:.0f} s: farthest object {apart}; worst camera {close}")


if __name__ == "__main__":
    main()
