"""Which datapath this host gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from oepy.config import Config
from oepy.connections.model import Child, ConnectionSet
from oepy.errors import OepyError
from oepy.interfaces import Datapath, DatapathEvent, HostAddresses
from oepy.model import (
    MAX_USERLAND_MARKS,
    Endpoint,
    IpAddress,
    IpNetwork,
    Mark,
    SaCounters,
    SaPair,
    marked_device,
)
from oepy.udp import IkeSockets

OnIke = Callable[[bytes, Endpoint, Endpoint], None]
MAX_DEVICE_NAME = 15


class NoDatapath:
    """`datapath: none`: negotiates and installs nothing, for measuring IKE. Protected packets go nowhere."""

    waits = False

    def __init__(self) -> None:
        self._spis: set[int] = set()

    async def start(self, on_event: Callable[[DatapathEvent], None]) -> None:
        """Nothing to start."""

    def allocate_spi(self) -> int:
        while True:
            spi = int.from_bytes(os.urandom(4), "big")
            if spi >= 256 and spi not in self._spis:
                return spi

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        self._spis.add(pair.spi_in)

    async def remove(self, spi_in: int) -> None:
        self._spis.discard(spi_in)

    async def counters(self, spis: Collection[int] | None = None) -> Sequence[SaCounters]:
        wanted = self._spis if spis is None else self._spis & set(spis)
        return [SaCounters(spi) for spi in wanted]

    async def statistics(self) -> Mapping[str, int]:
        return {}

    async def stop(self) -> None:
        self._spis.clear()


def userland_lacks(child: Child) -> Iterator[str]:
    """What of a connection's child the userland datapath cannot do: each with its mend."""
    for name, mark in (
        ("mark_in", child.marks.inward),
        ("set_mark_in", child.marks.set_inward),
    ):
        if mark is not None:
            yield f"{name} is the kernel's, and this host has the datapath tun: leave it away"
    for name, wanted, has in (
        ("copy_df", child.copied.df, "no"),
        ("copy_ecn", child.copied.ecn, "no"),
        ("copy_dscp", child.copied.dscp_in, "out or no"),
    ):
        if wanted:
            yield f"{name} with this value is the kernel's, and this host has the datapath tun: {has}"
    if child.ah_proposals:
        yield "AH is the kernel's, and this host has the datapath tun: take ESP"


def userland_confuses(configured: ConnectionSet, device: str) -> Iterator[str]:
    """The userland datapath has a device for each `mark_out`, so that a packet may have only one of them."""
    marks: dict[Mark, str] = {}
    for connection in configured.connections:
        for child in connection.children:
            if child.marks.outward is not None:
                marks.setdefault(child.marks.outward, connection.label(child))
    for mark, label in marks.items():
        other = next((each for each in marks if each != mark and each.overlaps(mark)), None)
        if other is not None:
            text = f"a packet may have its mark_out {mark} and that of {marks[other]}, {other}"
            yield f"{label}: {text}: with the datapath tun, take one mask for all"
    if len(marks) > MAX_USERLAND_MARKS:
        yield f"{len(marks)} different mark_out: with the datapath tun, {MAX_USERLAND_MARKS} at most"
    longest = marked_device(device, MAX_USERLAND_MARKS - 1)
    if marks and len(longest) > MAX_DEVICE_NAME:
        yield f"device {device}: there is no room for names of devices for mark_out, as {longest}: a shorter one"


class NoHostAddresses:
    """Where there is no device that could have them."""

    async def apply(self, addresses: Collection[IpAddress], routes: Mapping[IpNetwork, IpAddress]) -> None:
        """Raises OepyError where there is something to do."""
        if addresses:
            raise OepyError("this datapath has no device for the addresses that a peer gives")


@dataclass(frozen=True, slots=True)
class Chosen:
    """A datapath, not started yet, and what follows from it for the rest of the daemon."""

    name: str  # xfrm, tun or none
    datapath: Datapath
    reason: str  # why this one
    mode: str = ""  # of xfrm: interface; mark where the kernel has no XFRM interfaces; bare with its own trap
    reads_nat_t: bool = False  # its process reads port 4500
    encap_only: bool = False  # it speaks ESP in UDP only
    aggregates: bool = False  # it knows AGGFRAG payloads (RFC 9347)
    device: str | None = None  # from which decrypted packets come, where they come from one
    host: HostAddresses = field(default_factory=NoHostAddresses)

    @property
    def kernel_ipsec(self) -> bool:
        return self.name == "xfrm"


def choose(wanted: str) -> tuple[str, str, str]:
    """(name, mode, reason) for `datapath:` of the configuration. Tries what the kernel can, and changes nothing.
    Raises OepyError where `xfrm` is wanted and cannot be had."""
    if wanted in ("none", "tun"):
        return wanted, "", "configured"
    from oepy.datapath.xfrm.probe import probe

    found = probe()
    if found.missing is not None:
        if wanted == "xfrm":
            raise OepyError(found.missing.what, found.missing.mend)
        return "tun", "", f"no kernel ESP: {found.missing.what}"
    if found.interface.error is not None:
        return "xfrm", "mark", f"kernel ESP works; {found.interface.error.what}"
    return "xfrm", "interface", "kernel ESP and XFRM interfaces work"


def open_datapath(config: Config, sockets: IkeSockets, on_ike: OnIke, *, bare: bool = False) -> Chosen:
    """`_open_datapath`, and where there is a device, the addresses that it may have."""
    chosen = _open_datapath(config, sockets, on_ike, bare=bare)
    if chosen.name == "none" or chosen.device is None:
        return chosen
    from oepy.datapath.addresses import DeviceAddresses

    return replace(chosen, host=DeviceAddresses(chosen.device))


def _open_datapath(config: Config, sockets: IkeSockets, on_ike: OnIke, *, bare: bool) -> Chosen:
    """The datapath of the configuration. `bare`: the kernel's own trap is beside it, so that all traffic, and not
    only what is marked or goes by the device, is subject to its policies. Raises OepyError with the mend.

    `auto` takes the kernel's ESP where an SA can be installed, else the userland one, whose process reads the
    NAT-T sockets and hands IKE to `on_ike`."""
    name, mode, reason = choose("xfrm" if bare else config.datapath)
    if name == "none":
        return Chosen(name, NoDatapath(), reason, device=config.device)
    if name == "tun":
        from oepy.datapath.tun.datapath import TunDatapath
        from oepy.datapath.xfrm.leftovers import remove_all

        remove_all(config.device)
        userland = TunDatapath(sockets.nat_t, on_ike, device=config.device)
        return Chosen(
            name, userland, reason, reads_nat_t=True, encap_only=True, aggregates=True, device=config.device
        )
    from oepy.datapath.xfrm.datapath import XfrmDatapath
    from oepy.datapath.xfrm.plan import BARE, BY_DEVICE, BY_MARK

    if bare:
        mode = BARE.name
    scheme = {found.name: found for found in (BARE, BY_DEVICE, BY_MARK)}[mode]
    kernel = XfrmDatapath(sockets.ike, sockets.nat_t, device=config.device, scheme=scheme)
    return Chosen(name, kernel, reason, mode, device=config.device if mode == "interface" else None)
