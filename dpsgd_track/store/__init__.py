"""The run tree: spooled, shipped to MLflow, and read by the comparison. Imports no torch."""
