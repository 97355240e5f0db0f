"""How an update is distributed: groups, or the candidates of one group, over the ranks.

Shapes: G groups of this rank's team, K candidates per group, k of them this rank's.

A rank decodes, scores and learns from its own candidates. Sampling takes most of the time, and prefixes are of random
length: a rank whose prefixes are short samples candidates of others too (`divide`). Who samples a candidate changes
nothing about it: each is a function of its group's number and its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.errors import PersistWorldError

Draw = tuple[int, int]  # number of a group, number of a candidate in it


def team_size(options: PostTrainSettings, world: int) -> int:
    """Number of ranks that share the candidates of the same groups: the least that `split_groups` needs, else 1."""
    return world // math.gcd(world, options.groups) if options.split_groups else 1


@dataclass(frozen=True)
class Share:
    """One rank's part of every update.

    groups: numbers of its groups; candidates: of each of them; team: the ranks that have the same groups.
    """

    groups: range
    candidates: range
    team: range

    @property
    def draws(self) -> list[Draw]:
        """Its candidates, group by group."""
        return [(group, number) for group in self.groups for number in self.candidates]

    @classmethod
    def of(cls, options: PostTrainSettings, rank: int, world: int) -> Share:
        """The part of a rank. Raises PersistWorldError where groups, or the candidates of one, do not divide evenly."""
        team = team_size(options, world)
        if options.groups % (world // team):
            shared = world // math.gcd(world, options.groups)
            raise PersistWorldError(
                f"{options.groups} groups cannot be shared by {world} processes",
                where="post_train.groups",
                fix=f"make it a multiple of --num-processes, or add --split-groups ({shared} processes per group)",
            )
        if options.candidates % team:
            raise PersistWorldError(
                f"{options.candidates} candidates of a group cannot be shared by {team} processes",
                where="post_train.candidates, --split-groups",
                fix=f"make post_train.candidates a multiple of {team}",
            )
        groups, candidates = options.groups * team // world, options.candidates // team
        place, first = rank % team, rank - rank % team
        return cls(
            groups=range(first // team * groups, (first // team + 1) * groups),
            candidates=range(place * candidates, (place + 1) * candidates),
            team=range(first, first + team),
        )

    def whole(self, part: Tensor, gather: Callable[[list[Any]], list[Any]]) -> Tensor:
        """Values (G * k, ...) of this rank's candidates -> (G * K, ...) of its team's; ``gather`` as `Run.gather`."""
        if len(self.team) == 1:
            return part
        parts = gather([part.cpu()])[self.team.start : self.team.stop]
        apart = [values.unflatten(0, (len(self.groups), -1)) for values in parts]
        return torch.cat(apart, dim=1).flatten(0, 1).to(part.device)

    def own(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the kept candidates (G, m): rows (n,) among its G * k, places (n, 2) in kept."""
        mine = (kept >= self.candidates.start) & (kept < self.candidates.stop)
        places = mine.nonzero()
        rows = places[:, 0] * len(self.candidates) + kept[mine] - self.candidates.start
        return rows, places


class Division(NamedTuple):
    """Which candidates each rank samples.

    early: its own, while others still roll out longer prefixes; late: afterwards, of any rank; calls: of the network
    with one clip, by the slowest rank, prefixes included.
    """

    early: list[list[Draw]]
    late: list[list[Draw]]
    calls: int

    def lent(self, shares: Sequence[Share]) -> set[Draw]:
        """The candidates that are sampled by another rank than their own; empty: no rank needs anything of another."""
        return {draw for late, share in zip(self.late, shares, strict=True) for draw in set(late) - set(share.draws)}


def divide(shares: Sequence[Share], prefixes: Sequence[int], roll: int, draw: int) -> Division:
    """Divide the sampling of an update's candidates so that ranks finish together.

    All know every group's prefix length, so all know when the last prefix is rolled out; then the prefixes' latents are
    exchanged, once, and what is left to sample is dealt evenly.

    Args:
        shares: of all ranks.
        prefixes: interactions of every group's prefix.
        roll, draw: calls of the network for an interaction of a prefix, and for a candidate.
    """
    ahead = [roll * sum(prefixes[group] for group in share.groups) for share in shares]
    early, late = [], []
    for share, calls in zip(shares, ahead, strict=True):
        count = min((max(ahead) - calls) // draw, len(share.draws))
        early.append(share.draws[:count])
        late.append(share.draws[count:])
    while len(most := max(late, key=len)) - len(least := min(late, key=len)) > 1:
        least.append(most.pop())
    return Division(early, late, max(ahead) + draw * max(map(len, late)))
