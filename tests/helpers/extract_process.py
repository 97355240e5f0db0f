"""Extractions in a process of their own, slow enough to be killed; and what two trees have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_RUN = """
import json, sys, time
from pathlib import Path
from data_raw import HEIGHT, WIDTH, encode
from persistworld_cli.config.settings import WorldSettings
from persistworld_cli.extraction.pipeline import extract_latents

def slow(frames):
    time.sleep(float(sys.argv[3]))
    return encode(frames)

world = WorldSettings(height=HEIGHT, width=WIDTH)
report = extract_latents(world, Path(sys.argv[1]), Path(sys.argv[2]), slow, batch_frames=5, workers=int(sys.argv[4]))
print(json.dumps([report.done, report.skipped, report.failed]))
"""


def start_extraction(raw: Path, out: Path, pause_s: float, workers: int) -> subprocess.Popen[str]:
    """An extraction of ``raw`` into ``out`` that sleeps before every batch."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUN, str(raw), str(out), str(pause_s), str(workers)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tree(out: Path) -> dict[str, bytes]:
    """Every file of a processed dataset with its bytes, less the report, which tells of the last run alone."""
    files = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("extract_report"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
