"""The kernel's ESP and AH as the daemon's datapath."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

from oepy.datapath import routes
from oepy.datapath.xfrm import device, plan, sockets
from oepy.datapath.xfrm.leftovers import asks, remove_entries
from oepy.datapath.xfrm.plan import BARE, BY_DEVICE, Scheme
from oepy.datapath.xfrm.spd import Claims, Reqids
from oepy.errors import MisuseError, OepyError
from oepy.interfaces import DatapathEvent
from oepy.model import IpAddress, SaCounters, SaPair
from oepy.netlink import Frame
from oepy.udp import UdpSocket
from oepy.xfrm import pieces as p
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.answers import Counted, counted, parse
from oepy.xfrm.ids import AUTOMATIC_REQIDS
from oepy.xfrm.requests import Request
from oepy.xfrm.socket import EventSocket, Xfrm, XfrmSocket, explained, read

_Result = TypeVar("_Result")

ROUTES_SECONDS = 5.0  # between two looks at whether our routes still stand
READS_PER_WAKEUP = 64
DUMP_FROM = 256  # so many SAs are cheaper dumped with everybody else's than asked for one by one
SEQUENCE_LEAP = 1 << 20  # sequence numbers left out when an SA moves: more than can be sent meanwhile
_MIN_SPI = 256  # RFC 4303 §2.1: 1..255 are reserved
_STATISTICS = Path("/proc/thread-self/net/xfrm_stat")
# What the userland datapath calls what the kernel counts
_NAMES = {
    "XfrmInNoStates": "unknown_spi",
    "XfrmInStateSeqError": "replayed",
    "XfrmInStateProtoError": "integrity_failed",
    "XfrmInHdrError": "malformed_in",
    "XfrmInTmplMismatch": "selector_mismatches",
    "XfrmInNoPols": "selector_mismatches",
    "XfrmInPolBlock": "selector_mismatches",
    "XfrmInStateMismatch": "selector_mismatches",
    "XfrmOutNoStates": "no_sa",
}


@dataclass(slots=True)
class _Installed:
    """A pair that is in the kernel."""

    pair: SaPair
    reqid: int
    scheme: Scheme
    inbound: v.SaId
    outbound: v.SaId
    sending: bool
    told: str = ""
    # What its former SAs have sent and received, before one of its ends moved
    moved_bytes: int = 0
    moved_packets: int = 0
    received_bytes: int = 0
    received_packets: int = 0
    # As last read, and when they had changed
    packets_in: int = 0
    packets_out: int = 0
    last_in: float = 0.0
    last_out: float = 0.0


class XfrmDatapath:
    """Implements `interfaces.Datapath` with the kernel's SAs and policies.

    IKE's sockets are given so that no policy holds for them, and that the kernel takes ESP in UDP out of those
    of the NAT-T port; the daemon goes on reading both. What is in the kernel outlives us: `start` removes what
    an earlier run has left, known by its reqids, if_id and mark. Nothing else is ever touched.
    """

    waits = False

    def __init__(
        self,
        ike: Sequence[UdpSocket] = (),
        nat_t: Sequence[UdpSocket] = (),
        *,
        device: str = "oe0",
        mtu: int = routes.TUNNEL_MTU,
        scheme: Scheme = BY_DEVICE,
        open_xfrm: Callable[[], Xfrm] = XfrmSocket,
        open_events: Callable[[Collection[int]], EventSocket] = EventSocket,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self.mtu = mtu
        self.scheme = scheme
        self._ike, self._nat_t = tuple(ike), tuple(nat_t)
        self._open_xfrm, self._open_events, self._monotonic = open_xfrm, open_events, monotonic
        self._on_event: Callable[[DatapathEvent], None] = lambda _: None
        self._kernel: Xfrm | None = None
        self._events: EventSocket | None = None
        self._news: EventSocket | None = None  # of SAs that end, while one of ours is to move
        self._watcher: asyncio.Task[None] | None = None
        self._counts: IO[str] | None = None
        self._before: dict[str, int] = {}
        self._own: dict[str, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._pairs: dict[int, _Installed] = {}
        self._by_outbound: dict[tuple[IpAddress, int, int], int] = {}
        self._spis: set[int] = set()
        self._claims = Claims()
        self._reqids = Reqids(AUTOMATIC_REQIDS)

    # -- interfaces.Datapath -------------------------------------------------------------------------

    async def start(self, on_event: Callable[[DatapathEvent], None]) -> None:
        """Device, routes and closing policies are there when this returns, leftovers of an earlier run are
        gone. Raises OepyError with the mend; nothing is left behind then but what was there."""
        if self._kernel is not None:
            raise MisuseError("this datapath is running already")
        self._on_event = on_event
        self._forget()
        self._kernel = self._open_xfrm()
        try:
            if self.scheme.if_id:
                await _apart(self._make_way)
            else:
                await _apart(routes.tear_down)  # an earlier run's, with a device
            remove_entries(self._kernel)
            self._must([requests.new_policy(policy) for policy in self._closing()])
            for sock in (*self._ike, *self._nat_t):
                sockets.bypass(sock)
            for sock in self._nat_t:
                sockets.decapsulate(sock)
            self._events = self._open_events((p.GROUP_EXPIRE, p.GROUP_ACQUIRE))
            self._news = self._open_events(())
        except OepyError:
            await self.stop()
            raise
        self._open_statistics()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._events.fileno(), self._events_readable)
        if self.scheme.if_id:
            self._watcher = loop.create_task(self._watch_routes())

    def allocate_spi(self) -> int:
        """At random: that another program has an SA of this SPI at the same address is as likely as guessing
        it, and `install` refuses it then."""
        while True:
            spi = int.from_bytes(os.urandom(4), "big")
            if spi >= _MIN_SPI and spi not in self._spis:
                self._spis.add(spi)
                return spi

    async def install(self, pair: SaPair, *, outbound: bool = True) -> None:
        """See `interfaces.Datapath`. The same pair again with another remote endpoint moves it there. Raises
        OepyError where the kernel refuses it; then nothing of it is left."""
        known = self._pairs.get(pair.spi_in)
        if known is None:
            self._add(pair, outbound)
            return
        if (known.pair.spi_out, known.pair.keys_in) != (pair.spi_out, pair.keys_in):
            raise OepyError(f"SPI {pair.spi_in:#010x} is in use", "choose another one")
        ends = (known.pair.local, known.pair.remote, known.pair.encap)
        if ends != (pair.local, pair.remote, pair.encap):
            self._move(known, pair)
        if outbound and not known.sending:
            self._must(self._claims.claim(pair.spi_in, self._outward(known)))
            known.sending = True

    async def remove(self, spi_in: int) -> None:
        """Of an unknown SPI, or without a start: nothing. Also gives back an SPI that was only allocated."""
        self._spis.discard(spi_in)
        known = self._pairs.pop(spi_in, None)
        if known is None or self._kernel is None:
            return
        self._by_outbound.pop(_key(known.outbound), None)
        self._reqids.give_back(known.reqid)
        self._kernel.carry_out(
            [
                *self._claims.release(spi_in),
                requests.delete_sa(known.outbound),
                requests.delete_sa(known.inbound),
            ]
        )

    async def counters(self, spis: Collection[int] | None = None) -> Sequence[SaCounters]:
        """Of all pairs, or of those of `spis` that exist. `last_in` and `last_out` are the times of the first
        look that saw the number of packets changed."""
        wanted = self._pairs if spis is None else [spi for spi in spis if spi in self._pairs]
        found = self._counted(wanted)
        now = self._monotonic()
        return [self._counters_of(self._pairs[spi], found, now) for spi in wanted]

    async def statistics(self) -> Mapping[str, int]:
        """What the kernel counts of no SA, since our start, in the whole namespace; and `routes_mended`,
        `events_lost` of ours."""
        counts = dict(self._own)
        for name, number in self._read_statistics().items():
            ours = _NAMES.get(name)
            if ours is not None:
                counts[ours] = counts.get(ours, 0) + number - self._before.get(name, 0)
        return counts

    async def stop(self) -> None:
        """SAs, policies, device, rules and routes are gone when this returns. Stop the trap before: nothing
        must be marked any more. May be called without a start."""
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._events.close()
            self._events = None
        if self._news is not None:
            self._news.close()
            self._news = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._counts is not None:
            self._counts.close()
            self._counts = None
        if self._kernel is None:
            return
        with contextlib.suppress(OepyError):
            remove_entries(self._kernel)
        self._kernel.close()
        self._kernel = None
        self._forget()
        if self.scheme.if_id:
            await _apart(self._unmake_way)

    def _make_way(self) -> None:
        device.make(self.device, self.scheme.if_id)
        routes.set_up(self.device, self.mtu)
        routes.forget_marks()

    def _unmake_way(self) -> None:
        device.remove(self.device, self.scheme.if_id)
        routes.tear_down()

    def _mend_way(self) -> bool:
        """Whether it was broken."""
        if routes.stand(self.device):
            return False
        self._make_way()
        return True

    # -- SAs and policies ----------------------------------------------------------------------------

    def _add(self, pair: SaPair, outbound: bool) -> None:
        # Over an XFRM interface transport mode would send the packet to the interface again
        scheme = self.scheme if pair.mode == "tunnel" else BARE
        reqid = self._reqids.take(_policies_of(pair))
        try:
            inbound, outward = plan.sas(pair, reqid, scheme)
            known = _Installed(pair, reqid, scheme, inbound.id, outward.id, outbound)
            inward_policies = list(plan.inward_policies(pair, reqid, scheme))
            outward_policies = self._outward(known) if outbound else []
            changes = [
                requests.new_sa(inbound),
                requests.new_sa(outward),
                *self._claims.claim(pair.spi_in, inward_policies),
                *self._claims.claim(pair.spi_in, outward_policies),
            ]
            self._all_or_nothing(pair.spi_in, changes, [inbound.id, outward.id])
        except OepyError:
            self._reqids.give_back(reqid)
            raise
        self._spis.add(pair.spi_in)
        self._pairs[pair.spi_in] = known
        self._by_outbound[_key(known.outbound)] = pair.spi_in

    def _outward(self, known: _Installed) -> list[v.Policy]:
        return list(plan.outward_policies(known.pair, known.reqid, known.scheme))

    def _move(self, known: _Installed, pair: SaPair) -> None:
        """Only the outbound SA knows where the peer is. It is made anew there, its sequence numbers after
        those of the old one, so that no nonce is used twice. (XFRM_MSG_MIGRATE copies them while packets
        still leave by the old SA.) The inbound one does not name the peer's address to find a packet's SA,
        and stays, with its replay window, unless our own end moves or a NAT comes or goes."""
        kernel = self._running()
        if pair.local != known.pair.local or pair.encap != known.pair.encap:
            self._receive_elsewhere(known, pair)
        (frame,) = kernel.ask([requests.get_sa(known.outbound)])
        current = None if frame is None else parse(frame)
        if not isinstance(current, v.Sa):
            raise OepyError("the SA that is to move has ended", "the tunnel is negotiated anew")
        self._must([requests.delete_sa(known.outbound)])
        _, fresh = plan.sas(pair, known.reqid, known.scheme)
        fresh = _carried_on(fresh, current, int(time.time()))
        self._by_outbound.pop(_key(known.outbound), None)
        self._reqids.rename(_policies_of(known.pair), _policies_of(pair))
        known.pair, known.outbound = pair, fresh.id
        known.moved_bytes += current.usage.bytes
        known.moved_packets += current.usage.packets
        self._by_outbound[_key(known.outbound)] = pair.spi_in
        self._put_back(fresh)
        if known.sending:
            self._must(self._claims.claim(pair.spi_in, self._outward(known)))

    def _put_back(self, fresh: v.Sa) -> None:
        """Where an SA has just been taken away. A packet that was to leave by it meanwhile has made the kernel ask
        for one (ACQUIRE), and what waits for the answer has the same name."""
        kernel = self._running()
        (refused,) = kernel.carry_out([requests.new_sa(fresh)])
        if refused is None:
            return
        if refused.errno != errno.EEXIST:
            raise explained(refused)
        self._must([requests.update_sa(fresh)])
        (frame,) = kernel.ask([requests.get_sa(fresh.id)])
        there = None if frame is None else parse(frame)
        known = isinstance(there, v.Sa) and there.replay is not None and fresh.replay is not None
        if not known or there.replay.sequence_out < fresh.replay.sequence_out:  # type: ignore[union-attr]
            raise OepyError("another SA has come in its place", "the tunnel is negotiated anew")

    def _receive_elsewhere(self, known: _Installed, pair: SaPair) -> None:
        """The inbound SA at another address of ours, or in UDP. What it has received until its very end the kernel
        tells with the news of that end, and in no other way: a packet between a look and the end could be replayed.
        """
        assert self._news is not None
        (frame,) = self._running().ask([requests.get_sa(known.inbound)])
        current = None if frame is None else parse(frame)
        if not isinstance(current, v.Sa):
            raise OepyError("the SA that is to move has ended", "the tunnel is negotiated anew")
        with self._news.listening(p.GROUP_SA):
            self._must([requests.delete_sa(known.inbound)])
            replay = _last_state(self._news, known.inbound)
        if replay is None or not replay.bitmap:
            raise OepyError(
                "the kernel does not say what the SA had received", "the tunnel is negotiated anew"
            )
        fresh, _ = plan.sas(pair, known.reqid, known.scheme)
        fresh = replace(_limited(fresh, current, int(time.time())), replay=replay, replay_window=0)
        known.received_bytes += current.usage.bytes
        known.received_packets += current.usage.packets
        known.inbound = fresh.id
        inward = list(plan.inward_policies(pair, known.reqid, known.scheme))
        self._must([requests.new_sa(fresh), *self._claims.claim(pair.spi_in, inward)])

    def _all_or_nothing(self, owner: int, changes: Sequence[Request], made: Sequence[v.SaId]) -> None:
        """Carry out; of what a refusal leaves, remove what is ours. Raises OepyError."""
        kernel = self._running()
        outcome = kernel.carry_out(changes)
        refused = next((item for item in outcome if item is not None), None)
        if refused is None:
            return
        # What is there already is somebody else's, and stays
        theirs = {_identity(item.request) for item in outcome if item is not None}
        back = [*self._claims.release(owner), *map(requests.delete_sa, made)]
        kernel.carry_out([change for change in back if _identity(change) not in theirs])
        raise explained(refused)

    def _must(self, changes: Sequence[Request]) -> None:
        for refused in self._running().carry_out(changes):
            if refused is not None:
                raise explained(refused)

    def _running(self) -> Xfrm:
        if self._kernel is None:
            raise OepyError("the datapath is not running", "start it")
        return self._kernel

    def _closing(self) -> list[v.Policy]:
        families = [v.Selector(v.ANY_NETWORK, v.ANY_NETWORK)]
        if Path("/proc/sys/net/ipv6").exists():
            families.append(v.Selector(v.ANY_NETWORK_6, v.ANY_NETWORK_6))
        return list(plan.closing_policies(self.scheme, families))

    # -- counters ------------------------------------------------------------------------------------

    def _counted(self, spis: Collection[int]) -> dict[tuple[bytes, int, int], Counted]:
        """By destination, SPI and protocol."""
        kernel = self._running()
        if len(spis) >= DUMP_FROM:
            told = [counted(frame) for frame in kernel.dump(requests.dump_sas())]
        else:
            names = [name for spi in spis for name in (self._pairs[spi].inbound, self._pairs[spi].outbound)]
            frames = kernel.ask([requests.get_sa(name) for name in names])
            told = [counted(frame) for frame in frames if frame is not None]
        return {(item.destination, item.spi, item.protocol): item for item in told}

    def _counters_of(
        self, known: _Installed, found: Mapping[tuple[bytes, int, int], Counted], now: float
    ) -> SaCounters:
        inward, outward = found.get(_field(known.inbound)), found.get(_field(known.outbound))
        packets_in = inward.packets + known.received_packets if inward else known.packets_in
        packets_out = outward.packets + known.moved_packets if outward else known.packets_out
        if packets_in != known.packets_in:
            known.packets_in, known.last_in = packets_in, now
        if packets_out != known.packets_out:
            known.packets_out, known.last_out = packets_out, now
        return SaCounters(
            known.pair.spi_in,
            bytes_in=(inward.bytes if inward else 0) + known.received_bytes,
            bytes_out=(outward.bytes if outward else 0) + known.moved_bytes,
            packets_in=packets_in,
            packets_out=packets_out,
            replayed=inward.replayed + inward.out_of_window if inward else 0,
            integrity_failures=inward.integrity_failed if inward else 0,
            last_in=known.last_in,
            last_out=known.last_out,
        )

    def _open_statistics(self) -> None:
        """Kept open: the file is the namespace's in which it was opened."""
        with contextlib.suppress(OSError):
            self._counts = _STATISTICS.open(encoding="ascii")
        self._before = self._read_statistics()
        self._own = {"routes_mended": 0, "routes_failed": 0, "events_lost": 0}

    def _read_statistics(self) -> dict[str, int]:
        if self._counts is None:
            return {}
        self._counts.seek(0)
        words = [line.split() for line in self._counts]
        return {word[0]: int(word[1]) for word in words if len(word) == 2 and word[1].isdigit()}

    # -- events --------------------------------------------------------------------------------------

    def _events_readable(self) -> None:
        for _ in range(READS_PER_WAKEUP):
            if self._events is None or (received := self._events.receive()) is None:
                return
            events, lost = received
            if lost:
                self._own["events_lost"] += 1
                with contextlib.suppress(OepyError):  # the daemon's own timers remain
                    self._resynchronize()
            for event in events:
                self._take(event)

    def _take(self, event: v.Answer) -> None:
        if isinstance(event, v.Expire):
            spi = self._owner(event.sa.id)
            if spi is not None:
                self._tell(spi, "hard-expire" if event.hard else "soft-expire")
        elif isinstance(event, v.Acquire) and asks(event.policy):
            source = event.selector.source.network_address
            peer = event.selector.destination.network_address
            self._on_event(DatapathEvent("no-sa", peer=peer, source=source))

    def _owner(self, name: v.SaId) -> int | None:
        """The pair of an SA, by either direction."""
        known = self._pairs.get(name.spi)
        if known is not None and _key(known.inbound) == _key(name):
            return name.spi
        return self._by_outbound.get(_key(name))

    def _tell(self, spi: int, kind: str) -> None:
        """Each once: both SAs of a pair reach the same limits of time."""
        known = self._pairs[spi]
        if known.told in (kind, "hard-expire"):
            return
        known.told = kind
        self._on_event(DatapathEvent(kind, spi))

    def _resynchronize(self) -> None:
        """Expiries were lost: look at all SAs instead."""
        frames = self._running().dump(requests.dump_sas())
        found = {_key(sa.id): sa for frame in frames if isinstance(sa := read(frame), v.Sa)}
        now = int(time.time())
        for spi, known in list(self._pairs.items()):
            both = [found.get(_key(name)) for name in (known.inbound, known.outbound)]
            if None in both:
                self._tell(spi, "hard-expire")
            elif any(sa is not None and _is_soft(sa, now) for sa in both):
                self._tell(spi, "soft-expire")

    async def _watch_routes(self) -> None:
        """Other programs flush rules, and a device that is set down loses its routes: until they are back,
        what is marked goes nowhere."""
        while True:
            await asyncio.sleep(ROUTES_SECONDS)
            try:
                if await _apart(self._mend_way):
                    self._own["routes_mended"] += 1
            except (OepyError, OSError):
                self._own["routes_failed"] += 1


