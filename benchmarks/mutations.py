"""Damage every kind of file that the project reads, and count the outcomes by format.

`python -m benchmarks.mutations [--seeds 20] [--rounds 60] [--only TEXT] [--output FILE.json]`

Each mutation must end in an equal result, in one PersistWorldError that says what, where and what to do, or in a
changed value that the format cannot detect (`UNCHECKED` has the reason by format). A traceback, a hang, or a lost file
is BAD; it is printed with the arguments that repeat it, and the exit code is 1.
tests/files/test_mutations.py runs the same with one seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import mutating as by
from persistworld_cli.checkpoints.adapters import adapter_presets, read_adapter, write_adapter
from persistworld_cli.checkpoints.sources import locate
from persistworld_cli.checkpoints.tensor_files import WeightFiles
from persistworld_cli.config.bundled import bundled_root
from persistworld_cli.config.presets import flatten, load_settings, to_json
from persistworld_cli.data.clips.store import EpisodeStore
from persistworld_cli.data.metadata.ctrl_world_meta import SampleLists, export_ctrl_world
from persistworld_cli.data.metadata.index import ActionStat, IndexFile
from persistworld_cli.data.metadata.index_rows import PreviousIndex, signatures
from persistworld_cli.data.metadata.meta import build_meta
from persistworld_cli.data.metadata.scan import extraction_notes, list_annotations, read_episode
from persistworld_cli.data.raw.lerobot import RawDataset
from persistworld_cli.data.raw.video import count_frames, read_frames, write_mp4
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.evaluation.benchmarks import load_benchmark
from persistworld_cli.evaluation.comparing import compare_files, load_result
from persistworld_cli.extraction.publish import Changing, _compare
from persistworld_cli.extraction.report import ExtractReport, path_of
from persistworld_cli.launch.accelerate_config import read_accelerate_config
from persistworld_cli.launch.launcher import _read as read_result
from persistworld_cli.metrics.user_masks import _array, _image, _size
from persistworld_cli.policies.bundled_world.scene import _described
from persistworld_cli.policies.leaderboard import build_leaderboard, read_real, read_runs
from persistworld_cli.policies.tasks import load_task
from persistworld_cli.read_files import DAMAGED_NOTES, read_json
from persistworld_cli.reports.policy_tables import leaderboard_tables
from persistworld_cli.reports.tables import plain
from persistworld_cli.robot.adapter import MlpAdapter, load_adapter
from persistworld_cli.rollout.closed_loop import ScoredRollout
from persistworld_cli.rollout.finished import load_latents, load_rollout, save_rollout
from persistworld_cli.rollout.recording import Item
from persistworld_cli.study.key import make_key
from persistworld_cli.study.responses import read_study, study_result
from persistworld_cli.training.vae import read_images

_log = logging.getLogger(__name__)
NO_SUM = "no checksum: any value of the right kind passes"
UNCHECKED = {
    "JSON": f"text; {NO_SUM}",
    "JSONL": f"text; {NO_SUM}, and a line more or less is another list",
    "CSV": f"text; {NO_SUM}",
    "TOML": f"text; {NO_SUM}",
    "YAML": f"text; {NO_SUM}",
    "parquet": "pyarrow writes no page checksums unless told, and reads those of others without them",
    "mp4": "H.264 has no checksum: a damaged image decodes to another one where the decoder does not notice",
    "safetensors": f"{NO_SUM}, as long as the header fits the length",
    "pt": "torch writes a CRC for each member and does not check it when it maps a file",
    "npy": f"{NO_SUM}, as long as the header fits the length",
    "npz": "zip checks each array by a CRC, but another whole array is another value",
    "png": "each chunk has a CRC; the pixels of another whole file are other values",
    "index": f"{NO_SUM}, as long as header, lengths and lists fit one another",
}
FRAMES, HIGH, WIDE = 12, 32, 48
CAMERA = "observation.images.wrist_left"
LATENTS = (FRAMES, 4, 4, 6)
POSE = 7


@dataclass(frozen=True)
class Case:
    """A file in a folder and how the project reads it."""

    format: str
    name: str
    file: Path
    folder: Path
    read: Callable[[], Any]
    ways: tuple[by.Mutation, ...]


@dataclass(frozen=True)
class Failure:
    """A BAD mutation, with what repeats it."""

    case: str
    number: int
    way: str
    seed: int
    told: str


def run(cases: Sequence[Case], rounds: int, seed: int) -> tuple[dict[str, Counter[str]], list[Failure]]:
    """Mutate every case's file `rounds` times.

    Returns:
        Format -> counts of equal, error, changed, BAD; and the BAD ones.
    """
    counts: dict[str, Counter[str]] = {}
    bad: list[Failure] = []
    for case in cases:
        begun = time.process_time()
        whole = case.file.read_bytes()
        expected = by.fingerprint(case.read())
        tally = counts.setdefault(case.format, Counter())
        for number in range(rounds):
            way = case.ways[number % len(case.ways)]
            draw = random.Random(f"{seed} {case.name} {number}")
            damaged = way(whole, draw)
            if damaged == whole:
                continue
            case.file.write_bytes(damaged)
            found = by.outcome(case.read, expected, case.folder, case.file)
            if found.kind == "changed" and case.format not in UNCHECKED:
                found = by.Outcome("BAD", "a changed value was read without a word")
            tally[found.kind] += 1
            if found.kind == "BAD":
                _log.info("BAD %s %d %s: %s", case.name, number, way.__name__, found.told)
                bad.append(Failure(case.name, number, way.__name__, seed, found.told))
        case.file.write_bytes(whole)
        if by.fingerprint(case.read()) != expected:
            raise RuntimeError(f"{case.name}: reading the whole file again gives another value")
        _log.info("%s: %.2f s", case.name, time.process_time() - begun)
    return counts, bad


def table(counts: dict[str, Counter[str]]) -> str:
    """The counts as lines."""
    kinds = ("equal", "error", "changed", "BAD")
    lines = [f"{'format':<12}" + "".join(f"{kind:>9}" for kind in kinds)]
    total: Counter[str] = Counter()
    for name in sorted(counts):
        total += counts[name]
        lines.append(f"{name:<12}" + "".join(f"{counts[name][kind]:>9}" for kind in kinds))
    return "\n".join([*lines, f"{'all':<12}" + "".join(f"{total[kind]:>9}" for kind in kinds)])


# -- files ------------------------------------------------------------------------------------------------------------


def all_cases(folder: Path) -> list[Case]:
    """Write one whole file of each kind under `folder`; the cases that damage them."""
    makers = (_raw_v2, _raw_v3, _dataset, _weights, _adapters, _runs, _studies, _evaluations, _settings, _arrays)
    return list(itertools.chain.from_iterable(make(folder / make.__name__[1:]) for make in makers))


def _frames() -> list[np.ndarray]:
    """Images that differ."""
    ramp = np.linspace(0, 120, WIDE).astype(np.uint8)
    return [np.broadcast_to((ramp + 10 * k)[None, :, None], (HIGH, WIDE, 3)).astype(np.uint8) for k in range(FRAMES)]


def _rows(episode: int) -> pa.Table:
    draw = np.random.default_rng(episode)
    return pa.table(
        {
            "observation.state.joint_position": draw.normal(size=(FRAMES, 7)).astype(np.float32).tolist(),
            "observation.state.gripper_position": draw.random(FRAMES).astype(np.float32),
            "task_index": np.zeros(FRAMES, np.int64),
            "frame_index": np.arange(FRAMES),
            "episode_index": np.full(FRAMES, episode),
        }
    )


def _info(folder: Path, version: str, data: str, video: str) -> None:
    features = {CAMERA: {"dtype": "video"}, "observation.state.joint_position": {"dtype": "float32", "shape": [7]}}
    info = {"codebase_version": version, "fps": 15, "chunks_size": 1000, "splits": {"train": "0:2"}}
    (folder / "meta").mkdir(parents=True)
    text = json.dumps({**info, "data_path": data, "video_path": video, "features": features})
    (folder / "meta" / "info.json").write_text(text)


def _read_raw(folder: Path, videos: bool) -> Any:
    """Everything that extraction asks of a raw dataset."""
    raw = RawDataset(folder)
    told: list[Any] = [raw.version, raw.fps, raw.cameras, raw.splits, raw.declared, raw.episodes]
    for index in raw.episodes[:2]:
        told += [raw.episode(index), raw.instruction(index), sorted(raw.columns(index))]
        told.append(raw.read(index, ["observation.state.joint_position", "observation.state.gripper_position"]))
        for camera in raw.cameras:
            told += [raw.video(index, camera), raw.clock(index)]
            if videos:
                told += list(raw.images(index, camera, [0, 3, 6]))
    return told


def _raw_v2(folder: Path) -> list[Case]:
    """A raw dataset of version 2.1, with the recorder's own notes."""
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    _info(folder, "v2.1", data, "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
    meta, lines = folder / "meta", []
    objects = [{"name": "cube", "colour": "red", "shape": "cube", "rgb": [1.0, 0.0, 0.0], "size": [0.1, 0.1, 0.1]}]
    for episode in range(2):
        path = folder / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_rows(episode), path)
        write_mp4(folder / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4", _frames(), 15)
        row = {"episode_index": episode, "length": FRAMES, "objects": objects}
        lines.append(json.dumps({**row, **({"tasks": ["push it"]} if episode else {})}))
    (meta / "episodes.jsonl").write_text("\n".join(lines))
    (meta / "tasks.jsonl").write_text('{"task_index": 0, "task": "push it"}\n{"task_index": 1, "task": "lift it"}')

    def read() -> Any:
        return _read_raw(folder, videos=False)

    def seen() -> Any:
        return _described.__wrapped__(folder)

    video, rows = folder / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", folder / "data/chunk-000"
    return [
        Case("JSON", "raw v2 info.json", meta / "info.json", folder, read, by.JSON),
        Case("JSONL", "raw v2 episodes.jsonl", meta / "episodes.jsonl", folder, read, by.JSONL),
        Case("JSONL", "objects of episodes.jsonl", meta / "episodes.jsonl", folder, seen, by.JSONL),
        Case("JSONL", "raw v2 tasks.jsonl", meta / "tasks.jsonl", folder, read, by.JSONL),
        Case("parquet", "raw v2 rows", rows / "episode_000000.parquet", folder, read, by.PARQUET),
        Case("mp4", "video", video, folder, lambda: [count_frames(video), read_frames(video, [0, 3, 9])], by.ANY),
    ]


def _raw_v3(folder: Path) -> list[Case]:
    """A raw dataset of version 3.0."""
    video = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    _info(folder, "v3.0", "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", video)
    head, lines = f"videos/{CAMERA}/", []
    for episode in range(2):
        place = {"data/chunk_index": 0, "data/file_index": 0, f"{head}chunk_index": 0, f"{head}file_index": 0}
        time = {f"{head}from_timestamp": episode * FRAMES / 15, f"{head}to_timestamp": (episode + 1) * FRAMES / 15}
        lines.append({"episode_index": episode, "tasks": ["push it"] * episode, "length": FRAMES, **place, **time})
    files = {
        "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(lines),
        "meta/tasks.parquet": pa.table({"task_index": [0], "__index_level_0__": ["push it"]}),
        "data/chunk-000/file-000.parquet": pa.concat_tables([_rows(0), _rows(1)]),
    }
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, folder / name)
    write_mp4(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", _frames() * 2, 15)

    def read() -> Any:
        return _read_raw(folder, videos=False)

    cases = [Case("parquet", f"raw v3 {name}", folder / name, folder, read, by.PARQUET) for name in files]
    return [*cases, Case("JSON", "raw v3 info.json", folder / "meta" / "info.json", folder, read, by.JSON)]


def _dataset(folder: Path) -> list[Case]:
    """A processed dataset with its metadata."""
    draw = np.random.default_rng(0)
    for episode in ("0", "1"):
        place = folder / "latent_videos" / "train" / episode
        place.mkdir(parents=True)
        latents = draw.normal(size=LATENTS).astype(np.float32)
        if episode == "0":
            np.save(place / "0.npy", latents)
        else:
            torch.save(torch.from_numpy(latents), place / "0.pt")
        states, joints = draw.normal(size=(FRAMES, POSE)).tolist(), draw.normal(size=(FRAMES, 8)).tolist()
        note = {"texts": ["push it"], "states": states, "joints": joints, "video_length": FRAMES, "success": True}
        (folder / "annotation" / "train").mkdir(parents=True, exist_ok=True)
        (folder / "annotation" / "train" / f"{episode}.json").write_text(json.dumps(note))
    shared = {"rate_hz": 5.0, "height": HIGH}
    (folder / "extract.json").write_text(json.dumps(shared))
    ExtractReport(done=["0", "1"], failed=[{"episode": "2", "reason": "no rows"}]).write(path_of(folder))
    build_meta(folder, workers=1)
    meta = folder / "meta"
    index = IndexFile(meta / "index.safetensors")
    lists = export_ctrl_world(index, ActionStat.load(meta / "stat.json"), folder / "meta_info" / "own")
    gains = meta / "joint_velocity_adapter.json"
    gains.write_text(json.dumps({"gain": [0.05] * 7}))
    item, one = list_annotations(folder)[0], folder / "annotation" / "train" / "0.json"

    def annotation() -> Any:
        return [EpisodeStore(folder).annotation("train", "0"), read_episode(folder, (item, True))]

    def rows() -> Any:
        file, known = IndexFile(meta / "index.safetensors"), PreviousIndex(meta)
        return [file.split("train"), signatures(file), len(known)]

    def latents_of(episode: str) -> Callable[[], Any]:
        def read() -> Any:
            store = EpisodeStore(folder)
            return [store.latents("train", episode, [0, 3, FRAMES - 1]), store.latent_shape("train", episode)]

        return read

    places, path = {e: folder / "latent_videos" / "train" / e for e in ("0", "1")}, folder / "extract.json"
    return [
        Case("JSON", "annotation", one, folder, annotation, by.JSON),
        Case("JSON", "stat.json", meta / "stat.json", folder, lambda: ActionStat.load(meta / "stat.json"), by.JSON),
        Case("JSON", gains.name, gains, folder, lambda: _gain(gains), by.JSON),
        Case("JSON", "extract.json", path, folder, lambda: [extraction_notes(folder), _same(path, shared)], by.JSON),
        Case("JSON", "extract_report", folder / "extract_report.json", folder, lambda: _report(folder), by.JSON),
        Case("JSON", "samples", lists / "train_sample.json", folder, lambda: _lists(lists), by.JSON),
        Case("index", "index", meta / "index.safetensors", folder, rows, by.SAFETENSORS),
        Case("npy", "latents .npy", places["0"] / "0.npy", folder, latents_of("0"), by.NPY),
        Case("pt", "latents .pt", places["1"] / "0.pt", folder, latents_of("1"), by.TORCH),
    ]


def _gain(path: Path) -> Any:
    return load_adapter("meta", meta=path)(np.ones((15, 7)), np.zeros(7))


def _same(path: Path, shared: dict[str, Any]) -> None:
    before = read_json(path, "unreadable notes of the extraction", DAMAGED_NOTES)
    _compare(path, before, shared, Changing(), alone=False)


def _report(folder: Path) -> Any:
    report = ExtractReport.read(path_of(folder))
    return dataclasses.asdict(report)


def _lists(folder: Path) -> Any:
    lists = SampleLists(folder)
    return [lists.names("train", "0"), lists.names("val", "0")]


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"unet.layer{k}.weight": torch.randn(3, 4) for k in range(3)}
    return tensors | {"vae.scale": torch.ones(()), "text.count": torch.arange(4), "half": torch.ones(2).bfloat16()}


