"""Where the matrix is played: two gateways with a subnet each, and a router between that can translate addresses.

    lan_a ──── oepy ──────────────────── router ─────────────────── peer ──── lan_b
    10.1.0.2   10.1.0.1   198.18.1.10   198.18.1.1   198.18.2.1   198.18.2.10   10.2.0.1   10.2.0.2
                          198.18.1.11 (seen as 198.18.2.1)        198.18.2.11 (seen as 198.18.1.1)

Who is behind the translator uses its second address, ….11; who moves goes to ….12. IPv6: 2001:2:101::/64 and
2001:2:102::/64 outside, 2001:2:1::/64 and 2001:2:2::/64 inside.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from oepy.lab.capture import Frame, Packet
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import Pinger, ping
from tests.interop.matrix.cases import OEPY, PEER, Setup

_SUBNETS = 12  # that the gateways have at most
_ETH_P_ALL = 3
_NAT = """
table ip nat {
    chain before {
        type nat hook prerouting priority dstnat;
        iifname "wan_a" ip daddr 198.18.1.1 udp dport { 500, 4500 } dnat to 198.18.2.11
        iifname "wan_b" ip daddr 198.18.2.1 udp dport { 500, 4500 } dnat to 198.18.1.11
    }
    chain after {
        type nat hook postrouting priority srcnat;
        oifname "wan_b" ip saddr 198.18.1.11 masquerade random
        oifname "wan_a" ip saddr 198.18.2.11 masquerade random
    }
}
"""


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class End:
    """Who speaks: where, from which address, and the one by which the other side calls it."""

    namespace: Namespace
    own: str
    called: str


class Ground:
    """`pace`: how much slower than this machine's own kernel everything is. Without `translates` (user-mode Linux
    has no nftables for it) nobody can be `natted`."""

    def __init__(self, lab: Lab, pace: float, *, translates: bool = True) -> None:
        self.pace = pace
        self.oepy, self.peer, self.router = (lab.namespace(label) for label in ("oepy", "peer", "router"))
        self.lan_a, self.lan_b = lab.namespace("lan_a"), lab.namespace("lan_b")
        for number, (gateway, lan, port) in enumerate(
            ((self.oepy, self.lan_a, "wan_a"), (self.peer, self.lan_b, "wan_b")), 1
        ):
            lab.veth(gateway, self.router, "eth0", port)
            lab.veth(lan, gateway, "eth0", "lan")
            outer, outer6 = f"198.18.{number}", f"2001:2:10{number}:"
            gateway.address("eth0", f"{outer}.10/24", f"{outer}.11/32", f"{outer6}:10/64")
            gateway.address("lan", f"10.{number}.0.1/24", f"2001:2:{number}::1/64")
            self.router.address(port, f"{outer}.1/24", f"{outer6}:1/64")
            # strongSwan's userland ESP wants an own address in each of its selectors
            more = (
                f"address add 2001:2:{number}:{extra:x}::1/64 dev lan nodad" for extra in range(1, _SUBNETS)
            )
            gateway.run("ip", "-batch", "-", input="\n".join(more) + "\n")
            lan.address("eth0", f"10.{number}.0.2/24", f"2001:2:{number}::2/64")
            for host, via, via6 in (
                (gateway, f"{outer}.1", f"{outer6}:1"),
                (lan, f"10.{number}.0.1", f"2001:2:{number}::1"),
            ):
                host.ip("route", "add", "default", "via", via)
                host.ip("-6", "route", "add", "default", "via", via6)
        for namespace in (self.oepy, self.peer, self.router):
            namespace.sysctl("net.ipv4.ip_forward", 1)
            namespace.sysctl("net.ipv6.conf.all.forwarding", 1)
            namespace.sysctl("net.ipv4.conf.all.promote_secondaries", 1)  # see `move`
        if translates:
            self.router.run("nft", "-f", "-", input=_NAT)
        self._translates = translates
        self.tap = Tap(self.router, "wan_a")
        self.given = ""  # the inner address that was assigned

    # ---- addresses -------------------------------------------------------------------------------------------

    def own(self, setup: Setup, side: str) -> str:
        """The outer address that this side itself knows."""
        number = 1 if side == OEPY else 2
        if setup.outer == 6:
            return f"2001:2:10{number}::10"
        return f"198.18.{number}.{11 if side in setup.natted else 10}"

    def seen(self, setup: Setup, side: str) -> str:
        """The outer address by which the other side reaches it."""
        if side not in setup.natted:
            return self.own(setup, side)
        return "198.18.2.1" if side == OEPY else "198.18.1.1"

    def selectors(self, setup: Setup, side: str) -> list[str]:
        """Empty: its own address, whatever it is."""
        if setup.inner == "hosts" or (setup.assigns and side == setup.begins):
            return []
        number = 1 if side == OEPY else 2
        if setup.inner_version == 4:
            return [f"10.{number}.0.0/24"]
        return [f"2001:2:{number}:{extra:x}::/64" for extra in range(setup.subnets)]

    def ends(self, setup: Setup) -> tuple[End, End]:
        """Who speaks on either side."""
        if setup.inner == "hosts":
            return (
                End(self.oepy, self.own(setup, OEPY), self.seen(setup, OEPY)),
                End(self.peer, self.own(setup, PEER), self.seen(setup, PEER)),
            )
        text = "10.{}.0.2" if setup.inner_version == 4 else "2001:2:{}::2"
        one, other = text.format(1), text.format(2)
        ends = End(self.lan_a, one, one), End(self.lan_b, other, other)
        if not setup.assigns:
            return ends
        if setup.begins == OEPY:
            return End(self.oepy, self.given, self.given), ends[1]
        return ends[0], End(self.peer, self.given, self.given)

    # ---- traffic ---------------------------------------------------------------------------------------------

    def _ways(self, setup: Setup) -> list[tuple[End, End]]:
        """Both; but in transport mode whoever is behind a translator can't be called from outside."""
        one, other = self.ends(setup)
        ways = [(one, other), (other, one)]
        if setup.mode == "transport" and setup.natted:
            return ways[:1] if OEPY in setup.natted else ways[1:]
        return ways

    def lost(self, setup: Setup, count: int = 3) -> int:
        """Of pings."""
        answers: list[float | None] = []
        for end, other in self._ways(setup):
            answers += ping(end.namespace, other.called, count=count, timeout=5.0, source=end.own)
        return answers.count(None)

    def traffic(self, setup: Setup) -> Traffic:
        return Traffic(self._ways(setup), 0.02 * self.pace)

    def forget_translations(self) -> None:
        """Else the next case's packets would be taken for the last one's."""
        if self._translates:
            with self.router.entered(), NFCTSocket() as conntrack:
                conntrack.flush()

    def speak_as(self, setup: Setup, side: str) -> None:
        """Of this side's addresses its kernel takes the right one, where a daemon leaves that to it."""
        if setup.outer == 4:
            number = 1 if side == OEPY else 2
            for way in ((f"198.18.{number}.0/24",), ("default", "via", f"198.18.{number}.1")):
                route = (*way, "dev", "eth0", "src", self.own(setup, side))
                (self.oepy if side == OEPY else self.peer).ip("route", "replace", *route)

    def move(self, side: str, *, back: bool = False) -> str:
        """This side's host goes to its other address. Returns that."""
        namespace, net = (self.oepy, "198.18.1") if side == OEPY else (self.peer, "198.18.2")
        old, new = (12, 10) if back else (10, 12)
        namespace.address("eth0", f"{net}.{new}/24")
        namespace.ip("address", "add" if back else "delete", f"{net}.11/32", "dev", "eth0")
        namespace.ip("address", "delete", f"{net}.{old}/24", "dev", "eth0")
        return f"{net}.{new}"

    def cut(self) -> None:
        """Nothing passes the router, in silence."""
        self._forwarding("add")

    def mend(self) -> None:
        self._forwarding("delete")

    def _forwarding(self, operation: str) -> None:
        for device in ("wan_a", "wan_b"):
            self.router.ip("rule", operation, "pref", "1", "iif", device, "blackhole")


