"""Which run has this machine's cores to itself: an advisory lock, held for as long as its workers run.

One file for each user in the temporary folder, with one byte for each CPU. Runs on different CPUs (two SLURM jobs of
one node, `taskset`) do not meet. The kernel releases the lock with the process, however that ends.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def lock_path() -> Path:
    """The user's lock file on this machine."""
    return Path(tempfile.gettempdir()) / f"persistworld-{os.getuid()}.cores"


@contextmanager
def claim_cores(cpus: Sequence[int], path: Path | None = None) -> Iterator[bool]:
    """Claim CPUs for a block: True where no other run of this user has claimed any of them.

    A run that comes second claims nothing, and does not wait. False too where no lock can be taken (no such file
    system, a foreign file): whether the cores are free is then not known.

    Args:
        cpus: logical CPUs.
        path: the lock file; default `lock_path`.
    """
    try:
        file = os.open(path or lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield False
        return
    try:
        yield _lock_all(file, cpus)
    finally:
        os.close(file)  # gives the locks back


def _lock_all(file: int, cpus: Sequence[int]) -> bool:
    """Lock a byte for each CPU; all of them or none."""
    try:
        for cpu in cpus:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, cpu)
    except OSError:
        fcntl.lockf(file, fcntl.LOCK_UN)
        return False
    return True
