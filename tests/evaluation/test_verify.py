"""`persistworld verify` on our own exports of the bundled model, right and deliberately wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundled_starts import extract
from checkpoint_files import ADAPTER, BASE, bundled_model, cli
from run_in_process import run_in_process
from typer.testing import CliRunner, Result

from persistworld_cli.commands.app import app
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import UsageError
from persistworld_cli.evaluation.published import load_published
from persistworld_cli.evaluation.verify import DIFFERS, FITS, UNDECIDED, compare_figures, interval
from persistworld_cli.launch import launcher

EPISODES, FRAMES, STEPS = (60, 61), 5, 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beginnings of two bundled episodes with their latents, and the model in the formats that we write."""
    root = tmp_path_factory.mktemp("verify")
    extract(root / "world", EPISODES, FRAMES)
    model, store = bundled_model(), EpisodeStore(root / "world")
    for episode in store.episodes("val"):
        frames = store.frames("val", episode, range(FRAMES))
        latents = model.encode_frames(torch.from_numpy(frames)).numpy()
        folder = root / "world" / "latent_videos" / "val" / episode
        folder.mkdir(parents=True)
        for camera, part in enumerate(np.split(latents, 3, axis=2)):
            np.save(folder / f"{camera}.npy", part.astype(np.float16))
    cli("export", BASE, "--preset", "tiny", "--to", "ctrl-world", "--output", root / "base.pt")
    shutil.copytree(resolve_path(ADAPTER), root / "adapter")
    config = root / "adapter" / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"lora_alpha": 160})
    )  # 10 times: to tell from the base
    for name, to, dtype in (("right.pt", "ctrl-world", "float32"), ("half.safetensors", "safetensors", "float16")):
        flags = ["--preset", "tiny", "--to", to, "--dtype", dtype, "--output", root / name]
        cli("export", BASE, "--adapter", root / "adapter", *flags)
    return root


