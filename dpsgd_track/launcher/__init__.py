"""Runs modes as process groups and keeps their run tree. Imports no torch."""
