"""Runs modes as process groups and keeps their run tree. Imports no torch."""

EXIT_FINISHED, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
"""Exit codes of a launch."""
EXIT_INTERNAL = 70
"""Exit code for an internal error, as in sysexits.h."""
