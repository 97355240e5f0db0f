"""Workers that died are started again and resume from the last state, on all machines of a run together.

A failure (``failure.json``) has an entry ``again``: ``yes`` if a signal killed the rank or its machine failed, ``no``
after an interruption and after a user's or the program's error, which would come again, and ``elsewhere`` if the rank
only lost contact: another rank is the cause.

Launchers of several machines agree through their lock files. The one whose workers died counts the restart in its own
file; the others notice, end their workers and count it too; the workers start when all have counted. A launcher whose
file has gone has ended the run. Each count is that launcher's own, and all of them end at `launch.restarts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from persistworld_cli.config.requests import ContinuingRequest, TaskRequest
from persistworld_cli.console import note
from persistworld_cli.launch.continuing import find_finished_work, last_logged, saved_states
from persistworld_cli.launch.run_lock import RunFolder

POLL_S = 0.5  # between two looks at the other machines' locks
_SECONDS_TO_END = 60.0  # for these workers, after another machine's launcher has ended
_SECONDS_TO_AGREE = 120.0  # for all launchers; an agent gives its ranks 30 s to end


class Restarts:
    """The restarts of one launcher's workers.

    Attributes:
        done: how many there were.
        ended_elsewhere: whether another machine has ended the run.

    Args:
        folder: the run's.
        request: the task's; only one that continues finished work is restarted.
        most: restarts, at most.
        alone: whether the run has one machine.
        stopped: whether a signal asked this launcher to end.
    """

    def __init__(
        self, folder: RunFolder, request: TaskRequest, most: int, *, alone: bool, stopped: Callable[[], bool]
    ) -> None:
        self.done, self.ended_elsewhere = 0, False
        self._folder, self._request = folder, request
        self._most = most if isinstance(request, ContinuingRequest) else 0
        self._alone, self._stopped = alone, stopped
        self._before = saved_states(folder.output)
        self._others: dict[str, int] = {}  # restarts of the other launchers when these workers started
        self._seen_all = time.monotonic()

    def must_end(self) -> bool:
        """Whether the workers must end: another machine restarts, or has ended the run for a while."""
        now, before = self._folder.other_machines(), self._others
        self._others = {**now, **before}
        if now.keys() >= before.keys():
            self._seen_all = time.monotonic()
        return self._restarted(now) or time.monotonic() - self._seen_all > _SECONDS_TO_END

    def _restarted(self, now: Mapping[str, int]) -> bool:
        """Whether another machine has restarted its workers since these have started."""
        return any(now.get(run, count) != count for run, count in self._others.items())

    def begin(self, failure: Mapping[str, Any]) -> bool:
        """Whether the workers are to be started again after a failure; waits until all machines are ready for it."""
        if failure["again"] == "no":
            return False
        if not self._alone:
            self.must_end()
            if failure["again"] == "elsewhere" and self._others:
                self._wait(self._restarted)  # in vain if the network failed: then every machine counts by itself
        if self._stopped() or self.ended_elsewhere or self.done >= self._most:
            if self.done:
                note(f"no restart: there were {self.done}")
            return False
        self.done += 1
        if not self._alone:
            self._folder.count_restarts(self.done)
            if not self._wait(self._all_have_counted):
                if not self._stopped() and not self.ended_elsewhere:
                    note("no restart: another machine does not answer")
                return False
        note(self._words(failure))
        return True

    def request(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The request of the next start: once this run has saved a state, it resumes from its own newest."""
        states = saved_states(self._folder.output)
        own = "resume" in asked and states and max(states) not in self._before
        return {**asked, "resume": True, "resume_from": None} if own else dict(asked)

    def _all_have_counted(self, now: dict[str, int]) -> bool:
        """Whether the workers may start: they have ended on every machine."""
        if any(now.get(run) == count for run, count in self._others.items()):
            return False
        self._others = now
        return True

    def _wait(self, ready: Callable[[dict[str, int]], bool]) -> bool:
        """Wait until the other machines are ready; False if one has ended the run, or does not answer."""
        end = time.monotonic() + _SECONDS_TO_AGREE
        while not self._stopped() and time.monotonic() < end:
            now = self._folder.other_machines()
            if not now.keys() >= self._others.keys():
                self.ended_elsewhere = True
                return False
            if ready(now):
                return True
            time.sleep(POLL_S)
        return False

    def _words(self, failure: Mapping[str, Any]) -> str:
        """What died, when, and what follows."""
        output, task = self._folder.output, self._request.task
        logged = last_logged(output)
        when = "" if logged is None else f" after update {logged}"
        if (work := find_finished_work(task, output)) is not None:
            follows = f"resuming from {work.words}"
        else:
            follows = "finished episodes are kept" if task == "extract-latents" else "nothing was saved yet"
        return f"restart {self.done} of {self._most}: {failure['what']}{when}; {follows}"
