"""Measures a step: norms, sketches and digests, from local shards and one packed all-reduce.

Legend: L linear layers, P trainable parameters, K projections, B samples of this rank, N samples
of all ranks.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpsgd_track.distributed.ranks import stack_over_ranks
from dpsgd_track.distributed.sharding import LocalPart, row_range
from dpsgd_track.kernels.sketch import norm_and_sketch
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.privacy.clipping import SampleRecord
from dpsgd_track.training.sample_observer import Observed

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Squared norms and sketches of unsharded parameter-shaped tensors."""

    norm_sq: dict[str, float]
    """Squared L2 norm by parameter."""
    sketch: Floats
    """[P, K]"""

    def total_norm(self) -> float:
        """L2 norm over all parameters."""
        return float(np.sqrt(sum(self.norm_sq.values())))


def measure(mode: Mode, parts: list[LocalPart]) -> Measured:
    """Norm and sketch of each part's unsharded tensor."""
    if mode.replicated:
        # Every rank holds the whole tensors: each measures a slice.
        parts = [_slice_of(part, dist.get_rank(), dist.get_world_size()) for part in parts]
    packed = torch.stack([_norm_and_sketch(part) for part in parts])
    dist.all_reduce(packed)
    table = packed.cpu().numpy()
    norms = dict(zip((p.name for p in parts), table[:, 0].tolist(), strict=True))
    return Measured(norms, np.ascontiguousarray(table[:, 1:]))


def _norm_and_sketch(part: LocalPart) -> Tensor:
    local = part.local if part.is_counted else part.local.flatten()[:0]
    return norm_and_sketch(part.name, local, part.start, part.num_elements)


def _slice_of(part: LocalPart, rank: int, world_size: int) -> LocalPart:
    """The `rank`-th of equal slices of a whole tensor."""
    start, stop = row_range(part.num_elements, rank, world_size)
    return LocalPart(part.name, part.local.reshape(-1)[start:stop], start, part.num_elements)


@dataclass(frozen=True)
class GatheredSamples:
    """Records of all samples, in order of the global index. NaN: not computed."""

    index: NDArray[np.int64]
    rank: NDArray[np.int64]
    """Rank that computed the sample."""
    loss: Floats
    norm: Floats
    clip_factor: Floats
    norm_by_parameter: Floats
    """[N, P]"""
    micro_batch: NDArray[np.int64]
    """Micro-batch of its rank that held the sample."""
    sketch: Floats
    """[N, P, 2 K] projections of the samples' gradients, and of their ranks' rows; K is 0 where not
    recorded."""
    other_norm: Floats
    """[N, P, V] value of each `NormFormula`; V is 0 where they are not recorded."""
    other_loss: Floats
    """[N, F] value of each `LossFormula`; F is 0 where they are not recorded."""
    part_square: Floats
    """[N, P, X] squares of the gradients by part; X is 0 where they are not recorded."""
    target_loss: Floats
    """[N, T] loss of each target; T is 0 where they are not recorded."""
    size: Floats
    """[N, 2] numbers of tokens and of targets; the last axis is 0 where they are not recorded."""
    digests: NDArray[np.int64]

    def mean_loss(self) -> float:
        """Mean over the samples; 0 if there are none, like the gradient."""
        return float(self.loss.mean()) if len(self.loss) else 0.0

    def data_hash(self) -> str:
        """Digest of the samples."""
        return hashlib.blake2b(self.digests.tobytes(), digest_size=8).hexdigest()


def local_samples(
    records: list[SampleRecord],
    indices: tuple[int, ...],
    digests: tuple[int, ...],
    parameter_names: list[str],
    observed: Observed | None = None,
    sizes: Floats | None = None,
) -> GatheredSamples:
    """This rank's samples of all micro-batches of a step.

    Args:
        observed: what `SampleObserver.take` gave; None without an observer.
        sizes: [N, 2] numbers of tokens and of targets; None where they are not recorded.
    """
    N, P = len(indices), len(parameter_names)
    nothing, none = np.empty((N, P, 0)), np.empty((N, 0))
    seen = observed or Observed(
        sketch=nothing,
        other_norm=nothing,
        other_loss=none,
        part_square=nothing,
        target_loss=none,
    )
    return GatheredSamples(
        np.array(indices, dtype=np.int64),
        np.full(len(indices), dist.get_rank(), dtype=np.int64),
        np.concatenate([_column(r.loss_B, len(r.loss_B)) for r in records]),
        np.concatenate([_column(r.norm_B, len(r.loss_B)) for r in records]),
        np.concatenate([_column(r.clip_factor_B, len(r.loss_B)) for r in records]),
        np.concatenate([_by_parameter(r, parameter_names) for r in records]),
        np.repeat(np.arange(len(records)), [len(r.loss_B) for r in records]),
        seen.sketch,
        seen.other_norm,
        seen.other_loss,
        seen.part_square,
        seen.target_loss,
        none if sizes is None else sizes,
        np.array(digests, dtype=np.int64),
    )


