"""``persistworld export``: write weights (with an adapter merged in) or an adapter for other programs."""

from __future__ import annotations

import signal

from persistworld_cli.commands.options import TRAINED, Common, with_common
from persistworld_cli.commands.run import resolve_if_named, show_plan, show_result
from persistworld_cli.config.requests import ExportRequest
from persistworld_cli.console import note

EXAMPLES = {
    "": (
        "persistworld export bundled:presets/tiny/base --adapter bundled:presets/tiny/adapter --to ctrl-world -o a.pt",
    ),
    TRAINED: ("persistworld export outputs/post-train-tiny/weights/adapter --to peft --output adapter",),
    "With internet, which downloads the weights": (
        "persistworld export yjguo/Ctrl-World --to safetensors --dtype bfloat16 --output ctrl-world.safetensors",
    ),
}


@with_common("none", without=("output",))
def command(common: Common, request: ExportRequest) -> None:
    """Write weights, with an adapter merged in, as one file under Ctrl-World's names; or an adapter as a PEFT folder.

    The architecture comes from --preset, or else from the bundled preset that the weights fit.
    """
    resolved = resolve_if_named(common)
    if common.dry_run:
        show_plan(common, request, resolved, output=str(request.output))
        return
    note(f"export: reading {request.ckpt}")
    from persistworld_cli.checkpoints.export import export

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # partial output is then removed, as after Ctrl-C
    show_result(export(request, resolved.settings if resolved else None), as_json=common.as_json)
