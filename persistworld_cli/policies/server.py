"""A policy server with openpi's websocket protocol (method.md section 6), for the embedded policies.

Every connection gets its own policy, so that the rollouts of a batch share no state. `GET /healthz` answers 200.
Browsers are refused (they send an Origin), so no web page can reach a policy on loopback.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection

from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.policies.action_spaces import DEFAULT_ACTIONS
from persistworld_cli.policies.client import BATCH, MAX_MESSAGE
from persistworld_cli.policies.embedded import ROWS, make_policy
from persistworld_cli.policies.msgpack_numpy import pack, unpack
from persistworld_cli.policies.observation import Policy
from persistworld_cli.serving import is_loopback, listen, same_secret

_INTERNAL_ERROR = 1011
API_KEY_VARIABLE = "PERSISTWORLD_POLICY_API_KEY"


class PolicyServer:
    """Serves a policy from threads of this process; use as a context manager, or `start`, `wait` and `close`.

    Args:
        make: creates the policy of a connection.
        metadata: the first message of every connection.
        host: address to listen on.
        port: 0 takes a free port; attribute `port` holds it.
        api_key: if given, connections must send it as ``Authorization: Api-Key ...``.
        keyless: allow listening beyond loopback without a key.

    Raises:
        UsageError: other machines could reach it without a key.
    """

    def __init__(
        self,
        make: Callable[[], Policy],
        metadata: dict[str, Any] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        keyless: bool = False,
    ) -> None:
        if not api_key and not keyless and not is_loopback(host):
            raise UsageError(
                f"listening on {host} needs a key: every machine that reaches the port could use the policy",
                where="policy.host",
                fix=f"set {API_KEY_VARIABLE} here and where pi-rollout runs, or serve without a key: --no-key",
            )
        self._make, self._metadata, self._api_key = make, dict(metadata or {}), api_key
        self.host, self.port = host, port
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._open: set[ServerConnection] = set()
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """Where clients connect."""
        return f"ws://{self.host}:{self.port}"

    def start(self) -> PolicyServer:
        """Listen. Raises PersistWorldError when the address is not available."""
        self._server = listen(
            self._serve_connection,
            self.host,
            self.port,
            answer=self._answer_http,
            where="policy.port",
            fix="take another --port",
            max_size=MAX_MESSAGE,
            origins=[None],
            ping_interval=None,
        )
        self.port = int(self._server.socket.getsockname()[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="policy-server", daemon=True)
        self._thread.start()
        return self

    def wait(self) -> None:
        """Block until `close` is called or the process is interrupted."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout=0.5)  # in slices, so that Ctrl-C takes effect

    def close(self) -> None:
        """Stop listening and end every connection."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            connection.close()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def __enter__(self) -> PolicyServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Health checks and the key; None lets the websocket open."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        sent = request.headers.get("Authorization", "")
        if self._api_key and not same_secret(sent, f"Api-Key {self._api_key}"):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or missing API key\n")
        return None

    def _serve_connection(self, connection: ServerConnection) -> None:
        """Metadata, then an answer to every request, until the client leaves or the policy fails."""
        with self._lock:
            self._open.add(connection)
        try:
            policy = self._make()
            policy.reset()
            connection.send(pack(self._metadata))
            for message in connection:
                connection.send(self._answer(policy, message))
        except ConnectionClosed:
            pass  # the client left
        except Exception:
            self._report(connection)
        finally:
            with self._lock:
                self._open.discard(connection)

    def _answer(self, policy: Policy, message: str | bytes) -> bytes:
        """One request -> one packed answer, with its computing time."""
        if isinstance(message, str):
            raise PersistWorldError("a request must be a binary message (msgpack), not text")
        began = time.perf_counter()
        request = unpack(message)
        if BATCH in request:
            answer = {BATCH: cast("Any", policy).infer_batch(request[BATCH])}
        else:
            answer = dict(policy.infer(request))
        answer["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - began)}
        return pack(answer)

    def _report(self, connection: ServerConnection) -> None:
        """Send the traceback as text and end the connection, as openpi's server does."""
        try:
            connection.send(traceback.format_exc())
            connection.close(_INTERNAL_ERROR, "the policy failed; see the traceback before")
        except ConnectionClosed:
            pass  # the client is gone


def serve_embedded(
    name: str, actions: str = DEFAULT_ACTIONS, rows: int = ROWS, seed: int = 0, **options: Any
) -> PolicyServer:
    """A server (not started yet) of a policy: arguments as for `make_policy`, ``options`` as for `PolicyServer`.

    Raises:
        UsageError: an unknown name, an action space that the policy lacks, or others could reach it without a key.
    """
    policy = make_policy(name, actions, rows, seed)  # refuses the name or the action space
    metadata = {"policy": name, "actions": actions, "action_rows": rows, BATCH: hasattr(policy, "infer_batch")}
    return PolicyServer(lambda: make_policy(name, actions, rows, seed), metadata, **options)
