"""When the rows of an episode were recorded. Time is what their timestamps say; rows are not counted.

Legend: T rows of an episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HOLE = 1.5  # frames: rows that are further apart have others missing between them
_TIE = 0.01  # frames: of two rows as near as this to each other's distance the later one counts as nearer


@dataclass(frozen=True)
class Clock:
    """Times of an episode's rows.

    Attributes:
        times: (T,) seconds since the first row, increasing.
        spacing: seconds from a row to the next (median).
        fps: rows per second: that of info.json unless it is off by over half a frame in the episode.
        source: what gives the times, for messages.
    """

    times: NDArray[np.float64]
    spacing: float
    fps: float
    source: str

    @classmethod
    def of(cls, stamps: NDArray[Any], fps: float, source: str = "timestamp") -> Clock:
        """From timestamps in seconds, (T,) or (T, 1), and info.json's ``fps``.

        Raises:
            ValueError: not finite, not increasing, or with a hole of over 1.5 frames; the message has the values.
        """
        if stamps.size != len(stamps):
            raise ValueError(f"they have the shape {stamps.shape}")
        stamps = stamps.reshape(-1)
        times = stamps.astype(np.float64) - float(stamps[0])
        if not np.isfinite(times).all():
            raise ValueError(f"the timestamp of row {int(np.argmin(np.isfinite(times)))} is not a finite number")
        if len(times) == 1:
            return cls(times, 1 / fps, fps, source)
        gaps = np.diff(times)
        spacing = float(np.median(gaps))
        bad = (gaps <= 0) | (gaps > _HOLE * spacing)
        if bad.any():
            row = int(np.argmax(bad))
            apart = f", {gaps[row] / spacing:.1f} frames apart" if spacing > 0 else ""
            raise ValueError(f"rows {row} and {row + 1} are at {stamps[row]:.3f} and {stamps[row + 1]:.3f} s{apart}")
        counted = (len(times) - 1) / fps
        right = abs(times[-1] - counted) <= 0.5 / fps
        return cls(times, spacing, fps if right else round((len(times) - 1) / float(times[-1]), 3), source)

    @property
    def duration(self) -> float:
        """Seconds from the first row to the end of the last one."""
        return float(self.times[-1]) + self.spacing

    def rows(self, rate_hz: float) -> NDArray[np.int64]:
        """For k = 0, 1, ...: the row nearest in time to ``k / rate_hz``, up to half a frame after the last row."""
        middles = np.append((self.times[1:] + self.times[:-1]) / 2, self.times[-1] + self.spacing / 2)
        wanted = np.arange(int(self.duration * rate_hz) + 2) / rate_hz + _TIE * self.spacing
        rows = np.searchsorted(middles, wanted, side="right")
        return rows[rows < len(self.times)].astype(np.int64)
