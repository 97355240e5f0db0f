"""A run's cost as rows of tables and as JSON: parameters, FLOPs with their least time, memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from persistworld_cli.cost.accelerators import Accelerator

GIB = 2**30
NOTES = (
    "Parameters and FLOPs are counted on a model without memory, built from these settings: no weights were read. "
    "FLOPs are those of matrix products, convolutions and attention, 2 per multiply-add.",
    "Memory is estimated: the tensors alive at once, operation by operation, with fused attention and the casts of "
    "CUDA's autocast. Workspaces of kernels, gaps of the allocator and the CUDA context come on top (some GiB).",
    "A floor is FLOPs over the peak of dense bf16, with nothing lost. What runs in float32 (the VAE; without mixed "
    "precision, everything) cannot reach that peak.",
)


@dataclass(frozen=True)
class WorkRow:
    """Some work: its FLOPs, and how many processes share it evenly."""

    key: str
    what: str
    flops: float
    processes: int = 1

    def floor(self, accelerator: Accelerator) -> float:
        """Seconds at the accelerator's peak."""
        return self.flops / (accelerator.tflops * 1e12 * self.processes)


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one process. Of those that are passing, one at a time, only the largest counts for the peak."""

    key: str
    what: str
    bytes: int
    passing: bool = False


@dataclass(frozen=True)
class CostReport:
    """Everything counted and estimated; ``trained`` holds what learns, by part."""

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
        """Whether the peak is below the accelerator's memory; None where that is not known."""
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
