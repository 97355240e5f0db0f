"""The model card beside trained weights: README.md as the hub reads it, with the training and its last evaluation.

A training and an evaluation each replace one section, between its two comments; the rest is the user's to edit.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persistworld_cli import __version__
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.keys import robot_name, state_names
from persistworld_cli.config.requests import TaskRequest
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, Settings
from persistworld_cli.config.weight_names import CARD
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import jsonable, write_text
from persistworld_cli.hub import is_hub_id
from persistworld_cli.reports.tables import eval_table, plain

_TRAINING, _EVALUATION = "training", "evaluation"  # sections
_NO_EVALUATION = "## Evaluation\n\nNone yet: `persistworld eval` with these weights adds its table."
_HELD = re.compile(r"<!-- (\d+) rollouts, protocol (\S+) -->")  # of the evaluation in a card

logger = logging.getLogger(__name__)


def read_card(folder: Path) -> str:
    """The card of a folder, or the user's own file of its name; "" if there is none."""
    path = folder / CARD
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def write_card(
    folder: Path, before: str, settings: Settings, request: TaskRequest, stat: ActionStat, result: Mapping[str, Any]
) -> None:
    """Write the card of a training.

    Args:
        folder: of the weights.
        before: its card before this training (`read_card`): what is outside the sections stays, and an evaluation if
            nothing was trained since.
        settings, request: the training.
        stat: its action scale.
        result: its numbers, by name; what is no number is left out.

    Raises:
        CannotWrite: the disk is full or read-only.
    """
    adapter = request.task == "post-train"
    base = "" if getattr(request, "scratch", False) else settings.model.ckpt
    options = settings.post_train if adapter else settings.pretrain
    text = before or _new_card(settings, request, base, "adapter" if adapter else "finetune")
    card = _replaced(text, _TRAINING, _training(settings, request, base, options, stat, result))
    write_text(folder / CARD, card if card == before else _replaced(card, _EVALUATION, _NO_EVALUATION))


def add_evaluation(result: Mapping[str, Any]) -> None:
    """Put an evaluation (``eval.json``) into the card beside the last of its models, if it has one.

    An evaluation of more rollouts under another protocol stays: a quick look does not replace it.
    """
    model = result["models"][-1]
    source = resolve_path(model["adapter"] or model["ckpt"])
    folder = source if source.is_dir() else source.parent
    text = read_card(folder)
    if _comments(_EVALUATION)[0] not in text:
        return
    rollouts, protocol = result["n"]["rollouts"], result["protocol"]["hash"]
    held = _HELD.search(text.partition(_comments(_EVALUATION)[0])[2])
    if held and int(held[1]) > rollouts and held[2] != protocol:
        logger.info("the model card keeps its evaluation of %s rollouts; this one has %s", held[1], rollouts)
        return
    table = (
        f"<!-- {rollouts} rollouts, protocol {protocol} -->\n## Evaluation\n\n"
        f"`{result['command']}` on {result['date']}, protocol `{protocol}`: "
        f"results of this hash are comparable.\n\n```text\n{plain(eval_table(result)).strip()}\n```"
    )
    try:
        write_text(folder / CARD, _replaced(text, _EVALUATION, table))
    except PersistWorldError as error:
        logger.warning("the model card is left as it is: %s", error)
        return
    logger.info("the model card has this evaluation: %s", folder / CARD)


def _new_card(settings: Settings, request: TaskRequest, base: str, relation: str) -> str:
    """A card without a training."""
    head = [
        "library_name: persistworld",
        "pipeline_tag: robotics",
        "tags: [world-model, video-generation]",
        f"metrics: {json.dumps(list(settings.rewards.weights))}",
    ]
    if is_hub_id(base) and not resolve_path(base).exists():
        head += [f"base_model: {base}", f"base_model_relation: {relation}"]
    kind = "A LoRA adapter (PEFT) and action encoder for an" if relation == "adapter" else "An"
    sections = "\n\n".join("\n".join(_comments(name)) for name in (_TRAINING, _EVALUATION))
    return f"""---
{chr(10).join(head)}
# license: yours to choose, for instance mit
---

# {request.output.absolute().name}

{kind} action-conditioned video world model of a robot ({robot_name(settings)}), trained with
persistworld. With the preset or TOML file of its training:

```bash
persistworld replay --preset PRESET --ckpt OWNER/NAME
```

{sections}
"""


def _training(
    settings: Settings,
    request: TaskRequest,
    base: str,
    options: PretrainSettings | PostTrainSettings,
    stat: ActionStat,
    result: Mapping[str, Any],
) -> str:
    """The section on the training."""
    defaults = asdict(type(options)())
    changed = [f"{k} = {json.dumps(jsonable(v))}" for k, v in asdict(options).items() if v != defaults[k]]
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
    world = settings.world
    rows = {
        "version": __version__,
        "command": f"`{shlex.join(request.command)}`",
        "begun from": f"`{base}`" if base else "random weights",
        "dataset": f"`{world.dataset}`, cameras {', '.join(world.cameras)}, {world.rate_hz:g} Hz",
        **{name.replace("_", " "): f"{value:.4g}" for name, value in numbers.items()},
    }
    scale = [
        f"| {name} | {low:.6g} | {high:.6g} |"
        for name, low, high in zip(state_names(len(stat.p01), settings), stat.p01, stat.p99, strict=True)
    ]
    return "\n".join(
        [
            "## Training\n\n| | |\n|---|---|",
            *(f"| {name} | {text} |" for name, text in rows.items()),
            f"\nSettings other than this version's defaults:\n\n```toml\n[{request.task.replace('-', '_')}]",
            *changed,
            "```\n\nAction scale, also in the weights: states are scaled from these percentiles to -1 and 1.\n",
            "| number | 1% | 99% |\n|---|---|---|",
            *scale,
        ]
    )


def _comments(section: str) -> tuple[str, str]:
    """The comments before and after a section."""
    return f"<!-- persistworld: {section} -->", f"<!-- persistworld: end of {section} -->"


def _replaced(card: str, section: str, text: str) -> str:
    """A card with another text in one section; a section that the user removed is added at the end."""
    begin, end = _comments(section)
    if begin not in card or end not in card:
        card = f"{card.rstrip()}\n\n{begin}\n{end}\n"
    head, _, rest = card.partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
