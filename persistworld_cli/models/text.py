"""CLIP's tokenizer for instructions."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from persistworld_cli.errors import PersistWorldError

logger = logging.getLogger(__name__)
LENGTH = 77  # tokens of CLIP's text tower, including begin and end
_warned: set[str] = set()  # instructions that were cut


def load_tokenizer(source: str) -> CLIPTokenizer:
    """A CLIP tokenizer from a folder or a hub id."""
    try:
        return CLIPTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        kind = "folder" if Path(source).exists() else "folder or hub id"
        raise PersistWorldError(
            f"no CLIP tokenizer at '{source}': {str(error).splitlines()[0]}",
            where="model.tokenizer",
            fix=f"give a {kind} that holds vocab.json and merges.txt, e.g. openai/clip-vit-base-patch32",
        ) from error


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask (B, 77). A longer instruction is cut, with one warning per process."""
    for text in texts:
        count = len(tokenizer(text, verbose=False)["input_ids"])  # the tokenizer's own warning names no instruction
        if count > LENGTH and text not in _warned:
            _warned.add(text)
            logger.warning("instruction of %d tokens cut to CLIP's %d: '%s...'", count, LENGTH, text[:60])
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]
