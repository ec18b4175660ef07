"""Checks of the sums over a million elements that a mode drew in noise-only steps.

They find what is too small for the sampled elements: a std that is off by 0.5 %, a mean or a
correlation of 0.01, a cut at 4 sigma, skewness, and noise of fewer bits than its type has.

Legend: W ranks, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from dpsgd_track.comparison.audit.noise.check import (
    ALPHA,
    NORMAL_95,
    NoiseCheck,
    Place,
    untested,
)
from dpsgd_track.comparison.audit.noise.gaussian import (
    beyond,
    hermite_bound,
    log_beyond,
    share_interval,
)
from dpsgd_track.comparison.audit.noise.std import cells_of, std_check, telling
from dpsgd_track.record.noise_draws import FORMATS, LEVELS, MARGIN, NoiseDraws
from dpsgd_track.record.trajectory import Floats

PREFIX = "draws_"
"""Prefix of the names of these checks."""
FINITE, STD, MEAN, SKEWNESS, KURTOSIS, TAILS, BITS = (
    f"{PREFIX}{name}" for name in ("finite", "std", "mean", "skewness", "kurtosis", "tails", "bits")
)
CORRELATION = f"{PREFIX}correlation_of_"
_FEWEST_FOR_SHAPE = 1000
"""Least number of elements of a part whose skewness and kurtosis are checked."""
_FEWEST_PRODUCTS = 10_000
"""Least number whose sum is normal as far out as it is checked."""
_SHORT_SHARE = 0.5
"""Share of elements that must be short for the noise to be rounded; by chance, 1 in 200 are."""
_FULL_BITS = 24


def check_draws(
    draws: NoiseDraws, parameters: Sequence[str], alpha: float = ALPHA
) -> Iterator[NoiseCheck]:
    """All checks of this module; of draws that are not finite only that they are.

    Args:
        parameters: [P] names.
        alpha: probability that one check fails by chance, over all its cells.
    """
    if not np.isfinite(draws.moments).all():
        yield _not_finite(draws, parameters)
        return
    checks = [
        *_check_std(draws, parameters, alpha),
        _check_mean(draws, parameters, alpha),
        _check_shape(draws, parameters, alpha, order=3),
        _check_shape(draws, parameters, alpha, order=4),
        _check_tails(draws, parameters, alpha),
        _check_bits(draws),
        *_check_correlations(draws, parameters, alpha),
    ]
    yield from (replace(check, is_of_draws=True) for check in checks if check)


def _not_finite(draws: NoiseDraws, parameters: Sequence[str]) -> NoiseCheck:
    is_finite = np.isfinite(draws.moments).all(axis=(0, 2))
    name = parameters[int(is_finite.argmin())]
    return NoiseCheck(
        name=FINITE,
        title="noise alone is finite",
        value=math.inf,
        low=math.inf,
        high=math.inf,
        expected=0.0,
        is_ok=False,
        place=Place.of_parameter(name, "in "),
        sentence=_in_steps(draws, f"its noise in {name} is infinite or NaN"),
        num_cells=len(parameters),
        num_failed=int((~is_finite).sum()),
        is_of_draws=True,
    )


def _parts(draws: NoiseDraws, parameters: Sequence[str]) -> list[tuple[Place, Floats, Floats]]:
    """(place, [5] moments, [levels] counts) of everything, each rank and each parameter.

    Parts without elements are left out, and so is the only rank.
    """
    W = len(draws.moments)
    places = [Place(), *(Place(text=f"on rank {rank}") for rank in range(W) if W > 1)]
    places += [Place.of_parameter(name, "in ") for name in parameters]
    columns = []
    for sums in (draws.moments, draws.beyond):
        rows = [sums.sum(axis=(0, 1)), *sums.sum(axis=1)[: W if W > 1 else 0], *sums.sum(axis=0)]
        columns.append([np.asarray(row, np.float64) for row in rows])
    return [part for part in zip(places, *columns, strict=True) if part[1][0] > 0]


def _check_std(draws: NoiseDraws, parameters: Sequence[str], alpha: float) -> Iterator[NoiseCheck]:
    num, squares = draws.moments[..., 0], draws.moments[..., 2]
    ranks = [Place(text=f"rank {rank}") for rank in range(len(num))]
    total = cells_of([Place()], squares.sum(), num.sum(), alpha)
    grouped = {
        f"{STD}_by_rank": cells_of(ranks, squares.sum(axis=1), num.sum(axis=1), alpha),
        f"{STD}_by_parameter": cells_of(
            list(map(Place.of_parameter, parameters)),
            squares.sum(axis=0),
            num.sum(axis=0),
            alpha,
        ),
    }
    best = telling(total, grouped, grouped)
    for name, cells in {STD: total, **grouped}.items():
        title = f"std {name.removeprefix(STD).replace('_', ' ').strip()} of noise alone"
        check = std_check(name, " ".join(title.split()), cells, explains_others=best == name)
        yield replace(check, sentence=_in_steps(draws, check.sentence))


def _in_steps(draws: NoiseDraws, sentence: str) -> str:
    return f"{sentence}, by {_amount(draws)}"


def _amount(draws: NoiseDraws) -> str:
    """`1,264,845 elements of 53 noise-only steps`."""
    num = int(draws.moments[..., 0].sum())
    return f"{num:,} elements of {draws.num_steps} noise-only steps"


def _check_mean(draws: NoiseDraws, parameters: Sequence[str], alpha: float) -> NoiseCheck:
    parts = _parts(draws, parameters)
    num = np.array([moments[0] for _, moments, _ in parts])
    mean = np.array([moments[1] for _, moments, _ in parts]) / num
    rms = np.sqrt(np.array([moments[2] for _, moments, _ in parts]) / num)
    z = _normal_bound(len(parts), alpha)
    bound = z * rms / np.sqrt(num)
    excess = np.divide(np.abs(mean), bound, out=np.zeros_like(mean), where=bound > 0)
    worst = int(excess.argmax())
    value, reach, place = float(mean[worst]), float(bound[worst]), parts[worst][0]
    return NoiseCheck(
        name=MEAN,
        title="mean of noise alone",
        value=value,
        low=value - reach,
        high=value + reach,
        expected=0.0,
        is_ok=bool((excess <= 1).all()),
        place=place,
        sentence=_in_steps(
            draws,
            f"the mean of its noise{place.suffix} is {value:.4f} sigma C where chance explains "
            f"{reach:.4f}",
        ),
        num_cells=len(parts),
        num_failed=int((excess > 1).sum()),
        resolution=(z + NORMAL_95) / math.sqrt(num[0]),
    )


def _check_shape(
    draws: NoiseDraws, parameters: Sequence[str], alpha: float, *, order: int
) -> NoiseCheck | None:
    """The skewness (order 3) or the kurtosis (4) of everything, each rank and each parameter."""
    parts = [part for part in _parts(draws, parameters) if part[1][0] >= _FEWEST_FOR_SHAPE]
    if not parts:
        return None
    name, title, normal = (SKEWNESS, "skewness", 0) if order == 3 else (KURTOSIS, "kurtosis", 3)
    found = []
    for place, (n, first, second, third, fourth), _ in parts:
        total = third - 3 * first if order == 3 else fourth - 6 * second + 3 * n
        low, high = hermite_bound(order, int(n), alpha / len(parts))
        away = float(total / n)
        found.append((away / (high if away > 0 else low), away, low, high, place))
    excess, away, low, high, place = max(found, key=lambda cell: cell[0])
    spread = math.sqrt(math.factorial(order) / parts[0][1][0])
    return NoiseCheck(
        name=name,
        title=f"{title} of noise alone",
        value=normal + away,
        low=normal + away - high,
        high=normal + away - low,
        expected=float(normal),
        is_ok=excess <= 1,
        place=place,
        sentence=_in_steps(
            draws,
            f"the {title} of its noise{place.suffix} is {normal + away:.3f} where normal noise has "
            f"{normal} and chance explains {normal + low:.3f} to {normal + high:.3f}",
        ),
        num_cells=len(found),
        num_failed=sum(cell[0] > 1 for cell in found),
        resolution=found[0][3] + NORMAL_95 * spread,
    )


def _check_tails(draws: NoiseDraws, parameters: Sequence[str], alpha: float) -> NoiseCheck:
    """The number of elements beyond each level, in everything, each rank and each parameter."""
    parts = _parts(draws, parameters)
    levels = np.tile(LEVELS, len(parts))
    num = np.repeat([moments[0] for _, moments, _ in parts], len(LEVELS))
    counts = np.concatenate([counts for *_, counts in parts])
    low, high = share_interval(counts, counts, num, alpha / len(levels))
    rounding = max(2 * MARGIN, 2.0**-draws.significant_bits)
    with np.errstate(divide="ignore"):
        too_many = np.log(low) - log_beyond(levels * (1 - rounding))
        too_few = log_beyond(levels * (1 + rounding)) - np.log(high)
    excess = np.maximum(too_many, too_few)
    worst = int(excess.argmax())
    place, level, count = parts[worst // len(LEVELS)][0], float(levels[worst]), int(counts[worst])
    share = float(beyond(level))
    expected = num[worst] * share
    # Noise that is cut leaves no element beyond a level where so many are expected.
    needed = math.log(2 * len(levels) / alpha)
    seen = [level for level in LEVELS if num[0] * beyond(level) >= needed]
    return NoiseCheck(
        name=TAILS,
        title="share of large elements of noise alone",
        value=count / num[worst],
        low=min(float(low[worst]), share) if excess[worst] <= 0 else float(low[worst]),
        high=max(float(high[worst]), share) if excess[worst] <= 0 else float(high[worst]),
        expected=share,
        is_ok=bool((excess <= 0).all()),
        place=place,
        sentence=_in_steps(
            draws,
            f"{count or 'none'} of its {int(num[worst])} elements{place.suffix} "
            f"{'is' if count == 1 else 'are'} beyond {level:.3g} sigma C where {expected:.2g} are "
            "expected",
        ),
        num_cells=len(levels),
        num_failed=int((excess > 0).sum()),
        resolution=max(seen, default=math.nan),
    )


def _check_bits(draws: NoiseDraws) -> NoiseCheck:
    title = "share of elements with few bits"
    why = ""
    if draws.significant_bits < _FULL_BITS:
        why = f"its updates have {draws.significant_bits} significant bits"
    elif not draws.num_looked_at:
        why = "it takes no empty batch, and noise beside a sum is rounded with it"
    if why:
        return untested(BITS, title, f"{why}, so that noise of few bits was not looked for")
    shares = draws.short / draws.num_looked_at
    # The format with the fewest bits that holds them.
    is_short = shares > _SHORT_SHARE
    worst = int(is_short.argmax()) if is_short.any() else int(shares.argmax())
    name, bits = list(FORMATS.items())[worst]
    share = float(shares[worst])
    return NoiseCheck(
        name=BITS,
        title=title,
        value=share,
        low=share,
        high=share,
        expected=0.0,
        is_ok=not is_short.any(),
        sentence=f"{share:.0%} of the elements of its noise have {bits} significant bits at most, "
        f"as if they were rounded to {name}",
        num_cells=len(FORMATS),
        num_failed=int(is_short.sum()),
    )


def _check_correlations(
    draws: NoiseDraws, parameters: Sequence[str], alpha: float
) -> Iterator[NoiseCheck]:
    W, P = len(draws.ranks[0]), len(parameters)
    above_diagonal = np.triu_indices(W, k=1)
    if W > 1:
        ranks = [f"rank {i} and rank {j}" for i, j in zip(*above_diagonal, strict=True)]
        places = [Place(text=text) for text in ranks]
        yield _correlation(draws, "ranks", draws.ranks[:, *above_diagonal], places, alpha)
    in_turn = [Place(text="each step and the one after it")]
    yield _correlation(draws, "steps", draws.steps[:, None], in_turn, alpha)
    apart = [Place(text=f"elements {lag + 1} apart") for lag in range(draws.neighbours.shape[1])]
    yield _correlation(draws, "neighbours", draws.neighbours, apart, alpha)
    if P > 1:
        above_diagonal = np.triu_indices(P, k=1)
        pairs = draws.parameters[:, *above_diagonal]
        everything = pairs.sum(axis=1, keepdims=True)
        names = list(map(Place.of_parameter, parameters))
        places = [Place.of_pair(names[i], names[j]) for i, j in zip(*above_diagonal, strict=True)]
        yield _correlation(
            draws,
            "parameters",
            np.concatenate([everything, pairs], axis=1),
            [Place(text="any two parameters"), *places],
            alpha,
        )


def _correlation(
    draws: NoiseDraws, kind: str, products: Floats, places: Sequence[Place], alpha: float
) -> NoiseCheck:
    """Check of the pair whose correlation is least likely by chance.

    Args:
        products: [2, pairs] sums of products, and their number.
    """
    can_fail = np.flatnonzero(products[1] >= _FEWEST_PRODUCTS)
    title = f"correlation of {kind} in noise alone"
    if not len(can_fail):
        why = f"its noise is too small for correlations of {kind}"
        return untested(f"{CORRELATION}{kind}", title, why)
    total, num = products[:, can_fail]
    mean_square = draws.moments[..., 2].sum() / draws.moments[..., 0].sum()
    value = np.divide(total / num, mean_square, out=np.zeros_like(total), where=mean_square > 0)
    z = _normal_bound(len(can_fail), alpha)
    bound = z / np.sqrt(num)
    excess = np.abs(value) / bound
    worst = int(excess.argmax())
    num_failed = int((excess > 1).sum())
    found, reach, place = float(value[worst]), float(bound[worst]), places[int(can_fail[worst])]
    more = f" ({num_failed} of {len(can_fail)} are out of bounds)" if num_failed > 1 else ""
    return NoiseCheck(
        name=f"{CORRELATION}{kind}",
        title=title,
        value=found,
        low=max(found - reach, -1.0),
        high=min(found + reach, 1.0),
        expected=0.0,
        is_ok=num_failed == 0,
        place=place,
        sentence=_in_steps(
            draws,
            f"the correlation of its noise between {place.text} is {found:.4f} where chance "
            f"explains {reach:.4f}{more}",
        ),
        num_cells=len(can_fail),
        num_failed=num_failed,
        resolution=(z + NORMAL_95) / math.sqrt(num.max()),
    )


def _normal_bound(num_cells: int, alpha: float) -> float:
    return float(-special.ndtri(alpha / num_cells / 2))
