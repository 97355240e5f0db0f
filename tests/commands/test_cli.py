"""The command line from outside: help and its examples, exit codes, what goes to standard output, overrides."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drive_world import write_preset
from run_in_process import run_in_process
from typer.testing import CliRunner

from persistworld_cli.commands import app as commands
from persistworld_cli.config.bundled import bundled_root, resolve_path
from persistworld_cli.config.settings import Settings
from persistworld_cli.launch import launcher

pytestmark = pytest.mark.usefixtures("counted_once")
NAMES = [
    "extract-latents",
    "build-meta",
    "pretrain",
    "post-train",
    "eval",
    "study-report",
    "verify",
    "frontier",
    "replay",
    "drive",
    "pi-rollout",
    "policy-server",
    "leaderboard",
    "inspect",
    "export",
    "env",
]
EXAMPLES = [
    (needs, example)
    for command in commands.COMMANDS.values()
    for needs, own in command.EXAMPLES.items()
    for example in own
]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "scipy", "pandas")
HELP = f"""
import json, sys
from persistworld_cli.commands.app import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["persistworld", *arguments, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), end.code
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, f"{{sys.argv}} imports {{loaded}}"
"""


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``persistworld ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-m", "persistworld_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


def dry(*arguments: str) -> dict[str, dict[str, object]]:
    """Resolved settings as ``--dry-run --json`` prints them: key -> value and origin."""
    result = CliRunner().invoke(commands.app, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    settings: dict[str, dict[str, object]] = json.loads(result.stdout)["settings"]
    return settings


def test_every_help_works_without_torch() -> None:
    """One after the other in one process: what none of them imports, each does without."""
    command = [sys.executable, "-c", HELP, json.dumps([[], *([name] for name in NAMES)])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert not re.search("…|<(bool|str|list)", done.stdout) and "one-camera" in done.stdout
    shown = [line.split()[2] for line in done.stdout.splitlines() if line.strip().startswith("Usage: persistworld ")]
    assert shown[1:] == NAMES


def test_help_loads_no_heavy_library_and_few_modules() -> None:
    """What makes the help quick on any machine."""
    code = (
        "import sys; sys.argv = ['persistworld', '--help']\n"
        "from persistworld_cli.commands.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(len(sys.modules), *sys.modules, file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    heavy = {
        "torch",
        "numpy",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "matplotlib",
        "pyarrow",
        "av",
        "scipy",
    }
    assert not heavy & set(told[1:]), heavy & set(told[1:])
    assert int(told[0]) < 600, told[0]


def test_help_lists_the_commands_and_runnable_examples() -> None:
    text = CliRunner().invoke(commands.app, ["--help"]).stdout
    assert all(name in text for name in NAMES)
    assert list(commands.COMMANDS) == NAMES
    for name in NAMES:
        shown = " ".join(CliRunner().invoke(commands.app, [name, "--help"]).stdout.split())
        assert commands.COMMANDS[name].EXAMPLES
        for needs, examples in commands.COMMANDS[name].EXAMPLES.items():
            assert needs in shown and all(example in shown for example in examples)


@pytest.mark.parametrize(("needs", "example"), EXAMPLES)
def test_every_example_of_the_help_resolves(needs: str, example: str) -> None:
    """And one that needs nothing names no file that a fresh clone lacks."""
    program, *arguments = shlex.split(example)
    assert program == "persistworld"
    if not needs:
        read = [word for flag, word in zip(["", *arguments], arguments, strict=False) if flag not in ("-o", "--output")]
        assert all(resolve_path(word).exists() for word in read if "/" in word)
    result = CliRunner().invoke(commands.app, [*arguments, "--dry-run"] if arguments[0] != "env" else arguments)
    assert result.exit_code == 0, result.stderr
    shown = "dry run" if arguments[0] != "env" else "cpu kernels"
    assert json.loads(result.stdout) if "--json" in arguments else shown in result.stdout


def test_env_describes_the_machine_and_hides_secrets() -> None:
    secrets = {"HF_TOKEN": "hf_abc", "HF_ENDPOINT": "https://me:hf_abc@hub", "PERSISTWORLD_DRIVE_TOKEN": "hf_abc"}
    result = CliRunner().invoke(commands.app, ["env", "--json"], env={**secrets, "OMP_NUM_THREADS": "1"})
    assert result.exit_code == 0 and "hf_abc" not in result.stdout
    told = json.loads(result.stdout)
    assert told["variables"]["HF_ENDPOINT"] == "https://***@hub" and told["variables"]["OMP_NUM_THREADS"] == "1"
    assert not told["packages"].keys() & told["torch"].keys() and "error" not in told["torch"]
    assert Path(told["paths"]["bundled_files"]["path"]) == bundled_root()


def test_no_preset_takes_the_bundled_world_and_says_so_on_stderr() -> None:
    result = CliRunner().invoke(commands.app, ["eval", "--dry-run", "--json"])
    assert result.exit_code == 0
    assert "no --preset: using the bundled world (preset tiny)" in result.stderr
    assert json.loads(result.stdout)["preset"] == "tiny"
    named = CliRunner().invoke(commands.app, ["eval", "--preset", "tiny", "--dry-run", "--json"])
    assert "no --preset" not in named.stderr


def test_flags_reach_their_settings_and_are_named() -> None:
    settings = dry("post-train", "--updates", "7", "--num-processes", "2", "--set", "post_train.beta=0.5")
    assert settings["post_train.updates"] == {"value": 7, "origin": "--updates"}
    assert settings["launch.num_processes"] == {"value": 2, "origin": "--num-processes"}
    assert settings["post_train.beta"] == {"value": 0.5, "origin": "--set"}
    assert dry("pretrain", "--part", "vae", "--updates", "9")["vae.updates"]["value"] == 9
    assert dry("extract-latents", "in", "out")["world.raw"] == {"value": "in", "origin": "RAW"}
    seeds = dry("eval", "--seed", "1", "--seed", "2", "--episodes", "0001,99")
    assert seeds["eval.seeds"] == {"value": [1, 2], "origin": "--seed"}
    assert seeds["eval.episodes"]["value"] == ["0001", "99"]
    assert dry("drive", "--episode", "899", "--start", "8")["drive.start"]["value"] == 8


def test_the_request_and_the_output_folder_are_shown(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        commands.app, ["replay", "--episode", "1", "--ckpt", "a", "--ckpt", "b", "--dry-run", "--json"]
    )
    data = json.loads(result.stdout)
    assert data["output"] == "outputs/replay-tiny"
    assert data["request"]["ckpts"] == ["a", "b"] and data["request"]["adapters"] == []
    assert data["settings"]["eval.episodes"] == {"value": ["1"], "origin": "--episode"}
    chosen = CliRunner().invoke(commands.app, ["drive", "-o", str(tmp_path / "x"), "--dry-run", "--json"])
    assert json.loads(chosen.stdout)["output"] == str(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["post-train", "--set", "post_train.betta=1"], "did you mean 'post_train.beta'?"),
        (["post-train", "--candidates", "1"], "must be at least 2"),
        (["eval", "--preset", "tinny"], "did you mean 'tiny'?"),
        (["drive", "--keys", "llx"], "unknown key 'x'"),
        (["pretrain", "--part", "text"], "known: vae, world"),
        (["build-meta", "--export", "csv"], "known: ctrl-world"),
        (["eval", "--no-such-flag"], "No such option"),
        (["evaluate"], "No such command"),
    ],
)
def test_wrong_usage_is_one_block_on_stderr_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_mistake_in_the_world_is_exit_code_1_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    result = run("build-meta", missing, "--preset", "tiny")
    assert result.returncode == 1
    assert result.stderr.startswith(f"build-meta: reading {missing}\nerror: ")
    assert "Traceback" not in result.stderr and result.stdout == ""
    debug = CliRunner().invoke(commands.app, ["build-meta", missing, "--preset", "tiny", "--debug"])
    assert debug.exit_code == 1 and "Traceback" in debug.stderr


def test_the_table_of_a_dry_run_names_every_layer() -> None:
    arguments = ["post-train", "--preset", "tiny", "--lr", "0.25", "--dry-run"]
    result = CliRunner().invoke(commands.app, arguments, env={"PERSISTWORLD_POST_TRAIN__KL": "0.125"})
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "0.25" in lines["post_train.lr"] and lines["post_train.lr"].rstrip().endswith("--lr")
    assert lines["post_train.kl"].rstrip().endswith("environment PERSISTWORLD_POST_TRAIN__KL")
    assert lines["world.raw"].rstrip().endswith("preset tiny")
    assert lines["policy.host"].rstrip().endswith("default")


def test_results_are_tables_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    from persistworld_cli.commands.run import show_result

    result = {"loss": 0.123456789, "n": {"train": 3, "val": 1}, "rows": [{"model": "a", "psnr": 20.5}], "gone": None}
    show_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out) == result
    show_result(result, as_json=False)
    out = capsys.readouterr().out
    assert "0.123457" in out and "n.train" in out and "psnr" in out and "20.5" in out


def test_version() -> None:
    from persistworld_cli import __version__

    assert run("--version").stdout == f"persistworld {__version__}\n"


def test_an_unreadable_episode_is_named_and_the_exit_code_tells(tmp_path: Path) -> None:
    raw, bad = tmp_path / "raw", "episode_000001"
    shutil.copytree(bundled_root() / "dataset_example" / "world" / "meta", raw / "meta")
    for path in sorted((bundled_root() / "dataset_example" / "world").rglob("episode_00000[01].*")):
        target = raw / path.relative_to(bundled_root() / "dataset_example" / "world")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        target.write_bytes(data[: len(data) // 3] if path.suffix == ".mp4" and path.stem == bad else data)
    command = [sys.executable, "-m", "persistworld_cli", "extract-latents", str(raw), str(tmp_path / "out"), "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run"), "--device", "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["done"] == 1 and [f["episode"] for f in result["failed"]] == ["1"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("eval --preset ti", ["tiny"]),
        ("pi-rollout --task wi", ["wipe_table"]),
        ("eval --device c", ["cpu", "cuda"]),
        ("post-train --tracker wandb,tr", ["wandb,trackio"]),
        ("post-train --set post_train.bet", ["post_train.beta="]),
        ("post-train --set pretrain.decay", ["pretrain.decay=constant", "pretrain.decay=cosine"]),
        ("drive --accelerator h2", ["h200"]),
        ("export x --to p", ["peft"]),
        ("eval --ckpt x", []),
    ],
)
def test_tab_completes_the_values_of_options(words: str, offered: list[str]) -> None:
    env = {
        "_PERSISTWORLD_COMPLETE": "complete_bash",
        "COMP_WORDS": f"persistworld {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    shown = CliRunner().invoke(commands.app, [], prog_name="persistworld", env=env)
    assert shown.output.split() == offered


# The least that makes each command run, for a dry run.
ARGUMENTS = {
    "env": [],  # does nothing anyway
    "export": ["bundled:presets/tiny/base", "--to", "safetensors", "-o", "x.safetensors", "--dry-run"],
    "inspect": ["bundled:presets/tiny/base", "--dry-run"],
    "leaderboard": ["outputs/a", "--dry-run"],
    "study-report": ["answers.json", "--dry-run"],
}


@pytest.mark.parametrize("name", NAMES)
def test_json_of_a_dry_run_is_one_document_on_stdout(name: str) -> None:
    done = CliRunner().invoke(commands.app, [name, *ARGUMENTS.get(name, ["--dry-run"]), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    "arguments",
    [["build-meta"], ["eval", "--steps", "1"], ["replay", "--steps", "1"]],
    ids=lambda arguments: arguments[0],
)
def test_json_of_a_run_is_one_document_on_stdout(
    arguments: list[str], small_world: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most others are run with --json by tests of their own."""
    monkeypatch.setattr(launcher, "run_task", run_in_process)
    preset = write_preset(tmp_path / "small.toml", small_world)
    output = [] if arguments[0] == "build-meta" else ["--output", str(tmp_path / "out")]
    done = CliRunner().invoke(commands.app, [*arguments, "--preset", str(preset), *output, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)
