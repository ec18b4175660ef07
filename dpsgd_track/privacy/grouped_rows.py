"""Finds the layers that read several rows of each sample, [B n, ...] or [n B, ...].

OPT, mixtures of experts and time-distributed layers flatten [B, n, ...] for some layers, and Swin
cuts pictures into windows: the rows of each sample follow one another. Two views of a batch that
are joined are [2 B, ...], and tokens that are flattened time first [T B, ...]: a row of each sample
comes after another. In both orders a sample's n rows are known.

The order is tested, as other tensors may have as many rows by chance. In a run on the same samples
in another order, the rows must be found in that order: those that all samples share are not. In
runs with noise in place of what layers return, there must be as many rows: of those that a router
sends to an expert there are not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.batch import tensors_in
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.trial import Reader

_NUM_NOISY_RUNS = 4


def has_grouped_rows(x: Tensor, num_samples: int) -> bool:
    """True if the shape of `x` is that of several rows per sample, and of nothing else."""
    num_rows = len(x) if x.dim() else 0
    return num_rows > num_samples and num_rows % num_samples == 0 and num_samples not in x.shape


@torch.no_grad()
def find_grouped(
    capture: Capture, run: Callable[[Any], Tensor], batch: Any, reordered: Any
) -> dict[str, bool]:
    """Layers all of whose calls read several rows of each sample in one order.

    Args:
        reordered: the same samples with the last one first.
    Returns:
        True for a layer that reads a row of each sample after another, [n B, ...]; False for one
        that reads the rows of one sample after the other, [B n, ...].
    """
    num_samples = len(batch)
    if not any(_read(capture, run, batch, num_samples).values()):
        return {}
    with in_eval_mode(capture.model):
        first = _read(capture, run, batch, num_samples)
        second = _read(capture, run, reordered, num_samples)
        with _noise(capture.model):
            others = [_read(capture, run, batch, num_samples) for _ in range(_NUM_NOISY_RUNS)]

    def is_in_order(fqn: str, *, is_interleaved: bool) -> bool:
        pairs = zip(first[fqn], second[fqn], strict=True)
        return all(_are_rolled(a, b, num_samples, is_interleaved) for a, b in pairs)

    steady = [
        fqn
        for fqn, marks in first.items()
        if len(marks) == len(second[fqn])
        and all([x.shape for x in marks] == [x.shape for x in other[fqn]] for other in others)
    ]
    orders = {
        fqn: [order for order in (False, True) if is_in_order(fqn, is_interleaved=order)]
        for fqn in steady
    }
    return {fqn: found[0] for fqn, found in orders.items() if len(found) == 1}


@contextmanager
def _noise(model: nn.Module) -> Iterator[None]:
    """Context in which layers return noise of their outputs' size."""

    def moved(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.is_floating_point():
            return output.square().mean().sqrt() * torch.randn_like(output)
        return output

    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    handles = [module.register_forward_hook(moved) for module in owners]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(
    capture: Capture, run: Callable[[Any], Tensor], batch: Any, num_samples: int
) -> dict[str, list[Tensor]]:
    """A number for each row that a layer reads, [B n], of every tensor; by layer.

    Layers of which a call reads anything else are left out.
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)
    others: set[str] = set()

    def note(fqn: str, arguments: Any) -> None:
        tensors = tensors_in(arguments)
        if tensors and all(has_grouped_rows(x, num_samples) for x in tensors):
            seen[fqn] += map(_marks, tensors)
        else:
            others.add(fqn)

    readers = [Reader(layer, note) for layer in capture.captured.values()]
    with capture.attached(readers):
        run(batch)
    return defaultdict(list, {fqn: marks for fqn, marks in seen.items() if fqn not in others})


def _marks(x: Tensor) -> Tensor:
    """A random combination of each row's elements, [B n]; the tensors themselves are large."""
    rows = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    weights = torch.randn(rows.shape[1], generator=generator)
    return rows.float() @ weights.to(rows.device)


def _are_rolled(a: Tensor, b: Tensor, num_samples: int, is_interleaved: bool) -> bool:
    """True if each sample's rows of `a` are the next one's of `b`, and samples differ."""
    if a.shape != b.shape:
        return False
    dim = 1 if is_interleaved else 0
    by_sample = a.view(-1, num_samples) if is_interleaved else a.view(num_samples, -1)
    # Far above rounding errors of another order of samples, and far below what samples differ by.
    tolerance = 1e-3 * float(a.abs().max())
    is_rolled = torch.allclose(by_sample.roll(1, dim).flatten(), b, rtol=0, atol=tolerance)
    return is_rolled and not torch.allclose(a, b, rtol=0, atol=tolerance)
