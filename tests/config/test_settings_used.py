"""A setting that nothing reads is a lie in the preset: every field is named outside the settings and their checks."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import persistworld_cli
from persistworld_cli.config.settings import Settings

ROOT = Path(persistworld_cli.__file__).parent
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py") if path.parts[-2:-1] != ("config",))
KEYS = [(table.name, f.name) for table in fields(Settings) for f in fields(table.default_factory)]


@pytest.mark.parametrize(("table", "key"), KEYS)
def test_setting_is_read(table: str, key: str) -> None:
    assert re.search(rf"\.{key}\b", TEXT), f"{table}.{key}"
