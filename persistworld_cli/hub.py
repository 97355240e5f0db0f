"""Repositories on the hub: their lists of files and the files; from the cache if the hub does not answer soon.

The hub's own client does the work, so HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured. But it repeats a
failed request for over a minute, and a name server or a firewall may never answer. So each process lists a repository
once, by a single request with a timeout. A file of the listed commit that is in the cache needs no other request.
"""

from __future__ import annotations

import functools
import logging
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from persistworld_cli.errors import PersistWorldError

CACHED_TIMEOUT_S, TIMEOUT_S = 3.0, 10.0  # for the list: if the cache has the repository, and if it has not

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_unreachable: list[str] = []  # why this process got no answer from the hub
_Value = TypeVar("_Value")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository's files.

    Attributes:
        name: ``owner/name``.
        names: its files; if the hub did not answer, those in the cache.
        snapshot: the folder of its commit in the cache.
        answered: whether the hub answered.
    """

    name: str
    names: frozenset[str]
    snapshot: Path
    answered: bool

    def fetch(self, name: str) -> Path:
        """One of its files, downloaded unless it is in the cache. Raises PersistWorldError."""
        path = self.snapshot / name
        if path.is_file():
            return path
        if not self.answered:
            raise PersistWorldError(
                f"'{name}' of '{self.name}' is incomplete in the hub's cache, and the hub does not answer",
                where=str(path),
                fix=f"with internet: {command(self.name, name)}",
            )
        try:
            return Path(hf_hub_download(self.name, name))
        except Exception as error:  # the client's own errors, its HTTP library's, OSError
            raise _error(self.name, error) from error


def is_hub_id(text: str) -> bool:
    """Whether a text has the form ``owner/name``."""
    return bool(_HUB_ID.fullmatch(text))


def command(repo: str, *names: str) -> str:
    """The command that fetches a repository, or some of its files, into the cache."""
    return " ".join(("hf download", repo, *names))


@functools.cache
def open_repository(repo: str) -> Repository:
    """A repository's files.

    Raises:
        PersistWorldError: the hub cannot give it, and the cache has none of it, or several commits.
    """
    home = _home(repo)
    try:
        info = _request(repo, CACHED_TIMEOUT_S if (home / "snapshots").is_dir() else TIMEOUT_S)
    except Exception as error:  # as in `Repository.fetch`
        snapshot = snapshot_in(home)
        if snapshot is None:
            raise _error(repo, error) from error
        if not constants.HF_HUB_OFFLINE:
            what = "%s: no answer from the hub (%s); its cached files of commit %s are used"
            logger.info(what, repo, _first_line(error), snapshot.name[:12])
        return Repository(repo, files_in(snapshot), snapshot, answered=False)
    names = frozenset(file.rfilename for file in info.siblings or ())
    return Repository(repo, names, home / "snapshots" / str(info.sha), answered=True)


def cached_snapshot(repo: str) -> Path | None:
    """The cache's folder for a repository, without a request; None if there is none."""
    return snapshot_in(_home(repo))


def snapshot_in(home: Path) -> Path | None:
    """The snapshot in a cached repository's folder (``models--owner--name``): that of ``refs/main``, or the only one.

    Raises:
        PersistWorldError: several, and ``refs/main`` is none of them.
    """
    snapshots = {path.name: path for path in sorted((home / "snapshots").glob("*")) if path.is_dir()}
    ref = home / "refs" / "main"
    main = ref.read_text().strip() if ref.is_file() else ""
    if main not in snapshots and len(snapshots) > 1:
        raise PersistWorldError(
            f"{len(snapshots)} commits in the hub's cache, and refs/main names none of them",
            where=str(home),
            fix=f"name one: {next(iter(snapshots.values()))}",
        )
    return snapshots.get(main) or next(iter(snapshots.values()), None)


def files_in(folder: Path) -> frozenset[str]:
    """Names of all files of a folder; a link to an absent one counts."""
    return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def unfinished_in(folder: Path) -> str:
    """What an interrupted download left in a folder (of the cache, or of a download), for messages; "" for nothing."""
    for place in ("blobs", ".cache/huggingface/download"):
        for path in sorted((folder / place).rglob("*.incomplete")):
            return f"; a download was interrupted: {path.relative_to(folder)}, {path.stat().st_size:,} bytes"
    return ""


def within(seconds: float, call: Callable[[], _Value]) -> _Value:
    """The value of a call that may hang; its thread is left behind.

    Raises:
        TimeoutError: too late. Exception: what the call raises.
    """
    answers: queue.SimpleQueue[tuple[_Value | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _home(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _request(repo: str, seconds: float) -> Any:
    """The hub's description of a repository; after one request without an answer, none is sent."""
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    if _unreachable:
        raise OSError(_unreachable[0])
    try:
        return within(seconds, lambda: HfApi().model_info(repo, timeout=seconds))
    except HfHubHTTPError:  # an answer
        raise
    except Exception as error:  # as in `Repository.fetch`
        _unreachable.append(_first_line(error))
        raise


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _error(repo: str, error: Exception) -> PersistWorldError:
    """The client's error in one line, and what to do about it."""
    home = _home(repo)
    fix = (
        f"check the id; where there is internet: {command(repo)}, then copy the folder {home.name} into {home.parent}, "
        "or set HF_HOME"
    )
    if isinstance(error, RepositoryNotFoundError):  # also for a gated or private one
        fix = (
            "check the id; for a gated or private one accept its terms on its page, and log in: hf auth login (or set "
            "HF_TOKEN)"
        )
    return PersistWorldError(
        f"'{repo}' is not on disk, and cannot be fetched from the hub: {_first_line(error)}{unfinished_in(home)}",
        where=f"hub {constants.ENDPOINT}, cache {home.parent}",
        fix=fix,
    )
