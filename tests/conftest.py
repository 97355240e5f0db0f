"""Fixtures for all tests. Data too large to ship is used where it lies beside the repository (`../shared`).

Tests that take the `golden` fixture are marked `golden`; `pytest -m golden --golden-table` runs those alone and prints
the largest error of every comparison.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium
from golden_files import GoldenFiles

from persistworld_cli.config.settings import Settings
from persistworld_cli.launch.environment import cores

os.environ.pop("COLUMNS", None)  # tables are as wide as where nobody watches, whoever runs the tests
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes test: a thread each, or they wait for each other's
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-table", action="store_true", help="print the largest error of every golden check")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden: compares with the reference's own numbers")


# Folders that take longest, so that they start first: one that starts last is waited for alone.
LONGEST = ("training", "evaluation", "commands", "launch", "checkpoints", "cost", "extraction", "frontier", "interact")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: two on any machine, since half of the tests wait for processes; more take memory."""
    return min(4, max(2, cores()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--golden-table"):
        from golden_table import lines  # imports torch, which asks for its threads then

        terminalreporter.section("golden checks")
        for line in lines():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def golden() -> GoldenFiles:
    """Reference numbers: `tests/golden`, and `../shared/golden` for what is too large to ship."""
    return GoldenFiles(SHARED / "golden")


@pytest.fixture
def shared_data() -> Path:
    """Real recordings (`../shared/data`)."""
    path = SHARED / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture(scope="session")
def new_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Page]]:
    """Opens a tab of a headless browser; skips where there is none."""
    with chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings in the environment of whoever runs the tests must not reach them."""
    for name in [name for name in os.environ if name.startswith("PERSISTWORLD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def base() -> dict[str, Any]:
    """The bundled model's tensors, float32; not to be written to."""
    from checkpoint_files import bundled_model

    return bundled_model().state_dict()


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's folder in the run of a post-training of the bundled model; not to be written to."""
    from checkpoint_files import write_run

    return write_run(tmp_path_factory.mktemp("post-train"))


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small recorded world with an untrained model of it, to train on for a few updates; not to be written to."""
    import eval_world

    root = tmp_path_factory.mktemp("small-world")
    eval_world.build(root)
    return eval_world.settings(root)


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs of one model share one count, with the default batch: what they cost is tested in tests/cost."""
    from persistworld_cli.commands import run
    from persistworld_cli.cost import report

    def counted(task: str, settings: Settings) -> Any:
        plain = Settings()
        settings = replace(
            settings,
            world=replace(settings.world, dataset="", raw=""),
            model=replace(settings.model, **dict.fromkeys(("ckpt", "adapter", "inference", "tokenizer", "stat"), "")),
            **{table: getattr(plain, table) for table in ("launch", "eval", "pretrain", "post_train")},
        )
        key = repr(
            (task if task in ("post-train", "pretrain") else "", settings.world, settings.model, settings.sampling)
        )
        if key not in _COUNTED:
            _COUNTED[key] = count(task, settings)
        return _COUNTED[key]

    count = report.cost_report
    monkeypatch.setattr(run, "cost_report", counted)


_COUNTED: dict[str, Any] = {}
