"""`python -m dpsgd_track` is the installed command."""

import sys

from dpsgd_track.cli.main import main
from dpsgd_track.program import MODULE

if __name__ == "__main__":
    sys.exit(main(program=MODULE))
