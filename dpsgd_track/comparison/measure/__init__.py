"""Distance between two runs, and the part of it that rounding explains."""
