"""Bounds for the archives of others, checked before anything is unpacked.

A few kilobytes can stand for gigabytes. `zipfile` reads no more of a member than its header says,
so that the sizes in the headers bound what is unpacked.
"""

from __future__ import annotations

import zipfile

FREE_BYTES = 64 << 20
"""Size up to which an archive may unpack, however small it is."""
MOST_RATIO = 50
"""Times an archive's own size that it may unpack to. Records hardly compress; replays repeat."""
_MOST_MEMBERS = 100_000


def check_bounds(archive: zipfile.ZipFile, archive_bytes: int, *, is_stored: bool = False) -> None:
    """Raise ValueError if an archive would unpack to more than records do, or repeats a name.

    Args:
        archive_bytes: size of the archive itself.
        is_stored: its members are not compressed, so that they are smaller than the archive.
    """
    members = archive.infolist()
    allowed = archive_bytes if is_stored else FREE_BYTES + MOST_RATIO * archive_bytes
    unpacked = sum(member.file_size for member in members)
    if unpacked > allowed or len(members) > _MOST_MEMBERS:
        raise ValueError(
            f"{len(members):,} members that unpack to {unpacked:,} bytes: expected at most "
            f"{_MOST_MEMBERS:,}, and {allowed:,} bytes."
        )
    if is_stored and any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("expected members that are not compressed.")
    if len({member.filename for member in members}) != len(members):
        raise ValueError("expected members of different names.")
