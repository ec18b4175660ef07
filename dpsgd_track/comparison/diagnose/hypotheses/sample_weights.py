"""The weights of samples that a clipped sum is best explained by, in words.

Legend: S steps, N samples, Q wrong parameters, K projections.
"""

from __future__ import annotations

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.attributes import law_of
from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Prediction
from dpsgd_track.comparison.diagnose.sample_groups import group_of
from dpsgd_track.record.trajectory import UNUSED, Floats

ALIKE = 1e-3
"""Relative spread up to which fitted weights are one."""
_FEW = 3
"""Samples that are named one by one."""
_MOST_LEVELS = 3
"""Amounts that groups of samples count by."""
_LISTED = 8
"""Missing samples that are listed."""
_ENOUGH = 1.25
"""Least number of projections a sample, for weights that are fitted."""


def any_weights(facts: Facts) -> Prediction:
    """The weights of samples that agree best, and what they have in common."""
    if not facts.has_sketches:
        return None
    gradients = facts.ours.sample_sketch[:, :, facts.columns].astype(np.float64)
    weights = np.full(facts.factor.shape, np.nan)
    for row in facts.rows.tolist():
        places = np.flatnonzero(facts.theirs.sample_index[row] != UNUSED)
        table = gradients[row, places].reshape(len(places), -1)
        if table.shape[1] < _ENOUGH * len(places):
            return None
        wanted = facts.theirs.gradient_sketch[row, facts.columns].ravel()
        if not np.isfinite(table).all() or not np.isfinite(wanted).all():
            return None
        weights[row, places] = np.linalg.lstsq(table.T, wanted, rcond=None)[0]
    return Fitted(facts.weighted(weights), _weights_in_words(facts, weights))


def _weights_in_words(facts: Facts, weights: Floats) -> str:
    """Property that the wrong weights of the first wrong step share."""
    t = facts.theirs
    for row in facts.rows.tolist():
        with np.errstate(all="ignore"):
            share = weights[row] / facts.factor[row]
        is_there = np.isfinite(share)
        if not is_there.any() or np.allclose(share[is_there], 1.0, atol=ALIKE):
            continue
        if _is_permuted(weights[row][is_there], facts.factor[row][is_there]):
            return "samples are multiplied by each other's clip factors, in another order"
        spared = is_there & (np.abs(share - 1) > ALIKE) & (np.abs(weights[row] - 1) < ALIKE)
        is_off = is_there & (np.abs(share - 1) > ALIKE)
        exceeding = is_there & (facts.factor[row] < 1 - ALIKE)
        if spared.sum() == is_off.sum() and (
            which := group_of(np.flatnonzero(spared), t, row, among=exceeding, baseline=facts.ours)
        ):
            return f"not clipped (counting with factor 1) are {which}, at step {t.step[row]}"
        if 0 < spared.sum() <= _FEW and spared.sum() == is_off.sum():
            shown = ", ".join(map(str, t.sample_index[row][spared].tolist()))
            which = f"sample {shown} is" if spared.sum() == 1 else f"samples {shown} are"
            return f"{which} not clipped (counting with factor 1) at step {t.step[row]}"
        is_lost = bool(np.all(np.abs(share[is_off]) < ALIKE))
        share = np.where(is_there & ~is_off, 1.0, 0.0) if is_lost else share
        if is_lost and (which := group_of(np.flatnonzero(is_off), t, row, baseline=facts.ours)):
            return f"missing are {which} at step {t.step[row]}"
        kinds = (
            ("sample", t.sample_index[row]),
            ("rank", t.sample_rank[row]),
            ("micro-batch", t.sample_micro_batch[row]),
        )
        if is_off.sum() > _FEW:
            kinds = (*kinds[1:], kinds[0])
        for kind, keys in kinds:
            said = _groups_in_words(kind, keys[is_there], share[is_there])
            if said:
                return f"{said} at step {t.step[row]}"
        amounts = share[is_off]
        if np.ptp(amounts) < ALIKE and (
            which := group_of(np.flatnonzero(is_off), t, row, baseline=facts.ours)
        ):
            return f"counting {_times(amounts[0])} are {which}, at step {t.step[row]}"
        if said := _levels_in_words(facts, share, is_there, row):
            return f"{said}, at step {t.step[row]}"
        if said := _of_factors_in_words(facts, weights[row], is_off, is_there, row):
            return said
        if found := law_of(facts, weights / facts.factor):
            return f"clip factors of samples are {found[1]}"
        if is_lost:
            shown = ", ".join(map(str, t.sample_index[row][is_off].tolist()[:_LISTED]))
            return (
                f"missing are {is_off.sum()} of {is_there.sum()} samples ({shown}"
                f"{', ...' * bool(is_off.sum() > _LISTED)}) at step {t.step[row]}"
            )
        if power := _power_of(facts.factor[row][is_there], weights[row][is_there]):
            return f"samples count with c^{power:.3g} in place of the factor c"
        low, high = float(share[is_there].min()), float(share[is_there].max())
        return f"samples count {low:.3g} to {high:.3g} times at step {t.step[row]}"
    return ""


