"""Diagnosis: the stage that went wrong first, where it did, and a likely cause."""
