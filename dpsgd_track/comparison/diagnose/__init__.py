"""Which stage went wrong first, where, and a likely cause."""
