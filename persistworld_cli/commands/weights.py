"""``--ckpt`` in every command, and which weights a command uses and why."""

from __future__ import annotations

from persistworld_cli.commands.options import Common
from persistworld_cli.config import requests
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import Resolved
from persistworld_cli.config.requests import EvalRequest, PretrainRequest, ReplayRequest, Request, option
from persistworld_cli.config.weight_names import NO_ADAPTER, adapter_name, adapter_on_disk, require_one_adapter
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
    "Weights to start from: a file, a folder, a hub id, or bundled:NAME.",
    flag="--ckpt",
    metavar="PATH|HUB_ID",
)


def start_from(common: Common, ckpt: str | None, *, adapter_fits: bool) -> None:
    """Turn a training's ``--ckpt`` into settings, added to the flags.

    Whole weights replace ``model.ckpt`` and any adapter; an adapter is put on ``model.ckpt``, as in inference.

    Args:
        common: the shared options. A dry run does not contact the hub and treats its repositories as whole weights.
        ckpt: the option's value, or None.
        adapter_fits: whether the training can start from weights with an adapter merged into them.

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
            f"'{ckpt}' is an adapter: post-training would write another one, for weights that no file holds",
            where="--ckpt",
            fix=f"merge it first: persistworld export WEIGHTS --adapter {ckpt} --to safetensors -o merged.safetensors, "
            "then --ckpt merged.safetensors; or continue its run: --resume-from",
        )
    common.flags.update({"model.adapter": ckpt})


def _on_hub(ckpt: str) -> bool:
    """Whether a repository holds an adapter, by its file names."""
    from persistworld_cli.checkpoints.sources import adapter_at

    return bool(adapter_at(ckpt))


def weights_rows(resolved: Resolved, request: Request) -> list[dict[str, str]]:
    """Which weights a task uses: rows of ``use``, ``weights``, ``adapter`` ("" for none) and ``why``.

    Nothing is fetched: only the name of a hub repository is known.
    """
    model = resolved.settings.model
    overlay = adapter_name(model.adapter)

    def why(key: str) -> str:
        return f"{key}, {resolved.origin[key]}"

    def row(use: str, weights: str, why: str, adapter: str = "") -> dict[str, str]:
        return {"use": use, "weights": weights, "adapter": adapter, "why": why}

    if isinstance(request, PretrainRequest) and request.scratch:
        vae = "--vae" if request.vae else why("model.ckpt")
        return [
            row("begins from", "random weights", "--scratch"),
            row("VAE of", request.vae or model.ckpt, vae),
        ]
    if isinstance(request, PretrainRequest | requests.PostTrainRequest):
        used = overlay if isinstance(request, PretrainRequest) else ""
        return [row("begins from", model.ckpt, why("model.adapter" if used else "model.ckpt"), used)]
    if not isinstance(request, _INFERENCE):
        return []
    if isinstance(request, ReplayRequest) and (request.ckpts or request.adapters):
        named = [(one, adapter_on_disk(one)) for one in request.ckpts or [model.ckpt]]
        return [
            *(row("runs", model.ckpt if own else one, "--ckpt", own) for one, own in named),
            *(row("on them", "", "--adapter", "" if one in NO_ADAPTER else one) for one in request.adapters),
        ]
    if model.inference:
        own = adapter_on_disk(model.inference)
        require_one_adapter(model.inference, own, overlay)
        more = "" if own or resolve_path(model.inference).exists() else f"; if it holds an adapter, on {model.ckpt}"
        weights = model.ckpt if own else model.inference
        rows = [row("runs", weights, why("model.inference") + more, own or overlay)]
    else:
        rows = [row("runs", model.ckpt, why("model.adapter" if overlay else "model.ckpt"), overlay)]
    compared = isinstance(request, EvalRequest) or _verifies_gain(resolved, request)
    if isinstance(request, EvalRequest) and request.baseline:
        rows.append(row("compared with", request.baseline, "--baseline"))
    elif compared and model.ckpt and (rows[0]["weights"] != model.ckpt or rows[0]["adapter"]):
        rows.append(row("compared with", model.ckpt, why("model.ckpt")))
    return rows


def _verifies_gain(resolved: Resolved, request: Request) -> bool:
    """Whether ``verify`` rolls the base out too."""
    if not isinstance(request, requests.VerifyRequest) or request.alone:
        return False
    return bool(request.write_published or has_gain(resolved.settings.eval.published))


def weights_lines(rows: list[dict[str, str]]) -> list[str]:
    """The rows of `weights_rows` as text, one line each."""
    lines = []
    for row in rows:
        on = f" with adapter {row['adapter']}" if row["adapter"] else ""
        named = row["weights"] or ("" if on else "no weights yet")
        lines.append(f"{row['use']} {named}{on}".replace("  ", " ") + f" ({row['why']})")
    return lines
