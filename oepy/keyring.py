"""This host's keys on disk: the one in use, and those of a roll-over beside it (`.next`, `.retired`)."""

from __future__ import annotations

from pathlib import Path

from oepy.keys import HostKey
from oepy.model import PublicKey


class KeyRing:
    """Files beside `path`, the key in use. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = path.with_name(path.name + ".next")
        self.retired = path.with_name(path.name + ".retired")

    def published(self) -> tuple[PublicKey, ...]:
        """The keys that peers should find, the one in use first. Raises KeyFormatError."""
        return tuple(HostKey.load(path).public for path in (self.path, self.next) if self._counts(path))

    def known(self) -> tuple[PublicKey, ...]:
        """All of this host's keys: by them it knows its own records. Raises KeyFormatError."""
        files = (self.path, self.next, self.retired)
        return tuple(HostKey.load(path).public for path in files if self._counts(path))

    def _counts(self, path: Path) -> bool:
        return path == self.path or path.exists()
