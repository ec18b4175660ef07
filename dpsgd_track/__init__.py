"""Run DP-SGD implementations side by side, track every step, say whether they agree."""

__version__ = "0.1.0"