def gather_samples(local: GatheredSamples, device: torch.device) -> GatheredSamples:
    """Samples of all ranks, on every rank; a rank may hold none."""
    floats = [getattr(local, name) for name in _FLOATS]
    shapes = [values.shape[1:] for values in floats]
    widths = [math.prod(shape) for shape in shapes]
    flat = [v.reshape(len(v), width) for v, width in zip(floats, widths, strict=True)]
    # Floats are sent as their bits, in one table with the integers.
    integers = [getattr(local, name) for name in _INTEGERS]
    whole = np.column_stack([*integers, np.concatenate(flat, axis=1).view(np.int64)])
    whole = _gather_rows(torch.from_numpy(whole), device)
    whole = whole[np.argsort(whole[:, 0], kind="stable")]
    table = whole[:, len(integers) :].copy().view(np.float64)
    pieces = np.split(table, np.cumsum(widths)[:-1], axis=1)
    gathered = [p.reshape(len(p), *shape) for p, shape in zip(pieces, shapes, strict=True)]
    columns: dict[str, NDArray[Any]] = dict(zip(_INTEGERS, whole.T, strict=False))
    columns.update(zip(_FLOATS, gathered, strict=True))
    return GatheredSamples(**columns)


_INTEGERS = ("index", "rank", "micro_batch", "digests")
_FLOATS = (
    "loss",
    "norm",
    "clip_factor",
    "norm_by_parameter",
    "sketch",
    "other_norm",
    "other_loss",
    "part_square",
    "target_loss",
    "size",
)
"""Fields of samples, by type."""


def _gather_rows(local: Tensor, device: torch.device) -> NDArray[Any]:
    """The rows of all ranks, which may differ in number."""
    counts = stack_over_ranks(torch.tensor([len(local)], device=device)).flatten().tolist()
    padded = local.new_zeros(max(*counts, 1), local.shape[1])
    padded[: len(local)] = local
    pieces = stack_over_ranks(padded.to(device)).cpu().numpy()
    return np.concatenate([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


def _column(values: Tensor | None, length: int) -> Floats:
    if values is None:
        return np.full(length, np.nan)
    return values.detach().double().cpu().numpy().reshape(length)


def _by_parameter(record: SampleRecord, names: list[str]) -> Floats:
    length = len(record.loss_B)
    if record.norm_by_parameter_B is None:
        return np.full((length, len(names)), np.nan)
    norms, zeros = record.norm_by_parameter_B, torch.zeros(length)
    return np.column_stack([_column(norms.get(name, zeros), length) for name in names])


def largest_of_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise maximum over ranks."""
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    largest: list[float] = packed.tolist()
    return largest


def weights_digest(model: nn.Module) -> str:
    """Digest of every parameter and buffer of a whole model: names, shapes and exact bits."""
    content = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        content.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_bits_digest(tensor)}".encode())
    return content.hexdigest()


def _bits_digest(tensor: Tensor) -> int:
    """Sum over chunks of every word times an odd function of its position, modulo 2^64.

    Computed on the tensor's device: billions of weights need not leave it.
    """
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 4)).view(torch.int32)
    # On a CPU a chunk fits into the cache; on a GPU large chunks save launches.
    size = 1 << (24 if words.is_cuda else 16)
    # The constant is 2^64 / golden ratio, made odd. Products wrap around, as intended.
    factors = (2 * torch.arange(size, device=words.device) + 1) * -7046029254386353131
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, chunk in enumerate(words.split(size)):
        weighted = (chunk.long() + 1) * factors[: len(chunk)]
        total = total * 6364136223846793005 + weighted.sum() + number
    return int(total) % 2**64


def linear_layer_names(model: nn.Module) -> list[str]:
    """Fully qualified names of linear layers, in the model's order.

    A layer that shares an earlier layer's weight (a tied head) is left out.
    """
    own = {name for name, _ in model.named_parameters()}
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and f"{fqn}.weight" in own
    ]
