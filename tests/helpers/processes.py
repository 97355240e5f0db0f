"""Waiting for other processes without asking again and again."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path


def wait_for_end(pid: int) -> None:
    """Block until a process, anyone's child, has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([handle], [], [])
    os.close(handle)


def make_pipe(path: Path) -> Path:
    """A named pipe in the place of a file that another process will write: `read_pipe` blocks until it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def read_lines(path: Path, count: int) -> list[str]:
    """Block until so many lines were written to a named pipe, by however many processes."""
    with os.fdopen(os.open(path, os.O_RDWR)) as pipe:  # also writing: the end of one writer is not the end
        return [pipe.readline().rstrip() for _ in range(count)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
