"""What both websocket servers, `drive --web` and `policy-server`, share.

Anyone who reaches the port can send a malformed request: it gets a 400, and no traceback in the server's terminal.
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
_log.setLevel(logging.WARNING)  # at INFO, it logs every connection


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def same_secret(sent: str, own: str) -> bool:
    """Whether two secrets are equal, in constant time; `sent` may be any text."""
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
    """A websocket server bound to its port; the caller calls `serve_forever`.

    Args:
        handle: called in its own thread for every websocket.
        host, port: to listen on; port 0: a free one.
        answer: the HTTP response to a request; None upgrades it to a websocket.
        where, fix: of the error when the address is unavailable.
        options: more of `websockets.sync.server.serve`.

    Raises:
        PersistWorldError: the address is unavailable.
    """

    def checked(connection: ServerConnection, request: Request) -> Response | None:
        try:
            return answer(connection, request)
        except (LookupError, ValueError, InvalidHeader, InvalidMessage):  # a header twice, a path that is no URL
            return connection.respond(HTTPStatus.BAD_REQUEST, "malformed request\n")

    try:
        return serve(handle, host, port, process_request=checked, compression=None, logger=_log, **options)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: not a host name
        what = f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error})"
        raise PersistWorldError(what, where=where, fix=fix) from error
