"""What tests share: made-up groups, programs that run in ranks, servers, and defective modes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Of the checkout."""
