"""How far two runs are apart, and what rounding explains of it."""
