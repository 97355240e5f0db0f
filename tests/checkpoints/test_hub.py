"""Weights from the hub: what is fetched of a repository, and what the cache gives without network.

A small server stands in for the hub; the client is the real one, in a process of its own, since it reads HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
REPOSITORIES = {
    "acme/one": ["README.md", "checkpoint-10000.pt", "optimizer.bin"],
    "acme/two": ["a.pt", "b.pt"],
    "acme/svd": [
        "model_index.json",
        "svd.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    "acme/shards": ["model.safetensors.index.json", "part-a.safetensors", "part-b.safetensors", "other.safetensors"],
    "acme/nested": [
        "README.md",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "lora/action_encoder.pt",
    ],
    "acme/adapter": ["adapter_config.json", "adapter_model.safetensors", "README.md"],
}
LOCATE = """
import json, sys
import persistworld_cli.compat
persistworld_cli.compat.ensure_torchvision = lambda: None  # no tensor is read here
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.checkpoints.sources import adapter_at, locate
told = []
for source, parts in json.loads(sys.argv[1]):
    try:
        found = locate(source, parts) if parts else locate(source)
        assert bool(adapter_at(source)) == (found.kind == "adapter")
        assert all(path.is_file() for path, _ in found.files)
        names = ["/".join(path.parts[path.parts.index("snapshots") + 2:]) for path, _ in found.files]
        told.append([found.kind, list(zip(names, [prefix for _, prefix in found.files]))])
    except PersistWorldError as error:
        told.append(str(error))
print(json.dumps(told))
"""


def content(repository: str, name: str) -> bytes:
    """A file's bytes."""
    if name.endswith("index.json"):
        return json.dumps({"weight_map": {"a": "part-a.safetensors", "b": "part-b.safetensors"}}).encode()
    return f"{repository}/{name}".encode()


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: a repository's list of files, and the files."""

    fetched: list[str]
    listed: list[tuple[str, str | None]]  # repository, token

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"] and "/".join(path[2:4]) in REPOSITORIES:
            name = "/".join(path[2:4])
            self.listed.append((name, self.headers["Authorization"]))
            files = [{"rfilename": file} for file in REPOSITORIES[name]]
            self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files, "tags": []}).encode(), "list")
        elif path[2:4] == ["resolve", "main"] and "/".join(path[:2]) in REPOSITORIES:
            name, file = "/".join(path[:2]), "/".join(path[4:])
            if self.command == "GET":
                self.fetched.append(f"{name}/{file}")
            self.answer(content(name, file), hashlib.sha1(content(name, file)).hexdigest())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, body: bytes, etag: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str], list[tuple[str, str | None]]]]:
    """The server's address, and what was fetched and listed."""
    handler = type("Handler", (Hub,), {"fetched": [], "listed": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.fetched, handler.listed
    server.shutdown()
    server.server_close()
    thread.join()


def locate(home: Path, *sources: tuple[str, list[str] | None], **env: str) -> list[Any]:
    """`locate` for each source in a process with this HF_HOME: (kind, files) or an error's text."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    command = [sys.executable, "-c", LOCATE, json.dumps(sources)]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, "HF_HOME": str(home), **env})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_of_a_repository_only_what_is_needed_is_fetched(
    hub: tuple[str, list[str], list[tuple[str, str | None]]], tmp_path: Path
) -> None:
    address, fetched, listed = hub
    one, two, named, wrong, vae, svd, shards, adapter, *nested, nobody = locate(
        tmp_path,
        ("acme/one", None),
        ("acme/two", None),
        ("acme/two:b.pt", None),
        ("acme/two:c.pt", None),
        ("acme/svd", ["vae"]),
        ("acme/svd", None),
        ("acme/shards", None),
        ("acme/adapter", None),
        ("acme/nested", None),
        ("acme/nested:lora", None),
        ("acme/nested:lora/adapter_model.safetensors", None),
        ("acme/nobody", None),
        HF_ENDPOINT=address,
        HF_TOKEN="hf_secret",
    )
    assert listed == [
        (f"acme/{name}", "Bearer hf_secret") for name in ("one", "two", "svd", "shards", "adapter", "nested")
    ]
    assert one == ["weights", [["checkpoint-10000.pt", ""]]]
    assert "2 checkpoints there: a.pt, b.pt" in two and "name one: acme/two:a.pt" in two
    assert named == ["weights", [["b.pt", ""]]]
    assert "no file 'c.pt' there" in wrong and "it holds: a.pt, b.pt" in wrong
    assert vae == ["diffusers", [["vae/diffusion_pytorch_model.safetensors", "vae."]]]
    assert [prefix for _, prefix in svd[1]] == ["unet.", "vae."]
    assert "2 checkpoints there" in shards  # the shards, and a file that the index does not name
    assert adapter == ["adapter", [["adapter_model.safetensors", ""]]]
    files = ["adapter_model.safetensors", "action_encoder.pt"]
    assert nested == [["adapter", [[f"lora/{files[0]}", ""], [f"lora/{files[1]}", "action_encoder."]]]] * 3
    assert "is not on disk, and cannot be fetched from the hub" in nobody and "hf auth login" in nobody
    assert sorted(fetched) == [
        "acme/adapter/adapter_config.json",
        "acme/adapter/adapter_model.safetensors",
        "acme/nested/lora/action_encoder.pt",
        "acme/nested/lora/adapter_config.json",
        "acme/nested/lora/adapter_model.safetensors",
        "acme/one/checkpoint-10000.pt",
        "acme/shards/model.safetensors.index.json",
        "acme/svd/unet/diffusion_pytorch_model.safetensors",
        "acme/svd/vae/diffusion_pytorch_model.safetensors",
        "acme/two/b.pt",
    ]
    asked = len(fetched)
    again, absent = locate(tmp_path, ("acme/one", None), ("acme/other", None), HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert again == one and len(fetched) == asked
    assert "is not on disk, and cannot be fetched from the hub" in absent and "HF_HOME" in absent
    unreachable = locate(tmp_path, ("acme/one", None), HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == [one]  # no network: what the cache holds


def test_a_mistyped_path_is_not_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs" / "run-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (told,) = locate(tmp_path / "home", ("outputs/rnu-1", None), HF_HUB_OFFLINE="1")
    assert "no such file or folder: 'outputs/rnu-1'" in told and "did you mean 'run-1'?" in told
