"""The environment of worker processes: threads, memory allocator, devices. All of it is read once, at process start.

Measured on two cores (architecture notes of this project): unpinned threads and glibc's default malloc cost a factor of
ten in convolutions, because every large buffer is mapped, zeroed page by page and unmapped again.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from persistworld_cli.config.settings import LaunchSettings

_KEPT_BYTES = 16 * 2**30  # freed memory stays with the process up to this much
_STEP_BYTES = 256 * 2**20  # the heap grows in steps of this size
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TOP_PAD_": str(_STEP_BYTES),
}
ALL_CPUS = "PERSISTWORLD_CPUS"  # tells the worker to free its main thread again: compat.free_main_thread
_BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def cpus() -> list[int]:
    """Logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """Physical cores that this process may use: hyperthreads share one, and a container's quota may allow fewer."""
    allowed = cpus()
    distinct = {_siblings(cpu) for cpu in allowed}
    count = len(distinct) if "" not in distinct else len(allowed)
    quota = _quota()
    return max(1, min(count, int(quota + 0.5)) if quota else count)


def _siblings(cpu: int) -> str:
    """Name of the core a CPU belongs to; "" where the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""


def _quota() -> float | None:
    """CPUs that the control group grants, None where it sets no limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text()
        period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True  # cannot tell: let torch decide
    return re.search(r"^cuda\b[^=]*=\s*None", text, re.MULTILINE) is None


def gpu_count(env: Mapping[str, str] = os.environ) -> int:
    """NVIDIA devices that a worker would see, without importing torch (which takes seconds); 0 for a CPU-only torch."""
    if not torch_has_cuda():
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()]
    if visible is None or not devices:
        return len(devices)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return len([name for name in names if name != "-1"])


def use_gpu(launch: LaunchSettings, env: Mapping[str, str] = os.environ) -> bool:
    """Whether the workers will run on GPUs."""
    return launch.device == "cuda" or (launch.device == "auto" and gpu_count(env) > 0)


def worker_environment(launch: LaunchSettings, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``env`` with what the workers need; nothing that the user set is overruled, but by ``launch.threads``.

    Threads are bound to cores only for a single CPU process: two processes would be bound to the same cores (measured
    on two cores: half the speed), and beside a GPU nothing is won.
    """
    local = max(1, launch.num_processes // launch.num_machines)
    child = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, cores() // local)), **env}
    if launch.threads:
        child["OMP_NUM_THREADS"] = str(launch.threads)
    if use_gpu(launch, env):
        return child
    child["ACCELERATE_USE_CPU"] = "true"
    for name, value in _MALLOC.items():
        child.setdefault(name, value)
    if local == 1 and not any(name in child for name in (*_BINDING, "GOMP_CPU_AFFINITY", "KMP_AFFINITY")):
        child |= _BINDING
        child[ALL_CPUS] = ",".join(map(str, cpus()))
    return child
