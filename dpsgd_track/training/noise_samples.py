"""Takes elements of a mode's noise: the difference between its update direction and its twin's.

The twin has the same data and weights and sigma 0, so that the difference is the noise, wherever in
its step a mode adds it.

Legend: W ranks, P trainable parameters, M elements of a shard.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from dpsgd_track.distributed.ranks import stack_over_ranks
from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.modes.protocol import Mode

Floats = NDArray[np.float64]

NUM_ELEMENTS = 256
"""M. In a larger shard half of them are its first elements; the others are spread over it."""


class UnequalNoiseError(RuntimeError):
    """Ranks that hold the same elements have added different noise to them."""


def positions(num_elements: int, most: int = NUM_ELEMENTS) -> NDArray[np.int64]:
    """Local positions of the sampled elements of a shard, ascending, at most `most`.

    The spread positions divide the shard equally, from its end. If their number divides the number
    of rows they are in one column, which reveals noise that was drawn once for all rows.
    """
    if num_elements <= most:
        return np.arange(num_elements)
    half = most // 2
    spread = num_elements - 1 - np.arange(half) * num_elements // half
    return np.union1d(np.arange(half), spread)


def take(parts: list[LocalPart], scale: float, most: int = NUM_ELEMENTS) -> Floats:
    """[P, M] sampled elements of this rank's shards times `scale`; NaN past a shard's end.

    Args:
        most: M.
    """
    taken = np.full((len(parts), most), np.nan)
    for row, part in zip(taken, parts, strict=True):
        flat = part.local.detach().reshape(-1)
        at = torch.from_numpy(positions(len(flat), most)).to(flat.device)
        row[: len(at)] = flat[at].double().cpu().numpy()
    return taken * scale


def gather(
    mode: Mode, parts: list[LocalPart], noise: Floats, device: torch.device
) -> NDArray[np.float32]:
    """[W, P, M] samples of all ranks that hold distinct shards, on every rank.

    Raises:
        UnequalNoiseError: ranks that hold the same elements differ.
    """
    starts = np.array([part.start for part in parts], dtype=np.int64)
    is_counted = all(part.is_counted for part in parts)
    if mode.replicated:
        is_counted = dist.get_rank() == 0
    packed = np.column_stack([noise, starts, np.full(len(parts), is_counted)])
    pieces = stack_over_ranks(torch.from_numpy(packed).to(device)).cpu().numpy()
    everywhere = pieces[..., : noise.shape[1]]
    check_copies(everywhere, pieces[..., -2], [part.name for part in parts])
    kept: NDArray[np.float32] = everywhere[pieces[:, 0, -1] == 1].astype(np.float32)
    return kept


def check_copies(noise: Floats, starts: Floats, names: list[str]) -> None:
    """Raise if ranks whose shards begin at the same element have unequal noise on it.

    Args:
        noise: [W, P, M].
        starts: [W, P] flat index of the first element of the shard in the whole parameter.
    """
    for rank in range(1, len(noise)):
        for other in range(rank):
            is_copy = (starts[rank] == starts[other]) & ~np.isnan(noise[[rank, other], :, 0]).any(0)
            if not is_copy.any():
                continue
            # Two replicas may round a sum of gradients differently, by 1e-7 of a noise that is
            # not much smaller.
            equal = np.isclose(noise[rank], noise[other], rtol=1e-3, atol=1e-4, equal_nan=True)
            unlike = np.flatnonzero(is_copy & ~equal.all(axis=1))
            if len(unlike):
                raise UnequalNoiseError(
                    f"ranks {other} and {rank} hold the same elements of "
                    f"{names[int(unlike[0])]} and have added different noise to them"
                )
