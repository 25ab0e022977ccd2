"""Which trap this host gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from oepy.errors import OepyError
from oepy.interfaces import Trap, TrapPolicy
from oepy.model import AddressRange, Flow, IpAddress, PolicyGroup, Verdict


class NoTrap:
    """`trap: none`: nothing is caught; this host only answers peers and obeys `oepy initiate`."""

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        """Nothing to start."""

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        """Nothing is held."""

    def ask_for(self, on_asked: Callable[[int, Flow], None]) -> None:
        """Nothing is held."""

    def join(self, number: int, gone: Collection[AddressRange], fresh: Collection[AddressRange]) -> None:
        """Nothing is led anywhere."""

    def refuse(self, number: int) -> None:
        """Nothing is held."""

    def commit(self) -> None:
        """Nothing to commit."""

    def forget(self, destinations: Iterable[tuple[PolicyGroup, IpAddress]]) -> None:
        """Nothing is remembered."""

    def pass_by(self, source: IpAddress, lifetime: float) -> bool:
        return True  # as everything does

    def held(self) -> Mapping[tuple[PolicyGroup | int, IpAddress], int]:
        return {}

    def statistics(self) -> Mapping[str, int]:
        return {}

    def reload(self, policy: TrapPolicy) -> None:
        """Nothing to change."""

    def stop(self, *, guard: bool) -> None:
        """Nothing to remove."""


def choose_trap(wanted: str, datapath: str) -> tuple[str, str]:
    """(name, reason) for `trap:` and `datapath:` of the configuration. Tries what the kernel can, and leaves
    nothing. Raises OepyError with the mend where first packets cannot be caught."""
    if wanted == "acquire" and datapath in ("tun", "none"):
        raise OepyError(
            f"the kernel's trap goes with the kernel's datapath, not with `datapath: {datapath}`",
            "use `trap: nfqueue`",
        )
    if wanted != "auto":
        return wanted, "configured"
    if datapath == "none":
        return "nfqueue", "configured"
    from oepy.trap.probe import packet_queue

    lacking = packet_queue()
    if lacking is None:
        return "nfqueue", "packets can be queued"
    from oepy.datapath.xfrm.probe import probe

    if datapath == "tun" or probe().missing is not None:
        raise lacking
    return "acquire", f"no packet queue: {lacking.what}"


def open_trap(name: str) -> Trap:
    """The trap of this name."""
    if name == "none":
        return NoTrap()
    if name == "acquire":
        from oepy.trap.acquire import AcquireTrap

        return AcquireTrap()
    from oepy.trap.nfqueue import NfqueueTrap

    return NfqueueTrap()
