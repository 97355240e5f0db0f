"""A run's numbers in experiment trackers, through accelerate: TensorBoard, wandb, trackio.

They are copies: metrics.jsonl has every number. A resumed run continues the trackers' run and sends nothing twice.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator

from persistworld_cli.config.presets import flatten
from persistworld_cli.config.settings import Settings, Tracker
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import NO_ROOM, write_json, writing

PROJECT = "persistworld"
_IDENTITY = "tracker.json"


def wanted_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """The trackers to start, each once, in the given order; ``none`` is ignored.

    Raises:
        PersistWorldError: the package of one is not installed.
    """
    wanted = tuple(dict.fromkeys(name for name in names if name != "none"))
    for name in wanted:
        if find_spec(name) is None:
            others = [other for other in get_args(Tracker) if other != name]
            raise PersistWorldError(
                f"the tracker '{name}' needs the package '{name}', which is not installed",
                where="launch.trackers (--tracker)",
                fix=f"pip install {name}, or take another one: {', '.join(others)}",
            )
    return wanted


class Trackers:
    """The accelerator's trackers, started; on the main rank only.

    Args:
        accelerator: made with ``log_with``.
        output: the run's folder, which names the run.
        settings: recorded by trackers that take them.
        begun: updates done by the state that the run resumes from.
        sent: the last update that is already sent.

    Raises:
        PersistWorldError: one does not start (not logged in, no network).
    """

    def __init__(
        self, accelerator: Accelerator, output: Path, settings: Settings | None, *, begun: int, sent: int
    ) -> None:
        self._accelerator, self._sent, self._events = accelerator, sent, output / "tensorboard"
        _quiet_writer_threads()
        run = {**_identity(output), "resume": "allow"}
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": begun + 1},  # what a killed run wrote after its last state is written again
            "wandb": {**run, "dir": str(output)},
            "trackio": {"name": f"{run['name']}-{run['id']}", "resume": "allow"},  # a trackio run has no other id
        }
        try:
            accelerator.init_trackers(PROJECT, init_kwargs=options)
            for tracker in accelerator.trackers:
                if tracker.name != "tensorboard" and settings:  # TensorBoard would add a separate page each time
                    tracker.store_init_configuration(_plain(settings))
        except Exception as error:  # each tracker raises its own types
            fix = "log in to it, stay offline (WANDB_MODE=offline), or leave it out: --tracker tensorboard"
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                fix = "free some disk and run the same command again"
            raise PersistWorldError(
                f"a tracker does not start: {error}",
                where=f"launch.trackers = {', '.join(map(str, accelerator.log_with))}",
                fix=fix,
            ) from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of an update, to each tracker that has not received them. Raises CannotWrite for a full disk."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                with writing(self._events):
                    tracker.log(dict(values), step=step)
            elif step > self._sent:
                tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Send pending data. Raises CannotWrite for a full disk."""
        for tracker in self._accelerator.trackers:
            with writing(self._events) if tracker.name == "tensorboard" else nullcontext():
                tracker.finish()


def _quiet_writer_threads() -> None:
    """Suppress the traceback of TensorBoard's thread: it stores its error, and the next call raises it."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = hook


def forget_trackers(output: Path) -> None:
    """Make the next run in this folder a new one for the trackers."""
    (output / _IDENTITY).unlink(missing_ok=True)


def _identity(output: Path) -> dict[str, str]:
    """Name and id under which a resumed run continues."""
    path = output / _IDENTITY
    try:
        known: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return {"name": known["name"], "id": known["id"]}
    except (
        FileNotFoundError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
    ):  # absent or truncated
        new = {"name": output.absolute().name, "id": secrets.token_hex(4)}
        write_json(path, new)
        return new


def _plain(settings: Settings) -> dict[str, Any]:
    """Settings by their dotted names, as trackers take them."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in flatten(settings).items()}
