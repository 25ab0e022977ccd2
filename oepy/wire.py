"""One bounded cursor for every parser, and its counterpart for building. All integers are big-endian.

Every `pull_` checks the bound first and raises `ParseError`; there is no other way to the bytes, so a
parser built on `Reader` can neither read past the end nor loop on an element of length 0 unnoticed.
"""

from __future__ import annotations

import struct
from typing import Any

from oepy.errors import ParseError

_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")
_U64 = struct.Struct("!Q")


class Reader:
    """A cursor over `data[start:end]`; never copies until bytes are pulled."""

    __slots__ = ("_data", "_end", "_pos", "what")

    def __init__(self, data: bytes, start: int = 0, end: int | None = None, what: str = "message") -> None:
        self._data = data
        self._pos = start
        self._end = len(data) if end is None else end
        self.what = what
        if not 0 <= self._pos <= self._end <= len(data):
            raise ParseError(f"{what}: bounds {start}..{end} outside of {len(data)} bytes")

    @property
    def position(self) -> int:
        """Offset of the next byte from the start of the underlying buffer."""
        return self._pos

    @property
    def remaining(self) -> int:
        return self._end - self._pos

    def _advance(self, count: int) -> int:
        start = self._pos
        if count < 0 or start + count > self._end:
            raise ParseError(f"{self.what}: wants {count} bytes at {start}, has {self._end - start}")
        self._pos = start + count
        return start

    def pull_u8(self) -> int:
        return self._data[self._advance(1)]

    def pull_u16(self) -> int:
        value: int = _U16.unpack_from(self._data, self._advance(2))[0]
        return value

    def pull_u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._advance(4))[0]
        return value

    def pull_u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._advance(8))[0]
        return value

    def pull_bytes(self, count: int) -> bytes:
        start = self._advance(count)
        return self._data[start : start + count]

    def pull(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The fields of a fixed layout."""
        return layout.unpack_from(self._data, self._advance(layout.size))

    def pull_rest(self) -> bytes:
        start, self._pos = self._pos, self._end
        return self._data[start : self._end]

    def pull_reader(self, count: int, what: str | None = None) -> Reader:
        """A cursor over the next `count` bytes, which are skipped here."""
        start = self._advance(count)
        return Reader(self._data, start, start + count, what or self.what)

    def expect_end(self) -> None:
        if self.remaining:
            raise ParseError(f"{self.what}: {self.remaining} bytes left over")


class Writer:
    """Builds a wire structure; the mirror of `Reader`."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push_u8(self, value: int) -> None:
        self._buffer.append(value)

    def push_u16(self, value: int) -> None:
        self._buffer += _U16.pack(value)

    def push_u32(self, value: int) -> None:
        self._buffer += _U32.pack(value)

    def push_u64(self, value: int) -> None:
        self._buffer += _U64.pack(value)

    def push_bytes(self, value: bytes | bytearray | memoryview) -> None:
        self._buffer += value

    def finish(self) -> bytes:
        return bytes(self._buffer)
