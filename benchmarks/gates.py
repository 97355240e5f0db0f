"""Gates that a shipped base model must pass, measured on held-out episodes (printed as JSON).

`python -m benchmarks.gates --dataset outputs/world [--raw DIR] [--ckpt PATH] [--clips 96] [--steps 1,4,8]`

1. vae: share of coloured object pixels that survive encoding and decoding, by camera (gate: 0.80 in every view).
2. clip: one clip from real history, its fourth new frame, by group of cameras and number of sampling steps: PSNR, its
   gain over copying the current frame, PSNR where pixels moved, LPIPS; means over clips, standard error of the gain
   (gates: `CLIP_GATES`).
3. closed: 14 interactions of the first `--episodes` held-out episodes, by group and number of sampling steps: reward,
   metrics and referees against copying the first frame, and the share of places where the judge finds the objects in
   the last third (gates: better than copying in every metric, LPIPS by 25%, objects placed 60%).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.proof import GROUPS, METRICS, STEPS
from persistworld_cli.checkpoints.action_scale import weights_stores
from persistworld_cli.checkpoints.loading import load_world_model
from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.settings import Settings
from persistworld_cli.data.clips.clips import ClipSource
from persistworld_cli.data.clips.store import EpisodeStore, open_store
from persistworld_cli.metrics.lpips import Lpips
from persistworld_cli.metrics.masks import hsv, hue_distance, masked_psnr, moving_mask, object_mask
from persistworld_cli.metrics.psnr import psnr
from persistworld_cli.metrics.referees import load_referees
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.models.world_model import WorldModel
from persistworld_cli.policies.bundled_world.judge import locate
from persistworld_cli.policies.bundled_world.scene import find_recorded
from persistworld_cli.policies.judge import Evidence
from persistworld_cli.rollout.closed_loop import ClosedLoop, ScoredRollout, reward_of
from persistworld_cli.rollout.engine import Inputs, RolloutEngine, rollout_noise
from persistworld_cli.rollout.images import draw_frames
from persistworld_cli.rollout.interactive import make_start
from persistworld_cli.rollout.recording import Item

LENGTH = STEPS  # interactions of a rollout
TIE_DB = 0.01  # numbers of steps this close are equal: the fewer is the better
HUE_KEPT = 25.0  # degrees: half the gap between neighbouring object colours (red and yellow, 49)
SATURATION_KEPT = 0.6  # part of the recorded pixel's saturation that must be left
VALUE_KEPT = 0.5  # and of its brightness
# Of the fourth new frame, in dB: PSNR, its gain over copying the current frame, PSNR of pixels that moved
CLIP_GATES = {
    ("exterior", "psnr"): 26.0,
    ("exterior", "gain"): 6.0,
    ("exterior", "moving"): 19.0,
    ("wrist", "gain"): 4.0,
}


def to_unit(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float (..., 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


def object_colours(settings: Settings) -> dict[str, list[list[float]]]:
    """Episode id to the RGB of its objects, from the bundled recordings."""
    path = resolve_path(settings.world.raw) / "meta" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {str(line["episode_index"]): [o["rgb"] for o in line["objects"]] for line in lines}


@dataclass(frozen=True)
class Survival:
    """How much of the recording's colour a reconstruction keeps.

    Attributes:
        share: (V,) part of each camera's coloured pixels that survive; NaN where a camera shows none.
        pixels: (V,) how many coloured pixels there were, over all frames.
    """

    share: NDArray[np.float64]
    pixels: NDArray[np.int64]

    def __add__(self, other: Survival) -> Survival:
        """Pool two episodes (each pixel counts once)."""
        pixels = self.pixels + other.pixels
        kept = np.nan_to_num(self.share) * self.pixels + np.nan_to_num(other.share) * other.pixels
        return Survival(np.where(pixels > 0, kept / np.maximum(pixels, 1), np.nan), pixels)


def coloured_pixel_survival(
    original: NDArray[np.uint8], reconstructed: NDArray[np.uint8], colours: Sequence[Sequence[float]] | None = None
) -> Survival:
    """Share of the recording's coloured object pixels that keep their colour in a reconstruction, camera by camera.

    A pixel of `object_mask` survives when, at the same place, the reconstruction is within 25 degrees of its hue and
    has at least 0.6 of its saturation and 0.5 of its value. A block that faded into the table fails on saturation, one
    that turned another colour on hue, one that moved away on both.

    Args:
        original, reconstructed: uint8 (N, V, H, W, 3).
        colours: as for `object_mask`.
    """
    mask = object_mask(original, colours)
    hue, saturation, value = hsv(original.astype(np.float64) / 255.0)
    new_hue, new_saturation, new_value = hsv(reconstructed.astype(np.float64) / 255.0)
    kept = hue_distance(new_hue, hue) <= HUE_KEPT
    kept &= (new_saturation >= SATURATION_KEPT * saturation) & (new_value >= VALUE_KEPT * value)
    pixels = mask.sum(axis=(0, 2, 3))
    alive = (mask & kept).sum(axis=(0, 2, 3))
    return Survival(np.where(pixels > 0, alive / np.maximum(pixels, 1), np.nan), pixels.astype(np.int64))


def vae_gate(model: WorldModel, store: EpisodeStore, settings: Settings) -> dict[str, Any]:
    """Survival of coloured object pixels and PSNR of images through the VAE, by camera."""
    colours = object_colours(settings)
    total, quality = None, []
    for episode in store.episodes("val"):
        ids = list(range(0, store.annotation("val", episode).num_frames, 8))
        real = store.frames("val", episode, ids)
        made = model.decode_latents(model.encode_frames(torch.from_numpy(real)), 5)
        quality.append(psnr(made, to_unit(real)))
        back = (made.movedim(-3, -1) * 255).round().byte().numpy()
        one = coloured_pixel_survival(real, back, colours[episode])
        total = one if total is None else total + one
    assert total is not None
    share = dict(zip(settings.world.cameras, [round(float(s), 4) for s in total.share], strict=True))
    return {
        "survival": share,
        "pixels": total.pixels.tolist(),
        "psnr": [round(q, 2) for q in torch.cat(quality).mean(0).tolist()],
        "pass": min(share.values()) >= 0.8,
    }


def by_group(values: torch.Tensor, settings: Settings) -> dict[str, torch.Tensor]:
    """Values (N, V) averaged over the cameras of each group, (N,); NaN where every camera's is."""
    world = settings.world
    groups = {"exterior": world.exterior, "wrist": world.wrist}
    return {name: values[:, list(cameras)].nanmean(dim=1) for name, cameras in groups.items() if cameras}


