"""``--ckpt`` in every command, and which weights a command is going to take and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persistworld_cli.config.presets import Resolved, load_settings
from persistworld_cli.config.weight_names import NO_ADAPTER, adapter_name, adapter_on_disk, on_disk
from persistworld_cli.errors import UsageError

INFERENCE = ("eval", "verify", "frontier", "replay", "drive", "pi-rollout")
TRAINING = ("pretrain", "post-train")
# Spellings of the settings that ``--ckpt`` stands for.
CKPT_FLAG = {"model.ckpt": "--ckpt", "model.inference": "--ckpt"}


def start_flags(ckpt: str | None, *, adapter_fits: bool, dry_run: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings that a training's ``--ckpt`` stands for, and their spellings.

    Whole weights take the place of ``model.ckpt`` and stand alone; an adapter goes on ``model.ckpt``, as in inference.

    Args:
        ckpt: what was given, or None.
        adapter_fits: whether the training can begin from weights with an adapter merged into them.
        dry_run: the hub is not asked what a repository holds; it is then taken for whole weights.

    Raises:
        UsageError: an adapter where `adapter_fits` is false.
    """
    if ckpt is None:
        return {}, {}
    if not (adapter_on_disk(ckpt) if dry_run or on_disk(ckpt) else _on_hub(ckpt)):
        return {"model.ckpt": ckpt, "model.adapter": ""}, {"model.ckpt": "--ckpt", "model.adapter": "--ckpt"}
    if not adapter_fits:
        raise UsageError(
            f"'{ckpt}' is an adapter: what post-training writes is an adapter too, and no file would hold the weights "
            "that it belongs on",
            where="--ckpt",
            fix=f"merge it first: persistworld export WEIGHTS --adapter {ckpt} --to safetensors -o merged.safetensors, "
            "then --ckpt merged.safetensors; or go on with its run: --resume-from",
        )
    return {"model.adapter": ckpt}, {"model.adapter": "--ckpt"}


def _on_hub(ckpt: str) -> bool:
    """Whether a repository holds an adapter, by its file names."""
    from persistworld_cli.checkpoints.sources import adapter_at

    return bool(adapter_at(ckpt))


def weights_rows(task: str, resolved: Resolved, job: dict[str, Any]) -> list[dict[str, str]]:
    """Which weights a task takes: rows of ``use``, ``weights``, ``adapter`` ("" for none) and ``why``.

    Nothing is fetched: what lies in a repository of the hub is told by its name alone.
    """
    model = resolved.settings.model

    def why(key: str) -> str:
        return f"{key}, {resolved.origin[key]}"

    overlay = adapter_name(model.adapter)
    if task in TRAINING:
        if job.get("scratch"):
            named = why("model.ckpt") if not job.get("vae") else "--vae"
            return [
                {"use": "begins from", "weights": "random weights", "adapter": "", "why": "--scratch"},
                {"use": "VAE of", "weights": str(job.get("vae") or model.ckpt), "adapter": "", "why": named},
            ]
        used = overlay if task == "pretrain" else ""
        key = "model.adapter" if used else "model.ckpt"
        return [{"use": "begins from", "weights": model.ckpt, "adapter": used, "why": why(key)}]
    if task not in INFERENCE:
        return []
    if job.get("ckpts") or job.get("adapters"):  # of a replay, which may show several side by side
        return [
            *({"use": "runs", **_row(one, model.ckpt), "why": "--ckpt"} for one in job.get("ckpts") or [model.ckpt]),
            *(
                {"use": "on them", "weights": "", "adapter": "" if one in NO_ADAPTER else one, "why": "--adapter"}
                for one in job.get("adapters") or []
            ),
        ]
    if model.inference:
        row = _row(model.inference, model.ckpt)
        known = row["adapter"] or on_disk(model.inference)
        more = "" if known else f"; if it holds an adapter, on {model.ckpt}"
        rows = [{"use": "runs", **row, "adapter": row["adapter"] or overlay, "why": why("model.inference") + more}]
    else:
        key = "model.adapter" if overlay else "model.ckpt"
        rows = [{"use": "runs", "weights": model.ckpt, "adapter": overlay, "why": why(key)}]
    alone = rows[0]["weights"] == model.ckpt and not rows[0]["adapter"]
    if task == "eval" and job.get("baseline"):
        rows.append({"use": "compared with", "weights": str(job["baseline"]), "adapter": "", "why": "--baseline"})
    elif not alone and (task == "eval" or (task == "verify" and _verifies_gain(resolved, job))):
        rows.append({"use": "compared with", "weights": model.ckpt, "adapter": "", "why": why("model.ckpt")})
    return rows


def _verifies_gain(resolved: Resolved, job: Mapping[str, Any]) -> bool:
    """Whether ``verify`` rolls the base out too."""
    from persistworld_cli.evaluation.published import has_gain

    return not job.get("alone") and bool(job.get("write") or has_gain(resolved.settings.eval.published))


def _row(weights: str, ckpt: str) -> dict[str, str]:
    own = adapter_on_disk(weights)
    return {"weights": ckpt if own else weights, "adapter": own}


def weights_lines(rows: list[dict[str, str]]) -> list[str]:
    """Those rows as text, one line each."""
    lines = []
    for row in rows:
        on = f" with adapter {row['adapter']}" if row["adapter"] else ""
        lines.append(f"{row['use']} {row['weights']}{on}".replace("  ", " ") + f" ({row['why']})")
    return lines


def hint_at_other_start(resolved: Resolved) -> str:
    """What a pretraining from the finished Ctrl-World says of the other preset; "" where that does not fit."""
    finished = load_settings("ctrl-world", (), {}, env={}).settings.model.ckpt
    if resolved.settings.model.ckpt != finished:
        return ""
    return "these are finished weights, which learn on; to train from Stable Video Diffusion: --preset ctrl-world-svd"
