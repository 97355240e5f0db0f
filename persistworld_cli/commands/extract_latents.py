"""``persistworld extract-latents``: raw LeRobot recordings -> latents, videos and annotations."""

from __future__ import annotations

from typing import Annotated

import typer

from persistworld_cli.commands.options import Common, WithChanges, with_common
from persistworld_cli.commands.run import command_line, execute
from persistworld_cli.launch.environment import cores

EXAMPLES = (
    "persistworld extract-latents",
    "persistworld extract-latents data/droid_1.0.1 data/droid_latents --preset ctrl-world --vae yjguo/Ctrl-World",
    "persistworld extract-latents data/droid_1.0.1 data/droid_latents --episodes 0:100,199 --num-processes 8",
)


@with_common(launch="full")
def command(
    common: Common,
    raw: Annotated[
        str | None, typer.Argument(help="Raw LeRobot dataset (v2.1 or v3.0).  \\[world.raw]", metavar="RAW")
    ] = None,
    out: Annotated[
        str | None, typer.Argument(help="Processed dataset to write.  \\[world.dataset]", metavar="OUT")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="Weights whose VAE encodes; the model's by default.", metavar="PATH|HUB_ID")
    ] = None,
    episodes: Annotated[str | None, typer.Option(help="Episodes to take, as 0:100,199; all by default.")] = None,
    split_rule: Annotated[
        str | None,
        typer.Option(help="id-ends-99 (DROID), info-splits or every-N.  \\[world.val_rule]", metavar="RULE"),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="native (float16, memory-mapped) or ctrl-world (float32 .pt files).")
    ] = "native",
    batch: Annotated[int, typer.Option(help="Images encoded at once.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="The VAE computes in fp32, bf16 or fp16.")] = "fp32",
    workers: Annotated[
        int | None,
        typer.Option(help="Decoding processes a process; cores / processes by default, 0: none of its own.", min=0),
    ] = None,
    with_changes: WithChanges = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail at the first episode that cannot be read.")] = False,
) -> None:
    """Encode recordings: raw LeRobot episodes become latents, small videos and annotations.

    Episodes that are there already are left alone, so a run that was stopped continues, and several runs may share one
    OUT. An episode that cannot be read is skipped, named with its reason at the end and in OUT/extract_report.json,
    and the exit code is 1.
    """
    execute(
        "extract",
        common,
        flags={"world.raw": raw, "world.dataset": out, "world.val_rule": split_rule},
        names={"world.raw": "RAW", "world.dataset": "OUT", "world.val_rule": "--split-rule"},
        job={
            "vae": vae,
            "episodes": episodes,
            "layout": layout,
            "batch": batch,
            "dtype": dtype,
            "workers": workers,
            "cores": cores(),
            "strict": strict,
            "with_changes": with_changes,
            "command": command_line(),
        },
        folder="extract-latents",
    )
