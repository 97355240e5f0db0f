"""A field's annotation declares its type, bounds and choices, for settings and for any other frozen dataclass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import pytest

from persistworld_cli.config.fields import Bounds, Count, Known, Share, check_fields, coerce, expected, field_types
from persistworld_cli.config.settings import Referee, Reward, Sampler, Settings, setting_types
from persistworld_cli.errors import UsageError
from persistworld_cli.metrics.referees import REFEREES
from persistworld_cli.metrics.registry import REWARDS
from persistworld_cli.models.samplers import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class Options:
    count: Count | None = None
    kinds: tuple[Literal["left", "right"], ...] = ()
    shares: dict[Annotated[str, Known("colour", ("red",))], Share] = None  # type: ignore[assignment]
    near: Annotated[float, Bounds(gt=0, lt=1, fix="write 0.5")] = 0.5
    size: tuple[Count, Count] = (1, 1)


def refused(**values: Any) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check_fields(Options(**({"shares": {}} | values)), "job.", lambda key: f"place of {key}")
    return caught.value


def test_fields_within_their_bounds_pass() -> None:
    check_fields(Options(shares={"red": 1.0, "own:Colour": 0.0}, kinds=("left",), count=3), "", str)
    check_fields(Options(shares={}, count=10**400), "", str)  # beyond every float


def test_what_an_annotation_excludes_is_refused_with_key_place_and_fix() -> None:
    error = refused(count=0)
    assert (error.what, error.where) == ("job.count = 0 must be at least 1", "place of job.count")
    error = refused(kinds=("left", "rigt"))
    assert error.what == "job.kinds[1] = 'rigt' is not one of left, right" and error.fix == "did you mean 'right'?"
    assert refused(shares={"red": 1.5}).what == "job.shares.red = 1.5 must be at least 0 and at most 1"
    error = refused(shares={"rde": 1.0})
    assert error.what == "unknown colour 'rde'" and error.fix == "did you mean 'red'? (or module:Class for your own)"
    assert refused(shares={"red:": 1.0}).what == "unknown colour 'red:'"
    error = refused(near=1.0)
    assert (error.what, error.fix) == ("job.near = 1.0 must be more than 0 and less than 1", "write 0.5")
    assert refused(size=(1, 0)).what == "job.size[1] = 0 must be at least 1"


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [("count", None, None), ("count", 2, 2), ("near", 1, 1.0), ("kinds", ["x"], ("x",)), ("size", [1, 2], (1, 2))],
)
def test_values_become_the_annotated_type(name: str, value: Any, result: Any) -> None:
    made = coerce(value, field_types(Options)[name], key=name, where="here")
    assert made == result and type(made) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("near", None, "a number"),
        ("count", "2", "a whole number"),
        ("kinds", [1], "a string"),
        ("size", [1], "a list of 2 whole numbers"),
        ("shares", 1, "a table of numbers"),
    ],
)
def test_another_type_is_refused(name: str, value: Any, kind: str) -> None:
    with pytest.raises(UsageError, match=f"wrong type: expected {kind}"):
        coerce(value, field_types(Options)[name], key=name, where="here")


def test_every_setting_has_a_type_that_messages_can_name_and_a_default_within_its_bounds() -> None:
    for key, hint in setting_types().items():
        assert expected(hint).startswith(("a ", "true or false")), key
    for table in field_types(Settings):
        check_fields(getattr(Settings(), table), f"{table}.", str)


@pytest.mark.parametrize(("names", "registry"), [(Reward, REWARDS), (Referee, REFEREES), (Sampler, SAMPLERS)])
def test_names_in_settings_are_those_of_the_registry(names: Any, registry: Collection[str]) -> None:
    assert set(get_args(names)[1].names) == set(registry)
