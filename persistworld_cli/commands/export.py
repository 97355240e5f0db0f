"""``persistworld export``: weights for elsewhere, an adapter merged into them or by itself."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from persistworld_cli.commands.options import Adapter, Common, with_common
from persistworld_cli.commands.run import resolve, show_result
from persistworld_cli.commands.weights_plan import show_plan
from persistworld_cli.config.settings import Settings
from persistworld_cli.config.weight_names import adapter_name, adapter_on_disk
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld export bundled:presets/tiny/base --adapter bundled:presets/tiny/adapter --to ctrl-world -o all.pt",
    "persistworld export yjguo/Ctrl-World --to safetensors --dtype bfloat16 --output ctrl-world.safetensors",
    "persistworld export outputs/post-train-tiny/weights/adapter --to peft --output adapter",
)
_FORMATS = ("ctrl-world", "peft", "safetensors")
_DTYPES = ("bfloat16", "float16", "float32")


@with_common(launch="none", without=("output",))
def command(
    common: Common,
    ckpt: Annotated[str, typer.Argument(help="Weights, or with --to peft an adapter: file, folder or hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; with --to peft, folder.", metavar="FILE")
    ],
    to: Annotated[
        str,
        typer.Option(help="ctrl-world (.pt that Ctrl-World loads), safetensors (one file), or peft (adapter folder)."),
    ],
    adapter: Adapter = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: float32, bfloat16 or float16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write weights as one file under Ctrl-World's names, an adapter merged into them, or an adapter as PEFT folder.

    The architecture is that of the bundled preset which the weights fit, or of --preset.
    """
    if to not in _FORMATS:
        raise UsageError(f"unknown format '{to}'", where="--to", fix=f"known: {', '.join(_FORMATS)}")
    if dtype not in _DTYPES:
        raise UsageError(f"unknown type '{dtype}'", where="--dtype", fix=f"known: {', '.join(_DTYPES)}")
    if common.dry_run:
        job = {"ckpt": ckpt, "adapter": adapter, "to": to, "dtype": dtype, "force": force, "output": str(output)}
        show_plan("export", job, common)
        return
    settings = resolve(common).settings if common.preset or common.sets else None
    show_result(_export(ckpt, adapter or "", to, output, dtype, force, settings), as_json=common.as_json)


def _export(
    ckpt: str, adapter: str, to: str, output: Path, dtype: str, force: bool, settings: Settings | None
) -> dict[str, Any]:
    """The work, in this process. A signal that ends it removes what is half written, as Ctrl-C does."""
    import torch

    from persistworld_cli.checkpoints.export import check_output, export_adapter, export_model
    from persistworld_cli.checkpoints.references import sha256_of

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_output(to, output, force=force)
    kind = getattr(torch, dtype)
    if to == "peft":
        result = export_adapter(ckpt, adapter=adapter, output=output, dtype=kind, force=force, settings=settings)
    else:
        note = sha256_of(adapter_name(adapter) or adapter_on_disk(ckpt))
        result = export_model(
            ckpt,
            adapter=adapter,
            to=to,
            output=output,
            dtype=kind,
            force=force,
            settings=settings,
            adapter_sha256=note,
        )
    return {**result, "sha256": sha256_of(str(output))}
