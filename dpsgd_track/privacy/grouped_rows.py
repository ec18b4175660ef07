"""Finds the layers that read several rows of each sample, [B n, ...] or [n B, ...].

OPT, mixtures of experts and time-distributed layers flatten [B, n, ...] for some layers, and Swin
cuts pictures into windows: the rows of each sample follow one another. Two views of a batch that
are joined are [2 B, ...], and tokens that are flattened time first [T B, ...]: a row of each sample
comes after another. In both orders a sample's n rows are known.

The order is tested, as other tensors may have as many rows by chance. In a run on the same samples
in another order, the rows must be found in that order: those that all samples share are not. In
runs with noise in place of what layers return, there must be as many rows: of those that a router
sends to an expert there are not. Ranks find the same: what one has seen counts on all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpsgd_track.privacy.batch import tensors_in
from dpsgd_track.privacy.capture import Capture
from dpsgd_track.privacy.eval_mode import in_eval_mode
from dpsgd_track.privacy.trial import Reader

_NUM_NOISY_RUNS = 4
_PROVEN, _REFUTED, _OPEN = "proven", "refuted", "open"


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
    read = _read(capture, run, batch, num_samples)
    if not capture.named_on_ranks({fqn for fqn, marks in read.items() if marks}):
        return {}
    with in_eval_mode(capture.model):
        first = _read(capture, run, batch, num_samples)
        second = _read(capture, run, reordered, num_samples)
        with _noise(capture.model):
            others = [_read(capture, run, batch, num_samples) for _ in range(_NUM_NOISY_RUNS)]
    steady = {
        fqn
        for fqn, marks in first.items()
        if marks and all(_shapes(marks) == _shapes(o.get(fqn, ())) for o in (second, *others))
    }
    orders: dict[str, list[bool]] = defaultdict(list)
    for is_interleaved in (False, True):
        found = {
            fqn: {
                _compare(a, b, num_samples, is_interleaved=is_interleaved)
                for a, b in zip(first[fqn], second[fqn], strict=True)
            }
            for fqn in steady
        }
        proven = {fqn for fqn, answers in found.items() if _PROVEN in answers}
        refuted = {fqn for fqn in first if _REFUTED in found.get(fqn, {_REFUTED})}
        for fqn in capture.named_on_ranks(proven, refuted):
            orders[fqn].append(is_interleaved)
    return {fqn: found_orders[0] for fqn, found_orders in orders.items() if len(found_orders) == 1}


def _shapes(marks: Iterable[Tensor]) -> list[torch.Size]:
    return [x.shape for x in marks]


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
) -> dict[str, Sequence[Tensor]]:
    """A number for each row that a layer reads, [B n], of every tensor; by layer.

    None for layers of which a call reads anything else.
    """
    seen: dict[str, list[Tensor]] = {}
    others: set[str] = set()

    def note(fqn: str, arguments: Any) -> None:
        tensors = tensors_in(arguments)
        if tensors and all(has_grouped_rows(x, num_samples) for x in tensors):
            seen.setdefault(fqn, []).extend(map(_marks, tensors))
        else:
            others.add(fqn)

    readers = [Reader(layer, note) for layer in capture.captured.values()]
    with capture.attached(readers):
        run(batch)
    return {**seen, **dict.fromkeys(others, ())}


def _marks(x: Tensor) -> Tensor:
    """A random combination of each row's elements, [B n]; the tensors themselves are large."""
    rows = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    weights = torch.randn(rows.shape[1], generator=generator)
    return rows.float() @ weights.to(rows.device)


def _compare(a: Tensor, b: Tensor, num_samples: int, *, is_interleaved: bool) -> str:
    """Find if each sample's rows of `a` are the next one's of `b`: open if all samples' are alike,
    as the experts that a router chooses may be."""
    dim = 1 if is_interleaved else 0
    by_sample = a.view(-1, num_samples) if is_interleaved else a.view(num_samples, -1)
    # Far above rounding errors of another order of samples, and far below what samples differ by.
    tolerance = 1e-3 * float(a.abs().max())
    if not torch.allclose(by_sample.roll(1, dim).flatten(), b, rtol=0, atol=tolerance):
        return _REFUTED
    return _OPEN if torch.allclose(a, b, rtol=0, atol=tolerance) else _PROVEN
