"""The TUN devices of connections' marks. The mark of a packet chooses a routing table, that leads to a device of
its own, and so the process knows it."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator

from oepy.datapath import routes
from oepy.datapath.routes import MARK_TABLES
from oepy.datapath.tun.device import TunDevice
from oepy.errors import OepyError
from oepy.model import Mark, marked_device


class MarkedTuns:
    """Implements `seams.MarkedDevices`. Devices that nobody wants any more go with `sweep`, as one may be read from
    just then."""

    def __init__(self, name: str, mtu: int, poll: select.epoll) -> None:
        self._name, self._mtu, self._poll = name, mtu, poll
        self._numbers: dict[Mark, int] = {}
        self._devices: dict[Mark, TunDevice] = {}
        self._unwanted: set[Mark] = set()
        self.by_descriptor: dict[int, Mark] = {}
        """Of those that are wanted."""

    def open(self, mark: Mark) -> TunDevice:
        if mark in self._devices:
            self._unwanted.discard(mark)
            self.by_descriptor[self._devices[mark].fileno()] = mark
            return self._devices[mark]
        free = next((n for n in range(len(MARK_TABLES)) if n not in self._numbers.values()), None)
        if free is None:
            raise OepyError(f"{len(MARK_TABLES)} marks are in use", "fewer of them")
        device = TunDevice(marked_device(self._name, free))
        try:
            routes.set_up(device.name, self._mtu, mark, MARK_TABLES[free])
        except OepyError:
            routes.tear_down((MARK_TABLES[free],))
            device.close()
            raise
        self._numbers[mark], self._devices[mark] = free, device
        self.by_descriptor[device.fileno()] = mark
        self._poll.register(device, select.EPOLLIN)
        return device

    def close(self, mark: Mark) -> None:
        self._unwanted.add(mark)
        del self.by_descriptor[self._devices[mark].fileno()]

    def sweep(self) -> None:
        """The rule goes before the device: nothing is led to where nobody is."""
        for mark in self._unwanted:
            device = self._devices.pop(mark)
            with contextlib.suppress(OepyError):  # what is left of it leads nowhere
                routes.tear_down((MARK_TABLES[self._numbers.pop(mark)],))
            self._poll.unregister(device)
            device.close()
        self._unwanted.clear()

    def fallen(self) -> Iterator[tuple[str, Mark, int]]:
        """Device, mark and table of those that marked packets do not find."""
        for mark, device in self._devices.items():
            if not routes.stand(device.name, mark):
                yield device.name, mark, MARK_TABLES[self._numbers[mark]]