class Tap:
    """What crosses one device of the router, kept by the kernel until it is looked at."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with namespace.entered():
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self._socket.bind((device, _ETH_P_ALL))
        self._socket.setblocking(False)

    def packets(self) -> list[Packet]:
        """Since the last call; neighbour discovery, multicast and NAT keepalives left out."""
        found = []
        while True:
            try:
                data = self._socket.recv(65_600)
            except BlockingIOError:
                break
            packet = Frame(0, data).packet()
            if packet is not None and packet.kind not in ("nd", "multicast", "keepalive"):
                found.append(packet)
        return found

    def close(self) -> None:
        self._socket.close()


class Traffic:
    """Pings that go on, several ways at once, each in a thread of its own."""

    def __init__(self, ways: list[tuple[End, End]], interval: float) -> None:
        self._interval = interval
        self._ended = threading.Event()
        self.sent = self.lost = 0
        self._pingers = []
        for end, other in ways:
            with end.namespace.entered():
                self._pingers.append(Pinger(other.called, source=end.own))
        self._threads = [threading.Thread(target=self._go_on, args=(one,)) for one in self._pingers]
        self._lock = threading.Lock()

    def _go_on(self, pinger: Pinger) -> None:
        sequence, answered = 0, set()
        due = time.monotonic()
        while not self._ended.is_set():
            sequence += 1
            with contextlib.suppress(OSError):  # no way, while the tunnel is down: lost like any other
                pinger.send(sequence & 0xFFFF)
            due += self._interval
            while (left := due - time.monotonic()) > 0:
                answered.add(pinger.receive(left))
        deadline = time.monotonic() + 5.0
        while len(answered - {None}) < sequence and (left := deadline - time.monotonic()) > 0:
            answered.add(pinger.receive(left))
        with self._lock:
            self.sent += sequence
            self.lost += sequence - len(answered - {None})

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Waits for the last answers; afterwards `sent` and `lost` are right."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        for pinger in self._pingers:
            pinger.close()