@pytest.fixture
def verify(world: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``persistworld verify ARGUMENTS`` in this process, on that world."""
    monkeypatch.setattr(launcher, "run_task", run_in_process)

    def call(*arguments: object, dataset: str = "world") -> Result:
        flags = ["--preset", "tiny", "--dataset", world / dataset, "--output", world / "out", "--steps", STEPS]
        flags += ["--device", "cpu", "--set", "eval.bootstrap=50", "--set", "rewards.lpips_backbone=untrained"]
        return CliRunner().invoke(app, ["verify", *map(str, [*flags, *arguments])])

    return call


def verdicts(done: Result) -> dict[str, str]:
    """Check, or "GROUP METRIC KIND" -> verdict."""
    told = json.loads(done.stdout)
    figures = {f"{one['group']} {one['metric']} {one['kind']}": one["verdict"] for one in told["figures"]}
    return {one["name"]: one["verdict"] for one in told["checks"]} | figures


def differing(done: Result) -> set[str]:
    assert done.exit_code == 1, (done.stdout, done.stderr, done.exception)
    return {name for name, verdict in verdicts(done).items() if verdict == DIFFERS}


def test_right_weights_fit_and_wrong_ones_are_told_apart(world: Path, verify: Any, tmp_path: Path) -> None:
    figures = world / "right.toml"
    done = verify("--ckpt", world / "right.pt", "--write-published", figures)
    assert done.exit_code == 0, (done.stderr, done.exception)
    published = load_published(str(figures))
    assert published.dtype == "float32" and len(published.items) == 2 and set(published.gain) == {"exterior", "wrist"}

    same = ["--published", figures]
    right = verify("--ckpt", world / "right.pt", *same)
    assert right.exit_code == 0, right.stdout
    lines = right.stdout.splitlines()
    assert lines[0] == "persistworld verify: FITS" and max(map(len, lines[: lines.index("")])) <= 80
    for word in ("right.pt", "float32", "carried by", "60, 61", "s per step", "GiB", "torch 2", "recording through"):
        assert word in right.stdout, word
    assert "the files of the figures" in " ".join(right.stdout.split())

    other = verify("--ckpt", world / "base.pt", *same, "--json")
    told = {check["name"]: check["text"] for check in json.loads(other.stdout)["checks"]}
    assert f"other files than those of the figures, {published.weights[:12]}" in told["weights"]
    base = differing(other)
    assert {"exterior psnr same", "wrist psnr same"} & base and not {"keys", "scale", "poses", "data"} & base
    assert differing(verify("--ckpt", BASE, *same, "--json")) >= {"base", "keys"}
    assert differing(verify("--ckpt", world / "half.safetensors", *same, "--alone", "--json")) == {"keys"}

    stat = json.loads(resolve_path("bundled:presets/tiny/stat.json").read_text())
    stat["state_99"] = [2 * high - low for low, high in zip(stat["state_01"], stat["state_99"], strict=True)]
    (tmp_path / "wide.json").write_text(json.dumps(stat))
    wide = f"model.stat={tmp_path}/wide.json"
    scaled = differing(verify("--ckpt", world / "right.pt", *same, "--alone", "--set", wide, "--json"))
    assert "scale" in scaled and any(name.endswith("same") for name in scaled)

    shutil.copytree(world / "world", world / "swapped")
    for folder in [*(world / "swapped").glob("*/val/*/")]:
        for first in folder.glob("0.*"):
            third = first.with_name(f"2{first.suffix}")
            beside = first.rename(first.with_name("beside"))
            third.rename(first)
            beside.rename(third)
    swapped = verify("--ckpt", world / "right.pt", *same, "--alone", "--json", dataset="swapped")
    assert {name for name in differing(swapped) if "psnr" in name} == {"exterior psnr same", "wrist psnr same"}


def test_means_alone_decide_by_an_interval(world: Path, verify: Any, tmp_path: Path) -> None:
    """As with the published weights, of which nobody has the rollouts."""
    means = tmp_path / "means.toml"
    lines = []
    for group, psnr in (("exterior", 20.0), ("wrist", 15.0)):
        lines += [f"[{group}]", f"psnr = {psnr}", f"[tolerance.{group}]", "psnr = 0.5"]
        lines += [f"[widest.{group}]", "psnr = 50.0"]
    means.write_text("\n".join(['lpips_backbone = "untrained"', *lines]))
    done = verify("--ckpt", world / "right.pt", "--alone", "--published", means, "--json")
    figures = {one["group"]: one for one in json.loads(done.stdout)["figures"]}
    for group, one in figures.items():
        fits = abs(one["measured"] - one["published"]) <= one["half"] + one["tolerance"]
        assert one["kind"] == "mean" and one["half"] > 0 and (one["verdict"] == FITS) == fits, group
    assert "published type unknown" in done.stdout
    for arguments, words in (
        (["--episodes", "60", "--published", str(means)], "two or more"),
        (["--published", str(tmp_path / "none.toml")], "cannot read the figures"),
        (["--published", "bundled:presets/published/ctrl-world.toml"], "the trained LPIPS"),
        (["--count", "2", "--episodes", "60"], "give one of them"),
        ([], "--write-published"),
    ):
        wrong = verify(*arguments)
        assert wrong.exit_code and words in wrong.stderr and "Traceback" not in wrong.stderr


def result(psnr: np.ndarray, base: np.ndarray | None = None) -> dict[str, Any]:
    """An evaluation's result of exterior figures around the published ones, one rollout an episode."""
    values = {"ssim": 0.86 + 0 * psnr, "psnr": psnr, "lpips": 0.07 + 0 * psnr}
    rows = {name: {"new": value.tolist()} for name, value in values.items()}
    if base is not None:
        for name, value in {"ssim": 0.84 + 0 * base, "psnr": base, "lpips": 0.081 + 0 * base}.items():
            rows[name]["base"] = value.tolist()
    wrist = {"ssim": 0.67 + 0 * psnr, "psnr": 19.39 + 0 * psnr, "lpips": 0.277 + 0 * psnr}
    of_base = {"ssim": 0.62, "psnr": 17.8, "lpips": 0.310}
    own = {name: {"new": v.tolist(), "base": (of_base[name] + 0 * v).tolist()} for name, v in wrist.items()}
    labels = ["base", "new"] if base is not None else ["new"]
    return {
        "models": [{"label": label} for label in labels],
        "metrics": [{"name": name, "label": name} for name in values],
        "rollouts": {"exterior": rows, "wrist": own},
        "protocol": {"items": [[str(i), 0, 0] for i in range(len(psnr))]},
    }


def test_published_figures_tell_post_trained_from_base_only_by_pairs() -> None:
    persistworld = load_published("bundled:presets/published/persistworld.toml")
    assert persistworld.figures["exterior"] == {"ssim": 0.86, "psnr": 24.42, "lpips": 0.07}
    assert load_published("bundled:presets/published/ctrl-world.toml").figures["wrist"]["lpips"] == 0.31
    hard = 2.5 * np.array([-1.0, 1.0] * 6)  # episodes differ by more than models do
    noise = 0.2 * np.array([1.0, 1.0, -1.0, -1.0] * 3)

    def psnr(made: dict[str, Any]) -> dict[str, str]:
        figures = compare_figures(made, persistworld)
        return {one.kind: one.verdict for one in figures if (one.group, one.metric) == ("exterior", "psnr")}

    right, base = 24.42 + hard, 23.02 + hard + noise
    assert psnr(result(right, base)) == {"mean": FITS, "gain": FITS}
    assert psnr(result(base)) == {"mean": FITS}  # alone, the base passes for it
    assert psnr(result(base, base)) == {"mean": FITS, "gain": DIFFERS}
    assert psnr(result(right - 5)) == {"mean": DIFFERS}
    assert psnr(result(right[:3])) == {"mean": UNDECIDED}
    mean, half = interval(np.array([1.0, 3.0, 2.0, 4.0]), ["a", "a", "b", "b"])
    assert mean == 2.5 and half == pytest.approx(12.706 * np.std([2, 3], ddof=1) / np.sqrt(2), rel=1e-3)


def test_a_damaged_file_of_figures_is_one_error(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    for text, words in (
        ("[exterior]\npsnr = 1\n", "tolerance.exterior"),
        ("[exteriour]\npsnr = 1\n", "did you mean 'exterior'"),
        ("[exterior]\npsnr = 'high'\n", "numbers"),
        ("nothing = 1\n", "unknown key"),
        ("description = 'x'\n", "neither"),
        ("[", "cannot read"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError) as wrong:
            load_published(str(file))
        assert words in f"{wrong.value.what} {wrong.value.fix}"
