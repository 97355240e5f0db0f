"""Incomplete downloads and caches, and a hub that does not answer."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from persistworld_cli import hub
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.models.text import load_tokenizer

COMMIT = "a" * 40
INDEX = json.dumps({"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of acme/one in a cache of the hub's; there is no hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_unreachable", [])
    hub.open_repository.cache_clear()
    yield tmp_path / "hub" / "models--acme--one"
    hub.open_repository.cache_clear()


def write(home: Path, **files: str) -> None:
    """Files of a cached repository: ``snapshots`` are links into blobs; ``GONE`` is a link to an absent blob."""
    for name, text in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("snapshots/"):
            blob = home / "blobs" / name.replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            if text != "GONE":
                blob.write_text(text)
            path.symlink_to(blob)
        else:
            path.write_text(text)


S = f"snapshots/{COMMIT}"
AGAIN = "hf download acme/one"


@pytest.mark.parametrize(
    ("files", "said", "fix"),
    [
        ({}, "is not on disk, and cannot be fetched from the hub", AGAIN),
        ({"blobs/abc.incomplete": "12345"}, "a download was interrupted: blobs/abc.incomplete, 5 bytes", AGAIN),
        ({"blobs/abc": "12345", "refs/main": COMMIT}, "cannot be fetched from the hub", AGAIN),
        ({f"{S}/config.json": "{}", "blobs/a.incomplete": ""}, "no weights there; a download was interrupted", AGAIN),
        ({f"{S}/model.safetensors": "GONE"}, "'model.safetensors' of 'acme/one' is incomplete", AGAIN),
        (
            {f"{S}/m.safetensors.index.json": INDEX, f"{S}/m-00001-of-00002.safetensors": "x"},
            "only 1 of the 2 shards .* are there .missing: m-00002-of-00002.safetensors",
            AGAIN,
        ),
        ({f"{S}/a.pt": "x", "snapshots/b/a.pt": "x"}, "2 commits in the hub's cache", f"name one: .*{COMMIT}"),
    ],
)
def test_an_incomplete_cache_names_what_is_missing(files: dict[str, str], said: str, fix: str, cache: Path) -> None:
    write(cache, **files)
    with pytest.raises(PersistWorldError, match=said) as error:
        locate("acme/one")
    assert re.search(fix, str(error.value.fix))
    if "blobs/abc" not in files and files:  # the folder itself, given as a path
        with pytest.raises(PersistWorldError):
            locate(cache)


def test_a_cache_without_refs_has_one_meaning_if_it_has_one_commit(cache: Path) -> None:
    write(cache, **{f"{S}/model.pt": "x", f"{S}/README.md": "x"})
    found = [locate(source).files for source in ("acme/one", cache, cache / S, "acme/one:model.pt")]
    assert found == [((cache / S / "model.pt", ""),)] * 4
    assert locate("acme/one:model.pt:ema").entry == "ema"
    write(cache, **{"snapshots/b/other.pt": "x", "refs/main": "b"})
    hub.open_repository.cache_clear()
    assert locate("acme/one").files == ((cache / "snapshots/b/other.pt", ""),)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.safetensors", "model.safetensors.aria2"], "'model.safetensors' is incomplete"),
        (["config.json", ".cache/huggingface/download/x.incomplete"], "no weights there; a download was interrupted"),
        (["model_index.json", "text_encoder/config.json"], "has none of the requested parts"),
        (["x/.metadata", "x/__0_0.distcp"], "a checkpoint in shards of torch.distributed"),
    ],
)
def test_an_incomplete_folder_is_refused(names: list[str], said: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(PersistWorldError, match=said) as error:
        locate(tmp_path)
    assert ".cache" not in names[-1] or f"hf download REPOSITORY --local-dir {tmp_path}" in str(error.value.fix)


def test_a_half_precision_index_beside_the_full_one_is_another_checkpoint(tmp_path: Path) -> None:
    half = {"weight_map": {"a": "m.fp16-00001-of-00001.safetensors"}}
    (tmp_path / "m.safetensors.index.fp16.json").write_text(json.dumps(half))
    (tmp_path / "m.fp16-00001-of-00001.safetensors").touch()
    assert [path.name for path, _ in locate(tmp_path).files] == ["m.fp16-00001-of-00001.safetensors"]
    (tmp_path / "m.safetensors.index.json").write_text(INDEX)
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.safetensors").touch()
    assert [path.name[:7] for path, _ in locate(tmp_path).files] == ["m-00001", "m-00002"]


def test_a_silent_hub_gets_one_request(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(cache, **{f"{S}/model.pt": "x", f"{S}/vocab.json": '{"a": 0}', f"{S}/merges.txt": ""})
    caplog.set_level("INFO", logger="persistworld_cli")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "CACHED_TIMEOUT_S", 0.05)
        load_tokenizer("acme/one")  # complete in the cache: no request
        assert not hub._unreachable
        assert locate("acme/one").files == ((cache / S / "model.pt", ""),)
        assert "no answer from the hub" in caplog.text and "its cached files of commit aaaaaaaaaaaa" in caplog.text
        with pytest.raises(PersistWorldError, match="'acme/other' is not on disk"):  # at once
            locate("acme/other")


@pytest.mark.parametrize("files", [[], ["tokenizer_config.json"], ["vocab.json"]])
def test_a_tokenizer_without_words_is_refused(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(PersistWorldError, match=r"neither vocab.json and merges.txt nor tokenizer.json"):
        load_tokenizer(str(tmp_path))
