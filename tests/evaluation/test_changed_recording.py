"""Finished rollouts are those of the recording as it is: an episode that was made anew is rolled out again."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from eval_world import make_world, settings

from persistworld_cli.config.requests import EvalRequest
from persistworld_cli.evaluation import run as eval_run


def test_only_what_changed_is_rolled_out_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_world(tmp_path, {"9": 10, "29": 10})
    own, request = (
        settings(tmp_path, episodes=("9", "29"), sheets=0, steps=1, batch=1),
        EvalRequest(output=tmp_path / "out"),
    )

    def times() -> dict[str, int]:
        eval_run.run(own, request)
        return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in found()}

    def found() -> list[Path]:
        return list((tmp_path / "out" / "rollouts").glob("*/*.npz"))

    first = times()
    assert times() == first and len(first) == 3 * 2  # floor, model, ceiling
    note = next((tmp_path / "world" / "annotation").rglob("9.json"))
    note.write_text(json.dumps(json.loads(note.read_text()) | {"texts": ["push the blue block"]}))
    with caplog.at_level(logging.WARNING):
        second = times()
    assert {name for name in first if second[name] != first[name]} == {name for name in first if "/9_" in name}
    assert "1 episodes changed since their rollouts: made again (9)" in caplog.text
    latents = next((tmp_path / "world" / "latent_videos").rglob("29/0.npy"))
    os.utime(latents, ns=(0, 0))
    third = times()
    assert {name for name in first if third[name] != second[name]} == {name for name in first if "/29_" in name}