@torch.no_grad()
def clip_gate(
    model: WorldModel, store: EpisodeStore, settings: Settings, steps: list[int], count: int
) -> dict[str, Any]:
    """One clip from real history: the fourth new frame against copying the current one, for each number of steps."""
    clips_settings = replace(settings.clips, zero_history_prob=0.0, rollout_history_prob=1.0, max_step=1)
    source = ClipSource(store, "val", clips_settings, sampling=settings.sampling)
    rng = np.random.default_rng(7)
    rows, ids = zip(*(source.draw_ids(rng) for _ in range(count)), strict=True)
    clips = [(source.index.ids[row], frames) for row, frames in zip(rows, ids, strict=True)]
    latents = torch.stack([store.latents("val", episode, frames) for episode, frames in clips])
    actions = torch.from_numpy(source.actions(rows, np.array(ids)))
    p = settings.model.num_history
    inputs = Inputs(
        latents[:, :p], latents[:, p], actions, model.text_embeds([source.index.texts[row] for row in rows])
    )
    real = torch.stack([to_unit(store.frames("val", episode, [frames[p], frames[-1]])) for episode, frames in clips])
    current, target = real[:, 0], real[:, 1]
    moved, lpips = moving_mask(target, current), Lpips()

    def measure(made: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        """Group -> quantity -> (clips,)."""
        measured = {
            "psnr": psnr(made, target),
            "moving": masked_psnr(made, target, moved),
            "lpips": lpips(made.flatten(0, 1), target.flatten(0, 1)).unflatten(0, made.shape[:2]),
        }
        parts = {name: by_group(values, settings) for name, values in measured.items()}
        return {group: {name: parts[name][group] for name in parts} for group in parts["psnr"]}

    def means(measured: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
        return {
            group: {name: round(values.nanmean().item(), 4) for name, values in by_name.items()}
            for group, by_name in measured.items()
        }

    copied = measure(current)
    out: dict[str, Any] = {"clips": count, "copy": means(copied), "steps": {}}
    for n in steps:
        engine = RolloutEngine(model, replace(settings.sampling, steps=n), store.stat())
        noise = rollout_noise([(0, "gate", i, 0) for i in range(count)], engine.noise_shape)
        made = torch.cat(
            [
                model.decode_latents(engine.sample(engine.condition(inputs.select(part)), noise[part]), 0)[:, -1]
                for part in (slice(i, i + 16) for i in range(0, count, 16))
            ]
        )
        measured = measure(made)
        row = out["steps"][n] = means(measured)
        for group, by_name in measured.items():
            gain = by_name["psnr"] - copied[group]["psnr"]
            row[group] |= {"gain": round(gain.mean().item(), 4), "se": round(gain.std().item() / count**0.5, 4)}
        row["pass"] = all(row[group][name] >= bar for (group, name), bar in CLIP_GATES.items())
    first = next(iter(copied))
    top = max(row[first]["psnr"] for row in out["steps"].values())
    out["best"] = min(n for n, row in out["steps"].items() if row[first]["psnr"] >= top - TIE_DB)
    out["pass"] = [n for n, row in out["steps"].items() if row["pass"]]
    return out


@torch.no_grad()
def closed_gate(
    model: WorldModel, store: EpisodeStore, settings: Settings, steps: list[int], count: int
) -> dict[str, Any]:
    """Rollouts from frame 0 of held-out episodes, one noise seed, for each number of steps."""
    scorer = Scorer(settings.rewards, settings.world, "cpu", names=METRICS)
    scorer = scorer.with_referees(load_referees(settings.post_train.referees, scorer.device, Path(store.root)))
    items = [Item(episode) for episode in store.episodes("val")[:count]]

    def loop(n: int) -> ClosedLoop:
        engine = RolloutEngine(model, replace(settings.sampling, steps=n), store.stat())
        return ClosedLoop(engine, store, "val", LENGTH, settings.eval.batch, scorer)

    def numbers(made: Sequence[ScoredRollout]) -> dict[str, Any]:
        """The reward, and group -> metric -> mean over rollouts."""
        stacked = {name: np.stack([rollout.scores[name] for rollout in made]) for name in scorer.names}
        parts = {
            name: by_group(torch.from_numpy(np.nanmean(value, axis=1)), settings) for name, value in stacked.items()
        }
        groups = next(iter(parts.values()))
        found = {group: {name: round(own[group].mean().item(), 4) for name, own in parts.items()} for group in groups}
        return {"reward": round(float(reward_of(scorer, stacked).mean()), 4), **found}

    def placed(rollout: ScoredRollout | None, item: Item) -> float:
        """Share of places (frames x objects) of the last third that the judge finds; None: in the recording."""
        start = make_start(store, item, "val")
        scene, recording = find_recorded(settings, start), recorder.recording(item)
        drawn = recording.frames if rollout is None else frames_of(rollout, recording.size)
        frames = np.concatenate([recording.first[None], drawn])
        poses = start.annotation.states[: len(frames)]
        evidence = Evidence(
            episode=item.episode,
            start=0,
            seed=0,
            instruction=start.text,
            cameras=settings.world.cameras,
            rate_hz=settings.world.rate_hz,
            frames=frames[: len(poses)],
            poses=poses,
            joint_pos=np.empty((0, 7)),
            joint_vel=np.empty((0, 7)),
            objects=scene.objects,
        )
        found = np.isfinite(locate(evidence, range(len(scene.objects)))).all(axis=-1)
        return float(found[-(len(found) // 3) :].mean())

    def frames_of(rollout: ScoredRollout, size: tuple[int, ...]) -> NDArray[np.uint8]:
        assert rollout.latents is not None
        return draw_frames(model, rollout.latents, settings.sampling, size)

    recorder = loop(steps[0])
    copied = numbers([recorder.references(item)[0] for item in items])
    out: dict[str, Any] = {"episodes": len(items), "copy": copied, "steps": {}}
    out["recorded_placed"] = round(float(np.mean([placed(None, item) for item in items])), 4)
    for n in steps:
        made = list(loop(n).roll(items, keep_latents=True))
        row = out["steps"][n] = numbers(made)
        row["placed"] = round(float(np.mean([placed(one, one.item) for one in made])), 4)
        shares = {group: round(row[group]["lpips"] / copied[group]["lpips"] - 1, 4) for group in row if group in GROUPS}
        better = [
            (row[group][name] > copied[group][name]) is metric.higher_is_better
            for group in shares
            for name, metric in scorer.registered.items()
        ]
        row["lpips_against_copy"] = shares
        row["pass"] = all(better) and max(shares.values()) <= -0.25 and row["placed"] >= 0.6
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--raw", default="", help="the recording that the dataset was made from, for its colours")
    parser.add_argument("--ckpt")
    parser.add_argument("--adapter", default="")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--steps", default="1,4,8")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, for instance sampling.sigma_min=0.1")
    parser.add_argument("--gates", default="vae,clip")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if unknown := {*options.gates.split(",")} - {"vae", "clip", "closed"}:
        parser.error(f"no gate {', '.join(sorted(unknown))}: there are vae, clip and closed")
    settings = load_settings(options.preset, options.set, {})
    world = replace(settings.world, dataset=str(options.dataset), raw=options.raw or settings.world.raw)
    settings = replace(settings, world=world)
    store = open_store(settings)
    parts = [part for part in (options.adapter, options.ckpt or settings.model.ckpt) if part]
    (store,) = weights_stores(settings, store, [parts], split="val", episodes=store.episodes("val"))
    model = load_world_model(settings.model, settings.world, ckpt=options.ckpt, adapter=options.adapter)
    result: dict[str, Any] = {}
    chosen, steps = options.gates.split(","), [int(count) for count in options.steps.split(",")]
    if "vae" in chosen:
        result["vae"] = vae_gate(model, store, settings)
    if "clip" in chosen:
        result["clip"] = clip_gate(model, store, settings, steps, options.clips)
    if "closed" in chosen:
        result["closed"] = closed_gate(model, store, settings, steps, options.episodes)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
