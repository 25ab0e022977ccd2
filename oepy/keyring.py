"""This host's keys on disk, and the state of a roll-over beside them.

`host.key` is the key in use, `host.key.next` the one that is being published, `host.key.retired` the one that was
in use before. `host.key.rotation` says how far the roll-over is; it is written before the step that it names
begins, and each step may be done twice, so a crash anywhere is mended by going on.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from oepy.errors import KeyFormatError
from oepy.keys import HostKey, fingerprint, is_encrypted, read_passphrase
from oepy.model import PublicKey
from oepy.privatefile import read_private_file


class Step(StrEnum):
    """In this order. What the zones hold: both keys from PUBLISH to SWITCH, the new one alone after WITHDRAW."""

    PUBLISH = "publish"  # the next key is being published beside the present one
    WAIT = "wait"  # every server has it; caches may not, until `until`
    SWITCH = "switch"  # the next key becomes the present one; the daemon must take it up
    WITHDRAW = "withdraw"  # the retired key is being withdrawn


@dataclass(frozen=True, slots=True)
class Rotation:
    """`cache_seconds` is for how long caches may hold what was published before; `until` is a time (seconds since
    1970) from which none does; `key` is the fingerprint of the new key."""

    step: Step
    key: str
    cache_seconds: int = 0
    until: float = 0.0


class KeyRing:
    """Files beside `path`, the key in use. Nothing is read before it is asked for. All raise KeyFormatError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = path.with_name(path.name + ".next")
        self.retired = path.with_name(path.name + ".retired")
        self.state = path.with_name(path.name + ".rotation")

    def published(self) -> tuple[PublicKey, ...]:
        """The keys that peers should find, the one in use first. The retired one is among them until its
        withdrawal: the daemon may still prove it."""
        keys = [self.path]
        if self.next.exists():
            keys.append(self.next)
        rotation = self.rotation()
        if self.retired.exists() and (rotation is None or rotation.step is not Step.WITHDRAW):
            keys.append(self.retired)
        return tuple(dict.fromkeys(HostKey.load(path).public for path in keys))

    def known(self) -> tuple[PublicKey, ...]:
        """All of this host's keys: by them it knows its own records."""
        return tuple(dict.fromkeys(key for _, _, key in self.listed()))

    def listed(self) -> list[tuple[str, Path, PublicKey]]:
        """State (`current`, `next`, `retired`), file, and public half of each key that is there."""
        files = (("current", self.path), ("next", self.next), ("retired", self.retired))
        return [
            (state, path, HostKey.load(path).public)
            for state, path in files
            if path == self.path or path.exists()
        ]

    # ---- the roll-over -----------------------------------------------------------------------------------

    def rotation(self) -> Rotation | None:
        """How far it is; None where none is under way."""
        if not self.state.exists():
            return None
        try:
            data: dict[str, Any] = json.loads(read_private_file(self.state))
            return Rotation(
                Step(data["step"]), str(data["key"]), int(data["cache_seconds"]), float(data["until"])
            )
        except (ValueError, KeyError, TypeError):
            raise KeyFormatError(
                f"{self.state} cannot be read",
                f"remove it; where {self.next} exists the roll-over starts anew",
            ) from None

    def begin(self, kind: str) -> Rotation:
        """Make the next key, or take the one that an interrupted beginning left."""
        if self.retired.exists():
            raise KeyFormatError(
                f"{self.retired} is left from an older roll-over", "remove it if nobody uses it"
            )
        if not self.next.exists():
            passphrase = read_passphrase(self.path) if is_encrypted(self.path) else None
            HostKey.generate(kind).save(self.next, passphrase)
        rotation = Rotation(Step.PUBLISH, fingerprint(HostKey.load(self.next).public))
        self.note(rotation)
        return rotation

    def note(self, rotation: Rotation) -> None:
        """Write the state, whole or not at all."""
        temporary = self.state.with_name(f".{self.state.name}.{secrets.token_hex(6)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as stream:
                json.dump(asdict(rotation), stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.state)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise KeyFormatError(f"cannot write {self.state}: {error.strerror}") from None

    def switch(self) -> None:
        """The next key becomes the one in use. There is a usable key at `path` at every moment."""
        if not self.next.exists():
            return  # done before a crash
        try:
            with contextlib.suppress(FileExistsError):
                os.link(self.path, self.retired)
            os.replace(self.next, self.path)
        except OSError as error:
            raise KeyFormatError(f"cannot switch to {self.next}: {error.strerror}") from None

    def finish(self) -> None:
        """Remove the retired key, then the state."""
        self.retired.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)
