"""The proof: is a post-trained world model better in closed loop, and better than with the same effort spent otherwise?

`python -m benchmarks.proof --dataset outputs/demo/world [--output outputs/proof] [--updates 60]` trains
`python -m benchmarks.proof ... --test` opens the test: rolls out, compares, writes `proof.json` and `proof.md`
`python -m benchmarks.proof ... --ablate` trains the ablations instead, which `--test` then shows too

Pre-registered; none of it is changed after the test was opened:

- Arms, each from the preset's base, on the same episodes (split "train"), with the same number of updates and of clips
  per update (groups x kept candidates): `post-trained` (the preset's settings), `recorded` (the same rollouts,
  fine-tuned towards the recorded frames), `teacher-forced` (the base's training continued: real history, all weights,
  under the noise levels that `post-trained` learns under). Training seeds 0, 1, 2.
- Test: the bundled benchmark's 20 held-out episodes x 10 noise seeds = 200 pairs per arm and training seed, 14
  interactions, sampled as the benchmark says; a pair shares episode and noise with the base's rollout.
- Primary: the training reward over all cameras, `post-trained` less base: Wilcoxon's test over episodes, where an
  episode's difference is the mean over its noise and training seeds. Secondary: SSIM, PSNR, LPIPS by camera group with
  95% bootstrap intervals over episodes, and `post-trained` less each control, in the same way.
- Ablations: `post-trained` with one thing changed, each with the first training seed, 20 updates (the preset's own
  number), one noise seed, less base and less `as it is` (nothing changed, as long). One run each: read them as a first
  look, not as a test.
- Settings were chosen on other episodes (presets/tiny/README.md).

Noise seeds of an episode differ little if a model is sampled in one call, so 200 pairs hold hardly more information
than their 20 episodes: all tests are over episodes. Trained runs and finished rollouts are kept; an interrupted proof
continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.worker_process import become_worker
from persistworld_cli.checkpoints.loading import load_for_sampling
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.plan import eval_items
from persistworld_cli.files import write_json, write_text
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, batches, reward_of
from persistworld_cli.rollout.engine import RolloutEngine
from persistworld_cli.rollout.finished import load_rollout, pending, save_rollout
from persistworld_cli.statistics.paired import Paired, compare

METRICS = ("ssim", "psnr", "lpips")
GROUPS = ("exterior", "wrist")
AS_IT_IS, ABLATION_UPDATES, ABLATION_NOISE_SEEDS = "as it is", 20, 1
Numbers = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Arm:
    """One way to spend the updates: a subcommand and the settings that differ from the preset's."""

    name: str
    task: str
    sets: tuple[str, ...] = ()

    def command(self, settings: Settings, output: Path, updates: int, seed: int) -> list[str]:
        """What a person would type."""
        section = self.task.replace("-", "_")
        dataset = str(settings.world.dataset)
        pairs = [item for text in (f"{section}.seed={seed}", *self.sets) for item in ("--set", text)]
        program = [sys.executable, "-m", "persistworld_cli", self.task, "--preset", "tiny", "--dataset", dataset]
        return [*program, "--updates", str(updates), "--output", str(output), *pairs]


def arms(settings: Settings) -> list[Arm]:
    """The three arms; the control's noise levels and batch are those of the post-training."""
    post = settings.post_train
    clips = post.groups * (post.keep_best + post.keep_worst)
    control = ("lr=1e-3", "warmup=0", "ema=0.9", f"p_mean={post.p_mean}", f"p_std={post.p_std}", f"batch={clips}")
    quiet = ("validate_every=0", "log_every=1")
    return [
        Arm("post-trained", "post-train"),
        Arm("recorded", "post-train", ("post_train.objective=recorded",)),
        Arm("teacher-forced", "pretrain", tuple(f"pretrain.{text}" for text in (*control, *quiet))),
    ]


def ablations(settings: Settings) -> list[Arm]:
    """`post-trained` with one thing changed, and with none."""
    post = settings.post_train
    changes = {
        "lr x 1/3": f"lr={post.lr / 3:g}",
        "lr x 3": f"lr={post.lr * 3:g}",
        "prefix 0": "prefix_max=0",
        "prefix fixed 9": "prefix=fixed",
        "prefix curriculum": "prefix=curriculum",
        "K 4, keep all": "candidates=4 keep_best=2 keep_worst=2",
        "K 16, keep 8": "candidates=16",
        "keep 2 + 2": "keep_best=2 keep_worst=2",
        "beta 0.1": "beta=0.1",
        "beta 1": "beta=1.0",
        "KL 0": "kl=0.0",
        "KL 1e-2": "kl=1e-2",
        "EMA 0": "ema_max=0.0",
        "credit rollout": "credit=rollout",
        "credit frame": "credit=frame",
        "no exploration": "explore=0.0",
    }
    made = [Arm(name, "post-train", tuple(f"post_train.{t}" for t in text.split())) for name, text in changes.items()]
    alone = [
        (name, f"rewards.weights={{{name}={sign}}}") for name, sign in (("ssim", 1), ("psnr", 0.03125), ("lpips", -1))
    ]
    return [
        Arm(AS_IT_IS, "post-train"),
        *made,
        *(Arm(f"reward {name} alone", "post-train", (text,)) for name, text in alone),
    ]


