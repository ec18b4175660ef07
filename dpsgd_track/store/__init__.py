"""The run tree in MLflow: written by workers, read by the comparison. Imports no torch."""
