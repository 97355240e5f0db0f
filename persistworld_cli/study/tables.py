"""Tables of a blind study, from the dictionary of its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from persistworld_cli.reports.tables import COLOURS, new_table, percent


def study_tables(result: Mapping[str, Any]) -> list[RenderableType]:
    """Preference by camera group, ratings, raters; and verdicts in words.

    Args:
        result: what `study.responses.study_result` returns.
    """
    return [_preference(result), _elo(result), _raters(result), Text(_words(result))]


def _preference(result: Mapping[str, Any]) -> Table:
    table = new_table(
        "Preference: which is closer to the recording",
        ["new against base", "cameras"],
        ["new, base, neither", "prefers new", "kappa", "over episodes", "verdict"],
        'prefers new: "cannot tell" counts half; 95% Wilson interval over responses; p: two-sided binomial of the '
        "decided ones.\nResponses about one episode resemble each other, so the verdict rests on episodes.",
    )
    last = None
    for row in result["preference"]:
        pair = f"{row['new']} against {row['base']}"
        if last not in (None, pair):
            table.add_section()
        style = COLOURS.get(row["verdict"], "")
        table.add_row(
            escape(pair) if pair != last else "",
            row["cameras"],
            ", ".join(str(row[name]) for name in ("prefer_new", "prefer_base", "cannot_tell")),
            Text(f"{percent(row['rate'], row['low'], row['high'])}\np {p_value(row['binomial_p'])}"),
            "-" if row["kappa"] is None else f"{row['kappa']:.2f}\n{row['kappa_words']}",
            Text(_over_episodes(row)),
            Text(row["verdict"], style),
        )
        last = pair
    return table


def _over_episodes(row: Mapping[str, Any]) -> str:
    if row["verdict"] == "too few":
        return f"{row['episodes']} episodes"
    over = percent(row["rate"], row["episodes_low"], row["episodes_high"], f" of {row['episodes']}")
    return f"{over}\np {p_value(row['episodes_p'])}"


def p_value(p: float) -> str:
    """Two digits; small values as a bound."""
    return "<0.001" if p < 0.001 else f"{p:.2g}"


def _elo(result: Mapping[str, Any]) -> Table:
    caption = (
        "maximum likelihood, mean 1500; 95% bootstrap interval over episodes, missing if they are few or all agree"
    )
    if not result["elo_comparable"]:
        caption += "\nno chain of studies connects all models: compare only models that a chain connects"
    table = new_table("Elo", ["model"], ["elo", "95%", "responses"], caption)
    for row in result["elo"]:
        span = "-" if row["low"] is None else f"[{row['low']:.0f}, {row['high']:.0f}]"
        table.add_row(escape(row["model"]), f"{row['elo']:.0f}", span, f"{row['games']:.0f}")
    return table


def _raters(result: Mapping[str, Any]) -> Table:
    table = new_table("Raters", ["rater"], ["responses", "cannot tell", "chose left", "seconds (median)"])
    table.add_column("file", overflow="fold")
    for row in result["raters"]:
        whole = row["responses"] == row["questions"]
        table.add_row(
            escape(row["rater"]),
            Text(f"{row['responses']} of {row['questions']}", "" if whole else "yellow"),
            str(row["cannot_tell"]),
            "-" if row["left"] is None else f"{100 * row['left']:.0f}%",
            "-" if row["median_seconds"] is None else f"{row['median_seconds']:.1f}",
            escape(row["file"]),
        )
    return table


def _words(result: Mapping[str, Any]) -> str:
    """The verdicts in sentences, and the raters whose responses are incomplete."""
    lines = [
        f"{row['new']} against {row['base']}, {row['cameras']} cameras: {row['words']}"
        for row in result["preference"]
        if row["cameras"] == "all" or not any(r["cameras"] == "all" for r in result["preference"])
    ]
    if result["incomplete"]:
        names = ", ".join(
            f"{row['rater']} ({row['responses']} of {row['questions']})"
            for row in result["raters"]
            if row["responses"] < row["questions"]
        )
        lines.append(f"incomplete, counted so far: {names}")
    return "\n".join(lines)
