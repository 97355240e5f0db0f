"""`make demo`: the whole pipeline on the bundled world, each stage through the public command.

Its post-training is short, and evaluated on a few episodes. The evaluation of the shipped adapter, which learned for
longer, is shown as it was measured before shipping, with the hashes of its weights.

Every stage resumes or repeats cheaply, so a second run is faster. Stage times go to `outputs/demo/demo.json`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from persistworld_cli.checkpoints.references import sha256_of
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.console import show_error, stderr_console, stdout_console
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import write_json
from persistworld_cli.read_files import read_json
from persistworld_cli.reports.tables import eval_tables, new_table, spaced

OUT = Path("outputs/demo")
DATASET = str(OUT / "world")
ADAPTER = str(OUT / "post-train" / "weights" / "adapter")
EPISODES = "60,61,62,63,64,65"  # of its own evaluation
SHIPPED = "bundled:presets/tiny/eval.json"
console = stderr_console()


def stages() -> list[tuple[str, str, list[str]]]:
    """(title, name of the output folder, arguments of `persistworld`) of every stage."""
    data = ["--dataset", DATASET]
    return [
        ("recordings to latents", "extract", ["extract-latents", "bundled:dataset_example/world", DATASET]),
        ("index and action statistics", "meta", ["build-meta", DATASET]),
        ("post-train on own rollouts", "post-train", ["post-train", *data]),
        ("base against this short run", "eval", ["eval", *data, "--episodes", EPISODES, "--ckpt", ADAPTER]),
        ("one recorded episode, predicted", "replay", ["replay", *data, "--steps", "12", "--ckpt", ADAPTER]),
        ("drive it by keys", "drive", ["drive", *data, "--keys", "lllrrr", "--adapter", ADAPTER]),
    ]


def main() -> int:
    """Run the stages in order; return the exit code of the first that fails, else 0."""
    start = time.monotonic()
    spent: dict[str, float] = {}
    plan = stages()
    for number, (what, folder, arguments) in enumerate(plan, 1):
        console.rule(f"[bold]{number}/{len(plan)} {what}", align="left")
        shown = " ".join(["persistworld", *arguments])
        console.print(f"$ {shown}", style="dim", highlight=False)
        clock = time.monotonic()
        command = [sys.executable, "-m", "persistworld_cli", *arguments, "--preset", "tiny"]
        if folder != "meta":
            command += ["--output", str(OUT / folder)]
        code = subprocess.run(command, check=False).returncode
        spent[folder] = time.monotonic() - clock
        if code:
            console.print(f"stage '{folder}' ended with code {code}; `make demo` continues here", style="red")
            return code
    console.rule("[bold]what a longer post-training reaches", align="left")
    show_shipped()
    summary(spent, time.monotonic() - start)
    return 0


def show_shipped() -> None:
    """Print the shipped adapter's evaluation, as measured before shipping.

    Raises:
        PersistWorldError: it is of other weights than those shipped.
    """
    path = resolve_path(SHIPPED)
    result = read_json(path, "unreadable result")
    for model in result["models"]:
        for part in ("ckpt", "adapter"):
            if sha256_of(model[part]) != model[f"{part}_sha256"]:
                what = f"the shipped result is of other weights than {model[part]}"
                raise PersistWorldError(what, where=str(path), fix="put both files back as they were shipped")
    hashes = {model["label"]: model["adapter_sha256"] or model["ckpt_sha256"] for model in result["models"]}
    shown = ", ".join(f"{label} {sha256[:12]}" for label, sha256 in hashes.items())
    console.print(f"shipped result, not computed here (SHA-256: {shown}). To compute it:", highlight=False)
    console.print("$ persistworld eval --ckpt bundled:presets/tiny/adapter", style="dim", highlight=False)
    stdout_console().print(spaced(eval_tables(result)))


def summary(spent: dict[str, float], total: float) -> None:
    """Print the time and the output folder of each stage."""
    table = new_table("make demo", ["stage", "where"], ["seconds"])
    for folder, seconds in spent.items():
        table.add_row(folder, str(DATASET if folder in ("extract", "meta") else OUT / folder), f"{seconds:.0f}")
    table.add_row("all", "", f"{total:.0f}")
    stdout_console().print(table)
    write_json(OUT / "demo.json", {"seconds": spent, "total": total})
    images = sorted(p for p in OUT.rglob("*") if p.suffix in (".png", ".mp4", ".html") and "world" not in p.parts)
    console.print("images, videos and pages:")
    for path in images:
        console.print(f"  {path}", highlight=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PersistWorldError as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("interrupted; run `make demo` again to continue")
        sys.exit(130)
