"""Weights on disk and on the hub: found, checked, loaded, exported; adapters on top of them."""

from persistworld_cli.compat import ensure_torchvision

ensure_torchvision()  # peft imports torchvision; see compat
