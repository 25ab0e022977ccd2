"""The opportunistic engine: `handle(input, now)` returns the actions; no IO, no clock, no randomness."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from oepy.engine import table
from oepy.engine.entry import Candidate, Entry, Key, candidates_of, tunnel_of
from oepy.engine.forecast import cause_of
from oepy.engine.messages import (
    Action,
    CancelIke,
    CloseTunnel,
    Counters,
    Decide,
    Failure,
    Flush,
    Forget,
    Initiate,
    Input,
    Install,
    InstallFailed,
    LookupDone,
    Named,
    NegotiationFailed,
    NoSa,
    OutboundReady,
    Proof,
    ReadCounters,
    Reloaded,
    Remove,
    Report,
    StartIke,
    StartLookup,
    Terminate,
    Tick,
    Trapped,
    TunnelDown,
    TunnelMoved,
    TunnelUp,
    UnknownSpi,
)
from oepy.engine.table import Cause, State
from oepy.model import (
    Absent,
    AddressRange,
    Authenticated,
    Bogus,
    Direction,
    Insecure,
    IpAddress,
    KeyAnswer,
    PeerKey,
    PolicyGroup,
    SaPair,
    Secure,
    Verdict,
)

_RANKS = {Authenticated.NULL: 0, Authenticated.NAME: 1}
MAX_NAMES = 8  # of one destination that are remembered

_FAILURE_CAUSE = {
    Failure.SILENT: Cause.IKE_SILENT,
    Failure.REJECTED: Cause.IKE_REJECTED,
    Failure.PROOF_FAILED: Cause.PROOF_FAILED,
}


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`group_of` maps an address to its policy group and the text of the matching prefix; `groups_of` to all
    groups that single ports or protocols may have there as well (None: only that one). `is_own`: whether an address
    is this host's. `by_certificate`: whether one without a published key is asked for a certificate."""

    group_of: Callable[[IpAddress], tuple[PolicyGroup, str]]
    use_insecure_keys: bool = False
    after_failed_ike_blocks: bool = False
    groups_of: Callable[[IpAddress], frozenset[PolicyGroup]] | None = None
    is_own: Callable[[IpAddress], bool] = lambda _: False
    by_certificate: Callable[[IpAddress], bool] = lambda _: False

    def possible(self, address: IpAddress) -> frozenset[PolicyGroup]:
        if self.groups_of is not None:
            return self.groups_of(address)
        return frozenset((self.group_of(address)[0],))


