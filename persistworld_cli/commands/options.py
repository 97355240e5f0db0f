"""How a command gets its options: the shared ones, flags that set a setting, and the fields of its request.

A command is a function ``command(common, request, own options...)``. `with_common` makes typer's signature of it and
turns errors that a user can fix into one block on standard error and an exit code.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import typing
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from persistworld_cli.command_line import command_line, to_continue
from persistworld_cli.config.fields import bare_type, choices, field_types, parse_text
from persistworld_cli.config.presets import preset_names
from persistworld_cli.config.requests import INTERRUPTED, Option, Request, option, option_of
from persistworld_cli.config.settings import setting_types
from persistworld_cli.console import debug_wanted, listen_to_library, note, show_error, show_traceback
from persistworld_cli.errors import PersistWorldError, UsageError

# What an example of a help needs: headings of a module's EXAMPLES, as "" for nothing.
WORLD = "After persistworld extract-latents and persistworld build-meta"
TRAINED = "After persistworld extract-latents, build-meta and post-train"
DROID = "With DROID's latents in droid_latents, weights from the hub, and GPUs (README.md)"
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
_SETTINGS, _LAUNCHING = "Settings and output", "Processes and machines"  # headings of the help


def _named(place: str) -> Callable[[], Iterable[str]]:
    """The names that ``module:name`` holds or returns; imported only when a shell completes a value."""

    def names() -> Iterable[str]:
        module, _, name = place.partition(":")
        found = getattr(importlib.import_module(f"persistworld_cli.{module}"), name)
        return found() if callable(found) else found

    return names


# Option -> the names to complete, where the annotation does not list them.
_COMPLETED: dict[str, Callable[[], Iterable[str]]] = {
    "preset": preset_names,
    "accelerator": _named("cost.accelerators:ACCELERATORS"),
    "eval.benchmark": lambda: [*_named("evaluation.benchmarks:benchmark_names")(), "none"],
    "policy.task": _named("policies.tasks:task_names"),
    "policy": lambda: [*_named("policies.embedded:POLICIES")(), "server"],
    "judge": _named("policies.judge:JUDGES"),
    "part": lambda: ("world", "vae"),
    "real": lambda: ("sim",),
    "eval.split": lambda: ("train", "val"),
    "world.val_rule": lambda: ("id-ends-99", "info-splits", "every-"),
}


def _completer(name: str, hint: Any, *, commas: bool) -> Callable[[str], list[str]]:
    """What a shell offers for an option's value; nothing lets it offer files."""

    def complete(incomplete: str) -> list[str]:
        if name == "sets":
            return _complete_setting(incomplete)
        before, comma, last = incomplete.rpartition(",") if commas else ("", "", incomplete)
        known = _COMPLETED[name]() if name in _COMPLETED else choices(hint)
        return [before + comma + one for one in known if one.startswith(last)]

    return complete


def _complete_setting(incomplete: str) -> list[str]:
    """``table.key=`` of the settings that begin so; of a whole key, ``table.key=value`` of each choice."""
    key, _, value = incomplete.partition("=")
    types = setting_types()
    if key in types:
        known = _COMPLETED[key]() if key in _COMPLETED else choices(types[key])
        return [f"{key}={one}" for one in known if one.startswith(value)] or [f"{key}={value}"]
    return [f"{name}=" for name in types if name.startswith(key)]


@dataclass(frozen=True)
class Slot:
    """An option: name (for a setting, its dotted key), type and default (None: the default comes from elsewhere)."""

    name: str
    own: Option
    hint: Any
    default: Any = None

    @property
    def parameter(self) -> str:
        """The name of its parameter."""
        return self.name.replace(".", "_")

    def for_typer(self) -> inspect.Parameter:
        """The parameter that typer reads."""
        own, hint, default = self.own, bare_type(self.hint), self.default
        how: dict[str, Any] = {"help": own.help, "metavar": own.metavar, "rich_help_panel": own.panel}
        element = bare_type(typing.get_args(hint)[0]) if typing.get_origin(hint) is tuple else hint
        how["metavar"] = own.metavar or _METAVARS.get(element)
        how["autocompletion"] = _completer(self.name, self.hint, commas=own.commas)
        if typing.get_origin(hint) is tuple:
            hint = list[str] if own.commas else list[element]  # type: ignore[valid-type]
            default = list(map(str, default)) if default and default is not MISSING else default
        if default is MISSING:
            default = inspect.Parameter.empty
        elif hint is bool:
            default = bool(default)
        elif not default and default != 0:
            hint, default = hint | None, None
        if own.flag.startswith("-"):
            made = typer.Option(*own.flag.split(), **how)
        else:
            made = typer.Argument(**{**how, "metavar": own.metavar or own.flag})
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.parameter, kind, default=default, annotation=Annotated[hint, made])

    def read(self, values: dict[str, Any]) -> Any:
        """Pop its value from what typer read; None if it was not given. Raises UsageError."""
        value = values.pop(self.parameter)
        if not isinstance(value, list):
            return value
        if value and self.own.commas:
            value = list(dict.fromkeys(part for text in value for part in parse_text(text, self.hint)))
            if not value:
                flag = self.own.flag
                raise UsageError("nothing is named", where=flag, fix=f"write {flag} A,B, or leave it out")
        return tuple(value) or None


