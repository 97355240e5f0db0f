"""The world model: UNet, action tokens, VAE, text, diffusion, samplers, adapters, checkpoints."""

from persistworld_cli.compat import ensure_torchvision

ensure_torchvision()  # transformers and peft import torchvision; see compat