def _weights(folder: Path) -> list[Case]:
    """Checkpoints in every form."""
    folder.mkdir(parents=True)
    tensors = _tensors()
    torch.save(tensors, folder / "model.pt")
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, str(folder / "model.safetensors"))
    shards = folder / "shards"
    shards.mkdir()
    names = {f"model-0000{k + 1}-of-00002.safetensors": list(tensors)[k::2] for k in range(2)}
    for name, own in names.items():
        save_file({key: tensors[key] for key in own}, str(shards / name))
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, own in names.items() for key in own}}))
    mlp = MlpAdapter().state_dict()
    torch.save(mlp, folder / "mlp.pth")
    save_file(mlp, str(folder / "mlp.safetensors"))

    def read(path: Path) -> Callable[[], Any]:
        def load() -> Any:
            return WeightFiles(locate(path)).load()

        return load

    def act(path: Path) -> Callable[[], Any]:
        return lambda: load_adapter(str(path))(np.ones((15, 7)), np.zeros(7))

    first = shards / "model-00001-of-00002.safetensors"
    return [
        Case("pt", "weights .pt", folder / "model.pt", folder, read(folder / "model.pt"), by.TORCH),
        Case("pt", "weights of an old .pt", folder / "old.pt", folder, read(folder / "old.pt"), by.ANY),
        Case("pt", "joint-velocity adapter", folder / "mlp.pth", folder, act(folder / "mlp.pth"), by.TORCH),
        *(
            Case("safetensors", f"{path.parent.name}/{path.name}", path, folder, load, by.SAFETENSORS)
            for path, load in (
                (folder / "model.safetensors", read(folder / "model.safetensors")),
                (first, read(shards)),
                (folder / "mlp.safetensors", act(folder / "mlp.safetensors")),
            )
        ),
        Case("JSON", "index of shards", index, folder, read(shards), by.JSON),
    ]


