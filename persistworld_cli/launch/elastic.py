"""``python -m persistworld_cli.launch.elastic ARGS``: ``accelerate launch ARGS``, signals and failures told plainly.

torch's elastic agent, which accelerate starts, gives ranks 30 seconds after a signal and then kills them, and reports a
failed rank by a traceback of its own. Here the first signal is passed on and the ranks end in their own time; a second
one goes to the agent as usual. A rank that fails ends the others (the agent does that within seconds), and what is
printed is which rank it was and how it ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from persistworld_cli.compat import end_with_parent
from persistworld_cli.console import debug_wanted, show_error
from persistworld_cli.errors import PersistWorldError

_AGENT_ONLY = "SIGQUIT"  # the one signal left to the agent's own handler


def main(argv: Sequence[str] | None = None) -> int:
    """Run accelerate's launcher in this process; returns the exit code of the rank that failed first, or 0."""
    end_with_parent()
    if not debug_wanted():
        logging.disable(logging.ERROR)  # the agent's log says in five lines what is said in one below
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    args.signals_to_handle = _AGENT_ONLY
    _pass_signals_on(SignalException)
    try:
        launch_command(args)
    except ChildFailedError as failed:
        return _report(failed)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def _pass_signals_on(stop: type[Exception]) -> None:
    """First signal: to the ranks. Second: raised here, on which the agent ends the ranks and kills them after 30 s."""
    seen: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise stop(f"signal {number}", signal.Signals(number))
        for pid in _ranks():
            os.kill(pid, number)

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(name, forward)


def _ranks() -> list[int]:
    """Process ids of the ranks: this process's children that run the worker."""
    import psutil

    children = psutil.Process().children()
    return [child.pid for child in children if "persistworld_cli.worker" in child.cmdline()]


def _report(failed: Any) -> int:
    """The exit code of the rank that failed first (128 + signal), and if it was killed, who and how: others said so."""
    # Of those that ended between two looks of the agent, a killed one is the cause: the others lost contact with it.
    ended = sorted(failed.failures.items(), key=lambda entry: (entry[1].exitcode >= 0, entry[1].timestamp))
    rank, failure = ended[0]
    code = int(failure.exitcode)
    if code < 0:
        name = signal.Signals(-code).name
        memory = "if nobody killed it, memory ran out: take a smaller batch" if -code == signal.SIGKILL else None
        show_error(PersistWorldError(f"rank {rank} was killed by {name}; the other ranks were ended", fix=memory))
        return 128 - code
    return code


if __name__ == "__main__":
    sys.exit(main())
