"""Opens npz archives with large arrays left in the file, to be read by rows on demand."""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dpsgd_track.record.archive_bounds import check_bounds

_CHUNK = 1 << 20
# The fixed part of a member's header: PKWARE, APPNOTE.TXT 6.3.10, section 4.3.7.
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


class TornFile(Exception):
    """The file is not an archive, or is incomplete; the message says what is wrong."""


class _OpenFile:
    """A file that stays readable after it is unlinked."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on.

        Raises:
            ValueError: the file has become shorter.
        """
        while buffer:
            count = os.preadv(self.descriptor, [buffer], offset)
            if not count:
                raise ValueError("trajectory file: expected it to stay as it was when opened.")
            buffer, offset = buffer[count:], offset + count


@dataclass(frozen=True)
class FileColumn:
    """An array in a file, in C order."""

    file: _OpenFile
    offset: int
    """Offset of the first row in the file, in bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop`."""
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        if rows.size:
            row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
            self.file.read_into(rows.data.cast("B"), self.offset + start * row_bytes)
        return rows


def open_archive(
    path: Path, apart: Collection[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, FileColumn]]:
    """The arrays of an npz file; those named in `apart` are left in the file.

    Every byte is read once and checked against its checksum. An array that is compressed or not in
    C order cannot be read by rows and is returned with the others.

    Raises:
        TornFile: it is not an npz file, or is incomplete.
    """
    values: dict[str, NDArray[Any]] = {}
    columns: dict[str, FileColumn] = {}
    with _said_as_torn():
        file = _OpenFile(path)
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            check_bounds(archive, path.stat().st_size)
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                column = _column(archive, member, file) if name in apart else None
                if column is None:
                    _require_whole(archive, member)
                    with archive.open(member) as content:
                        values[name] = npy.read_array(content, allow_pickle=False)
                else:
                    columns[name] = column
    return values, columns


# RuntimeError: encrypted, or nested without end. NotImplementedError: an unknown compression.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    # numpy parses the header of an array as Python.
    tokenize.TokenError,
    SyntaxError,
)


@contextmanager
def _said_as_torn() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # numpy reads headers of other ages, with a warning to the terminal. None is ours.
            for category in (UserWarning, DeprecationWarning):
                warnings.simplefilter("error", category)
            yield
    except (*_UNREADABLE, UserWarning, DeprecationWarning) as error:
        raise TornFile(str(error)) from error


def _header(content: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Shape, order and type of an array; None for a version of the format without shapes here."""
    version = npy.read_magic(content)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read_header:
        return None
    shape, is_fortran, dtype = read_header[version](content)
    return shape, is_fortran, dtype


def _require_whole(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError unless an array is as large as its header says: space is made for that."""
    with archive.open(member) as content:
        header = _header(content)
        if header is None:
            raise ValueError(f"{member.filename}: expected version 1 or 2 of the npy format.")
        shape, _, dtype = header
        num_bytes = member.file_size - content.tell()
    if min(shape, default=0) < 0 or num_bytes != prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} holds {num_bytes} bytes, not a whole array.")


def _column(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: _OpenFile
) -> FileColumn | None:
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with archive.open(member) as content:
        header = _header(content)
        if header is None:
            return None
        shape, is_fortran, dtype = header
        if (is_fortran and len(shape) > 1) or dtype.hasobject:
            return None
        header_bytes = content.tell()
        # Reading to the end verifies the checksum.
        num_bytes = 0
        while chunk := content.read(_CHUNK):
            num_bytes += len(chunk)
    if num_bytes != prod(shape) * dtype.itemsize:
        raise ValueError(f"{member.filename} holds {num_bytes} bytes, not a whole array.")
    start = bytearray(_LOCAL_HEADER.size)
    file.read_into(memoryview(start), member.header_offset)
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(start)
    before = _LOCAL_HEADER.size + name_bytes + extra_bytes + header_bytes
    return FileColumn(file, member.header_offset + before, shape, dtype)
