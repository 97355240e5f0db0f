"""``persistworld drive``: drive the arm by keys in the world model."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from persistworld_cli.commands.options import (
    COMPILE,
    STRICT,
    Accelerator,
    Adapter,
    Ckpt,
    Common,
    Compile,
    Dataset,
    Seed,
    StrictActions,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import CKPT_FLAG
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld drive --keys lllrrr",
    "persistworld drive --keys 'f*2 d c u' --episode 899 --start 8 --seed 1",
    "persistworld drive --live",
    "persistworld drive --web --open",
)
_DEFAULT_KEYS = "lllrrr"
_HOST = "127.0.0.1"


@with_common(launch="single")
def command(
    common: Common,
    keys: Annotated[
        str | None,
        typer.Option(help="One key a step: l r (y), f b (x), u d (z), o c (gripper); l*3 is lll.  \\[lllrrr]"),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Drive in this terminal: one key, one step.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Drive on a page that is served from here.")] = False,
    host: Annotated[
        str | None, typer.Option(help="With --web: address to listen on; beyond loopback a token is needed.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="With --web: port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = None,
    token: Annotated[str | None, typer.Option(help="With --web: what the page must bring.")] = None,
    browse: Annotated[bool, typer.Option("--open", help="With --web: open the page in a browser.")] = False,
    episode: Annotated[
        str | None, typer.Option(help="Episode whose frame is the start; the first held-out one.")
    ] = None,
    start: Annotated[int | None, typer.Option(help="Frame to start from.")] = None,
    seed: Seed = None,
    ckpt: Ckpt = None,
    adapter: Adapter = None,
    dataset: Dataset = None,
    compiled: Compile = False,
    strict_actions: StrictActions = False,
    accelerator: Accelerator = None,
) -> None:
    """Drive by keys: each key is one interaction step of 0.8 s; the world model shows what the cameras would see."""
    from persistworld_cli.robot.keyboard import parse_keys

    job: dict[str, Any]
    given = [name for name, value in (("--keys", keys), ("--live", live), ("--web", web)) if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different ways to drive", fix="give one of them")
    alone = [n for n, v in (("--host", host), ("--port", port), ("--token", token), ("--open", browse)) if v]
    if alone and not web:
        raise UsageError(f"{alone[0]} belongs to --web", where=alone[0], fix="add --web, or leave it out")
    if web:
        job = {"web": {"host": host or _HOST, "port": port or 0, "open": browse}}
        if token:
            from persistworld_cli.config.keys import TOKEN_VARIABLE

            os.environ[TOKEN_VARIABLE] = token  # the worker reads it; config.json can be read by others
    elif live:
        job = {"live": True}
        _require_terminal(common)
    else:
        job = {"keys": _DEFAULT_KEYS if keys is None else keys}

    def check(settings: Settings) -> None:
        """A key that means nothing is refused before anything starts."""
        if "keys" in job:
            parse_keys(job["keys"], settings.drive.keys)

    execute(
        "drive",
        common,
        flags={
            COMPILE: compiled or None,
            STRICT: strict_actions or None,
            "model.inference": ckpt,
            "model.adapter": adapter,
            "world.dataset": dataset,
            "drive.episode": episode,
            "drive.start": start,
            "drive.seed": seed,
        },
        names=CKPT_FLAG,
        job=job,
        accelerator=accelerator,
        check=check,
        terminal=live,
    )


def _require_terminal(common: Common) -> None:
    """Raises UsageError where nobody could press a key or see the screen."""
    if common.dry_run:
        return
    for stream, name in ((sys.stdin, "standard input"), (sys.stderr, "standard error")):
        if not stream.isatty():
            raise UsageError(
                f"--live needs a terminal, and {name} is none",
                where="--live",
                fix="run it in a terminal, or drive with --keys lllrrr or --web",
            )
