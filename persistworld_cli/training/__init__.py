"""Training runs: pretraining, post-training, the VAE; their state, logs and checks."""

from persistworld_cli.compat import ensure_torchvision

ensure_torchvision()  # peft imports torchvision; see compat
