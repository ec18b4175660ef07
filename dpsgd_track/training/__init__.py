"""The worker under torchrun: model and data building, the step loop, measurement."""
