"""The datapath process: `python -m oepy.datapath.tun.process`, started by `TunDatapath` with its sockets.

It ends when told to (`stop`: rules and routes are removed), or when the daemon is gone (end of the control
channel). In that second case the mark's rule and its `unreachable` route stay: the trap's sets still mark
packets until their elements run out, and those must not find the main table. The next start takes them over.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

from oepy.datapath import routes
from oepy.datapath.routes import TUNNEL_MTU
from oepy.datapath.tun import control
from oepy.datapath.tun.device import OuterUdp, TunDevice
from oepy.datapath.tun.forwarder import Forwarder
from oepy.datapath.tun.marked import MarkedTuns
from oepy.errors import OepyError, ParseError
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, IpAddress

PACKETS_PER_TURN = 128
READS_PER_TURN = 16  # each up to 64 KiB: about a thousand packets before the other direction has its turn
MAX_WAITING = 1024  # messages for a daemon that does not read
_TICK_SECONDS = 1.0
ROUTES_SECONDS = 5.0  # between two looks whether device, rules and routes are as they were made


class _Process:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._control = socket.socket(fileno=arguments.control)
        self._ike = socket.socket(fileno=arguments.ike)
        for channel in (self._control, self._ike):
            channel.setblocking(False)
        self._outers = [OuterUdp(descriptor) for descriptor in arguments.outer]
        self._waiting: deque[bytes] = deque()
        self._poll = select.epoll()
        self.ended = False
        self._name, self._mtu = arguments.device, arguments.mtu
        self._device = TunDevice(arguments.device)
        routes.forget_marks()
        routes.set_up(arguments.device, arguments.mtu)
        self._marked = MarkedTuns(arguments.device, arguments.mtu, self._poll)
        self._forwarder = Forwarder(
            self._device,
            {outer.version: outer for outer in self._outers},
            arguments.mtu,
            self._on_event,
            self._on_ike,
            _is_own,
            self._marked,
        )
        self._operations: dict[str, Callable[[control.Json], object]] = {
            "install": self._install,
            "remove": lambda request: self._forwarder.remove(request["spi"]),
            "spis": lambda _: [pair.pair.spi_in for pair in self._forwarder.database],
            "counters": self._counters,
            "statistics": lambda _: dict(self._forwarder.counters),
            "stop": self._stop,
        }

    # -- the daemon's requests -----------------------------------------------------------------------

    def _install(self, request: control.Json) -> None:
        self._forwarder.install(control.decode_pair(request["pair"]), request["outbound"], time.monotonic())

    def _counters(self, request: control.Json) -> list[object]:
        found = (self._forwarder.database.get(spi) for spi in request["spis"][: control.SPIS_PER_ANSWER])
        return [control.encode_counters(pair.counters()) for pair in found if pair is not None]

    def _stop(self, _request: control.Json) -> None:
        routes.tear_down()
        self.ended = True

    def _on_control(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            try:
                data = self._control.recv(control.MAX_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self.ended = True
                return
            request = control.decode(data)
            answer: control.Json = {"id": request["id"]}
            try:
                answer["result"] = self._operations[request["op"]](request)
            except (OepyError, ValueError) as error:
                answer["error"] = str(error)
            self._tell(control.encode(answer))

    def _on_event(self, event: DatapathEvent) -> None:
        if len(self._waiting) < MAX_WAITING:
            self._tell(control.encode(control.encode_event(event)))
        else:
            self._forwarder.counters["events_lost"] += 1

    def _tell(self, message: bytes) -> None:
        self._waiting.append(message)
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            try:
                self._control.send(self._waiting[0])
            except BlockingIOError:
                break
            except (BrokenPipeError, ConnectionResetError):
                self.ended = True
                self._waiting.clear()
                break
            self._waiting.popleft()
        interest = select.EPOLLIN | (select.EPOLLOUT if self._waiting else 0)
        self._poll.modify(self._control.fileno(), interest)

    def _mend_routes(self) -> None:
        """Other programs flush rules, and a device that is set down loses its routes: until they are back,
        what is marked goes nowhere."""
        try:
            if not routes.stand(self._name):
                self._forwarder.counters["routes_mended"] += 1
                routes.set_up(self._name, self._mtu)
            for name, mark, table in self._marked.fallen():
                self._forwarder.counters["routes_mended"] += 1
                routes.set_up(name, self._mtu, mark, table)
        except OepyError:
            self._forwarder.counters["routes_failed"] += 1

    def _on_ike(self, data: bytes, local: Endpoint, remote: Endpoint) -> None:
        try:
            self._ike.send(control.encode_ike(data, local, remote))
        except OSError:  # full, or the daemon is gone: IKE sends again
            self._forwarder.counters["ike_lost"] += 1

    # -- the loop ------------------------------------------------------------------------------------

    def run(self) -> None:
        self._poll.register(self._control, select.EPOLLIN)
        self._poll.register(self._device, select.EPOLLIN)
        by_descriptor = {outer.fileno(): outer for outer in self._outers}
        for descriptor in by_descriptor:
            self._poll.register(descriptor, select.EPOLLIN)
        control_descriptor, device_descriptor = self._control.fileno(), self._device.fileno()
        self._tell(control.encode({"event": "ready", "spi": 0, "peer": None, "detail": ""}))
        forwarder, next_tick = self._forwarder, time.monotonic() + _TICK_SECONDS
        next_routes = time.monotonic() + ROUTES_SECONDS
        while not self.ended:
            ready = self._poll.poll(max(0.0, next_tick - time.monotonic()))
            now = time.monotonic()
            for descriptor, _ in ready:
                if descriptor == device_descriptor:
                    forwarder.pump_device(PACKETS_PER_TURN, now)
                elif (mark := self._marked.by_descriptor.get(descriptor)) is not None:
                    forwarder.pump_device(PACKETS_PER_TURN, now, mark)
                elif descriptor == control_descriptor:
                    self._flush()
                    self._on_control()
                elif descriptor in by_descriptor:
                    forwarder.pump_outer(by_descriptor[descriptor], READS_PER_TURN, now)
            self._marked.sweep()
            if now >= next_tick:
                forwarder.tick(now)
                next_tick = now + _TICK_SECONDS
            if now >= next_routes:
                self._mend_routes()
                next_routes = now + ROUTES_SECONDS


def _is_own(address: IpAddress) -> bool:
    """Whether it is one of this host's: only to those a socket can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="oepy.datapath.tun.process")
    parser.add_argument("--device", required=True)
    parser.add_argument("--mtu", type=int, default=TUNNEL_MTU)
    parser.add_argument("--control", type=int, required=True, help="descriptor of the control channel")
    parser.add_argument("--ike", type=int, required=True, help="descriptor of the channel for IKE messages")
    parser.add_argument("--outer", type=int, action="append", default=[], help="descriptor of a NAT-T socket")
    arguments = parser.parse_args()
    # A Ctrl-C in the daemon's terminal reaches this process too, and so does systemd's SIGTERM to the whole
    # service. Ended by it, it would leave its rules behind; the daemon tells it when to end, or ends itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        _Process(arguments).run()
    except (OepyError, ParseError) as error:
        # The daemon reads this line as the reason
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
