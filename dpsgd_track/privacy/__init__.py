"""Norm rules per layer type, pass strategies, clipping and noise."""
