"""The kernel's own trap: IPsec policies without SAs, which make it ask and hold (acquire_plan.py).

The second choice, where the kernel has no packet queue. It is coarser than NFQUEUE, in what the kernel gives:

- at most 100 packets are held for one prefix, and when one destination is decided, packets of others that
  still wait in the same prefix are lost
- a destination that is forgotten within a second of its first packet is not asked about before that is over
- replies to connections that came in in the clear are trapped like everything else
- rules for single protocols or ports are refused: an SA would cover all of the destination
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oepy.errors import MisuseError, OepyError
from oepy.interfaces import TrapPolicy
from oepy.model import AddressRange, Flow, IpAddress, PolicyGroup, Verdict
from oepy.policy import PolicyTable
from oepy.trap import acquire_plan as plan
from oepy.xfrm import pieces as p
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.ids import is_closed_priority, is_trap_priority
from oepy.xfrm.requests import Request
from oepy.xfrm.socket import EventSocket, Refused, Xfrm, XfrmSocket, explained, read

RENEW_SECONDS = 10.0
READS_PER_WAKEUP = 256
MAX_PENDING = 4096  # destinations that wait for a decision
# Packets are to be held (0), and a question that was answered without an SA is to be asked again soon: while
# the larval SA of the first one lives, the kernel does not.
_SYSCTLS = {"net/core/xfrm_larval_drop": 0, "net/core/xfrm_acq_expires": 1}
Destination = tuple[PolicyGroup, IpAddress]


def _write_sysctls(values: Mapping[str, int]) -> dict[str, int]:
    """Returns what they were."""
    before = {}
    for name, value in values.items():
        path = Path("/proc/sys", name)
        try:
            before[name] = int(path.read_text())
            path.write_text(f"{value}\n")
        except OSError as error:
            raise OepyError(
                f"cannot set {name.replace('/', '.')}: {error.strerror}",
                "run as root; or use `trap: nfqueue`",
            ) from error
    return before


@dataclass(slots=True)
class _Running:
    loop: asyncio.AbstractEventLoop
    policy: TrapPolicy
    table: PolicyTable
    on_trapped: Callable[[PolicyGroup, Flow], None]
    kernel: Xfrm
    events: EventSocket
    sysctls: dict[str, int]
    installed: dict[v.PolicyId, v.Policy] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class AcquireTrap:
    """Implements `interfaces.Trap` with XFRM policies. The datapath beside it must have the bare scheme."""

    def __init__(
        self,
        *,
        open_xfrm: Callable[[], Xfrm] = XfrmSocket,
        open_events: Callable[[Sequence[int]], EventSocket] = EventSocket,
        write_sysctls: Callable[[Mapping[str, int]], dict[str, int]] = _write_sysctls,
    ) -> None:
        self._open_xfrm, self._open_events, self._write_sysctls = open_xfrm, open_events, write_sysctls
        self._running: _Running | None = None
        self._pending: dict[Destination, v.PolicyId] = {}
        self._decided: dict[IpAddress, tuple[PolicyGroup, Verdict]] = {}
        self._releasing: dict[v.PolicyId, None] = {}
        self._flush_due = False
        self._counters: Counter[str] = Counter()

    # -- interfaces.Trap -----------------------------------------------------------------------------

    def start(self, policy: TrapPolicy, on_trapped: Callable[[PolicyGroup, Flow], None]) -> None:
        """See `interfaces.Trap`. Raises OepyError for rules that it cannot serve, too."""
        if self._running is not None:
            raise MisuseError("this trap is running already")
        _check(policy)
        kernel = self._open_xfrm()
        events = None
        try:
            events = self._open_events((p.GROUP_ACQUIRE,))
            sysctls = self._write_sysctls(_SYSCTLS)
        except OepyError:
            kernel.close()
            if events is not None:
                events.close()
            raise
        loop = asyncio.get_running_loop()
        table = PolicyTable(policy.rules, policy.default)
        running = _Running(loop, policy, table, on_trapped, kernel, events, sysctls)
        self._running = running
        try:
            # First what is to be there, then away with what an earlier run has left and is not
            self._install(plan.policies(policy))
            _remove(kernel, keep=running.installed)
        except (OepyError, Refused) as error:
            self.stop(guard=False)
            raise (error if isinstance(error, OepyError) else explained(error)) from error
        loop.add_reader(events.fileno(), self._readable)
        running.timer = loop.call_later(RENEW_SECONDS, self._renew)

    def decide(
        self, group: PolicyGroup, destination: IpAddress, verdict: Verdict, lifetime: float | None
    ) -> None:
        """See `interfaces.Trap`. In the kernel when this returns; held packets go by the end of this turn of
        the event loop."""
        running = self._require()
        if group is PolicyGroup.PRIVATE and verdict is Verdict.CLEAR:
            raise MisuseError("a destination of the group `private` never goes in the clear")
        if lifetime is not None and lifetime <= 0:
            raise MisuseError(f"a lifetime of {lifetime} s")
        policy = plan.decided(destination, verdict, lifetime)
        if policy is not None:
            self._carry_out([requests.update_policy(policy)])
        elif destination in self._decided:
            self._undecide([destination])
        self._decided[destination] = (group, verdict)
        waiting = self._pending.pop((group, destination), None)
        if waiting is not None:
            self._counters[f"released_{verdict.value}"] += 1
            self._releasing[waiting] = None
            if not self._flush_due:
                self._flush_due = True
                running.loop.call_soon(self.commit)

    def ask_for(self, on_asked: Callable[[int, Flow], None]) -> None:
        """Never happens: connections that hold packets need the other trap."""

    def join(self, number: int, gone: Collection[AddressRange], fresh: Collection[AddressRange]) -> None:
        """The SAs' own policies come before ours: nothing to do."""

    def refuse(self, number: int) -> None:
        """Nothing is held for connections."""

    def commit(self) -> None:
        """Held packets look for their policy again when their asking policy is replaced."""
        self._flush_due = False
        running = self._running
        if running is None:
            return
        releasing, self._releasing = self._releasing, {}
        self._carry_out(
            [
                requests.update_policy(running.installed[name])
                for name in releasing
                if name in running.installed
            ]
        )

    def forget(self, destinations: Iterable[Destination]) -> None:
        self._require()
        self._undecide([address for _, address in destinations if address in self._decided])

    def pass_by(self, source: IpAddress, lifetime: float) -> bool:
        """See `interfaces.Trap`: the kernel's own trap has one policy for a destination, whoever sends."""
        return False

    def held(self) -> Mapping[tuple[PolicyGroup | int, IpAddress], int]:
        """One at least for each destination: how many the kernel holds it does not say."""
        return dict.fromkeys(self._pending, 1)

    def statistics(self) -> Mapping[str, int]:
        now = {f"decided_{verdict.value}": 0 for verdict in Verdict}
        for _, verdict in self._decided.values():
            now[f"decided_{verdict.value}"] += 1
        return {**self._counters, **now, "held": len(self._pending)}

    def reload(self, policy: TrapPolicy) -> None:
        running = self._require()
        _check(policy)
        table = PolicyTable(policy.rules, policy.default)
        before = running.installed
        self._install(plan.policies(policy))
        gone = [name for name in before if name not in running.installed]
        self._carry_out([requests.delete_policy(name) for name in gone])
        running.policy, running.table = policy, table
        changed = [
            address
            for address, (group, _) in self._decided.items()
            if table.match_address(address).group is not group
        ]
        self._undecide(changed)
        for group, address in list(self._pending):
            if table.match_address(address).group is not group:
                del self._pending[group, address]

    def stop(self, *, guard: bool) -> None:
        """See `interfaces.Trap`. May be called without a start."""
        running = self._running
        if running is None:
            return
        self._running = None
        running.loop.remove_reader(running.events.fileno())
        if running.timer is not None:
            running.timer.cancel()
        try:
            standing: dict[v.PolicyId, v.Policy] = {}
            if guard:
                standing = {policy.id: policy for policy in plan.policies(running.policy, guard=True)}
                running.kernel.carry_out([requests.update_policy(policy) for policy in standing.values()])
            _remove(running.kernel, keep=standing)
            self._write_sysctls(running.sysctls)
        finally:
            running.events.close()
            running.kernel.close()
            self._pending.clear()
            self._decided.clear()
            self._releasing.clear()

    # -- the kernel's questions ----------------------------------------------------------------------

    def _readable(self) -> None:
        running = self._require()
        for _ in range(READS_PER_WAKEUP):
            received = running.events.receive()
            if received is None:
                return
            found, lost = received
            if lost:
                self._counters["events_lost"] += 1  # the kernel asks again when its larval SA has run out
            for event in found:
                if isinstance(event, v.Acquire) and plan.asks(event.policy):
                    self._asked(running, event)
                if self._running is not running:
                    return  # on_trapped stopped us

    def _asked(self, running: _Running, acquire: v.Acquire) -> None:
        destination = acquire.selector.destination.network_address
        group = running.table.match_address(destination).group
        key = (group, destination)
        known = self._decided.get(destination)
        if key in self._pending or (known is not None and known[1] is Verdict.PRIVATE):
            # Private, and asked all the same: from another address of ours. The datapath tells of it.
            return
        if len(self._pending) >= MAX_PENDING:
            self._counters["dropped_overflow"] += 1
            return
        self._decided.pop(destination, None)  # its policy has run out
        self._counters["trapped"] += 1
        self._pending[key] = acquire.policy.id
        # The ports of an ACQUIRE are not those of the packet
        source = acquire.selector.source.network_address
        running.on_trapped(group, Flow(source, destination, acquire.selector.protocol))

    # -- policies ------------------------------------------------------------------------------------

    def _install(self, policies: Iterable[v.Policy]) -> None:
        running = self._require()
        wanted = {policy.id: policy for policy in policies}
        self._carry_out(
            [
                requests.update_policy(policy)
                for name, policy in wanted.items()
                if running.installed.get(name) != policy
            ]
        )
        running.installed = wanted

    def _renew(self) -> None:
        running = self._require()
        running.timer = running.loop.call_later(RENEW_SECONDS, self._renew)
        self._carry_out(
            [
                requests.update_policy(policy)
                for policy in running.installed.values()
                if policy.limits.hard_seconds
            ]
        )

    def _undecide(self, destinations: Sequence[IpAddress]) -> None:
        self._require().kernel.carry_out(
            [requests.delete_policy(plan.decided_id(address)) for address in destinations]
        )  # those that have run out are not there any more
        for address in destinations:
            self._decided.pop(address, None)

    def _carry_out(self, changes: Sequence[Request]) -> None:
        for refused in self._require().kernel.carry_out(changes):
            if refused is not None:
                raise explained(refused)

    def _require(self) -> _Running:
        if self._running is None:
            raise MisuseError("this trap is not running")
        return self._running


