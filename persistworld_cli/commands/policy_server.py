"""``persistworld policy-server``: a small policy behind openpi's websocket protocol."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from persistworld_cli.commands.options import Common, Seed, with_common
from persistworld_cli.commands.run import output_folder, resolve, show_settings
from persistworld_cli.console import note

EXAMPLES = ("persistworld policy-server --policy hold", "persistworld policy-server --policy scripted --port 8001")


@with_common(launch="none")
def command(
    common: Common,
    policy: Annotated[str, typer.Option(help="scripted, hold or random.")] = "scripted",
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    no_key: Annotated[
        bool, typer.Option("--no-key", help="Listen beyond this machine without a key: anyone there may ask.")
    ] = False,
    seed: Seed = None,
) -> None:
    """Serve a policy that needs no network and no GPU, as openpi's policy server does, until it is interrupted."""
    resolved = resolve(common, {"policy.host": host, "policy.port": port, "policy.seed": seed})
    if common.dry_run:
        output = output_folder(common, resolved, "policy-server")
        show_settings("policy-server", resolved, {"policy": policy}, output, as_json=common.as_json)
        return
    from persistworld_cli.policies.observation import find_layout
    from persistworld_cli.policies.source import API_KEY_VARIABLE, serve_embedded
    from persistworld_cli.serving import is_loopback

    own = resolved.settings.policy
    key = os.environ.get(API_KEY_VARIABLE)
    server = serve_embedded(
        policy, find_layout(own.layout), own.seed, host=own.host, port=own.port, api_key=key, keyless=no_key
    )
    with server:
        note(f"policy '{policy}' on {server.uri}; Ctrl-C ends it")
        if not is_loopback(own.host):
            who = "whoever has the key" if key else "every machine that reaches this port"
            note(f"{who} can use the policy, and nothing is encrypted: an ssh tunnel is safer")
        server.wait()
