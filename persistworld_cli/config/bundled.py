"""Paths of the shipped files: presets and the bundled world."""

from __future__ import annotations

from pathlib import Path

from persistworld_cli.errors import PersistWorldError, UsageError

_PREFIX = "bundled:"


def bundled_root() -> Path:
    """The folder that holds ``presets/`` and ``dataset_example/``.

    A wheel has them inside the package (``_bundled``), an editable install in the repository.

    Raises:
        PersistWorldError: a broken installation.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "_bundled", package.parent):
        if (root / "presets").is_dir():
            return root
    raise PersistWorldError(
        "the bundled presets are missing from this installation",
        where=str(package / "_bundled"),
        fix="install again: pip install --force-reinstall --no-deps . in a clone of the repository",
    )


def resolve_path(value: str | Path) -> Path:
    """A path in settings -> a path on disk: ``bundled:NAME`` is in `bundled_root`, ``~`` is expanded.

    Raises:
        UsageError: ``bundled:NAME`` leaves the bundled folder.
        PersistWorldError: ``bundled:NAME`` is not shipped.
    """
    text = str(value)
    if not text.startswith(_PREFIX):
        return Path(text).expanduser()
    name = text.removeprefix(_PREFIX)
    root = bundled_root()
    path = root / name
    if not name or not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"'{text}' is outside the bundled folder", where=str(root), fix="write bundled:presets/...")
    if not path.exists():
        raise PersistWorldError(
            f"'{text}' is not shipped with this installation", where=str(path), fix="check the name, or give a path"
        )
    return path