def _adapters(folder: Path) -> list[Case]:
    """A PEFT folder, and a post-training's state beside its settings."""
    from peft import LoraConfig  # needs a torchvision that fits, which the package's modules see to

    folder.mkdir(parents=True)
    lora = {f"base_model.model.layer.lora_{side}.weight": torch.randn(2, 2) for side in "AB"}
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["layer"], bias="none")
    write_adapter(folder / "adapter", config, lora, {"mlp.weight": torch.ones(2)})
    step = folder / "run" / "state" / "step-00000001"
    step.mkdir(parents=True)
    torch.save({"step": 1, "switch": {"old": {"unet.layer.weight": torch.ones(2)}}}, step / "state.pt")
    settings = to_json(load_settings("tiny", (), {}, env={}))
    (folder / "run" / "config.json").write_text(json.dumps({"task": "post-train", "settings": settings}))

    def peft() -> Any:
        adapter = read_adapter(locate(folder / "adapter"))
        config = adapter.config.to_dict()
        told = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        return [adapter.lora, adapter.encoder, told, adapter_presets(adapter)]

    def state() -> Any:
        adapter = read_adapter(locate(step / "state.pt"))
        return [adapter.lora, adapter.encoder, adapter.config.r, adapter.config.lora_alpha]

    return [
        Case("JSON", "adapter_config.json", folder / "adapter" / "adapter_config.json", folder, peft, by.JSON),
        Case(
            *("safetensors", "adapter_model", folder / "adapter" / "adapter_model.safetensors", folder, peft),
            by.SAFETENSORS,
        ),
        Case("pt", "state.pt as an adapter", step / "state.pt", folder, state, by.TORCH),
        Case("JSON", "config.json of a state", folder / "run" / "config.json", folder, state, by.JSON),
    ]


