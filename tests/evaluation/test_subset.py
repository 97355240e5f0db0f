"""A part of a benchmark's episodes is run, and is never taken for the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_result import made_up_result
from eval_world import make_world, settings

from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.settings import Settings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.plan import EvalPlan, eval_items, make_plan, subset_note
from persistworld_cli.evaluation.protocol import require_same, rollout_identity
from persistworld_cli.files import hash_of
from persistworld_cli.reports.tables import eval_table, plain

TEXT = (bundled_root() / "presets" / "benchmarks" / "bundled.toml").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subset")
    make_world(folder, {"99": 7, "1999": 7})
    small = TEXT.replace("height = 48\nwidth = 80", "height = 32\nwidth = 48")
    lines = ['source = "acme/arms"', *small.splitlines()]
    for name, episodes in (("whole", ["99", "1999"]), ("part", ["99", "1999", "3899", "5799"]), ("none", ["7"])):
        own = [f"episodes = {episodes}" if line.startswith("episodes = ") else line for line in lines]
        (folder / f"{name}.toml").write_text("\n".join(own))
    return folder


def benchmarked(root: Path, name: str) -> Settings:
    benchmark = load_benchmark(str(root / f"{name}.toml"))
    assert benchmark is not None
    own = settings(root, benchmark=str(benchmark.path), episodes=tuple(dict(benchmark.pinned.values)["eval.episodes"]))
    return replace(own, rewards=replace(own.rewards, lpips_backbone="auto"))


def planned(root: Path, name: str) -> EvalPlan:
    return make_plan(benchmarked(root, name), root / "out", torch.device("cpu"))


def test_a_subset_is_run_labelled_and_not_compared_with_the_whole(root: Path) -> None:
    whole, part = planned(root, "whole"), planned(root, "part")
    assert part.items == whole.items and part.benchmark is not None and whole.benchmark is not None
    assert whole.benchmark["subset"] is None and "subset" not in whole.protocol and not subset_note(whole.benchmark)
    told = part.benchmark["subset"]
    assert (told["episodes"], told["of"], told["absent"]) == (2, 4, ["3899", "5799"])
    assert told["fetch"] == (
        "hf download acme/arms --repo-type dataset --local-dir data/arms --include 'meta/*' "
        "--include '*/episode_003899.*' --include '*/episode_005799.*'"
    )
    assert "SUBSET: 2 of 4 episodes" in subset_note(part.benchmark) and told["fetch"] in subset_note(part.benchmark)
    with pytest.raises(PersistWorldError, match="subset: nothing and 2 of the 4 episodes of benchmark part"):
        require_same(whole.protocol, part.protocol, "both")
    assert part.protocol["hash"] != whole.protocol["hash"]
    # more episodes later: what is rolled out stays
    one, other = (rollout_identity(p.protocol, p.store, benchmarked(root, "part").model) for p in (part, whole))
    assert hash_of(one) == hash_of(other)
    result = {**made_up_result(), "benchmark": {**part.benchmark, "changed": {}}}
    assert "part v3 (SUBSET: 2 of 4 episodes)" in plain(eval_table(result), width=400)


def test_only_a_run_that_labels_it_takes_a_subset(root: Path) -> None:
    own = benchmarked(root, "part")
    with pytest.raises(PersistWorldError, match="no episodes '3899', '5799' in split 'val', of 4 that benchmark"):
        eval_items(planned(root, "whole").store, own)
    named = replace(own, eval=replace(own.eval, episodes=("99", "7")))
    with pytest.raises(PersistWorldError, match=r"no episode '7' in split 'val'\n"):
        make_plan(named, root / "out", torch.device("cpu"))
    with pytest.raises(PersistWorldError, match="no episode '7'") as error:
        planned(root, "none")
    assert "--include '*/episode_000007.*'" in str(error.value.fix)
