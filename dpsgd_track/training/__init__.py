"""The training worker: model and data building, the step loop, measurement."""