async def _apart(work: Callable[[], _Result]) -> _Result:
    """pyroute2 has an event loop of its own, and wants a thread where none is running. A new one is in the
    network namespace that its maker is in."""
    with ThreadPoolExecutor(1) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def _key(name: v.SaId) -> tuple[IpAddress, int, int]:
    return name.destination, name.spi, name.protocol


def _field(name: v.SaId) -> tuple[bytes, int, int]:
    return name.destination.packed.ljust(16, b"\0"), name.spi, name.protocol


def _identity(change: Request) -> v.SaId | v.PolicyId | Request:
    """What a change is about."""
    answer = read(Frame(change.kind, 0, 0, change.body))
    known = isinstance(answer, v.Sa | v.SaDeleted | v.Policy | v.PolicyDeleted)
    return answer.id if known else change  # type: ignore[union-attr]


def _policies_of(pair: SaPair) -> tuple[object, ...]:
    """Equal for pairs that one peer may use in place of each other."""
    return (
        *(pair.connection, pair.authenticated, pair.peer, pair.remote.address),
        *(pair.mode, pair.protocol, pair.local_ts, pair.remote_ts),
        *(pair.if_id_in, pair.if_id_out, pair.marks),
    )


def _carried_on(fresh: v.Sa, current: v.Sa, now: int) -> v.Sa:
    """`fresh` with the sequence numbers and what is left of the limits of `current`, which it follows."""
    assert current.replay is not None
    assert fresh.replay is not None
    sequence = current.replay.sequence_out + SEQUENCE_LEAP
    if sequence >= (1 << 64 if v.SaFlag.ESN in current.flags else 1 << 32) - 1:
        raise OepyError("the sequence numbers of the SA are used up", "the tunnel is negotiated anew")
    return replace(_limited(fresh, current, now), replay=replace(fresh.replay, sequence_out=sequence))


