"""Every candidate is one rank's and is sampled once, by a rank that has time; a team's values come in their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persistworld_cli.config.settings import PostTrainSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.training.sharing import Share, divide


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


@pytest.mark.parametrize(("world", "groups", "candidates", "split"), [*CASES, (1, 8, 16, False), (16, 8, 16, True)])
def test_who_has_time_samples_candidates_of_others(world: int, groups: int, candidates: int, split: bool) -> None:
    shares = [Share.of(options(groups, candidates, split), rank, world) for rank in range(world)]
    drawn = sorted(draw for share in shares for draw in share.draws)
    waits = []
    for prefixes in np.random.default_rng(0).integers(10, size=(100, groups)).tolist():
        division = divide(shares, prefixes, 50, 50)
        assert sorted(draw for part in division.early + division.late for draw in part) == drawn
        ahead = [sum(prefixes[group] for group in share.groups) for share in shares]
        for share, before, early in zip(shares, ahead, division.early, strict=True):
            assert set(early) <= set(share.draws) and before + len(early) <= max(ahead)  # nobody waits for them
        assert division.calls <= 50 * (max(ahead) + len(shares[0].draws))  # a rank that samples its own alone
        waits.append(division.calls / 50 - (sum(ahead) + len(drawn)) / world)
    assert min(waits) >= 0
    if (world, groups) in ((1, 8), (8, 8)):  # 8 ranks that sample their own alone wait for 3.8 interactions
        assert np.mean(waits) < 0.5
