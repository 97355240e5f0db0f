"""Requests: the options of one call that are not settings, one frozen dataclass per task.

Settings say how work is done and come from presets, environment and ``--set``. A request says what one call does: where
it resumes, what it compares with, which files it writes. Anything that could be either is a setting. `option` documents
a field and names its flag, and its annotation gives the bounds (config/fields.py). commands/options.py builds the
command line from both, and every request is checked when it is created.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from persistworld_cli.config.fields import Bounds, Count, NonNegative, Port, Whole, check_fields, coerce, field_types
from persistworld_cli.config.presets import DEFAULT_PRESET
from persistworld_cli.config.settings import SAMPLER_NAMES, Sampler
from persistworld_cli.errors import UsageError, nearest
from persistworld_cli.files import jsonable

# Files that the launcher and its workers exchange; the launcher leaves copies in the run's folder for people.
CONFIG = "config.json"  # request and settings, written by the launcher
RESULT = "result.json"  # what the task returned, written by rank 0
FAILURE = "failure.json"  # exit code, reason, and whether to try again, written by the first rank that failed
INTERRUPTED = 130  # exit code
TRY_AGAIN = 75  # exit code (EX_TEMPFAIL of sysexits.h): the machine failed, not the program or its user
LOCALHOST = "127.0.0.1"
VERIFY_COUNT = 8
ANIMATIONS = (".webp", ".gif")
REQUIRED = dataclasses.MISSING
CONTINUING = "Continuing a run"  # a heading of the help


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a request on the command line.

    Attributes:
        help: one sentence.
        flag: its spelling; "": ``--`` and the field's name. Without dashes it is an argument.
        metavar: what help calls its value.
        commas: a list may also be written ``a,b``.
        panel: its heading in the help.
    """

    help: str
    flag: str = ""
    metavar: str | None = None
    commas: bool = False
    panel: str | None = None


def option(default: Any, help: str, **how: Any) -> Any:
    """A field with its `Option`; `REQUIRED` as default makes a field that must be given."""
    return dataclasses.field(default=default, metadata={"option": Option(help=help, **how)})


