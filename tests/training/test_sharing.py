"""Every candidate of every group is one rank's, and a team's values come together in the order of the candidates."""

from __future__ import annotations

import pytest
import torch

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.training.sharing import Share


def options(groups: int, candidates: int, split: bool = True) -> PostTrainSettings:
    return PostTrainSettings(groups=groups, candidates=candidates, split_groups=split)


CASES = [(2, 2, 4, False), (1, 3, 4, True), (2, 1, 4, True), (4, 2, 4, True), (8, 8, 16, True), (6, 4, 6, True)]


@pytest.mark.parametrize(("world", "groups", "candidates", "split"), CASES)
def test_every_candidate_is_drawn_once(world: int, groups: int, candidates: int, split: bool) -> None:
    shares = [Share.of(options(groups, candidates, split), rank, world) for rank in range(world)]
    drawn = sorted((g, c) for share in shares for g in share.groups for c in share.candidates)
    assert drawn == [(g, c) for g in range(groups) for c in range(candidates)]


@pytest.mark.parametrize(("world", "groups", "candidates", "split"), CASES)
def test_a_team_sees_whole_groups_and_keeps_each_candidate_once(
    world: int, groups: int, candidates: int, split: bool
) -> None:
    shares = [Share.of(options(groups, candidates, split), rank, world) for rank in range(world)]
    value = torch.arange(groups * candidates).view(groups, candidates)
    parts = [value[s.groups.start : s.groups.stop, s.candidates.start : s.candidates.stop].flatten() for s in shares]
    kept = torch.tensor([[candidates - 1, 0]] * groups)
    found = []
    for share, part in zip(shares, parts, strict=True):
        whole = share.whole(part, lambda _: parts)
        assert torch.equal(whole, value[share.groups.start : share.groups.stop].flatten())
        rows, places = share.own(kept[share.groups.start : share.groups.stop])
        found += part[rows].tolist()
        assert [kept[g, p].item() for g, p in places.tolist()] == (part[rows] % candidates).tolist()
    assert sorted(found) == sorted(value.gather(1, kept).flatten().tolist())


def test_what_cannot_be_shared_evenly_is_refused_with_what_to_do() -> None:
    with pytest.raises(PersistWorldError, match="1 groups cannot be shared by 2 processes") as caught:
        Share.of(options(1, 4, split=False), 0, 2)
    assert "--split-groups (2 processes per group)" in str(caught.value.fix)
    with pytest.raises(PersistWorldError, match="5 candidates of a group cannot be shared by 2 processes"):
        Share.of(options(1, 5), 0, 2)
