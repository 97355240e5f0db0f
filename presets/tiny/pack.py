"""Pack a trained model for shipping: `python presets/tiny/pack.py WEIGHTS presets/tiny/base [VAE]`.

All parts in one file, in float16 (loading casts to float32), the VAE's from VAE where given; prints parameters by part.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from persistworld_cli.checkpoints.saving import read_notes, save_safetensors


def main(source: Path, folder: Path, vae: Path | None = None) -> None:
    """Cast and write."""
    whole = load_file(str(source))
    if vae:
        whole.update(load_file(str(vae)))
    tensors = {k: v.to(torch.float16).contiguous() for k, v in whole.items()}
    bad = [k for k, v in tensors.items() if not v.isfinite().all()]
    if bad:
        raise SystemExit(f"not finite in float16: {bad[:3]}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    save_safetensors(path, tensors, read_notes(source))  # the scale of actions among them
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.split(".")[0]] += tensor.numel()
    print(dict(parts), f"{path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