def _runs(folder: Path) -> list[Case]:
    """What pi-rollout leaves, real results, and a worker's result."""
    folder.mkdir(parents=True)
    entries = [{"complete": True, "success": k > 0, "progress": 0.5, "json": f"{k}.json"} for k in range(3)]
    told = {"policy": "scripted", "task": "cubes", "rollouts": [{**entry, "sim_success": True} for entry in entries]}
    (folder / "rollouts.json").write_text(json.dumps(told))
    other = folder / "other" / "rollouts.json"
    other.parent.mkdir()
    other.write_text(json.dumps({**told, "policy": "other"}))
    (folder / "0.json").write_text(json.dumps({"success": True, "progress": 1.0, "instructions": "push"}))
    (folder / "real.csv").write_text("policy,task,success,n\nscripted,cubes,0.5,20\nother,cubes,0.25,20\n")
    (folder / "result.json").write_text(json.dumps({"output": "here", "numbers": [1.0, None]}))

    def read() -> Any:
        imagined, _ = read_runs([str(folder), str(other)])
        result = build_leaderboard(imagined, read_real(folder / "real.csv"))
        return [result, plain(*leaderboard_tables(result))]

    return [
        Case("JSON", "rollouts.json", folder / "rollouts.json", folder, read, by.JSON),
        Case("JSON", "a rollout's JSON", folder / "0.json", folder, read, by.JSON),
        Case("CSV", "real.csv", folder / "real.csv", folder, read, by.CSV),
        Case(
            *("JSON", "result.json", folder / "result.json", folder, lambda: read_result(folder / "result.json")),
            by.JSON,
        ),
    ]


