"""``python -m persistworld_cli.launch.elastic ARGS``: ``accelerate launch`` that waits for its ranks.

torch's elastic agent, which accelerate starts, kills ranks 30 seconds after a signal, and reports a failed rank with a
traceback of its own. Here the first signal is passed on, and the ranks take the time they need to end; a second one
goes to the agent, as in torch. If a rank fails, the agent ends the others, and one line reports which rank failed and
how.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from persistworld_cli.compat import STOP_SIGNALS, end_with_parent
from persistworld_cli.console import debug_wanted, show_error
from persistworld_cli.errors import PersistWorldError

_AGENT_ONLY = "SIGQUIT"  # the one signal left to the agent's own handler


def main(argv: Sequence[str] | None = None) -> int:
    """Run accelerate's launcher in this process; returns the exit code of the rank that failed first, or 0."""
    end_with_parent()
    if not debug_wanted():
        logging.disable(logging.ERROR)  # the agent's log takes five lines for what `_report` says in one
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

    for number in STOP_SIGNALS:
        signal.signal(number, forward)


def _ranks() -> list[int]:
    """Process ids of the ranks: this process's children that run the worker."""
    import psutil

    children = psutil.Process().children()
    return [child.pid for child in children if "persistworld_cli.worker" in child.cmdline()]


def _report(failed: Any) -> int:
    """The exit code of the rank that failed first (128 + signal); reports one that a signal killed."""
    # Of those that ended between two polls of the agent, a killed one is the cause: the others lost contact with it.
    ended = sorted(failed.failures.items(), key=lambda entry: (entry[1].exitcode >= 0, entry[1].timestamp))
    rank, failure = ended[0]
    code = int(failure.exitcode)
    if code < 0:
        show_error(killed(f"rank {rank}", -code, more="; the other ranks were ended"))
        return 128 - code
    return code


def killed(
    who: str, number: int, more: str = "", where: str | None = None, otherwise: str | None = None
) -> PersistWorldError:
    """The error for a process that a signal ended."""
    memory = "if nobody killed it, memory ran out: use a smaller batch"
    fix = memory if number == signal.SIGKILL else otherwise
    return PersistWorldError(f"{who} was killed by {signal.Signals(number).name}{more}", where=where, fix=fix)


if __name__ == "__main__":
    sys.exit(main())
