"""The server of `drive --web`: one HTML page and one websocket, on threads that never compute.

Access: the browser's Host header must name this server (a foreign name that resolves to loopback is refused), the
Origin must be this page's, and a server that listens beyond loopback requires a token. One tab drives; another tab is
refused unless it takes over.
"""

from __future__ import annotations

import os
import secrets
import threading
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, urlencode, urlsplit

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection

from persistworld_cli.config.keys import TOKEN_VARIABLE
from persistworld_cli.console import note
from persistworld_cli.errors import UsageError
from persistworld_cli.serving import is_loopback, listen, same_secret

_PAGE = Path(__file__).with_name("page.html")
_MAX_MESSAGE = 4096  # bytes that a page may send at once
_TAKEN, _TAKEN_OVER = 4001, 4002  # close codes of a websocket; the page knows them
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def open_server(host: str, port: int, open: bool = False) -> DriveServer:
    """A server that already holds its port; it answers after `DriveServer.start`.

    Args:
        host: address to listen on; beyond loopback, the token comes from the environment (`TOKEN_VARIABLE`) or is new.
        port: 0 takes a free port.
        open: open the page in a browser once it is served.

    Raises:
        PersistWorldError: the address is not available.
    """
    token = os.environ.get(TOKEN_VARIABLE, "") or ("" if is_loopback(host) else secrets.token_urlsafe(16))
    return DriveServer(host, port, token, browse=open)


class DriveServer:
    """Serves the page and one websocket; use as a context manager.

    Args:
        host, port: address to listen on.
        token: page and websocket require it; "" for none.
        browse: open the page in a browser once it is served.
    """

    def __init__(self, host: str, port: int, token: str = "", *, browse: bool = False) -> None:
        if not token and not is_loopback(host):
            raise UsageError(f"listening on {host} needs a token", where="--host", fix="give one with --token")
        self._host, self._token, self._browse = host, token, browse
        self._page = _PAGE.read_bytes()
        self._hear: Callable[[str | None], None] = lambda message: None
        self._tab: ServerConnection | None = None
        self._lock = threading.Lock()
        self._server = listen(
            self._serve_tab,
            host,
            port,
            answer=self._answer,
            where="--web",
            fix="give another --port, or leave it out for a free one",
            max_size=_MAX_MESSAGE,
            server_header=None,
        )
        self.port = int(self._server.socket.getsockname()[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="drive-server", daemon=True)

    @property
    def url(self) -> str:
        """Address of the page, with the token if there is one."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._host, self._host)
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"http://{host}:{self.port}/" + (f"?{urlencode({'token': self._token})}" if self._token else "")

    def start(self, hear: Callable[[str | None], None]) -> None:
        """Start to answer; other threads call ``hear`` with each message of the tab, and None when a tab connects."""
        self._hear = hear
        self._thread.start()
        note(f"drive at {self.url} (Ctrl-C ends it and writes the drive)")
        if not is_loopback(self._host):
            note("anyone with this address can drive, and the traffic is unencrypted: an ssh tunnel is safer")
        if self._browse and not webbrowser.open(self.url):
            note("no browser could be opened here: open the address yourself")

    def send(self, message: str | bytes) -> bool:
        """Send to the tab; False if there is none (a tab gets everything when it connects)."""
        with suppress(ConnectionClosed):
            if (tab := self._tab) is not None:
                tab.send(message)
                return True
        return False

    def __enter__(self) -> DriveServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            if self._tab is not None:
                self._tab.close(reason="the server ends")
            self._thread.join(timeout=5.0)
        else:
            self._server.socket.close()

    # -- access ---------------------------------------------------------------------------------------------------

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The page or a refusal; None lets the websocket open."""
        target = urlsplit(request.path)
        if refusal := self._refuse(request, parse_qs(target.query).get("token", [""])[0]):
            return _response(*refusal)
        if target.path == "/ws":
            return None
        if target.path == "/":
            return _response(HTTPStatus.OK, self._page, "text/html; charset=utf-8")
        return _response(HTTPStatus.NOT_FOUND, b"there is only one page: /\n")

    def _refuse(self, request: Request, token: str) -> tuple[HTTPStatus, bytes] | None:
        """Why a request is refused, or None."""
        host = request.headers.get("Host", "")
        if is_loopback(self._host) and not _names_loopback(host):
            return HTTPStatus.FORBIDDEN, b"this server is reached by 127.0.0.1 or localhost alone\n"
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{host}":
            return HTTPStatus.FORBIDDEN, b"pages of other origins may not drive\n"
        if self._token and not same_secret(token, self._token):
            return HTTPStatus.UNAUTHORIZED, b"wrong or missing token: open the address that was printed\n"
        return None

    # -- the tab ------------------------------------------------------------------------------------------------------

    def _serve_tab(self, connection: ServerConnection) -> None:
        """Pass on the messages of a tab, until it disconnects or another one takes over."""
        take = "take" in parse_qs(urlsplit(connection.request.path if connection.request else "").query)
        with self._lock:
            before = self._tab
            if before is not None and not take:
                connection.close(_TAKEN, "another tab drives")
                return
            self._tab = connection
        if before is not None:
            before.close(_TAKEN_OVER, "another tab took over")
        try:
            with suppress(ConnectionClosed):
                self._hear(None)
                for message in connection:
                    self._hear(message if isinstance(message, str) else "")
        finally:
            with self._lock:
                if self._tab is connection:
                    self._tab = None


def _names_loopback(host: str) -> bool:
    """Whether a Host header names this machine itself."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


def _response(status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> Response:
    """A response that is neither cached nor framed."""
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Connection": "close",
            "Cache-Control": "no-store",
            "Content-Security-Policy": _POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
    )
    return Response(int(status), status.phrase, headers, body)
