"""Which trap this host gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from oepy.config import Config
from oepy.interfaces import Trap, TrapPolicy
from oepy.model import Flow, IpAddress, PolicyGroup, Verdict


class NoTrap:
    """`trap: none`: nothing is caught; this host only answers peers and obeys `oepy initiate`."""

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        """Nothing to start."""

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        """Nothing is held."""

    def commit(self) -> None:
        """Nothing to commit."""

    def forget(self, destinations: Iterable[tuple[PolicyGroup, IpAddress]]) -> None:
        """Nothing is remembered."""

    def held(self) -> Mapping[tuple[PolicyGroup, IpAddress], int]:
        return {}

    def statistics(self) -> Mapping[str, int]:
        return {}

    def reload(self, policy: TrapPolicy) -> None:
        """Nothing to change."""

    def stop(self, *, guard: bool) -> None:
        """Nothing to remove."""


def open_trap(config: Config) -> Trap:
    """The trap of the configuration; `auto` is NFQUEUE, the one that this version has."""
    if config.trap == "none":
        return NoTrap()
    from oepy.trap.nfqueue import NfqueueTrap

    return NfqueueTrap()
