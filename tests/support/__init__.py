"""Support for the tests: made-up groups, programs that run in ranks, servers, defective modes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout."""

ADAPTERS = ROOT / "examples" / "adapters"
# Users put the first on their PYTHONPATH, and run programs in the second.
sys.path += [str(ADAPTERS), str(ROOT / "examples")]
