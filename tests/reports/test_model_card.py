"""README.md beside trained weights: the hub's metadata, the training, its last evaluation, and the user's own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_result import made_up_result
from huggingface_hub import ModelCard

from persistworld_cli.config.inputs import describe_content
from persistworld_cli.config.presets import load_settings
from persistworld_cli.config.requests import PostTrainRequest, PretrainRequest
from persistworld_cli.config.weight_names import CARD
from persistworld_cli.data.metadata.index import ActionStat
from persistworld_cli.reports.model_card import add_evaluation, read_card, write_card

STAT = ActionStat(np.zeros(7), np.arange(1, 8) / 2)


def train(folder: Path, updates: int = 4) -> str:
    settings = load_settings(None, ["model.ckpt=yjguo/Ctrl-World", "post_train.kl=0.5"], env={})
    request = PostTrainRequest(output=folder, command=("persistworld", "post-train"))
    write_card(folder, read_card(folder), settings, request, STAT, {"updates": updates, "adapter": "x"})
    return read_card(folder)


def test_a_training_and_an_evaluation_each_write_their_part(tmp_path: Path) -> None:
    card = train(tmp_path)
    told = ModelCard(card).data
    assert (told.base_model, told.library_name, told.license) == ("yjguo/Ctrl-World", "persistworld", None)
    assert told["base_model_relation"] == "adapter" and "| updates | 4 |" in card and "kl = 0.5\n" in card
    assert "| yaw | 0 | 3 |" in card and "None yet" in card
    (tmp_path / CARD).write_text(card.replace("# license: yours to choose, for instance", "license:"))
    result = made_up_result()
    result["models"][-1] |= {"adapter": str(tmp_path)}
    result["protocol"]["hash"] = "abc123"
    content = describe_content(tmp_path)
    add_evaluation(result)
    assert describe_content(tmp_path) == content  # the weights are the same for a run that is continued
    card = read_card(tmp_path)
    assert ModelCard(card).data.license == "mit" and "None yet" not in card
    for words in ("protocol `abc123`", "8 rollouts of 8 episodes", "[+1.4", "95% bootstrap interval"):
        assert words in card
    assert train(tmp_path) == card  # the finished training again: nothing is new
    card = train(tmp_path, updates=5)
    assert "| updates | 5 |" in card and "abc123" not in card and "license: mit" in card


def test_a_smaller_evaluation_does_not_replace_a_larger_one(tmp_path: Path) -> None:
    train(tmp_path)
    for protocol, rollouts, kept in (("aaa", 8, "aaa"), ("bbb", 4, "aaa"), ("ccc", 20, "ccc"), ("ccc", 10, "ccc")):
        result = made_up_result()
        result["models"][-1] |= {"adapter": str(tmp_path)}
        result["protocol"]["hash"], result["n"]["rollouts"] = protocol, rollouts
        add_evaluation(result)
        assert f"protocol `{kept}`" in read_card(tmp_path)
    assert "10 rollouts, protocol ccc" in read_card(tmp_path)  # the same protocol's newest counts


def test_no_file_of_others_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CARD).write_text("# Mine\n")
    result = made_up_result()
    result["models"][-1] |= {"ckpt": str(tmp_path / "model.safetensors")}
    add_evaluation(result)
    assert read_card(tmp_path) == "# Mine\n"
    request = PretrainRequest(output=tmp_path, scratch=True)
    write_card(tmp_path, read_card(tmp_path), load_settings(env={}), request, STAT, {"updates": 1})
    assert read_card(tmp_path).startswith("# Mine\n") and "| begun from | random weights |" in read_card(tmp_path)
