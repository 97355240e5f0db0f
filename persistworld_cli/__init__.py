"""Action-conditioned video world models of robots, post-trained and evaluated on their own rollouts (docs/python.md).

Each name is imported when it is first used: `import persistworld_cli` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persistworld_cli.checkpoints.loading import load_model as load_model
    from persistworld_cli.checkpoints.loading import open_dataset as open_dataset
    from persistworld_cli.config.presets import load_settings as load_settings
    from persistworld_cli.config.settings import Settings as Settings
    from persistworld_cli.metrics.registry import Metric as Metric
    from persistworld_cli.metrics.score import Scorer as Scorer
    from persistworld_cli.policies.embedded import make_policy as make_policy
    from persistworld_cli.policies.judge import Evidence as Evidence
    from persistworld_cli.policies.judge import Verdict as Verdict
    from persistworld_cli.rollout.images import to_unit as to_unit
    from persistworld_cli.rollout.interactive import InteractiveRollout as InteractiveRollout
    from persistworld_cli.rollout.recording import Item as Item
    from persistworld_cli.rollout.recording import load_recording as load_recording

__version__ = "0.1.0"
_HOME_OF = {
    "Evidence": "policies.judge",
    "InteractiveRollout": "rollout.interactive",
    "Item": "rollout.recording",
    "Metric": "metrics.registry",
    "Scorer": "metrics.score",
    "Settings": "config.settings",
    "Verdict": "policies.judge",
    "load_model": "checkpoints.loading",
    "load_recording": "rollout.recording",
    "load_settings": "config.presets",
    "make_policy": "policies.embedded",
    "open_dataset": "checkpoints.loading",
    "to_unit": "rollout.images",
}
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
