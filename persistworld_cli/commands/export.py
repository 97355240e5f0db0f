"""``persistworld export``: weights for elsewhere, an adapter merged into them or by itself."""

from __future__ import annotations

import signal
from typing import Any

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import resolve_if_named, show_plan, show_result
from persistworld_cli.config.requests import ExportRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import adapter_name, adapter_on_disk

EXAMPLES = (
    "persistworld export bundled:presets/tiny/base --adapter bundled:presets/tiny/adapter --to ctrl-world -o all.pt",
    "persistworld export yjguo/Ctrl-World --to safetensors --dtype bfloat16 --output ctrl-world.safetensors",
    "persistworld export outputs/post-train-tiny/weights/adapter --to peft --output adapter",
)


@with_common("none", without=("output",))
def command(common: Common, request: ExportRequest) -> None:
    """Write weights as one file under Ctrl-World's names, an adapter merged into them, or an adapter as PEFT folder.

    The architecture is that of the bundled preset which the weights fit, or of --preset.
    """
    resolved = resolve_if_named(common)
    if common.dry_run:
        show_plan(common, request, resolved, output=str(request.output))
    else:
        show_result(_export(request, resolved.settings if resolved else None), as_json=common.as_json)


def _export(request: ExportRequest, settings: Settings | None) -> dict[str, Any]:
    """The work, in this process. A signal that ends it removes what is half written, as Ctrl-C does."""
    import torch

    from persistworld_cli.checkpoints.export import check_output, export_adapter, export_model
    from persistworld_cli.checkpoints.references import sha256_of

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_output(request.to, request.output, force=request.force)
    how: dict[str, Any] = {
        "adapter": request.adapter,
        "output": request.output,
        "dtype": getattr(torch, request.dtype),
        "force": request.force,
        "settings": settings,
    }
    if request.to == "peft":
        result = export_adapter(request.ckpt, **how)
    else:
        merged = sha256_of(adapter_name(request.adapter) or adapter_on_disk(request.ckpt))
        result = export_model(request.ckpt, to=request.to, adapter_sha256=merged, **how)
    return {**result, "sha256": sha256_of(str(request.output))}
