"""Poisson-sampled batches of a data set for a loop of one's own, loaded by torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from dpsgd_track.config import require
from dpsgd_track.privacy.sampling import Draw, OpenDraw, PoissonSampler


def refuse_unindexed(name: str, dataset: Any) -> None:
    """Raise ValueError unless a data set, the setting `name`, has samples that can be drawn."""
    has_both = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    is_indexed = has_both and not isinstance(dataset, IterableDataset)
    allowed = "a data set with a length and a sample for each index"
    require(is_indexed, name, type(dataset).__name__, allowed)


class PrivateLoader:
    """An iterable of steps, each of them an iterator of this rank's micro-batches.

    Every rank gets equally many micro-batches. Those without samples have tensors without rows.
    """

    def __init__(
        self,
        dataset: Any,
        make_sampler: Callable[[], PoissonSampler],
        *,
        num_steps: int | None,
        steps_taken: Callable[[], int],
        opened: OpenDraw,
        collate_fn: Callable[[list[Any]], Any] | None,
        loading: Mapping[str, Any],
    ) -> None:
        """
        Args:
            make_sampler: called before each pass, so that it follows changes of settings.
            num_steps: steps of one pass; None for an epoch in expectation.
            steps_taken: tells the steps taken so far, which is the next draw's number.
            opened: is told of each draw.
            loading: further arguments of torch's DataLoader.
        """
        self._dataset, self._make_sampler, self._num_steps = dataset, make_sampler, num_steps
        self._steps_taken, self._opened = steps_taken, opened
        self._collate = collate_fn or default_collate
        self._loading = dict(loading)
        self._empty: Any = None

    @property
    def sample_rate(self) -> float:
        """Probability with which a step of the next pass takes each sample."""
        return self._make_sampler().sample_rate

    def __len__(self) -> int:
        """Steps of the next pass."""
        return self._num_steps or round(1 / self.sample_rate)

    def __iter__(self) -> Iterator[Iterator[Any]]:
        first, sampler = self._steps_taken(), self._make_sampler()
        steps = range(first, first + len(self))
        loaded = iter(self._loaded(sampler, steps))
        for step in steps:
            taken = self._steps_taken()
            if taken != step:
                raise RuntimeError(
                    f"private.loader: expected one optimizer.step() for each draw, got "
                    f"{taken - step} more. Begin the loop anew."
                )
            draw = Draw(sampler, step)
            self._opened.open(draw)
            try:
                yield self._micro_batches(draw, loaded)
                draw.refuse_unless_taken()
            finally:
                self._opened.close(draw)

    def _loaded(self, sampler: PoissonSampler, steps: range) -> DataLoader[Any]:
        """The micro-batches with samples, of all steps in turn: workers load ahead of the loop."""
        batches = _NonEmpty(sampler, steps)
        return DataLoader(
            self._dataset, batch_sampler=batches, collate_fn=self._collate, **self._loading
        )

    def _micro_batches(self, draw: Draw, loaded: Iterator[Any]) -> Iterator[Any]:
        for indices in draw.micro_batches:
            batch = next(loaded) if indices else self._without_samples()
            draw.num_unread -= 1
            yield batch

    def _without_samples(self) -> Any:
        if self._empty is None:
            self._empty = _emptied(self._collate([self._dataset[0]]))
        return self._empty


class _NonEmpty:
    """Indices of this rank's micro-batches that have samples, step by step."""

    def __init__(self, sampler: PoissonSampler, steps: range) -> None:
        self._sampler, self._steps = sampler, steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield from filter(None, self._sampler.micro_batches(step))


def _emptied(batch: Any) -> Any:
    """`batch` without rows: the same nesting, types and shapes beyond dimension 0."""
    if isinstance(batch, Tensor):
        allowed = "tensors with the samples in dimension 0"
        require(batch.dim() > 0, "collate_fn", batch, allowed)
        return batch[:0]
    if isinstance(batch, Mapping):
        emptied = {key: _emptied(value) for key, value in batch.items()}
        return emptied if type(batch) is dict else type(batch)(emptied)  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        if not any(isinstance(part, Tensor | Mapping | list | tuple) for part in batch):
            # A list with an entry for each sample, such as its name.
            return type(batch)()
        parts = [_emptied(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    name, advice = type(batch).__name__, "Give a collate_fn that returns such."
    require(False, "collate_fn", name, "tensors in dicts, lists and tuples", advice)
