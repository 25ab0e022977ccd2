"""What the matrix asks of a peer."""

from __future__ import annotations

from typing import Protocol

from tests.interop.matrix.cases import Setup


class Peer(Protocol):
    """One running daemon of another implementation. Whatever it refuses raises OepyError or AssertionError."""

    name: str
    version: str
    rekeys_on_command: bool  # else as `Setup.peer_rekeys` says
    rekeys_within: float  # seconds
    asks_within: float  # seconds of silence, at least, until it asks whether the other side is there

    def start(self) -> None: ...

    def load(self, setup: Setup) -> None:
        """Its side of this setup, and nothing else."""

    def up(self) -> None:
        """Begin, and wait until it is up."""

    def down(self) -> None:
        """End it, telling the other side."""

    def take_address(self, address: str) -> None:
        """It was assigned to it, and is to be an address of its host."""

    def rekey(self, *, ike: bool) -> None: ...

    def children(self) -> int:
        """How many CHILD SAs are up."""

    def clear(self) -> None:
        """Forget all SAs, whatever happens."""

    def log(self) -> str: ...

    def stop(self) -> None: ...
