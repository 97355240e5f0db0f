"""Find the files of a checkpoint on disk or on the hub; only the files needed are fetched from a repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from persistworld_cli.config.bundled import resolve_path
from persistworld_cli.config.weight_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PARTS,
    STATE,
    SUFFIXES,
    adapter_folder_in,
    adapter_on_disk,
    names_in,
)
from persistworld_cli.errors import PersistWorldError, nearest
from persistworld_cli.hub import command, is_hub_id, open_repository, snapshot_in, unfinished_in
from persistworld_cli.read_files import parse_json

ENCODER = "action_encoder"  # its file beside an adapter's weights

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.\w+)\.index(?P<variant>\.\w+)?\.json")
_TRAINING = (
    *("optimizer", "scheduler", "rng_state", "random_states", "training_args", "scaler", "trainer_state"),
    *("sampler", "dl_state_dict", "custom_checkpoint"),
)
_UNFINISHED = (".aria2", ".incomplete", ".part", ".crdownload")  # of the file that lies beside an unfinished download
# How a file's name ends -> what its folder is, and the command that makes weights of it.
_FOREIGN = {
    ".distcp": (
        "a checkpoint in shards of torch.distributed",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} {0}.pt",
    ),
    "zero_to_fp32.py": ("a checkpoint in shards of DeepSpeed", "python {0}/zero_to_fp32.py {0} {0}-merged"),
}
_DEFAULTS = ("diffusion_pytorch_model", "pytorch_model")  # the libraries' own names for "model"


@dataclass(frozen=True)
class WeightSource:
    """One checkpoint on disk.

    Attributes:
        name: as it was given.
        kind: ``weights`` (one file, or the shards of one), ``diffusers`` (folder with a subfolder for each part),
            ``adapter`` (PEFT folder), ``state`` (saved state of a training).
        root: the file, or the folder that holds the files.
        files: (file, prefix of its keys) in a fixed order; a diffusers folder's ``unet/`` has the prefix ``unet.``.
        entry: of a file with several sets of weights, the one that is meant.
    """

    name: str
    kind: Literal["weights", "diffusers", "adapter", "state"]
    root: Path
    files: tuple[tuple[Path, str], ...]
    entry: str = ""


def locate(source: str | Path, parts: Iterable[str] = PARTS) -> WeightSource:
    """The files of a checkpoint.

    Args:
        source: file, folder (also of the hub's cache), ``bundled:PATH``, hub id ``owner/name``, or one file or folder
            of a hub repository, ``owner/name:PATH``; ``FILE:ENTRY`` is one of several sets of weights in either file.
        parts: of a diffusers folder, the parts that are wanted; others are neither fetched nor listed.

    Raises:
        PersistWorldError: nothing there, no weights in it, several checkpoints in it, shards missing, or the hub
            cannot give it.
    """
    text = str(source)
    path = resolve_path(text)
    if path.is_file() or (path.is_symlink() and not path.exists()):
        beside = frozenset(file.name for file in path.parent.iterdir() if not file.is_dir())
        return _of_file(text, _Listing(str(path.parent), "/", beside, path.parent.joinpath), path.name, parts)
    if path.is_dir():
        return _of_folder(_listing_of_folder(text, path), parts)
    outer, _, entry = text.rpartition(":")
    if outer and resolve_path(outer).is_file():
        return replace(locate(outer, parts), name=text, entry=entry)
    repo, _, name = text.partition(":")
    if not _is_hub_id(repo):
        raise PersistWorldError(f"no such file or folder: '{path}'", where="weights", fix="check the path")
    listing, (name, _, entry) = _listing_of_hub(repo), name.partition(":")
    if name in listing.names:
        return replace(_of_file(text, listing, name, parts), entry=entry)
    folder = listing.inside(name)
    if not folder.names:
        shown = sorted(file for file in listing.names if _is_weights(file))
        raise listing.lacking(f"no file '{name}' there", f"it holds: {', '.join(shown) or 'no weights'}")
    return _of_folder(folder, parts)


def adapter_at(source: str) -> str:
    """The adapter that a path or hub id means (`adapter_on_disk`; from the hub only file names are requested).

    Raises:
        PersistWorldError: the hub does not answer.
    """
    if not source or resolve_path(source).exists():
        return adapter_on_disk(source)
    repo, _, name = source.partition(":")
    if not _is_hub_id(repo):
        return ""  # the loader reports the missing path
    listing = _listing_of_hub(repo)
    if name in listing.names:
        return source if _is_adapter_file(listing, name) else ""
    return "" if adapter_folder_in(listing.inside(name).names) is None else source


@dataclass(frozen=True)
class _Listing:
    """File names (relative, with slashes) of a folder or repository, and how to get at one of them."""

    name: str
    join: str  # between the name and a file's, as the user would write it
    names: frozenset[str]
    fetch: Callable[[str], Path]
    unfinished: str = ""  # what an interrupted download left, for messages
    again: str = ""  # the command that fetches what is missing

    def inside(self, folder: str) -> _Listing:
        """The listing of one of its folders; "" or ".": itself."""
        if folder in ("", "."):
            return self
        names = frozenset(name.removeprefix(f"{folder}/") for name in self.names if name.startswith(f"{folder}/"))
        inside = f"{self.name}{self.join}{folder}"
        return replace(self, name=inside, join="/", names=names, fetch=lambda name: self.fetch(f"{folder}/{name}"))

    def files(self, names: Iterable[str], prefix: str = "") -> tuple[tuple[Path, str], ...]:
        """Some files, fetched, each with the prefix of its keys. Raises PersistWorldError for an incomplete one."""
        found = tuple((self.fetch(name), prefix) for name in names)
        for path, _ in found:
            if path.is_symlink() and not path.exists():
                raise self.lacking(f"'{path.name}' is a link to a file that is not there: {path.readlink()}")
        for name in names:
            if beside := next((name + ending for ending in _UNFINISHED if name + ending in self.names), ""):
                raise self.lacking(f"'{name}' is incomplete: its download left '{PurePosixPath(beside).name}'")
        return found

    def error(self, what: str, fix: str) -> PersistWorldError:
        """An error about this folder or repository."""
        return PersistWorldError(what, where=self.name, fix=fix)

    def lacking(self, what: str, otherwise: str = "fetch it again") -> PersistWorldError:
        """An error about missing or incomplete files."""
        fix = f"{otherwise}; to fetch the rest: {self.again}" if self.again else otherwise
        return self.error(what + self.unfinished, fix)


def _of_file(text: str, listing: _Listing, name: str, parts: Iterable[str]) -> WeightSource:
    """The checkpoint that one file of a folder or repository means, given as `text`."""
    if _is_adapter_file(listing, name):
        return _of_folder(listing.inside(PurePosixPath(name).parent.as_posix()), parts)
    ((file, _),) = listing.files([name])
    if _INDEX.fullmatch(name):
        shards = _pick(listing, {name, *_shards_of(listing, name)})
        return WeightSource(text, "weights", file.parent, listing.files(shards))
    return WeightSource(text, "state" if file.name == STATE else "weights", file, ((file, ""),))


def _of_folder(listing: _Listing, parts: Iterable[str]) -> WeightSource:
    """What a folder or repository holds: an adapter, a diffusers folder, or one checkpoint."""
    folder = adapter_folder_in(listing.names)
    if folder is not None:
        return _of_adapter(listing, folder)
    if STATE in listing.names:
        return WeightSource(listing.name, "state", listing.fetch(STATE), listing.files([STATE]))
    weights = [name for name in listing.names if _is_weights(name)]
    top = [name for name in weights if "/" not in name]
    own = {part: [name for name in weights if PurePosixPath(name).parent.as_posix() == part] for part in PARTS}
    if "model_index.json" in listing.names or (not top and (own["unet"] or own["vae"])):
        wanted = [part for part in PARTS if part in set(parts) and own[part]]
        files = [file for part in wanted for file in listing.files(_pick(listing, own[part]), f"{part}.")]
        if not files:
            raise listing.lacking(
                "the diffusers folder has none of the requested parts", f"expected {', '.join(parts)}"
            )
        return WeightSource(listing.name, "diffusers", files[0][0].parents[1], tuple(files))
    for name in () if top else sorted(listing.names):
        if kind := next((kind for ending, kind in _FOREIGN.items() if name.endswith(ending)), None):
            home = (PurePosixPath(listing.name) / name).parent
            raise listing.error(kind[0], f"merge the shards: {kind[1].format(home)}")
    nested = [name for name in weights if name.count("/") == 1]
    if not (top or nested):
        raise listing.lacking("no weights there", f"expected files ending in {', '.join(SUFFIXES)}")
    files = list(listing.files(_pick(listing, top or nested)))
    return WeightSource(listing.name, "weights", files[0][0] if len(files) == 1 else files[0][0].parent, tuple(files))


def _of_adapter(listing: _Listing, folder: str) -> WeightSource:
    """A PEFT folder, and the action encoder beside it if there is one."""
    names = [folder + ADAPTER_WEIGHTS + suffix for suffix in (".safetensors", ".bin")]
    found = [name for name in names if name in listing.names][:1]
    if not found:
        raise listing.lacking("an adapter without its weights", f"expected {names[0]} beside {ADAPTER_CONFIG}")
    root = listing.fetch(folder + ADAPTER_CONFIG).parent
    encoders = [name for name in (f"{folder}{ENCODER}{suffix}" for suffix in SUFFIXES) if name in listing.names][:1]
    files = (*listing.files(found), *listing.files(encoders, f"{ENCODER}."))
    return WeightSource(listing.name, "adapter", root, files)


def _is_hub_id(text: str) -> bool:
    return is_hub_id(text) and not text.endswith(SUFFIXES)


def _is_adapter_file(listing: _Listing, name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith(ADAPTER_WEIGHTS) and (path.parent / ADAPTER_CONFIG).as_posix() in listing.names


def _is_weights(name: str) -> bool:
    """Whether a file name may be a checkpoint's (or its index's)."""
    file = PurePosixPath(name).name
    return (file.endswith(SUFFIXES) or bool(_INDEX.fullmatch(file))) and not file.startswith((*_TRAINING, "."))


def _pick(listing: _Listing, names: Iterable[str]) -> list[str]:
    """The files of the one checkpoint among `names`; if it has several formats, full precision and safetensors.

    Raises:
        PersistWorldError: several checkpoints, or only some of the shards of one.
    """
    families = _families(listing, set(names))
    for family in [f for f in families if _twin(f) != f and _twin(f) in families]:
        del families[family]
    models: dict[str, list[str]] = {}
    for family in families:
        models.setdefault(_model_of(family), []).append(family)
    if len(models) != 1:
        shown = [families[family][0] for family in sorted(families)]
        raise listing.error(
            f"{len(models)} checkpoints there: {', '.join(shown[:6])}{', ...' if len(shown) > 6 else ''}",
            f"name one: {listing.name.rstrip('/')}{listing.join}{shown[0]}",
        )
    files = families[min(models.popitem()[1], key=lambda family: SUFFIXES.index(PurePosixPath(family).suffix))]
    shard = _SHARD.fullmatch(files[0])
    count = int(shard["count"]) if shard else len(files)
    if shard:
        rest = f"-of-{shard['count']}{shard['suffix']}"
        files = [f"{shard['stem']}-{number:05d}{rest}" for number in range(1, count + 1)]
    absent = [file for file in files if file not in listing.names]
    if absent:
        there = f"only {count - len(absent)} of the {count} shards of '{files[0]}' are there"
        raise listing.lacking(f"{there} (missing: {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''})")
    return files


def _families(listing: _Listing, names: set[str]) -> dict[str, list[str]]:
    """Name without shard numbers -> files: the shards of one checkpoint, or a single file."""
    families: dict[str, list[str]] = {}
    for index in sorted(name for name in names if _INDEX.fullmatch(name)):
        family = _INDEX.fullmatch(index)
        assert family is not None
        families[f"{family['stem']}{family['variant'] or ''}{family['suffix']}"] = _shards_of(listing, index)
    named = {file for files in families.values() for file in files}
    for name in sorted(names - named):
        if _INDEX.fullmatch(name):
            continue
        shard = _SHARD.fullmatch(name)
        families.setdefault(shard["stem"] + shard["suffix"] if shard else name, []).append(name)
    return families


def _shards_of(listing: _Listing, index: str) -> list[str]:
    """The files that an index names, whether they are there or not."""
    try:
        shards = sorted(set(parse_json(listing.fetch(index).read_text(encoding="utf-8"))["weight_map"].values()))
        strays = [name for name in shards if PurePosixPath(name).name != name]
        if strays or not shards:
            raise ValueError(f"it names {strays[0]!r}, not a file beside it" if strays else "it names no file")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise listing.error(f"the index '{index}' is damaged: {error}", "fetch it again") from error
    return [(PurePosixPath(index).parent / shard).as_posix() for shard in shards]


def _twin(family: str) -> str:
    """``model.fp16.safetensors`` -> ``model.safetensors``: the same weights in full precision."""
    return re.sub(r"\.(fp16|bf16|non_ema)(?=\.\w+$)", "", family)


def _model_of(family: str) -> str:
    """What a file is called apart from its format: ``pytorch_model.bin`` and ``model.safetensors`` are the same."""
    path = PurePosixPath(family)
    return (path.parent / ("model" if path.stem in _DEFAULTS else path.stem)).as_posix()


def _listing_of_folder(text: str, path: Path) -> _Listing:
    """A folder's file names; those of its snapshot, if it is a repository in the hub's cache."""
    if path.name.startswith("models--") and any((path / own).is_dir() for own in ("blobs", "refs", "snapshots")):
        again = command(path.name.removeprefix("models--").replace("--", "/", 1))
        snapshot, unfinished = snapshot_in(path), unfinished_in(path)
        if snapshot is None:
            raise PersistWorldError(f"no snapshot in this folder of the hub's cache{unfinished}", where=text, fix=again)
        return _Listing(str(snapshot), "/", names_in(snapshot), snapshot.joinpath, unfinished, again)
    again = f"hf download REPOSITORY --local-dir {text}" if (path / ".cache" / "huggingface").is_dir() else ""
    return _Listing(text, "/", names_in(path), path.joinpath, unfinished_in(path), again)


def _listing_of_hub(repo: str) -> _Listing:
    """A repository's file names, from the hub or the cache.

    Raises:
        PersistWorldError: it cannot be had; where a folder here has the owner's name, a mistyped path is likelier.
    """
    try:
        found = open_repository(repo)
    except PersistWorldError as error:
        owner, _, name = repo.partition("/")
        beside = [entry.name for entry in sorted(Path(owner).iterdir())] if Path(owner).is_dir() else []
        if not beside:
            raise
        raise PersistWorldError(
            f"no such file or folder: '{repo}' (and no such repository to be had from the hub: {error.what})",
            where=f"weights, in the folder {owner}",
            fix=nearest(name, beside),
        ) from error
    unfinished = "" if found.answered else unfinished_in(found.snapshot.parents[1])
    return _Listing(repo, ":", found.names, found.fetch, unfinished, "" if found.answered else command(repo))
