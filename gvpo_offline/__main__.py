"""`python -m gvpo_offline`, and the program `gvpo-offline`: the command line, from its first import
to its exit without a traceback after Ctrl-C.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line.

    Returns:
        The exit status; see `cli.main`.
    """
    try:
        from gvpo_offline.cli import main as run

        status = run()
    except KeyboardInterrupt:  # while the modules were imported
        print("gvpo-offline: interrupted before it began", file=sys.stderr)
        status = 130
    if status == 130:
        # Python's own clean-up would answer another Ctrl-C with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


if __name__ == "__main__":
    sys.exit(main())
