"""Read an accelerate configuration file (from `accelerate config`) as settings of the ``launch`` table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persistworld_cli.console import note
from persistworld_cli.errors import UsageError

_TAKEN = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU")
_INSTEAD = {
    "FSDP": "use MULTI_GPU, and pretrain.shard = true to shard a pretraining (docs/training.md, Memory)",
    "DEEPSPEED": "use MULTI_GPU, and pretrain.shard = true to shard a pretraining (docs/training.md, Memory)",
}


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """Processes, machines and device of the file, by their names in ``launch``.

    Mixed precision is ignored with a note, since each task has its own setting; FSDP and DeepSpeed are refused.

    Args:
        path: YAML or JSON; read by accelerate itself.

    Raises:
        UsageError: no such file, not accelerate's, or it requests what is not supported.
    """
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file  # takes seconds

    where = f"--accelerate-config {path}"
    try:
        config = load_config_from_file(str(path))
    except FileNotFoundError:
        raise UsageError("no such file", where=where, fix="create it with accelerate config") from None
    except Exception as error:  # YAML's and JSON's own, and ValueError, TypeError or AttributeError of accelerate
        fix = "create it again with accelerate config"
        raise UsageError(f"not an accelerate configuration: {error}", where=where, fix=fix) from None
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    if not isinstance(config, ClusterConfig) or kind not in _PLAIN:
        fix = _INSTEAD.get(kind, f"use one of {', '.join(_PLAIN)}")
        raise UsageError(f"distributed_type {kind} is not supported", where=where, fix=fix)
    if config.gpu_ids not in (None, "all"):
        fix = f"remove it and set CUDA_VISIBLE_DEVICES={config.gpu_ids}"
        raise UsageError(f"gpu_ids {config.gpu_ids} is not supported", where=where, fix=fix)
    if config.mixed_precision not in (None, "no"):
        note(f"{path} requests {config.mixed_precision}; the task's own setting decides (post_train.mixed_precision)")
    found = {name: getattr(config, name) for name in _TAKEN}
    taken = {name: value for name, value in found.items() if value is not None and value != -1}
    return taken | ({"device": "cpu"} if config.use_cpu else {})
