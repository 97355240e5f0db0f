"""`drive`: move the arm in the world model by keys. From one real frame, a key is one step (method.md section 6)."""

from __future__ import annotations

import logging
from typing import Any

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.loading import load_model
from persistworld_cli.checkpoints.references import inference_ref
from persistworld_cli.config.keys import dimensions_of
from persistworld_cli.config.requests import LOCALHOST, DriveRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.interact.live import drive_live
from persistworld_cli.interact.outputs import write_all
from persistworld_cli.interact.session import DriveSession
from persistworld_cli.interact.web import drive_web
from persistworld_cli.interact.web_server import open_server
from persistworld_cli.reports.progress import Meter
from persistworld_cli.robot.keyboard import parse_keys
from persistworld_cli.rollout.interactive import InteractiveRollout, make_start, require_dimensions
from persistworld_cli.rollout.recording import Item, require_episodes

logger = logging.getLogger(__name__)


def run(settings: Settings, request: DriveRequest) -> dict[str, Any]:
    """Drive by a string of keys, in the terminal or on a web page; write a video, a contact sheet and JSON.

    The drive starts at ``drive.episode`` and ``drive.start``; by default in the first episode of ``eval.split``.

    Returns:
        A summary for the terminal with the paths ``video``, ``sheet`` and ``json``; poses and times are in the JSON.

    Raises:
        UsageError: unknown keys, before any compute.
        PersistWorldError: no such episode or frame, a pose of unknown numbers, unreadable weights or data, a port
            that is taken.
    """
    keys = [] if request.keys is None else parse_keys(request.keys, settings.drive.keys)
    if request.web:
        # before the weights are read, so that a taken port is reported at once
        with open_server(request.host or LOCALHOST, request.port or 0, open=request.browser) as server:
            session = open_session(settings)
            drive_web(session, server, request.output)
    else:
        session = open_session(settings)
        if request.live:
            drive_live(session)
        else:
            with Meter("drive", len(keys)) as meter:
                for key in keys:
                    meter.advance(seconds_per_step=session.press(key).seconds)
    return dict(write_all(session, request.output))


def open_session(settings: Settings) -> DriveSession:
    """A session at the start that the settings name. Raises as `run` does."""
    store, drive, split = open_store(settings), settings.drive, settings.eval.split
    episode = drive.episode or require_episodes(store, split)[0]
    start = make_start(store, Item(episode, drive.start, drive.seed), split)
    require_dimensions(settings, start)
    for one, value in zip(dimensions_of(settings), start.pose, strict=True):
        if not one.low <= value <= one.high:
            said = "the start's %s = %.4g is outside robot.limits, %g to %g: the first key moves it to their edge"
            logger.warning(said, one.name, value, one.low, one.high)
    # before the weights are read, so that missing percentiles are reported at once
    parts = inference_ref(settings.model).parts
    (store,) = weights_stores(settings, store, [parts], split=start.split, episodes=[start.item.episode])
    return DriveSession(InteractiveRollout(load_model(settings), store, [start], settings), start, settings)
