"""What every training run has around its loop: processes, saved state, logs, interruption.

A run's folder: `config.json` (settings), `metrics.jsonl` (one line a logged update; the truth, of which trackers have
copies), `warnings.jsonl` (one line a warning), `state/step-N/` (to resume), `weights/` (to publish), `tensorboard/`,
`videos/step-N/`, `curves.png`.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
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
from persistworld_cli.files import CannotWrite, sweep, whole_folder, write_text, writing
from persistworld_cli.models.precision import product_type
from persistworld_cli.training.resuming import (
    LOG,
    WARNINGS,
    adopt_state,
    find_state,
    newest_step,
    numbered_log,
    read_log,
)
from persistworld_cli.training.tracking import Trackers, forget_trackers, wanted_trackers
from persistworld_cli.training.whole_states import STATE, set_aside_damaged, states_of

logger = logging.getLogger(__name__)
GO_ON = "free some disk and run the same command again: it resumes from the last whole state"


class Interrupted(Exception):
    """Asked to stop: state was saved, the caller exits with 130."""


class Run:
    """One training run on one rank; a context, at whose end trackers send what is waiting.

    Args:
        output: the run's folder.
        mixed_precision: accelerate's no | bf16 (`product_type`: no, on a CPU without it); its fp16 would need loss
            scaling, for which the loops have no place.
        keep: how many saved states to keep.
        cpu: stay on the CPU.
        resume: go on from what the folder holds; otherwise it is forgotten.
        resume_from: go on from this state instead: a ``step-N`` folder, or a run's folder (its newest); of any run.
        settings: name the trackers, and are noted with them; None: no trackers.
        updates: of the whole run; to say how far a saved state is.

    Raises:
        PersistWorldError: a tracker is not installed, or does not start; there is no state to go on from.
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
        self.notes: dict[str, str] = {}  # for every saved state, as other weights files have them
        self._trackers: Trackers | None = None
        with writing(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # SIGUSR1: SLURM's --signal before the time limit
            signal.signal(name, self._on_signal)
        if resume_from:
            state = find_state(Path(resume_from))  # on every rank, so that all of them end where there is none
            if self.main:
                adopt_state(self.output, state)
            self.accelerator.wait_for_everyone()
        elif not resume:
            self.forget()
        if self.main:
            self._sweep()
            set_aside_damaged(self.output)
        self.accelerator.wait_for_everyone()
        if self.main and names:
            begun = newest_step(self.states())
            sent = max((int(entry["step"]) for entry in self.history()), default=0)
            self._trackers = Trackers(self.accelerator, self.output, settings, begun=begun, sent=sent)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._trackers:
            try:
                self._trackers.close()
            except CannotWrite:
                if error is None:  # what ended the run is told, not what came of it
                    raise

    @classmethod
    def of(
        cls, settings: Settings, options: PretrainSettings | PostTrainSettings | VaeSettings, request: TrainingRequest
    ) -> Run:
        """The run that is requested: its folder, precision, states to keep, device, and whether to resume."""
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
        """True on every rank as soon as any rank was asked to stop."""
        if self.world == 1:
            return self._stop
        flag = torch.tensor([float(self._stop)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def should_stop_here(self) -> bool:
        """True when this rank was asked to stop; for work where ranks do not wait for each other."""
        return self._stop

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Mean of the gradients over the ranks, in one flat message."""
        if self.world == 1:
            return
        with_grad = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in with_grad])
        flat = self.accelerator.reduce(flat, "mean")
        for p, part in zip(with_grad, flat.split([p.numel() for p in with_grad]), strict=True):
            p.grad = part.view_as(p).clone()

    def gather(self, values: list[Any]) -> list[Any]:
        """All ranks' lists one after the other, on every rank."""
        return values if self.world == 1 else gather_object(values)

    # -- state ----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write `state` (tensors and plain values, nested) whole or not at all, on rank 0; old ones go then."""
        if not self.main:
            return None
        folder = self.output / "state" / f"step-{step:08d}"
        with whole_folder(folder, GO_ON) as partial:
            save_torch(partial / STATE, {"step": step, **state}, self.notes, GO_ON)
        for old in self.states()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def forget(self) -> None:
        """Begin anew: drop saved states and logs (`--no-resume`)."""
        if self.main:
            for folder in ("state", "tensorboard", "videos"):
                shutil.rmtree(self.output / folder, ignore_errors=True)
            for name in (LOG, WARNINGS):
                (self.output / name).unlink(missing_ok=True)
            forget_trackers(self.output)
        self.accelerator.wait_for_everyone()

    def _sweep(self) -> None:
        """Remove what a kill cut off while it was written."""
        for folder in ("", "state", "weights"):
            sweep(self.output / folder)

    def states(self) -> list[Path]:
        """Whole saved states, oldest first."""
        return states_of(self.output)

    @property
    def resumed_from(self) -> list[str]:
        """The state that `load` will read, if there is one: the first of what the weights are made of."""
        return [str(state / STATE) for state in self.states()[-1:]]

    def load(self) -> dict[str, Any] | None:
        """The latest saved state; None where there is none yet.

        Lines that were logged after it are dropped: they will be written again.
        """
        if not (states := self.states()):
            self._trim_logs(0)
            return None
        state: dict[str, Any] = torch.load(states[-1] / STATE, map_location="cpu", weights_only=True)
        self._trim_logs(int(state["step"]))
        if self.main:
            logger.info(_resuming(int(state["step"]), self.updates, states[-1] / STATE))
        return state

    # -- logs -----------------------------------------------------------------------------------------------------

    @property
    def _log(self) -> Path:
        return self.output / LOG

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and the same numbers to the trackers (rank 0).

        Raises:
            PersistWorldError: the line cannot be written.
        """
        if not self.main:
            return
        self._append(self._log, {"step": step, **values})
        if self._trackers:
            self._trackers.log(step, values)

    def warn(self, step: int, name: str, words: str) -> None:
        """A warning on standard error, and as one line in warnings.jsonl (rank 0).

        Raises:
            PersistWorldError: the line cannot be written.
        """
        if not self.main:
            return
        logger.warning("warning: update %d: %s", step, words)
        self._append(self.output / WARNINGS, {"step": step, "warning": name, "words": words})

    def warnings(self) -> list[dict[str, Any]]:
        """Every warning of the run so far."""
        return read_log(self.output / WARNINGS)

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        with writing(path, GO_ON), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _trim_logs(self, step: int) -> None:
        """Drop logged lines after `step`."""
        for path in (self._log, self.output / WARNINGS):
            if not self.main or not path.exists():
                continue
            entries = numbered_log(path)
            if bad := [number for number, entry in entries if entry is None]:
                logger.warning("%s: %d damaged lines are left out (line %d first)", path, len(bad), bad[0])
            lines = [json.dumps(entry) + "\n" for _, entry in entries if entry and entry["step"] <= step]
            write_text(path, "".join(lines), GO_ON)

    def history(self) -> list[dict[str, float]]:
        """Everything logged so far, less lines that are damaged."""
        return read_log(self._log)


def _resuming(step: int, updates: int, state: Path) -> str:
    """What becomes of a saved state: it is gone on from, or there is nothing left to do."""
    saved = f"saved at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.stat().st_mtime))}"
    if step < updates:
        return f"resuming from update {step} of {updates}, {saved}"
    more = f" ({updates} were asked for)" if step > updates else ""
    return f"finished; nothing was trained: the run is at update {step}{more}, {saved}"
