"""Prefix, branch, score, credit: post-training's candidates (PersistWorld, arXiv 2603.25685).

Shapes: G groups on this rank, K candidates per group, F chunks, L frames per chunk, V cameras, H x W image.
Every draw is a function of (seed, update, global number of the group), so the split over ranks changes nothing, and
neither does which rank samples a candidate (`sharing.divide`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from persistworld_cli.config.settings import PostTrainSettings, SamplingSettings
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.metrics.score import Scorer
from persistworld_cli.objective.advantage import credit_map, group_advantages, optimality
from persistworld_cli.rollout.engine import Inputs, RolloutEngine, RolloutState
from persistworld_cli.rollout.images import draw_images, to_unit
from persistworld_cli.rollout.recording import Item, NoiseKey, Start
from persistworld_cli.seeding import generator
from persistworld_cli.training.sharing import Draw, Share, divide


@dataclass(frozen=True)
class GroupPlan:
    """One group: its episode, first real frame, prefix length in interactions, and number for its noise."""

    episode: str
    start: int
    prefix: int
    number: int


@dataclass
class Candidates:
    """G * K scored candidates, group by group.

    inputs: of each chunk, rows (G * K); x0: each chunk's latents (G * K, L, C, h, w); reward (G, K);
    metrics: name -> (G * K, frames, V); images (G * K, frames, V, 3, H, W) and recorded (G, ...), frames F * (L - 1);
    seconds: by stage.
    """

    inputs: list[Inputs]
    x0: list[torch.Tensor]
    reward: torch.Tensor
    metrics: dict[str, torch.Tensor]
    images: torch.Tensor
    recorded: torch.Tensor
    seconds: dict[str, float]


def prefix_limit(options: PostTrainSettings, update: int) -> int:
    """Longest prefix at an update: fixed and uniform as set, curriculum growing linearly over the run."""
    if options.prefix != "curriculum":
        return options.prefix_max
    return round(options.prefix_max * min(1.0, (update + 1) / max(1, options.updates)))


def sampling_calls(options: PostTrainSettings, sampling: SamplingSettings) -> tuple[int, int]:
    """Calls of the network for an interaction of a prefix, and for a candidate: their ratio is what counts."""
    return sampling.steps, options.chunks * (options.steps or sampling.steps)


def sampled_together(options: PostTrainSettings) -> int:
    """How many clips are sampled at once, at most: without gradients, each takes less memory than in learning."""
    return 4 * options.micro_batch


def exploration(keys: Iterable[NoiseKey], x0: torch.Tensor, views: int, options: PostTrainSettings) -> torch.Tensor:
    """Smooth noise (M, L, C, h, w) for candidates x0 of that shape; row 0, which no image scores, stays 0 (ours).

    A model sampled in one call hardly varies, and a group without spread teaches nothing: candidates are then the
    prediction plus Gaussian noise, one number per frame, camera, channel and cell of `credit_grid`.
    """
    rows, columns = options.credit_grid
    _, frames, channels, height, width = x0.shape
    coarse = torch.stack(
        [torch.randn(frames, views, channels, rows, columns, generator=generator("explore", *key)) for key in keys]
    )
    fine = functional.interpolate(coarse.flatten(0, 2), size=(height // views, width), mode="nearest")
    stacked = fine.unflatten(0, coarse.shape[:3]).movedim(2, 3).flatten(3, 4)
    stacked[:, 0] = 0.0
    return options.explore * stacked


class CandidateMaker:
    """Makes candidates with the policy that is active on the engine's model (it should be the sampling policy)."""

    def __init__(
        self,
        engine: RolloutEngine,
        store: EpisodeStore,
        scorer: Scorer,
        options: PostTrainSettings,
        shares: Sequence[Share],
        rank: int,
        gather: Callable[[list[Any]], list[Any]],
        split: str = "train",
    ) -> None:
        self.engine, self.store, self.scorer, self.options = engine, store, scorer, options
        self.shares, self.rank, self.gather = shares, rank, gather  # of all ranks; this one; as `Run.gather`
        self.split = split
        self.together = sampled_together(options)
        self._annotation = lru_cache(64)(lambda episode: store.annotation(split, episode))
        steps = options.steps or engine.sampling.steps
        self.brancher = RolloutEngine(engine.model, replace(engine.sampling, steps=steps), engine.stat, engine.entries)
        self.num_frames = engine.model.settings.num_frames
        self.new_frames = self.num_frames - 1
        index = store.index(split)  # reading every annotation of a large dataset takes minutes
        lengths = {episode: int(length) for episode, length in zip(index.ids, index.lengths, strict=True)}
        least = options.prefix_max if options.prefix == "fixed" else 0
        needed = self.new_frames * (least + options.chunks) + 1
        self.lengths = {episode: lengths[episode] for episode in sorted(lengths) if lengths[episode] >= needed}
        self.episodes = list(self.lengths)
        if not self.episodes:
            raise PersistWorldError(
                f"no {split} episode is long enough: prefix {least} and {options.chunks} chunk(s) need "
                f"{needed} frames, the longest has {max(lengths.values(), default=0)}",
                where="post_train.prefix_max",
                fix="shorten the prefix or add longer episodes",
            )

    def plan(self, update: int, number: int) -> GroupPlan:
        """Group `number` (over all ranks) of an update."""
        options = self.options
        rng = np.random.default_rng((options.seed, update, number))
        episode = self.episodes[rng.integers(len(self.episodes))]
        longest = min(prefix_limit(options, update), (self.lengths[episode] - 1) // self.new_frames - options.chunks)
        prefix = longest if options.prefix == "fixed" else int(rng.integers(longest + 1))
        last_start = self.lengths[episode] - 1 - self.new_frames * (prefix + options.chunks)
        return GroupPlan(episode, int(rng.integers(last_start + 1)), prefix, number)

    def start(self, plan: GroupPlan) -> Start:
        """Where a group's prefix begins."""
        annotation = self._annotation(plan.episode)
        return Start(Item(plan.episode, plan.start, self.options.seed), self.split, annotation, annotation.text)

    def poses(self, plan: GroupPlan, interaction: int) -> np.ndarray:
        """The recorded poses (1, L, D) of a group's interaction, counted from its start."""
        return self.start(plan).poses(interaction, self.num_frames)[None]

    def prefixes(self, plans: list[GroupPlan], update: int) -> list[RolloutState]:
        """Roll out groups' prefixes, `together` at a time; each group's own state (1 row) at the end of its prefix."""
        if len(plans) > self.together:
            return self.prefixes(plans[: self.together], update) + self.prefixes(plans[self.together :], update)
        keys: list[NoiseKey] = [(self.options.seed, f"prefix {update}", p.number) for p in plans]
        state = self.engine.start_from(self.store, [self.start(p) for p in plans], keys)
        live = list(range(len(plans)))
        ready: dict[int, RolloutState] = {}
        for interaction in range(max(p.prefix for p in plans) + 1):
            for row, group in enumerate(live):
                if plans[group].prefix == interaction:
                    ready[group] = state.select([row])
            rows = [row for row, group in enumerate(live) if plans[group].prefix > interaction]
            live = [live[row] for row in rows]
            if not live:
                break
            state = state.select(rows)
            poses = np.concatenate([self.poses(plans[group], interaction) for group in live])
            self.engine.step(state, poses, self.engine.noise(state))
        return [ready[g] for g in range(len(plans))]

    @torch.no_grad()
    def make(self, plans: list[GroupPlan], update: int) -> Candidates:
        """Prefix, branches and scores of this rank's candidates; ``plans``: of all groups, by number."""
        share = self.shares[self.rank]
        own = [plans[group] for group in share.groups]
        clock = [time.perf_counter()]
        states = dict(zip(share.groups, self.prefixes(own, update), strict=True))
        chunks_in, chunks_x0 = self._shared(plans, states, update)
        clock.append(time.perf_counter())
        model, sampling = self.engine.model, self.engine.sampling
        images = torch.cat([draw_images(model, x, sampling)[:, 1:] for x in chunks_x0], dim=1)
        clock.append(time.perf_counter())
        recorded = torch.stack([self.recorded(p) for p in own]).to(images.device)
        metrics = self.scorer.metrics(images, recorded)
        reward = self.scorer.reward(metrics).view(len(own), -1)
        clock.append(time.perf_counter())
        seconds = dict(zip(("sampling", "decoding", "scoring"), np.diff(clock).tolist(), strict=True))
        return Candidates(chunks_in, chunks_x0, reward, metrics, images, recorded, seconds)

    def _shared(
        self, plans: list[GroupPlan], states: dict[int, RolloutState], update: int
    ) -> tuple[list[Inputs], list[torch.Tensor]]:
        """Inputs and clips of this rank's candidates, chunk by chunk, sampled by whichever rank has time."""
        own = self.shares[self.rank].draws
        calls = sampling_calls(self.options, self.engine.sampling)
        division = divide(self.shares, [plan.prefix for plan in plans], *calls)
        lent = division.lent(self.shares)
        if not lent:
            return self._chunks(plans, states, update, own)
        clips: dict[Draw, torch.Tensor] = {}

        def sample(draws: list[Draw]) -> None:
            if draws:
                parts = self._chunks(plans, states, update, draws)[1]
                clips.update(zip(draws, torch.stack(parts, 1), strict=True))  # each (F, L, C, h, w)

        sample(division.early[self.rank])
        pasts = [(group, *_past(states[group], plans[group])) for group in {g for g, _ in lent & {*own}}]
        late = sorted(division.late[self.rank])
        missing = {group for group, _ in late} - {*states}
        states |= {
            group: self._continued(plans[group], *past) for group, *past in self.gather(pasts) if group in missing
        }
        sample(late)
        given = [draw for draw in late if draw in lent - {*own}]
        made = torch.stack([clips[draw] for draw in given]).cpu().numpy() if given else ()
        for draw, clip in self.gather(list(zip(given, made, strict=True))):
            clips[draw] = torch.from_numpy(clip).to(self.engine.model.device)
        mine = torch.stack([clips[draw] for draw in own], 1)
        return self._chunks(plans, states, update, own, list(mine))

    def _continued(self, plan: GroupPlan, latents: np.ndarray, poses: np.ndarray) -> RolloutState:
        """A group's state after a prefix that another rank rolled out (`_past`)."""
        entries = torch.from_numpy(latents).to(self.engine.model.device)
        state = self.engine.start(entries[:, 0], poses[:, 0], [self.start(plan).text])
        for step in range(1, plan.prefix + 1):
            state.append(entries[:, step], poses[:, step])
        return state

    def _chunks(
        self,
        plans: list[GroupPlan],
        states: dict[int, RolloutState],
        update: int,
        draws: list[Draw],
        clips: list[torch.Tensor] | None = None,
    ) -> tuple[list[Inputs], list[torch.Tensor]]:
        """Of n candidates, group by group: each chunk's inputs and clips (n, L, C, h, w); sampled, unless given."""
        seed = self.options.seed
        numbers = {group: [number for _, number in part] for group, part in groupby(draws, itemgetter(0))}
        branches = [
            states[group].branch([(seed, f"branch {update} {group}", number) for number in part])
            for group, part in numbers.items()
        ]
        sizes = [len(part) for part in numbers.values()]
        chunks_in: list[Inputs] = []
        chunks_x0: list[torch.Tensor] = []
        for chunk in range(self.options.chunks):
            poses = [
                np.repeat(self.poses(plans[group], plans[group].prefix + chunk), size, axis=0)
                for group, size in zip(numbers, sizes, strict=True)
            ]
            inputs = Inputs.join([self.engine.inputs(s, q) for s, q in zip(branches, poses, strict=True)])
            x0 = clips[chunk] if clips else self._sample(inputs, branches)
            for state, part, pose in zip(branches, x0.split(sizes), poses, strict=True):
                state.append(part[:, -1], pose[:, -1])
            chunks_in.append(inputs)
            chunks_x0.append(x0)
        return chunks_in, chunks_x0

    def _sample(self, inputs: Inputs, branches: list[RolloutState]) -> torch.Tensor:
        """Clips of branches' next interaction, explored, `together` rows at a time."""
        noise = torch.cat([self.engine.noise(state) for state in branches])
        parts = [slice(i, i + self.together) for i in range(0, len(noise), self.together)]
        x0 = torch.cat([self.brancher.sample(self.engine.condition(inputs.select(p)), noise[p]) for p in parts])
        if self.options.explore:
            keys = [key for state in branches for key in state.noise_keys()]
            x0 = x0 + exploration(keys, x0, len(self.scorer.camera_weights), self.options).to(x0)
        return x0

    def recorded_latents(self, plan: GroupPlan, chunk: int) -> torch.Tensor:
        """The recorded latents (L, C, h, w) of a group's chunk."""
        ids = self.start(plan).row_ids(plan.prefix + chunk, self.num_frames)
        return self.store.latents(self.split, plan.episode, ids)

    def recorded(self, plan: GroupPlan) -> torch.Tensor:
        """The recorded images (F * (L - 1), V, 3, H, W) in [0, 1] that a group is scored against."""
        ids = self.start(plan).row_ids(plan.prefix, self.num_frames, self.options.chunks)[1:]
        return to_unit(self.store.frames(self.split, plan.episode, ids.tolist()))


def _past(state: RolloutState, plan: GroupPlan) -> tuple[np.ndarray, np.ndarray]:
    """The latents (1, P + 1, C, h, w) and poses (1, P + 1, D) of a prefix of P interactions, from its first frame."""
    latents, poses = state.memory.history(tuple(range(-plan.prefix - 1, 0)))
    return latents.cpu().numpy(), poses


def credit(
    made: Candidates,
    scorer: Scorer,
    options: PostTrainSettings,
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda part: part,
) -> torch.Tensor:
    """Optimality r in [0, 1] of every candidate, for `objective.nft.nft_loss`.

    The paper gives a candidate one number. But a candidate can be good in one corner and bad in another, and a group of
    8 does not show which corner made the difference; finer credit compares each frame, camera and patch with the same
    part of the other candidates (ours). What a part is worth is its share of the difference in reward.

    Args:
        made: candidates; their reward covers all K of a group, all else only those that this rank drew.
        scorer, options: how they are scored and credited.
        whole: values of this rank's candidates -> of all of their groups (`sharing.Share.whole`).

    Returns:
        (G * K,) by ``rollout``, (G * K, F, L, 1, h, w) by ``frame`` and ``patch``.
    """
    groups, candidates = made.reward.shape
    if options.credit == "rollout":
        return optimality(group_advantages(made.reward), options.adv_clip).flatten()
    if options.credit == "frame":
        local = whole(scorer.by_image(made.metrics))[..., None, None]
    else:
        rows, columns = options.credit_grid
        own = len(made.images) // groups
        levels = {
            name: whole(made.metrics[name]).unflatten(0, (groups, candidates)).mean(dim=1).repeat_interleave(own, dim=0)
            for name in scorer.weights
        }
        local = whole(scorer.local(made.images, made.recorded, (rows, columns), levels))
    share = scorer.camera_weights * len(scorer.camera_weights)
    advantage = group_advantages((local * share[:, None, None]).unflatten(0, (groups, candidates)))
    r = optimality(advantage, options.adv_clip).flatten(0, 1)  # (G * K, F * (L - 1), V, rows, columns)
    height, width = made.x0[0].shape[-2:]
    size = (height // r.shape[2], width)
    chunks = r.unflatten(1, (options.chunks, -1)).unbind(1)
    return torch.stack([credit_map(chunk, scorer.camera_weights, size) for chunk in chunks], dim=1)
