"""The process of a stage: `python -m dae.pipeline.stage_command LIFELINE COMMAND...`.

LIFELINE is a pipe without data; when it closes, the pipeline's process is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence


def end_with(lifeline: int) -> None:
    """Kill this process as soon as the other end of the pipe is closed."""

    def wait() -> None:
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Run the command as if it had been typed."""
    lifeline, *command = arguments
    end_with(int(lifeline))
    try:
        from dae import cli

        sys.argv = ["dae", *command]
        cli.main()
    except KeyboardInterrupt:  # before the command line handles it
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
