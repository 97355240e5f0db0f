"""Fixtures for all tests. Data beside the repository (`../shared`) is used where it is; nothing of it is copied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture
def golden() -> Path:
    """Reference numbers (`../shared/golden`)."""
    return _folder("golden")


@pytest.fixture
def shared_data() -> Path:
    """Real recordings (`../shared/data`)."""
    return _folder("data")


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in the environment of whoever runs the tests must not reach them."""
    for name in [name for name in os.environ if name.startswith("PERSISTWORLD_")]:
        monkeypatch.delenv(name)
