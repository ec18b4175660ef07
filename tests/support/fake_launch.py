"""launch.py with the fake worker, and with inputs taken as they are."""

import os
import sys

from dpsgd_track.cli.main import main
from dpsgd_track.launcher.process_group import Launch
from dpsgd_track.launcher.stalls import STALL_S
from dpsgd_track.program import CHECKOUT
from tests.support import warm

STALL_VARIABLE = "FAKE_STALL_S"
"""Environment variable: seconds without progress before stacks are told."""


def run(argv: list[str]) -> int:
    """Launch from this process, with the fork server's imports done."""
    with warm.imports_done():
        return _launch(argv)


def _launch(argv: list[str] | None = None) -> int:
    return main(
        argv,
        program=CHECKOUT,
        check_inputs=lambda model, data: None,
        launch=Launch(
            worker_module="tests.support.fake_worker",
            grace_s=1.5,
            lost_after_s=3.0,
            stall_s=float(os.environ.get(STALL_VARIABLE, STALL_S)),
        ),
    )


if __name__ == "__main__":
    sys.exit(_launch())
