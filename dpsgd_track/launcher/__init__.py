"""Runs modes as process groups and keeps their run tree. Imports no torch."""

EXIT_FINISHED, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
"""What a launch exits with."""
EXIT_INTERNAL = 70
"""What the program exits with where it fails itself, as sysexits.h has it."""
