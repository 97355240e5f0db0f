"""CLIP's tokenizer for instructions."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from persistworld_cli.errors import PersistWorldError
from persistworld_cli.hub import cached_snapshot, is_hub_id, open_repository

logger = logging.getLogger(__name__)
LENGTH = 77  # tokens of CLIP's text tower, including begin and end
_NEEDED = ("vocab.json", "merges.txt")
_FILES = (*_NEEDED, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_warned: set[str] = set()  # instructions that were cut


def load_tokenizer(source: str) -> CLIPTokenizer:
    """A CLIP tokenizer from a folder or a hub id; it is downloaded only if the cache has none."""
    try:
        folder = _from_hub(source) if is_hub_id(source) and not Path(source).exists() else Path(source)
    except PersistWorldError as error:
        what, where = f"no CLIP tokenizer: {error.what}", f"model.tokenizer; {error.where}"
        raise PersistWorldError(what, where=where, fix=error.fix) from error
    try:
        if not _whole(folder):  # transformers would make a tokenizer that knows no word
            raise OSError(f"neither {' and '.join(_NEEDED)} nor tokenizer.json there")
        return CLIPTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise PersistWorldError(
            f"no CLIP tokenizer at '{source}': {str(error).splitlines()[0]}",
            where="model.tokenizer",
            fix="give a folder or hub id that holds vocab.json and merges.txt, e.g. openai/clip-vit-base-patch32",
        ) from error


def _whole(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in _NEEDED)


def _from_hub(repo: str) -> Path:
    """The folder of a repository's tokenizer. Raises PersistWorldError."""
    cached = cached_snapshot(repo)
    if cached is not None and _whole(cached):
        return cached
    repository = open_repository(repo)
    for name in _FILES:
        if name in repository.names:
            cached = repository.fetch(name).parent
    return cached or repository.snapshot


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (B, 77). A longer instruction is cut, with one warning per process."""
    for text in texts:
        count = len(tokenizer(text, verbose=False)["input_ids"])  # the tokenizer's own warning names no instruction
        if count > LENGTH and text not in _warned:
            _warned.add(text)
            logger.warning("instruction of %d tokens cut to CLIP's %d: '%s...'", count, LENGTH, text[:60])
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]
