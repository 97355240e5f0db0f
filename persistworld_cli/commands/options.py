"""Options that several subcommands share, and the decorator that gives them to a command.

A command is a function ``command(common, own options...)``; `with_common` puts the shared options into its signature,
so that each is written once, and turns errors a user can fix into one block on standard error and an exit code. An own
parameter whose type is a dataclass of options stands for all of its fields.
"""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from persistworld_cli.console import debug_wanted, listen_to_library, show_error, show_traceback
from persistworld_cli.errors import PersistWorldError, UsageError

SETTINGS_PANEL = "Settings and output"
LAUNCH_PANEL = "Processes and machines"

# Options of single commands that mean the same in each of them.
Ckpt = Annotated[
    str | None, typer.Option(help="Weights: a file, a folder, a hub id, or bundled:NAME.", metavar="PATH|HUB_ID")
]
Adapter = Annotated[
    str | None, typer.Option(help="Post-trained adapter (PEFT folder) on top of the weights.", metavar="PATH")
]
Dataset = Annotated[str | None, typer.Option(help="Processed dataset (what extract-latents wrote).", metavar="DIR")]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the network first (torch.compile): faster calls, after minutes of work on a CPU."
    ),
]
COMPILE = "launch.compile"  # its setting; `True or None`, so that a preset's stays where the flag is not given
StrictActions = Annotated[
    bool,
    typer.Option(
        "--strict-actions", help="Refuse a dataset whose poses do not look like those the weights were trained on."
    ),
]
STRICT = "model.strict_actions"  # its setting; `True or None`, as above
Seed = Annotated[int | None, typer.Option(help="Seed of everything that is drawn.")]
Accelerator = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: the cost on a100, h100, h200, ... or on so many dense bf16 TFLOP/s.  \\[h100]",
        metavar="NAME|TFLOPS",
        rich_help_panel=SETTINGS_PANEL,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Continue the run in the output folder, if it has one.")
]
ResumeFrom = Annotated[
    str | None,
    typer.Option(help="Go on from this state: a run's folder (its newest) or its state/step-N.", metavar="PATH"),
]
WithChanges = Annotated[
    bool,
    typer.Option(
        "--continue-with-changes", help="Go on with finished work although settings changed that change the result."
    ),
]
Tracker = Annotated[
    list[str] | None,
    typer.Option(help="Where numbers also go; may be repeated: tensorboard (default), wandb, trackio, none."),
]
TRACKER_FLAG = {"launch.trackers": "--tracker"}


def resuming(resume: bool, resume_from: str | None) -> dict[str, Any]:
    """What a training job is told of ``--resume`` and ``--resume-from``.

    Raises:
        UsageError: both, in contradiction.
    """
    if resume_from and not resume:
        raise UsageError("--no-resume and --resume-from contradict each other", where="flags", fix="give one of them")
    return {"resume": resume, "resume_from": str(Path(resume_from).absolute()) if resume_from else None}


def tracker_names(given: list[str] | None) -> tuple[str, ...] | None:
    """``--tracker a,b --tracker c`` as names; None where the flag was not given."""
    return tuple(part.strip() for text in given for part in text.split(",")) if given else None


