"""What a training run warns of while it runs: watchers that see each update's numbers, and one place that tells.

A watcher looks for one way in which training learns nothing, or the wrong thing. It speaks at the onset, not at every
update; what goes on is repeated when it has gone on twice as long. What a watcher has seen is saved with the run, so a
resumed run neither repeats nor forgets. Warnings go to standard error, `warnings.jsonl` and the run's result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy import stats

from persistworld_cli.training.action_margin import BASE, ERROR, FALL, FALL_ERROR, MARGIN, uses_actions
from persistworld_cli.training.run import Run

logger = logging.getLogger(__name__)
RESTING = 1e-6  # mean |D_theta - D_old| below which the two policies are one: rounding alone gives some 1e-7
PATIENCE = 5  # updates
SHARE = 0.5  # of groups: with more than this without spread, most of what is computed teaches nothing
MARGIN_LEFT = 0.5  # of the base's margin: below it, post-training has unlearned actions
RISING, FALLING = 0.05, 0.005  # one-sided p of a trend: of the reward; of a referee, of which many windows are seen
CHECKS = 6  # closed-loop checks over which a trend is read


class Watcher(Protocol):
    """Looks for one kind of trouble. `name` is its key in warnings.jsonl and in the saved state."""

    name: str

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """Note the numbers of update ``step`` (from 1); a warning where one is due, else ""."""
        ...

    def state(self) -> Any:
        """To resume from (plain values)."""
        ...

    def load_state(self, saved: Any) -> None:
        """What `state` gave."""
        ...


class Streak:
    """Counts sightings in a row, and says when to speak: after ``patience`` of them, then whenever they doubled."""

    def __init__(self, patience: int, *, repeat: bool = True) -> None:
        self.patience, self.repeat = patience, repeat
        self.length = 0

    def see(self, present: bool) -> bool:
        """Note a sighting, or that there is none. True: speak."""
        self.length = self.length + 1 if present else 0
        times, rest = divmod(self.length, self.patience)
        doubled = times.bit_count() == 1 and not rest
        return doubled and (self.repeat or times == 1)

    def state(self) -> int:
        """To resume from."""
        return self.length

    def load_state(self, saved: int) -> None:
        """What `state` gave."""
        self.length = saved


class RestingPolicies:
    """|D_theta - D_old| at rest: the trained and the sampling policy are one, so candidates are not contrasted.

    The first update is left out: there the two are equal by construction.
    """

    name = "policies at rest"

    def __init__(self) -> None:
        self.streak = Streak(PATIENCE)

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if step < 2 or "theta_old" not in numbers or not self.streak.see(numbers["theta_old"] <= RESTING):
            return ""
        return (
            f"for {self.streak.length} updates the trained and the sampling policy do not differ "
            f"(|D_theta - D_old| = {numbers['theta_old']:.1e}), so candidates are not contrasted and nothing is "
            "learned. Raise post_train.ema_max (the sampling policy then stays behind) or post_train.lr"
        )

    def state(self) -> Any:
        """As `Watcher`."""
        return self.streak.state()

    def load_state(self, saved: Any) -> None:
        """As `Watcher`."""
        self.streak.load_state(saved)


class GroupsWithoutSpread:
    """Most groups have candidates of equal reward, which give no advantage to learn from."""

    name = "groups without spread"

    def __init__(self) -> None:
        self.shares: list[float] = []  # of the last updates
        self.streak = Streak(PATIENCE)

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if "groups_without_spread" not in numbers:
            return ""
        self.shares = [*self.shares[1 - PATIENCE :], numbers["groups_without_spread"]]
        mean = sum(self.shares) / len(self.shares)
        if not self.streak.see(mean > SHARE):
            return ""
        return (
            f"for {self.streak.length} updates most groups have no spread ({mean:.0%} lately): their candidates get "
            "the same reward, so nothing is learned from them. Raise post_train.explore or post_train.steps (more "
            "sampling steps give more variety), or post_train.candidates"
        )

    def state(self) -> Any:
        """As `Watcher`."""
        return {"shares": self.shares, "streak": self.streak.state()}

    def load_state(self, saved: Any) -> None:
        """As `Watcher`."""
        self.shares = list(saved["shares"])
        self.streak.load_state(saved["streak"])


class IgnoredActions:
    """The margin between right and wrong actions is noise, or most of the base's margin is lost (`action_margin`).

    Where the margin was above noise before, one check below is enough; a model that never used its actions gets two.
    """

    name = "actions ignored"

    def __init__(self, fix: str) -> None:
        self.fix = fix
        self.used = False
        self.noise, self.lost = Streak(2), Streak(1)

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if MARGIN not in numbers:
            return ""
        margin = f"{numbers[MARGIN]:+.2%} of the loss, standard error {numbers[ERROR]:.2%}"
        uses = uses_actions(numbers)
        self.used |= uses
        self.noise.patience = 1 if self.used else 2
        if self.noise.see(not uses):
            since = "no longer uses" if self.used else "does not use"
            return (
                f"the model {since} its actions: on held-out clips, the actions of other clips instead of the right "
                f"ones cost {margin}, which is not above noise. {self.fix}"
            )
        lost = BASE in numbers and uses and self._lost(numbers)
        if self.lost.see(lost):
            return (
                f"the model uses its actions less than the base: wrong ones cost {margin}; the base "
                f"{numbers[BASE]:+.2%}. {self.fix}"
            )
        return ""

    @staticmethod
    def _lost(numbers: Mapping[str, float]) -> bool:
        fell = numbers[FALL] > 2 * numbers[FALL_ERROR]
        return fell and numbers[MARGIN] < MARGIN_LEFT * numbers[BASE]

    def state(self) -> Any:
        """As `Watcher`."""
        return {"used": self.used, "noise": self.noise.state(), "lost": self.lost.state()}

    def load_state(self, saved: Any) -> None:
        """As `Watcher`."""
        self.used = saved["used"]
        self.noise.load_state(saved["noise"])
        self.lost.load_state(saved["lost"])


class FallingReferee:
    """Over a window, the reward rises and a referee outside it gets worse: the reward is gained for the wrong reason.

    A trend is the slope of a line through the window, and counts where it is unlikely by chance (Student's t, `RISING`
    and `FALLING`). It speaks once, and again only after a window without the two trends.

    Args:
        referee: key of its number, and its name.
        reward: key of the reward that is logged with it.
        window: how many numbers make a window.
        worse: the number -> how bad it is (more is worse).
    """

    def __init__(self, referee: str, reward: str, window: int, worse: Callable[[float], float]) -> None:
        self.name = f"reward up, {referee} worse"
        self.referee, self.reward, self.window, self.worse = referee, reward, window, worse
        self.seen: list[tuple[int, float, float]] = []  # (step, reward, referee)
        self.streak = Streak(1, repeat=False)

    def see(self, step: int, numbers: Mapping[str, float]) -> str:
        """As `Watcher`."""
        if self.referee not in numbers or self.reward not in numbers or not math.isfinite(numbers[self.referee]):
            return ""
        self.seen = [*self.seen[1 - self.window :], (step, numbers[self.reward], numbers[self.referee])]
        if len(self.seen) < self.window:
            return ""
        steps, rewards, values = zip(*self.seen, strict=True)
        up, bad = trend(steps, rewards), trend(steps, [self.worse(value) for value in values])
        both = up.slope > 0 and up.p < RISING and bad.slope > 0 and bad.p < FALLING
        if not self.streak.see(both):
            return ""
        own = trend(steps, values)
        return (
            f"from update {steps[0]} to {steps[-1]} {self.reward} rose from {up.first:.4g} to {up.last:.4g}, but "
            f"{self.referee} got worse, from {own.first:.4g} to {own.last:.4g}: the reward may be gained for the wrong "
            "reason. Look at videos (post_train.video_every), take an earlier state, raise post_train.kl or lower "
            "post_train.lr, or give the referee a weight in rewards.weights where it is a registered reward"
        )

    def state(self) -> Any:
        """As `Watcher`."""
        return {"seen": [list(entry) for entry in self.seen], "streak": self.streak.state()}

    def load_state(self, saved: Any) -> None:
        """As `Watcher`."""
        self.seen = [(int(step), reward, value) for step, reward, value in saved["seen"]]
        self.streak.load_state(saved["streak"])


class Trend:
    """A line through numbers: its slope, the one-sided p of a slope of that sign, its values at both ends."""

    def __init__(self, slope: float, p: float, first: float, last: float) -> None:
        self.slope, self.p, self.first, self.last = slope, p, first, last


def trend(steps: Sequence[float], values: Sequence[float]) -> Trend:
    """The least-squares line through values over steps (at least three of each)."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if np.ptp(y) == 0:
        return Trend(0.0, 1.0, float(y[0]), float(y[0]))
    line = stats.linregress(x, y)
    first, last = (float(line.intercept + line.slope * end) for end in (x[0], x[-1]))
    return Trend(float(line.slope), float(line.pvalue) / 2, first, last)


