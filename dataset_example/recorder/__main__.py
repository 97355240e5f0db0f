"""Records the example world: `python -m dataset_example.recorder OUT --episodes 80 --seed 0`.

Run again after an interruption, it records what is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from .design import DEFAULT, DESIGNS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dataset_example.recorder", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the LeRobot v2.1 dataset")
    parser.add_argument("--episodes", type=int, default=80, help="how many (default: %(default)s)")
    parser.add_argument("--val", type=int, default=20, help="how many of them, the last, are validation (default: 20)")
    parser.add_argument(
        "--design", choices=list(DESIGNS), default=DEFAULT.name, help="which world's design (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which world (default: %(default)s)")
    parser.add_argument("--first-id", type=int, default=0, help="id of the first episode (default: %(default)s)")
    parser.add_argument("--fps", type=int, default=15, choices=(15, 5, 3, 1), help="frames per second (default: 15)")
    parser.add_argument("--seconds", type=float, default=14.0, help="length of an episode (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.episodes < 1 or options.workers < 1 or options.seconds <= 0 or options.first_id < 0 or options.val < 0:
        parser.error("--episodes, --workers and --seconds must be positive, --first-id and --val not negative")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from .corpus import OtherWorldError, record

    wanted = range(options.first_id, options.first_id + options.episodes)
    try:
        record(
            options.out,
            wanted,
            options.seed,
            options.fps,
            options.seconds,
            options.workers,
            options.val,
            options.design,
        )
    except OtherWorldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # lets `record` write what it has
    sys.exit(main())
