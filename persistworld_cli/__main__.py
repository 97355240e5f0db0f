"""``python -m persistworld_cli`` is the ``persistworld`` command."""

from persistworld_cli.commands.app import main

if __name__ == "__main__":
    main()
