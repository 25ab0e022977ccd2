"""Files that commands read and write: configurations to convert, and keys."""

from __future__ import annotations

import sys
from pathlib import Path

from oepy.convert.drafts import MAX_FILE
from oepy.errors import UsageError
from oepy.privatefile import read_private_file, write_private_file


class ConvertFiles:
    """Implements `convert.openbsd.Files`; all files together are bounded."""

    def __init__(self) -> None:
        self._left = MAX_FILE

    def text(self, name: str) -> str:
        """A file of the command line, `-` for stdin. Raises UsageError."""
        try:
            return self._read(Path(name) if name != "-" else None).decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"{name} is no text in UTF-8", "convert it with iconv before") from None

    def include(self, name: str, file: str) -> tuple[str, bytes]:
        path = Path(file).parent / name
        return str(path), self._read(path)

    def key(self, name: str, file: str) -> bytes:
        return read_private_file(Path(file).parent / name, "the configuration names it")

    def _read(self, path: Path | None) -> bytes:
        try:
            if path is None:
                data = sys.stdin.buffer.read(self._left + 1)
            else:
                with path.open("rb") as stream:
                    data = stream.read(self._left + 1)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        self._left -= len(data)
        if self._left < 0:
            raise UsageError(f"the files have more than {MAX_FILE} bytes in all", "convert them in parts")
        return data


class KeyKeeper:
    """Collects keys, then writes each into a file of its own: none, where one of the files exists."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._keys: dict[Path, str] = {}

    def keep(self, name: str, key: str) -> str:
        path = self._directory / name
        self._keys[path] = key
        return str(path)

    def write(self) -> None:
        """Raises UsageError or KeyFormatError, before anything is written where a file exists."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make {self._directory}: {error.strerror}") from None
        there = [path for path in self._keys if path.exists()]
        if there:
            raise UsageError(f"{there[0]} exists", "a key is never overwritten: give another --keys-dir")
        for path, key in self._keys.items():
            write_private_file(path, key.encode() + b"\n")
