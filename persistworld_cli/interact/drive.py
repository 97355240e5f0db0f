"""`drive`: act in the world by key. From one real frame, each key is one interaction (method.md section 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.references import inference_ref, load_model
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.interact.live import drive_live
from persistworld_cli.interact.outputs import write_all
from persistworld_cli.interact.session import DriveSession
from persistworld_cli.interact.web import drive_web
from persistworld_cli.interact.web_server import open_server
from persistworld_cli.reports.progress import Meter
from persistworld_cli.robot.keyboard import parse_keys
from persistworld_cli.rollout.interactive import InteractiveRollout, make_start
from persistworld_cli.rollout.recording import Item, Start


def run(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Drive along a string of keys, from the terminal, or from a page, and write what was seen.

    Args:
        settings: resolved settings.
        job: ``output`` (folder) and one of ``keys`` ("lllrrr"), ``live`` (true: keys come from the terminal that is
            standard input) and ``web`` (``host``, ``port``, ``open``); optional ``episode``, ``start``, ``seed`` (else
            `settings.drive`; no episode: the first of ``eval.split``).

    Returns:
        A summary for the terminal with the paths ``video``, ``sheet`` and ``json``; poses and times are in the JSON.

    Raises:
        UsageError: unknown keys, before any compute.
        PersistWorldError: no such episode or frame, unreadable weights or data, a port that cannot be had.
    """
    output, web = Path(job["output"]), job.get("web")
    keys = [] if web or job.get("live") else parse_keys(str(job["keys"]), settings.drive.keys)
    if web:
        with open_server(**web) as server:  # a port that cannot be had should be told before the weights are read
            session = open_session(settings, job)
            drive_web(session, server, output)
    else:
        session = open_session(settings, job)
        if job.get("live"):
            drive_live(session)
        else:
            _drive_keys(session, keys)
    return dict(write_all(session, output))


def open_session(settings: Settings, job: dict[str, Any]) -> DriveSession:
    """The drive that job and settings name, at its start. Raises as `run`."""
    store = open_store(settings)
    start = _find_start(settings, job, store)
    # missing percentiles should be told before the weights are read
    parts = inference_ref(settings.model).parts
    (store,) = weights_stores(settings, store, [parts], split=start.split, episodes=[start.item.episode])
    return DriveSession(InteractiveRollout(load_model(settings), store, [start], settings), start, settings)


def _drive_keys(session: DriveSession, keys: list[str]) -> None:
    """One step a key."""
    with Meter("drive", len(keys)) as meter:
        for key in keys:
            meter.advance(seconds_a_step=session.press(key).seconds)


def _find_start(settings: Settings, job: dict[str, Any], store: EpisodeStore) -> Start:
    """The start frame that job and settings name."""
    drive, split = settings.drive, settings.eval.split
    episode = str(_given(job, "episode", drive.episode) or "")
    if not episode:
        known = store.episodes(split)
        if not known:
            raise PersistWorldError(
                f"split '{split}' has no episodes",
                where=str(store.root),
                fix="name one that has: --set eval.split=train",
            )
        episode = known[0]
    item = Item(episode, int(_given(job, "start", drive.start)), int(_given(job, "seed", drive.seed)))
    return make_start(store, item, split)


def _given(job: dict[str, Any], key: str, default: Any) -> Any:
    """The job's value, or the default where it has none."""
    return default if job.get(key) is None else job[key]
