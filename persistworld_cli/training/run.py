"""The training loop and what surrounds it: processes, saved state, logs, interruption.

A run's folder: `config.json` (settings), `metrics.jsonl` (one line per logged update; trackers hold copies),
`warnings.jsonl` (one line per warning), `state/step-N/` (to resume), `weights/` (to publish), `tensorboard/`,
`videos/step-N/`, `curves.png`.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, gather_object

from persistworld_cli.checkpoints.saving import save_torch
from persistworld_cli.config.requests import TrainingRequest
from persistworld_cli.config.settings import PostTrainSettings, PretrainSettings, Settings, VaeSettings
from persistworld_cli.errors import PersistWorldError
from persistworld_cli.files import CannotWrite, sweep, whole_folder, write_text, writing
from persistworld_cli.models.precision import allow_tf32, product_type
from persistworld_cli.reports.progress import Meter
from persistworld_cli.training.fsdp import whole_state
from persistworld_cli.training.states import (
    LOG,
    STATE,
    WARNINGS,
    adopt_state,
    find_state,
    numbered_log,
    read_log,
    set_aside_damaged,
    states_of,
    step_of,
)
from persistworld_cli.training.tracking import Trackers, forget_trackers, wanted_trackers

logger = logging.getLogger(__name__)
FREE_DISK = "free some disk and run the same command again: it resumes from the last whole state"


class Interrupted(Exception):
    """Stopped on request: state was saved, the caller exits with 130."""


class Trainer(ABC):
    """One kind of training: its update, checks and state.

    Attributes:
        shown: names of the logged numbers that the progress bar shows.
        ended: true once a check ends the run before its last update.
    """

    shown: tuple[str, ...] = ("loss",)
    ended = False

    @abstractmethod
    def update(self, step: int) -> dict[str, float]:
        """Update number ``step``, from 0; numbers to log."""

    def checks(self, done: int, numbers: dict[str, float]) -> dict[str, float]:
        """Validation, videos and warnings that are due after ``done`` updates; further numbers to log."""
        return {}

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """State to resume from: tensors and plain values, nested."""

    @abstractmethod
    def load_state(self, saved: dict[str, Any]) -> None:
        """Load what `state` returned."""


class Run:
    """One training run on one rank. A context manager: at its end, trackers send pending data.

    Args:
        output: the run's folder.
        mixed_precision: accelerate's no | bf16 (no, on a CPU without it); fp16 would need loss scaling.
        keep: how many saved states to keep.
        cpu: stay on the CPU.
        resume: resume from the saved state in the folder; False deletes it.
        resume_from: resume from this state instead: a ``step-N`` folder, or a run's folder (its newest); of any run.
        settings: name the trackers and are recorded there; None: no trackers.
        updates: of the whole run.

    Raises:
        PersistWorldError: a tracker is not installed, or does not start; there is no state to resume from.
    """

    def __init__(
        self,
        output: Path,
        *,
        mixed_precision: str = "no",
        keep: int = 2,
        cpu: bool = False,
        resume: bool = True,
        resume_from: str | Path | None = None,
        settings: Settings | None = None,
        updates: int = 0,
    ) -> None:
        self.output, self.keep, self.updates = Path(output), keep, updates
        names = wanted_trackers(settings.launch.trackers) if settings else ()
        project = ProjectConfiguration(logging_dir=str(self.output / "tensorboard"))
        if mixed_precision == "bf16" and product_type(PartialState(cpu).device, torch.bfloat16) is torch.float32:
            mixed_precision = "no"
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision, cpu=cpu, log_with=list(names) or None, project_config=project
        )
        self.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self._stop = False
        self.notes: dict[str, str] = {}  # metadata of every saved state, as in other weights files
        self._trackers: Trackers | None = None
        with writing(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # SIGUSR1: SLURM's --signal before the time limit
            signal.signal(name, self._on_signal)
        if resume_from:
            state = find_state(Path(resume_from))  # on every rank, so that all of them fail if there is none
            if self.main:
                adopt_state(self.output, state)
            self.accelerator.wait_for_everyone()
        elif not resume:
            self.forget()
        if self.main:
            for folder in ("", "state", "weights"):
                sweep(self.output / folder)  # half-written files of a killed run
            set_aside_damaged(self.output)
        self.accelerator.wait_for_everyone()
        self._newest = self._agreed_state()
        if self.main and names:
            begun = step_of(self._newest) if self._newest else 0
            sent = max((int(entry["step"]) for entry in self.history()), default=0)
            self._trackers = Trackers(self.accelerator, self.output, settings, begun=begun, sent=sent)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._trackers:
            try:
                self._trackers.close()
            except CannotWrite:
                if error is None:  # the error that ended the run is reported, not its consequence
                    raise

    @classmethod
    def of(
        cls, settings: Settings, options: PretrainSettings | PostTrainSettings | VaeSettings, request: TrainingRequest
    ) -> Run:
        """The run that is requested: its folder, precision, states to keep, device, and whether to resume."""
        allow_tf32(settings.launch.tf32)
        return cls(
            request.output,
            mixed_precision=options.mixed_precision,
            keep=options.keep,
            cpu=settings.launch.device == "cpu",
            resume=request.resume,
            resume_from=request.resume_from,
            settings=settings,
            updates=options.updates,
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    # -- several processes ----------------------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """True on every rank as soon as any rank received a signal to stop."""
        if self.world == 1:
            return self._stop
        flag = torch.tensor([float(self._stop)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def should_stop_here(self) -> bool:
        """True when this rank received a signal to stop; for work where ranks do not wait for each other."""
        return self._stop

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Mean of the gradients over the ranks, in one flat message; a parameter without one on any rank keeps none."""
        if self.world == 1:
            return
        with_grad = [p for p in parameters if p.requires_grad]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in with_grad]
        used = torch.tensor([float(p.grad is not None) for p in with_grad], device=self.device)
        flat = self.accelerator.reduce(torch.cat([used, *(grad.flatten() for grad in grads)]), "mean")
        used, *parts = flat.split([len(grads), *(grad.numel() for grad in grads)])
        for p, part, share in zip(with_grad, parts, used.tolist(), strict=True):
            p.grad = part.view_as(p).clone() if share else None

    def gather(self, values: list[Any]) -> list[Any]:
        """All ranks' lists, concatenated, on every rank."""
        return values if self.world == 1 else gather_object(values)

    # -- state ----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write `state` (tensors, which may be sharded, and plain values, nested) atomically, on rank 0, for any number
        of ranks; then delete old ones. Every rank calls this.
        """
        state = whole_state(state, keep=self.main)
        if self.main:
            with whole_folder(self.output / "state" / f"step-{step:08d}", FREE_DISK) as partial:
                save_torch(partial / STATE, {"step": step, **state}, self.notes, FREE_DISK)
            for old in states_of(self.output)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def forget(self) -> None:
        """Start anew: delete saved states and logs (`--no-resume`)."""
        if self.main:
            for folder in ("state", "tensorboard", "videos"):
                shutil.rmtree(self.output / folder, ignore_errors=True)
            for name in (LOG, WARNINGS):
                (self.output / name).unlink(missing_ok=True)
            forget_trackers(self.output)
        self.accelerator.wait_for_everyone()

    def _agreed_state(self) -> Path | None:
        """The newest state that rank 0 finds: another machine may see an older list of a shared disk's files."""
        names = self.gather([state.name for state in states_of(self.output)[-1:]] or [""])
        if not names[0]:
            return None
        newest = self.output / "state" / names[0]
        if not (newest / STATE).is_file():
            raise PersistWorldError(
                f"rank {self.rank} does not find the state that rank 0 resumes from",
                where=str(newest),
                fix="take an --output on a disk that all machines share",
            )
        return newest

    @property
    def resumed_from(self) -> list[str]:
        """Path of the state that `load` will read, in a list; empty if there is none."""
        return [str(self._newest / STATE)] if self._newest else []

    def load(self) -> dict[str, Any] | None:
        """The state that the run resumes from, or None. Lines logged after it are dropped and will be written again."""
        if not self._newest:
            self._trim_logs(0)
            return None
        state: dict[str, Any] = torch.load(self._newest / STATE, map_location="cpu", weights_only=True, mmap=True)
        self._trim_logs(int(state["step"]))
        if self.main:
            logger.info(_resuming(int(state["step"]), self.updates, self._newest / STATE))
        return state

    # -- the loop -------------------------------------------------------------------------------------------------

    def resume(self, trainer: Trainer) -> int:
        """Load the latest state, if any; the number of updates done."""
        if (saved := self.load()) is None:
            return 0
        trainer.load_state(saved)
        return int(saved["step"])

    def train(self, trainer: Trainer, begun: int, title: str, save_every: int) -> None:
        """Updates ``begun`` to `updates`, each with its checks and log line; state is saved every ``save_every``.

        Raises:
            Interrupted: on a signal, after the state was saved.
        """
        latest: dict[str, float] = {}
        with Meter(title, self.updates, done=begun, quiet=not self.main) as meter:
            for step in range(begun, self.updates):
                done = step + 1
                numbers = trainer.update(step)
                numbers |= trainer.checks(done, numbers)
                if numbers:
                    self.log(done, numbers)
                latest |= numbers
                meter.advance(1, **{name: latest[name] for name in trainer.shown if name in latest})
                stop = self.should_stop()
                if stop or trainer.ended or done % save_every == 0 or done == self.updates:
                    self.save(done, trainer.state())
                if stop:
                    raise Interrupted
                if trainer.ended:
                    break

    # -- logs -----------------------------------------------------------------------------------------------------

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and the same numbers to the trackers (rank 0). Raises CannotWrite."""
        if self.main:
            self._append(LOG, {"step": step, **values})
        if self._trackers:
            self._trackers.log(step, values)

    def warn(self, step: int, name: str, message: str) -> None:
        """A warning on standard error, and as one line in warnings.jsonl (rank 0). Raises CannotWrite."""
        if self.main:
            logger.warning("warning: update %d: %s", step, message)
            self._append(WARNINGS, {"step": step, "warning": name, "message": message})

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        path = self.output / name
        with writing(path, FREE_DISK), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _trim_logs(self, step: int) -> None:
        """Drop logged lines after `step`."""
        for path in (self.output / LOG, self.output / WARNINGS):
            if not self.main or not path.exists():
                continue
            entries = numbered_log(path)
            if bad := [number for number, entry in entries if entry is None]:
                logger.warning("%s: %d damaged lines are dropped (the first is line %d)", path, len(bad), bad[0])
            lines = [json.dumps(entry) + "\n" for _, entry in entries if entry and entry["step"] <= step]
            write_text(path, "".join(lines), FREE_DISK)

    def history(self) -> list[dict[str, float]]:
        """Everything logged so far, without damaged lines."""
        return read_log(self.output / LOG)


def _resuming(step: int, updates: int, state: Path) -> str:
    """Message: a run resumes from a saved state, or nothing is left to do."""
    saved = f"saved at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.stat().st_mtime))}"
    if step < updates:
        return f"resuming from update {step} of {updates}, {saved}"
    more = f" ({updates} requested)" if step > updates else ""
    return f"finished; nothing was trained: the run is at update {step}{more}, {saved}"
