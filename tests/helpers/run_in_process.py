"""A task in this process, in place of the launcher's `run_task`."""

from __future__ import annotations

import importlib
from typing import Any

from persistworld_cli import worker
from persistworld_cli.config.requests import TaskRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.files import jsonable


def run_in_process(settings: Settings, request: TaskRequest, **_: Any) -> tuple[int, dict[str, Any]]:
    """What the worker of another process would do."""
    module, name = worker.TASKS[type(request)].split(":")
    request.output.mkdir(parents=True, exist_ok=True)
    return 0, jsonable(getattr(importlib.import_module(module), name)(settings, request))
