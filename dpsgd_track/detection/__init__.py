"""The detection matrix: which known faults the comparison finds, and what it says of them."""
