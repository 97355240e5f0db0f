"""A made-up result of the benchmark, for tests of what is written from it."""

from __future__ import annotations

from typing import Any

ROWS = ("copy first frame", "base", "post-trained", "recording through VAE")
METRICS = [
    {"name": "psnr", "label": "psnr", "unit": "dB", "higher_is_better": True},
    {"name": "lpips", "label": "lpips (untrained)", "unit": "", "higher_is_better": False},
]


def paired(metric: str, verdict: str, change: float) -> dict[str, Any]:
    spread = {"change": change, "change_low": change - 0.1, "change_high": change + 0.1}
    wins = {"win_rate": 0.75, "win_low": 0.41, "win_high": 0.93, "rollouts": 8, "wins": 6, "losses": 2}
    return {
        "cameras": "exterior",
        "metric": metric,
        "verdict": verdict,
        "words": f"{verdict} in words",
        **spread,
        **wins,
    }


def made_up_result() -> dict[str, Any]:
    """Two models over eight rollouts of one camera group; a curve that ends early."""
    curve = {"mean": [20.0, 19.0, 18.0, None], "low": [19.0, 18.0, 17.0, None], "high": [21.0, 20.0, 19.0, None]}
    return {
        "n": {
            "rollouts": 8,
            "episodes": 8,
            "steps": 1,
            "frames_per_step": 4,
            "rate_hz": 5.0,
            "sampler": "euler",
            "sampling_steps": 5,
        },
        "metrics": METRICS,
        "groups": ["exterior"],
        "floor": ROWS[0],
        "ceiling": ROWS[3],
        "models": [
            {"label": label, "ckpt": "a<b>.pt", "adapter": "", "ckpt_sha256": "ab" * 32}
            for label in ("base", "post-trained")
        ],
        "table": [
            {"cameras": "exterior", "model": row, "psnr": 20.0 + i, "lpips (untrained)": 0.01}
            for i, row in enumerate(ROWS)
        ],
        "paired": [
            paired("psnr", "better", 1.5),
            paired("lpips (untrained)", "too few", -0.001),
            paired("reward", "better", 0.1),
            {**paired("reward", "better", 0.1), "cameras": "all"},
        ],
        "changes": {"exterior": {"psnr": [1.0, -0.5, None], "lpips (untrained)": [-0.1, 0.0, 0.1]}},
        "times_s": [0.2, 0.4, 0.6, 0.8],
        "horizon": {"exterior": {metric["label"]: dict.fromkeys(ROWS, curve) for metric in METRICS}},
        "protocol": {"steps": 1, "items": [1, 2]},
        "versions": {"torch": "2"},
        "device": "cpu",
        "command": "persistworld eval --seed 1",
        "date": "2026-11-29 12:00:00",
    }
