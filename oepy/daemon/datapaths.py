"""Which datapath this host gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from oepy.config import Config
from oepy.interfaces import Datapath, DatapathEvent
from oepy.model import Endpoint, SaCounters, SaPair
from oepy.udp import IkeSockets

OnIke = Callable[[bytes, Endpoint, Endpoint], None]


class NoDatapath:
    """`datapath: none`: negotiates and installs nothing, for measuring IKE. Protected packets go nowhere."""

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

    async def stop(self) -> None:
        self._spis.clear()


def open_datapath(config: Config, sockets: IkeSockets, on_ike: OnIke) -> tuple[str, Datapath]:
    """The datapath of the configuration with its name; `auto` is the userland one, which this version has.
    Its process reads the NAT-T sockets and hands IKE to `on_ike`."""
    if config.datapath == "none":
        return "none", NoDatapath()
    from oepy.datapath.tun.datapath import TunDatapath

    return "tun", TunDatapath(sockets.nat_t, on_ike, device=config.device)
