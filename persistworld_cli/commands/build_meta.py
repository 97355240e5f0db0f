"""``persistworld build-meta``: index, action statistics, action adapter and health report of a processed dataset."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

import typer

from persistworld_cli.commands.options import Common, with_common
from persistworld_cli.commands.run import output_folder, resolve, show_result, show_settings
from persistworld_cli.config.presets import resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import UsageError

EXAMPLES = (
    "persistworld build-meta",
    "persistworld build-meta data/droid_latents --preset ctrl-world",
    "persistworld build-meta data/droid_latents --preset ctrl-world --export ctrl-world",
)


@with_common(launch="none")
def command(
    common: Common,
    dataset: Annotated[
        str | None,
        typer.Argument(help="Processed dataset (what extract-latents wrote).  \\[world.dataset]", metavar="DATASET"),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(help="Write train_sample.json, val_sample.json and stat.json too.", metavar="ctrl-world"),
    ] = None,
) -> None:
    """Index a processed dataset: where every episode lies, action statistics, the action adapter, and its health."""
    if export not in (None, "ctrl-world"):
        raise UsageError(f"unknown export '{export}'", where="--export", fix="known: ctrl-world")
    resolved = resolve(common, {"world.dataset": dataset}, {"world.dataset": "DATASET"})
    job = {"export": export}
    if common.dry_run:
        show_settings(
            "build-meta", resolved, job, output_folder(common, resolved, "build-meta"), as_json=common.as_json
        )
        return
    show_result(_build(resolved.settings, export), as_json=common.as_json)


def _build(settings: Settings, export: str | None) -> dict[str, Any]:
    """The work, in this process: it reads JSON and writes a few files."""
    from persistworld_cli.data.meta import build_meta, export_ctrl_world
    from persistworld_cli.data.store import EpisodeStore
    from persistworld_cli.reports.progress import Meter

    dataset = resolve_path(settings.world.dataset)
    frames = settings.model.num_frames
    with ExitStack() as stack:
        meters: list[Meter] = []  # made at the first call, which tells how much there is

        def show(done: int, total: int) -> None:
            if not meters:
                meters.append(stack.enter_context(Meter("build-meta", total)))
            meters[0].advance()

        report = build_meta(dataset, num_frames=frames, progress=show)
    result = {
        "meta": str(report.meta),
        "episodes": report.episodes,
        "frames": report.frames,
        "samples": report.samples,
        "state_p01": report.stat.p01.tolist(),
        "state_p99": report.stat.p99.tolist(),
        "adapter": report.adapter,
        "health": report.health,
    }
    if export:
        name = dataset.name
        result["exported"] = str(export_ctrl_world(EpisodeStore(dataset), name, num_frames=frames))
    return result
