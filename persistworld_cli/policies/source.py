"""From the name of a policy to something that answers: the embedded server, another server, or a class here."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from persistworld_cli.config.settings import PolicySettings
from persistworld_cli.policies.client import PolicyClient, policy_uri
from persistworld_cli.policies.controller import ActingPolicy
from persistworld_cli.policies.embedded import POLICIES, load_policy, make_policy
from persistworld_cli.policies.observation import find_layout
from persistworld_cli.policies.server import API_KEY_VARIABLE, serve_embedded

_LOCAL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_ADDRESS = re.compile(r"(?P<host>[^/\s]+):(?P<port>\d+)")
_SAY_EVERY_S = 5.0

logger = logging.getLogger(__name__)


def check_policy(name: str) -> None:
    """Refuse a name that means nothing, before any compute. Raises UsageError."""
    if name not in (*POLICIES, "", "server") and "://" not in name and not _ADDRESS.fullmatch(name):
        if _LOCAL.fullmatch(name):
            load_policy(name).close()
        else:
            make_policy(name, find_layout("pi05"))  # raises, with the nearest name


@contextmanager
def open_policies(name: str, settings: PolicySettings, count: int) -> Iterator[Sequence[ActingPolicy]]:
    """``count`` policies that keep nothing in common, closed on leaving.

    Args:
        name: ``scripted``, ``hold`` or ``random``: served from here on a free port of loopback, and asked over the
            websocket as any other; ``server`` (or nothing): the server at `policy.host` and `policy.port`;
            ``ws://...`` or ``host:port``: a server there; ``module:Class``: in this process.
        settings: host, port, timeouts, layout, seed. The API key comes from the environment variable
            ``PERSISTWORLD_POLICY_API_KEY``.
        count: number of rollouts: each has a connection (or an instance) of its own.

    Raises:
        UsageError: a name that means nothing. PersistWorldError: no server in time.
    """
    layout = find_layout(settings.layout)
    with ExitStack() as stack:
        if name in POLICIES:
            server = stack.enter_context(serve_embedded(name, layout, settings.seed))
            uri, key = server.uri, None
        elif _LOCAL.fullmatch(name) and "://" not in name:
            yield [load_policy(name) for _ in range(count)]
            return
        else:
            uri, key = _address(name, settings), os.environ.get(API_KEY_VARIABLE)
        clients = []
        for _ in range(count):
            client = PolicyClient(
                uri, timeout_s=settings.timeout_s, wait_s=settings.wait_s, api_key=key, on_wait=_countdown(uri)
            )
            stack.callback(client.close)
            clients.append(client)
        yield clients


def _address(name: str, settings: PolicySettings) -> str:
    """The websocket that a policy's name or the settings mean."""
    if "://" in name:
        return name
    match = _ADDRESS.fullmatch(name)
    if match:
        return policy_uri(match["host"].strip("[]"), int(match["port"]))
    return policy_uri(settings.host, settings.port)


def _countdown(uri: str) -> Callable[[float], None]:
    """Says every few seconds how long a server that is not there will still be waited for."""
    said: list[float] = []

    def on_wait(left: float) -> None:
        if not said or said[-1] - left >= _SAY_EVERY_S:
            said.append(left)
            logger.warning("no policy server at %s yet: waiting %.0f s more", uri, left)

    return on_wait
