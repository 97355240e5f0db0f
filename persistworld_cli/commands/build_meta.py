"""``persistworld build-meta``: index, action statistics, joint-velocity adapter and health report of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from persistworld_cli.commands.options import Common, setting, with_common
from persistworld_cli.commands.run import resolve, show_plan, show_result
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import Resolved
from persistworld_cli.config.requests import BuildMetaRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note

if TYPE_CHECKING:
    from persistworld_cli.data.metadata.meta import MetaReport
    from persistworld_cli.reports.progress import Meter

EXAMPLES = {
    "After persistworld extract-latents": ("persistworld build-meta", "persistworld build-meta --check"),
    "With DROID's latents in data/droid_latents": (
        "persistworld build-meta data/droid_latents --preset ctrl-world",
        "persistworld build-meta data/droid_latents --preset ctrl-world --export ctrl-world",
    ),
    "With Ctrl-World's own latents in data/droid, and its repository": (
        "persistworld build-meta data/droid --preset ctrl-world --import Ctrl-World/dataset_meta_info/droid",
    ),
}
_SHOWN = 3  # episodes named in a terminal; the JSON names more


@with_common(
    "none",
    setting(
        "world.dataset",
        "Processed dataset (what extract-latents wrote).  \\[world.dataset]",
        "DATASET",
        metavar="DATASET",
    ),
    without=("output",),
)
def command(common: Common, request: BuildMetaRequest) -> None:
    """Index a processed dataset: place of every episode, action statistics, joint-velocity adapter and health report.

    A later run reads only the annotations that are new or changed.
    """
    resolved = resolve(common)
    if common.dry_run:
        show_plan(common, request, resolved, output=f"{resolved.settings.world.dataset}/meta")
        return
    note(f"build-meta: reading {resolved.settings.world.dataset}")
    if request.check:
        _check(resolved, common.flags["world.dataset"] is not None, request, as_json=common.as_json)
    else:
        _build(resolved.settings, request, as_json=common.as_json)


def _progress(meter: Meter) -> Callable[[int, int], None]:
    """The readers' progress callback (done, total); the total is known only after they have started."""

    def show(done: int, total: int) -> None:
        meter.total = total
        meter.advance(done - meter.done)

    return show


def _build(settings: Settings, request: BuildMetaRequest, *, as_json: bool) -> None:
    """Build the metadata in this process and its readers, and show the result."""
    from persistworld_cli.data.metadata.ctrl_world_meta import SampleLists, export_ctrl_world
    from persistworld_cli.data.metadata.index import INDEX_FILE, IndexFile
    from persistworld_cli.data.metadata.meta import build_meta
    from persistworld_cli.reports.progress import Meter
    from persistworld_cli.robot.kinematics import forward

    dataset, frames = resolve_path(settings.world.dataset), settings.model.num_frames
    try:
        with Meter("build-meta", 0) as meter:
            report = build_meta(
                dataset,
                num_frames=frames,
                lists=SampleLists(request.lists) if request.lists else None,
                settings=settings,
                hand_position=None if settings.robot.dimensions else lambda joints: forward(joints)[:, :3, 3],
                fresh=request.fresh,
                workers=request.workers,
                progress=_progress(meter),
            )
    except KeyboardInterrupt:
        note("build-meta: stopped; the metadata is unchanged")
        raise
    exported = None
    if request.export:
        folder = dataset / "meta_info" / dataset.resolve().name
        index = IndexFile(report.meta / INDEX_FILE)
        exported = str(export_ctrl_world(index, report.stat, folder, num_frames=frames))
    _warn(report, settings)
    show_result(_machine(report, exported) if as_json else _human(report, exported), as_json=as_json)


def _warn(report: MetaReport, settings: Settings) -> None:
    """Print warnings about the dataset."""
    from persistworld_cli.data.metadata.check_dataset import TOO_FEW
    from persistworld_cli.statistics.paired import FEWEST

    held = report.episodes.get("val", 0)
    if held < FEWEST:
        note(f"{held} of {sum(report.episodes.values())} episodes are held out, under {FEWEST}: {TOO_FEW}")
    left_out = sum(row["episodes"] for row in report.health["unusable"])
    if left_out:
        note(f"{left_out} episodes are left out: see the table; persistworld build-meta --check reports each")
    if (width := len(report.stat.p01)) != (own := settings.model.action_dim):
        fix = f"set model.action_dim = {width}"
        note(f"states have {width} numbers, but model.action_dim = {own}, so training refuses them; {fix}")


