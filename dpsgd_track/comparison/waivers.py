"""Drifts that are known and accepted for a while: they stay visible, but fail nothing."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsgd_track.comparison.measure.observables import OBSERVABLES
from dpsgd_track.config import REGIMES, require
from dpsgd_track.modes.table import MODES, is_private, plugged_in_modes
from dpsgd_track.yaml_file import read_yaml

if TYPE_CHECKING:
    from dpsgd_track.comparison.measure.excess import Excess
    from dpsgd_track.comparison.verdict import Finding

ANY = "*"
"""Matches any text, also within a pattern."""

_LONG = datetime.timedelta(days=366)
"""Validity from which on a waiver is warned of."""
_REQUIRED = ("mode", "observable", "reason", "expires")
_ITEMS = ("layer", "parameter")
"""Items that `where` can name: a drift records all of them, but only the largest of other items."""


@dataclass(frozen=True, kw_only=True)
class Waiver:
    """One accepted drift."""

    mode: str
    """Label of the mode; `*` for any."""
    observable: str
    """Name of the observable; `*` for any."""
    reason: str
    expires: datetime.date
    """Last day of validity."""
    regime: str = ANY
    where: str = ANY
    """Layer or parameter, as named in a finding; `*` for any."""
    up_to: float | None = None
    """Largest drift that is accepted; None for any."""

    @property
    def title(self) -> str:
        """The subject of the waiver: `gradient of ghost_fsdp in clip`."""
        regime = "" if self.regime == ANY else f" in {self.regime}"
        where = "" if self.where == ANY else f" at {self.where}"
        return f"{self.observable} of {self.mode}{regime}{where}"


def load_waivers(path: Path) -> tuple[Waiver, ...]:
    """Load the waivers from the YAML file `path`.

    Raises:
        ValueError: the file is missing or not YAML in UTF-8, or a waiver in it is incomplete, has
            an unknown key, or can never apply.
    """
    name = str(path)
    try:
        raw = read_yaml("waivers", path)
    except FileNotFoundError:
        raise ValueError(
            f"waivers={name!r}: expected a file that can be read. Check --waivers."
        ) from None
    raw = [] if raw is None else raw
    require(isinstance(raw, list), "waivers", name, "a list of waivers at the top")
    return tuple(_waiver(entry, f"{path.name}[{number}]") for number, entry in enumerate(raw))


def _waiver(entry: Any, place: str) -> Waiver:
    known = [field.name for field in fields(Waiver)]
    require(isinstance(entry, Mapping), place, entry, f"a mapping of {', '.join(known)}")
    for key in entry:
        require(key in known, f"{place}, key", key, f"one of {', '.join(known)}")
    for key in _REQUIRED:
        require(entry.get(key) is not None, f"{place}.{key}", None, "a value")
    texts = {}
    for key in ("mode", "observable", "reason", "regime", "where"):
        if key in entry:
            text = entry[key]
            is_text = isinstance(text, str) and bool(text.strip())
            require(is_text, f"{place}.{key}", text, "a text that is not empty")
            texts[key] = " ".join(text.split())
    waiver = Waiver(**texts, expires=_date(entry["expires"], place), up_to=_up_to(entry, place))
    _check_reach(waiver, place)
    return waiver


def _date(value: Any, place: str) -> datetime.date:
    # YAML parses 2026-12-31 as a date, unless it is quoted.
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        with contextlib.suppress(ValueError):
            value = datetime.date.fromisoformat(value)
    require(type(value) is datetime.date, f"{place}.expires", value, "a date such as 2026-12-31")
    return value


def _up_to(entry: Mapping[str, Any], place: str) -> float | None:
    value = entry.get("up_to")
    if value is None:
        return None
    try:  # YAML 1.1 reads 1e-3 as a string
        bound = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        bound = float("nan")
    is_number = bool(np.isfinite(bound)) and bound > 0
    require(is_number, f"{place}.up_to", value, "a number > 0")
    return bound


def _check_reach(waiver: Waiver, place: str) -> None:
    """Raise ValueError if the waiver could match nothing that is compared, or everything."""
    is_any_mode = all(matches(waiver.mode, name) for name in MODES if is_private(name))
    is_any_observable = all(matches(waiver.observable, name) for name in OBSERVABLES)
    is_named = not (is_any_mode and is_any_observable)
    require(is_named, f"{place}.mode", waiver.mode, "a name, where the observable is any")
    mode = waiver.mode.partition("@")[0]
    known = [*MODES, *plugged_in_modes()]
    advice = "Or opacus:GRAD_SAMPLE_MODE, or package.module:factory; each also with @VARIANT."
    is_mode = ":" in mode or any(matches(mode, name) for name in known)
    require(is_mode, f"{place}.mode", waiver.mode, f"one of {', '.join(known)}", advice)
    _check_known(waiver.observable, OBSERVABLES, f"{place}.observable")
    _check_known(waiver.regime, REGIMES, f"{place}.regime")
    if waiver.where != ANY:
        of = [name for name, o in OBSERVABLES.items() if o.items in _ITEMS]
        advice = f"`where` is for {', '.join(of)}."
        has_items = any(matches(waiver.observable, name) for name in of)
        allowed = "no where with this observable"
        require(has_items, f"{place}.where", waiver.where, allowed, advice)
        allowed = "`layer NAME` or `parameter NAME`"
        is_item = waiver.where.startswith((*(f"{item} " for item in _ITEMS), ANY))
        require(is_item, f"{place}.where", waiver.where, allowed)


def _check_known(pattern: str, known: Collection[str], setting: str) -> None:
    found = any(matches(pattern, name) for name in known)
    require(found, setting, pattern, f"one of {', '.join(known)}")


def matches(pattern: str, text: str) -> bool:
    """True if `text` matches `pattern`, in which each `*` stands for any text.

    The first place where a part fits is as good as any later one, so that none is tried twice.
    """
    first, *parts = pattern.split(ANY)
    if not parts:
        return pattern == text
    *inner, last = parts
    if not text.startswith(first):
        return False
    place = len(first)
    for part in inner:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return text.endswith(last) and len(text) - len(last) >= place


def waiver_of(
    finding: Finding,
    label: str,
    excess: Excess,
    waivers: Iterable[Waiver],
    today: datetime.date,
) -> Waiver | None:
    """The first of `waivers` that accepts `finding` of the mode `label`; None if none does.

    Only drifts can be accepted; failed runs, NaN and missing comparisons cannot.

    Args:
        excess: the drift that the finding was made from.
    """
    over = excess.by_item > excess.limits
    values = excess.by_item[over] if over.any() else excess.drift.per_step
    largest = float(np.nanmax(values))
    if not np.isfinite(largest):
        return None
    for waiver in waivers:
        if (
            today <= waiver.expires
            and matches(waiver.mode, label)
            and matches(waiver.observable, excess.drift.observable.name)
            and matches(waiver.regime, finding.regime)
            and (waiver.up_to is None or largest <= waiver.up_to)
            and _is_all_there(excess, waiver.where)
        ):
            return waiver
    return None


def _is_all_there(excess: Excess, where: str) -> bool:
    """True if `where` names every layer or parameter that is over its limit.

    A finding names the largest only, and a known drift may hide a new one.
    """
    if where == ANY:
        return True
    kind = excess.drift.observable.items
    over = np.flatnonzero(np.any(excess.by_item > excess.limits, axis=0))
    return kind in _ITEMS and all(
        matches(where, f"{kind} {excess.drift.items[item]}") for item in over
    )


def waiver_notes(
    waivers: Iterable[Waiver], used: Collection[Waiver], today: datetime.date
) -> tuple[str, ...]:
    """A sentence for each waiver that has expired, was not needed, or has long to go."""
    notes = []
    for waiver in waivers:
        if waiver.expires < today:
            notes.append(
                f"The waiver for {waiver.title} expired on {waiver.expires} and was not applied "
                f"(its reason: {waiver.reason})."
            )
            continue
        if waiver.expires > today + _LONG:
            notes.append(
                f"The waiver for {waiver.title} expires on {waiver.expires}, more than a year from "
                "now: a drift that is accepted for so long is a threshold. Choose a nearer date."
            )
        if waiver not in used:
            notes.append(
                f"The waiver for {waiver.title} was not needed: no such drift was found "
                f"(its reason: {waiver.reason})."
            )
    return tuple(notes)
