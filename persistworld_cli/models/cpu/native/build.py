"""The C++ kernels as a library, compiled once per machine, in seconds, by its g++.

Without g++, on other processors or with another OpenMP runtime than torch's, every caller uses torch instead.
``PERSISTWORLD_NATIVE=0`` in the environment switches the kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from persistworld_cli.files import CannotWrite, whole_file

SWITCH = "PERSISTWORLD_NATIVE"
# No -ffast-math, which would change how the whole process rounds small numbers; only explicit operations are fused
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
# By CPU capability, and no newer instructions, so that a library in a shared home runs on every node with it
VECTORS = {"AVX512": ("-mavx512f",), "AVX2": ("-mavx2", "-mfma")}
_log = logging.getLogger(__name__)
_wanted = True


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call; None if they cannot be compiled or are switched off."""
    if obstacle():
        return None
    compiler, sources = shutil.which("g++") or "", sorted(Path(__file__).parent.glob("*.cpp"))
    try:
        return ctypes.CDLL(str(_compiled(compiler, sources)))
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        _log.warning("fast CPU kernels are not used: %s could not compile them: %s", compiler, said)
    except (OSError, CannotWrite) as error:
        _log.warning("fast CPU kernels are not used: %s", error)
    return None


def obstacle() -> str:
    """Why the kernels are not compiled on this machine; "" if they are."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if platform.system() != "Linux":
        return "they need Linux"
    if (capability := torch.backends.cpu.get_cpu_capability()) not in VECTORS:
        return f"they need AVX2 or AVX-512, and torch uses {capability}"
    if shutil.which("g++") is None:
        return "no g++ (apt install g++)"
    loaded = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    # two OpenMP runtimes in one process would each keep a thread on every core
    if not any(n.startswith("libgomp") for n in loaded) or any(n.startswith(("libomp", "libiomp")) for n in loaded):
        return "they need libgomp as the only OpenMP runtime"
    return ""


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the kernels can be used."""
    return _wanted and library() is not None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Use torch's own operations inside the block, to measure or to compare."""
    global _wanted
    _wanted = False
    try:
        yield
    finally:
        _wanted = True


def _compiled(compiler: str, sources: list[Path]) -> Path:
    """The library's path; compiled beside it and renamed, so that processes that start together do not collide."""
    texts = [path.read_bytes() for path in (*sources, *sorted(Path(__file__).parent.glob("*.h")))]
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    flags = (*FLAGS, *VECTORS[torch.backends.cpu.get_cpu_capability()])
    name = hashlib.sha256(b"\0".join([version.encode(), " ".join(flags).encode(), *texts])).hexdigest()[:16]
    folder = _cache()
    target = folder / f"native-{name}.so"
    if not target.exists():
        with whole_file(target) as fresh:
            command = [compiler, *flags, "-o", str(fresh), *map(str, sources)]
            subprocess.run(command, capture_output=True, text=True, check=True)
    return target


def _cache() -> Path:
    """This user's folder for compiled kernels; a temporary one if it is not writable."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persistworld"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="persistworld-"))