def trained(output: Path, arm: Arm, seed: int) -> Path:
    """Where an arm's run lies."""
    return output / "runs" / f"{arm.name.replace(' ', '_').replace('/', '_')}-seed-{seed}"


def train(settings: Settings, output: Path, chosen: Sequence[Arm], seeds: Sequence[int], updates: int) -> None:
    """Train what is not trained yet; each run continues from its last state.

    Raises:
        SystemExit: a run failed; its own message stands above.
    """
    for seed in seeds:
        for arm in chosen:
            folder = trained(output, arm, seed)
            if (folder / "weights").is_dir() and _updates(folder) >= updates:
                continue
            command = arm.command(settings, folder, updates, seed)
            print("$", *command[2:], flush=True)
            if done := subprocess.run(command, check=False).returncode:
                raise SystemExit(done)


def _updates(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else 0


def rollouts(settings: Settings, output: Path, name: str, weights: Mapping[str, str]) -> list[ScoredRollout]:
    """The test's rollouts of one model: read, or made now.

    Args:
        settings: with the benchmark's values.
        output: the proof's folder.
        name: of the model, for its folder.
        weights: `ckpt` and `adapter` of it.
    """
    store = open_store(settings)
    items = eval_items(store, settings)
    folder = output / "rollouts" / name
    folder.mkdir(parents=True, exist_ok=True)
    todo = pending(folder, batches(items, settings.eval.batch))
    if todo:
        model = load_for_sampling(settings, device="cpu", **weights)
        engine = RolloutEngine(model, settings.sampling, store.stat())
        scorer = Scorer(settings.rewards, settings.world, "cpu", names=METRICS)
        ev = settings.eval
        loop = ClosedLoop(engine, store, ev.split, ev.steps, ev.batch, scorer)
        with Meter(f"proof: {name}", len(todo)) as meter:
            for rollout in loop.roll(todo):
                save_rollout(folder, rollout)
                meter.advance()
    return [load_rollout(folder, item) for item in items]


def numbers(settings: Settings, made: Sequence[ScoredRollout]) -> Numbers:
    """What is compared, a number a rollout: the reward, and each metric by camera group."""
    scorer = Scorer(settings.rewards, settings.world, "cpu", names=METRICS)
    stacked = {name: np.stack([rollout.scores[name] for rollout in made]) for name in METRICS}
    found = {"reward": reward_of(scorer, stacked)}
    for group in GROUPS:
        views = list(getattr(settings.world, group))
        for name, value in stacked.items():
            found[f"{group} {scorer.labels[name]}"] = np.nanmean(value[..., views].astype(np.float64), axis=(1, 2))
    return found


def row(base: Sequence[Numbers], new: Sequence[Numbers], episodes: Sequence[str], seed: int = 0) -> dict[str, Paired]:
    """Every number of some runs (training seeds) against others', pair by pair."""
    many = list(episodes) * len(new)
    return {
        name: compare(
            np.concatenate([one[name] for one in base]),
            np.concatenate([one[name] for one in new]),
            many,
            higher_is_better="lpips" not in name,
            seed=seed,
        )
        for name in new[0]
    }


def _change(pair: Paired, name: str) -> str:
    """``+0.24 [+0.16, +0.33]``."""
    places = 2 if "psnr" in name else 4
    return f"{pair.change:+.{places}f} [{pair.change_low:+.{places}f}, {pair.change_high:+.{places}f}]"


def by_figure(title: str, rows: Mapping[str, Mapping[str, Paired]], base: Mapping[str, float] | None = None) -> str:
    """A table, a line a figure: mean change [95% interval], share of pairs won, p over episodes."""
    heads = (["base"] if base else []) + list(rows)
    lines = [f"### {title}", "", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in next(iter(rows.values())):
        cells = [f"{base[name]:.{2 if 'psnr' in name else 4}f}"] if base else []
        for figures in rows.values():
            pair = figures[name]
            p = f"p = {pair.wilcoxon_p_episodes:.2g}"
            cells.append(f"{_change(pair, name)}, won {100 * pair.win_rate:.0f}%, {p}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def by_arm(title: str, rows: Mapping[str, Mapping[str, Paired]]) -> str:
    """A table, a line an arm: mean change [95% interval]."""
    names = list(next(iter(rows.values())))
    lines = [f"### {title}", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {arm} | {' | '.join(_change(pairs[n], n) for n in names)} |" for arm, pairs in rows.items()]
    return "\n".join([*lines, ""])


def measured(settings: Settings, output: Path, chosen: Sequence[Arm], seeds: Sequence[int]) -> dict[str, list[Numbers]]:
    """Rollouts of every arm that was trained, a list over training seeds."""
    found: dict[str, list[Numbers]] = {}
    for arm in chosen:
        for seed in seeds:
            folder = trained(output, arm, seed) / "weights"
            if not folder.is_dir():
                continue
            post = {"ckpt": settings.model.ckpt, "adapter": str(folder / "adapter")}
            whole = {"ckpt": str(folder / "model.safetensors"), "adapter": ""}
            made = rollouts(
                settings, output, trained(output, arm, seed).name, post if arm.task == "post-train" else whole
            )
            found.setdefault(arm.name, []).append(numbers(settings, made))
    return found


def less(
    settings: Settings, found: Mapping[str, list[Numbers]], others: Mapping[str, list[Numbers]], form: str = "{0}"
) -> dict[str, dict[str, Paired]]:
    """Every arm of `found` less every one of `others`, training seed by training seed, as far as both have them."""
    episodes = [item.episode for item in eval_items(open_store(settings), settings)]
    return {
        form.format(name, other): row(their[: len(own)], own[: len(their)], episodes)
        for name, own in found.items()
        for other, their in others.items()
        if name != other
    }


def test(settings: Settings, output: Path, seeds: Sequence[int], ablated: Sequence[Arm]) -> dict[str, Any]:
    """Roll everything out, compare, write `proof.json` and `proof.md`."""
    base = [numbers(settings, rollouts(settings, output, "base", {"adapter": ""}))]
    found = measured(settings, output, arms(settings), seeds)
    ours = {name: own for name, own in found.items() if name == "post-trained"}
    controls = {name: own for name, own in found.items() if name not in ours}
    few = replace(settings, eval=replace(settings.eval, seeds=settings.eval.seeds[:ABLATION_NOISE_SEEDS]))
    changed = measured(few, output, ablated, seeds[:1])
    few_base = [numbers(few, rollouts(few, output, "base", {"adapter": ""}))] if changed else []
    unchanged = {name: own for name, own in changed.items() if name == AS_IT_IS}
    tables = {
        "less base": less(settings, found, {"base": base * len(seeds)}),
        "less the controls": less(settings, ours, controls, "{0} less {1}"),
        "ablations less base": less(few, changed, {"base": few_base}),
        "ablations less as it is": less(few, changed, unchanged),
    }
    means = {name: float(value.mean()) for name, value in base[0].items()}
    shown = [
        by_arm(title, cells) if title.startswith("ablations") else by_figure(title, cells, of)
        for (title, cells), of in zip(tables.items(), (means, None, None, None), strict=True)
        if cells
    ]
    text = "\n".join(shown)
    result = {
        "pairs": len(base[0]["reward"]),
        "training_seeds": {name: len(own) for name, own in {**found, **changed}.items()},
        "base": means,
        "tables": {
            title: {label: {k: vars(p) for k, p in cells.items()} for label, cells in rows.items()}
            for title, rows in tables.items()
        },
    }
    write_json(output / "proof.json", result)
    write_text(output / "proof.md", text)
    print(text)
    return result


def main() -> None:
    """Train, or test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="the bundled world, extracted; the preset's by default")
    parser.add_argument("--output", type=Path, default=Path("outputs/proof"))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--training-seeds", default="0,1,2")
    parser.add_argument("--noise-seeds", type=int, default=10)
    parser.add_argument("--ablate", action="store_true", help="train the ablations (the first training seed)")
    parser.add_argument("--test", action="store_true", help="open the test")
    options = parser.parse_args()
    become_worker("benchmarks.proof")
    benchmark = load_benchmark("bundled")
    flags = {"world.dataset": options.dataset}
    settings = resolve_settings("tiny", flags=flags, pinned=benchmark.pinned if benchmark else None).settings
    settings = replace(settings, eval=replace(settings.eval, seeds=tuple(range(options.noise_seeds))))
    seeds = [int(text) for text in options.training_seeds.split(",")]
    extra = ablations(settings)
    if options.test:
        test(settings, options.output, seeds, extra)
    elif options.ablate:
        train(settings, options.output, extra, seeds[:1], min(options.updates, ABLATION_UPDATES))
    else:
        train(settings, options.output, arms(settings), seeds, options.updates)


if __name__ == "__main__":
    main()