def _studies(folder: Path) -> list[Case]:
    """A study's key and a rater's answers."""
    folder.mkdir(parents=True)
    models = ({"label": "base", "ckpt_sha256": "aa"}, {"label": "new", "ckpt_sha256": "bb"})
    key = make_key("s", [(str(e), 0, 0) for e in range(3)], ["exterior"], models, {"steps": 2})
    key.save(folder / "study.key.json")
    answers = [{"trial": t.id, "choice": "a", "side": "left", "seconds": 3.0, "plays": 1} for t in key.trials]
    told = {"kind": "persistworld study answers", "version": 1, "study": key.study, "rater": "r", "answers": answers}
    (folder / "answers.json").write_text(json.dumps(told))

    def read() -> Any:
        return study_result(*read_study([folder / "answers.json"], [folder / "study.key.json"]), samples=10)

    return [
        Case("JSON", "study key", folder / "study.key.json", folder, read, by.JSON),
        Case("JSON", "answers", folder / "answers.json", folder, read, by.JSON),
    ]


def _evaluations(folder: Path) -> list[Case]:
    """A result of eval, compared with itself."""
    folder.mkdir(parents=True)
    rows = ("copy", "base", "new", "ceiling")
    metric = {"name": "psnr", "label": "psnr", "unit": "dB", "higher_is_better": True}
    values = {name: [20.0 + k, 19.0, 21.0] for k, name in enumerate(rows)}
    counts = {"rollouts": 3, "episodes": 3, "steps": 1, "frames_per_step": 4, "rate_hz": 5.0}
    result = {
        "kind": "eval",
        "n": {**counts, "sampler": "euler", "sampling_steps": 5},
        "protocol": {"items": [[str(k), 0, 0] for k in range(3)], "steps": 1},
        "models": [{"label": name, "ckpt": f"{name}.pt", "adapter": None} for name in ("base", "new")],
        "metrics": [metric],
        "groups": ["exterior"],
        "floor": "copy",
        "ceiling": "ceiling",
        "table": [{"cameras": "exterior", "model": name, "psnr": 20.0, "reward": 0.1} for name in rows],
        "rollouts": {"exterior": {"psnr": values, "reward": values}},
        "paired": [],
    }
    for name in ("a.json", "b.json"):
        (folder / name).write_text(json.dumps(result))

    def read() -> Any:
        compared, shown = compare_files(str(folder / "a.json"), str(folder / "b.json"))
        return [load_result(str(folder / "a.json")), compared, plain(shown)]

    return [Case("JSON", "eval.json", folder / "a.json", folder, read, by.JSON)]


