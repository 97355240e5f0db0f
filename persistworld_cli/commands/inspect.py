"""``persistworld inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import resolve, show_result
from persistworld_cli.commands.weights_plan import show_plan
from persistworld_cli.config.settings import Settings

EXAMPLES = (
    "persistworld inspect bundled:presets/tiny/base",
    "persistworld inspect outputs/post-train-tiny/weights/adapter",
    "persistworld inspect yjguo/Ctrl-World",
    "persistworld inspect yjguo/Ctrl-World:checkpoint-10000.pt",
)


@with_common(launch="none", without=("output",))
def command(
    common: Common,
    ckpt: Annotated[str, typer.Argument(help="File, folder or hub id.", metavar="CKPT")],
) -> None:
    """Tell what a checkpoint is: world model, VAE or adapter; its parts, types and SHA-256; the presets it fits.

    With --preset it is compared with that preset too, which may be a file of your own.
    """
    if common.dry_run:
        show_plan("inspect", {"ckpt": ckpt}, common)
        return
    settings = resolve(common).settings if common.preset or common.sets else None
    show_result(_inspect(ckpt, settings), as_json=common.as_json)


def _inspect(ckpt: str, compare: Settings | None) -> dict[str, Any]:
    """The work, in this process: it reads names and shapes, then every byte once for the hash."""
    from persistworld_cli.evaluation.weights import sha256_of
    from persistworld_cli.models.description import describe

    result = describe(ckpt, compare)
    rows, root = result["files"], Path(result["path"])
    for row in rows:
        path = Path(row["file"])
        row["file"] = str(path.relative_to(root)) if path != root else path.name
        row["sha256"] = sha256_of(str(path))
    result["sha256"] = rows[0]["sha256"] if len(rows) == 1 else None
    return result