def apart_from_record(ratio: float) -> float:
    """How far a ratio to the record (sharpness, motion) is from 1, in either direction."""
    return abs(math.log(max(ratio, 1e-9)))


class Warnings:
    """All watchers of a run.

    Args:
        watchers: what to look for.
        work: the run, whose main process tells.
    """

    def __init__(self, watchers: Sequence[Watcher], work: Run) -> None:
        self.watchers, self.work = tuple(watchers), work

    def see(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show every watcher the numbers of update ``step``; tell what they warn of."""
        for watcher in self.watchers:
            if words := watcher.see(step, numbers):
                self.work.warn(step, watcher.name, words)

    def tell_again(self) -> list[dict[str, Any]]:
        """At the end of a run: every warning of it, in one list; on standard error too, one line a kind."""
        told = self.work.warnings()
        for name in dict.fromkeys(entry["warning"] for entry in told):
            steps = [entry["step"] for entry in told if entry["warning"] == name]
            if self.work.main:
                logger.warning("warned of in this run: %s (update %s)", name, ", ".join(map(str, steps)))
        return told

    def state(self) -> dict[str, Any]:
        """To resume from."""
        return {watcher.name: watcher.state() for watcher in self.watchers}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """What `state` gave; a watcher that was not there then begins anew."""
        for watcher in self.watchers:
            if watcher.name in saved:
                watcher.load_state(saved[watcher.name])
