"""One run per folder: the launcher's lock on the folder, and the run's private files.

``run.lock`` (``run-node1.lock``, ... on machines other than the first) names the run that uses the folder. The launcher
and its child hold it by ``flock``, so that it lasts until the workers of a killed launcher have ended too. Without file
locks, and between machines, the file's content decides: the folder is free if the launcher was on this host and no
longer runs; after a launcher on another host it needs ``--take-over``.

Config, result and failure pass between launcher and workers through ``.run-node0-<id>/``; the launcher then copies them
to the folder, for people.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from persistworld_cli.config.fields import coerce, field_types
from persistworld_cli.config.settings import LaunchSettings
from persistworld_cli.console import note
from persistworld_cli.errors import PersistWorldError, UsageError

SHARED_TASKS = ("extract-latents",)  # runs may share the folder: episodes are claimed one by one (extraction.locks)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_SECONDS_TO_END = 120.0  # for workers whose launcher was killed: they save their state first
_SECONDS_TO_NAME = 5.0  # between taking the lock and writing who holds it
_POLL_S = 0.2


@dataclass(frozen=True)
class Holder:
    """The run that holds a folder, as its lock file names it.

    Attributes:
        run: id of the run.
        task, command: what it does, and how it was typed.
        host, pid: of the launcher.
        born: when that process started, seconds since the epoch: process ids are reused.
        since: when the run began, local time.
        machines: of the run.
        rendezvous: address and port at which its machines meet; "" for one machine.
        restarts: how often this launcher has restarted its workers (`launch.restarting`).
    """

    run: str
    task: str
    command: str
    host: str
    pid: int
    born: float
    since: str
    machines: int
    rendezvous: str
    restarts: int = 0

    def words(self) -> str:
        """For messages."""
        return f"{self.command or self.task} (process {self.pid} on {self.host}, since {self.since})"

    @property
    def here(self) -> bool:
        """Whether it is on this host."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether the launcher still runs; only for one on this host."""
        born = _born(self.pid)
        return born is not None and abs(born - self.born) < 2.0

    def is_of(self, other: Holder) -> bool:
        """Whether both are launchers of one run of several machines."""
        own, its = ((h.task, h.machines, h.rendezvous) for h in (self, other))
        return self.machines > 1 and own == its


@dataclass(frozen=True)
class RunFolder:
    """A run's hold on its output folder.

    Attributes:
        run: its id.
        output: the folder.
        private: files of this machine's launcher and workers; removed at the end.
        fd: the lock, for the child to hold too.
        first: whether this is machine 0, which writes the files that stay.
    """

    run: str
    output: Path
    private: Path
    fd: int
    first: bool

    def count_restarts(self, count: int) -> None:
        """Write how often this machine's workers were restarted into its lock, for the run's other launchers."""
        if (own := _parse(self.fd)) is not None:
            _write(self.fd, replace(own, restarts=count))

    def other_machines(self) -> dict[str, int]:
        """The restarts of the run's other launchers, by their ids."""
        own = _parse(self.fd)
        found = [holder for path in self.output.glob("run*.lock") if (holder := _read(path))] if own else []
        return {holder.run: holder.restarts for holder in found if own and holder.run != self.run and holder.is_of(own)}


@contextmanager
def own_folder(
    output: Path, task: str, launch: LaunchSettings, *, take_over: bool = False, command: Sequence[str] = ()
) -> Iterator[RunFolder]:
    """Lock a run's folder while the block runs.

    Args:
        output: the folder; must exist.
        task: the run's; those of `SHARED_TASKS` exclude all others, but not each other.
        launch: machines of the run, and which of them this is.
        take_over: take the folder over from a run on another host that was killed.
        command: as it was typed, for messages of other runs.

    Raises:
        PersistWorldError: another run uses the folder, left its lock there from another host, or took the folder over
            in the meantime.
        OSError: the folder cannot be written.
    """
    rank = launch.machine_rank
    own = _describe(task, launch, command)
    path = output / (f"run-node{rank}.lock" if rank else "run.lock")
    shared = task in SHARED_TASKS
    if rank:
        _require_same_run(output / "run.lock", own, take_over=take_over)
    fd, locked = _take(path, own, shared=shared, take_over=take_over)
    private = output / f".run-node{rank}-{own.run}"
    try:
        if not shared:  # of runs that were killed
            for left in output.glob(f".run-node{rank}-*"):
                shutil.rmtree(left, ignore_errors=True)
        private.mkdir()
        yield RunFolder(own.run, output, private, fd, first=not rank)
        if not shared and (now := _read(path)) is not None and now.run != own.run:
            raise PersistWorldError(
                f"the folder was taken over meanwhile: {now.words()}",
                where=str(output),
                fix="its files may come from both runs: start again with another --output",
            )
    finally:
        shutil.rmtree(private, ignore_errors=True)
        _release(fd, path, own, shared=shared, locked=locked)