def setting(key: str, help: str, flag: str = "", **how: Any) -> Slot:
    """An option that sets a setting; by default it is named after the last part of the key."""
    flag = flag or "--" + key.rpartition(".")[2].replace("_", "-")
    return Slot(key, Option(help=help, flag=flag, **how), setting_types()[key])


CKPT = setting(
    "model.inference",
    "Weights, or a LoRA adapter: a file, a folder, a hub id, or bundled:NAME.",
    "--ckpt",
    metavar="PATH|HUB_ID",
)
ADAPTER = setting("model.adapter", "LoRA adapter (PEFT folder of a post-training) on the weights.", metavar="PATH")
DATASET = setting("world.dataset", "Processed dataset (what extract-latents wrote).", metavar="DIR")
COMPILE = setting(
    "launch.compile", "Compile the network first (torch.compile): faster calls, but compiling takes minutes on a CPU."
)
STRICT = setting(
    "model.strict_actions", "Refuse a dataset whose poses do not look like those the weights were trained on."
)
TRACKER = setting(
    "launch.trackers",
    "Experiment trackers: tensorboard (default), wandb, trackio, none; may be repeated.",
    "--tracker",
    commas=True,
)
# Options of the commands that run a benchmark: settings that the benchmark fixes and the user may override.
ROLLOUTS = (
    CKPT,
    ADAPTER,
    setting(
        "eval.benchmark",
        "Benchmark: bundled, droid, a TOML file, or none.  \\[the preset's]",
        metavar="NAME|PATH",
    ),
    DATASET,
    setting("eval.episodes", "Episode ids, as 99,199; all of the split by default.", commas=True),
    setting("eval.starts", "Start frame; may be repeated.", "--start"),
    setting("eval.steps", "Interaction steps of a rollout."),
    setting("eval.seeds", "Random seed; may be repeated.", "--seed"),
    setting("eval.split", "train or val."),
    setting("eval.batch", "Rollouts per batch."),
    COMPILE,
    STRICT,
)
_THREADS = setting("launch.threads", "CPU threads per process.", panel=_LAUNCHING)
_DEVICE = setting("launch.device", "auto, cpu or cuda.", panel=_LAUNCHING)
_LAUNCH: dict[str, tuple[Slot, ...]] = {
    "full": (
        setting("launch.num_processes", "Number of processes on all machines together.", panel=_LAUNCHING),
        setting("launch.num_machines", "Number of machines.", panel=_LAUNCHING),
        setting("launch.machine_rank", "Rank of this machine, from 0.", panel=_LAUNCHING),
        setting("launch.main_process_ip", "Address of machine 0.", panel=_LAUNCHING),
        setting("launch.main_process_port", "Port on machine 0; 0 takes a free one.", panel=_LAUNCHING),
        setting("launch.restarts", "How often workers that died are restarted from the last state.", panel=_LAUNCHING),
        _THREADS,
        _DEVICE,
    ),
    "single": (_THREADS, _DEVICE),
    "none": (),
}


