"""Chooses the parameters whose terms one backward keeps, so that they fit into a budget of memory.

One pass keeps the terms of every layer from its backward until the clip factors are known. Within a
budget, the terms of some parameters are *dropped* once their norms are taken. A second backward
delivers them again, and has to run from the loss down to the lowest layer among them only. So the
parameters nearest to the loss are dropped, as few as will do.

What two passes hold until a backward ends does not count, and is always kept, as it costs nothing:
the terms of a parameter with several uses, such as a tied head, which are joined at its last use,
and gradients that autograd forms of per-sample copies.

Sizes are measured in the first batch of each shape, in which everything is dropped. They are
proportional to the number of samples, so that another number of samples is no other shape.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from dpsgd_track.privacy.terms import Term

SHARE_OF_SMALL = 0.01
"""Fraction of all terms that the smallest of them, as of biases, may take and are not dropped."""
MOST_SCALED = 1.25
"""Ratio of numbers of samples beyond which sizes are measured anew."""


@dataclass
class _Sizes:
    """Bytes of parameters' terms. Terms that share a storage, as of an input, count it once."""

    num_samples: int
    bytes_of: dict[StorageWeakRef, int] = field(default_factory=dict)
    storages_of: dict[str, set[StorageWeakRef]] = field(default_factory=dict)
    """Storages of each parameter's terms. A weak reference keeps its identity from being taken by
    a later storage."""

    def note(self, name: str, terms: Sequence[Term]) -> None:
        """Note the terms of a parameter, while they are there."""
        own = self.storages_of.setdefault(name, set())
        for storage in storages(terms):
            reference = StorageWeakRef(storage)
            own.add(reference)
            self.bytes_of[reference] = storage.nbytes()

    def more(self, name: str, taken: Container[StorageWeakRef] = ()) -> int:
        """Bytes of a parameter's terms in other storages than those taken."""
        own = self.storages_of.get(name, ())
        return sum(self.bytes_of[reference] for reference in own if reference not in taken)

    def small(self) -> list[str]:
        """Parameters whose terms are the smallest, and together a small part of all."""
        left = SHARE_OF_SMALL * sum(self.bytes_of.values())
        small = []
        for name in sorted(self.storages_of, key=self.more):
            left -= self.more(name)
            if left < 0:
                break
            small.append(name)
        return small

    def fitting(self, num_bytes: float, names: Sequence[str]) -> set[str]:
        """The small ones among `names`, and as many of the others as fit, from the last on."""
        kept: set[str] = set()
        taken: set[StorageWeakRef] = set()
        small = set(self.small()).intersection(names)
        for name in (*small, *(name for name in reversed(names) if name not in small)):
            num_bytes -= self.more(name, taken)
            if num_bytes < 0:
                # Without room for the small ones, there is none for anything.
                return kept if small <= kept else set()
            kept.add(name)
            taken.update(self.storages_of.get(name, ()))
        return kept


@dataclass(frozen=True)
class Split:
    """The part of a batch's terms that a first backward keeps, and the part that it drops."""

    dropped: frozenset[str] = frozenset()
    """Parameters whose terms a second backward delivers again."""
    counted: frozenset[str] = frozenset()
    """Parameters whose kept terms the budget bounds."""
    delivered: set[str] = field(default_factory=set)
    """Dropped parameters that the first backward has delivered."""


class MemoryBudget:
    """Plans what is kept, by the sizes of earlier batches of the same shape."""

    def __init__(self, num_bytes: int) -> None:
        """
        Args:
            num_bytes: largest number of bytes that kept terms take.
        """
        self.num_bytes = num_bytes
        self._sizes: dict[int, list[_Sizes]] = {}
        """By a hash of the shapes of one sample's calls."""
        self._measured: _Sizes | None = None

    @property
    def most_measured(self) -> int:
        """Bytes of the terms of the largest batch that was measured."""
        every = (sizes for of_shape in self._sizes.values() for sizes in of_shape)
        return max((sum(sizes.bytes_of.values()) for sizes in every), default=0)

    def to_drop(self, shape: int, num_samples: int, names: Sequence[str]) -> set[str]:
        """Parameters of a batch to drop; all of them in the first one of a shape.

        Args:
            shape: hash of the shapes of one sample's calls.
            names: parameters that may be dropped, in the order of the backward.
        """
        known = self._nearest(shape, num_samples)
        if known is None:
            self._measured = _Sizes(num_samples)
            return set(names)
        self._measured = None
        scale = max(1.0, num_samples / known.num_samples)
        return set(names) - known.fitting(self.num_bytes / scale, names)

    def note(self, name: str, terms: Sequence[Term]) -> None:
        """Measure the terms of a parameter, if this batch is the first of its shape."""
        if self._measured is not None:
            self._measured.note(name, terms)

    def end(self, shape: int, kept: Iterable[Sequence[Term]]) -> None:
        """End the first backward of a batch, which has kept these terms.

        If they are too large, as where it has reached layers that it did not reach when their sizes
        were measured, the next batch of the shape is measured anew.
        """
        if self._measured is not None:
            self._sizes.setdefault(shape, []).append(self._measured)
            self._measured = None
            return
        every = {StorageWeakRef(s): s.nbytes() for terms in kept for s in storages(terms)}
        if sum(every.values()) > self.num_bytes:
            self._sizes.pop(shape, None)

    def _nearest(self, shape: int, num_samples: int) -> _Sizes | None:
        """Sizes of the number of samples that is nearest to this one, unless it is far."""

        def ratio(sizes: _Sizes) -> float:
            both = sizes.num_samples, num_samples
            return max(both) / min(both)

        near = [sizes for sizes in self._sizes.get(shape, ()) if ratio(sizes) <= MOST_SCALED]
        return min(near, key=ratio, default=None)


def storages(terms: Sequence[Term]) -> Iterator[UntypedStorage]:
    """The memory that terms take."""
    for term in terms:
        for value in vars(term).values():
            if isinstance(value, Tensor):
                yield value.untyped_storage()
