"""Support for the tests: made-up groups, programs that run in ranks, servers, defective modes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root of the checkout."""
