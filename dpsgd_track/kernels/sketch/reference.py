"""The sketch in plain torch: one matrix product over blocks of elements, and the norm with it."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_PROJECTIONS = 16
BLOCK_ELEMENTS = 4096
# A chunk in float64 fits into a core's cache; on a GPU larger chunks save launches.
CHUNK_BLOCKS = {"cpu": 64, "cuda": 1024}


def norm_and_sketch(name: str, local: Tensor, start: int, num_elements: int) -> Tensor:
    """This rank's terms of a parameter-shaped tensor's squared norm and projections.

    Args:
        name: the parameter, which determines the signs.
        local: this rank's elements, any shape and floating type.
        start: flat index of the first of them in the whole tensor.
        num_elements: elements of the whole tensor.
    Returns:
        [1 + NUM_PROJECTIONS] float64; the sum over ranks is the whole tensor's.
    """
    if local.numel() == 0:
        return torch.zeros(1 + NUM_PROJECTIONS, dtype=torch.float64, device=local.device)
    first_block = start // BLOCK_ELEMENTS
    before = start - first_block * BLOCK_ELEMENTS
    after = -(before + local.numel()) % BLOCK_ELEMENTS
    blocks = F.pad(local.detach().reshape(-1), (before, after)).view(-1, BLOCK_ELEMENTS)
    num_blocks = -(-num_elements // BLOCK_ELEMENTS)
    outer = _block_signs(name, num_blocks)[first_block:][: len(blocks)].to(local.device)
    total = torch.zeros(1 + NUM_PROJECTIONS, dtype=torch.float64, device=local.device)
    size = CHUNK_BLOCKS[local.device.type]
    for chunk, chunk_outer in zip(blocks.split(size), outer.split(size), strict=True):
        # In float64, so that tensors that differ in float32's last bit have sketches as close.
        exact = chunk.double()
        flat = exact.view(-1)
        total[0] += torch.dot(flat, flat)
        total[1:] += (_position_signs(local.device) @ exact.T * chunk_outer.T).sum(dim=1)
    return total


@cache
def signs_of(name: str, num_elements: int) -> Tensor:
    """[NUM_PROJECTIONS, num_elements] float64 signs of a small parameter's elements, on the CPU."""
    num_blocks = -(-num_elements // BLOCK_ELEMENTS)
    of_positions = _position_signs(torch.device("cpu"))
    signs = _block_signs(name, num_blocks).mT[:, :, None] * of_positions[:, None, :]
    return signs.flatten(1)[:, :num_elements]


def _signs(key: str, *shape: int) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)


@cache
def _position_signs(device: torch.device) -> Tensor:
    """Transpose of R, [NUM_PROJECTIONS, BLOCK_ELEMENTS]."""
    return _signs("positions", NUM_PROJECTIONS, BLOCK_ELEMENTS).to(device, torch.float64)


@cache
def _block_signs(name: str, num_blocks: int) -> Tensor:
    """q of every block, [num_blocks, NUM_PROJECTIONS]."""
    return _signs(f"blocks/{name}", num_blocks, NUM_PROJECTIONS)
