"""``persistworld env``: what a bug report needs to say about this machine and installation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from persistworld_cli import __version__
from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import show_tables, write_json
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.console import note
from persistworld_cli.cost.report import BYTES, amount

EXAMPLES = {"": ("persistworld env", "persistworld env --json")}

# Variables that change how a run works, by prefix
_SHOWN = (
    *("PERSISTWORLD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "XDG_CACHE_HOME", "TMPDIR"),
    *("CUDA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "HF_", "TRANSFORMERS_", "ACCELERATE_", "MUJOCO_GL"),
    *("SLURM_CPUS_", "SLURM_GPUS", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_NODEID", "WANDB_MODE"),
    *("PYTHONPATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "CONDA_PREFIX", "VIRTUAL_ENV", "COLUMNS", "NO_COLOR"),
)
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH")
_LOGIN = re.compile(r"//[^/@\s]+@")  # user and password in an address


@with_common("none", without=("output", "preset", "sets", "dry_run", "profile"))
def command(common: Common) -> None:
    """Describe this installation for a bug report: versions, devices, kernels, paths, disk, environment variables.

    Values of variables that may be secrets are left out. Nothing is sent anywhere.
    """
    note("env: looking at versions, devices and folders")
    variables = _variables()  # torch sets some when it is imported
    torch = _torch()
    packages = {name: version for name, version in _packages().items() if name not in torch}
    result = {"system": _system(), "torch": torch, "packages": packages, "paths": _paths(), "variables": variables}
    if common.as_json:
        write_json(result)
        return
    from persistworld_cli.reports.tables import new_table

    tables = []
    for title, rows in result.items():
        table = new_table(title, ["name", "value"])
        table.show_header = False
        for name, value in rows.items():
            label = name if title == "variables" else name.removesuffix("_bytes").replace("_", " ")
            table.add_row(label, "\n".join(_lines(name, value)) or "-")
        tables.append(table)
    show_tables(tables)


def _system() -> dict[str, Any]:
    """The program, Python and the machine."""
    import psutil

    from persistworld_cli.launch.environment import cores, cpus

    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists() and (found := re.search(r"model name\s*: (.*)", info.read_text())):
        model = found[1]
    return {
        "persistworld": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": model,
        "cpus": len(cpus()),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _torch() -> dict[str, Any]:
    """Devices and kernels; a torch that does not import is the error to report."""
    try:
        import torch

        from persistworld_cli.compat import ensure_torchvision

        ensure_torchvision()
        import torchvision

        from persistworld_cli.models.cpu.hook import kernels

        if torch.version.cuda is None:
            cuda = "not in this build of torch"
        elif torch.cuda.is_available():
            cuda = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        else:
            cuda = f"{torch.version.cuda}, and no usable NVIDIA device or driver"
        shown = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": cuda,
            "devices": [
                {"name": one.name, "memory_bytes": one.total_memory, "capability": f"{one.major}.{one.minor}"}
                for one in shown
            ],
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_kernels": kernels(),
        }
    except Exception as error:  # of any kind: a library that does not load, a device that does not answer
        return {"error": f"{type(error).__name__}: {error}"}


def _packages() -> dict[str, str]:
    """Versions of what this package requires, and of its extras that are installed."""
    try:
        wanted = metadata.requires("persistworld") or []
    except metadata.PackageNotFoundError:
        return {"persistworld": "not installed: it runs from its source"}
    found = {}
    for requirement in wanted:
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if "extra ==" not in requirement:
                found[name] = "missing"
    return found


def _paths() -> dict[str, dict[str, Any]]:
    """Folders that a run reads or writes, with the free space of their disks."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    folders = {
        "package": Path(__file__).parents[1],
        "bundled_files": bundled_root(),
        "working_directory": Path.cwd(),
        "hub_cache": Path(os.environ.get("HF_HUB_CACHE") or home / "hub"),
        "temporary_files": Path(tempfile.gettempdir()),
    }
    return {name: {"path": str(folder), "free_bytes": _free(folder)} for name, folder in folders.items()}


def _free(folder: Path) -> int:
    """Free bytes of a folder's disk, whether or not the folder exists."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _variables() -> dict[str, str]:
    """Environment variables that change how a run works, without secrets."""
    return {
        name: "(set)" if _SECRET.search(name) else _LOGIN.sub("//***@", value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_SHOWN)
    }


def _lines(name: str, value: Any) -> list[str]:
    """A value as lines of text."""
    if isinstance(value, list):
        return [line for one in value for line in _lines("", one)]
    if isinstance(value, dict):
        return [", ".join(line for key, one in value.items() for line in _lines(key, one))]
    if name.endswith("_bytes"):
        return [amount(value, BYTES) + (" free" if name == "free_bytes" else "")]
    return [str(value)]