def _describe(task: str, launch: LaunchSettings, command: Sequence[str]) -> Holder:
    """This process as the holder of a new run."""
    several = launch.num_machines > 1
    return Holder(
        run=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        task=task,
        command=" ".join(command),
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_born(os.getpid()) or 0.0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        machines=launch.num_machines,
        rendezvous=f"{launch.main_process_ip}:{launch.main_process_port}" if several else "",
    )


def _born(pid: int) -> float | None:
    """When a process of this host started; None if it does not exist or is a zombie."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def _require_same_run(path: Path, own: Holder, *, take_over: bool) -> None:
    """On machines other than the first: refuse at once if the folder belongs to another run.

    Machine 0 may not have started yet, or a killed run left its lock: then machine 0 decides.
    """
    holder = _read(path)
    if holder is None or holder.is_of(own) or (not holder.alive if holder.here else take_over):
        return
    raise _taken(path, holder)


def _take(path: Path, own: Holder, *, shared: bool, take_over: bool) -> tuple[int, bool]:
    """Open and lock the file, and write who holds it; returns the descriptor, and whether the file system has locks.

    If its holder ends between opening and locking, the file vanishes, and a new one is opened. A holder that has not
    written who it is yet is given a few seconds, since the refusal names it.
    """
    end: float | None = None
    unnamed = time.monotonic() + _SECONDS_TO_NAME
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            granted = _flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            if granted is not False and _same_file(fd, path):
                before = _parse(fd)
                if before is not None and not (shared and before.task in SHARED_TASKS):
                    _require_free(path, before, locked=granted is True, take_over=take_over)
                _write(fd, own)
                return fd, granted is True
            before = _parse(fd)
            if granted is False and before is None and time.monotonic() < unnamed:
                time.sleep(_POLL_S)
            elif granted is False and _same_file(fd, path):
                end = _wait_or_refuse(path, before, end)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _wait_or_refuse(path: Path, holder: Holder | None, end: float | None) -> float:
    """Refuse if a running launcher holds the lock; wait if only the workers of a killed launcher hold it."""
    if holder is None or not holder.here or holder.alive:
        raise _taken(path, holder)
    if end is None:
        note(f"waiting for the workers of a run whose launcher was killed: {holder.words()}")
        end = time.monotonic() + _SECONDS_TO_END
    elif time.monotonic() > end:
        raise PersistWorldError(
            f"the workers of a run whose launcher was killed still work in the folder: {holder.words()}",
            where=str(path),
            fix="end them (their command lines name persistworld_cli.worker and the folder), or use another --output",
        )
    time.sleep(_POLL_S)
    return end


def _require_free(path: Path, before: Holder, *, locked: bool, take_over: bool) -> None:
    """Check a lock file that nobody holds: its run was killed, or runs on another host, where locks do not reach."""
    if before.here:
        if not locked and before.alive:
            raise _taken(path, before)
        note(f"a run was killed here; its lock is freed: {before.words()}")
    elif take_over:
        note(f"taken over from another host: {before.words()}")
    else:
        raise PersistWorldError(
            f"the folder belongs to a run on another host that left its lock: {before.words()}",
            where=str(path),
            fix="if it has ended there, run the same command with --take-over; else use another --output",
        )


def _taken(path: Path, holder: Holder | None) -> PersistWorldError:
    """The error for a folder that another run uses."""
    if holder is None:
        return PersistWorldError(
            "another run is starting in this folder", where=str(path), fix="wait for it, or use another --output"
        )
    gone = "" if holder.here else f"; if {holder.host} is gone for good, remove {path}"
    return PersistWorldError(
        f"another run works in this folder: {holder.words()}",
        where=str(path),
        fix=f"wait for it, or use another --output{gone}",
    )


def _release(fd: int, path: Path, own: Holder, *, shared: bool, locked: bool) -> None:
    """Release the lock, and remove the file unless another run shares it or has taken it over."""
    try:
        now = _parse(fd)
        mine = _same_file(fd, path) and (shared or (now is not None and now.run == own.run))
        if mine and (not shared or (locked and _flock(fd, fcntl.LOCK_EX))):
            if shared:
                for left in path.parent.glob(".run-node*-*"):
                    shutil.rmtree(left, ignore_errors=True)
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)


def _flock(fd: int, how: int) -> bool | None:
    """Try to lock; None if the file system has no locks."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _same_file(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write(fd: int, holder: Holder) -> None:
    """Write the file in place: the lock is on this file, not on one that replaces it. A reader never finds it empty."""
    text = json.dumps(asdict(holder), indent=1).encode()
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))
    os.fsync(fd)


def _read(path: Path) -> Holder | None:
    """The holder that a lock file names; None if there is no file."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _parse(fd)
    finally:
        os.close(fd)


def _parse(fd: int) -> Holder | None:
    """The holder that an open lock file names; None if it is empty, or incomplete since its writer was killed."""
    try:
        data = {"restarts": 0} | json.loads(os.pread(fd, 1 << 16, 0).decode())
        own = field_types(Holder).items()
        return Holder(**{name: coerce(data[name], kind, key=name, where="") for name, kind in own})
    except (ValueError, TypeError, KeyError, RecursionError, UsageError):
        return None
