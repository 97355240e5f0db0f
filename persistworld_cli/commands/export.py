"""``persistworld export``: weights for elsewhere, an adapter merged into them or by itself."""

from __future__ import annotations

import signal

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import resolve_if_named, show_plan, show_result
from persistworld_cli.config.requests import ExportRequest

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
        return
    from persistworld_cli.checkpoints.export import export

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # then what is half written is removed, as after Ctrl-C
    show_result(export(request, resolved.settings if resolved else None), as_json=common.as_json)
