"""Warnings of a training run: watchers check the numbers of each update, and `Warnings` reports what they find.

A watcher detects one way in which training learns nothing, or the wrong thing. It warns at the onset, and again each
time the condition has lasted twice as long. Its memory is saved with the run, so a resumed run neither repeats nor
loses a warning. Warnings go to standard error, `warnings.jsonl` and the run's result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from persistworld_cli.training.action_margin import BASE, ERROR, FALL, FALL_ERROR, MARGIN
from persistworld_cli.training.run import Run
from persistworld_cli.training.states import WARNINGS, read_log

logger = logging.getLogger(__name__)
EQUAL = 1e-6  # mean |D_theta - D_old| below which the two policies are equal: rounding alone gives some 1e-7
PATIENCE = 5  # updates
SHARE = 0.5  # of groups: with more than this without spread, most of the computation teaches nothing
MARGIN_LEFT = 0.5  # of the base's margin: below it, post-training has unlearned actions
RISING, FALLING = 0.05, 0.005  # one-sided p of a trend: of the reward; of a referee, of which many windows are seen
CHECKS = 6  # closed-loop checks over which a trend is read
_RENAMED = {"policies at rest": "identical policies"}  # in states of older runs


class Watcher:
    """Detects one kind of trouble.

    Attributes:
        name: its key in warnings.jsonl and in the saved state.
        memory: plain values to resume from.
    """

    name: str
    memory: dict[str, Any]

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """Check the numbers of update ``step`` (from 1); returns a warning if one is due, else ""."""
        raise NotImplementedError

    def streak(self, key: str, present: bool, patience: int, *, repeat: bool = True) -> bool:
        """Count sightings in a row in ``memory[key]``. True: warn; after ``patience`` and at each doubling."""
        self.memory[key] = self.memory[key] + 1 if present else 0
        times, rest = divmod(self.memory[key], patience)
        doubled = times.bit_count() == 1 and not rest
        return doubled and (repeat or times == 1)

    def load_state(self, saved: Any) -> None:
        """Load a saved `memory`; older runs saved a single count as it is."""
        self.memory |= saved if isinstance(saved, dict) else {"streak": saved}


class IdenticalPolicies(Watcher):
    """|D_theta - D_old| near 0: the trained and the sampling policy are equal, so candidates are not contrasted.

    The first update is left out: there the two are equal by construction.
    """

    name = "identical policies"

    def __init__(self) -> None:
        self.memory = {"streak": 0}

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if step < 2 or "theta_old" not in numbers:
            return ""
        if not self.streak("streak", numbers["theta_old"] <= EQUAL, PATIENCE):
            return ""
        return (
            f"for {self.memory['streak']} updates the trained and the sampling policy do not differ "
            f"(|D_theta - D_old| = {numbers['theta_old']:.1e}), so candidates are not contrasted and nothing is "
            "learned. Raise post_train.ema_max (the sampling policy then lags behind) or post_train.lr"
        )


class GroupsWithoutSpread(Watcher):
    """Most groups have candidates of equal reward, which give no advantage to learn from."""

    name = "groups without spread"

    def __init__(self) -> None:
        self.memory = {"shares": [], "streak": 0}  # shares: of the last updates

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if "groups_without_spread" not in numbers:
            return ""
        shares = self.memory["shares"] = [*self.memory["shares"][1 - PATIENCE :], numbers["groups_without_spread"]]
        mean = sum(shares) / len(shares)
        if not self.streak("streak", mean > SHARE, PATIENCE):
            return ""
        return (
            f"for {self.memory['streak']} updates most groups have no spread ({mean:.0%} lately): their candidates get "
            "the same reward, so nothing is learned from them. Raise post_train.explore or post_train.steps (more "
            "sampling steps give more variety), or post_train.candidates"
        )


class IgnoredActions(Watcher):
    """The margin between right and wrong actions is noise, or most of the base's margin is lost (`action_margin`).

    If the margin was above noise before, one check at noise level is enough to warn, else two in a row.
    """

    name = "actions ignored"

    def __init__(self, fix: str) -> None:
        self.fix = fix
        self.memory = {"used": False, "noise": 0, "lost": 0}

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if MARGIN not in numbers:
            return ""
        margin = f"{numbers[MARGIN]:+.2%} of the loss, standard error {numbers[ERROR]:.2%}"
        uses = numbers[MARGIN] > 2 * numbers[ERROR]  # above noise
        used = self.memory["used"] = self.memory["used"] or uses
        if self.streak("noise", not uses, 1 if used else 2):
            since = "no longer uses" if used else "does not use"
            return (
                f"the model {since} its actions: on held-out clips, wrong actions (those of other clips) "
                f"cost {margin}, which is not above noise. {self.fix}"
            )
        lost = (
            BASE in numbers
            and uses
            and numbers[FALL] > 2 * numbers[FALL_ERROR]
            and numbers[MARGIN] < MARGIN_LEFT * numbers[BASE]
        )
        if self.streak("lost", lost, 1):
            return (
                f"the model uses its actions less than the base: wrong ones cost {margin}; the base "
                f"{numbers[BASE]:+.2%}. {self.fix}"
            )
        return ""


class FallingReferee(Watcher):
    """Over a window, the reward rises while a referee outside it gets worse: a sign of reward hacking.

    A trend is the slope of a line through the window, and counts if it is unlikely by chance (Student's t, `RISING`
    and `FALLING`). It warns once, and again only after a window without the two trends.

    Args:
        referee: key of its number, and its name.
        reward: key of the reward that is logged with it.
        window: how many numbers make a window.
        worse: the number -> how bad it is (more is worse).
    """

    def __init__(self, referee: str, reward: str, window: int, worse: Callable[[float], float]) -> None:
        self.name = f"reward up, {referee} worse"
        self.referee, self.reward, self.window, self.worse = referee, reward, window, worse
        self.memory = {"seen": [], "streak": 0}  # seen: [step, reward, referee]

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if self.referee not in numbers or self.reward not in numbers or not math.isfinite(numbers[self.referee]):
            return ""
        seen = [*self.memory["seen"][1 - self.window :], [step, numbers[self.reward], numbers[self.referee]]]
        self.memory["seen"] = seen
        if len(seen) < self.window:
            return ""
        steps, rewards, values = zip(*seen, strict=True)
        up, bad = trend(steps, rewards), trend(steps, [self.worse(value) for value in values])
        both = up.slope > 0 and up.p < RISING and bad.slope > 0 and bad.p < FALLING
        if not self.streak("streak", both, 1, repeat=False):
            return ""
        own = trend(steps, values)
        return (
            f"from update {steps[0]} to {steps[-1]} {self.reward} rose from {up.first:.4g} to {up.last:.4g}, but "
            f"{self.referee} got worse, from {own.first:.4g} to {own.last:.4g}: the reward may rise for the wrong "
            "reason. Look at videos (post_train.video_every), take an earlier state, raise post_train.kl or lower "
            "post_train.lr, or give the referee a weight in rewards.weights where it is a registered reward"
        )


@dataclass(frozen=True)
class Trend:
    """A line through numbers: its slope, the one-sided p of a slope of that sign, its values at both ends."""

    slope: float
    p: float
    first: float
    last: float


def trend(steps: Sequence[float], values: Sequence[float]) -> Trend:
    """The least-squares line through values over steps (at least three of each)."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if np.ptp(y) == 0:
        return Trend(0.0, 1.0, float(y[0]), float(y[0]))
    line = stats.linregress(x, y)
    first, last = (float(line.intercept + line.slope * end) for end in (x[0], x[-1]))
    return Trend(float(line.slope), float(line.pvalue) / 2, first, last)