@dataclass(frozen=True, kw_only=True)
class Common:
    """Values of the shared options. `flags` and `names`: values (None: not given) and spellings, by setting."""

    preset: str | None = option(
        None,
        f"Preset: {', '.join(preset_names())}, or the path of a TOML file.",
        flag="--preset -p",
        metavar="NAME|FILE",
        panel=_SETTINGS,
    )
    sets: tuple[str, ...] = option(
        (), "Override one setting; may be repeated.", flag="--set -s", metavar="TABLE.KEY=VALUE", panel=_SETTINGS
    )
    output: Path | None = option(
        None, "Folder of this run.  \\[outputs/COMMAND-PRESET]", flag="--output -o", panel=_SETTINGS
    )
    dry_run: bool = option(False, "Show the request and the settings, and do nothing.", panel=_SETTINGS)
    accelerator: str | None = option(
        None,
        "With --dry-run: report the cost on a100, h100, h200, ... or for a number of dense bf16 TFLOP/s.  \\[h100]",
        metavar="NAME|TFLOPS",
        panel=_SETTINGS,
    )
    as_json: bool = option(False, "Print the result as JSON.", flag="--json", panel=_SETTINGS)
    profile: bool = option(
        False,
        "Write where the time went, and a Chrome trace of the first seconds, to the output folder.",
        panel=_SETTINGS,
    )
    debug: bool = option(False, "Show tracebacks of errors.", panel=_SETTINGS)
    accelerate_config: Path | None = option(
        None,
        "Processes and machines from a file that accelerate config wrote; flags take precedence.",
        metavar="FILE",
        panel=_LAUNCHING,
    )
    take_over: bool = option(False, "Take over the output folder of a killed run on another host.", panel=_LAUNCHING)
    flags: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def all_flags(self) -> dict[str, Any]:
        """The flags, which take precedence over accelerate's file."""
        from persistworld_cli.launch.accelerate_config import read_accelerate_config

        filed = read_accelerate_config(self.accelerate_config) if self.accelerate_config else {}
        given = {key: value for key, value in self.flags.items() if value is not None}
        return {f"launch.{name}": value for name, value in filed.items()} | given


# Shared options that only some commands have -> the launch modes of these commands.
_ONLY: dict[str, tuple[str, ...]] = {"accelerate_config": ("full",), "take_over": ("full", "single")}


def with_common(
    launch: Literal["full", "single", "none"], *flags: Slot, cost: bool = False, without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the shared options, flags for settings, and the fields of its request.

    Args:
        launch: which options of "Processes and machines" it has: all (distributed work), threads and device (work in
            one worker process), or none (work in this process).
        flags: the settings that it has options for; their values are in ``common.flags``.
        cost: a dry run shows the cost, on an ``--accelerator``.
        without: shared options that it does not have, or defines itself.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command)
        kind: type[Request] | None = hints.pop("request", None)
        requested = _fields_of(kind) if kind else []
        inherited = [slot for slot in requested if slot.name not in vars(kind)["__annotations__"]]
        own = [
            Slot(name, how, hints[name], p.default.default)
            for name, p in inspect.signature(command).parameters.items()
            if isinstance(p.default, Field) and (how := option_of(p.default, name))
        ]
        settings = [*flags, *_LAUNCH[launch]]
        left_out = {name for name, only in _ONLY.items() if launch not in only} | (
            {"accelerator"} if not cost else set()
        )
        shared = [slot for slot in _fields_of(Common) if slot.name not in {*without, *left_out}]
        first = [slot for slot in requested if slot not in inherited]
        parameters = [slot.for_typer() for slot in (*own, *first, *flags, *inherited, *_LAUNCH[launch], *shared)]

        def call(values: dict[str, Any]) -> None:
            common = Common(**_given(shared, values))
            for slot in settings:
                value = slot.read(values)
                common.flags[slot.name] = None if value is False else value  # an absent switch changes nothing
                common.names[slot.name] = slot.own.flag
            if kind:
                values["request"] = kind(**_given(requested, values))
            values |= {slot.name: slot.read(values) for slot in own}
            name = command.__module__.rpartition(".")[2].replace("_", "-")
            with _profile(name) if launch == "none" and common.profile and not common.dry_run else nullcontext():
                command(common, **values)

        @functools.wraps(command)
        def run(**values: Any) -> None:
            _guard(functools.partial(call, values), debug=values["debug"])

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def _fields_of(kind: type[Any]) -> list[Slot]:
    """The fields of a dataclass that are options."""
    hints = field_types(kind)
    return [Slot(f.name, own, hints[f.name], f.default) for f in fields(kind) if (own := option_of(f, f.name))]


def _given(slots: list[Slot], values: dict[str, Any]) -> dict[str, Any]:
    """Pop the values that were given."""
    found = {slot.name: slot.read(values) for slot in slots}
    return {name: value for name, value in found.items() if value is not None}


def _profile(name: str) -> AbstractContextManager[Any]:
    """A profile of Python's functions, for a command that runs in this process."""
    from persistworld_cli.profiling import FOLDER, calls_counted

    return calls_counted(Path("outputs") / f"{FOLDER}-{name}")


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
        note(f"stopped; to start again:\n    {to_continue(command_line())}")
        raise typer.Exit(INTERRUPTED) from None
