"""Which layers an update teaches, and how many groups it needs: how much of a post-training gradient is signal.

`python -m benchmarks.gradient_signal [--dataset DIR] [--groups 32] [--most 12] [--output DIR]`

Groups of the preset's post-training, each from another start, at the base (theta = old = reference); no step is taken.
Each gives one gradient per kind:

- `patch`, `rollout`: the objective with that credit.
- `permuted`: the optimality of `patch`, dealt to the group's candidates at random. What it has in common between groups
  is not the reward.
- `recorded`: towards the recorded frames, from the same own history.

`own noise`: each candidate has its own noise level and noise, as in training. `shared noise`: the candidates of a group
have the same.

With gradients g of N groups, the square of the mean gradient is estimated by the mean of g_i . g_j over i != j. Its
share of the mean of |g|^2 is the `share` of signal; an update of 1 / share - 1 groups has as much signal as noise.
`z` is the share over its standard error without signal. Printed for all parameters, for the action encoder, and for
the layers with the highest z; `signal.json` has every layer. Finished groups are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.worker_process import become_worker
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PostTrainRequest
from persistworld_cli.files import write_json
from persistworld_cli.objective.advantage import keep_extremes
from persistworld_cli.objective.nft import nft_loss
from persistworld_cli.reports.progress import Meter
from persistworld_cli.seeding import generator
from persistworld_cli.training.candidates import Candidates, credit
from persistworld_cli.training.policy_switch import PolicySwitch
from persistworld_cli.training.post_train import PostTrainer
from persistworld_cli.training.run import Run

OWN, SHARED = "own noise", "shared noise"
KINDS = {OWN: ("patch", "permuted", "recorded"), SHARED: ("patch", "permuted", "rollout")}
ALL, ENCODER = "all", "action encoder"
Gradients = NDArray[np.float32]  # (groups, parameters)


def gradients(
    trainer: PostTrainer,
    made: Candidates,
    rows: Tensor,
    targets: Tensor,
    credits: Mapping[str, Tensor],
    keys: list[tuple[int, ...]],
) -> dict[str, Tensor]:
    """The gradient of each kind, flat, from the same noise levels and noise.

    Args:
        trainer: at the base.
        made: one group's candidates.
        rows: (n,) the kept ones.
        targets: the recorded latents (L, C, h, w).
        credits: optimality of the kept ones by kind.
        keys: n, of the noise.
    """
    options, parameters = trainer.options, trainer.switch.trainable()
    found = {kind: torch.zeros(sum(p.numel() for p in parameters)) for kind in credits}
    for part in torch.arange(len(rows)).split(options.micro_batch):
        inputs = made.inputs[0].select(rows[part])
        own, recorded = made.x0[0][rows[part]], targets.expand(len(part), *targets.shape)
        for x0, objective in ((own, options.objective), (recorded, "recorded")):
            kinds = [kind for kind in credits if (kind == "recorded") == (objective == "recorded")]
            if not kinds:
                continue
            noisy, sigma = trainer.noised(x0, [keys[place] for place in part])
            with trainer.work.accelerator.autocast():
                theta = trainer.model.denoise(noisy, sigma, trainer.engine.condition(inputs)).float()
            beta = options.beta if objective == "nft" else 1.0
            for kind in kinds:
                loss = nft_loss(theta, theta, x0, credits[kind][part], beta=beta, weighting=options.weighting)
                whole = kind == kinds[-1]
                parts = torch.autograd.grad(
                    loss.sum() / len(rows), parameters, retain_graph=not whole, allow_unused=True
                )
                flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
                found[kind] += torch.cat([g.float().flatten() for g in flat])
    return found


def of_group(trainer: PostTrainer, number: int) -> dict[str, Gradients]:
    """The gradients of a group, the only one of update `number`: ``patch, own noise`` and so on."""
    options, maker = trainer.options, trainer.maker
    plan = maker.plan(number, 0)
    with trainer.switch.use("old", sampling=True):
        made = maker.make([plan], number)
    rows = keep_extremes(made.reward.cpu(), options.keep_best, options.keep_worst)[0]
    patch = credit(made, trainer.scorer, replace(options, credit="patch"))[rows, 0]
    rollout = credit(made, trainer.scorer, replace(options, credit="rollout"))[rows]
    dealt = patch[torch.randperm(len(rows), generator=generator("gradient signal", number))]
    credits = {"patch": patch, "permuted": dealt, "rollout": rollout, "recorded": torch.ones_like(rollout)}
    keys = {
        OWN: [(options.seed, number, plan.number, place, 0, 0) for place in range(len(rows))],
        SHARED: [(options.seed, number, plan.number)] * len(rows),
    }
    targets = maker.recorded_latents(plan, 0).to(made.x0[0])
    found: dict[str, Gradients] = {}
    for noise, kinds in KINDS.items():
        of = gradients(trainer, made, rows, targets, {kind: credits[kind] for kind in kinds}, keys[noise])
        found |= {f"{kind}, {noise}": gradient.numpy() for kind, gradient in of.items()}
    return found


def layers(switch: PolicySwitch) -> dict[str, NDArray[np.int64]]:
    """Where the parameters of every layer lie in a flat gradient; of the action encoder; of all."""
    names = {id(p): name.split(".lora_")[0] for name, p in switch.model.unet.named_parameters()}
    names |= {id(p): ENCODER for p in switch.encoders["theta"].parameters()}
    places: dict[str, list[NDArray[np.int64]]] = {}
    begin = 0
    for parameter in switch.trainable():
        own = np.arange(begin, begin := begin + parameter.numel())
        for name in (ALL, names[id(parameter)]):
            places.setdefault(name, []).append(own)
    return {name: np.concatenate(parts) for name, parts in places.items()}


@dataclass(frozen=True)
class Signal:
    """How much of a gradient is signal.

    Attributes:
        share: of the mean square.
        z: the share over its standard error without signal.
        square: mean of |g|^2.
    """

    share: float
    z: float
    square: float

    @property
    def groups(self) -> float:
        """Of an update that has as much signal as noise; infinite where no signal was seen."""
        return 1 / self.share - 1 if self.share > 0 else float("inf")


def signal(made: Gradients) -> Signal:
    """Of the gradients of some groups (N, n)."""
    products = (made @ made.T).astype(np.float64)
    count, square = len(products), float(np.trace(products) / len(products))
    apart = products[~np.eye(count, dtype=bool)]
    if not square:
        return Signal(0.0, 0.0, 0.0)
    error = float(apart.std()) * (2 / (count * (count - 1))) ** 0.5  # g_i . g_j is counted twice
    return Signal(float(apart.mean()) / square, float(apart.mean()) / error, square)


def table(found: Mapping[str, Signal], most: int) -> str:
    """All, the action encoder, and the layers with the highest z."""
    rest = sorted((name for name in found if name not in (ALL, ENCODER)), key=lambda name: -found[name].z)
    lines = ["| | share of signal | z | groups for signal = noise | share of the square |", "|---|---|---|---|---|"]
    for name in [name for name in (ALL, ENCODER, *rest[:most]) if name in found]:
        one = found[name]
        part = one.square / found[ALL].square
        lines.append(f"| {name} | {one.share:+.4f} | {one.z:+.1f} | {one.groups:.0f} | {part:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Compute, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dataset", help="training episodes; the preset's by default")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--most", type=int, default=12, help="layers to print")
    parser.add_argument("--output", type=Path, default=Path("outputs/gradient-signal"))
    options = parser.parse_args()
    become_worker("benchmarks.gradient_signal")
    flags = {"world.dataset": options.dataset, "post_train.groups": 1, "launch.trackers": ("none",)}
    settings = load_settings(options.preset, flags=flags)
    options.output.mkdir(parents=True, exist_ok=True)
    files = [options.output / f"{number}.npz" for number in range(options.groups)]
    with (
        TemporaryDirectory() as folder,
        Run.of(settings, settings.post_train, PostTrainRequest(output=Path(folder))) as work,
    ):
        trainer = PostTrainer(settings, work)
        places = layers(trainer.switch)
        with Meter("gradient signal", len(files)) as meter:
            for number, file in enumerate(files):
                if not file.is_file():
                    partial = file.with_suffix(".partial.npz")
                    np.savez(partial, **of_group(trainer, number))
                    partial.replace(file)
                meter.advance()
    report: dict[str, dict[str, Signal]] = {}
    for name in (f"{kind}, {noise}" for noise, kinds in KINDS.items() for kind in kinds):
        made = np.stack([np.load(file)[name] for file in files])
        report[name] = {layer: signal(made[:, own]) for layer, own in places.items()}
        print(f"### {name}, {len(files)} groups\n\n{table(report[name], options.most)}\n")
    write_json(
        options.output / "signal.json",
        {name: {layer: asdict(one) for layer, one in found.items()} for name, found in report.items()},
    )


if __name__ == "__main__":
    main()
