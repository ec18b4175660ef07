"""Checks of one run by itself: its noise, and relations between its own numbers."""