def log_deviation(ratio: float) -> float:
    """|ln(ratio)| of a ratio to the recording (sharpness, motion): 0 for 1."""
    return abs(math.log(max(ratio, 1e-9)))


class Warnings:
    """All watchers of a run; its main process reports."""

    def __init__(self, watchers: Sequence[Watcher], work: Run) -> None:
        self.watchers, self.work = tuple(watchers), work

    def see(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show every watcher the numbers of update ``step``; report their warnings."""
        for watcher in self.watchers:
            if message := watcher.see(step, numbers):
                self.work.warn(step, watcher.name, message)

    def repeat(self) -> list[dict[str, Any]]:
        """At the end of a run: returns all its warnings, and logs one line per kind."""
        entries = read_log(self.work.output / WARNINGS)
        for name in dict.fromkeys(entry["warning"] for entry in entries):
            steps = [entry["step"] for entry in entries if entry["warning"] == name]
            if self.work.main:
                logger.warning("warnings in this run: %s (update %s)", name, ", ".join(map(str, steps)))
        return entries

    def state(self) -> dict[str, Any]:
        """To resume from."""
        return {watcher.name: dict(watcher.memory) for watcher in self.watchers}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Load what `state` returned; a watcher without saved memory starts anew."""
        known = {_RENAMED.get(name, name): memory for name, memory in saved.items()}
        for watcher in self.watchers:
            if watcher.name in known:
                watcher.load_state(known[watcher.name])
