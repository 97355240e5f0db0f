"""An advisory lock on this machine's cores, which a run holds while its workers run.

One file per user in the temporary folder, with one byte per CPU: runs on different CPUs (two SLURM jobs of one node,
`taskset`) do not conflict. The kernel releases the lock with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def lock_path() -> Path:
    """The user's lock file on this machine."""
    return Path(tempfile.gettempdir()) / f"persistworld-{os.getuid()}.cores"


@contextmanager
def claim_cores(cpus: Sequence[int], path: Path | None = None) -> Iterator[bool]:
    """Claim CPUs while the block runs; False if another run of this user has one of them: nothing is claimed then.

    Also False if the lock cannot be used (unsuitable file system, another user's file): it is then unknown whether the
    cores are free.

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
        claimed = True
        try:
            for cpu in cpus:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, cpu)
        except OSError:
            fcntl.lockf(file, fcntl.LOCK_UN)
            claimed = False
        yield claimed
    finally:
        os.close(file)  # releases the locks
