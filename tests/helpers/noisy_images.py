"""Images and noisy copies of them, for tests of metrics and credit."""

from __future__ import annotations

import torch

from persistworld_cli.config.settings import RewardSettings

NO_LPIPS = RewardSettings(weights={"ssim": 1.0, "psnr": 1.0 / 32})


def images(
    count: int, height: int = 48, width: int = 80, seed: int = 0, noise: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth random images and noisy copies, with flat patches (where SSIM's variances vanish)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    target = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    target[:, :, : height // 3] = 0.7
    pred = (target + noise * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    pred[:, :, : height // 6] = 0.7
    return pred, target
