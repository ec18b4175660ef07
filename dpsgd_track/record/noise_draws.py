"""Sums over millions of elements of a mode's noise, from which it is audited without its elements.

They are drawn in noise-only steps: without samples, a mode's update is its noise. Sums of
independent draws add up, so two records of one mode are as good as a longer one.

Legend: W ranks, P trainable parameters, M elements of a shard, L lags, F formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = (2.5, 3.0, 3.5, 4.0, 4.5)
"""Sizes of an element, in units of sigma C, beyond which elements are counted."""
MARGIN = 2.0**-18
"""Relative distance by which a counted element is beyond a level: float32 moves what was cut at the
level by less."""
NUM_LAGS = 256
"""L. Elements of a rank's shards, one after the other, are compared with those 1 to L later."""
FORMATS = {"bfloat16": 8, "float16": 11}
"""F. Significant bits of each format that noise may have been rounded to."""
_SLACK = 2.0**-20
"""Relative distance from a short number within which float32 may have moved it."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


# Compared and hashed by identity, since arrays cannot be hashed.
@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseDraws:
    """Sums over z, the elements of the noise divided by sigma C."""

    key: str
    """Key of the noise source; keys of records that were added up are separated by blanks."""
    num_steps: int
    """Noise-only steps."""
    significant_bits: int
    """Of an update: 24 in float32, 8 in bfloat16."""
    is_bare: bool
    """True if the steps had no samples; else the update of a twin without noise was subtracted."""
    moments: Floats
    """[W, P, 5] sums of z^0 to z^4."""
    beyond: Integers
    """[W, P, 5] number of elements with |z| beyond each of LEVELS."""
    ranks: Floats
    """[2, W, W] sum and number of products of elements at one position of two ranks' shards."""
    parameters: Floats
    """[2, P, P] the same of two parameters' shards on one rank."""
    neighbours: Floats
    """[2, L] the same of elements that are 1 to L apart, on one rank."""
    steps: Floats
    """[2] the same of one element in consecutive steps."""
    short: Integers
    """[F] elements of the first step with no more bits than a format, in units of sigma C, of
    sigma, of 1 or of the update, whichever gives most."""
    num_looked_at: int
    """Elements whose bits were looked at."""

    @classmethod
    def of_step(
        cls,
        z: Floats,
        before: Floats | None = None,
        *,
        units: tuple[float, ...] = (),
        key: str = "",
        significant_bits: int = 24,
        is_bare: bool = True,
    ) -> NoiseDraws:
        """The sums of one step.

        Args:
            z: [W, P, M] elements; NaN past the end of a shard, and infinite where the noise is not
                finite.
            before: those of the step before, if there was any.
            units: factors that may have been applied to the elements since they were rounded;
                empty if their bits are not to be looked at.
        """
        held = ~np.isnan(z)
        filled = np.where(held, z, 0.0)
        W, P, _ = z.shape
        num = held.sum(axis=-1)
        # One rank's shards after the other, without what lies past their ends.
        values = z[held]
        by_rank = np.split(values, np.cumsum(num.sum(axis=1))[:-1])
        size = np.abs(values)
        with np.errstate(over="ignore", invalid="ignore"):
            moments = [_by_shard(values**power, num) for power in range(5)]
            ranks = _products(filled.reshape(W, -1), held.reshape(W, -1))
            rows, places = (np.moveaxis(a, 1, 0).reshape(P, -1) for a in (filled, held))
            parameters = _products(rows, places)
            neighbours = np.sum([_lagged(row) for row in by_rank], axis=0)
            after = 0.0 if before is None else values @ before[held]
        return cls(
            key=key,
            num_steps=1,
            significant_bits=significant_bits,
            is_bare=is_bare,
            moments=np.stack(moments, axis=-1),
            beyond=np.stack(
                [
                    _by_shard((size > level * (1 + MARGIN)).astype(np.int64), num)
                    for level in LEVELS
                ],
                axis=-1,
            ),
            ranks=ranks,
            parameters=parameters,
            neighbours=neighbours,
            steps=np.array([after, 0.0 if before is None else len(values)]),
            short=_short(values[np.isfinite(values)], units),
            num_looked_at=len(values) if units else 0,
        )

    def __add__(self, other: NoiseDraws) -> NoiseDraws:
        """The evidence of both, which are independent draws of one mode on one model."""
        same = "significant_bits", "is_bare"
        assert all(getattr(self, name) == getattr(other, name) for name in same)
        keys = dict.fromkeys((*self.key.split(), *other.key.split()))
        with np.errstate(invalid="ignore"):  # draws that are not finite
            summed = {
                each.name: getattr(self, each.name) + getattr(other, each.name)
                for each in fields(self)
                if each.name not in (*same, "key")
            }
        return replace(self, key=" ".join(keys), **summed)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every field as an array, by its name."""
        return {each.name: np.asarray(getattr(self, each.name)) for each in fields(self)}

    @classmethod
    def of_columns(cls, columns: Mapping[str, NDArray[Any]]) -> NoiseDraws:
        """Columns, as `columns` returns them.

        Raises:
            ValueError: a field is missing or of another type or shape, or there is another field.
        """
        unlike = columns.keys() ^ {each.name for each in fields(cls)}
        if unlike:
            raise ValueError(f"noise_draws: expected other fields: {', '.join(sorted(unlike))}.")
        W, P = (*columns["moments"].shape, 0, 0)[:2]
        for each in fields(cls):
            column = columns[each.name]
            shape = _shapes(W, P).get(each.name, ())
            if column.dtype.kind != _KINDS[str(each.type)] or column.shape != shape:
                raise ValueError(
                    f"noise_draws: {each.name}: expected {each.type} of shape {shape}, got "
                    f"{column.dtype} of shape {column.shape}."
                )
        scalars: dict[str, Any] = {
            name: value.item() for name, value in columns.items() if not value.ndim
        }
        return cls(**{**columns, **scalars})


_KINDS = {"Floats": "f", "Integers": "i", "int": "i", "bool": "b", "str": "U"}
"""numpy's kind of a field's elements, by its type."""


def _shapes(num_ranks: int, num_parameters: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all fields that are no scalars."""
    shards = num_ranks, num_parameters
    return {
        "moments": (*shards, 5),
        "beyond": (*shards, len(LEVELS)),
        "ranks": (2, num_ranks, num_ranks),
        "parameters": (2, num_parameters, num_parameters),
        "neighbours": (2, NUM_LAGS),
        "steps": (2,),
        "short": (len(FORMATS),),
    }


