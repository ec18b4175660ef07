"""One package per kernel: the formula in its `__init__`, a readable reference beside it."""
