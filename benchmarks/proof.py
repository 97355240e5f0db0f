"""The proof: is a post-trained world model better in closed loop, and better than with the same effort spent otherwise?

`python -m benchmarks.proof --dataset latents --choose` trains each control at three learning rates (training seed 0)
    and compares them on validation episodes; the best go into CONTROL_LR (LR_FACTORS are extended where an end is best)
`python -m benchmarks.proof --dataset latents` trains the arms
`python -m benchmarks.proof --dataset latents --test-dataset latents-test --test` opens the test: rolls out, compares,
    writes `proof.json` and `proof.md`
`python -m benchmarks.proof --dataset latents --ablate` trains the ablations and compares them on validation episodes

Registered; none of it is changed after the test was opened:

- Arms, each from the same base, on the same episodes (split "train"), with the same number of updates and of clips
  per update (groups x kept candidates): `post-trained` (the preset's settings), `recorded` (the same rollouts,
  fine-tuned towards the recorded frames), `teacher-forced` (the base's training continued: real history, all weights,
  under the noise levels that `post-trained` learns under; its rate falls along a cosine, that of the others is
  constant: adapters are averaged instead). Training seeds 0, 1, 2.
- Test: episodes that nothing was chosen on, each with 5 noise seeds, 14 interactions, both models at the preset's
  sampler; a pair shares episode and noise with the base's rollout.
- Bars (`bars`): the reward over all cameras above the base's and both controls', intervals off zero; exterior LPIPS at
  least 8% lower, exterior PSNR at least 0.6 dB higher, 90% of pairs won by reward; no wrist metric worse by its
  interval; exterior LPIPS no worse than the base's at the number of calls where the base's is lowest (`--lpips-best`,
  found on validation); no referee (shift-tolerant LPIPS, sharpness, kept objects) worse by its interval.
- Primary test: Wilcoxon's over episodes, where an episode's difference is the mean over its noise and training seeds.
  Intervals: 95% bootstrap over episodes.
- Ablations: `post-trained` with one thing changed, training seed 0, `--updates` updates, one noise seed, on validation
  episodes, less base and less `as it is`. One run each: a first look, not a test.

Noise seeds of one episode resemble each other, so all tests are over episodes. Trained runs and finished rollouts are
kept; an interrupted proof continues. The test opens when every arm is trained with every seed; an output folder belongs
to one base, one dataset and one set of settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.worker_process import become_worker
from persistworld_cli.checkpoints.references import ModelRef, sha256_of
from persistworld_cli.config.presets import resolve_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.store import open_store
from persistworld_cli.evaluation.plan import eval_items, plan_rollouts
from persistworld_cli.files import hash_of, jsonable, write_json, write_text
from persistworld_cli.metrics.referees import load_referees
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.reports.progress import Meter
from persistworld_cli.rollout.closed_loop import ScoredRollout, batches, reward_of
from persistworld_cli.rollout.finished import load_rollout, pending, save_rollout
from persistworld_cli.statistics.paired import Paired, compare

METRICS = ("ssim", "psnr", "lpips")
GROUPS = ("exterior", "wrist")
SEEDS, NOISE_SEEDS, STEPS = (0, 1, 2), 5, 14
EPISODES = {"choose": 20, "test": 20}  # the first ones of the validation and of the test corpus
MARKER = "proof-arm.json"  # in the run of an arm that is trained to the end
AS_IT_IS = "as it is"
LR_FACTORS = (1 / 3, 1.0, 3.0)
# The controls' learning rates: the best of `--choose`; relative to the preset's post_train.lr for `recorded`, absolute
# for `teacher-forced`
CONTROL_LR = {"recorded": 1.0, "teacher-forced": 3e-4}
Numbers = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Arm:
    """One way to spend the updates: a subcommand and the settings that differ from the preset's."""

    name: str
    task: str
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proof:
    """One proof: what is trained, on what, and where it lies.

    Attributes:
        preset, ckpt: the base and its settings; "": the preset's weights.
        settings: of the preset, with dataset and base.
        output: folder of the proof.
        updates: of every arm.
        processes: that train one arm together.
    """

    preset: str
    ckpt: str
    settings: Settings
    output: Path
    updates: int
    processes: int = 1

    @property
    def base(self) -> str:
        """The base's weights."""
        return self.ckpt or self.settings.model.ckpt

    def folder(self, arm: Arm, seed: int) -> Path:
        """Where an arm's run lies."""
        return self.output / "runs" / f"{arm.name.replace(' ', '_').replace('/', '_')}-seed-{seed}"

    def command(self, arm: Arm, seed: int) -> list[str]:
        """What a person would type to train an arm."""
        section = arm.task.replace("-", "_")
        sets = [item for text in (f"{section}.seed={seed}", *arm.sets) for item in ("--set", text)]
        given = ["--preset", self.preset, "--dataset", str(self.settings.world.dataset), "--ckpt", self.base]
        run = ["--updates", str(self.updates), "--output", str(self.folder(arm, seed))]
        run += ["--num-processes", str(self.processes)]
        return [sys.executable, "-m", "persistworld_cli", arm.task, *given, *run, *sets]

    def weights(self, arm: Arm, seed: int) -> dict[str, str]:
        """`ckpt` and `adapter` of a trained arm."""
        folder = self.folder(arm, seed) / "weights"
        if arm.task == "post-train":
            return {"ckpt": self.base, "adapter": str(folder / "adapter")}
        return {"ckpt": str(folder / "model.safetensors"), "adapter": ""}

    def identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Everything that an arm's weights depend on, but for the dataset's content and the code."""
        tables = ("world", "model", "sampling", "clips", "rewards", "pretrain", "post_train")
        own = jsonable({name: getattr(self.settings, name) for name in tables})
        return {
            "arm": [arm.task, *arm.sets],
            "seed": seed,
            "updates": self.updates,
            "base": self.sha256,
            "settings": own,
        }

    def done(self, arm: Arm, seed: int) -> bool:
        """Whether an arm is trained to the end.

        Raises:
            SystemExit: it is, from another base, with other settings or other updates.
        """
        marker = self.folder(arm, seed) / MARKER
        if not marker.is_file():
            return False
        if json.loads(marker.read_text()) != json.loads(json.dumps(self.identity(arm, seed))):
            where = f"{marker.parent} is of another base, other settings or updates"
            raise SystemExit(f"error: {where}\n  to do: take another --output")
        return True

    @cached_property
    def sha256(self) -> str:
        """Of the base's weights."""
        return sha256_of(self.base)

    def train(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """Train what is not trained yet, a seed of every arm after the other; each run continues from its last state.

        Raises:
            SystemExit: a run failed; its own message stands above.
        """
        for seed in seeds:
            for arm in arms:
                if self.done(arm, seed):
                    continue
                command = self.command(arm, seed)
                print("$", *command[2:], flush=True)
                if code := subprocess.run(command, check=False).returncode:
                    raise SystemExit(code)
                write_json(self.folder(arm, seed) / MARKER, self.identity(arm, seed))


# -- arms ---------------------------------------------------------------------------------------------------------


def post_trained(name: str = "post-trained", *sets: str) -> Arm:
    """The preset's post-training, with some settings changed."""
    return Arm(name, "post-train", tuple(f"post_train.{text}" for text in sets))


def recorded(settings: Settings, lr: float, name: str = "recorded") -> Arm:
    """Own rollouts, recorded frames as targets; the learning rate relative to the preset's."""
    return post_trained(name, "objective=recorded", f"lr={lr * settings.post_train.lr:g}")


def teacher_forced(settings: Settings, lr: float, name: str = "teacher-forced") -> Arm:
    """The base's training continued, with the noise levels and the clips per update of the post-training."""
    post = settings.post_train
    clips = post.groups * (post.keep_best + post.keep_worst)
    levels = (f"p_mean={post.p_mean}", f"p_std={post.p_std}", f"batch={clips}")
    run = ("decay=cosine", "warmup=0", "ema=0.9", "validate_every=0", "check_every=0", "log_every=1", "save_every=20")
    return Arm(name, "pretrain", tuple(f"pretrain.{text}" for text in (f"lr={lr:g}", *levels, *run)))


def registered(settings: Settings) -> list[Arm]:
    """The three arms of the test."""
    lr = CONTROL_LR
    return [post_trained(), recorded(settings, lr["recorded"]), teacher_forced(settings, lr["teacher-forced"])]


def candidates(settings: Settings) -> list[Arm]:
    """Each control at three learning rates (`--choose`)."""
    made = [recorded(settings, f, f"recorded lr x {f:.2g}") for f in LR_FACTORS]
    own = CONTROL_LR["teacher-forced"]
    return [*made, *(teacher_forced(settings, f * own, f"teacher-forced lr {f * own:.2g}") for f in LR_FACTORS)]


def ablations(settings: Settings) -> list[Arm]:
    """`post-trained` with one thing changed that a user would think of changing, and with none."""
    post = settings.post_train
    half, kept = max(2, post.candidates // 2), (post.keep_best + post.keep_worst) // 4
    changes = {
        "lr x 1/3": (f"lr={post.lr / 3:g}",),
        "lr x 3": (f"lr={post.lr * 3:g}",),
        "half the candidates, half the clips": (
            f"candidates={half}",
            f"keep_best={half // 2}",
            f"keep_worst={half // 2}",
        ),
        "half of them kept": (f"keep_best={kept}", f"keep_worst={kept}"),
        "no prefix": ("prefix_max=0",),
        "credit rollout": ("credit=rollout",),
        "credit patch": ("credit=patch",),
        "no KL": ("kl=0.0",),
    }
    same = {"credit rollout": post.credit == "rollout", "credit patch": post.credit == "patch", "no KL": post.kl == 0}
    made = [post_trained(name, *sets) for name, sets in changes.items() if not same.get(name)]
    alone = {
        name: f"rewards.weights={{{name}={sign}}}" for name, sign in (("ssim", 1), ("psnr", 0.03125), ("lpips", -1))
    }
    rewards = [Arm(f"reward {name} alone", "post-train", (text,)) for name, text in alone.items()]
    return [post_trained(AS_IT_IS), *made, *rewards]


# -- rollouts -----------------------------------------------------------------------------------------------------


def scorer_of(settings: Settings) -> Scorer:
    """The reward's metrics and the preset's referees."""
    scorer = Scorer(settings.rewards, settings.world, "cpu", names=METRICS)
    root, names = Path(str(settings.world.dataset)), settings.post_train.referees
    referees = load_referees(names, scorer.device, root)
    if len(referees) < len(names):
        raise SystemExit("error: shift-tolerant LPIPS is a registered referee\n  to do: pip install stlpips-pytorch")
    return scorer.with_referees(referees)


def rollouts(settings: Settings, root: Path, name: str, weights: Mapping[str, str]) -> list[ScoredRollout]:
    """The rollouts of one model: read, or made now.

    Args:
        settings: dataset, episodes, seeds and sampler.
        root: folder of all rollouts; only those of the same weights, scale of actions, sampler, metrics and dataset are
            read.
        name: of the model.
        weights: `ckpt` and `adapter` of it.
    """
    plan = plan_rollouts(settings, [ModelRef(name, **weights)], torch.device("cpu"), quiet=True)
    (model,), scorer = plan.models, scorer_of(settings)
    folder = root / f"{name}-{hash_of([plan.key(model), scorer.names])}"
    folder.mkdir(parents=True, exist_ok=True)
    todo = pending(folder, batches(plan.items, settings.eval.batch))
    if todo:
        loop = replace(plan.loop(plan.load(model.ref), model), scorer=scorer)
        with Meter(f"proof: {name}", len(todo)) as meter:
            for rollout in loop.roll(todo):
                save_rollout(folder, rollout)
                meter.advance()
    return [load_rollout(folder, item) for item in plan.items]


def numbers(settings: Settings, made: Sequence[ScoredRollout]) -> Numbers:
    """What is compared, a number a rollout: the reward, and each metric and referee by camera group."""
    scorer = scorer_of(settings)
    stacked = {name: np.stack([rollout.scores[name] for rollout in made]) for name in scorer.names}
    found = {"reward": reward_of(scorer, stacked)}
    for group in GROUPS:
        views = list(getattr(settings.world, group))
        for name, value in stacked.items():
            found[f"{group} {name}"] = np.nanmean(value[..., views].astype(np.float64), axis=(1, 2))
    return found


def better_upwards(settings: Settings) -> dict[str, bool]:
    """Whether more is better, by the names of `numbers`."""
    scorer = scorer_of(settings)
    by_name = {name: metric.higher_is_better for name, metric in {**scorer.registered, **scorer.referees}.items()}
    return {"reward": True} | {f"{group} {name}": up for group in GROUPS for name, up in by_name.items()}


def opened(settings: Settings, dataset: str, count: int, noise_seeds: int, steps: int = 0) -> Settings:
    """The settings of a comparison: a dataset's first held-out episodes, noise seeds, and another number of calls."""
    world = replace(settings.world, dataset=dataset)
    chosen = tuple(open_store(replace(settings, world=world)).episodes("val")[:count])
    ev = replace(settings.eval, split="val", episodes=chosen, starts=(0,), steps=STEPS, seeds=tuple(range(noise_seeds)))
    ev = replace(ev, benchmark="")
    sampling = replace(settings.sampling, steps=steps or settings.sampling.steps)
    return replace(settings, world=world, eval=ev, sampling=sampling)


# -- comparison ---------------------------------------------------------------------------------------------------


def row(
    base: Sequence[Numbers], new: Sequence[Numbers], episodes: Sequence[str], upwards: Mapping[str, bool]
) -> dict[str, Paired]:
    """Every number of some runs (training seeds) against others', pair by pair."""
    many = list(episodes) * len(new)
    return {
        name: compare(
            np.concatenate([one[name] for one in base]),
            np.concatenate([one[name] for one in new]),
            many,
            higher_is_better=upwards[name],
        )
        for name in new[0]
    }


def less(
    settings: Settings, found: Mapping[str, list[Numbers]], others: Mapping[str, list[Numbers]], form: str = "{0}"
) -> dict[str, dict[str, Paired]]:
    """Every arm of `found` less every one of `others`, training seed by training seed, as far as both have them."""
    episodes = [item.episode for item in eval_items(open_store(settings), settings)]
    upwards = better_upwards(settings)
    return {
        form.format(name, other): row(their[: len(own)], own[: len(their)], episodes, upwards)
        for name, own in found.items()
        for other, their in others.items()
        if name != other
    }


@dataclass(frozen=True)
class Bar:
    """One registered bar: what is asked, what was measured, whether it is met."""

    what: str
    measured: str
    met: bool


def bars(
    ours: Mapping[str, Paired],
    controls: Mapping[str, Mapping[str, Paired]],
    best: Paired | None,
    means: Mapping[str, float],
    upwards: Mapping[str, bool],
) -> list[Bar]:
    """The registered bars.

    Args:
        ours: `post-trained` less base.
        controls: `post-trained` less each control.
        best: exterior LPIPS of `post-trained` less that of the base at its LPIPS-best number of calls.
        means: the base's numbers.
        upwards: whether more is better, by name.
    """

    def no_worse(pair: Paired, name: str) -> bool:
        return pair.change_high >= 0 if upwards[name] else pair.change_low <= 0

    made = []
    for name, pair in {"base": ours["reward"], **{name: row["reward"] for name, row in controls.items()}}.items():
        made.append(Bar(f"reward above {name}", _change(pair, "reward"), pair.change_low > 0))
    lpips, psnr = ours["exterior lpips"], ours["exterior psnr"]
    share = 100 * lpips.change / means["exterior lpips"]
    made.append(Bar("exterior LPIPS at least 8% lower", f"{share:+.1f}%", share <= -8))
    made.append(Bar("exterior PSNR at least 0.6 dB higher", _change(psnr, "psnr"), psnr.change >= 0.6))
    won = 100 * ours["reward"].win_rate
    made.append(Bar("90% of pairs won (reward)", f"{won:.0f}%", won >= 90))
    if best:
        met = no_worse(best, "exterior lpips")
        made.append(Bar("exterior LPIPS no worse than the base's best", _change(best, "lpips"), met))
    for name, pair in ours.items():
        metric = name.split(" ")[-1]
        if name != "reward" and (name.startswith("wrist") or metric not in METRICS):
            made.append(Bar(f"{name} not worse", _change(pair, name), no_worse(pair, name)))
    return made


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


def by_bar(found: Sequence[Bar]) -> str:
    """A table, a line a bar."""
    lines = ["### bars", "", "| bar | measured | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {b.what} | {b.measured} | {'met' if b.met else 'missed'} |" for b in found), ""])