def _by_shard(values: NDArray[Any], num: Integers) -> NDArray[Any]:
    """[W, P] sums of the values of each shard, which has `num` of them."""
    total = np.zeros(num.size, dtype=values.dtype)
    filled = num.ravel() > 0
    if filled.any():
        starts = np.cumsum(num.ravel()) - num.ravel()
        total[filled] = np.add.reduceat(values, starts[filled])
    return total.reshape(num.shape)


def _products(rows: Floats, held: NDArray[np.bool_]) -> Floats:
    """[2, R, R] sums of products of each two of R rows, and the number of places that both hold."""
    weights = held.astype(np.float32)
    return np.stack([rows @ rows.T, (weights @ weights.T).astype(np.float64)])


def _lagged(row: Floats) -> Floats:
    """[2, L] sums of products of elements of a vector that are 1 to L apart, and their number."""
    found = np.zeros((2, NUM_LAGS))
    for lag in range(1, min(NUM_LAGS, len(row) - 1) + 1):
        found[:, lag - 1] = row[:-lag] @ row[lag:], len(row) - lag
    return found


def _short(values: Floats, units: tuple[float, ...]) -> Integers:
    """[F] elements that have no more bits than a format, in the unit in which most are so short."""
    short = np.zeros((max(len(units), 1), len(FORMATS)), dtype=np.int64)
    for row, unit in zip(short, units, strict=False):
        mantissas = np.frexp(values * unit)[0]
        for column, bits in enumerate(FORMATS.values()):
            scaled = mantissas * 2.0**bits
            row[column] = (np.abs(scaled - np.rint(scaled)) <= _SLACK * 2.0**bits).sum()
    return np.asarray(short.max(axis=0))
