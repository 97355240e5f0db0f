"""Make a policy from its name: an embedded one, a server, or a class in this process."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from persistworld_cli.config.fields import MODULE_CLASS
from persistworld_cli.config.settings import PolicySettings
from persistworld_cli.errors import UsageError
from persistworld_cli.policies.action_spaces import ACTION_SPACES
from persistworld_cli.policies.client import PolicyClient, policy_uri
from persistworld_cli.policies.embedded import POLICIES, ROWS, LocalPolicy, make_policy
from persistworld_cli.policies.observation import Policy
from persistworld_cli.policies.server import API_KEY_VARIABLE, serve_embedded

_ADDRESS = re.compile(r"(?P<host>[^/\s]+):(?P<port>\d+)")
_LOG_EVERY_S = 5.0

logger = logging.getLogger(__name__)


def check_policy(name: str, actions: str) -> None:
    """Refuse an unknown name, or an action space that it lacks, before anything is computed. Raises UsageError."""
    if name not in ("", "server") and "://" not in name and not _ADDRESS.fullmatch(name):
        make_policy(name, actions)


@contextmanager
def open_policies(name: str, settings: PolicySettings, count: int, rows: int = ROWS) -> Iterator[Sequence[Policy]]:
    """``count`` policies that share no state, closed on exit.

    Args:
        name: ``scripted``, ``hold`` or ``random``: served on a free port of loopback; ``server`` (or nothing): the
            server at `policy.host` and `policy.port`; ``ws://...`` or ``host:port``: a server there;
            ``module:Class``: in this process.
        settings: host, port, timeouts, actions, seed. The API key comes from the environment variable
            ``PERSISTWORLD_POLICY_API_KEY``.
        count: number of rollouts; each has its own connection (or instance), unless the policy is batched.
        rows: of an embedded policy's answer.

    Raises:
        UsageError: an unknown name, or a server that tells another action space. PersistWorldError: no server in time.
    """
    if MODULE_CLASS.fullmatch(name) and "://" not in name:
        yield _each(count, lambda: LocalPolicy(make_policy(name), name))
        return
    with ExitStack() as stack:
        key = None
        if name in POLICIES:
            uri = stack.enter_context(serve_embedded(name, settings.actions, rows, settings.seed)).uri
        else:
            uri, key = _address(name, settings), os.environ.get(API_KEY_VARIABLE)
        times = {"timeout_s": settings.timeout_s, "wait_s": settings.wait_s}

        def connected() -> PolicyClient:
            client = stack.enter_context(PolicyClient(uri, api_key=key, on_wait=_countdown(uri), **times))
            _check_actions(client, settings.actions)
            return client

        yield _each(count, connected)


def _check_actions(client: PolicyClient, actions: str) -> None:
    """Refuse a server that names another action space: eight numbers may be joints or their velocities."""
    told = client.metadata.get("actions")  # of `serve_embedded`; openpi's server does not tell
    if told in ACTION_SPACES and told != actions:
        what = f"the policy server answers in {told}, not {actions}"
        fix = f"--actions {told}, or start the server with --actions {actions}"
        raise UsageError(what, where=f"policy.actions; {client.uri}", fix=fix)


def _each(count: int, make: Callable[[], PolicyClient | LocalPolicy]) -> list[PolicyClient | LocalPolicy]:
    """One for each rollout; a batched one serves all."""
    first = make()
    return [first] * count if first.batched else [first, *(make() for _ in range(count - 1))]


def _address(name: str, settings: PolicySettings) -> str:
    """The websocket address in a policy's name, else that of the settings."""
    if "://" in name:
        return name
    if match := _ADDRESS.fullmatch(name):
        return policy_uri(match["host"].strip("[]"), int(match["port"]))
    return policy_uri(settings.host, settings.port)


def _countdown(uri: str) -> Callable[[float], None]:
    """Logs every few seconds how long the wait for a server lasts."""
    last = math.inf

    def on_wait(left: float) -> None:
        nonlocal last
        if last - left >= _LOG_EVERY_S:
            last = left
            logger.warning("no policy server at %s yet: waiting up to %.0f s more", uri, left)

    return on_wait
