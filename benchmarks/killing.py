"""Commands that are killed on purpose: started quietly in their own process group, ended by SIGKILL, reported."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """`persistworld ARGUMENTS`, in a process group of its own."""
    command = [sys.executable, "-m", "persistworld_cli", *arguments]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


def kill(process: subprocess.Popen[bytes], alone: bool) -> None:
    """SIGKILL to the worker's process alone, or to all of the run; waits until all of it is gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if "persistworld_cli.worker" in p.cmdline()]
    if alone and workers:
        workers[0].kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        for member in family:  # a worker has a session of its own, and would end in good order without its parent
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    if alive:
        raise RuntimeError(f"left behind: {[p.cmdline() for p in alive]}")


def report(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace, Path], dict[str, Any]]) -> int:
    """Measure in a folder that is gone afterwards, and print; 1 where the result does not say ``pass``.

    Args:
        parser: with the script's own options; --seed and --json are added.
        measure: options and the folder -> the result.
    """
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0 if result["pass"] else 1
