"""The record of a run: what the half that trains writes and the half that compares reads."""