def option_of(field: dataclasses.Field[Any], name: str) -> Option | None:
    """The option of a field, with its flag; None if no command offers it."""
    own: Option | None = field.metadata.get("option")
    return own and dataclasses.replace(own, flag=own.flag or "--" + name.replace("_", "-"))


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a command that are not settings."""

    task: ClassVar[str]  # as in config.json and, without an --output, in the folder's name

    def __post_init__(self) -> None:
        """Coerce and check every field; paths become absolute. Raises UsageError."""
        types = field_types(type(self))
        for field in dataclasses.fields(self):
            value = coerce(getattr(self, field.name), types[field.name], key=field.name, where=self._where(field.name))
            object.__setattr__(self, field.name, value.expanduser().absolute() if isinstance(value, Path) else value)
        check_fields(self, "", self._where)

    def _where(self, name: str) -> str:
        """A field in a message: its flag, if it has one."""
        own = option_of(self.__dataclass_fields__[name], name)
        return own.flag if own else f"{self.task} request"


def request_to_json(request: Request) -> dict[str, Any]:
    """A request as config.json holds it."""
    plain: dict[str, Any] = jsonable(request)
    return plain


@dataclass(frozen=True, kw_only=True)
class TaskRequest(Request):
    """The request of a task that runs in worker processes.

    Attributes:
        output: folder of the run.
        command: the command line as it was typed, for messages.
        profile: write where the time went into ``output``.
    """

    output: Path = Path()
    command: tuple[str, ...] = ()
    profile: bool = False

    @property
    def terminal(self) -> bool:
        """Whether the worker reads keys from the terminal."""
        return False


def request_from_json(kind: type[TaskRequest], data: Mapping[str, Any], where: str) -> TaskRequest:
    """The request that `request_to_json` wrote. Raises UsageError for an unknown field or a wrong value."""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in data:
        if name not in names:
            raise UsageError(
                f"unknown field '{name}' of the {kind.task} request", where=where, fix=nearest(name, names)
            )
    return kind(**data)


@dataclass(frozen=True, kw_only=True)
class ContinuingRequest(TaskRequest):
    """The request of a task that continues the finished work in its folder."""

    with_changes: bool = option(
        False,
        "Continue although settings that affect the result have changed.",
        flag="--continue-with-changes",
        panel=CONTINUING,
    )


@dataclass(frozen=True, kw_only=True)
class ExtractRequest(ContinuingRequest):
    """Encode recordings. ``cores``: physical cores shared by this machine's processes."""

    task: ClassVar[str] = "extract-latents"
    vae: str = option("", "Weights that contain the VAE; the model's by default.", metavar="PATH|HUB_ID")
    episodes: str = option("", "Episodes to encode, as 0:100,199; all by default.")
    layout: Literal["native", "ctrl-world"] = option(
        "native", "native (float16, memory-mapped) or ctrl-world (float32 .pt files)."
    )
    batch: Count = option(32, "Images per call of the encoder.")
    dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "Precision of the VAE: fp32, bf16 or fp16.")
    workers: Whole | None = option(
        None, "Decoder processes per process (default: cores / processes; 0: decode in the process itself)."
    )
    strict: bool = option(False, "Fail at the first episode that cannot be read.")
    cores: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(ContinuingRequest):
    """Train, from the newest state in the output folder if there is one."""

    resume: bool = option(
        True, "Continue the run in the output folder, if it has one.", flag="--resume/--no-resume", panel=CONTINUING
    )
    resume_from: Path | None = option(
        None,
        "Continue from this state: a run's folder (newest state) or its state/step-N.",
        metavar="PATH",
        panel=CONTINUING,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume_from and not self.resume:
            what = "--no-resume and --resume-from contradict each other"
            raise UsageError(what, where="flags", fix="give one of them")


@dataclass(frozen=True, kw_only=True)
class PretrainRequest(TrainingRequest):
    """Pretrain the world model."""

    task: ClassVar[str] = "pretrain"
    scratch: bool = option(False, "Start from random weights instead of the checkpoint's.")
    vae: str = option("", "With --scratch: weights that contain the VAE.", metavar="PATH|HUB_ID")


@dataclass(frozen=True, kw_only=True)
class PretrainVaeRequest(TrainingRequest):
    """Pretrain the VAE."""

    task: ClassVar[str] = "pretrain-vae"


@dataclass(frozen=True, kw_only=True)
class PostTrainRequest(TrainingRequest):
    """Post-train the world model."""

    task: ClassVar[str] = "post-train"


_BASELINE = "Weights to compare with; base: the evaluated ones without their adapter.  \\[base]"


@dataclass(frozen=True, kw_only=True)
class EvalRequest(ContinuingRequest):
    """Evaluate. ``compare``: another run's eval.json to compare with, or ""."""

    task: ClassVar[str] = "eval"
    baseline: str = option("", _BASELINE, metavar="PATH|HUB_ID")
    study: Path | None = option(
        None, "Also write a blind preference study to this folder, and its key beside it.", metavar="DIR"
    )
    animation: Path | None = option(
        None,
        "Also write a looped animation (.webp or .gif): two episodes, record and models side by side.",
        metavar="FILE.webp",
    )
    compare: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.animation and self.animation.suffix.lower() not in ANIMATIONS:
            raise UsageError(
                f"no animation format '{self.animation.suffix}'",
                where="--animation",
                fix=f"name a file that ends in {' or '.join(ANIMATIONS)}",
            )


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(TaskRequest):
    """Compare with published figures."""

    task: ClassVar[str] = "verify"
    count: Annotated[int, Bounds(ge=2)] | None = option(
        None,
        f"Use at most this many of the benchmark's episodes on disk.  \\[{VERIFY_COUNT}, or those of --episodes]",
    )
    alone: bool = option(False, "Do not roll out the base, even if the published figures include a gain over it.")
    write_published: Path | None = option(
        None, "Write the measured figures to a file for --published instead of comparing them.", metavar="FILE.toml"
    )


@dataclass(frozen=True, kw_only=True)
class FrontierRequest(ContinuingRequest):
    """Find how few network calls are enough. ``preset``: the one that a written preset extends."""

    task: ClassVar[str] = "frontier"
    baseline: str = option(
        "",
        "Weights of the reference; base: without the adapter.  \\[the same]",
        metavar="PATH|HUB_ID",
    )
    samplers: tuple[Sampler, ...] = option(
        SAMPLER_NAMES, "Samplers to try, or your own.", flag="--sampler", metavar="NAME|MODULE:CLASS", commas=True
    )
    calls: tuple[Count, ...] = option(
        (1, 2, 3, 4, 5, 6, 8, 12),
        "Denoiser calls per clip to try; with guidance each counts twice.",
        commas=True,
    )
    vary: tuple[str, ...] = option(
        (), "Also try these values of guidance, sigma_min, sigma_max or rho; may be repeated.", metavar="KEY=V,V"
    )
    reference: str = option("euler:50", "The setting that all others are compared with.", metavar="SAMPLER:STEPS")
    percent: NonNegative = option(1.0, "Largest acceptable loss against the reference, in percent.")
    write_preset: Path | None = option(None, "Write the fastest acceptable setting as a preset.", metavar="FILE.toml")
    preset: str = DEFAULT_PRESET


@dataclass(frozen=True, kw_only=True)
class ReplayRequest(TaskRequest):
    """Replay recorded actions. Several models can be shown side by side; ``model.inference`` names only one."""

    task: ClassVar[str] = "replay"
    ckpts: tuple[str, ...] = option(
        (), "Weights; may be repeated, for models side by side.", flag="--ckpt", metavar="PATH|HUB_ID"
    )
    adapters: tuple[str, ...] = option(
        (), "LoRA adapter on the weights, or base for none; may be repeated.", flag="--adapter", metavar="PATH"
    )


@dataclass(frozen=True, kw_only=True)
class DriveRequest(TaskRequest):
    """Drive by keys: a string of them, from the terminal, or from a web page."""

    task: ClassVar[str] = "drive"
    keys: str | None = option(
        None, "One key per step, of the preset's drive.keys (a Franka's: l r f b u d o c); l*3 is lll.  \\[lllrrr]"
    )
    live: bool = option(False, "Drive in this terminal: one key, one step.")
    web: bool = option(False, "Drive on a web page that this machine serves.")
    host: str = option("", f"With --web: address to listen on; other than loopback it needs a token.  \\[{LOCALHOST}]")
    port: Port | None = option(None, "With --web: port to listen on.  \\[a free one]")
    browser: bool = option(False, "With --web: open the page in a browser.", flag="--open")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"--keys": self.keys is not None, "--live": self.live, "--web": self.web}
        ways = [flag for flag, wanted in given.items() if wanted]
        if len(ways) > 1:
            raise UsageError(f"{' and '.join(ways)} are different ways to drive", fix="give one of them")
        if not ways:
            object.__setattr__(self, "keys", "lllrrr")
        of_web = {"--host": self.host, "--port": self.port is not None, "--open": self.browser}
        for flag, wanted in of_web.items():
            if wanted and not self.web:
                raise UsageError(f"{flag} needs --web", where=flag, fix="add --web, or leave it out")

    @property
    def terminal(self) -> bool:
        """Whether the worker reads keys from the terminal."""
        return self.live


