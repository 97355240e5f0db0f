"""``persistworld pretrain``: teacher-forced training of the world model, or of its VAE."""

from __future__ import annotations

from persistworld_cli.commands.options import DATASET, DROID, STRICT, TRACKER, WORLD, Common, setting, with_common
from persistworld_cli.commands.run import execute
from persistworld_cli.commands.weights import START, start_from
from persistworld_cli.config.requests import PretrainRequest, PretrainVaeRequest, option
from persistworld_cli.errors import UsageError

EXAMPLES = {
    "": ("persistworld pretrain --part vae --updates 4000",),
    WORLD: ("persistworld pretrain --updates 2000",),
    DROID: (
        "persistworld pretrain --preset ctrl-world --dataset droid_latents --num-processes 8",
        "persistworld pretrain --preset ctrl-world-svd --dataset droid_latents --num-processes 8",
    ),
}


@with_common(
    "full",
    DATASET,
    setting("pretrain.updates", "Updates in total."),
    setting("pretrain.batch", "Clips per update, over all processes."),
    setting("pretrain.lr", "Learning rate."),
    setting("pretrain.seed", "Random seed."),
    TRACKER,
    STRICT,
    cost=True,
)
def command(
    common: Common,
    request: PretrainRequest,
    part: str = option("world", "What is trained: world (UNet and action encoder) or vae."),
    ckpt: str | None = START,
) -> None:
    """Train the world model on recorded clips (teacher forcing), or its VAE on recorded images."""
    if part not in ("world", "vae"):
        raise UsageError(f"unknown part '{part}'", where="--part", fix="known: vae, world")
    start_from(common, ckpt, adapter_fits=True)
    if part == "world":
        execute(common, request)
        return
    if request.scratch or request.vae:
        raise UsageError("--scratch and --vae apply to the world model only", where="--part vae", fix="leave them out")
    for table in (common.flags, common.names):
        table |= {key.replace("pretrain.", "vae."): table.pop(key) for key in list(table) if "pretrain." in key}
    own = PretrainVaeRequest(resume=request.resume, resume_from=request.resume_from, with_changes=request.with_changes)
    execute(common, own)
