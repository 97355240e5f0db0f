"""Client of openpi's policy server: a websocket that carries msgpack (method.md section 6).

On connecting the server sends its metadata; then one binary message asks and one answers. A text message is a
traceback. `openpi-client` pins an old numpy, so this is the project's own; it speaks to both that server and
`rollout.policy_server`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.msgpack_numpy import pack, unpack

MAX_MESSAGE = 256 * 2**20  # bytes; a chunk of actions is a kilobyte
_RETRY_S = 0.5
_URI = "write ws://HOST:PORT"
_SEE_LOG = "see the server's log"
_LONGEST_TOLD = 20_000  # characters of what a server says that are shown
_START_ONE = (
    "start a server: persistworld policy-server --policy scripted, or openpi's scripts/serve_policy.py; "
    "or take the embedded one: --policy scripted"
)


def policy_uri(host: str, port: int) -> str:
    """``ws://host:port``; a host that is a ``ws://`` or ``wss://`` address already stays as it is."""
    if "://" in host:
        return host
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


class PolicyClient:
    """One connection to a policy server.

    Args:
        uri: ``ws://host:port``.
        timeout_s: the longest that one answer may take.
        wait_s: how long to wait for a server that is not there yet.
        api_key: sent as ``Authorization: Api-Key ...``.
        on_wait: called about twice a second with the seconds left, while no server answers.

    Raises:
        UsageError: not an address of a websocket.
        PersistWorldError: no server in time, refused, or what answers is not a policy server.
    """

    def __init__(
        self,
        uri: str,
        *,
        timeout_s: float = 60.0,
        wait_s: float = 30.0,
        api_key: str | None = None,
        on_wait: Callable[[float], None] | None = None,
    ) -> None:
        self.uri, self._timeout_s = uri, timeout_s
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._connection: ClientConnection | None = self._connect(wait_s, on_wait)
        try:
            metadata = self._receive(what="its metadata")
        except PersistWorldError:
            self.close()
            raise
        self.metadata: dict[str, Any] = metadata

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer. A surplus message is an error: it would be taken for the next request's answer.

        Args:
            obs: a map of numbers, text and numpy arrays.

        Raises:
            PersistWorldError: the server failed (its traceback is shown), is gone, took too long, or sent more answers
                than it was asked for.
        """
        if self._connection is None:
            raise PersistWorldError("the connection to the policy server is closed", where=self.uri)
        self._require_silence()
        try:
            self._connection.send(pack(obs))
        except ConnectionClosed as error:
            raise self._gone(error) from error
        except OSError as error:
            raise self._gone(error) from error
        return self._receive(what="an answer")

    def reset(self) -> None:
        """openpi's protocol has no such message: a new episode is a new connection."""

    def close(self) -> None:
        """End the connection; later calls of `infer` are refused."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _connect(self, wait_s: float, on_wait: Callable[[float], None] | None) -> ClientConnection:
        """Try until a server is there or the time is over."""
        deadline = time.monotonic() + wait_s
        while True:
            left = deadline - time.monotonic()
            try:
                return self._open(max(1.0, min(self._timeout_s, left)))
            except (OSError, TimeoutError) as error:
                reason: Exception = error
            except InvalidURI as error:
                raise UsageError(
                    f"'{self.uri}' is not the address of a websocket", where="policy.host", fix=_URI
                ) from error
            except InvalidStatus as error:
                reason = error
                if error.response.status_code < 500:  # 5xx: a proxy whose server is still starting
                    raise self._refused(error.response.status_code) from error
            except (InvalidHandshake, WebSocketException, ValueError) as error:
                raise PersistWorldError(
                    f"what answers is not a websocket server: {error}", where=self.uri, fix="check host and port"
                ) from error
            left = deadline - time.monotonic()
            if left <= 0:
                raise PersistWorldError(
                    f"no policy server answered within {wait_s:g} s ({reason})", where=self.uri, fix=_START_ONE
                ) from reason
            if on_wait:
                on_wait(left)
            time.sleep(min(_RETRY_S, left))

    def _open(self, timeout_s: float) -> ClientConnection:
        """One attempt. Images do not compress, so no compression is offered."""
        local = any(f"//{name}" in self.uri for name in ("127.", "localhost", "[::1]"))
        return connect(
            self.uri,
            additional_headers=self._headers,
            compression=None,
            max_size=MAX_MESSAGE,
            open_timeout=timeout_s,
            close_timeout=1.0,
            # openpi's server thinks on its event loop and answers no ping meanwhile: `timeout_s` watches it instead.
            ping_interval=None,
            proxy=None if local else True,
        )

    def _refused(self, status: int) -> PersistWorldError:
        """The error for an HTTP answer that is not an upgrade."""
        fix = "check host, port and path"
        if status in (401, 403):
            fix = "set PERSISTWORLD_POLICY_API_KEY to the server's key"
        return PersistWorldError(f"the policy server refused the connection (HTTP {status})", where=self.uri, fix=fix)

    def _gone(self, error: Exception) -> PersistWorldError:
        self.close()
        reason = str(error) or type(error).__name__
        return PersistWorldError(f"the policy server closed the connection ({reason})", where=self.uri, fix=_SEE_LOG)

    def _require_silence(self) -> None:
        """Raise where a message waits that answers no request."""
        assert self._connection is not None
        try:
            surplus = self._connection.recv(timeout=0)
        except TimeoutError:
            return
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        self.close()
        if isinstance(surplus, str):
            raise self._failed(surplus)
        raise PersistWorldError(
            "the policy server sent more answers than it was asked for",
            where=self.uri,
            fix="serve a policy that sends one message per request",
        )

    def _failed(self, message: str) -> PersistWorldError:
        """The error for a text message, which is a traceback."""
        told = message.rstrip()
        if len(told) > _LONGEST_TOLD:
            told = f"... {told[-_LONGEST_TOLD:]}"
        return PersistWorldError(f"the policy server failed:\n{told}", where=self.uri, fix=_SEE_LOG)

    def _receive(self, what: str) -> dict[str, Any]:
        """The next message as a map."""
        assert self._connection is not None
        try:
            message = self._connection.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            # A late answer would be taken for that of the next request.
            self.close()
            raise PersistWorldError(
                f"the policy server did not send {what} within {self._timeout_s:g} s",
                where=self.uri,
                fix="--set policy.timeout_s=300 (a policy's first answer may compile for minutes)",
            ) from error
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        if isinstance(message, str):
            self.close()
            raise self._failed(message)
        try:
            answer = unpack(message)
        except PersistWorldError as error:
            self.close()
            raise PersistWorldError(error.what, where=self.uri, fix=error.fix or _SEE_LOG) from error
        if not isinstance(answer, dict):
            kind = type(answer).__name__
            raise PersistWorldError(f"the policy server sent {kind} as {what}, not a map", where=self.uri, fix=_SEE_LOG)
        return answer
