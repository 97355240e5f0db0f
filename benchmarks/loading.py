"""Memory and time of loading a full-size model (printed as JSON).

`python -m benchmarks.loading [--preset ctrl-world] [--stored float16] [--asked float16,float32] [--folder DIR]`

Random weights of the preset's size are written to a temporary folder, as .pt and as .safetensors, and each file is
loaded in its own process in each requested type. `peak_bytes` is that process's VmHWM (Linux), with the
interpreter and its libraries in it (`libraries_bytes`: after the imports, before loading); `ratio` is the peak over the
size of what is loaded, in the type asked for (gate: 1.15); `of_all` over the size of all that the file holds, including
the image encoder, which stays on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size import peak_bytes, random_weights
from persistworld_cli.config.presets import load_settings
from persistworld_cli.models.world_model import build_world_model

GATE = 1.15


def write_weights(preset: str, dtype: torch.dtype, path: Path) -> None:
    """Random weights under the preset's names, in the format of `path`'s suffix."""
    from safetensors.torch import save_file

    settings = load_settings(preset, [], {}, env={})
    with torch.device("meta"):
        model = build_world_model(settings.model, settings.world)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    tensors = {name: tensor.clone() for name, tensor in random_weights(shapes, dtype)}
    if path.suffix == ".safetensors":
        save_file(tensors, str(path))
    else:
        torch.save(tensors, path)


def measure(preset: str, path: Path, asked: str) -> dict[str, Any]:
    """Load in this process; what it took."""
    from persistworld_cli.checkpoints.compatibility import settings_shapes
    from persistworld_cli.checkpoints.loading import load_world_model

    settings = load_settings(preset, [], {}, env={})
    libraries = peak_bytes()
    begun = time.perf_counter()
    model = load_world_model(settings.model, settings.world, ckpt=str(path), adapter="", dtype=getattr(torch, asked))
    seconds = time.perf_counter() - begun
    size = sum(p.nbytes for p in model.parameters())
    whole = sum(math.prod(shape) for shape in settings_shapes(settings).values()) * getattr(torch, asked).itemsize
    return {
        "file": path.name,
        "asked": asked,
        "parameters": sum(p.numel() for p in model.parameters()),
        "keys": len(model.state_dict()),
        "model_bytes": size,
        "peak_bytes": peak_bytes(),
        "libraries_bytes": libraries,
        "ratio": round(peak_bytes() / size, 3),
        "of_all": round(peak_bytes() / whole, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Write, measure each in a child, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ctrl-world")
    parser.add_argument("--stored", default="float16", help="type in the files: float16, bfloat16 or float32")
    parser.add_argument("--files", default="pt,safetensors", help="kinds of file")
    parser.add_argument("--asked", default="float16,float32", help="types to load in")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "TYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.preset, Path(options.child[0]), options.child[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for suffix in options.files.split(","):
            path = Path(folder) / f"weights.{suffix}"
            write_weights(options.preset, getattr(torch, options.stored), path)
            for asked in options.asked.split(","):
                command = [sys.executable, "-m", "benchmarks.loading", "--preset", options.preset, "--child"]
                done = subprocess.run([*command, str(path), asked], stdout=subprocess.PIPE, text=True, check=True)
                rows.append({"stored": options.stored, **json.loads(done.stdout)})
            path.unlink()
    result = {"gate": GATE, "pass": all(row["ratio"] <= GATE for row in rows), "runs": rows}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
