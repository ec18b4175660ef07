"""Checks of one run on its own: its noise, and relations between its numbers."""
