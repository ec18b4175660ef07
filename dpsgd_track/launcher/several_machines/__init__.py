"""One group on several machines: node 0 leads, the others follow."""
