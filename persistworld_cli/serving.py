"""What the servers of this package have in common: who can reach them, and what a malformed request gets.

`drive --web` and `policy-server` listen for websockets. A request that cannot be read is answered with 400, never with
a traceback in the server's terminal: anyone who reaches the port can send one.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from websockets.exceptions import InvalidHeader, InvalidMessage
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from persistworld_cli.errors import PersistWorldError

_log = logging.getLogger("persistworld_cli.websockets")
_log.setLevel(logging.WARNING)  # every connection that opens or closes is told at INFO


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def same_secret(sent: str, own: str) -> bool:
    """Whether two secrets are equal, compared in constant time; any text may have been sent."""
    return hmac.compare_digest(sent.encode(errors="replace"), own.encode(errors="replace"))


def listen(
    handle: Callable[[ServerConnection], None],
    host: str,
    port: int,
    *,
    answer: Callable[[ServerConnection, Request], Response | None],
    where: str,
    fix: str,
    **options: Any,
) -> Server:
    """A websocket server that holds its port; `serve_forever` is the caller's.

    Args:
        handle: called in a thread of its own for every websocket.
        host, port: to listen on; port 0 takes a free one.
        answer: what a request gets before it becomes a websocket; None lets it become one.
        where, fix: of the error when the address cannot be had.
        options: further ones of `websockets.sync.server.serve`.

    Raises:
        PersistWorldError: the address cannot be had.
    """

    def checked(connection: ServerConnection, request: Request) -> Response | None:
        try:
            return answer(connection, request)
        except (LookupError, ValueError, InvalidHeader, InvalidMessage):  # a header twice, a path that is no URL
            return connection.respond(HTTPStatus.BAD_REQUEST, "this request cannot be read\n")

    try:
        return serve(handle, host, port, process_request=checked, compression=None, logger=_log, **options)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: a name that no address can have
        what = f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error})"
        raise PersistWorldError(what, where=where, fix=fix) from error
