"""The chain of trust: which zones are signed with which keys, which are provably unsigned.

Two ways lead to the state of a zone. Upward, for a zone named by a signature: its DS is signed by the zone
above, whose DS is signed by the zone above that, down from what is known already; the questions of all levels
can be on their way at once. Downward, for an answer that came without signatures: label by label from the
nearest known zone, until a proof says that a delegation is unsigned; without such a proof it is bogus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype

from oepy.dns.anchors import Anchor, TrustAnchors
from oepy.dns.cache import TtlCache
from oepy.dns.denial import Cut, Denial, Nsec, Nsec3
from oepy.dns.limits import KEY_EFFORT, MAX_DENIAL_RECORDS, Budget, LimitExceeded
from oepy.dns.message import NameKey, Question, Reply, RRset, name_key
from oepy.dns.ranges import Ranges
from oepy.dns.signatures import (
    ALGORITHM_NAMES,
    STRICT,
    WITH_SHA1,
    Ds,
    Policy,
    SignatureFailure,
    Verified,
    ZoneKey,
    is_supported,
    matches_ds,
    strongest,
    usable_keys,
    verify,
)
from oepy.dns.transport import NoReply, Transport
from oepy.model import Security

MAX_ZONES = 5000
MAX_CUTS = 20000
WALK_WINDOW = 6  # DS questions that are on their way at once on a walk down
MAX_NEGATIVE_TTL = 3600.0  # RFC 2308 §5 advises one to three hours
MAX_FORESEEN = 6  # zones whose DS and DNSKEY are asked along with the first question
_DS = int(dns.rdatatype.DS)
_DNSKEY = int(dns.rdatatype.DNSKEY)
_CNAME = int(dns.rdatatype.CNAME)
_NSEC = int(dns.rdatatype.NSEC)
_NSEC3 = int(dns.rdatatype.NSEC3)
STRIPPED = "the resolver strips DNSSEC"
_ARPA = dns.name.from_text("arpa.")
_IP6_ARPA = dns.name.from_text("ip6.arpa.")
# Where ip6.arpa is usually cut: allocations of a /32, a /48 and a /64, in labels with the root.
_IP6_CUTS = frozenset({11, 15, 19})

Name = dns.name.Name


class Verdict(Exception):
    """Ends a lookup: bogus, or indeterminate where nothing can be said. `unreachable`: nobody answered;
    `unsigned`: signatures are missing; `stripped`: it is the resolver that leaves them away."""

    def __init__(
        self,
        status: Security,
        reason: str,
        zone: Name | None = None,
        *,
        unreachable: bool = False,
        over_limit: bool = False,
        stripped: bool = False,
        unsigned: bool = False,
    ) -> None:
        super().__init__(reason)
        self.stripped = stripped
        self.unsigned = unsigned
        self.over_limit = over_limit
        self.status = status
        self.reason = reason
        self.zone = zone
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class ChainEntry:
    """One zone of the chain as shown to people."""

    zone: str
    algorithm: str
    key_tags: tuple[int, ...]
    status: str


@dataclass(frozen=True, slots=True)
class ZoneState:
    """A zone with its validated keys, or the point below which nothing is signed."""

    zone: Name
    status: Security  # SECURE or INSECURE
    keys: tuple[ZoneKey, ...] = ()
    reason: str = ""
    parent: ZoneState | None = None
    ttl: float = 0.0
    key: NameKey = field(default=(), init=False, repr=False, compare=False)  # of the zone's name
    entry: ChainEntry = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", name_key(self.zone))
        algorithms = dict.fromkeys(ALGORITHM_NAMES[int(key.dnskey.algorithm)] for key in self.keys)
        tags = tuple(dict.fromkeys(key.tag for key in self.keys))
        entry = ChainEntry(str(self.zone), ", ".join(algorithms), tags, self.status.value)
        object.__setattr__(self, "entry", entry)

    @property
    def is_secure(self) -> bool:
        return self.status is Security.SECURE


@dataclass(slots=True)
class Shared:
    """What all lookups have in common. `clock` is seconds since 1970 (for signatures), `monotonic` is for
    the caches."""

    transport: Transport
    anchors: TrustAnchors
    clock: Callable[[], float]
    monotonic: Callable[[], float]
    policy: Policy = STRICT
    zones: TtlCache[NameKey, ZoneState] = field(default_factory=lambda: TtlCache(MAX_ZONES))
    cuts: TtlCache[NameKey, Cut] = field(default_factory=lambda: TtlCache(MAX_CUTS))
    ranges: Ranges = field(default_factory=Ranges)
    questions: dict[Question, asyncio.Future[Reply | NoReply]] = field(default_factory=dict)
    zones_pending: dict[NameKey, asyncio.Task[ZoneState | Verdict]] = field(default_factory=dict)

    def ask(self, question: Question) -> asyncio.Future[Reply | NoReply]:
        """Send the question, or join the one that is on its way."""
        running = self.questions.get(question)
        if running is None:
            running = self.questions[question] = asyncio.ensure_future(self.transport.ask(question))
            running.add_done_callback(lambda _: self.questions.pop(question, None))
        return running

    async def ask_here(self, question: Question) -> Reply | NoReply:
        """Send a question that is not on its way, and wait for it without a task; others may join it."""
        ending = self.questions[question] = asyncio.get_running_loop().create_future()
        reply: Reply | NoReply = NoReply(question, "given up", given_up=True)
        try:
            reply = await self.transport.ask(question)
            return reply
        finally:
            del self.questions[question]
            ending.set_result(reply)


class Chain:
    """The chain-building part of one lookup, with the lookup's budget."""

    def __init__(self, shared: Shared, budget: Budget) -> None:
        self.shared = shared
        self.budget = budget
        self.now = int(shared.clock())
        self.asked = 0
        self.touched: dict[NameKey, ZoneState] = {}
        self._replies: dict[Question, asyncio.Future[Reply | NoReply] | Reply | NoReply] = {}

    # ---- questions ---------------------------------------------------------------------------------------

    def start(self, name: Name, rdtype: int) -> None:
        """Send the question unless it is on its way or answered. Raises LimitExceeded."""
        question = Question(name, rdtype)
        if question not in self._replies:
            self.budget.spend_question()
            self.asked += question not in self.shared.questions
            self.adopt(question, self.shared.ask(question))

    async def reply(self, name: Name, rdtype: int) -> Reply:
        """Raises Verdict (indeterminate) where no usable reply comes, LimitExceeded."""
        question = Question(name, rdtype)
        reply = await self._answer(question)
        while isinstance(reply, NoReply) and reply.given_up:
            del self._replies[question]
            reply = await self._answer(question)
        self.budget.check_effort()
        if isinstance(reply, NoReply):
            raise Verdict(
                Security.INDETERMINATE, f"no reply for {reply.question}: {reply.reason}", unreachable=True
            )
        if reply.rcode not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            raise Verdict(
                Security.INDETERMINATE,
                f"the resolver answers {reply.question} with {reply.rcode_text}",
                unreachable=True,
            )
        return reply

    async def _answer(self, question: Question) -> Reply | NoReply:
        """The answer that is there, that comes, or that is asked for now."""
        if question not in self._replies and question not in self.shared.questions:
            self.budget.spend_question()
            self.asked += 1
            reply = self._replies[question] = await self.shared.ask_here(question)
            self._account(reply)
            return reply
        self.start(question.name, question.type)
        known = self._replies[question]
        return await asyncio.shield(known) if isinstance(known, asyncio.Future) else known

    def adopt(self, question: Question, asked: asyncio.Future[Reply | NoReply]) -> None:
        """Take over a question that was sent earlier."""
        self._replies[question] = asked
        asked.add_done_callback(self._account_future)

    def _account_future(self, asked: asyncio.Future[Reply | NoReply]) -> None:
        if not asked.cancelled() and asked.exception() is None:
            self._account(asked.result())

    def _account(self, reply: Reply | NoReply) -> None:
        if isinstance(reply, Reply):
            self.budget.effort -= reply.effort

    def foresee(self, name: Name) -> None:
        """Ask now for what the chain to `name` will most likely need, where little of it is known."""
        known = self.nearest_known(name)
        if known is not None and (not known.is_secure or len(known.key) >= 4):
            return
        if self.excuse(name) is not None:
            return
        if known is None:
            anchor = self.shared.anchors.closest(name)
            if anchor is None:
                return
            self.start(anchor.zone, _DNSKEY)
            depth = len(anchor.zone.labels)
        else:
            depth = len(known.zone.labels)
            if not known.is_secure or depth >= (4 if name.is_subdomain(_ARPA) else 3):
                return
        now = self.shared.monotonic()
        for zone in self._likely_zones(name, depth)[:MAX_FORESEEN]:
            if self.shared.cuts.get(name_key(zone), now) is None:
                self.start(zone, _DS)
                self.start(zone, _DNSKEY)

    @staticmethod
    def _likely_zones(name: Name, depth: int) -> list[Name]:
        lengths = range(depth + 1, len(name.labels))
        if name.is_subdomain(_IP6_ARPA):
            lengths_chosen = [n for n in lengths if n <= len(_IP6_ARPA.labels) or n in _IP6_CUTS]
        else:
            lengths_chosen = list(lengths)
        return [Name(name.labels[-length:]) for length in lengths_chosen]

    def nearest_known(self, name: Name) -> ZoneState | None:
        """The zone at or nearest above `name` whose state is in the cache, but none above its anchor."""
        now = self.shared.monotonic()
        key = name_key(name)
        for depth in range(len(key)):
            state = self.shared.zones.get(key[depth:], now)
            if state is not None:
                return state
            if self.shared.anchors.at_key(key[depth:]) is not None:
                return None
        return None

    # ---- zones -------------------------------------------------------------------------------------------

    async def zone(self, name: Name) -> ZoneState:
        """The state of the zone `name`, which some signature or DS names. Raises Verdict, LimitExceeded."""
        key = name_key(name)
        state = self.shared.zones.get(key, self.shared.monotonic())
        pending = self.shared.zones_pending
        while state is None:
            task = pending.get(key)
            is_mine = task is None or task.done()
            if task is None or task.done():
                task = asyncio.ensure_future(self._build_zone_or_verdict(name))
                pending[key] = task
                task.add_done_callback(lambda done: pending.pop(key) if pending.get(key) is done else None)
            outcome = await asyncio.shield(task)
            if isinstance(outcome, ZoneState):
                state = outcome
            elif is_mine or not outcome.over_limit:  # another lookup's empty budget is not our failure
                raise Verdict(
                    outcome.status,
                    outcome.reason,
                    outcome.zone,
                    unreachable=outcome.unreachable,
                    over_limit=outcome.over_limit,
                    stripped=outcome.stripped,
                    unsigned=outcome.unsigned,
                )
        self.rely_on(state)
        return state

    def rely_on(self, state: ZoneState | None) -> None:
        """Name the zone and those above it in the outcome."""
        while state is not None and state.key not in self.touched:
            self.touched[state.key] = state
            state = state.parent

    async def _build_zone_or_verdict(self, name: Name) -> ZoneState | Verdict:
        """A task of its own, since other lookups may wait for the same zone: so it never raises these."""
        try:
            state = await self._build_zone(name)
        except Verdict as verdict:
            return verdict
        except LimitExceeded as error:
            return Verdict(Security.BOGUS, str(error), name, over_limit=True)
        self._keep(name, state)
        return state

    def _keep(self, name: Name, state: ZoneState) -> None:
        if state.zone == name:  # else it is the state of a zone above, kept there with its own end
            self.shared.zones.put(name_key(name), state, state.ttl, self.shared.monotonic())

    async def _build_zone(self, name: Name) -> ZoneState:
        excuse = self.excuse(name)
        if excuse is not None:
            return excuse
        anchor = self.shared.anchors.at(name)
        self.start(name, _DNSKEY)
        if anchor is not None:
            return await self._anchored(anchor)
        if self.shared.anchors.closest(name) is None:
            raise Verdict(Security.INDETERMINATE, f"no trust anchor at or above {name}", name)
        reply = await self.reply(name, _DS)
        parent = await self._zone_above(name, reply)
        if not parent.is_secure:
            return parent
        return await self._below(name, parent, reply)

    def excuse(self, name: Name) -> ZoneState | None:
        """The insecure state by configuration, where the anchor nearest to `name` is a negative one."""
        anchor = self.shared.anchors.closest(name)
        if anchor is None or not anchor.is_negative:
            return None
        reason = f"the configuration has a negative trust anchor for {anchor.zone} (RFC 7646)"
        return ZoneState(anchor.zone, Security.INSECURE, (), reason, None, float("inf"))

    async def _zone_above(self, name: Name, reply: Reply) -> ZoneState:
        """The zone that answers for the DS of `name`, by its signatures; an insecure state without any."""
        rrsets = [r for r in (reply.find(name, _DS), reply.find(name, _CNAME)) if r is not None]
        rrsets = rrsets or _denials(reply)
        signer = deepest_signer(rrsets, name, strict=True)
        if signer is None:
            return await self.walk(name.parent(), f"the DS answer for {name}")
        return await self.zone(signer)

    async def _below(self, name: Name, parent: ZoneState, reply: Reply) -> ZoneState:
        """The zone `name`, whose DS `parent` answers for. Raises Verdict where it is no zone."""
        rrset = reply.find(name, _DS)
        if rrset is not None:
            return await self._signed_below(name, parent, rrset)
        cut, ttl = self._denied_cut(name, parent, reply)
        state = self._unsigned(name, parent, cut, ttl)
        if state is None:
            raise Verdict(
                Security.BOGUS,
                f"records are signed by {name}, but {parent.zone} proves {_CUT_WORDS[cut]}",
                name,
            )
        return state

    async def _signed_below(self, name: Name, parent: ZoneState, rrset: RRset) -> ZoneState:
        verified = self.verify(rrset, parent)
        if verified.closest_encloser is not None:
            raise Verdict(Security.BOGUS, f"{rrset} is made from a wildcard", name)
        digests = strongest((ds for ds in rrset.rdatas if isinstance(ds, Ds)), self.shared.policy)
        if not digests:
            reason = _unsupported(name, rrset)
            return ZoneState(name, Security.INSECURE, (), reason, parent, verified.ttl)
        return await self._with_keys(
            name,
            parent,
            lambda key: any(matches_ds(key, name, ds) for ds in digests),
            f"no DNSKEY of {name} fits the DS in {parent.zone} "
            f"(key {', '.join(str(ds.key_tag) for ds in digests)})",
            verified.ttl,
        )

    async def _anchored(self, anchor: Anchor) -> ZoneState:
        policy = self.shared.policy
        usable = any(is_supported(ds, policy) for ds in anchor.digests) or usable_keys(anchor.keys, policy)
        if not usable:
            why = "has no supported algorithm" if anchor.text else "is revoked (RFC 5011)"
            raise Verdict(Security.INDETERMINATE, f"the trust anchor of {anchor.zone} {why}")
        return await self._with_keys(
            anchor.zone,
            None,
            lambda key: anchor.accepts(key, policy),
            f"no DNSKEY of {anchor.zone} fits the trust anchor (key {anchor.text})",
            float("inf"),
        )

    async def _with_keys(
        self,
        name: Name,
        parent: ZoneState | None,
        is_entry: Callable[[ZoneKey], bool],
        mismatch: str,
        ttl: float,
    ) -> ZoneState:
        """Fetch the DNSKEY set and verify it by a key that the DS or the anchor names (RFC 4035 §5.2)."""
        rrset = (await self.reply(name, _DNSKEY)).find(name, _DNSKEY)
        if rrset is None or not rrset.signatures:
            what = f"{name} should be signed, but has no DNSKEY"
            if rrset is not None:
                what = f"the DNSKEY set of {name} came without signatures"
            if parent is None:
                what = f"{STRIPPED}: {what}"
            raise Verdict(Security.BOGUS, what, name, unsigned=True, stripped=parent is None)
        self.budget.effort -= KEY_EFFORT * len(rrset.rdatas)
        keys = usable_keys(rrset.rdatas, self.shared.policy)
        entries = [key for key in keys if is_entry(key)]
        if not entries:
            raise Verdict(Security.BOGUS, mismatch, name)
        try:
            verified = verify(rrset, name, entries, self.now, self.budget)
        except SignatureFailure as failure:
            raise Verdict(Security.BOGUS, str(failure), name) from None
        return ZoneState(name, Security.SECURE, keys, "", parent, min(ttl, verified.ttl))

    async def is_stripped(self, name: Name) -> bool:
        """Whether the resolver leaves signatures away even where they must be: at the anchor above `name`."""
        anchor = self.shared.anchors.closest(name)
        if anchor is None or anchor.is_negative:
            return False
        reply = await self.reply(anchor.zone, _DNSKEY)
        rrset = reply.find(anchor.zone, _DNSKEY)
        return rrset is None or not rrset.signatures

    # ---- the walk down -----------------------------------------------------------------------------------

    async def walk(self, name: Name, subject: str) -> ZoneState:
        """The insecure state that excuses `subject`, at or above `name`, for having no signatures.

        Raises Verdict (bogus) where every zone on the way is signed.
        """
        anchor = self.shared.anchors.closest(name)
        if anchor is None:
            raise Verdict(Security.INDETERMINATE, f"no trust anchor at or above {name}", name)
        state = self.excuse(name) or self.nearest_known(name) or await self.zone(anchor.zone)
        self.rely_on(state)
        if state.is_secure:
            state = await self._leap(name, state)
        path = _path(state.zone, name)
        for index, label_name in enumerate(path):
            if not state.is_secure:
                break
            for ahead in path[index : index + WALK_WINDOW]:
                if self.shared.cuts.get(name_key(ahead), self.shared.monotonic()) is None:
                    self.start(ahead, _DS)
            below = await self._step(label_name, state)
            if below is None:
                break
            state = below
        if state.is_secure:
            reason = f"{state.zone} is signed, but {subject} came without signatures"
            raise Verdict(Security.BOGUS, reason, state.zone, unsigned=True)
        self.rely_on(state)
        return state

    async def _leap(self, name: Name, state: ZoneState) -> ZoneState:
        """Far down at once, by DS answers that were asked already or lie where ip6.arpa is usually cut.

        Sound, because the zone that signs such an answer has its own chain from the top; the labels that are
        leapt over cannot matter any more.
        """
        for candidate in reversed(_path(state.zone, name)):
            usual = candidate.is_subdomain(_IP6_ARPA) and len(candidate.labels) in _IP6_CUTS
            if not usual and Question(candidate, _DS) not in self._replies:
                continue
            reply = await self.reply(candidate, _DS)
            rrset = reply.find(candidate, _DS)
            signer = deepest_signer([rrset] if rrset else _denials(reply), candidate, strict=True)
            if signer is None or not signer.is_subdomain(state.zone):
                continue
            upper = await self.zone(signer)
            if rrset is not None:
                return await self.zone(candidate)
            if not upper.is_secure:
                return upper
            cut, ttl = self._denied_cut(candidate, upper, reply)
            below = self._unsigned(candidate, upper, cut, ttl)
            if below is not None:
                self._keep(candidate, below)
            return below or upper
        return state

    async def _step(self, name: Name, state: ZoneState) -> ZoneState | None:
        """One label down from a secure zone: the same state where there is no cut, None where the name does
        not exist."""
        cut = self.shared.cuts.get(name_key(name), self.shared.monotonic())
        if cut is Cut.NO_CUT:
            return state
        reply = await self.reply(name, _DS)
        if reply.find(name, _DS) is not None:
            return await self.zone(name)
        alias = reply.find(name, _CNAME)
        if alias is not None:  # a name with an alias is no delegation (RFC 1034 §3.6.2)
            self.verify(alias, state)
            return state
        cut, ttl = self._denied_cut(name, state, reply)
        if cut is Cut.NO_CUT:
            return state
        below = self._unsigned(name, state, cut, ttl)
        if below is not None:
            self._keep(name, below)
        return below

    def _denied_cut(self, name: Name, parent: ZoneState, reply: Reply) -> tuple[Cut, float]:
        """What `parent`'s denial of the DS proves. Raises Verdict where it proves nothing."""
        denial, ttl = self.denial(reply, parent)
        cut = denial.no_ds(name)
        if cut is Cut.UNKNOWN:
            what = "no proof" if denial else "no signed proof"
            reason = f"{parent.zone} gives {what} that {name} has no DS record"
            raise Verdict(Security.BOGUS, reason, parent.zone, unsigned=not denial)
        self.shared.cuts.put(name_key(name), cut, ttl, self.shared.monotonic())
        return cut, ttl

    @staticmethod
    def _unsigned(name: Name, parent: ZoneState, cut: Cut, ttl: float) -> ZoneState | None:
        if cut in (Cut.NO_CUT, Cut.ABSENT, Cut.UNKNOWN):
            return None
        reason = f"{parent.zone} proves that {name} is not signed ({cut.value})"
        return ZoneState(name, Security.INSECURE, (), reason, parent, ttl)

    # ---- verification ------------------------------------------------------------------------------------

    def verify(self, rrset: RRset, state: ZoneState) -> Verified:
        """Raises Verdict (bogus) where no signature holds, LimitExceeded."""
        try:
            return verify(rrset, state.zone, state.keys, self.now, self.budget)
        except SignatureFailure as failure:
            raise Verdict(Security.BOGUS, str(failure), state.zone) from None

    def denial(self, reply: Reply, state: ZoneState) -> tuple[Denial, float]:
        """The denial records of the zone, verified, and their smallest TTL (RFC 9077: at most the SOA's)."""
        records: list[tuple[Name, dns.rdata.Rdata]] = []
        ttl = min(MAX_NEGATIVE_TTL, reply.negative_ttl or MAX_NEGATIVE_TTL)
        for rrset in _denials(reply)[:MAX_DENIAL_RECORDS]:
            if not any(signature.signer == state.zone for signature in rrset.signatures):
                continue
            verified = self.verify(rrset, state)
            if verified.closest_encloser is None:  # an expanded wildcard says nothing about this owner
                records += [(rrset.name, rdata) for rdata in rrset.rdatas]
                ttl = min(ttl, verified.ttl)
        now = self.shared.monotonic()
        for owner, rdata in records:
            if isinstance(rdata, Nsec | Nsec3):
                self.shared.ranges.put(state.zone, owner, rdata, ttl, now)
        return Denial(state.zone, records, self.budget), ttl

    def known_denial(self, name: Name, state: ZoneState) -> tuple[Denial, float] | None:
        """What is kept of earlier denials of the zone that may speak of `name`, and its seconds left."""
        records, ttl = self.shared.ranges.around(state.zone, name, self.shared.monotonic())
        return (Denial(state.zone, records, self.budget), ttl) if records else None

    def entries(self, failed: Name | None = None) -> tuple[ChainEntry, ...]:
        """The zones that this lookup relied on, from the top."""
        found = [
            replace(state.entry, status=Security.BOGUS.value) if state.zone == failed else state.entry
            for _, state in sorted(self.touched.items(), key=lambda item: (len(item[0]), item[0][::-1]))
        ]
        if failed is not None and name_key(failed) not in self.touched:
            found.append(ChainEntry(str(failed), "", (), Security.BOGUS.value))
        return tuple(found)


