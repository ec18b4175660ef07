"""Spools of which a byte, a line or a page is not what was written, in several situations."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

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


@dataclass(frozen=True)
class Damaged:
    """A spool that was damaged in one place, and what `sync` made of it."""

    what: str
    """Seed, file and damage."""
    file: Path
    is_kept_whole: bool
    """True if no file of the spool was removed or cut."""
    store: MemoryStore
    code: int
    said: str


def sync_to(spools: Spools, store: MemoryStore) -> tuple[int, str]:
    """Exit code of `sync`, and what it says."""
    said = io.StringIO()
    opened = mock.patch.object(launcher_sync, "open_store", return_value=(store, "0"))
    with opened, contextlib.redirect_stdout(said):
        return sync(spools.settings, None), said.getvalue()


def damage_and_sync(spools: Spools, seed: int) -> Damaged:
    """Damage one file of a fresh copy in one place, and sync."""
    rng = random.Random(seed)
    store = spools.lay_out()
    files = sorted(file for file in spools.group.rglob("*") if file.is_file())
    file = rng.choice([file for file in files if file.stat().st_size])
    damage = rng.choice(DAMAGES)
    file.write_bytes(damage(file.read_bytes(), rng))
    sizes = {each: each.stat().st_size for each in spools.group.rglob("*") if each.is_file()}
    code, said = sync_to(spools, store)
    return Damaged(
        what=f"{seed}: {file.name}: {damage.__name__}",
        file=file,
        is_kept_whole=all(
            each.exists() and each.stat().st_size == size
            for each, size in sizes.items()
            if each.suffix
        ),
        store=store,
        code=code,
        said=said,
    )
