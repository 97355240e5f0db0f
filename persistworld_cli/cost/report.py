"""A run's cost as tables and as JSON: parameters, FLOPs with their minimum time, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from persistworld_cli.config.settings import Settings
from persistworld_cli.console import stdout_console
from persistworld_cli.cost.accelerators import DEFAULT_ACCELERATOR, Accelerator, find_accelerator
from persistworld_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
_Scale = Sequence[tuple[float, str]]  # size of a unit and its name, largest first
FLOPS: _Scale = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP"))
BYTES: _Scale = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1.0, "B"))
SECONDS: _Scale = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
# What to change if memory is too small.
_SMALLER = {
    "post-train": "lower post_train.micro_batch",
    "pretrain": "pretrain.shard = true, more processes, or a smaller pretrain.batch with more pretrain.accumulate",
    "eval": "lower eval.batch",
    "replay": "lower eval.batch",
}
NOTES = (
    "Parameters and FLOPs are counted on a model that is built from these settings without reading weights. "
    "FLOPs are those of matrix products, convolutions and attention, 2 per multiply-add.",
    "Memory is estimated: the tensors alive at once, operation by operation, with fused attention and the casts of "
    "CUDA's autocast. Kernel workspaces, allocator fragmentation and the CUDA context come on top (some GiB).",
    "A floor is FLOPs divided by the peak dense bf16 rate, of the slowest process on average; in brackets the mean of "
    "the processes. What runs in float32 (the VAE; without mixed "
    "precision, everything) cannot reach that peak.",
)


@dataclass(frozen=True)
class WorkRow:
    """Some work: its FLOPs, and how many processes share it.

    slowest: FLOPs until the slowest process is done, on average, where the others wait for it; 0: shared evenly.
    """

    key: str
    what: str
    flops: float
    processes: int = 1
    slowest: float = 0.0

    def floor(self, accelerator: Accelerator) -> float:
        """Seconds at the accelerator's peak, of the slowest process."""
        return (self.slowest or self.flops / self.processes) / (accelerator.tflops * 1e12)

    def even(self, accelerator: Accelerator) -> float:
        """Seconds at the accelerator's peak, if no process waited for another."""
        return self.flops / (accelerator.tflops * 1e12 * self.processes)


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one process. Passing rows exist one at a time: only the largest counts for the peak."""

    key: str
    what: str
    bytes: int
    passing: bool = False


@dataclass(frozen=True)
class CostReport:
    """Everything counted and estimated; ``trained``: trained parameters by part."""

    parameters: dict[str, int]
    work: list[WorkRow]
    memory: list[MemoryRow]
    trained: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Most bytes of one process at once."""
        passing = [row.bytes for row in self.memory if row.passing]
        return sum(row.bytes for row in self.memory if not row.passing) + max(passing, default=0)

    def fits(self, accelerator: Accelerator) -> bool | None:
        """Whether the peak is below the accelerator's memory; None if that is not known."""
        return None if accelerator.memory_gib is None else self.peak <= accelerator.memory_gib * GIB

    def as_json(self, accelerator: Accelerator) -> dict[str, Any]:
        """For machines: numbers in FLOP, seconds and bytes."""
        return {
            "accelerator": asdict(accelerator),
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "trained": {**self.trained, "total": sum(self.trained.values())},
            "work": {
                row.key: {
                    "what": row.what.strip(),
                    "flops": row.flops,
                    "processes": row.processes,
                    "floor_s": row.floor(accelerator),
                    "even_s": row.even(accelerator),
                }
                for row in self.work
            },
            "memory": {row.key: {"what": row.what, "bytes": row.bytes, "passing": row.passing} for row in self.memory},
            "peak_bytes": self.peak,
            "fits": self.fits(accelerator),
            "counted": ["parameters", "trained", "work.*.flops"],
            "estimated": ["memory"],
            "notes": list(NOTES),
        }