@dataclass(frozen=True, kw_only=True)
class PolicyRolloutRequest(TaskRequest):
    """Roll a policy out. ``episodes``, ``start`` and ``instruction`` replace the task's (``policy.task``)."""

    task: ClassVar[str] = "pi-rollout"
    policy: str = option(
        "scripted",
        "scripted, hold or random (served here on loopback); server (the preset's address); or your own.",
        metavar="NAME|ws://HOST:PORT|MODULE:CLASS",
    )
    rollouts: Count = option(1, "Number of rollouts, from the first of the task's start frames.")
    episodes: tuple[str, ...] = option((), "Episode instead of the task's; may be repeated.", flag="--episode")
    start: Whole | None = option(None, "Start frame instead of the task's.")
    instruction: str = option("", "Instruction instead of the task's.")
    judge: str = option("", "Success judge: bundled-world, or your own.", metavar="NAME|MODULE:CLASS")
    against: Literal["sim"] | None = option(
        None,
        "sim: also roll out in the bundled world's simulator, and report how well the world model agrees.",
        metavar="sim",
    )


@dataclass(frozen=True, kw_only=True)
class SelfcheckRequest(ContinuingRequest):
    """Check that launching works; used by tests and benchmarks, not by a command.

    Attributes:
        seconds: each rank writes ``waiting.RANK`` into ``output`` and waits for this time.
        fail_rank: this rank fails.
        fail_how: mistake (PersistWorldError), crash (another error), lost-gpu (CUDA's error) or kill (by a signal).
        fail_starts: in so many starts, which it counts in ``output``; by default in all.
    """

    task: ClassVar[str] = "selfcheck"
    seconds: NonNegative = 0.0
    fail_rank: Whole | None = None
    fail_how: Literal["mistake", "crash", "lost-gpu", "kill"] = "mistake"
    fail_starts: Count | None = None


