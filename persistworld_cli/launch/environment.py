"""The environment of worker processes: threads, memory allocator, devices. All of it is read once, at process start.

On two cores, unpinned threads and glibc's default malloc make convolutions ten times slower (measured): every large
buffer is mapped, zeroed page by page and unmapped again.

OpenMP's threads wait for each other after every loop, thousands of times per second. Alone they should spin, since
sleeping and waking takes longer than the wait; beside other work a spinning thread occupies the core that the thread it
waits for needs.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.launch.cgroups import cpu_limit
from persistworld_cli.launch.core_lock import claim_cores

_KEPT_BYTES = 16 * 2**30  # freed memory stays with the process up to this much
_STEP_BYTES = 256 * 2**20  # the heap grows in steps of this size
_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_TOP_PAD_": str(_STEP_BYTES),
}
ALL_CPUS = "PERSISTWORLD_CPUS"  # lets the worker free its main thread again: compat.free_main_thread
_BINDING = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
_BOUND_BY_USER = (*_BINDING, "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# libgomp's own count for more threads than cores, some 50 us. Passive would halve the speed once the other work ends.
_WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
_WAITING_BY_USER = (*_WAITING, "OMP_WAIT_POLICY")
_BUSY = 0.25  # share of the CPUs' time from which other processes count
_MEASURED_S = 0.2


def cpus() -> list[int]:
    """Logical CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores(env: Mapping[str, str] = os.environ) -> int:
    """Physical cores (hyperthreads share one) that this process may use; containers, cgroups and SLURM limit them."""
    allowed = cpus()
    count = physical_cores(allowed)
    limits = [float(count)]
    if (quota := cpu_limit()) is not None:
        limits.append(int(quota + 0.5))
    if (granted := env.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        limits.append(int(granted) * count / len(allowed))  # SLURM counts hyperthreads
    return max(1, int(min(limits)))


def physical_cores(allowed: Sequence[int]) -> int:
    """How many cores some logical CPUs belong to."""
    distinct = {_siblings(cpu) for cpu in allowed}
    return len(distinct) if "" not in distinct else len(allowed)


def _siblings(cpu: int) -> str:
    """Name of the core a CPU belongs to; "" if the system does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return ""


@contextmanager
def cores_alone(launch: LaunchSettings) -> Iterator[bool]:
    """Claim the run's CPUs while the block runs; yields whether nothing else used them at the start.

    Other runs of this user hold a lock (`core_lock`); other programs show in the CPUs' load. A run on GPUs claims
    nothing.
    """
    if use_gpu(launch):
        yield True
        return
    with claim_cores(cpus()) as first:
        yield first and not _others_work()


def _others_work() -> bool:
    """Whether other processes keep the CPUs busy at this moment."""
    import psutil

    shares = psutil.cpu_percent(_MEASURED_S, percpu=True)
    own = [shares[cpu] for cpu in cpus() if cpu < len(shares)]
    return bool(own) and sum(own) / len(own) > 100 * _BUSY


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return True  # unknown: torch decides
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


def worker_environment(
    launch: LaunchSettings, env: Mapping[str, str] = os.environ, *, alone: bool = True
) -> dict[str, str]:
    """``env`` with what the workers need. What the user set stays; only ``launch.threads`` replaces OMP_NUM_THREADS.

    Threads are bound to cores only for a single CPU process: two processes would be bound to the same cores (half the
    speed, measured on two), and beside a GPU binding gains nothing.

    Args:
        launch: processes, device, threads.
        env: what the user set.
        alone: nothing else works on these cores (`cores_alone`). Otherwise waiting threads soon sleep, and are bound
            only if they fill all cores: two runs bound to the same ones would leave others idle.
    """
    local = max(1, launch.num_processes // launch.num_machines)
    child = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(max(1, cores(env) // local)), **env}
    if launch.threads:
        child["OMP_NUM_THREADS"] = str(launch.threads)
    if use_gpu(launch, env):
        return child
    child["ACCELERATE_USE_CPU"] = "true"
    for name, value in _MALLOC.items():
        child.setdefault(name, value)
    if not alone and not any(name in child for name in _WAITING_BY_USER):
        child |= _WAITING
    fills = child["OMP_NUM_THREADS"] == str(physical_cores(cpus()))
    if local == 1 and (alone or fills) and not any(name in child for name in _BOUND_BY_USER):
        child |= _BINDING
        child[ALL_CPUS] = ",".join(map(str, cpus()))
    return child
