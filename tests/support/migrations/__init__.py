"""Trainings before and after they were moved to this package, for counts of changed lines.

Those for Opacus are its examples in our own words, without their data, options and printing.
"""