def _last_state(news: EventSocket, name: v.SaId) -> v.Replay | None:
    """Of an SA that has ended just now: the news is there before the request is acknowledged."""
    while (received := news.receive()) is not None:
        for event in received[0]:
            if isinstance(event, v.SaDeleted) and _key(event.id) == _key(name):
                return event.replay
    return None


def _limited(fresh: v.Sa, current: v.Sa, now: int) -> v.Sa:
    """`fresh` with what is left of the limits of `current`."""
    limits, usage, age = fresh.limits, current.usage, max(now - current.usage.added, 0)
    return replace(
        fresh,
        limits=v.Limits(
            _left(limits.soft_bytes, usage.bytes),
            _left(limits.hard_bytes, usage.bytes),
            _left(limits.soft_packets, usage.packets),
            _left(limits.hard_packets, usage.packets),
            _left(limits.soft_seconds, age),
            _left(limits.hard_seconds, age),
        ),
    )


def _left(limit: int, used: int) -> int:
    return max(limit - used, 1) if limit else 0


def _is_soft(sa: v.Sa, now: int) -> bool:
    limits, usage = sa.limits, sa.usage
    return any(
        limit and used >= limit
        for limit, used in (
            (limits.soft_bytes, usage.bytes),
            (limits.soft_packets, usage.packets),
            (limits.soft_seconds, now - usage.added),
        )
    )
