"""Whatever happens to a byte of a spool: either all of it arrives, or the loss is told."""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.launcher import sync as launcher_sync
from dpsgd_track.launcher.sync import sync
from dpsgd_track.record.run import Status
from dpsgd_track.store.shipper import Shipper
from dpsgd_track.store.spool import MAGIC
from dpsgd_track.store.spooled import SpooledGroup
from tests.support.memory_store import MemoryStore
from tests.support.spooled_group import spool_a_group

CHECKED = "each value checked; the spool was removed"
STEPS = 12
Damage = Callable[[bytes, random.Random], bytes]


def turn_a_bit(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    turned = bytes((content[place] ^ 1 << rng.randrange(8),))
    return content[:place] + turned + content[place + 1 :]


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def cut_the_beginning(content: bytes, rng: random.Random) -> bytes:
    return content[rng.randrange(1, len(content) + 1) :]


def zero_a_page(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((16, 512, 4096))
    start = rng.randrange(len(content)) // size * size
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


def lose_a_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def repeat_a_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    return b"".join([*lines[: number + 1], *lines[number:]])


def put_in_an_unknown_kind(content: bytes, rng: random.Random) -> bytes:
    """A line whose checksum is right, as another program may write it."""
    lines = content.splitlines(keepends=True)
    line = rng.choice((b'{"do":"other"}', b"7", b'[0,0,0,"AAAA"]', b'{"do":"names","number":-1}'))
    lines[rng.randrange(len(lines))] = b"%08x %b\n" % (zlib.crc32(line, zlib.crc32(MAGIC)), line)
    return b"".join(lines)


DAMAGES: tuple[Damage, ...] = (
    turn_a_bit,
    cut,
    cut_the_beginning,
    zero_a_page,
    lose_a_line,
    repeat_a_line,
    put_in_an_unknown_kind,
)
SITUATIONS = ("nothing shipped", "half shipped", "all shipped", "killed")


def kill(group: Path) -> None:
    """Leave what launcher and a worker had written when they were killed."""
    for file in group.glob("00000[12]-*"):
        lines = file.read_bytes().splitlines(keepends=True)
        kept = b"".join(lines[: len(lines) * 2 // 3])
        count = b"%016x" % len(kept)
        file.write_bytes(kept[: len(MAGIC)] + count + kept[len(MAGIC) + len(count) :])


class Spools:
    """Copies of a spool in one situation, and what a store holds of it."""

    def __init__(self, folder: Path, situation: str) -> None:
        self.settings = Settings(tracking_uri="http://store", spool_dir=str(folder / "spool"))
        self.group = folder / "spool" / "g"
        self._whole, self._situation = folder / "whole" / "g", situation
        status = Status.FAILED if situation == "killed" else Status.FINISHED
        spool_a_group(folder / "whole", "g", STEPS, status)
        if situation == "killed":
            kill(self._whole)
        self._ship(MemoryStore(), self._whole)
        self.state = (self._whole / "state").read_bytes()
        (self._whole / "state").unlink()

    def _ship(self, store: MemoryStore, folder: Path, *, is_half: bool = False) -> None:
        shipper = Shipper(SpooledGroup(folder), store, self.settings.tracking_uri, "0")
        left = iter(range(3))
        shipper.ship((lambda: next(left, None) is None) if is_half else lambda: False)

    def lay_out(self) -> MemoryStore:
        """A fresh copy of the spool; returns the store it was shipped to so far."""
        shutil.rmtree(self.group, ignore_errors=True)
        shutil.copytree(self._whole, self.group)
        store = MemoryStore()
        if "shipped" in self._situation and self._situation != "nothing shipped":
            self._ship(store, self.group, is_half=self._situation == "half shipped")
        return store


def check(spools: Spools, seed: int, monkeypatch, capsys, expected: dict) -> str:
    """Damage one file in one place, and sync; returns what was damaged, and how."""
    rng = random.Random(seed)
    store = spools.lay_out()
    files = sorted(file for file in spools.group.rglob("*") if file.is_file())
    file = rng.choice([file for file in files if file.stat().st_size])
    damage = rng.choice(DAMAGES)
    before = file.read_bytes()
    after = damage(before, rng)
    file.write_bytes(after)
    what = f"{seed}: {file.name}: {damage.__name__}"
    sizes = {each: each.stat().st_size for each in spools.group.rglob("*") if each.is_file()}
    monkeypatch.setattr(launcher_sync, "open_store", lambda settings: (store, "0"))
    code = sync(spools.settings, None)
    said = capsys.readouterr().out
    if code == 0:
        assert store.contents() == expected, what
        assert not spools.group.exists(), what
        return what
    assert code == 1, what
    assert CHECKED not in said, what
    assert all(each.stat().st_size == size for each, size in sizes.items() if each.suffix), what
    assert str(file) in said, f"{what}: {said}"
    return ""


def check_many(tmp_path, monkeypatch, capsys, situation: str, seeds: range) -> list[str]:
    spools = Spools(tmp_path, situation)
    store = spools.lay_out()
    monkeypatch.setattr(launcher_sync, "open_store", lambda settings: (store, "0"))
    assert sync(spools.settings, None) == 0
    assert CHECKED in capsys.readouterr().out
    assert not spools.group.exists()
    expected = store.contents()
    harmless = [check(spools, seed, monkeypatch, capsys, expected) for seed in seeds]
    return list(filter(None, harmless))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_loss_is_silent(tmp_path, monkeypatch, capsys, situation):
    harmless = check_many(tmp_path, monkeypatch, capsys, situation, range(40))
    # The lock, the shipping state, and a count of bytes that lags behind hold no records.
    assert len(harmless) < 20


@pytest.mark.soak
@pytest.mark.parametrize("situation", SITUATIONS)
def test_no_loss_is_silent_in_twenty_thousand_damaged_spools(
    tmp_path, monkeypatch, capsys, situation
):
    check_many(tmp_path, monkeypatch, capsys, situation, range(1000, 6000))
