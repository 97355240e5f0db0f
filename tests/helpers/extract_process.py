"""Extractions in a process of their own that go on when they are let; and what two trees have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_RUN = """
import json, sys
from pathlib import Path
from data_raw import HEIGHT, WIDTH, encode
from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.extraction.pipeline import extract_latents

def when_let(frames):
    print("batch", flush=True)
    sys.stdin.readline()
    return encode(frames)

world = WorldSettings(height=HEIGHT, width=WIDTH)
raw, out, workers = sys.argv[1:]
report = extract_latents(world, Path(raw), Path(out), when_let, batch_frames=5, workers=int(workers))
print(json.dumps([report.done, report.skipped, report.failed]))
"""


def start_extraction(raw: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    """An extraction of ``raw`` into ``out``: before every batch it prints "batch" and waits for a line, or for the end
    of its input.
    """
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUN, str(raw), str(out), str(workers)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1)


def tree(out: Path) -> dict[str, bytes]:
    """Every file of a processed dataset with its bytes, less the report, which tells of the last run alone."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("extract_report"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
