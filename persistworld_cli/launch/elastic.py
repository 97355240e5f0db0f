"""``python -m persistworld_cli.launch.elastic ARGS``: ``accelerate launch`` that waits for its ranks.

torch's elastic agent, which accelerate starts, kills ranks 30 seconds after a signal, and reports a failed rank with a
traceback of its own. Here the first signal is passed on, and the ranks take the time they need to end; a second one
goes to the agent, as in torch, and so does SIGUSR2, by which the launcher ends ranks before a restart. If a rank fails,
the agent ends the others, and ``failure.json`` beside the worker's config says which rank failed and how.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from persistworld_cli.compat import STOP_SIGNALS, end_with_parent
from persistworld_cli.config.requests import FAILURE, INTERRUPTED, TRY_AGAIN
from persistworld_cli.console import debug_wanted
from persistworld_cli.files import write_json
from persistworld_cli.read_files import read_json

END_RANKS = signal.SIGUSR2  # at once: the agent ends them, and kills them after 30 s
_AGENT_ONLY = "SIGQUIT"  # the one signal left to the agent's own handler


def main(argv: Sequence[str]) -> int:
    """Run accelerate's launcher in this process; returns the exit code of the rank that failed first, or 0."""
    end_with_parent()
    if not debug_wanted():
        logging.disable(logging.ERROR)  # the agent's log takes five lines for what `failure.json` says in one
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    args.signals_to_handle = _AGENT_ONLY
    _pass_signals_on(SignalException)
    failure = Path(argv[-1]).parent / FAILURE
    try:
        launch_command(args)
    except ChildFailedError as failed:
        return _report(failed, failure)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except DistError as error:
        if debug_wanted():
            raise
        return _write(failure, TRY_AGAIN, 0, f"the machines did not meet: {error}", "elsewhere")
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

    def end(number: int, frame: FrameType | None) -> None:
        raise stop(f"signal {number}", signal.SIGTERM)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    signal.signal(END_RANKS, end)


def _ranks() -> list[int]:
    """Process ids of the ranks: this process's children that run the worker."""
    import psutil

    children = psutil.Process().children()
    return [child.pid for child in children if "persistworld_cli.worker" in child.cmdline()]


def _report(failed: Any, failure: Path) -> int:
    """The exit code of the rank that failed first; reports one that a signal killed, or that lost contact."""
    # Of those that ended between two polls of the agent, a killed one is the cause: the others lost contact with it.
    ended = sorted(failed.failures.items(), key=lambda entry: (entry[1].exitcode >= 0, entry[1].timestamp))
    rank, code = ended[0][0], int(ended[0][1].exitcode)
    known = read_json(failure, "unreadable failure", "run it again with --debug") if failure.exists() else None
    if known is not None and not code != known["code"] == INTERRUPTED:  # by the agent, since this rank had failed
        return int(known["code"])
    if code < 0:
        how = f"rank {rank} was killed by {signal.Signals(-code).name}"
        return _write(failure, 128 - code, rank, how, "yes")
    return _write(failure, TRY_AGAIN, rank, f"rank {rank} lost contact with another rank", "elsewhere")


def _write(failure: Path, code: int, rank: int, what: str, again: str) -> int:
    """Write the failure for the launcher; returns the exit code."""
    write_json(failure, {"code": code, "rank": rank, "what": what, "again": again})
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