def option(*names: str, help: str, panel: str = SETTINGS_PANEL, metavar: str | None = None) -> Any:
    """A typer.Option in one of the shared panels."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar)


@dataclass(kw_only=True)
class Common:
    """Values of the shared options; None where a flag was not given."""

    preset: Annotated[
        str | None, option("--preset", "-p", help="Preset: tiny, ctrl-world, persistworld, or the path of a TOML file.")
    ] = None
    sets: Annotated[
        list[str] | None,
        option("--set", "-s", help="Override one setting; may be repeated.", metavar="TABLE.KEY=VALUE"),
    ] = None
    output: Annotated[Path | None, option("--output", "-o", help="Folder of this run.  \\[outputs/COMMAND-PRESET]")] = (
        None
    )
    dry_run: Annotated[bool, option("--dry-run", help="Show the resolved settings and do nothing.")] = False
    as_json: Annotated[bool, option("--json", help="Print the result as JSON.")] = False
    profile: Annotated[
        bool,
        option(
            "--profile", help="Write where the time went, and a Chrome trace of the first seconds, into the output."
        ),
    ] = False
    debug: Annotated[bool, option("--debug", help="Show tracebacks of errors.")] = False
    num_processes: Annotated[
        int | None, option("--num-processes", help="Processes of all machines together.", panel=LAUNCH_PANEL)
    ] = None
    num_machines: Annotated[int | None, option("--num-machines", help="Machines.", panel=LAUNCH_PANEL)] = None
    machine_rank: Annotated[
        int | None, option("--machine-rank", help="Number of this machine, from 0.", panel=LAUNCH_PANEL)
    ] = None
    main_process_ip: Annotated[
        str | None, option("--main-process-ip", help="Address of machine 0.", panel=LAUNCH_PANEL)
    ] = None
    main_process_port: Annotated[
        int | None, option("--main-process-port", help="Port on machine 0; 0 takes a free one.", panel=LAUNCH_PANEL)
    ] = None
    accelerate_config: Annotated[
        Path | None,
        option(
            "--accelerate-config",
            help="Processes and machines from accelerate's file; flags go before it.",
            panel=LAUNCH_PANEL,
            metavar="FILE",
        ),
    ] = None
    threads: Annotated[int | None, option("--threads", help="CPU threads a process.", panel=LAUNCH_PANEL)] = None
    device: Annotated[str | None, option("--device", help="auto, cpu or cuda.", panel=LAUNCH_PANEL)] = None
    take_over: Annotated[
        bool,
        option(
            "--take-over",
            help="Take the output folder from a run on another host that ended without a word.",
            panel=LAUNCH_PANEL,
        ),
    ] = False

    def launch_flags(self) -> dict[str, Any]:
        """Settings of the ``launch`` table that were given as flags, or in accelerate's file."""
        from persistworld_cli.launch.accelerate_config import read_accelerate_config

        filed = read_accelerate_config(self.accelerate_config) if self.accelerate_config else {}
        given = {name: value for name in _SETTINGS if (value := getattr(self, name)) is not None}
        return {f"launch.{name}": value for name, value in (filed | given).items()}


_SETTINGS = (
    *("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"),
    *("threads", "device"),
)
_LAUNCH = (*_SETTINGS, "accelerate_config", "take_over")
_OFFERED: dict[str, tuple[str, ...]] = {"full": _LAUNCH, "single": ("threads", "device", "take_over"), "none": ()}


def with_common(
    launch: Literal["full", "single", "none"], without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the shared options.

    Args:
        launch: which of "Processes and machines" it takes: all (a job that can be spread), threads and device (a job of
            one process), or none (done in this process).
        without: shared options that it does not take, or has in a form of its own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(Common, include_extras=True)
        shown = [f for f in fields(Common) if f.name not in _LAUNCH or f.name in _OFFERED[launch]]
        offered = [f for f in shown if f.name not in without]
        own_hints = typing.get_type_hints(command, include_extras=True)
        groups: dict[str, Any] = {n: kind for n, kind in own_hints.items() if is_dataclass(kind) and n != "common"}
        own = [
            one
            for n, p in inspect.signature(command).parameters.items()
            if n != "common"
            for one in (_options_of(groups[n]) if n in groups else [p.replace(annotation=own_hints[n])])
        ]
        shared = [_parameter(f, hints) for f in offered]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            common = Common(**{f.name: values.pop(f.name) for f in offered})
            for name, kind in groups.items():
                values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
            call = functools.partial(command, common, **values)
            if launch == "none" and common.profile and not common.dry_run:
                call = functools.partial(_profiled, command.__module__, call)
            _guard(call, debug=common.debug)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def _parameter(field: Field[Any], hints: dict[str, Any]) -> inspect.Parameter:
    """An option's field as a parameter that typer reads."""
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
    )


def _options_of(kind: Any) -> list[inspect.Parameter]:
    """Every field of a dataclass of options."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return [_parameter(field, hints) for field in fields(kind)]


def _profiled(module: str, call: Callable[[], None]) -> None:
    """A command that is done in this process, with a profile of Python's functions beside its result."""
    from persistworld_cli.profiling import FOLDER, calls_counted

    name = module.rpartition(".")[2].replace("_", "-")
    with calls_counted(Path("outputs") / f"{FOLDER}-{name}"):
        call()


def _guard(call: Callable[[], None], *, debug: bool) -> None:
    """Run a command; a user's mistake becomes one block on standard error, and an exit code."""
    listen_to_library()
    if debug:
        os.environ["PERSISTWORLD_DEBUG"] = "1"  # the worker reads it too
    try:
        call()
    except PersistWorldError as error:
        if debug_wanted():
            show_traceback()
        show_error(error)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
