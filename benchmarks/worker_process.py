"""A benchmark in the environment that workers get: threads and the memory allocator are set at process start."""

from __future__ import annotations

import os
import sys

from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.launch.environment import worker_environment

_INSIDE = "PERSISTWORLD_BENCHMARK"


def become_worker(module: str) -> None:
    """Start this process's program anew in that environment, with the same arguments; nothing where it is in it."""
    if _INSIDE not in os.environ:
        environment = {**worker_environment(LaunchSettings(device="cpu")), _INSIDE: "1"}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)
