"""Every command in the README is one that the program takes, and the documents' settings have the values they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tomli
from typer.testing import CliRunner

from persistworld_cli.commands.app import app
from persistworld_cli.config.presets import load_settings, to_json

pytestmark = pytest.mark.usefixtures("counted_once")
README = Path(__file__).resolve().parents[2] / "README.md"
PAGES = [
    *sorted(README.parent.glob("*.md")),
    *sorted((README.parent / "docs").glob("*.md")),
    README.parent / "presets" / "tiny" / "README.md",
]


def commands() -> list[str]:
    """`persistworld ...` lines of code blocks and of table cells, without comments."""
    text = README.read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("persistworld ")]
    cells = [c for c in re.findall(r"`(persistworld [^`]+)`", text) if "COMMAND" not in c and "..." not in c]
    return sorted({c for c in lines + cells if c.split()[1].islower() and "mine.toml" not in c})


def test_readme_names_all_eight_subcommands() -> None:
    named = {command.split()[1] for command in commands()}
    assert named >= {"extract-latents", "build-meta", "pretrain", "post-train", "eval", "replay", "drive", "pi-rollout"}


@pytest.mark.parametrize("command", commands())
def test_readme_command_resolves(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 200


def test_reference_behaviour_tells_the_presets_values() -> None:
    text = (README.parent / "docs" / "reference-behaviour.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| `(\w+)\.(\w+)` \| `([^`]+)` \|", text, flags=re.MULTILINE)
    presets = {name: to_json(load_settings(name, env={})) for name in ("ctrl-world", "persistworld")}
    assert len(rows) > 20
    for table, key, value in rows:
        told = tomli.loads(f"value = {value}")["value"]
        assert presets["ctrl-world"][table][key] == told, f"{table}.{key}"
        if (table, key) != ("sampling", "guidance"):
            assert presets["persistworld"][table][key] == told, f"{table}.{key}"
