"""``persistworld verify``: do these weights reproduce the published figures?"""

from __future__ import annotations

from dataclasses import replace

from persistworld_cli.commands.options import DROID, ROLLOUTS, WORLD, Common, setting, with_common
from persistworld_cli.commands.run import execute
from persistworld_cli.config.requests import VERIFY_COUNT, VerifyRequest
from persistworld_cli.errors import UsageError

EXAMPLES = {
    WORLD: (
        "persistworld verify --write-published mine.toml --count 4",
        "persistworld verify --published mine.toml --ckpt bundled:presets/tiny/base",
    ),
    DROID: (
        "persistworld verify --preset ctrl-world --dataset droid_latents",
        "persistworld verify --preset persistworld --dataset droid_latents --num-processes 8 --count 24",
    ),
}
_PUBLISHED = setting("eval.published", "Figures to compare with.  \\[the preset's]", metavar="FILE.toml")


@with_common("full", _PUBLISHED, *ROLLOUTS)
def command(common: Common, request: VerifyRequest) -> None:
    """Load weights, check keys, types and action scale, roll out a few episodes, compare with published figures.

    Prints one block to paste into an issue. Exit code 0: all agrees; 1: something differs, or too few episodes.
    """
    if common.flags["eval.episodes"]:
        if request.count is not None:
            raise UsageError("--count and --episodes both select episodes", where="flags", fix="give one of them")
    elif request.count is None:
        request = replace(request, count=VERIFY_COUNT)
    if request.write_published and common.flags["eval.published"]:
        raise UsageError("--published has no effect with --write-published", where="flags", fix="give one of them")
    execute(common, request)
