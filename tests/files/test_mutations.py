"""Damaged files of every kind: an equal result, one error, or a changed value that the format cannot check.

`python -m benchmarks.mutations` runs the same with more seeds.
"""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.mutating import limited
from benchmarks.mutations import UNCHECKED, Case, all_cases, run, table
from persistworld_cli.data.metadata.index import IndexFile, NoEpisodes
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.read_files import fill_template

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


# -- what once ended in a traceback, a hang or other numbers ----------------------------------------------------------


def find(cases: list[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


def refused(case: Case, damaged: bytes) -> PersistWorldError:
    """The error that reading a damaged file gives; the file is whole again afterwards."""
    whole = case.file.read_bytes()
    case.file.write_bytes(damaged)
    try:
        with limited(), pytest.raises(PersistWorldError) as error:
            case.read()
    finally:
        case.file.write_bytes(whole)
    assert error.value.what and error.value.where and error.value.fix
    return error.value


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("features", {"observation.images.wrist_left": 7}, "'observation.images.wrist_left' is not an object"),
        ("features", 7, "a number, not a table"),
        ("chunks_size", 0, "chunks_size is 0"),
        ("chunks_size", "many", "chunks_size is 'many'"),
        ("fps", 0, "fps is 0"),
        ("fps", float("nan"), "fps is nan"),
        ("fps", "15", "fps is '15'"),
        ("data_path", "{0}", "a field other than {episode_chunk}, {episode_index}"),
        ("data_path", "{episode_index:2000000000d}", "width up to 99"),
        ("data_path", "{episode_index.__class__}", "a field other than"),
        ("data_path", "{episode_index!r}", "a field other than"),
        ("data_path", "data/{", "a field other than"),
        ("video_path", "{video_key:>2000000000}", "width up to 99"),
        ("video_path", None, "path template is None"),
    ],
)
def test_a_dataset_description_says_what_is_wrong_with_it(
    cases: list[Case], key: str, value: object, text: str
) -> None:
    case = find(cases, "raw v2 info.json")
    info = json.loads(case.file.read_text())
    error = refused(case, json.dumps({**info, key: value}).encode())
    assert text in error.what
    assert error.where == str(case.file)


def test_any_json_file_may_be_cut_or_nested_deep(cases: list[Case]) -> None:
    for case in cases:
        if case.format == "JSON":
            cut = case.file.read_bytes()[:-3]
            for damaged in (b"17", b"null", b"[" * 100_000, b'{"a":' * 100_000, cut, b"\xff\xfe{"):
                assert str(case.file) in str(refused(case, damaged)) or case.name == "index of shards"


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("adapter_config.json", {"rank_pattern": {"(": 3}}, "unterminated subpattern"),
        ("adapter_config.json", {"rank_pattern": 3}, "a number, not a table"),
        ("adapter_config.json", {"r": -1}, "r is -1"),
        ("rollouts.json", {"rollouts": [7]}, "no policy, task or rollouts"),
        ("a rollout's JSON", {"progress": "far"}, "progress is 'far'"),
        ("extract.json", {"rate_hz": "fast"}, "rate_hz is 'fast'"),
        ("stat.json", {"state_01": [float("nan")] * 7}, "NaN or infinite"),
        ("annotation", {"states": [[10**400] * 7]}, "too large"),
        ("annotation", {"texts": ["half a pair: \ud800"]}, "half a surrogate pair"),
        ("study key", {"models": [1, 2]}, "not the key of a study"),
        ("answers", {"answers": [{"trial": []}]}, "unreadable answers"),
        ("eval.json", {"models": 7}, "cannot compare"),
    ],
)
def test_values_of_another_kind_are_named(cases: list[Case], name: str, change: dict[str, object], text: str) -> None:
    case = find(cases, name)
    assert text in str(refused(case, json.dumps({**json.loads(case.file.read_text()), **change}).encode()))


def test_archives_that_torch_would_misread(cases: list[Case]) -> None:
    for name in ("weights .pt", "latents .pt", "joint-velocity adapter", "state.pt as an adapter"):
        case, out = find(cases, name), io.BytesIO()
        with zipfile.ZipFile(case.file) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
        assert "compressed" in str(refused(case, out.getvalue()))
    out = io.BytesIO()
    torch.save({"unet.a": torch.zeros(1).expand(1 << 20, 1 << 20)}, out)  # 4 TiB of one number
    assert "not fully stored" in refused(find(cases, "weights .pt"), out.getvalue()).what


def test_arrays_without_arrays(cases: list[Case]) -> None:
    out = io.BytesIO()
    np.savez(out)
    for name in ("rollout", "masks"):
        refused(find(cases, name), out.getvalue())


def test_a_template_takes_widths_and_nothing_else() -> None:
    names: dict[str, int | str] = {"episode_index": 7, "video_key": "a.b"}
    assert fill_template("{video_key}/{episode_index:06d}-{episode_index}.x", names) == "a.b/000007-7.x"
    assert fill_template("{{x}}", names) == "{x}"
    for template in ("{episode_index:x}", "{video_key[0]}", "{}", "{episode_index:{episode_index}}", 3, "\0", "}"):
        with pytest.raises(ValueError, match=r"template|Single"):
            fill_template(template, names)


def test_a_split_without_episodes_is_no_damage(cases: list[Case]) -> None:
    """The export leaves such a split out, but not one of a damaged index."""
    index = IndexFile(find(cases, "index").file)
    with pytest.raises(NoEpisodes):
        index.split("val")


def test_what_longer_runs_of_the_mutations_found(cases: list[Case]) -> None:
    """Seeds 2 to 5: a column that is there twice, and a rollout's file whose name no file can have."""
    rows = find(cases, "raw v2 rows")
    whole = pq.read_table(rows.file)
    out = io.BytesIO()
    pq.write_table(whole.append_column("task_index", whole.column("task_index")), out)
    assert "'task_index' appears twice" in str(refused(rows, out.getvalue()))
    runs = find(cases, "rollouts.json")
    told = json.loads(runs.file.read_text())
    told["rollouts"][0]["json"] = "1" * 400
    before = runs.file.read_bytes()
    runs.file.write_text(json.dumps(told))
    try:
        runs.read()
    finally:
        runs.file.write_bytes(before)
