"""Which models are compared, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from persistworld_cli.checkpoints.references import ModelRef, refs_of_eval, refs_of_replay, sha256_of
from persistworld_cli.config.settings import ModelSettings
from persistworld_cli.errors import PersistWorldError, UsageError
from persistworld_cli.files import hash_of


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)


def test_eval_compares_the_adapter_with_its_base(adapter: str) -> None:
    model = ModelSettings(ckpt="a.pt", adapter=adapter)
    want = [ModelRef("base", "a.pt"), ModelRef("post-trained", "a.pt", adapter)]
    assert refs_of_eval(model) == want
    assert refs_of_eval(model, "base") == want
    assert refs_of_eval(ModelSettings(ckpt="a.pt", inference=adapter)) == want
    assert refs_of_eval(ModelSettings(ckpt="a.pt", inference=str(Path(adapter).parent))) == want
    assert refs_of_replay(ModelSettings(ckpt="a.pt"), [adapter]) == want[1:]
    assert refs_of_eval(ModelSettings(ckpt="a.pt")) == [ModelRef("base", "a.pt")]


def test_eval_compares_checkpoints_and_adapters(adapter: str) -> None:
    model = ModelSettings(ckpt="x/a.pt")
    assert refs_of_eval(model, "x/b.pt") == [ModelRef("b.pt", "x/b.pt"), ModelRef("a.pt", "x/a.pt")]
    two = refs_of_eval(ModelSettings(ckpt="a.pt", adapter="r1/other"), adapter)
    assert two == [ModelRef("adapter", "a.pt", adapter), ModelRef("other", "a.pt", "r1/other")]
    named = refs_of_eval(model, adapter)
    assert named == [ModelRef("adapter", "x/a.pt", adapter), ModelRef("base", "x/a.pt")]
    whole = refs_of_eval(ModelSettings(ckpt="x/a.pt", inference="x/b.pt"))
    assert whole == [ModelRef("a.pt", "x/a.pt"), ModelRef("b.pt", "x/b.pt")]
    with pytest.raises(UsageError, match="itself"):
        refs_of_eval(model, "x/a.pt")
    with pytest.raises(UsageError, match="is another one"):
        refs_of_eval(ModelSettings(ckpt="a.pt", inference=adapter, adapter="r1/adapter"))
    with pytest.raises(UsageError, match="its base weights are not given"):
        refs_of_eval(ModelSettings(inference=adapter))
    with pytest.raises(UsageError, match="no weights"):
        refs_of_eval(ModelSettings())


def test_replay_pairs_weights_and_adapters() -> None:
    model = ModelSettings(ckpt="a.pt", adapter="ad")
    assert refs_of_replay(model) == [ModelRef("post-trained", "a.pt", "ad")]
    both = refs_of_replay(model, [], ["base", "ad"])
    assert both == [ModelRef("base", "a.pt"), ModelRef("post-trained", "a.pt", "ad")]
    assert [ref.label for ref in refs_of_replay(model, ["x/a.pt", "y/a.pt"], ["base"])] == [
        "x/a.pt",
        "y/a.pt",
    ]
    assert [ref.label for ref in refs_of_replay(model, ["b", "b"], ["none"])] == ["b #1", "b #2"]


def test_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w" / "a.bin"
    file.parent.mkdir()
    file.write_bytes(b"abc")
    assert sha256_of(str(file)).startswith("ba7816bf8f01cfea")
    folder = sha256_of(str(file.parent))
    (file.parent / "README.md").write_text("a model card, which an evaluation rewrites")
    assert sha256_of(str(file.parent)) == folder
    file.rename(file.with_name("b.bin"))
    assert sha256_of(str(file.parent)) != folder
    assert sha256_of("") == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PersistWorldError):  # a hub id is hashed by its files: a name proves nothing
        sha256_of("nobody-at-all/nothing-here")
    assert hash_of({"a": 1, "b": (2,)}) == hash_of({"b": [2], "a": 1}) != hash_of({"a": 1, "b": [3]})
