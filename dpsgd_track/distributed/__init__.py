"""Mesh, sharding and reductions over torch.distributed."""
