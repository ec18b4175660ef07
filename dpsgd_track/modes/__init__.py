"""Modes, which compute one DP-SGD step each: their table, their protocol, and adapters."""
