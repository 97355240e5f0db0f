"""How an update is distributed: groups, or the candidates of one group, over the ranks.

Shapes: G groups of this rank's team, K candidates per group, k of them this rank's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.errors import PersistWorldError


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
