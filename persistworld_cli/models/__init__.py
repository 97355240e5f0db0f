"""The world model: UNet, action tokens, VAE, text encoder, diffusion, samplers."""

from persistworld_cli.compat import ensure_torchvision

ensure_torchvision()  # transformers and peft import torchvision; see compat
