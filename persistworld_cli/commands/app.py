"""The ``persistworld`` command: its subcommands, one line each."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from persistworld_cli import __version__
from persistworld_cli.commands import (
    build_meta,
    drive,
    env,
    eval,
    export,
    extract_latents,
    frontier,
    inspect,
    leaderboard,
    pi_rollout,
    policy_server,
    post_train,
    pretrain,
    replay,
    study_report,
    verify,
)
from persistworld_cli.console import write_out


def _without_types(parameters: list[Any]) -> list[Any]:
    """Show nothing beside a switch and an argument, typer's own ones too; typer would show <bool> and <str>."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
    return parameters


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


app = typer.Typer(
    name="persistworld",
    cls=_Group,
    help="Robot world models: from recordings to a video world model, post-trained and evaluated on its own rollouts.",
    epilog="Start with: make demo (or persistworld COMMAND --help). Without --preset, the bundled world is used.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order in which they are used. A module has the function `command`, and its EXAMPLES for the help: what they
# need -> commands.
_MODULES: tuple[ModuleType, ...] = (
    *(extract_latents, build_meta, pretrain, post_train, eval, study_report, verify, frontier, replay, drive),
    *(pi_rollout, policy_server, leaderboard, inspect, export, env),
)
COMMANDS = {module.__name__.rpartition(".")[2].replace("_", "-"): module for module in _MODULES}
for _name, _module in COMMANDS.items():
    _examples = [part for needs, own in _module.EXAMPLES.items() for part in (f"{needs or 'Examples'}:", *own)]
    app.command(_name, cls=_Command, epilog="\n\n".join(_examples))(_module.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        write_out(f"persistworld {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Robot world models: from recordings to a video world model, post-trained and evaluated on its own rollouts."""


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if sys.platform == "win32":  # file locks and signals of POSIX
        sys.exit("error: Windows is not supported\n  to do: use WSL 2, which is Linux (docs/install.md)")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