class Engine:
    """All destinations and what is decided of them."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings  # replaced as a whole by a reload, which is followed by `Reloaded`
        self.entries: dict[Key, Entry] = {}
        self.counts: Counter[str] = Counter()
        self._by_spi: dict[int, list[Key]] = {}
        self._by_attempt: dict[int, Key] = {}
        self.pairs: dict[int, tuple[SaPair, float]] = {}  # by inbound SPI, with the time it came up
        self._timers: list[tuple[float, int, str, object]] = []
        self._timer_number = 0
        self._next_attempt = 1
        self._lookups: dict[IpAddress, set[Key]] = {}
        self._unknown_spi_at: dict[IpAddress, float] = {}
        self._handlers: dict[type, Callable[..., Iterator[Action]]] = {
            Trapped: self._trapped,
            Named: self._named,
            LookupDone: self._lookup_done,
            NegotiationFailed: self._negotiation_failed,
            TunnelUp: self._tunnel_up,
            OutboundReady: self._outbound_ready,
            TunnelMoved: self._tunnel_moved,
            TunnelDown: self._tunnel_down,
            InstallFailed: self._install_failed,
            UnknownSpi: self._unknown_spi,
            NoSa: self._no_sa,
            Counters: self._counters,
            Initiate: self._initiate,
            Terminate: self._terminate,
            Flush: self._flush,
            Reloaded: self._reloaded,
            Tick: self._tick,
        }

    def handle(self, message: Input, now: float) -> list[Action]:
        """What to do about `message`. Actions are to be carried out in their order."""
        return list(self._handlers[type(message)](message, now))

    def next_timer(self) -> float | None:
        return self._timers[0][0] if self._timers else None

    def find(self, destination: IpAddress, group: PolicyGroup | None = None) -> Entry | None:
        """The entry of the destination; without `group`, that of the address's own group first."""
        if group is None:
            group, _ = self.settings.group_of(destination)
        entry = self.entries.get((group, destination))
        return entry or next((other for _, other in self._at(destination)), None)

    def refuses_responder(self, peer: IpAddress, authenticated: Authenticated) -> str:
        """Why we do not answer an offer of `peer` (for its own traffic); empty where we do."""
        group, prefix = self.settings.group_of(peer)
        if group not in table.RESPONDS:
            return f"policy group {group.value} ({prefix}) does not answer"
        if authenticated.proves_address:
            return ""
        what = "AUTH NULL" if authenticated is Authenticated.NULL else "a key by name alone"
        if group not in table.RESPONDS_TO_NULL:
            return f"policy group {group.value} ({prefix}) wants an authenticated peer, not {what}"
        if PolicyGroup.PRIVATE in self.settings.possible(peer):
            # All groups share the address's tunnel
            return f"a port of this peer is in the group private, which wants proof; {what} does not count"
        entry = self.entries.get((group, peer))
        if entry is None:
            return ""
        if isinstance(entry.answer, (Secure, Bogus)):
            return f"the peer publishes a key and must prove it; {what} does not count"
        if entry.tunnels and entry.authenticated and _rank(entry.authenticated) > _rank(authenticated):
            return f"{what} never replaces an authenticated SA"
        return ""

    # ------------------------------------------------------------ packets and lookups

    def _trapped(self, message: Trapped, now: float) -> Iterator[Action]:
        self.counts["trapped"] += 1
        key = (message.group, message.flow.destination)
        entry = self.entries.get(key)
        if entry is not None:
            entry.wanted = True
        if entry is not None and entry.state in (State.LOOKUP, State.NEGOTIATING):
            return
        if entry is not None and entry.state is not State.NEW:
            if entry.expires is not None and entry.expires <= now:
                yield from self._expire(entry, now)
                entry = self.entries.get(key)
            else:
                yield from self._repeat(entry, now)
                return
        if entry is None:
            if len(self.entries) >= table.MAX_ENTRIES:
                yield from self._overload(key)
                return
            entry = self._new_entry(key, message.prefix, now)
        entry.source = message.flow.source
        yield Report(
            "trapped",
            {
                "peer": str(entry.destination),
                "group": entry.group.value,
                "protocol": message.flow.protocol,
                "port": message.flow.destination_port,
                "forwarded": message.flow.direction is Direction.FORWARD,
            },
        )
        yield from self._look_up(entry, now)

    def _new_entry(self, key: Key, prefix: str, now: float) -> Entry:
        group, destination = key
        entry = Entry(group, destination, prefix or self.settings.group_of(destination)[1], now)
        self.entries[key] = entry
        return entry

    def _overload(self, key: Key) -> Iterator[Action]:
        self.counts["overload"] += 1
        outcome = table.outcome_for(key[0], Cause.OVERLOAD, after_failed_ike_blocks=False)
        yield Decide(*key, outcome.verdict, table.life_of(outcome, 0, 1))

    def _repeat(self, entry: Entry, now: float) -> Iterator[Action]:
        """A packet came past a decision that still holds: the trap's set had just lost it."""
        if entry.state is State.PRIVATE:
            yield Decide(*entry.key, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE)
        else:
            verdict = Verdict.CLEAR if entry.state is State.CLEAR else Verdict.BLOCK
            yield Decide(*entry.key, verdict, max((entry.expires or now) - now, 1.0))

    def _look_up(self, entry: Entry, now: float) -> Iterator[Action]:
        entry.move(State.LOOKUP, "asking the DNS for the peer's key", now)
        entry.candidates, entry.tried, entry.worst = [], 0, None
        self._set_expiry(entry, now, table.HELD_LIMIT)
        waiting = self._lookups.setdefault(entry.destination, set())
        waiting.add(entry.key)
        if len(waiting) == 1:
            yield StartLookup(entry.destination)

    def _lookup_done(self, message: LookupDone, now: float) -> Iterator[Action]:
        answer = message.answer
        for key in sorted(self._lookups.pop(message.destination, ()), key=lambda k: k[0].strictness):
            entry = self.entries.get(key)
            if entry is not None and entry.uncovered is not None:
                yield from self._cover(entry, answer, now)
            if entry is None or entry.state is not State.LOOKUP:
                continue
            entry.answer, entry.answered_at = answer, now
            entry.dns_seconds, entry.ike_seconds = now - entry.since, None
            yield Report(
                "lookup",
                {
                    "peer": str(entry.destination),
                    "status": type(answer).__name__.lower(),
                    "owner": answer.owner,
                    "reason": answer.reason,
                    "seconds": round(answer.elapsed, 6),
                    "questions": answer.questions,
                },
            )
            entry.candidates = self._candidates(entry, answer, entry.source, now)
            if any(self.settings.is_own(candidate.gateway) for candidate in entry.candidates):
                # Nobody protects the last stretch but whoever is at its end (RFC 4322 §3.2)
                entry.candidates = []
                yield from self._settle(entry, Cause.OURS, "its records name one of our addresses", now)
            elif entry.candidates:
                yield from self._next_gateway(entry, now)
            else:
                yield from self._settle(entry, cause_of(answer), answer.reason, now)

    def _candidates(
        self, entry: Entry, answer: KeyAnswer, source: IpAddress | None, now: float
    ) -> list[Candidate]:
        """The gateways to try: of the records that speak for the address, else (where the alternative is the
        clear) of names that claim it, and last the address itself, where it may have a certificate."""
        usable = self._usable_keys(answer)
        if usable:
            return candidates_of(usable, source)
        found: list[Candidate] = []
        if not self._wants_proof(entry):
            if now >= entry.refused_until:
                entry.refused = frozenset()
            claims = (record for record in answer.claims if record.key not in entry.refused)
            found = candidates_of(claims, source, Proof.NAME)
        if isinstance(answer, (Absent, Insecure)) and self.settings.by_certificate(entry.destination):
            found.append(Candidate(entry.destination, (), Proof.CERTIFICATE))
        return found

    def _named(self, message: Named, now: float) -> Iterator[Action]:
        """Ask before the first packet comes. What was decided without this name is looked at again."""
        group, prefix = self.settings.group_of(message.destination)
        if group not in table.INITIATES:
            return
        entry = self.entries.get((group, message.destination))
        if entry is None:
            if len(self.entries) >= table.MAX_ENTRIES // 2:  # the other half is for packets
                return
            entry = self._new_entry((group, message.destination), prefix, now)
            entry.wanted = False
        if message.name in entry.names:
            return
        entry.names = (*entry.names[-MAX_NAMES + 1 :], message.name)
        without_key = entry.state is State.CLEAR and not isinstance(entry.answer, (Secure, Bogus))
        if entry.state is State.NEW or (without_key and not self._wants_proof(entry)):
            yield Report("named", {"peer": str(entry.destination), "subject": message.name})
            yield from self._look_up(entry, now)

    def _usable_keys(self, answer: KeyAnswer) -> tuple[PeerKey, ...]:
        if isinstance(answer, Secure):
            return answer.keys
        if isinstance(answer, Insecure) and self.settings.use_insecure_keys:
            return answer.keys
        return ()

    # ------------------------------------------------------------ negotiation

    def _next_gateway(self, entry: Entry, now: float) -> Iterator[Action]:
        candidate = entry.candidates[entry.tried]
        entry.tried += 1
        entry.attempt = self._new_attempt(entry)
        if entry.state is not State.NEGOTIATING:
            entry.move(State.NEGOTIATING, f"IKE with {candidate.gateway}", now)
        entry.reason = f"IKE with {candidate.gateway}"
        if entry.group.fails_closed:  # the others have 30 s for everything, and go by the table then
            self._set_expiry(entry, now, table.HELD_LIMIT)
        yield Report(
            "negotiate",
            {
                "peer": str(entry.destination),
                "gateway": str(candidate.gateway),
                "attempt": entry.attempt,
                "keys": len(candidate.keys),
            },
        )
        yield StartIke(
            entry.attempt, entry.destination, candidate.gateway, candidate.keys, entry.source, candidate.by
        )

    def _new_attempt(self, entry: Entry) -> int:
        attempt = self._next_attempt
        self._next_attempt += 1
        self._by_attempt[attempt] = entry.key
        return attempt

    def _negotiation_failed(self, message: NegotiationFailed, now: float) -> Iterator[Action]:
        key = self._by_attempt.pop(message.attempt, None)
        entry = self.entries.get(key) if key else None
        if entry is None or entry.attempt != message.attempt:
            return
        entry.attempt = 0
        entry.last_error = message.text
        worst = entry.worst
        if not isinstance(worst, Failure) or message.failure.value > worst.value:
            entry.worst = message.failure
        if entry.state is not State.NEGOTIATING:
            return
        yield Report(
            "ike-failed",
            {"peer": str(entry.destination), "failure": message.failure.name.lower(), "reason": message.text},
            alert=message.failure is Failure.PROOF_FAILED and entry.published,
        )
        if entry.tried < len(entry.candidates):
            yield from self._next_gateway(entry, now)
            return
        yield from self._settle_failed(entry, message.text, now)

    def _settle_failed(self, entry: Entry, detail: str, now: float) -> Iterator[Action]:
        """No gateway gave a tunnel. Where the destination itself publishes nothing it is as if nobody had been
        asked: else whoever owns any zone could close an address to us. (Under `private` it stays shut anyway, and
        is tried again sooner.)"""
        worst = entry.worst if isinstance(entry.worst, Failure) else Failure.SILENT
        cause = _FAILURE_CAUSE[worst]
        if not entry.published and entry.answer is not None:
            keys = {key for candidate in entry.candidates for key in candidate.keys}
            if keys:
                entry.refused, entry.refused_until = entry.refused | keys, now + table.CLAIM_REFUSED
            if not entry.group.fails_closed:
                cause = cause_of(entry.answer)
            unproven = "no certificate" if not keys else "no name that leads here"
            detail = f"{entry.answer.owner} confirms no key, and {unproven} could be proven: {detail}"
        yield from self._settle(entry, cause, detail, now)

    def _settle(self, entry: Entry, cause: Cause, detail: str, now: float) -> Iterator[Action]:
        """The end of a lookup or negotiation that gave no tunnel: the table decides."""
        if not entry.wanted:
            # A stranger's datagram began this, whose source may be forged: it never closes (nor opens) an
            # address that this host has sent nothing to.
            del self.entries[entry.key]
            return
        entry.failures += 1
        outcome = table.outcome_for(
            entry.group, cause, after_failed_ike_blocks=self.settings.after_failed_ike_blocks
        )
        ttl = (entry.answered_at + entry.answer.ttl - now) if entry.answer else 0.0
        life = table.life_of(outcome, ttl, entry.failures)
        state = State.CLEAR if outcome.verdict is Verdict.CLEAR else State.BLOCKED
        if entry.state is State.NEGOTIATING:
            entry.ike_seconds = now - entry.since
        reason = cause.value + (f": {detail}" if detail else "")
        entry.move(state, reason, now)
        self._set_expiry(entry, now, life)
        self.counts[state.value] += 1
        yield Decide(*entry.key, outcome.verdict, life)
        yield Report(
            state.value,
            {
                "peer": str(entry.destination),
                "group": entry.group.value,
                "reason": reason,
                "seconds": round(life, 3),
            },
            alert=outcome.alert,
        )

    # ------------------------------------------------------------ tunnels

    def _tunnel_up(self, message: TunnelUp, now: float) -> Iterator[Action]:
        pair = message.pair
        entries = self._entries_for(pair, message, now)
        if not entries:
            yield CloseTunnel(pair.spi_in, "no policy group wants this tunnel")
            return
        if any(_is_stronger(entry, pair) for entry in entries):
            yield CloseTunnel(pair.spi_in, "a less certain peer never replaces an authenticated SA")
            return
        if not pair.authenticated.proves_address and any(self._wants_proof(e) for e in entries):
            # A reload came between the offer and the tunnel
            yield CloseTunnel(pair.spi_in, "the group private wants an authenticated peer")
            return
        self.pairs[pair.spi_in] = (pair, now)
        self._by_spi[pair.spi_in] = [entry.key for entry in entries]
        yield Install(pair, message.outbound)
        for entry in entries:
            entry.tunnels.append(tunnel_of(pair, now))
            if entry.state is not State.PRIVATE:
                yield from self._became_private(entry, pair, message, now)
        self._arm(now + table.IDLE_FIRST_CHECK, "idle", pair.spi_in)

    def _entries_for(self, pair: SaPair, message: TunnelUp, now: float) -> list[Entry]:
        """The entries whose traffic the pair carries: those it was negotiated for, else one for each single
        address among its remote selectors."""
        if message.replaces is not None and message.replaces in self._by_spi:
            found = [self.entries.get(key) for key in self._by_spi[message.replaces]]
            return [entry for entry in found if entry is not None]
        entries = []
        wanted = self._by_attempt.pop(message.attempt, None)
        if wanted is not None and wanted in self.entries:
            entries.append(self.entries[wanted])
        for selector in pair.remote_ts:
            if selector.start != selector.end:
                continue
            group, prefix = self.settings.group_of(selector.start)
            if group not in table.RESPONDS:
                continue
            entry = self.entries.get((group, selector.start))
            if entry is None and len(self.entries) < table.MAX_ENTRIES:
                entry = self._new_entry((group, selector.start), prefix, now)
            if entry is not None and entry not in entries:
                entries.append(entry)
        return entries

    def _wants_proof(self, entry: Entry) -> bool:
        return PolicyGroup.PRIVATE in self.settings.possible(entry.destination)

    def _became_private(self, entry: Entry, pair: SaPair, message: TunnelUp, now: float) -> Iterator[Action]:
        # An attempt of our own that still runs is not called off: the peer may be about to call off the one
        # that we now use. IKE ranks the two tunnels alike on both sides and lets one go.
        waiting = self._lookups.get(entry.destination)
        if waiting:
            waiting.discard(entry.key)
        if entry.state is State.NEGOTIATING:
            entry.ike_seconds = now - entry.since
        entry.failures, entry.last_error = 0, ""
        if entry.attempt == message.attempt:
            entry.attempt = 0
        entry.move(State.PRIVATE, f"{pair.suite} with {pair.remote.address}", now)
        entry.expires = None
        self.counts["private"] += 1
        yield from self._refresh(entry, now)
        yield Report(
            "private",
            {
                "peer": str(entry.destination),
                "group": entry.group.value,
                "gateway": str(pair.remote.address),
                "spi_in": f"{pair.spi_in:08x}",
                "spi_out": f"{pair.spi_out:08x}",
                "authenticated": pair.authenticated.value,
                "initiator": message.initiator,
                "seconds": round(entry.ike_seconds, 6) if entry.ike_seconds is not None else None,
            },
        )

    def _outbound_ready(self, message: OutboundReady, _now: float) -> Iterator[Action]:
        known = self.pairs.get(message.spi_in)
        if known is not None:
            yield Install(known[0], True)

    def _tunnel_moved(self, message: TunnelMoved, _now: float) -> Iterator[Action]:
        known = self.pairs.get(message.spi_in)
        if known is not None:
            pair = replace(known[0], local=message.local, remote=message.remote)
            self.pairs[message.spi_in] = (pair, known[1])
            yield Install(pair, True)

    def _tunnel_down(self, message: TunnelDown, now: float) -> Iterator[Action]:
        keys = self._by_spi.pop(message.spi_in, [])
        for entry in self._left_by(message.spi_in, keys):
            # The trap first, the SA after it: no packet finds a gap between the two.
            yield from self._reset(entry, f"tunnel down: {message.reason}", now)
        if self.pairs.pop(message.spi_in, None) is not None:
            yield Remove(message.spi_in)
            yield Report(
                "tunnel-down",
                {
                    "peer": str(keys[0][1]) if keys else "",
                    "spi_in": f"{message.spi_in:08x}",
                    "reason": message.reason,
                },
            )

    def _left_by(self, spi_in: int, keys: list[Key]) -> list[Entry]:
        """Take the tunnel from its entries; those that were private by it alone."""
        left = []
        for key in keys:
            entry = self.entries.get(key)
            if entry is None:
                continue
            entry.tunnels = [t for t in entry.tunnels if t.spi_in != spi_in]
            if entry.state is State.PRIVATE and not entry.tunnels:
                left.append(entry)
        return left

    def _install_failed(self, message: InstallFailed, now: float) -> Iterator[Action]:
        """The table decides, as for any negotiation that gave no tunnel: asking again at once would fail
        again, and nobody may be locked out by a datapath that is broken."""
        for entry in self._left_by(message.spi_in, self._by_spi.pop(message.spi_in, [])):
            entry.move(State.NEW, message.reason, now)
            entry.wanted = True
            yield from self._settle(entry, Cause.NO_DATAPATH, message.reason, now)
        if self.pairs.pop(message.spi_in, None) is not None:
            yield Remove(message.spi_in)

    def _reset(self, entry: Entry, reason: str, now: float) -> Iterator[Action]:
        """Back to "ask": the next packet is trapped, held and looked up again."""
        entry.move(State.NEW, reason, now)
        entry.expires = None
        yield Forget(*entry.key)
        if entry.failures == 0:
            del self.entries[entry.key]
        else:
            self._set_expiry(entry, now, 2 * table.BACK_OFF_LONGEST)

    def _unknown_spi(self, message: UnknownSpi, now: float) -> Iterator[Action]:
        """RFC 7296 §2.21.4: no state changes for it; at most a new negotiation, rate-limited."""
        last = self._unknown_spi_at.get(message.peer)
        if last is not None and now - last < table.UNKNOWN_SPI_INTERVAL:
            return
        if len(self._unknown_spi_at) > 1024:
            self._unknown_spi_at.clear()
        self._unknown_spi_at[message.peer] = now
        group, prefix = self.settings.group_of(message.peer)
        if group not in table.INITIATES:
            return
        entry = self.entries.get((group, message.peer))
        if entry is not None and entry.state is not State.NEW:
            return
        if entry is None and len(self.entries) >= table.MAX_ENTRIES:
            return
        yield Report("unknown-spi", {"peer": str(message.peer), "group": group.value})
        yield from self._start((group, message.peer), prefix, now, forced=False)

    def _no_sa(self, message: NoSa, _now: float) -> Iterator[Action]:
        """A host with several addresses: each pair of addresses has a tunnel of its own."""
        for (_, destination), entry in self._at(message.destination):
            if entry.state is not State.PRIVATE or self._covers(entry, message.source):
                continue
            entry.uncovered = message.source
            waiting = self._lookups.setdefault(destination, set())
            waiting.add(entry.key)
            if len(waiting) == 1:
                yield StartLookup(destination)

    def _covers(self, entry: Entry, source: IpAddress) -> bool:
        """The packet may have been dropped just before its SA was there."""
        return any(
            selector.contains_address(source)
            for tunnel in entry.tunnels
            if tunnel.spi_in in self.pairs
            for selector in self.pairs[tunnel.spi_in][0].local_ts
        )

    def _at(self, destination: IpAddress) -> Iterator[tuple[Key, Entry]]:
        for group in PolicyGroup:
            entry = self.entries.get((group, destination))
            if entry is not None:
                yield entry.key, entry

    def _cover(self, entry: Entry, answer: KeyAnswer, now: float) -> Iterator[Action]:
        """Negotiate for the further source, with the first gateway only: the destination is reachable."""
        source, entry.uncovered = entry.uncovered, None
        candidates = self._candidates(entry, answer, source, now)
        if entry.state is not State.PRIVATE or not candidates:
            return
        attempt = self._new_attempt(entry)
        yield Report(
            "negotiate", {"peer": str(entry.destination), "reason": f"no tunnel for source {source}"}
        )
        first = candidates[0]
        yield StartIke(attempt, entry.destination, first.gateway, first.keys, source, first.by)

    # ------------------------------------------------------------ aging

    def _counters(self, message: Counters, now: float) -> Iterator[Action]:
        for counters in message.counters:
            if counters.spi_in not in self.pairs:
                continue
            if now - max(counters.last_in, counters.last_out) <= table.IDLE_RECENT:
                self._arm(now + table.IDLE_NEXT_CHECK, "idle", counters.spi_in)
                continue
            for key in self._by_spi.get(counters.spi_in, ()):
                entry = self.entries.get(key)
                if entry is not None and entry.state is State.PRIVATE and len(entry.tunnels) == 1:
                    yield from self._reset(entry, "idle: the tunnel was let go", now)
            yield CloseTunnel(counters.spi_in, "idle")

    def _tick(self, _message: Tick, now: float) -> Iterator[Action]:
        idle: list[int] = []
        while self._timers and self._timers[0][0] <= now:
            when, _, kind, subject = heapq.heappop(self._timers)
            if kind == "idle":
                assert isinstance(subject, int)
                if subject in self.pairs:
                    idle.append(subject)
                continue
            assert isinstance(subject, tuple)
            entry = self.entries.get(subject)
            if entry is None:
                continue
            if kind == "refresh" and entry.state is State.PRIVATE and entry.refresh_at == when:
                yield from self._refresh(entry, now)
            elif kind == "expire" and entry.expires is not None and entry.expires <= now:
                yield from self._expire(entry, now)
        if idle:
            yield ReadCounters(tuple(idle))

    def _refresh(self, entry: Entry, now: float) -> Iterator[Action]:
        """Enter or renew the kernel's element; it ends by itself when nobody does any more."""
        entry.refresh_at = now + table.PRIVATE_REFRESH
        self._arm(entry.refresh_at, "refresh", entry.key)
        yield Decide(*entry.key, Verdict.PRIVATE, table.PRIVATE_ELEMENT_LIFE)

    def _expire(self, entry: Entry, now: float) -> Iterator[Action]:
        if entry.state is State.LOOKUP:
            waiting = self._lookups.get(entry.destination)
            if waiting:
                waiting.discard(entry.key)
            yield from self._settle(entry, Cause.UNREACHABLE, "the lookup took too long", now)
        elif entry.state is State.NEGOTIATING:
            if entry.attempt:
                self._by_attempt.pop(entry.attempt, None)
                yield CancelIke(entry.attempt)
                entry.attempt = 0
            yield from self._settle_failed(entry, "negotiation took too long", now)
        elif entry.state is State.NEW:
            del self.entries[entry.key]
        else:
            yield from self._reset(entry, "decision expired", now)

    def _set_expiry(self, entry: Entry, now: float, seconds: float) -> None:
        entry.expires = now + seconds
        self._arm(entry.expires, "expire", entry.key)

    def _arm(self, when: float, kind: str, subject: object) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, kind, subject))

    # ------------------------------------------------------------ commands

    def _initiate(self, message: Initiate, now: float) -> Iterator[Action]:
        yield from self._start((message.group, message.destination), message.prefix, now, forced=True)

    def _start(self, key: Key, prefix: str, now: float, *, forced: bool) -> Iterator[Action]:
        entry = self.entries.get(key) or self._new_entry(key, prefix, now)
        if entry.state in (State.LOOKUP, State.NEGOTIATING, State.PRIVATE):
            entry.wanted = entry.wanted or forced
            return
        entry.wanted = forced
        yield from self._look_up(entry, now)

    def _terminate(self, message: Terminate, now: float) -> Iterator[Action]:
        for _, entry in list(self._at(message.destination)):
            spis = [t.spi_in for t in entry.tunnels]
            if entry.state is State.PRIVATE:
                entry.tunnels = []
                yield from self._reset(entry, "terminated by command", now)
            for spi in spis:
                yield CloseTunnel(spi, "terminated by command")

    def _flush(self, message: Flush, now: float) -> Iterator[Action]:
        wanted = message.destination
        known = self.entries.items() if wanted is None else self._at(wanted)
        for _, entry in list(known):
            if entry.state in (State.CLEAR, State.BLOCKED):
                entry.failures = 0
                yield from self._reset(entry, "flushed by command", now)
            elif entry.state is State.NEW:
                del self.entries[entry.key]

    def _within(self, ranges: tuple[AddressRange, ...] | None) -> list[Entry]:
        if ranges is None:
            return list(self.entries.values())
        if all(
            first == last for first, last in ranges
        ):  # as with hosts: found without looking at all the others
            return [entry for first, _ in dict.fromkeys(ranges) for _, entry in self._at(first)]
        return [entry for entry in self.entries.values() if _is_within(entry.destination, ranges)]

    def _may_have_certificate(self, entry: Entry) -> bool:
        """Whether it is asked for one from now on, and was decided without it."""
        decided = entry.state in (State.CLEAR, State.BLOCKED) and isinstance(entry.answer, (Absent, Insecure))
        asked = any(candidate.by is Proof.CERTIFICATE for candidate in entry.candidates)
        return decided and not asked and self.settings.by_certificate(entry.destination)

    def _reloaded(self, message: Reloaded, now: float) -> Iterator[Action]:
        """Destinations that a new policy puts into another group start anew; others keep their tunnels."""
        for entry in self._within(message.within):
            group, prefix = self.settings.group_of(entry.destination)
            if group is entry.group:
                entry.prefix = prefix
            held = entry.authenticated
            unproven = held is not None and not held.proves_address and self._wants_proof(entry)
            if entry.group in self.settings.possible(entry.destination) and not unproven:
                if self._may_have_certificate(entry):
                    yield from self._reset(entry, "it may have a certificate", now)
                continue
            spis = [tunnel.spi_in for tunnel in entry.tunnels]
            if entry.attempt:
                self._by_attempt.pop(entry.attempt, None)
                yield CancelIke(entry.attempt)
            entry.tunnels, entry.failures, entry.attempt = [], 0, 0
            if entry.state is State.NEW:
                del self.entries[entry.key]
            else:
                yield from self._reset(entry, "another policy group", now)
            for spi in spis:
                yield CloseTunnel(spi, "another policy group")


def _is_within(address: IpAddress, ranges: tuple[AddressRange, ...]) -> bool:
    return any(
        first.version == address.version and int(first) <= int(address) <= int(last) for first, last in ranges
    )


def _is_stronger(entry: Entry, pair: SaPair) -> bool:
    """Whether the peer of the entry's tunnel is more certain than that of the new pair."""
    held = entry.authenticated
    return held is not None and _rank(held) > _rank(pair.authenticated)


def _rank(authenticated: Authenticated) -> int:
    return _RANKS.get(authenticated, 2)
