"""``--ckpt`` in every command, and which weights a command is going to take and why."""

from __future__ import annotations

from persistworld_cli.commands.options import Common
from persistworld_cli.config import requests
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import Resolved, load_settings
from persistworld_cli.config.requests import EvalRequest, PretrainRequest, ReplayRequest, Request, option
from persistworld_cli.config.weight_names import NO_ADAPTER, adapter_name, adapter_on_disk
from persistworld_cli.errors import UsageError
from persistworld_cli.evaluation.published import has_gain

_INFERENCE = (
    EvalRequest,
    requests.VerifyRequest,
    requests.FrontierRequest,
    ReplayRequest,
    requests.DriveRequest,
    requests.PolicyRolloutRequest,
)


START = option(
    None,
    "Weights to begin from: a file, a folder, a hub id, or bundled:NAME.",
    flag="--ckpt",
    metavar="PATH|HUB_ID",
)


def start_from(common: Common, ckpt: str | None, *, adapter_fits: bool) -> None:
    """Put the settings that a training's ``--ckpt`` means among the flags.

    Whole weights take the place of ``model.ckpt`` and stand alone; an adapter goes on ``model.ckpt``, as in inference.

    Args:
        common: the shared options. In a dry run the hub is not asked: a repository there is taken for whole weights.
        ckpt: what was given, or None.
        adapter_fits: whether the training can begin from weights with an adapter merged into them.

    Raises:
        UsageError: an adapter where `adapter_fits` is false.
    """
    if ckpt is None:
        return
    common.names.update({"model.ckpt": "--ckpt", "model.adapter": "--ckpt"})
    if not (adapter_on_disk(ckpt) if common.dry_run or resolve_path(ckpt).exists() else _on_hub(ckpt)):
        common.flags.update({"model.ckpt": ckpt, "model.adapter": ""})
        return
    if not adapter_fits:
        raise UsageError(
            f"'{ckpt}' is an adapter: what post-training writes is an adapter too, and no file would hold the weights "
            "that it belongs on",
            where="--ckpt",
            fix=f"merge it first: persistworld export WEIGHTS --adapter {ckpt} --to safetensors -o merged.safetensors, "
            "then --ckpt merged.safetensors; or go on with its run: --resume-from",
        )
    common.flags.update({"model.adapter": ckpt})


def _on_hub(ckpt: str) -> bool:
    """Whether a repository holds an adapter, by its file names."""
    from persistworld_cli.checkpoints.sources import adapter_at

    return bool(adapter_at(ckpt))


def weights_rows(resolved: Resolved, request: Request) -> list[dict[str, str]]:
    """Which weights a task takes: rows of ``use``, ``weights``, ``adapter`` ("" for none) and ``why``.

    Nothing is fetched: what lies in a repository of the hub is known by its name alone.
    """
    model = resolved.settings.model

    def why(key: str) -> str:
        return f"{key}, {resolved.origin[key]}"

    overlay = adapter_name(model.adapter)
    if isinstance(request, PretrainRequest) and request.scratch:
        named = "--vae" if request.vae else why("model.ckpt")
        return [
            {"use": "begins from", "weights": "random weights", "adapter": "", "why": "--scratch"},
            {"use": "VAE of", "weights": request.vae or model.ckpt, "adapter": "", "why": named},
        ]
    if isinstance(request, PretrainRequest | requests.PostTrainRequest):
        used = overlay if isinstance(request, PretrainRequest) else ""
        key = "model.adapter" if used else "model.ckpt"
        return [{"use": "begins from", "weights": model.ckpt, "adapter": used, "why": why(key)}]
    if not isinstance(request, _INFERENCE):
        return []
    if isinstance(request, ReplayRequest) and (request.ckpts or request.adapters):
        return [
            *({"use": "runs", **_row(one, model.ckpt), "why": "--ckpt"} for one in request.ckpts or [model.ckpt]),
            *(
                {"use": "on them", "weights": "", "adapter": "" if one in NO_ADAPTER else one, "why": "--adapter"}
                for one in request.adapters
            ),
        ]
    if model.inference:
        row = _row(model.inference, model.ckpt)
        known = row["adapter"] or resolve_path(model.inference).exists()
        more = "" if known else f"; if it holds an adapter, on {model.ckpt}"
        rows = [{"use": "runs", **row, "adapter": row["adapter"] or overlay, "why": why("model.inference") + more}]
    else:
        key = "model.adapter" if overlay else "model.ckpt"
        rows = [{"use": "runs", "weights": model.ckpt, "adapter": overlay, "why": why(key)}]
    alone = rows[0]["weights"] == model.ckpt and not rows[0]["adapter"]
    if isinstance(request, EvalRequest) and request.baseline:
        rows.append({"use": "compared with", "weights": request.baseline, "adapter": "", "why": "--baseline"})
    elif not alone and (isinstance(request, EvalRequest) or _verifies_gain(resolved, request)):
        rows.append({"use": "compared with", "weights": model.ckpt, "adapter": "", "why": why("model.ckpt")})
    return rows


def _verifies_gain(resolved: Resolved, request: Request) -> bool:
    """Whether ``verify`` rolls the base out too."""
    if not isinstance(request, requests.VerifyRequest) or request.alone:
        return False
    return bool(request.write_published or has_gain(resolved.settings.eval.published))


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


def hints(resolved: Resolved, request: Request) -> list[str]:
    """What a pretraining from the finished Ctrl-World says of the other preset; nothing where that does not fit."""
    finished = load_settings("ctrl-world", (), {}, env={}).model.ckpt
    if not isinstance(request, PretrainRequest) or request.scratch or resolved.settings.model.ckpt != finished:
        return []
    return ["these are finished weights, which learn on; to train from Stable Video Diffusion: --preset ctrl-world-svd"]
