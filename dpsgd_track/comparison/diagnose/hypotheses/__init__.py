"""Hypotheses: what each stage's number would be if a known mistake had been made.

A hypothesis is a sentence and a prediction. It is an explanation if its prediction agrees with the
mode's record within rounding, in every step where the stage can be compared. Simple ones are tried
first; of equally simple ones all that agree are explanations.
"""
