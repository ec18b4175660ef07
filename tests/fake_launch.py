"""launch.py with the fake worker, and with inputs taken as they are."""

import sys

from dpsgd_track.detection.command import detect
from dpsgd_track.launcher.process_group import Launch
from dpsgd_track.launcher.run import main


def run(argv: list[str] | None = None) -> int:
    return main(
        argv,
        check_inputs=lambda model, data: None,
        launch=Launch(worker_module="tests.fake_worker", grace_s=1.5, lost_after_s=3.0),
        detect=detect,
    )


if __name__ == "__main__":
    sys.exit(run())
