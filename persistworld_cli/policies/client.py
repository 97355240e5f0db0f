"""Client of openpi's policy server: a websocket that carries msgpack (method.md section 6).

On connection the server sends its metadata; then it answers each binary message with one. A text message is a
traceback. `openpi-client` pins an old numpy, so the project has its own client, for that server and `policies.server`.
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
BATCH = "batch"  # true in the metadata of a server that takes several observations; their field, and the answers'
_RETRY_S = 0.5
_SEE_LOG = "see the server's log"
_LONGEST_SHOWN = 20_000  # characters of a server's traceback
_START_ONE = (
    "start a server: persistworld policy-server --policy scripted, or openpi's scripts/serve_policy.py; "
    "or take the embedded one: --policy scripted"
)


def policy_uri(host: str, port: int) -> str:
    """``ws://host:port``; a host that is already a ``ws://`` or ``wss://`` address is kept."""
    if "://" in host:
        return host
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


class PolicyClient:
    """One connection to a policy server.

    Args:
        uri: ``ws://host:port``.
        timeout_s: longest time for one answer.
        wait_s: longest time to wait for a server that does not answer yet.
        api_key: sent as ``Authorization: Api-Key ...``.
        on_wait: called about twice per second with the seconds left, while no server answers.

    Raises:
        UsageError: not the address of a websocket.
        PersistWorldError: no server in time, a refused connection, or not a policy server.
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
        self.metadata: dict[str, Any] = self._receive(what="its metadata")
        self.batched = self.metadata.get(BATCH) is True

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer. A second message is an error: it would count as the answer to the next request.

        Args:
            obs: a map of numbers, text and numpy arrays.

        Raises:
            PersistWorldError: the server failed (with its traceback), closed, took too long, or sent a second message.
        """
        if self._connection is None:
            raise PersistWorldError("the connection to the policy server is closed", where=self.uri)
        request = pack(obs)
        try:
            surplus = self._connection.recv(timeout=0)
        except TimeoutError:
            pass
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        else:
            if isinstance(surplus, str):
                raise self._failed(surplus)
            fix = "serve a policy that sends one message per request"
            raise self._error("the policy server sent more answers than requests", fix)
        try:
            self._connection.send(request)
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        return self._receive(what="an answer")

    def infer_batch(self, observations: list[dict[str, Any]]) -> Any:
        """Several observations in one request, to a server whose metadata has ``batch``. Raises as `infer`."""
        return self.infer({BATCH: observations}).get(BATCH)

    def reset(self) -> None:
        """Does nothing: openpi's protocol has no reset message; a new episode is a new connection."""

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
        """Try until a server answers or the time is up."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return self._open(max(1.0, min(self._timeout_s, deadline - time.monotonic())))
            except OSError as error:  # TimeoutError is one
                reason: Exception = error
            except InvalidURI as error:
                raise UsageError(
                    f"'{self.uri}' is not the address of a websocket", where="policy.host", fix="write ws://HOST:PORT"
                ) from error
            except InvalidStatus as error:
                reason, status = error, error.response.status_code
                if status < 500:  # 5xx: a proxy whose server is still starting
                    key = "set PERSISTWORLD_POLICY_API_KEY to the server's key"
                    raise PersistWorldError(
                        f"the policy server refused the connection (HTTP {status})",
                        where=self.uri,
                        fix=key if status in (401, 403) else "check host, port and path",
                    ) from error
            except (InvalidHandshake, WebSocketException, ValueError) as error:
                what = f"the server at this address is not a websocket server: {error}"
                raise PersistWorldError(what, where=self.uri, fix="check host and port") from error
            left = deadline - time.monotonic()
            if left <= 0:
                what = f"no policy server answered within {wait_s:g} s ({reason})"
                raise PersistWorldError(what, where=self.uri, fix=_START_ONE) from reason
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
            # openpi's server computes on its event loop and answers no ping meanwhile, so only `timeout_s` applies.
            ping_interval=None,
            proxy=None if local else True,
        )

    def _error(self, what: str, fix: str = _SEE_LOG) -> PersistWorldError:
        """Close the connection and return the error: a late answer would count as the next one."""
        self.close()
        return PersistWorldError(what, where=self.uri, fix=fix)

    def _gone(self, error: Exception) -> PersistWorldError:
        return self._error(f"the policy server closed the connection ({str(error) or type(error).__name__})")

    def _failed(self, message: str) -> PersistWorldError:
        """The error for a text message (a traceback)."""
        shown = message.rstrip()
        if len(shown) > _LONGEST_SHOWN:
            shown = f"... {shown[-_LONGEST_SHOWN:]}"
        return self._error(f"the policy server failed:\n{shown}")

    def _receive(self, what: str) -> dict[str, Any]:
        """The next message as a map."""
        assert self._connection is not None
        try:
            message = self._connection.recv(timeout=self._timeout_s)
        except TimeoutError as error:
            fix = "--set policy.timeout_s=300 (a policy's first answer may compile for minutes)"
            raise self._error(f"the policy server did not send {what} within {self._timeout_s:g} s", fix) from error
        except (ConnectionClosed, OSError) as error:
            raise self._gone(error) from error
        if isinstance(message, str):
            raise self._failed(message)
        try:
            answer = unpack(message)
        except PersistWorldError as error:
            raise self._error(error.what, error.fix or _SEE_LOG) from error
        if not isinstance(answer, dict):
            raise self._error(f"the policy server sent {type(answer).__name__} as {what}, not a map")
        return answer
