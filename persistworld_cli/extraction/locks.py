"""Locks, so that several runs on the same output do not repeat each other's work.

A run locks one byte per episode in one file (POSIX record locks). The system releases a lock when its process ends,
however it ends, so nothing is left to clean up. Locks also work between machines on an NFS mount whose server runs a
lock service (v4 always does). If locks are refused, one warning is logged and nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from persistworld_cli.files import writing

_NAME = ".claims"
_SETTINGS = 2**62  # byte that guards the shared settings; episodes are numbered from 0
_REFUSED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_log = logging.getLogger(__name__)


class EpisodeLocks:
    """The locks of one run on an output folder.

    Only one object per process and folder may be open: closing any of them would release the locks of all.
    """

    def __init__(self, out: Path) -> None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(out / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
        self._works = True

    def close(self) -> None:
        """Unlock everything."""
        os.close(self._fd)

    def acquire(self, episode: int) -> bool:
        """Lock an episode; False while another run has it."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, episode)

    def release(self, episode: int) -> None:
        """Unlock an episode."""
        self._lock(fcntl.LOCK_UN, episode)

    def share_settings(self) -> None:
        """Wait until no run changes the shared settings, and keep other runs from changing them until `close`."""
        self._lock(fcntl.LOCK_SH, _SETTINGS)

    def own_settings(self) -> bool:
        """Become the only run on this folder, which may change the shared settings; False if there are others."""
        return self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, _SETTINGS)

    def _lock(self, how: int, byte: int) -> bool:
        if not self._works:
            return True
        try:
            fcntl.lockf(self._fd, how, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _REFUSED:
                raise
            self._works = False
            _log.warning(
                "this file system has no locks (%s): do not let two runs write to the same output", error.strerror
            )
        return True
