"""Run a command that ends with its owner, even if the owner is killed.

Usage: `python owned.py COMMAND ...` in a session of its own, with a pipe as standard input whose
other end the owner alone has. Once that end is closed, everything in the session's process group is
killed. The kernel could tell one process of its parent's death, but not those that it starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command; returns its exit code, 128 and the number of a signal."""
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=_end_with_owner, daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end_with_owner() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
