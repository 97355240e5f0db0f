"""Where a run's time went (``--profile``): a table of stages, the top operations, and a Chrome trace of its beginning.

Stages (`stages.stage`) are timed over the whole run. Operations are recorded for a few seconds after the network first
runs, since no viewer opens a trace of minutes. Each stage waits for the GPU when it starts and when it ends, so that it
is charged with its own work only; this makes the run slightly slower. Only rank 0 is profiled.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persistworld_cli.console import note
from persistworld_cli.files import whole_file, write_json, write_text
from persistworld_cli.stages import observe

FOLDER = "profile"
TRACED_S = 5.0
_TOP = 20  # operations or functions that a table shows
_BEGIN = ("sampling", "network", "encoding", "backward")  # the trace begins with the first of these stages


@dataclass
class Stage:
    """Calls of one stage, its total seconds, and its seconds without nested stages."""

    calls: int = 0
    total_s: float = 0.0
    self_s: float = 0.0


class _Profile:
    """Times the stages of every thread, and records torch's operations on the main thread for the first seconds."""

    def __init__(self, traced_s: float = TRACED_S) -> None:
        self.stages: dict[str, Stage] = {}
        self.trace: Any = None  # torch's profiler, which sees the thread that starts it
        self.traced_s = 0.0  # how long it recorded; 0 until it ends
        self._wanted_s, self._begun = traced_s, 0.0
        self._inside = threading.local()
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        from torch.profiler import record_function

        self._start_or_stop_trace(name)
        _wait_for_gpu()
        stack: list[float] = self._inside.__dict__.setdefault("stack", [])
        stack.append(0.0)
        begun = time.perf_counter()
        try:
            with record_function(name) if self._tracing else nullcontext():
                yield
                _wait_for_gpu()
        finally:
            total = time.perf_counter() - begun
            inner = stack.pop()
            if stack:
                stack[-1] += total
            with self._lock:
                stage = self.stages.setdefault(name, Stage())
                stage.calls += 1
                stage.total_s += total
                stage.self_s += total - inner
            self._start_or_stop_trace(name)

    @property
    def _tracing(self) -> bool:
        return self.trace is not None and not self.traced_s

    def _start_or_stop_trace(self, stage: str) -> None:
        """Start or stop the trace, between stages of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.trace is None and stage in _BEGIN:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs its own start and stop
            from torch.cuda import is_initialized
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_initialized() else [])]
            self.trace = profile(activities=kinds)
            self.trace.__enter__()
            self._begun = time.perf_counter()
        elif time.perf_counter() - self._begun >= self._wanted_s:
            self.stop_trace()

    def stop_trace(self) -> None:
        """Stop the trace if it is running."""
        if self._tracing:
            self.traced_s = max(time.perf_counter() - self._begun, 1e-9)
            self.trace.__exit__(None, None, None)

    def operations(self) -> list[dict[str, Any]]:
        """The recorded operations with the most own time, on the GPU if one was used."""
        rows = [row for row in self.trace.key_averages() if row.key not in self.stages] if self.trace else []
        side = "self_device_time_total" if any(row.self_device_time_total for row in rows) else "self_cpu_time_total"
        rows.sort(key=lambda row: -getattr(row, side))
        return [{"name": row.key, "calls": row.count, "self_s": getattr(row, side) / 1e6} for row in rows[:_TOP]]

    def write(self, folder: Path, total: float) -> None:
        """Write ``table.txt``, ``profile.json`` and ``trace.json.gz`` of a run that took ``total`` seconds."""
        operations, stages = self.operations(), {name: vars(stage) for name, stage in self.stages.items()}
        data = {"seconds": total, "stages": stages, "traced_seconds": self.traced_s, "operations": operations}
        write_json(folder / "profile.json", data)
        files = [folder / "table.txt"]
        write_text(files[0], _table(self.stages, operations, self.traced_s, total))
        if self.trace is not None:
            files.append(folder / "trace.json.gz")
            with whole_file(files[1]) as file:
                self.trace.export_chrome_trace(str(file))  # compressed because the name ends in .gz
        note(f"profile: {', '.join(map(str, files))}")


@contextmanager
def profiling(folder: Path) -> Iterator[None]:
    """Profile the block; the files in ``folder`` are written even if it fails."""
    profile, begun = _Profile(), time.perf_counter()
    try:
        with observe(profile.stage):
            yield
    finally:
        profile.stop_trace()
        profile.write(folder, time.perf_counter() - begun)


@contextmanager
def calls_counted(folder: Path) -> Iterator[None]:
    """Profile Python's functions on this thread, by cProfile, for a command that runs no model."""
    profile = cProfile.Profile()
    try:
        with profile:
            yield
    finally:
        with whole_file(folder / "calls.pstats") as file:
            profile.dump_stats(file)
        with whole_file(folder / "table.txt") as file, file.open("w", encoding="utf-8") as out:
            out.write(
                "Python functions by own time, measured by cProfile (which slows Python down) on this process's main "
                "thread; helper processes and other threads are not included. No network was run.\n"
                "Full list: python -m pstats calls.pstats\n"
            )
            pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(_TOP)
        note(f"profile: {folder / 'table.txt'}")


def _table(stages: Mapping[str, Stage], operations: list[dict[str, Any]], traced: float, total: float) -> str:
    """Stages and operations as text."""
    lines = [f"{'stage':18}{'calls':>8}{'self s':>10}{'share':>8}{'total s':>10}{'ms per call':>13}"]
    for name, stage in sorted(stages.items(), key=lambda item: -item[1].self_s):
        share, each = stage.self_s / total, 1000 * stage.total_s / stage.calls
        lines.append(f"{name:18}{stage.calls:8}{stage.self_s:10.3f}{share:8.1%}{stage.total_s:10.3f}{each:13.2f}")
    rest = total - sum(stage.self_s for stage in stages.values())
    lines.append(f"{'everything else':18}{'':8}{rest:10.3f}{rest / total:8.1%}")
    lines += [f"{'total':18}{'':8}{total:10.3f}", ""]
    lines.append("self: without nested stages; total: with them. Stages are timed over the whole run.")
    if not operations:
        return "\n".join([*lines, "No network ran on the main thread: there is no trace.", ""])
    lines += [f"Operations in the {traced:.1f} s after the network first ran (trace.json.gz):", ""]
    lines.append(f"{'operation':44}{'calls':>8}{'self s':>10}{'share':>8}")
    for row in operations:
        lines.append(f"{row['name'][:43]:44}{row['calls']:8}{row['self_s']:10.3f}{row['self_s'] / traced:8.1%}")
    return "\n".join([*lines, "", "Open the trace in chrome://tracing or ui.perfetto.dev.", ""])


def _wait_for_gpu() -> None:
    from torch import cuda

    if cuda.is_initialized():
        cuda.synchronize()
