"""Mutants: known defects of DP-SGD code, each as a small patch of a correct mode.

Users call them faults. A mode with one planted in it is called `mode+fault`, and runs wherever a
mode does: `dpsgd-track quick --mode no_dp,flash_fsdp+mean_clip_factor`.
"""
