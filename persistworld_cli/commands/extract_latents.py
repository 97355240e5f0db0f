"""``persistworld extract-latents``: raw LeRobot recordings -> latents, videos and annotations."""

from __future__ import annotations

from dataclasses import replace

from persistworld_cli.commands.options import Common, setting, with_common
from persistworld_cli.commands.run import execute
from persistworld_cli.config.requests import ExtractRequest
from persistworld_cli.launch.environment import cores

EXAMPLES = {
    "": ("persistworld extract-latents",),
    "With DROID in data/droid_1.0.1 and GPUs (README.md)": (
        "persistworld extract-latents data/droid_1.0.1 data/droid_latents --preset ctrl-world --num-processes 8",
        "persistworld extract-latents data/droid_1.0.1 data/droid_latents --preset ctrl-world --episodes 0:100,199",
    ),
}


@with_common(
    "full",
    setting("world.raw", "Raw LeRobot dataset (v2.1 or v3.0).  \\[world.raw]", "RAW", metavar="RAW"),
    setting("world.dataset", "Processed dataset to write.  \\[world.dataset]", "OUT", metavar="OUT"),
    setting(
        "world.val_rule",
        "id-ends-99 (DROID), info-splits or every-N.  \\[world.val_rule]",
        "--split-rule",
        metavar="RULE",
    ),
)
def command(common: Common, request: ExtractRequest) -> None:
    """Encode recordings: raw LeRobot episodes become latents, small videos and annotations.

    Finished episodes are kept, so the same command continues a run that was stopped, and several runs may share one
    OUT. An episode that cannot be read is skipped and listed with its reason at the end and in OUT/extract_report.json;
    the exit code is then 1.
    """
    execute(common, replace(request, cores=cores()))
