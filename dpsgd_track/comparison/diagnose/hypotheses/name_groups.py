"""Groups of parameters that a mistake may be about, by their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations


def groups_of_names(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Each parameter, and the parameters with a common beginning or end, with their columns."""
    groups: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(names):
        parts = name.split(".")
        groups[name].append(column)
        groups[f"every *.{parts[-1]}"].append(column)
        for length in range(1, len(parts)):
            groups[f"all of {'.'.join(parts[:length])}"].append(column)
    seen: set[tuple[int, ...]] = set()
    for name, columns in groups.items():
        if tuple(columns) not in seen and len(columns) < len(names):
            seen.add(tuple(columns))
            yield name, columns


def pairs_of_names(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """The parameters of any two parts of the model, as the embeddings of tokens and positions."""
    parts: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(names):
        parts[name.partition(".")[0]].append(column)
    for one, other in combinations(parts, 2):
        yield f"all of {one} and {other}", [*parts[one], *parts[other]]


def unit_of(name: str) -> str:
    """The block that a parameter is in, `model.layers.3`; its module where it is in none."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else name.rpartition(".")[0]
