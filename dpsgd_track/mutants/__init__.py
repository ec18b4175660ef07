"""Mutants: known defects of DP-SGD code, each as a small patch of a correct mode.

Users call them faults. A mode with a fault planted in it is named `mode+fault` and can be used
wherever a mode can: `dpsgd-track quick --mode no_dp,flash_fsdp+mean_clip_factor`.
"""
