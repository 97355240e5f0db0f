"""Records the example world: `python -m dataset_example.recorder OUT --episodes 80 --seed 0`.

Run again after an interruption, it records what is missing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dataset_example.recorder", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the LeRobot v2.1 dataset")
    parser.add_argument("--episodes", type=int, default=80, help="how many (default: %(default)s)")
    parser.add_argument("--val", type=int, default=20, help="how many of them, the last, are validation (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="which world (default: %(default)s)")
    parser.add_argument("--first-id", type=int, default=0, help="id of the first episode (default: %(default)s)")
    parser.add_argument("--fps", type=int, default=15, choices=(15, 5, 3, 1), help="frames a second (default: 15)")
    parser.add_argument("--seconds", type=float, default=14.0, help="length of an episode (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.episodes < 1 or options.workers < 1 or options.seconds <= 0 or options.first_id < 0 or options.val < 0:
        parser.error("--episodes, --workers and --seconds must be positive, --first-id and --val not negative")
    return options


def record_one(job: tuple[Path, int, int, int, float]) -> tuple[int, str, bool]:
    """Records and writes one episode; runs in a worker. Imports come late, after the environment is set."""
    from .episode import record_episode
    from .lerobot import write_episode

    root, seed, episode_id, fps, seconds = job
    episode = record_episode(seed, episode_id, fps=fps, seconds=seconds)
    write_episode(root, episode, seed)
    return episode_id, episode.instruction, episode.success


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: one process, one core
    from .lerobot import recorded, write_meta

    done = recorded(options.out)
    strangers = [i for i, entry in done.items() if (entry["seed"], entry["fps"]) != (options.seed, options.fps)]
    if strangers:
        print(
            f"error: {options.out} holds episodes of another seed or fps (episode {strangers[0]}); "
            "choose an empty folder, or the seed and fps it was recorded with",
            file=sys.stderr,
        )
        return 1
    wanted = range(options.first_id, options.first_id + options.episodes)
    jobs = [(options.out, options.seed, i, options.fps, options.seconds) for i in wanted if i not in done]
    print(f"{len(jobs)} episodes to record, {options.episodes - len(jobs)} are there", file=sys.stderr)
    started = time.monotonic()
    try:
        # A fresh process now and then: MuJoCo's EGL contexts do not give back all of their memory.
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=40) as pool:
            for count, (episode_id, text, success) in enumerate(pool.imap_unordered(record_one, jobs), start=1):
                pace = (time.monotonic() - started) / count
                outcome = "done" if success else "failed"
                print(f"[{count}/{len(jobs)}] episode {episode_id}: {text} ({outcome}) {pace:.1f} s each", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    finally:
        write_meta(options.out, options.fps, options.val)
    return 0


if __name__ == "__main__":
    sys.exit(main())
