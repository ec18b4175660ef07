"""Checks of modules and modes in a user's own tests.

from dpsgd_track.testing import assert_exact

def test_my_layer():
    assert_exact(MyLayer(7, 4), torch.randn(3, 5, 7), mode="flash_bk")
"""

from __future__ import annotations

from dpsgd_track.testing.exactness import (
    BY_DEFAULT,
    Checked,
    Outcome,
    Wrong,
    assert_exact,
    check,
)

__all__ = ["BY_DEFAULT", "Checked", "Outcome", "Wrong", "assert_exact", "check"]
