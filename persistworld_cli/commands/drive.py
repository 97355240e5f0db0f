"""``persistworld drive``: drive the arm in the world model with the keyboard."""

from __future__ import annotations

import os
import sys

from persistworld_cli.commands.options import (
    ADAPTER,
    CKPT,
    COMPILE,
    DATASET,
    STRICT,
    WORLD,
    Common,
    setting,
    with_common,
)
from persistworld_cli.commands.run import execute
from persistworld_cli.config.keys import TOKEN_VARIABLE
from persistworld_cli.config.requests import DriveRequest, option
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

EXAMPLES = {
    WORLD: (
        "persistworld drive --keys lllrrr",
        "persistworld drive --keys 'd*2 c u*2' --episode 78 --seed 1",
        "persistworld drive --live",
        "persistworld drive --web --open",
    ),
}


@with_common(
    "single",
    setting("drive.episode", "Episode to start in.  \\[the first held-out one]"),
    setting("drive.start", "Frame to start from."),
    setting("drive.seed", "Random seed."),
    CKPT,
    ADAPTER,
    DATASET,
    COMPILE,
    STRICT,
    cost=True,
)
def command(
    common: Common,
    request: DriveRequest,
    token: str | None = option(None, "With --web: secret that the page must present."),
) -> None:
    """Drive the arm with keys: each key is one step, and the world model predicts the camera images."""
    if token:
        if not request.web:
            raise UsageError("--token needs --web", where="--token", fix="add --web, or leave it out")
        os.environ[TOKEN_VARIABLE] = token  # the worker reads it; config.json can be read by others
    if request.live and not common.dry_run:
        _require_terminal()

    def check(settings: Settings) -> None:
        """Refuse an unknown key before anything starts."""
        from persistworld_cli.robot.keyboard import parse_keys

        if request.keys is not None:
            parse_keys(request.keys, settings.drive.keys)

    execute(common, request, check)


def _require_terminal() -> None:
    """Raise UsageError unless standard input and standard error are terminals."""
    for stream, name in ((sys.stdin, "standard input"), (sys.stderr, "standard error")):
        if not stream.isatty():
            raise UsageError(
                f"--live needs a terminal, but {name} is not a terminal",
                where="--live",
                fix="run it in a terminal, or drive with --keys lllrrr or --web",
            )