def _machine(report: MetaReport, exported: str | None) -> dict[str, Any]:
    """The result for --json."""
    return {
        "meta": str(report.meta),
        "read": report.read,
        "episodes": report.episodes,
        "frames": report.frames,
        "samples": report.samples,
        "state_p01": report.stat.p01.tolist(),
        "state_p99": report.stat.p99.tolist(),
        "joint_velocity_adapter": report.adapter,
        "health": report.health,
        **({"exported": exported} if exported else {}),
    }


def _human(report: MetaReport, exported: str | None) -> dict[str, Any]:
    """The result as tables."""
    health = report.health
    odd = [
        {
            "finding": row["finding"],
            "episodes": row["episodes"],
            "share": f"{row['share']:.1%}",
            "first": _first(row["first"], row["episodes"]),
            "what it means": row["means"],
        }
        for row in (*health["unusable"], *health["findings"])
    ]
    out: dict[str, Any] = {
        "states": [{**row, "clipped": f"{row['clipped']:.2%}"} for row in health["states"]],
        **_adapter_tables(report.adapter),
        "health": odd or "nothing odd",
        "annotations read": report.read,
        "episodes": report.episodes,
        "frames": report.frames,
        "samples": report.samples,
        "frames per episode": "{min}, median {median:g}, {max}".format(**health["length"]),
        "instructions": health["instructions"],
        "success": health["success"],
        "latents": health["latents"],
        "written": str(report.meta),
    }
    if "imported" in health:
        imported = health["imported"]
        absent = f"{imported['not_on_disk']} of them not on disk"
        out["imported"] = f"{imported['folder']}: {imported['episodes']} episodes, {absent}"
    return {**out, "exported": exported} if exported else out


_PREDICTORS = {
    "fitted": "gain x velocity, on held-out episodes",
    "fit": "gain x velocity, on the fitted episodes",
    "scale_0.2": "0.2 x velocity (the controller's bound)",
    "hold": "no motion",
}


def _adapter_tables(adapter: dict[str, Any] | None) -> dict[str, Any]:
    """Gain and error of each joint, and the error of each way to predict."""
    if adapter is None:
        return {"joint-velocity adapter": "not fitted: no annotation has joints and velocities at the raw rate"}
    each = adapter["joint_mae_each"]
    joints = [
        {
            "joint": number + 1,
            "gain": f"{gain:.4f}",
            **{f"error, {name}": f"{each[name][number]:.4f}" for name in ("fitted", "scale_0.2", "hold")},
        }
        for number, gain in enumerate(adapter["gain"])
    ]
    hand = adapter.get("hand_error", {})
    ways = [
        {
            "predicted by": text,
            "joint error, rad": f"{adapter['joint_mae'][name]:.4f}",
            "hand": f"{1000 * hand[name]:.0f} mm" if hand else "-",
        }
        for name, text in _PREDICTORS.items()
    ]
    title = f"joint-velocity adapter: motion per raw frame = gain x velocity (rad; {adapter['episodes']} episodes)"
    return {title: joints, "joint-velocity adapter: mean error over 1 to 15 raw frames": ways}


def _first(names: list[str], count: int) -> str:
    """The first names, with an ellipsis if there are more."""
    return ", ".join(names[:_SHOWN]) + (", ..." if count > _SHOWN else "")


def _check(resolved: Resolved, named: bool, request: BuildMetaRequest, *, as_json: bool) -> None:
    """``--check``: one line per finding; exit code 1 if anything must be fixed."""
    from persistworld_cli.data.metadata.check_dataset import check_dataset
    from persistworld_cli.reports.progress import Meter

    dataset = resolve_path(resolved.settings.world.dataset)
    settings = None if resolved.implied and named else resolved.settings
    with Meter("check", 0) as meter:
        show = _progress(meter)
        report = check_dataset(
            dataset, settings, resolved.label, sample=request.sample, workers=request.workers, progress=show
        )
    rows, errors = report.rows(), report.errors
    verdict = f"{errors} kinds of findings must be fixed" if errors else "fit for use"
    result = {"dataset": str(dataset), "ok": not errors, "errors": errors, "warnings": len(rows) - errors}
    if as_json:
        show_result({**result, "findings": rows, "checked": report.checked}, as_json=True)
    else:
        shown = [
            {**{k: v for k, v in row.items() if k != "kind"}, "first": _first(row["first"], row["count"])}
            for row in rows
        ]
        show_result({"findings": shown or "none", **report.checked, str(dataset): verdict}, as_json=False)
    if errors:
        raise typer.Exit(1)
