"""A lab in which libreswan's plutos and oepy's daemons meet, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from oepy.control import protocol
from oepy.lab import demo
from oepy.lab.capture import Capture
from oepy.lab.libreswan import Pluto
from oepy.lab.network import HostPlan, LabHost, LabNetwork
from oepy.lab.probe import ping

PATIENCE = 60  # pings, for a peer that loses the first ones
REPLY_SECONDS = 5.0  # an emulated machine holds the first packet for a second


@dataclass
class Ground:
    network: LabNetwork
    plutos: dict[str, Pluto]
    capture: Capture

    def host(self, name: str) -> LabHost:
        return self.network.hosts[name]

    def until_answered(self, source: HostPlan, target: HostPlan, timeout: float = REPLY_SECONDS) -> int:
        """How many pings were lost before the first reply. Fails where none comes."""
        for lost in range(PATIENCE):
            if ping(self.host(source.name).namespace, target.v4, timeout=timeout) != [None]:
                return lost
        running = [host for host in self.network.hosts.values() if host.plan.daemon]
        events = [str(host.client.get(protocol.EVENTS)[-20:]) for host in running]
        raise AssertionError("\n".join([*events, *(pluto.log_end() for pluto in self.plutos.values())]))

    def only_esp(self, since: float, one: HostPlan, other: HostPlan) -> bool:
        packets = [packet for packet in self.capture.packets() if packet.time >= since]
        seen = demo.between(packets, one.v4, other.v4)
        return seen["clear"] == 0 and seen["esp"] > 0

    def authenticated(self, name: str, peer: HostPlan) -> set[str]:
        sas = self.host(name).client.get(protocol.SAS)
        return {sa["authenticated"] for sa in sas if sa["peer"] == peer.v4}
