"""`--accelerate-config`: processes and machines from the file that `accelerate config` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from persistworld_cli.commands.app import app

PLAIN = """compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
enable_cpu_affinity: false
machine_rank: 1
main_process_ip: 10.0.0.7
main_process_port: 29500
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 4
rdzv_backend: static
same_network: true
use_cpu: true
"""


def resolved(tmp_path: Path, text: str, *flags: str) -> tuple[int, str, dict[str, object]]:
    """Exit code, what was said, and the launch settings of a dry run with such a file."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    told = CliRunner().invoke(
        app, ["post-train", "--groups", "4", "--accelerate-config", str(file), "--dry-run", "--json", *flags]
    )
    if told.exit_code:
        return told.exit_code, told.stderr, {}
    settings = json.loads(told.stdout)["settings"]
    launch = {key: entry["value"] for key, entry in settings.items() if key.startswith("launch.")}
    return 0, told.stderr, {key.removeprefix("launch."): value for key, value in launch.items()}


def test_processes_and_machines_are_taken_and_flags_go_before_them(tmp_path: Path) -> None:
    code, said, launch = resolved(tmp_path, PLAIN, "--machine-rank", "0")
    assert code == 0 and "requests bf16; the task's own setting decides" in said
    wanted = {"num_processes": 4, "num_machines": 2, "machine_rank": 0, "device": "cpu"}
    assert launch.items() >= (wanted | {"main_process_ip": "10.0.0.7", "main_process_port": 29500}).items()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("MULTI_CPU", "FSDP", "pretrain.shard = true"),
        ("MULTI_CPU", "XLA", "use one of NO, MULTI_CPU, MULTI_GPU"),
        ("use_cpu: true", "gpu_ids: 0,2", "CUDA_VISIBLE_DEVICES=0,2"),
        ("num_processes: 4", "num_processors: 4", "unknown keys (['num_processors'])"),
        (PLAIN, "- 1\n", "not an accelerate configuration"),
        (PLAIN, "a: [", "not an accelerate configuration"),
    ],
)
def test_what_is_not_done_here_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    code, said, _ = resolved(tmp_path, PLAIN.replace(old, new))
    assert code == 2 and words in " ".join(said.split()) and "Traceback" not in said


def test_a_file_that_is_absent_is_told(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["pretrain", "--accelerate-config", str(tmp_path / "none.yaml"), "--dry-run"])
    assert told.exit_code == 2 and "no such file" in told.output
