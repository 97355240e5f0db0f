"""The rules of this folder: as the package is, helpers apart, no test imports a test, reference numbers untouched."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from golden_files import SHIPPED

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "persistworld_cli"
OTHERS = {"benchmarks", "files", "golden", "helpers", "recorder", "traces"}  # files: single modules


def test_folders_are_those_of_the_package() -> None:
    folders = {path.parent.name for path in TESTS.glob("*/*.py")}
    assert folders - OTHERS <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert not [path for path in (TESTS / "helpers").iterdir() if path.name.startswith("test_")]


def test_no_test_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [m for m in modules if m.split(".")[-1].startswith("test_") or m.startswith("tests.")], path


def test_reference_numbers_are_those_of_the_list_and_small() -> None:
    listed = dict(line.split()[::-1] for line in (SHIPPED / "MANIFEST.sha256").read_text().splitlines())
    files = {path.name: path.read_bytes() for path in SHIPPED.iterdir() if path.suffix not in (".md", ".sha256")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == listed
    assert max(map(len, files.values())) <= 200_000 and sum(map(len, files.values())) <= 650_000