def _levels_in_words(facts: Facts, share: Floats, is_there: np.ndarray, row: int) -> str:
    """`counting twice are the first ... and missing are the last ...`, of groups by amount."""
    said: list[str] = []
    left = is_there & (np.abs(share - 1) > ALIKE)
    while left.any() and len(said) < _MOST_LEVELS:
        value = float(share[np.flatnonzero(left)[0]])
        alike = left & (np.abs(share - value) < ALIKE * max(1.0, abs(value)))
        which = group_of(np.flatnonzero(alike), facts.theirs, row, baseline=facts.ours)
        if not which:
            return ""
        how = "missing" if abs(value) < ALIKE else f"counting {_times(value)}"
        said.append(f"{how} are {which}")
        left &= ~alike
    return "" if left.any() else " and ".join(said)


def _of_factors_in_words(
    facts: Facts, weights: Floats, is_off: np.ndarray, is_there: np.ndarray, row: int
) -> str:
    """Weights that are a power of the factors in one group, or a + b c in all samples."""
    factors = facts.factor[row]
    is_clipped = is_there & (factors < 1 - ALIKE)
    power = _power_of(factors[is_off], weights[is_off])
    if power is not None and is_off.sum() < is_clipped.sum():
        which = group_of(
            np.flatnonzero(is_off), facts.theirs, row, among=is_clipped, baseline=facts.ours
        )
        if which:
            return f"with c^{power:.3g} in place of the factor c count {which}"
    of, wanted = factors[is_there], weights[is_there]
    if len(of) > _FEW and np.ptp(of) > ALIKE:
        slope, start = np.polyfit(of, wanted, 1)
        if np.abs(start + slope * of - wanted).max() < ALIKE and abs(start) > ALIKE:
            return f"samples count with {start:.3g} + {slope:.3g} c in place of the factor c"
    return ""


def _power_of(factors: Floats, weights: Floats) -> float | None:
    """The power of the factors that the weights are, if they are one."""
    is_clipped = (factors < 1 - ALIKE) & (weights > 0)
    if is_clipped.sum() < _FEW or np.any(weights <= 0):
        return None
    with np.errstate(all="ignore"):
        powers = np.log(weights[is_clipped]) / np.log(factors[is_clipped])
    power = float(np.median(powers))
    return power if np.allclose(factors**power, weights, rtol=ALIKE) else None


def _is_permuted(weights: Floats, factors: Floats) -> bool:
    """True if weights are the samples' factors, not each its own."""
    ordered = np.allclose(np.sort(weights), np.sort(factors), ALIKE, ALIKE)
    return ordered and not np.allclose(weights, factors, ALIKE, ALIKE)


def _times(share: float) -> str:
    return "twice" if _amount(share) == "2" else f"{_amount(share)} times"


def _groups_in_words(kind: str, keys: np.ndarray, share: Floats) -> str:
    """`the samples of rank 1 count 0.5 times`; empty if groups of `keys` are not alike."""
    values = {key: share[keys == key] for key in sorted(set(keys.tolist()))}
    if any(np.ptp(v) > ALIKE * max(1.0, float(np.abs(v).max())) for v in values.values()):
        return ""
    wrong = {key: float(v.mean()) for key, v in values.items() if abs(v.mean() - 1) > ALIKE}
    if not wrong or (len(wrong) > _FEW and kind == "sample"):
        return ""
    amounts = {_amount(v) for v in wrong.values()}
    shown = ", ".join(map(str, wrong))
    plural = "es" if kind.endswith("ch") else "s"
    which = f"{kind}{plural * (len(wrong) > 1)} {shown}"
    who = which if kind == "sample" else f"the samples of {which}"
    is_one = kind == "sample" and len(wrong) == 1
    if len(amounts) > 1:
        listed = ", ".join(map(_amount, wrong.values()))
        return f"{who} count {listed} times"
    (amount,) = amounts
    if float(amount) == 0:
        return f"{who} {'is' if is_one else 'are'} missing"
    return f"{who} count{'s' * is_one} {'twice' if amount == '2' else f'{amount} times'}"


def _amount(share: float) -> str:
    """`0.5`; 0 for what is no more than rounding."""
    return f"{share if abs(share) > ALIKE else 0.0:.3g}"