def _settings(folder: Path) -> list[Case]:
    """Presets, benchmarks, tasks, accelerate's file."""
    folder.mkdir(parents=True)
    presets = bundled_root() / "presets"
    (folder / "own.toml").write_bytes((presets / "one-camera.toml").read_bytes())
    (folder / "bench.toml").write_bytes((presets / "benchmarks" / "bundled.toml").read_bytes())
    (folder / "task.toml").write_bytes((presets / "tasks" / "pickplace.toml").read_bytes())
    text = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nnum_machines: 1\n"
    (folder / "accelerate.yaml").write_text(text + "machine_rank: 0\nmixed_precision: 'no'\nuse_cpu: false\n")

    def preset() -> Any:
        return flatten(load_settings(str(folder / "own.toml"), (), {}, env={}))

    def benchmark() -> Any:
        found = load_benchmark(str(folder / "bench.toml"))
        return found and [found.version, found.pinned.values, found.metrics]

    yaml = folder / "accelerate.yaml"
    return [
        Case("TOML", "preset", folder / "own.toml", folder, preset, by.TOML),
        Case("TOML", "benchmark", folder / "bench.toml", folder, benchmark, by.TOML),
        Case("TOML", "task", folder / "task.toml", folder, lambda: load_task(str(folder / "task.toml")), by.TOML),
        Case("YAML", "accelerate.yaml", yaml, folder, lambda: read_accelerate_config(yaml), by.TEXT),
    ]