def measured(
    proof: Proof, settings: Settings, folder: Path, arms: Sequence[Arm], seeds: Sequence[int]
) -> dict[str, list[Numbers]]:
    """Numbers of every arm, a list over training seeds.

    Raises:
        SystemExit: one is not trained to the end; nothing is rolled out then.
    """
    if lacking := [proof.folder(arm, seed).name for arm in arms for seed in seeds if not proof.done(arm, seed)]:
        raise SystemExit(f"error: not trained to the end: {', '.join(lacking)}")
    return {
        arm.name: [
            numbers(settings, rollouts(settings, folder, proof.folder(arm, seed).name, proof.weights(arm, seed)))
            for seed in seeds
        ]
        for arm in arms
    }


def base_numbers(proof: Proof, settings: Settings, folder: Path) -> Numbers:
    """The base's numbers, at the settings' number of calls."""
    name = f"base-{settings.sampling.steps}-calls"
    return numbers(settings, rollouts(settings, folder, name, {"ckpt": proof.base, "adapter": ""}))


def tested(proof: Proof, dataset: str, lpips_best: int, options: argparse.Namespace) -> dict[str, Any]:
    """Open the test: roll everything out, compare."""
    settings = opened(proof.settings, dataset, EPISODES["test"], options.noise_seeds)
    folder = proof.output / "rollouts-test"
    found = measured(proof, settings, folder, registered(settings), options.training_seeds)
    base = base_numbers(proof, settings, folder)
    ours = {name: own for name, own in found.items() if name == "post-trained"}
    controls = {name: own for name, own in found.items() if name not in ours}
    tables = {
        "less base": less(settings, found, {"base": [base] * len(options.training_seeds)}),
        "less the controls": less(settings, ours, controls, "{1}"),
    }
    best = None
    if lpips_best:
        few = opened(proof.settings, dataset, EPISODES["test"], options.noise_seeds, lpips_best)
        at_best = base_numbers(proof, few, folder)
        tables[f"less base at {lpips_best} calls"] = less(settings, ours, {"": [at_best] * len(options.training_seeds)})
        best = tables[f"less base at {lpips_best} calls"]["post-trained"]["exterior lpips"]
    means = {name: float(value.mean()) for name, value in base.items()}
    upwards = better_upwards(settings)
    met = bars(tables["less base"]["post-trained"], tables["less the controls"], best, means, upwards)
    shown = [by_figure(title, rows, means if title == "less base" else None) for title, rows in tables.items() if rows]
    return {
        "pairs": len(base["reward"]) * len(options.training_seeds),
        "training_seeds": options.training_seeds,
        "arms": {arm.name: proof.identity(arm, 0) for arm in registered(settings)},
        "sampling": jsonable(settings.sampling),
        "episodes": settings.eval.episodes,
        "noise_seeds": settings.eval.seeds,
        "base": means,
        "tables": tables,
        "bars": [vars(bar) for bar in met],
        "text": "\n".join([by_bar(met), *shown]),
    }


