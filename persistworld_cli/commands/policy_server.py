"""``persistworld policy-server``: a small policy behind openpi's websocket protocol."""

from __future__ import annotations

import os

from persistworld_cli.commands.options import Common, setting, with_common
from persistworld_cli.commands.run import resolve, show_plan, write_json
from persistworld_cli.config.requests import PolicyServerRequest
from persistworld_cli.console import note

EXAMPLES = {
    "": ("persistworld policy-server --policy hold", "persistworld policy-server --policy scripted --port 8001"),
}


@with_common(
    "none",
    setting("policy.host", "Address to listen on."),
    setting("policy.port", "Port to listen on."),
    setting("policy.actions", "Action space of its answers, told to clients: hold has each, others joint-velocity."),
    setting("policy.seed", "Random seed."),
    without=("output",),
)
def command(common: Common, request: PolicyServerRequest) -> None:
    """Serve a simple policy, without neural network or GPU, over openpi's protocol until interrupted."""
    resolved = resolve(common)
    own = resolved.settings.policy
    if common.dry_run:
        show_plan(common, request, resolved, output=f"ws://{own.host}:{own.port}")
        return
    from persistworld_cli.policies.source import API_KEY_VARIABLE, serve_embedded
    from persistworld_cli.serving import is_loopback

    key = os.environ.get(API_KEY_VARIABLE)
    server = serve_embedded(
        request.policy,
        own.actions,
        seed=own.seed,
        host=own.host,
        port=own.port,
        api_key=key,
        keyless=request.no_key,
    )
    with server:
        note(f"policy '{request.policy}' on {server.uri}; Ctrl-C ends it")
        if common.as_json:
            write_json({"policy": request.policy, "uri": server.uri})
        if not is_loopback(own.host):
            who = "anyone with the key" if key else "every machine that reaches this port"
            note(f"{who} can use the policy, and nothing is encrypted: an ssh tunnel is safer")
        server.wait()