def _arrays(folder: Path) -> list[Case]:
    """Finished rollouts, masks, cached images, the seed of a recording."""
    folder.mkdir(parents=True)
    item, draw = Item("7", 0, 1), np.random.default_rng(0)
    scores = {"psnr": draw.random((4, 3)).astype(np.float32)}
    latents = draw.normal(size=(1, 5, 4, 4, 6)).astype(np.float16)
    save_rollout(folder, ScoredRollout(item, np.ones(4, bool), scores, latents, 1.5))
    np.savez(folder / "masks.npz", draw.random((3, 8, 9)) > 0.5)
    mask = np.where(draw.random((8, 9)) > 0.5, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(folder / "mask.png")
    np.save(folder / "images.npy", draw.integers(0, 255, (2, 3, 8, 9, 3)).astype(np.uint8))

    def rollout() -> Any:
        return [load_rollout(folder, item), load_latents(folder, item)]

    png, npz, npy = folder / "mask.png", folder / "masks.npz", folder / "images.npy"
    return [
        Case("npz", "rollout", folder / f"{item.name}.npz", folder, rollout, by.NPZ),
        Case("npz", "masks", npz, folder, lambda: _array(npz), by.NPZ),
        Case("png", "mask", png, folder, lambda: [_size(png), _image(png)], by.ANY),
        Case("npy", "cached images", npy, folder, lambda: np.array(read_images(npy)), by.NPY),
    ]


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60, help="mutations of each file and seed")
    parser.add_argument("--only", default="", help="files whose name holds this text")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--times", action="store_true", help="tell the processor time of each file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.times else logging.WARNING, format="%(message)s")
    counts: dict[str, Counter[str]] = {}
    bad: list[Failure] = []
    with tempfile.TemporaryDirectory() as folder:
        cases = [case for case in all_cases(Path(folder)) if options.only in case.name]
        for seed in range(options.seeds):
            found, failures = run(cases, options.rounds, seed)
            for name, tally in found.items():
                counts.setdefault(name, Counter()).update(tally)
            bad += failures
    print(table(counts))
    for failure in bad[:100]:
        print(failure)
    if options.output:
        told = {"counts": counts, "unchecked": UNCHECKED, "bad": [dataclasses.asdict(failure) for failure in bad]}
        options.output.write_text(json.dumps(told, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PersistWorldError as error:
        sys.exit(str(error))