def _check(policy: TrapPolicy) -> None:
    for rule in policy.rules:
        if rule.protocol or rule.port:
            raise OepyError(
                f"policy group {rule.group.value} has a rule for one protocol or port ({rule.network}), which "
                "the kernel's own trap cannot serve",
                "remove it, or use `trap: nfqueue`",
            )


def _ours(kernel: Xfrm) -> Iterator[v.Policy]:
    """The policies that a trap of ours has made. Raises Refused."""
    for frame in list(kernel.dump(requests.dump_policies())):
        found = read(frame)
        if not isinstance(found, v.Policy) or found.if_id or found.mark is not None:
            continue
        if is_trap_priority(found.priority):
            yield found


def _remove(kernel: Xfrm, keep: Mapping[v.PolicyId, v.Policy]) -> None:
    gone = [policy.id for policy in _ours(kernel) if policy.id not in keep]
    kernel.carry_out([requests.delete_policy(name) for name in gone])


# ---- the guard that a stopped trap leaves ------------------------------------------------------------------


def _guard(kernel: Xfrm) -> bool:
    return any(
        policy.action is v.PolicyAction.BLOCK and is_closed_priority(policy.priority)
        for policy in _ours(kernel)
    )


def guard_stands() -> bool:
    """In this network namespace. False where the kernel has no IPsec."""
    try:
        kernel = XfrmSocket()
    except OepyError:
        return False
    try:
        return _guard(kernel)
    except Refused as refused:
        raise explained(refused) from refused
    finally:
        kernel.close()


def remove_guard() -> bool:
    """False where there was none. Raises OepyError."""
    try:
        kernel = XfrmSocket()
    except OepyError:
        return False
    try:
        if not _guard(kernel):
            return False
        _remove(kernel, keep={})
        return True
    except Refused as refused:
        raise explained(refused) from refused
    finally:
        kernel.close()
