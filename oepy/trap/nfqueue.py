"""The trap itself: rules in the kernel, first packets in its queues, verdicts back (rules.py, hold.py)."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from oepy.errors import MisuseError, ParseError
from oepy.exchange import Exchange, exchange
from oepy.interfaces import ConfiguredRule, TrapPolicy
from oepy.model import (
    MARK_KERNEL,
    MARK_MASK,
    MARK_PRIVATE,
    AddressRange,
    Direction,
    Flow,
    IpAddress,
    PolicyGroup,
    Verdict,
)
from oepy.policy import PolicyTable
from oepy.trap import islands, kernel, queue, switch, tables
from oepy.trap import netlink as nl
from oepy.trap.configured import Configured
from oepy.trap.decided import Decided, SetChange
from oepy.trap.hold import MAX_PACKETS, Destination, HeldPacket, Hold
from oepy.trap.islands import joined_set
from oepy.trap.joined import Joined, Range, range_elements
from oepy.trap.packet import parse_flow
from oepy.trap.rules import ASK_CLOSED, ASK_OPEN, BYSTANDER, TABLE, Ruleset
from oepy.trap.standing import Standing

OPEN_QUEUE, CLOSED_QUEUE = 17733, 17734
QUEUE_MAX_LENGTH = 2 * MAX_PACKETS  # in the kernel, beyond what we ever hold
READS_PER_WAKEUP = 256
SWEEP_SECONDS = 1.0
RESTORE_SECONDS = 1.0
_QUEUE_COUNTERS = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")
MAX_CHANGES_PER_TRANSACTION = 20_000
MAX_BYSTANDERS = 65_536


# A packet of these groups is never a question.
_WITHOUT_QUESTION = {
    PolicyGroup.CLEAR: Verdict.CLEAR,
    PolicyGroup.CLEAR_OR_PRIVATE: Verdict.CLEAR,
    PolicyGroup.BLOCK: Verdict.BLOCK,
}


@dataclass(slots=True)
class _Running:
    """What exists between start and stop."""

    loop: asyncio.AbstractEventLoop
    policy: TrapPolicy
    table: PolicyTable
    ruleset: Ruleset
    configured: Configured
    on_trapped: Callable[[PolicyGroup, Flow], None]
    tables: kernel.Tables
    packets: kernel.QueueSocket
    kernel_counters: TextIO
    namespace: str
    standing: Standing
    sweep: asyncio.TimerHandle | None = None

    def check_namespace(self) -> None:
        """`nft` works where the calling thread is; that must be where the sockets are."""
        if kernel.current_namespace() != self.namespace:
            raise MisuseError("the trap is used from another network namespace than it was started in")

    def mark_of(self, number: int) -> int:
        """What leads packets of this child to their SA."""
        return MARK_KERNEL if self.standing.is_past_device(number) else MARK_PRIVATE

    def close(self) -> None:
        self.loop.remove_reader(self.packets.fileno())
        if self.sweep is not None:
            self.sweep.cancel()
        self.packets.close()
        self.tables.close()
        self.kernel_counters.close()


class _PossibleGroups:
    """The groups that flows to an address can have: that of the address as such, and those of rules for one
    protocol or port that cover it."""

    def __init__(self, policy: TrapPolicy, table: PolicyTable) -> None:
        self._table = table
        self._specific = [rule for rule in policy.rules if rule.protocol or rule.port]

    def of(self, address: IpAddress) -> set[PolicyGroup]:
        specific = {rule.group for rule in self._specific if address in rule.network}
        return specific | {self._table.match_address(address).group}


def _set_messages(changes: Iterable[SetChange], now: float) -> list[bytes]:
    """The messages that make these changes, whatever is in the sets before: what may be there is added (which
    does nothing where it is), then deleted, then added with its new end."""
    stale: dict[str, list[bytes]] = {}
    fresh: dict[str, list[bytes]] = {}
    for change in changes:
        if change.present:
            stale.setdefault(change.name, []).append(tables.element(change.key))
        if change.add and change.end > now:
            timeout = None if change.end == math.inf else change.end - now
            fresh.setdefault(change.name, []).append(tables.element(change.key, timeout))
    messages = []
    for name, elements in stale.items():
        messages.append(tables.add_elements(TABLE, name, elements))
        messages.append(tables.delete_elements(TABLE, name, elements))
    messages += [tables.add_elements(TABLE, name, elements) for name, elements in fresh.items()]
    return messages


def _bystander(source: IpAddress, end: float, present: bool) -> SetChange:
    return SetChange(f"{BYSTANDER}{source.version}", source.packed, present, True, end)


class NfqueueTrap:
    """Implements `interfaces.Trap` with NFQUEUE and nftables sets.

    Made and used in one thread, inside of a running asyncio loop and of the network namespace that it serves.
    """

    def __init__(self, *, open_queue: int = OPEN_QUEUE, closed_queue: int = CLOSED_QUEUE) -> None:
        self._queues = (open_queue, closed_queue)
        self._queue_rules = ((ASK_OPEN, open_queue, True), (ASK_CLOSED, closed_queue, False))
        self._hold = Hold()
        self._decided = Decided()
        self._counters: Counter[str] = Counter()
        self._changes: dict[tuple[str, bytes], SetChange] = {}
        self._releasing: list[tuple[Destination, Verdict]] = []
        self._verdicts: list[bytes] = []
        self._flush_due = False
        self._joined = Joined()
        self._bystanders: dict[IpAddress, float] = {}  # with the ends of their times
        self._on_asked: Callable[[int, Flow], None] = lambda _, __: None
        self._running: _Running | None = None
        self._restore_at = 0.0

    # -- interfaces.Trap -----------------------------------------------------------------------------

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        """See `interfaces.Trap`. Raises OepyError where rights, `nft` or kernel features are missing, where
        another oepy has the queues, or where a table of our name is not ours."""
        if self._running is not None:
            raise MisuseError("this trap is running already")
        loop = asyncio.get_running_loop()
        ruleset = Ruleset(policy)
        with contextlib.ExitStack() as undo:
            changer = kernel.Tables()
            undo.callback(changer.close)
            changer.refuse_foreign()
            packets = kernel.QueueSocket(self._queues, QUEUE_MAX_LENGTH)
            undo.callback(packets.close)
            kernel_counters = undo.enter_context(_QUEUE_COUNTERS.open())
            namespace = kernel.current_namespace()
            leftovers = changer.any_table()
            configured = switch.take_over(policy, ruleset, changer)
            # Without queues the trap cannot work: then back to shut, where it was not open before
            undo.callback(switch.leave, policy, leftovers, changer)
            changer.insert_queue_rules(TABLE, self._queue_rules)
            undo.pop_all()
        self._running = _Running(
            loop=loop,
            policy=policy,
            table=PolicyTable(policy.rules, policy.default),
            ruleset=ruleset,
            configured=configured,
            on_trapped=on_trapped,
            tables=changer,
            packets=packets,
            kernel_counters=kernel_counters,
            namespace=namespace,
            standing=Standing(policy, ruleset.islands),
        )
        loop.add_reader(packets.fileno(), self._readable)
        self._running.sweep = loop.call_later(SWEEP_SECONDS, self._sweep)

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        """See `interfaces.Trap`. Takes effect within this turn of the event loop, in the kernel's sets first
        and then for the held packets."""
        running = self._require()
        if group is PolicyGroup.PRIVATE and verdict is Verdict.CLEAR:
            raise MisuseError("a destination of the group `private` never goes in the clear")
        if lifetime is not None and lifetime <= 0:
            raise MisuseError(f"a lifetime of {lifetime} s")
        for change in self._decided.decide(group, destination, verdict, lifetime, running.loop.time()):
            self._note(change)
        self._releasing.append(((group, destination), verdict))
        self._schedule_flush()

    def ask_for(self, on_asked: Callable[[int, Flow], None]) -> None:
        """See `interfaces.Trap`."""
        self._on_asked = on_asked

    def join(self, number: int, gone: Collection[AddressRange], fresh: Collection[AddressRange]) -> None:
        """See `interfaces.Trap`. In the kernel when this returns."""
        running = self._require()
        for version, out, into in self._joined.change(number, gone, fresh):
            name = joined_set(number, version)
            if running.configured.has_set(name):
                self._change_joined(running, name, version, out, into)
        for destination in self._hold.of_number(number):
            if self._joined.holds(number, destination[1]):
                for packet in self._hold.release(destination):
                    self._give(packet, Verdict.PRIVATE, running.mark_of(number))
        self._send_verdicts(running)

    def _change_joined(
        self, running: _Running, name: str, version: int, gone: list[Range], fresh: list[Range]
    ) -> None:
        messages = [tables.delete_elements(TABLE, name, range_elements(version, gone))] if gone else []
        if fresh:
            messages.append(tables.add_elements(TABLE, name, range_elements(version, fresh)))
        try:
            running.tables.transaction(messages)
        except kernel.NetlinkRefused:
            self._counters["set_errors"] += 1
            self._schedule_restore(running)

    def refuse(self, number: int) -> None:
        """See `interfaces.Trap`."""
        running = self._require()
        for destination in self._hold.of_number(number):
            self._drop(self._hold.release(destination), "dropped_block")
        self._send_verdicts(running)

    def commit(self) -> None:
        """All decisions so far are in the kernel, and held packets on their way, when this returns."""
        self._flush()

    def forget(self, destinations: Iterable[tuple[PolicyGroup, IpAddress]]) -> None:
        """See `interfaces.Trap`. Packets that are held stay held."""
        self._require()
        for group, address in destinations:
            for change in self._decided.forget(group, address):
                self._note(change)
        self._schedule_flush()

    def pass_by(self, source: IpAddress, lifetime: float) -> bool:
        """See `interfaces.Trap`."""
        running = self._require()
        now = running.loop.time()
        if len(self._bystanders) >= MAX_BYSTANDERS:
            self._bystanders = {one: end for one, end in self._bystanders.items() if end > now}
        if len(self._bystanders) >= MAX_BYSTANDERS and source not in self._bystanders:
            lifetime = 0.0  # what is held goes on; the next packet asks again
        else:
            known = source in self._bystanders
            self._bystanders[source] = now + lifetime
            self._note(_bystander(source, now + lifetime, known))
        self._flush()
        for group, packets, left in list(self._hold.take_from(source)):
            for packet in packets:
                self._give(packet, Verdict.BLOCK if group.fails_closed else Verdict.CLEAR)
            if left is not None:
                running.on_trapped(group, left)
        self._send_verdicts(running)
        return True

    def held(self) -> Mapping[tuple[PolicyGroup | int, IpAddress], int]:
        return self._hold.counts()

    def statistics(self) -> Mapping[str, int]:
        """Counters since the start (trapped, released_*, dropped_*, malformed, set_errors, queue_dropped),
        and as of now: held, held_bytes, and decided_* destinations."""
        now = {
            "held": self._hold.packets,
            "held_bytes": self._hold.bytes,
            **{f"decided_{verdict.value}": self._decided.count(verdict) for verdict in Verdict},
        }
        names = (
            "trapped",
            "released_private",
            "released_clear",
            "dropped_block",
            "dropped_overflow",
            "dropped_overdue",
            "malformed",
            "set_errors",
        )
        return {**{name: self._counters[name] for name in names}, **now, **self._kernel_counters()}

    def reload(self, policy: TrapPolicy) -> None:
        """See `interfaces.Trap`. Decisions whose destination has changed its group are forgotten, and packets
        held for it dropped (the next one is sorted anew). Blocks while nft works: about 0.1 s for 1,000
        prefixes; where only configured rules are others, while the kernel takes the difference. A policy that is
        in force already is left alone: where a base chain goes, and be it the bracket's, the kernel drops every
        packet that waits in a queue."""
        running = self._require()
        changes = exchange(running.policy.configured, policy.configured)
        by_groups = replace(policy, configured=()) != replace(running.policy, configured=())
        if not changes and not by_groups:
            return
        running.check_namespace()
        self._flush()
        if by_groups:
            self._change_all(running, policy)
        else:
            self._change_configured(running, policy, changes)
        running.policy = policy
        running.table = PolicyTable(policy.rules, policy.default)
        possible = _PossibleGroups(policy, running.table)
        for number in {rule.number for rule in changes.gone}:
            if not running.standing.has(number):
                self._joined.forget(number)
        for group, address in list(self._hold.destinations()):
            stays = running.standing.has(group) if isinstance(group, int) else group in possible.of(address)
            if not stays:
                self._drop(self._hold.release((group, address)), "dropped_overdue")
        self._flush()

    def _change_configured(
        self, running: _Running, policy: TrapPolicy, changes: Exchange[ConfiguredRule]
    ) -> None:
        """What most reloads are: connections come and go, the groups stay."""
        found = running.standing.difference(running.configured.there, changes)
        if islands.lengths(found.fresh) <= running.ruleset.lengths:
            switch.change_configured(policy, found, running.configured, running.tables)
            running.standing.take(policy, changes, found)
        else:
            self._change_ruleset(running, policy)

    def _change_all(self, running: _Running, policy: TrapPolicy) -> None:
        self._change_ruleset(running, policy)
        possible = _PossibleGroups(policy, PolicyTable(policy.rules, policy.default))
        for group, address, _ in list(self._decided.items()):
            if group not in possible.of(address):
                for change in self._decided.forget(group, address):
                    self._note(change)

    def _change_ruleset(self, running: _Running, policy: TrapPolicy) -> None:
        ruleset = Ruleset(policy)
        switch.change(policy, running.ruleset, ruleset, running.configured, running.tables)
        running.ruleset = ruleset
        running.standing = Standing(policy, ruleset.islands)

    def stop(self, *, guard: bool) -> None:
        """See `interfaces.Trap`. Packets still held are dropped. May be called without a start."""
        running = self._running
        if running is None:
            return
        running.check_namespace()
        switch.leave(running.policy, guard, running.tables)
        running.close()
        self._running = None
        self._hold, self._decided, self._joined = Hold(), Decided(), Joined()
        self._bystanders = {}
        self._changes.clear()
        self._releasing.clear()
        self._verdicts.clear()

    # -- packets in ----------------------------------------------------------------------------------

    def _readable(self) -> None:
        running = self._require()
        for _ in range(READS_PER_WAKEUP):
            data = running.packets.receive()
            if data is None:
                break
            try:
                for message in nl.parse_messages(data):
                    if message.kind == queue.MSG_PACKET:
                        self._trapped(running, queue.parse_packet(message))
            except ParseError:
                self._counters["malformed"] += 1
            if self._running is not running:
                return  # on_trapped stopped us
        self._send_verdicts(running)

    def _trapped(self, running: _Running, packet: queue.QueuedPacket) -> None:
        self._counters["trapped"] += 1
        direction = Direction.FORWARD if packet.hook == queue.HOOK_PREROUTING else Direction.OUTPUT
        try:
            flow = parse_flow(packet.payload, direction)
        except ParseError:
            self._counters["malformed"] += 1
            self._verdicts.append(queue.verdict(packet.queue, packet.id, queue.DROP))
            return
        held = HeldPacket(packet.queue, packet.id, packet.mark, packet.length, flow)
        now = running.loop.time()
        number = running.standing.asking.number_of(flow, packet.mark) if running.standing.asking else 0
        if number:
            self._asked(running, number, flow, held, now)
            return
        group = running.table.match(flow).group
        if self._bystanders.get(flow.source, -math.inf) > now:
            self._give(held, Verdict.BLOCK if group.fails_closed else Verdict.CLEAR)
            return
        verdict = self._decided.verdict(group, flow.destination, now)
        if verdict is None:
            # Only a reload between queueing and reading brings other groups here.
            verdict = _WITHOUT_QUESTION.get(group)
        if verdict is not None:
            self._give(held, verdict)
            return
        new, dropped = self._hold.add((group, flow.destination), held, now)
        self._drop(dropped, "dropped_overflow")
        if new:
            running.on_trapped(group, flow)

    def _asked(self, running: _Running, number: int, flow: Flow, held: HeldPacket, now: float) -> None:
        if self._joined.holds(number, flow.destination):
            self._give(held, Verdict.PRIVATE, running.mark_of(number))
            return
        new, dropped = self._hold.add((number, flow.destination), held, now)
        self._drop(dropped, "dropped_overflow")
        if new:
            self._on_asked(number, flow)

    # -- verdicts out --------------------------------------------------------------------------------

    def _give(self, packet: HeldPacket, verdict: Verdict, private: int = MARK_PRIVATE) -> None:
        if verdict is Verdict.BLOCK:
            self._drop([packet], "dropped_block")
            return
        mark = None
        if verdict is Verdict.PRIVATE:
            # A changed mark makes the kernel route the packet again, into the tunnel or to its policy
            mark = packet.mark & ~MARK_MASK | private
        self._verdicts.append(queue.verdict(packet.queue, packet.id, queue.ACCEPT, mark))
        self._counters[f"released_{verdict.value}"] += 1

    def _drop(self, packets: Iterable[HeldPacket], counter: str) -> None:
        for packet in packets:
            self._verdicts.append(queue.verdict(packet.queue, packet.id, queue.DROP))
            self._counters[counter] += 1

    def _note(self, change: SetChange) -> None:
        earlier = self._changes.get((change.name, change.key))
        if earlier is not None and (earlier.present or earlier.add) and not change.present:
            change = SetChange(change.name, change.key, True, change.add, change.end)
        self._changes[change.name, change.key] = change

    def _schedule_flush(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._require().loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        running = self._running
        if running is None:
            return
        changes = list(self._changes.values())
        self._changes.clear()
        self._commit(running, changes)
        releasing, self._releasing = self._releasing, []
        for destination, verdict in releasing:
            for packet in self._hold.release(destination):
                self._give(packet, verdict)
        self._send_verdicts(running)

    def _commit(self, running: _Running, changes: list[SetChange]) -> None:
        """Into the kernel's sets. Should that fail, the packets still come to us and are answered from
        `_decided`, one by one; the table is put back, for somebody has removed it."""
        for start in range(0, len(changes), MAX_CHANGES_PER_TRANSACTION):
            part = changes[start : start + MAX_CHANGES_PER_TRANSACTION]
            try:
                running.tables.transaction(_set_messages(part, running.loop.time()))
            except kernel.NetlinkRefused:
                self._counters["set_errors"] += 1
                self._schedule_restore(running)

    def _send_verdicts(self, running: _Running) -> None:
        if self._verdicts:
            verdicts, self._verdicts = self._verdicts, []
            running.packets.send(verdicts)

    # -- housekeeping --------------------------------------------------------------------------------

    def _require(self) -> _Running:
        if self._running is None:
            raise MisuseError("this trap is not running")
        return self._running

    def _sweep(self) -> None:
        running = self._require()
        # First of all, so that no failure below ends the sweeping
        running.sweep = running.loop.call_later(SWEEP_SECONDS, self._sweep)
        now = running.loop.time()
        self._decided.expire(now)
        self._bystanders = {source: end for source, end in self._bystanders.items() if end > now}
        self._drop(self._hold.expire(now), "dropped_overdue")
        self._send_verdicts(running)
        if running.tables.table_comment(TABLE) is None:  # `nft flush ruleset`, say
            self._schedule_restore(running)

    def _schedule_restore(self, running: _Running) -> None:
        now = running.loop.time()
        if now >= self._restore_at:
            self._restore_at = now + RESTORE_SECONDS
            running.loop.call_soon(self._restore)

    def _restore(self) -> None:
        """Load table, queue rules and all elements anew."""
        running = self._running
        if running is None:
            return
        running.check_namespace()
        running.ruleset = Ruleset(running.policy)
        running.configured = switch.take_over(running.policy, running.ruleset, running.tables)
        running.tables.insert_queue_rules(TABLE, self._queue_rules)
        self._commit(running, self._decided.all_elements())
        self._commit(running, [_bystander(source, end, False) for source, end in self._bystanders.items()])
        for number, version, ranges in self._joined.all():
            self._change_joined(running, joined_set(number, version), version, [], ranges)

    def _kernel_counters(self) -> dict[str, int]:
        """What the kernel dropped because a queue was full (`queue_dropped`) or we were too slow to read
        (`queue_user_dropped`): fields 6 and 7 of /proc/net/netfilter/nfnetlink_queue."""
        totals = {"queue_dropped": 0, "queue_user_dropped": 0}
        if self._running is not None:
            self._running.kernel_counters.seek(0)
            for line in self._running.kernel_counters:
                words = line.split()
                if int(words[0]) in self._queues:
                    totals["queue_dropped"] += int(words[5])
                    totals["queue_user_dropped"] += int(words[6])
        return totals