_CUT_WORDS = {
    Cut.NO_CUT: "that no zone begins there",
    Cut.ABSENT: "that this name does not exist",
    Cut.UNKNOWN: "nothing about it",
}


def _unsupported(name: Name, rrset: RRset) -> str:
    """In words for those who wonder why a signed zone counts as insecure."""
    found = [ds for ds in rrset.rdatas if isinstance(ds, Ds)]
    if any(is_supported(ds, WITH_SHA1) for ds in found):
        return f"the DS of {name} has only SHA-1, which protects no more (RFC 9905; dns.sha1)"
    return f"the DS of {name} has only algorithms or digests that are not supported"


def _path(above: Name, name: Name) -> list[Name]:
    """The names from one label below `above` down to `name`."""
    return [Name(name.labels[-n:]) for n in range(len(above.labels) + 1, len(name.labels) + 1)]


def _denials(reply: Reply) -> list[RRset]:
    return [rrset for rrset in reply.authority if rrset.type in (_NSEC, _NSEC3)]


def deepest_signer(rrsets: list[RRset], name: Name, *, strict: bool) -> Name | None:
    """The deepest zone among the signers that can hold `name` (`strict`: as the zone above it)."""
    if len(rrsets) == 1 and len(rrsets[0].signatures) == 1:  # as nearly always
        signer = rrsets[0].signatures[0].signer
        return signer if name.is_subdomain(signer) and not (strict and name == signer) else None
    signers = {
        signature.signer
        for rrset in rrsets
        for signature in rrset.signatures
        if name.is_subdomain(signature.signer) and not (strict and name == signature.signer)
    }
    return max(signers, key=lambda signer: len(signer.labels), default=None)


def denial_signer(reply: Reply, name: Name, *, strict: bool) -> Name | None:
    """The zone whose denial records in the reply can speak about `name`."""
    return deepest_signer(_denials(reply), name, strict=strict)
