"""``persistworld inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persistworld_cli.commands.options import TRAINED, Common, with_common
from persistworld_cli.commands.run import resolve_if_named, show_plan, show_result, write_json
from persistworld_cli.config.requests import InspectRequest
from persistworld_cli.config.settings import Settings
from persistworld_cli.console import note, stdout_console
from persistworld_cli.cost.report import BYTES, amount

EXAMPLES = {
    "": ("persistworld inspect bundled:presets/tiny/base",),
    TRAINED: ("persistworld inspect outputs/post-train-tiny/weights/adapter",),
    "With internet, which downloads the weights": (
        "persistworld inspect yjguo/Ctrl-World",
        "persistworld inspect yjguo/Ctrl-World:checkpoint-10000.pt",
    ),
}


@with_common("none", without=("output",))
def command(common: Common, request: InspectRequest) -> None:
    """Describe a checkpoint: world model, VAE or adapter; its parts, types and SHA-256; the presets it fits.

    With --preset it is compared with that preset too, which may be a file of your own.
    """
    resolved = resolve_if_named(common)
    if common.dry_run:
        show_plan(common, request, resolved)
        return
    note(f"inspect: reading {request.ckpt}")
    result = _inspect(request.ckpt, resolved.settings if resolved else None)
    if common.as_json:
        write_json(result)
    else:
        _show(result)


def _inspect(ckpt: str, compare: Settings | None) -> dict[str, Any]:
    """Describe the checkpoint: reads names and shapes, then every byte once for the hash."""
    from persistworld_cli.checkpoints.inspection import describe
    from persistworld_cli.checkpoints.references import sha256_of

    result = describe(ckpt, compare)
    rows, root = result["files"], Path(result["path"])
    for row in rows:
        path = Path(row["file"])
        row["file"] = str(path.relative_to(root)) if path != root else path.name
        row["sha256"] = sha256_of(str(path))
    result["sha256"] = rows[0]["sha256"] if len(rows) == 1 else None
    return result


def _show(result: dict[str, Any]) -> None:
    """Print a summary, then the parts and files."""
    console, types = stdout_console(), ", ".join(result["dtypes"])
    fits = f"fits preset {' or '.join(result['fits'])}" if result["fits"] else "fits no bundled preset"
    console.print(f"{result['kind']}, {fits}", style="bold", markup=False, highlight=False, soft_wrap=True)
    counts = f"{result['parameters']:,} parameters in {result['tensors']:,} tensors, {types}; {result['layers']}"
    for line in (result["path"], counts, *_more(result), ""):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    parts = [
        {
            "part": row["part"],
            "tensors": f"{row['tensors']:,}",
            "parameters": f"{row['parameters']:,}",
            "type": row["dtype"],
        }
        for row in result["parts"]
    ]
    files = [
        {"file": row["file"], "size": amount(row["bytes"], BYTES), "SHA-256": row["sha256"]} for row in result["files"]
    ]
    show_result({"parts": parts, "files": files}, as_json=False)


def _more(result: dict[str, Any]) -> list[str]:
    """Lines about properties that only some checkpoints have."""
    lines = []
    if own := result["adapter"]:
        encoder = "with" if own["action_encoder"] else "without"
        lines.append(
            f"{own['type']} of rank {own['rank']}, alpha {own['alpha']} on {own['modules']} layers "
            f"({', '.join(own['targets'])}), {encoder} an action encoder"
        )
    if result["merged_adapter"]:
        lines.append(f"an adapter was merged into it, SHA-256 {result['merged_adapter']}")
    if scale := result["action_scale"]:
        pairs = zip(scale["state_01"], scale["state_99"], strict=True)
        lines.append(f"actions are scaled from {', '.join(f'{low:.3g}..{high:.3g}' for low, high in pairs)}")
    elif result["fits"] and result["kind"] not in ("VAE", "UNet"):
        lines.append("has no action scale: give it with model.stat")
    if result["lacks"]:
        lines.append(f"lacks {', '.join(result['lacks'])}")
    if near := result["nearest"]:
        lines.append(f"nearest is preset {near['preset']}: {near['misfit']}")
    if "own_preset" in result:
        lines.append(f"your preset: {result['own_preset']}")
    return lines
