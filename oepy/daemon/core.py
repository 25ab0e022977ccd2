"""The wiring between engine, DNS, IKE, datapath and trap, without sockets, files or signals.

`runtime.Daemon` gives it the real rooms; tests give it fakes, a network in memory and a clock of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oepy.connections.messages import Asked, ChildWent
from oepy.daemon.addresses import is_own, own_addresses, source_towards
from oepy.daemon.admission import Admissions
from oepy.daemon.bystanders import Bystanders
from oepy.daemon.conventional import Conventional
from oepy.daemon.datapaths import NoHostAddresses
from oepy.daemon.journal import Journal
from oepy.daemon.manual import ManualKeying, NoBackend
from oepy.daemon.negotiator import Negotiator, Ports
from oepy.daemon.own import OwnRecord, OwnRecords
from oepy.daemon.revocation import Fetcher, nothing_fetched
from oepy.daemon.steps import Steps
from oepy.dns.names import LearnedNames
from oepy.engine import Engine, EngineSettings
from oepy.engine import messages as engine_messages
from oepy.engine.messages import Action, Input, LookupDone, Named, NoSa, Tick, Trapped, TunnelDown, UnknownSpi
from oepy.errors import OepyError
from oepy.ike.endpoint import IkeEndpoint
from oepy.ike.events import Datagram, IkeKeys
from oepy.ike.settings import IkeSettings
from oepy.interfaces import Datapath, DatapathEvent, HostAddresses, KeySource, Trap
from oepy.keylog import KeyLog, ike_line
from oepy.keys import HostKey
from oepy.model import Direction, Endpoint, Flow, IpAddress, PolicyGroup, SaPair, Unreachable
from oepy.policy import NO_PREFIXES, PolicyTable, PrefixSet

TRAFFIC_SECONDS = 10.0  # between two looks at what came in
RESTART_FIRST, RESTART_LONGEST = 2.0, 30.0  # seconds before the datapath process is started again
MAX_WAITING_STEPS = 10_000  # behind a step that waits; beyond it datagrams are lost, and IKE sends them again
MAX_AHEAD = 50  # destinations a second that are asked for before a packet goes there
MAX_TASKS = 4096  # lookups of hosts behind us at once; beyond, all count as ours
BEHIND_SECONDS = 5.0  # for the record of a host behind us, before its packet is looked after
LOOKUP_SECONDS = 12.0  # the DNS room bounds itself; this is the belt to its braces


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a core is given. `monotonic` and `wall_clock` (since 1970) in seconds; `random` gives bytes."""

    keys: KeySource
    trap: Trap
    datapath: Datapath
    send: Callable[[Datagram], None]
    monotonic: Callable[[], float]
    host_key: HostKey
    identity: str | None
    ike_settings: IkeSettings
    key_log: KeyLog | None = None
    random: Callable[[int], bytes] = os.urandom
    wall_clock: Callable[[], float] = time.time
    host: HostAddresses = field(default_factory=NoHostAddresses)
    leases: Path | None = None  # directory of the files with clients' addresses
    own_addresses: Callable[[], frozenset[IpAddress]] = own_addresses
    fetch: Fetcher = nothing_fetched
    is_own: Callable[[IpAddress], bool] = is_own
    source_towards: Callable[[IpAddress], IpAddress | None] = source_towards