def pick_accelerator(name: str | None, *, dry_run: bool) -> Accelerator:
    """The accelerator that ``--accelerator`` names, or the default.

    Raises:
        UsageError: an unknown one; or the flag without ``--dry-run``.
    """
    if name is not None and not dry_run:
        raise UsageError("only a dry run reports an accelerator's cost", where="--accelerator", fix="add --dry-run")
    return find_accelerator(name or DEFAULT_ACCELERATOR)


def cost_report(task: str, settings: Settings) -> CostReport | None:
    """What a task would cost; None for tasks without a cost estimate.

    Raises:
        PersistWorldError: no model can be built from the settings.
    """
    if task == "post-train":
        from persistworld_cli.cost.training import post_train_report

        return post_train_report(settings)
    if task == "pretrain":
        from persistworld_cli.cost.training import pretrain_report

        return pretrain_report(settings)
    if task in ("eval", "replay", "drive", "pi-rollout"):
        from persistworld_cli.cost.interaction import interaction_report

        return interaction_report(settings, settings.eval.batch if task in ("eval", "replay") else 1)
    return None


def show_cost(task: str, report: CostReport, accelerator: Accelerator) -> None:
    """The report as tables on standard output."""
    console = stdout_console()
    console.print()
    for table in (_sizes(report), _work(report, accelerator), _memory(report)):
        console.print(table)
        console.print()
    if accelerator.memory_gib is not None:
        memory = f"{accelerator.memory_gib:g} GiB of {accelerator.name}"
        fits = f"fits into the {memory}" if report.fits(accelerator) else f"does not fit into the {memory}"
        fix = "" if report.fits(accelerator) or task not in _SMALLER else f": {_SMALLER[task]}"
        console.print(f"{amount(report.peak, BYTES)} per process {fits}{fix}", markup=False)
    for note in NOTES:
        console.print(note, style="dim", markup=False)


def amount(value: float, scale: _Scale) -> str:
    """A number in the largest unit that is not larger than it, with three digits."""
    size, unit = next(((size, unit) for size, unit in scale if value >= size), scale[-1])
    number = value / size
    digits = 0 if number >= 100 or number == round(number) else 1 if number >= 10 else 2
    return f"{number:.{digits}f} {unit}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> Table:
    """A plain table whose columns but the first are numbers."""
    from persistworld_cli.reports.tables import new_table

    table = new_table(None, columns[:1], columns[1:])
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_row(*total, style="bold")
    return table


def _sizes(report: CostReport) -> Table:
    """Parameters by part, and those that are trained."""
    counts = (report.parameters, report.trained)
    parts = dict.fromkeys(name for count in counts for name in count)
    rows = [(name, *(f"{count[name]:,}" if name in count else "-" for count in counts)) for name in parts]
    return _table(("part", "parameters", "trained"), rows, ("total", *(f"{sum(count.values()):,}" for count in counts)))


def _work(report: CostReport, accelerator: Accelerator) -> Table:
    """FLOPs and the least time they take."""
    speed = f"{accelerator.tflops:g} TFLOP/s"
    name = accelerator.name if accelerator.name == speed else f"{accelerator.name}, {speed}"

    def floor(row: WorkRow) -> str:
        slowest, even = (amount(seconds, SECONDS) for seconds in (row.floor(accelerator), row.even(accelerator)))
        return slowest if slowest == even else f"{slowest} ({even})"

    rows = [(row.what, amount(row.flops, FLOPS), floor(row), str(row.processes)) for row in report.work]
    return _table(("work", "counted", f"floor ({name})", "processes"), rows)


def _memory(report: CostReport) -> Table:
    """Bytes of one process by kind, and its peak."""
    rows = [(f"{row.what} *" if row.passing else row.what, amount(row.bytes, BYTES)) for row in report.memory]
    total = ("peak (only the largest of *: they come one after another)", amount(report.peak, BYTES))
    return _table(("memory per process", "estimated"), rows, total)
