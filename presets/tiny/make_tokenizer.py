"""Make the tiny preset's CLIP tokenizer: byte-level BPE over the recorder's instructions, in CLIP's file format.

Run from the repository's root: `python presets/tiny/make_tokenizer.py presets/tiny/tokenizer`.
Any other text still has tokens: all 256 bytes are in the vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from persistworld_cli.policies.bundled_world.rules import all_instructions


def main(folder: Path) -> None:
    """Train on every instruction and write vocab.json, merges.txt and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(all_instructions(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    pieces = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    pieces += [m.replace(" ", "") for m in merges if m.replace(" ", "") not in set(pieces)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    print(len(vocab), "tokens,", len(merges), "merges")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