class Core:
    """One host's opportunistic encryption. `feed` goes in, actions go to the rooms in their order."""

    def __init__(
        self,
        policy: PolicyTable,
        journal: Journal,
        *,
        insecure_keys: bool,
        block: bool,
        by_certificate: PrefixSet = NO_PREFIXES,
    ) -> None:
        self.journal = journal
        self.policy = policy
        self.manual = ManualKeying(NoBackend())
        self.engine = Engine(
            engine_settings(policy, insecure_keys, block, self.settled_elsewhere, self.is_own, by_certificate)
        )
        self.steps = Steps(self._internal_error)
        self.connections = Conventional(self)
        self.names = LearnedNames()
        self._ahead_since, self._ahead = float("-inf"), 0
        self._timer: asyncio.TimerHandle | None = None
        self._datapath_since = float("-inf")  # when it was restarted last
        self._tasks: set[asyncio.Task[None]] = set()

    def settled_elsewhere(self, address: IpAddress) -> tuple[str, bool] | None:
        """What of the configuration settles a destination before the groups, and whether of some protocols only."""
        manual = self.manual.concerns(address)
        if manual is not None:
            return f"manual {manual}", bool(manual.selector.protocol)
        label = self.connections.traffic.settles(address)
        return None if label is None else (f"connection {label}", False)

    def is_own(self, address: IpAddress) -> bool:
        return self.given.is_own(address)

    def reload_trap(self) -> None:
        """The configured rules are others. `runtime.Daemon` does it."""

    def wire(self, given: Surroundings) -> None:
        """Connect the rooms; nothing is started."""
        self.given = given
        self.keys, self.trap, self.datapath = given.keys, given.trap, given.datapath
        self.own = OwnRecords(given.keys, given.host_key.public, given.monotonic, self._own_changed)
        self.bystanders = Bystanders(
            *(given.keys, given.host_key.public, given.monotonic),
            *(given.trap.pass_by, self._behind_changed),
        )
        self.connections.wire()
        self.trap.ask_for(lambda number, flow: self.connections.feed(Asked(number, flow)))
        self.negotiator = Negotiator(
            IkeEndpoint(given.ike_settings, given.random, self.connections.answers.settings_for),
            given.host_key,
            given.identity,
            self.own,
            Admissions(given.keys, self.engine, given.is_own),
            self.connections,
            Ports(
                feed=self.feed,
                send=self._send,
                report=self.journal.add,
                allocate_spi=given.datapath.allocate_spi,
                monotonic=given.monotonic,
                source_towards=given.source_towards,
                log_ike_keys=self._log_ike_keys,
            ),
        )

    async def unwire(self, seconds: float) -> None:
        """Deletes to everyone, then nothing runs any more."""
        if hasattr(self, "negotiator"):
            count = await self.negotiator.shutdown(seconds)
            await self.steps.idle()
            self.journal.add("stopping", tunnels=count)
        self.connections.stop()
        for task in list(self._tasks):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _own_changed(self, record: OwnRecord) -> None:
        self.journal.add(
            "own-record",
            alert=record.state == "mismatch",
            subject=record.subject,
            state=record.state,
            reason=record.reason,
        )

    def _behind_changed(self, record: OwnRecord) -> None:
        """Of a host behind this one."""
        self.journal.add("behind-record", subject=record.subject, state=record.state, reason=record.reason)

    def spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._internal_error(error)

    def _internal_error(self, error: Exception) -> None:
        self.journal.add("internal-error", alert=True, reason=f"{type(error).__name__}: {error}")
        asyncio.get_running_loop().call_exception_handler(
            {"message": "a step of the daemon failed", "exception": error}
        )

    # ------------------------------------------------------------ engine in, actions out

    def feed(self, message: Input) -> None:
        try:
            actions = self.engine.handle(message, self.given.monotonic())
        except Exception as error:  # noqa: BLE001 - told as an alert; the timers must go on
            self._internal_error(error)
            actions = []
        for action in actions:
            self.steps.do(lambda action=action: self._act(action))  # type: ignore[misc]
        self._arm()

    def _arm(self) -> None:
        when = self.engine.next_timer()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when is not None:
            delay = max(when - self.given.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self.feed, Tick())

    def _act(self, action: Action) -> Any:
        """Carry out one action; what is returned is awaited before the next."""
        match action:
            case engine_messages.Decide(group, destination, verdict, lifetime):
                self.trap.decide(group, destination, verdict, lifetime)
            case engine_messages.Forget(group, destination):
                self.trap.forget([(group, destination)])
            case engine_messages.StartLookup(destination):
                self.spawn(self._look_up(destination))
            case engine_messages.StartIke():
                self.negotiator.start(action)
            case engine_messages.CancelIke(attempt):
                self.negotiator.cancel(attempt)
            case engine_messages.Install(pair, outbound):
                return self.at_once(self._install(pair, outbound))
            case engine_messages.Remove(spi_in):
                return self.at_once(self.datapath.remove(spi_in))
            case engine_messages.CloseTunnel(spi_in, _):
                self.negotiator.close(spi_in)
            case engine_messages.ReadCounters(spis):
                self.spawn(self._read_counters(spis))
            case engine_messages.Report(event, fields, alert):
                self.journal.add(event, alert, **fields)
        return None

    def at_once(self, work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
        """What the datapath has to do: done when this returns, or to be awaited where it waits for somebody."""
        if self.datapath.waits:
            return work
        try:
            work.send(None)
        except StopIteration:
            return None
        work.close()
        raise AssertionError("a datapath that does not wait has waited")

    async def _install(self, pair: SaPair, outbound: bool) -> None:
        if self.given.key_log is not None:
            self.given.key_log.write_esp(pair)
        try:
            await self.datapath.install(pair, outbound=outbound)
        except OepyError as error:
            # Marked packets find no SA and are dropped, until the table's row for this is in the trap.
            self.journal.add("install-failed", True, peer=str(pair.remote.address), reason=str(error))
            # After the rest of what was to be done
            asyncio.get_running_loop().call_soon(self._install_failed, pair.spi_in, str(error))

    def _install_failed(self, spi_in: int, reason: str) -> None:
        self.feed(engine_messages.InstallFailed(spi_in, reason))
        self.negotiator.close(spi_in)

    async def _look_up(self, destination: IpAddress) -> None:
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                names = self.names.of(destination, self.given.monotonic())
                answer = await self.keys.peer_keys(destination, names)
        except TimeoutError:
            answer = Unreachable(str(destination), "", 0, "the lookup took too long", LOOKUP_SECONDS)
        self.feed(LookupDone(destination, answer))

    async def watch_traffic(self) -> None:
        """Tell IKE which SAs receive: their peers live and need no question (RFC 7296 §2.4)."""
        seen: dict[int, float] = {}
        while True:
            await asyncio.sleep(TRAFFIC_SECONDS)
            if not self.engine.pairs and not any(self.connections.manager.tunnels()):
                continue
            try:
                counters = await self.datapath.counters()
            except OepyError:
                continue  # the process has ended: `failed` tells of it
            for counted in counters:
                if counted.last_in > seen.get(counted.spi_in, 0.0):
                    self.negotiator.traffic_seen(counted.spi_in)
            seen = {counted.spi_in: counted.last_in for counted in counters}
            self.negotiator.pump()

    async def _read_counters(self, spis: tuple[int, ...]) -> None:
        try:
            counters = await self.datapath.counters(spis)
        except OepyError:
            return  # the process has ended, and all tunnels with it
        self.feed(engine_messages.Counters(counters))

    # ------------------------------------------------------------ from the rooms

    def on_name(self, name: str, addresses: tuple[IpAddress, ...], ttl: int) -> None:
        """This host was told that a name leads there."""
        now = self.given.monotonic()
        if now - self._ahead_since >= 1.0:
            self._ahead_since, self._ahead = now, 0
        for address in addresses:
            if (
                address.is_loopback
                or address.is_multicast
                or address.is_unspecified
                or self.given.is_own(address)
            ):
                continue
            self.names.learn(address, name, ttl, now)
            self._ahead += 1
            if self._ahead <= MAX_AHEAD:
                self.feed(Named(address, name))

    def on_trapped(self, group: PolicyGroup, flow: Flow) -> None:
        trapped = Trapped(group, flow, self.policy.match(flow).prefix)
        forwarded = flow.direction is Direction.FORWARD and not self.given.is_own(flow.source)
        if forwarded and len(self._tasks) < MAX_TASKS:
            self.spawn(self._unless_passing(flow.source, trapped))
        else:
            self.feed(trapped)

    async def _unless_passing(self, source: IpAddress, message: Input) -> None:
        passes = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEHIND_SECONDS):
                passes = await self.bystanders.passes_by(source)
        if not passes:
            self.feed(message)

    def on_ike(self, data: bytes, local: Endpoint, remote: Endpoint) -> None:
        self.negotiator.receive(data, local, remote)

    def _send(self, datagrams: list[Datagram]) -> None:
        """After everything that must be in place before the peer hears of it."""

        def step() -> None:
            self.trap.commit()
            for datagram in datagrams:
                self.given.send(datagram)

        if len(self.steps) < MAX_WAITING_STEPS:
            self.steps.do(step)

    def _log_ike_keys(self, event: IkeKeys) -> None:
        if self.given.key_log is not None:
            self.given.key_log.write_ike(
                ike_line(
                    (event.spi_i, event.spi_r),
                    event.encryption,
                    (event.sk_ei, event.sk_er),
                    event.integrity,
                    (event.sk_ai, event.sk_ar),
                )
            )

    def on_datapath_event(self, event: DatapathEvent) -> None:
        if event.kind in ("soft-expire", "hard-expire") and self._manual_expires(event):
            return
        match event.kind:
            case "unknown-spi" if event.peer is not None:
                self.feed(UnknownSpi(event.peer))
            case "no-sa" if event.peer is not None and event.source is not None:
                missing = NoSa(event.source, event.peer)
                if self.given.is_own(event.source) or len(self._tasks) >= MAX_TASKS:
                    self.feed(missing)
                else:
                    self.spawn(self._unless_passing(event.source, missing))
            case "soft-expire":
                self.negotiator.rekey(event.spi)
            case "hard-expire":
                self.negotiator.close(event.spi)
            case "failed":
                self.spawn(self._datapath_failed(event.detail))
            case _:
                self.journal.add(event.kind, spi_in=f"{event.spi:08x}", peer=event.peer and str(event.peer))

    def _manual_expires(self, event: DatapathEvent) -> bool:
        ended = event.kind == "hard-expire"
        name = self.manual.expires(event.spi, ended=ended)
        if name is not None:
            what = "has ended: its traffic is dropped" if ended else "will end soon"
            self.journal.add("manual-sa-expires", alert=True, reason=f"{name} {what}; give it a new key")
        return name is not None

    async def _datapath_failed(self, detail: str) -> None:
        """Sequence numbers are gone with the process, and an AEAD must never see one twice: all tunnels end
        and are negotiated anew."""
        self.journal.add("datapath-failed", alert=True, reason=detail)
        lived = self.given.monotonic() - self._datapath_since
        pause = 0.0 if lived > RESTART_LONGEST else RESTART_FIRST
        for spi_in in list(self.engine.pairs):
            self.negotiator.close(spi_in)
            self.feed(TunnelDown(spi_in, "the datapath process ended"))
        for spi_in, _ in list(self.connections.manager.tunnels()):
            self.negotiator.close(spi_in)
            self.connections.feed(ChildWent(spi_in, "datapath"))
        await self.steps.idle()
        while True:
            await asyncio.sleep(pause)
            try:
                await self.datapath.start(self.on_datapath_event)
                break
            except OepyError as error:
                pause = min(max(2 * pause, RESTART_FIRST), RESTART_LONGEST)
                self.journal.add("datapath-failed", alert=True, reason=f"{error}; again in {pause:.0f} s")
        for reason in await self.manual.restarted():
            self.journal.add("manual-sa-lost", alert=True, reason=reason)
        self._datapath_since = self.given.monotonic()
        self.journal.add("datapath-restarted", alert=True, reason="packets are trapped again")


def engine_settings(
    policy: PolicyTable,
    insecure_keys: bool,
    block: bool,
    settled: Callable[[IpAddress], tuple[str, bool] | None],
    own: Callable[[IpAddress], bool],
    by_certificate: PrefixSet = NO_PREFIXES,
) -> EngineSettings:
    """`settled`: by what a destination is settled (a manual policy, a connection), and whether of some protocols
    only. To the engine such a destination is clear: it begins nothing with it, and answers no offer, so that no
    peer can put its own SA in the place of a configured one."""

    def group_of(address: IpAddress) -> tuple[PolicyGroup, str]:
        configured = settled(address)
        if configured is not None:
            return PolicyGroup.CLEAR, configured[0]
        match = policy.match_address(address)
        return match.group, match.prefix

    def groups_of(address: IpAddress) -> frozenset[PolicyGroup]:
        configured = settled(address)
        if configured is None:
            return policy.groups_of(address)
        other = policy.groups_of(address) if configured[1] else frozenset()
        return other | {PolicyGroup.CLEAR}

    return EngineSettings(group_of, insecure_keys, block, groups_of, own, by_certificate.__contains__)
