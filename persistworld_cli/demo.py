"""`make demo`: the whole pipeline on the bundled world, each stage through the public command.

Every stage resumes or repeats cheaply, so a second run is faster. Stage times go to `outputs/demo/demo.json`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from persistworld_cli.console import stderr_console, stdout_console
from persistworld_cli.files import write_json
from persistworld_cli.reports.tables import new_table

OUT = Path("outputs/demo")
DATASET = str(OUT / "world")
ADAPTER = str(OUT / "post-train" / "weights" / "adapter")
SHIPPED = "bundled:presets/tiny/adapter"
console = stderr_console()


def stages() -> list[tuple[str, str, list[str]]]:
    """(title, name of the output folder, arguments of `persistworld`) of every stage."""
    data = ["--dataset", DATASET]
    return [
        ("recordings to latents", "extract", ["extract-latents", "bundled:dataset_example/world", DATASET]),
        ("index and action statistics", "meta", ["build-meta", DATASET]),
        ("post-train on own rollouts", "post-train", ["post-train", *data]),
        ("base against this short run", "eval", ["eval", *data, "--ckpt", ADAPTER]),
        ("base against the shipped longer run", "eval-shipped", ["eval", *data, "--ckpt", SHIPPED]),
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
        if folder == "eval-shipped":
            share_rollouts()
        clock = time.monotonic()
        command = [sys.executable, "-m", "persistworld_cli", *arguments, "--preset", "tiny"]
        if folder != "meta":
            command += ["--output", str(OUT / folder)]
        code = subprocess.run(command, check=False).returncode
        spent[folder] = time.monotonic() - clock
        if code:
            console.print(f"stage '{folder}' ended with code {code}; `make demo` continues here", style="red")
            return code
    summary(spent, time.monotonic() - start)
    return 0


def share_rollouts() -> None:
    """Let the second evaluation reuse the base's rollouts, which are stored by the hash of weights and protocol."""
    link = OUT / "eval-shipped" / "rollouts"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(Path("..") / "eval" / "rollouts", target_is_directory=True)


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
    except KeyboardInterrupt:
        console.print("interrupted; run `make demo` again to continue")
        sys.exit(130)
