"""Find, check, load and export weights and adapters, on disk and on the hub."""

from persistworld_cli.compat import ensure_torchvision

ensure_torchvision()  # peft imports torchvision; see compat
