"""Group sizes of a small model's normalisation.

diffusers' blocks fix 32 groups: 10 channels a group at SVD's 320. At 32 channels each group is one channel, and every
norm then takes an image's mean and contrast out of each channel: a small model with 32 groups cannot keep colours or
copy a still background, however long it trains (measured: presets/tiny/README.md). Fewer groups at small widths keep
the full-size model's proportion; weights and their names stay.
"""

from __future__ import annotations

from torch import nn


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Let every GroupNorm of `module` work in `groups` groups, which must divide its channels."""
    for name, child in module.named_modules():
        if isinstance(child, nn.GroupNorm):
            if child.num_channels % groups:
                raise ValueError(f"{name}: {child.num_channels} channels in {groups} groups")
            child.num_groups = groups
