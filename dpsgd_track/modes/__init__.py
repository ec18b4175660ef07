"""The ways to compute one DP-SGD step: their table, the protocol they meet, and adapters."""