# -- commands that run in their own process ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BuildMetaRequest(Request):
    """Index a processed dataset, or check it."""

    task: ClassVar[str] = "build-meta"
    check: bool = option(False, "Write nothing; report what must be fixed in the dataset, and how.")
    sample: Whole = option(
        100, "With --check: number of episodes whose videos and latents are read completely; 0: all."
    )
    export: Literal["ctrl-world"] | None = option(
        None, "Also write Ctrl-World's train_sample.json, val_sample.json and stat.json.", metavar="ctrl-world"
    )
    lists: Path | None = option(
        None,
        "Take episodes, start frames and percentiles from this Ctrl-World folder.",
        flag="--import",
        metavar="DIR",
    )
    fresh: bool = option(False, "Read every annotation again, changed or not.")
    workers: Count | None = option(None, "Processes that read annotations.  \\[one per core]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.check and (self.export or self.lists or self.fresh):
            fix = "run it without --export, --import and --fresh"
            raise UsageError("--check writes nothing", where="--check", fix=fix)


@dataclass(frozen=True, kw_only=True)
class InspectRequest(Request):
    """Describe a checkpoint."""

    task: ClassVar[str] = "inspect"
    ckpt: str = option(REQUIRED, "File, folder or hub id.", flag="CKPT")


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Request):
    """Write weights or an adapter for other programs."""

    task: ClassVar[str] = "export"
    ckpt: str = option(REQUIRED, "Weights, or with --to peft a LoRA adapter: file, folder or hub id.", flag="CKPT")
    output: Path = option(REQUIRED, "File to write; with --to peft, folder.", flag="--output -o", metavar="FILE")
    to: Literal["ctrl-world", "safetensors", "peft"] = option(
        REQUIRED, "ctrl-world (.pt that Ctrl-World loads), safetensors (one file), or peft (adapter folder)."
    )
    adapter: str = option("", "LoRA adapter (PEFT folder of a post-training) on the weights.", metavar="PATH")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Type of the weights: float32, bfloat16 or float16."
    )
    force: bool = option(False, "Replace an existing output.")


@dataclass(frozen=True, kw_only=True)
class PolicyServerRequest(Request):
    """Serve a policy."""

    task: ClassVar[str] = "policy-server"
    policy: str = option("scripted", "scripted, hold or random; or your own.", metavar="NAME|MODULE:CLASS")
    no_key: bool = option(False, "Listen beyond loopback without a key: anyone who reaches the port can use it.")


@dataclass(frozen=True, kw_only=True)
class LeaderboardRequest(Request):
    """Rank policies."""

    task: ClassVar[str] = "leaderboard"
    runs: tuple[str, ...] = option(
        REQUIRED, "Output folders of pi-rollout; NAME=FOLDER renames a policy.", flag="FOLDERS"
    )
    real: str = option(
        "",
        "Real results: CSV with policy,task,success (0 .. 1),n; or sim: simulated in these runs.",
        metavar="FILE|sim",
    )


@dataclass(frozen=True, kw_only=True)
class StudyReportRequest(Request):
    """Evaluate the responses to a preference study."""

    task: ClassVar[str] = "study-report"
    files: tuple[Path, ...] = option(
        REQUIRED, "Responses: the files that raters downloaded from the page.", flag="FILES"
    )
    keys: tuple[Path, ...] = option(
        (),
        "Key of the study (DIR.key.json); may be repeated for several studies.  \\[found near the files]",
        flag="--key",
        metavar="FILE",
    )