def looked(proof: Proof, title: str, arms: Sequence[Arm], options: argparse.Namespace) -> dict[str, Any]:
    """Compare single runs on validation episodes with one noise seed: learning rates, ablations."""
    dataset = str(proof.settings.world.dataset)
    settings = opened(proof.settings, dataset, options.episodes or EPISODES["choose"], 1)
    folder = proof.output / "rollouts-validation"
    base = base_numbers(proof, settings, folder)
    found = measured(proof, settings, folder, arms, SEEDS[:1])
    tables = {f"{title} less base": less(settings, found, {"base": [base]})}
    unchanged = {name: own for name, own in found.items() if name == AS_IT_IS}
    if unchanged:
        tables[f"{title} less as it is"] = less(settings, found, unchanged)
    means = {name: float(value.mean()) for name, value in base.items()}
    text = "\n".join(by_arm(name, rows) for name, rows in tables.items() if rows)
    return {"pairs": len(base["reward"]), "base": means, "tables": tables, "text": text}


def written(proof: Proof, name: str, result: dict[str, Any]) -> None:
    """Write `<name>.json` and `<name>.md`, and print the tables."""
    text = result.pop("text")
    tables = {
        title: {label: {k: vars(p) for k, p in cells.items()} for label, cells in rows.items()}
        for title, rows in result["tables"].items()
    }
    write_json(proof.output / f"{name}.json", {**result, "tables": tables})
    write_text(proof.output / f"{name}.md", text)
    print(text)


