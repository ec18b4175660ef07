"""Whatever happens to a byte of a spool: either all of it arrives, or the loss is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damaged_spools import CHECKED, SITUATIONS, Spools, damage_and_sync, sync_to


def check(spools: Spools, seed: int, expected: dict) -> str:
    """Damage a spool, and sync; returns what was damaged, and how, where nothing was lost."""
    damaged = damage_and_sync(spools, seed)
    what = damaged.what
    if damaged.code == 0:
        assert damaged.store.contents() == expected, what
        assert not spools.group.exists(), what
        return what
    assert damaged.code == 1, what
    assert CHECKED not in damaged.said, what
    assert damaged.is_kept_whole, what
    assert str(damaged.file) in damaged.said, f"{what}: {damaged.said}"
    return ""


def check_many(folder: Path, situation: str, seeds: range) -> list[str]:
    spools = Spools(folder, situation)
    store = spools.lay_out()
    code, said = sync_to(spools, store)
    assert code == 0
    assert CHECKED in said
    assert not spools.group.exists()
    expected = store.contents()
    return list(filter(None, (check(spools, seed, expected) for seed in seeds)))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_loss_is_silent(tmp_path, situation):
    harmless = check_many(tmp_path, situation, range(40))
    # The lock, the shipping state, and a count of bytes that lags behind hold no records.
    assert len(harmless) < 20


@pytest.mark.soak
@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_loss_is_silent_in_twenty_thousand_damaged_spools(tmp_path, situation):
    check_many(tmp_path, situation, range(1000, 6000))
