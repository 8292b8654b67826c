"""The command as it is started: `soco-export`, or `python -m soco_export` as torchrun and accelerate launch have it."""

from __future__ import annotations

import sys

from soco_export.signals import code, leave_at_once, raising


def main() -> None:
    """Run the command line; a signal that comes before it has begun ends it without a traceback."""
    leave_at_once()
    from soco_export.cli import main as command_line

    try:
        with raising():
            command_line()
    except KeyboardInterrupt:  # before the command had begun, or after it had ended
        sys.exit(code())


if __name__ == "__main__":
    main()