def main() -> None:
    """Train, choose, ablate, or test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--ckpt", default="", help="the base's weights; the preset's by default")
    parser.add_argument("--dataset", help="training and validation episodes; the preset's by default")
    parser.add_argument("--test-dataset", help="episodes of the test (split val)")
    parser.add_argument("--output", type=Path, default=Path("outputs/proof"))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--num-processes", type=int, default=1, help="processes that train one arm together")
    parser.add_argument("--training-seeds", type=lambda text: [int(one) for one in text.split(",")], default=[*SEEDS])
    parser.add_argument("--noise-seeds", type=int, default=NOISE_SEEDS)
    parser.add_argument("--episodes", type=int, default=0, help="the first so many validation episodes")
    parser.add_argument("--lpips-best", type=int, default=0, help="calls at which the base's exterior LPIPS is lowest")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--choose", action="store_true", help="learning rates of the controls")
    what.add_argument("--ablate", action="store_true", help="the ablations")
    what.add_argument("--test", action="store_true", help="open the test")
    options = parser.parse_args()
    settings = resolve_settings(options.preset, flags={"world.dataset": options.dataset}).settings
    if options.test and (options.episodes or not options.test_dataset):
        parser.error("the test is of --test-dataset, all of its registered episodes")
    if options.test and Path(options.test_dataset).resolve() == Path(str(settings.world.dataset)).resolve():
        parser.error("the test needs episodes that nothing was chosen on: another --test-dataset")
    scorer_of(settings)  # a missing referee shows before hours of training
    proof = Proof(options.preset, options.ckpt, settings, options.output, options.updates, options.num_processes)
    name, arms = ("choose", candidates(settings)) if options.choose else ("ablations", ablations(settings))
    looking = options.choose or options.ablate
    if not options.test:
        proof.train(*((arms, SEEDS[:1]) if looking else (registered(settings), options.training_seeds)))
    if looking or options.test:
        become_worker("benchmarks.proof")  # not before: what trains would inherit its threads
    if options.test:
        written(proof, "proof", tested(proof, options.test_dataset, options.lpips_best, options))
    elif looking:
        written(proof, name, looked(proof, name, arms, options))


if __name__ == "__main__":
    main()
