"""Damaged files of every kind: an equal result, one error, or a changed value that the format cannot check.

`python -m benchmarks.mutations` runs the same with more seeds.
"""

from __future__ import annotations

import pytest

from benchmarks.mutations import UNCHECKED, Case, all_cases, run, table

SEED, ROUNDS = 1, 24


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """A whole file of each kind."""
    return all_cases(tmp_path_factory.mktemp("mutations"))


def test_every_mutation_ends_well(cases: list[Case]) -> None:
    counts, bad = run(cases, ROUNDS, SEED)
    print(table(counts))
    assert not bad, "\n".join(map(str, bad))
    assert set(counts) <= set(UNCHECKED)
    for name, tally in counts.items():
        assert tally["error"], f"no mutation of {name} was noticed: is the damaged file read at all?"
