"""Requests: one class for each command, checked when it is made, the same after a way through JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from persistworld_cli import worker
from persistworld_cli.config import requests
from persistworld_cli.config.requests import (
    DriveRequest,
    EvalRequest,
    FrontierRequest,
    PostTrainRequest,
    Request,
    SelfcheckRequest,
    TaskRequest,
    option_of,
    request_from_json,
    request_to_json,
)
from persistworld_cli.errors import UsageError


def kinds() -> list[type[Request]]:
    """Every class with a task."""
    found = [kind for kind in vars(requests).values() if isinstance(kind, type) and issubclass(kind, Request)]
    return [kind for kind in found if hasattr(kind, "task")]


def test_every_request_is_documented_and_every_task_has_one() -> None:
    assert {kind for kind in kinds() if issubclass(kind, TaskRequest)} == set(worker.TASKS)
    for kind in kinds():
        options = {field.name: option_of(field, field.name) for field in fields(kind)}
        hidden = [name for name, own in options.items() if own is None]
        flags = [own.flag for own in options.values() if own]
        assert len(set(flags)) == len(flags) and all(own.help for own in options.values() if own)
        documented = f"{kind.__doc__}{TaskRequest.__doc__}"
        assert all(name in documented for name in hidden), (kind, hidden)


@pytest.mark.parametrize("kind", sorted(worker.TASKS, key=lambda kind: kind.task))
def test_json_gives_the_same_request_back(kind: type[TaskRequest], tmp_path: Path) -> None:
    first = kind(output=tmp_path / "run", command=("persistworld", kind.task))
    assert request_from_json(kind, json.loads(json.dumps(request_to_json(first))), "here") == first


def test_values_become_their_types() -> None:
    made = request_from_json(FrontierRequest, {"calls": [1, 2], "percent": 2, "write_preset": "fast.toml"}, "here")
    assert isinstance(made, FrontierRequest)
    assert made.calls == (1, 2) and made.percent == 2.0 and made.write_preset == Path.cwd() / "fast.toml"
    assert EvalRequest(study=Path("~/study")).study == Path.home() / "study"


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        (FrontierRequest, {"calls": [1, 0]}, "calls[1] = 0 must be at least 1"),
        (FrontierRequest, {"percent": "much"}, "percent = 'much' has the wrong type: expected a number"),
        (EvalRequest, {"basline": "x"}, "unknown field 'basline' of the eval request"),
        (SelfcheckRequest, {"fail_how": "crsh"}, "fail_how = 'crsh' is not one of mistake, crash, lost-gpu, kill"),
        (
            PostTrainRequest,
            {"resume": False, "resume_from": "x"},
            "--no-resume and --resume-from contradict each other",
        ),
        (DriveRequest, {"keys": "l", "web": True}, "--keys and --web are different ways to drive"),
        (DriveRequest, {"port": 1}, "--port needs --web"),
        (DriveRequest, {"web": True, "port": 99999}, "port = 99999 must be at least 0 and at most 65535"),
    ],
)
def test_what_cannot_work_is_refused(kind: type[TaskRequest], data: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        request_from_json(kind, data, "here")
    assert words in refused.value.what


def test_a_drive_without_a_way_takes_the_default_keys() -> None:
    assert DriveRequest().keys == "lllrrr" and DriveRequest(live=True).keys is None
