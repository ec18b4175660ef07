"""The record of a run: written by training, read by the comparison."""
