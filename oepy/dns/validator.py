"""The validating stub: one question, one outcome, with the reason (RFC 4035 §4.3 and §5).

No sockets and no clock of its own: questions go through a `Transport`, times are injected. Asked is one
recursive resolver with DO and CD; what it says of security (AD) is never looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import dns.exception
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.rdtypes.ANY.DNAME

from oepy.dns.anchors import TrustAnchors
from oepy.dns.cache import TtlCache
from oepy.dns.chain import (
    STRIPPED,
    Chain,
    ChainEntry,
    Shared,
    Verdict,
    ZoneState,
    deepest_signer,
    denial_signer,
)
from oepy.dns.denial import Proof
from oepy.dns.limits import MAX_ALIASES, Budget, LimitExceeded
from oepy.dns.message import Question, Reply, RRset, rcode_text
from oepy.dns.signatures import STRICT, Policy
from oepy.dns.transport import NoReply, Transport
from oepy.model import Security
from oepy.resolvers import ResolverState

MAX_ANSWERS = 20000
MAX_PENDING = 5000  # lookups at once; more are refused as unreachable
LOOKUP_SECONDS = 6.5
_CNAME = int(dns.rdatatype.CNAME)
_DNAME = int(dns.rdatatype.DNAME)
_DS = int(dns.rdatatype.DS)
_SOA = int(dns.rdatatype.SOA)

Name = dns.name.Name
Early = asyncio.Future[Reply | NoReply]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of one name and type. Bogus and indeterminate hold no records.

    `ttl` is in seconds; `unreachable` tells a silent or failing resolver from other reasons for
    indeterminate; `stripped` names a resolver that leaves signatures away as the cause; `questions` is 0
    where the cache answered.
    """

    question: Question
    status: Security
    reason: str
    rcode: str
    canonical_name: Name
    rdatas: tuple[dns.rdata.Rdata, ...] = ()
    ttl: int = 0
    chain: tuple[ChainEntry, ...] = ()
    unreachable: bool = False
    questions: int = 0
    stripped: bool = False

    @property
    def is_usable(self) -> bool:
        return self.status in (Security.SECURE, Security.INSECURE)


class Validator:
    """Validated lookups with shared caches. One event loop; any number of lookups at once."""

    def __init__(
        self,
        transport: Transport,
        anchors: TrustAnchors,
        clock: Callable[[], float],
        monotonic: Callable[[], float],
        policy: Policy = STRICT,
    ) -> None:
        self._shared = Shared(transport, anchors, clock, monotonic, policy)
        self._answers: TtlCache[Question, Outcome] = TtlCache(MAX_ANSWERS)
        self._pending: dict[Question, asyncio.Future[Outcome | None]] = {}

    @property
    def monotonic(self) -> Callable[[], float]:
        return self._shared.monotonic

    @property
    def anchors(self) -> TrustAnchors:
        return self._shared.anchors

    @property
    def policy(self) -> Policy:
        return self._shared.policy

    def resolver_states(self) -> tuple[ResolverState, ...]:
        return self._shared.transport.states()

    def flush(self) -> None:
        """Forget everything that was learned."""
        self._answers.clear()
        self._shared.zones.clear()
        self._shared.cuts.clear()
        self._shared.ranges.clear()

    def forget(self, name: Name, rdtypes: Iterable[int]) -> None:
        """Forget these answers of one name; what is known of its zones stays."""
        for rdtype in rdtypes:
            self._answers.remove(Question(name, rdtype))
        self._shared.ranges.forget(name)

    def is_known(self, name: Name, rdtype: int) -> bool:
        """Whether the cache has the answer."""
        return self._answers.get(Question(name, rdtype), self._shared.monotonic()) is not None

    def ask_early(self, name: Name, rdtype: int) -> Early:
        """Send a question that may be needed soon; give the result to `lookup`."""
        return self._shared.ask(Question(name, rdtype))

    async def lookup(self, name: Name, rdtype: int, early: Early | None = None) -> Outcome:
        """One validated lookup. Never raises for what the DNS does; ends within `LOOKUP_SECONDS`."""
        question = Question(name, rdtype)
        now = self._shared.monotonic()
        cached = self._answers.get(question, now)
        if cached is not None:
            return replace(cached, ttl=int(self._answers.remaining(question, now)), questions=0)
        while (running := self._pending.get(question)) is not None:
            outcome = await asyncio.shield(running)
            if outcome is not None:
                return outcome
        if len(self._pending) >= MAX_PENDING:
            return _failed(
                question, Verdict(Security.INDETERMINATE, "too many lookups at once", unreachable=True)
            )
        # Whoever comes first does the work itself: a task for it would cost as much as a signature check
        ending = self._pending[question] = asyncio.get_running_loop().create_future()
        outcome = None
        try:
            outcome = await self._run(question, early)
            return outcome
        finally:
            del self._pending[question]
            ending.set_result(outcome)  # None where it was cancelled: then one of those who wait begins anew

    async def _run(self, question: Question, early: Early | None) -> Outcome:
        chain = Chain(self._shared, Budget())
        if early is not None:
            chain.adopt(question, early)
        lookup = _Lookup(question, chain)
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                try:
                    outcome = await lookup.run()
                except Verdict as failure:
                    raise await _with_cause(failure, question, chain) from None
        except TimeoutError:
            verdict = Verdict(
                Security.INDETERMINATE, f"not finished within {LOOKUP_SECONDS:g} s", unreachable=True
            )
            outcome = _failed(question, verdict)
        except LimitExceeded as error:
            outcome = _failed(question, Verdict(Security.BOGUS, str(error)))
        except Verdict as verdict:
            outcome = _failed(question, verdict)
            failed = verdict.zone if verdict.status is Security.BOGUS else None
            outcome = replace(outcome, rcode=lookup.rcode, chain=chain.entries(failed))
        outcome = replace(outcome, questions=chain.asked)
        if outcome.is_usable:
            self._answers.put(question, outcome, outcome.ttl, self._shared.monotonic())
        return outcome


async def _with_cause(verdict: Verdict, question: Question, chain: Chain) -> Verdict:
    """A resolver that strips DNSSEC may have been met only after the keys above were cached: ask for one
    signature that must be there."""
    if not verdict.unsigned or verdict.stripped or verdict.zone is None:
        return verdict
    try:
        stripped = await chain.is_stripped(question.name)
    except Verdict:
        return verdict
    if not stripped:
        return verdict
    return Verdict(
        verdict.status, f"{STRIPPED}: {verdict.reason}", verdict.zone, unsigned=True, stripped=True
    )


def _failed(question: Question, verdict: Verdict) -> Outcome:
    return Outcome(
        question,
        verdict.status,
        verdict.reason,
        "SERVFAIL",
        question.name,
        unreachable=verdict.unreachable,
        stripped=verdict.stripped,
    )


class _Lookup:
    """One lookup through its aliases. The weakest link decides."""

    def __init__(self, question: Question, chain: Chain) -> None:
        self._question = question
        self._chain = chain
        self._ttl = float("inf")
        self._insecure = ""  # why, if any link is insecure
        self.rcode = "SERVFAIL"

    async def run(self) -> Outcome:
        target, rdtype = self._question.name, self._question.type
        if (known := self._from_ranges(target, rdtype)) is not None:
            return known
        # These go out when this lookup begins to wait, which is after its own question was sent
        self._chain.foresee(target.parent() if rdtype == _DS and target != dns.name.root else target)
        reply = await self._chain.reply(target, rdtype)
        seen = {target}
        while True:
            self.rcode = reply.rcode_text
            rrset = reply.find(target, rdtype)
            if rrset is not None:
                await self._check(rrset, reply)
                return self._outcome(target, rrset.rdatas, rcode_text(dns.rcode.NOERROR))
            alias = await self._alias(reply, target) if rdtype != _CNAME else None
            if alias is None:
                rcode = await self._negative(reply, target)
                return self._outcome(target, (), rcode)
            if alias in seen or len(seen) > MAX_ALIASES:
                why = "leads back to itself" if alias in seen else f"has more than {MAX_ALIASES} links"
                raise Verdict(Security.BOGUS, f"the alias chain of {self._question.name} {why}")
            seen.add(alias)
            target = alias
            if not _speaks_of(reply, target, rdtype):
                reply = await self._chain.reply(target, rdtype)

    def _from_ranges(self, name: Name, rdtype: int) -> Outcome | None:
        """RFC 8198: absence that validated NSEC or NSEC3 of earlier answers prove, without a question."""
        if rdtype == _DS:
            return None
        state = self._chain.nearest_known(name)
        if state is None or not state.is_secure:
            return None
        known = self._chain.known_denial(name, state)
        if known is None or self._chain.excuse(name) is not None:
            return None
        denial, ttl = known
        for proof, rcode in (
            (denial.no_data(name, rdtype), dns.rcode.NOERROR),
            (denial.no_name(name), dns.rcode.NXDOMAIN),
        ):
            if proof is Proof.PROVEN:
                self._chain.rely_on(state)
                self._note(state, ttl)
                return self._outcome(name, (), rcode_text(rcode))
        return None

    def _outcome(self, target: Name, rdatas: tuple[dns.rdata.Rdata, ...], rcode: str) -> Outcome:
        return Outcome(
            self._question,
            Security.INSECURE if self._insecure else Security.SECURE,
            self._insecure,
            rcode,
            target,
            rdatas,
            int(min(self._ttl, 2**31 - 1)),
            self._chain.entries(),
        )

    def _note(self, state: ZoneState, ttl: float) -> None:
        self._ttl = min(self._ttl, ttl)
        if not state.is_secure:
            self._insecure = self._insecure or state.reason

    # ---- positive answers --------------------------------------------------------------------------------

    async def _check(self, rrset: RRset, reply: Reply) -> None:
        """Raises Verdict unless the RRset is secure or provably insecure."""
        strict = rrset.type == _DS
        searched = _zone_search_name(rrset.name, strict)
        signer = deepest_signer([rrset], rrset.name, strict=strict)
        excuse = self._chain.excuse(searched)
        if excuse is not None:
            state = excuse
        elif signer is None:
            state = await self._chain.walk(searched, str(rrset))
        else:
            state = await self._chain.zone(signer)
        if not state.is_secure:
            self._note(state, rrset.ttl)
            return
        verified = self._chain.verify(rrset, state)
        self._note(state, verified.ttl)
        if verified.closest_encloser is not None:
            self._check_wildcard(rrset, reply, state, verified.closest_encloser)

    def _check_wildcard(self, rrset: RRset, reply: Reply, state: ZoneState, encloser: Name) -> None:
        """RFC 4035 §5.3.4: nothing closer than the wildcard may exist."""
        denial, ttl = self._chain.denial(reply, state)
        proof = denial.no_closer_name(rrset.name, encloser)
        if proof is Proof.NONE:
            raise Verdict(
                Security.BOGUS,
                f"{rrset} is made from *.{encloser}, without the proof that no closer name exists",
                state.zone,
            )
        self._ttl = min(self._ttl, ttl)
        if proof.is_insecure:
            self._insecure = self._insecure or f"{rrset} stands on {proof.value}"

    # ---- aliases -----------------------------------------------------------------------------------------

    async def _alias(self, reply: Reply, name: Name) -> Name | None:
        """Where CNAME or DNAME lead, validated; None where there is none. Raises Verdict."""
        cname = reply.find(name, _CNAME)
        for rrset in reply.answer:
            if rrset.type == _DNAME and name != rrset.name and name.is_subdomain(rrset.name):
                await self._check(rrset, reply)
                derived = _through_dname(name, rrset)
                if cname is not None and _single_target(cname) != derived:
                    raise Verdict(Security.BOGUS, f"{cname} does not follow from {rrset}")
                return derived
        if cname is None:
            return None
        await self._check(cname, reply)
        return _single_target(cname)

    # ---- negative answers --------------------------------------------------------------------------------

    async def _negative(self, reply: Reply, name: Name) -> str:
        """Check that the name or type is proven absent; returns the rcode that the proof supports."""
        rdtype = self._question.type
        strict = rdtype == _DS
        searched = _zone_search_name(name, strict)
        signer = denial_signer(reply, name, strict=strict)
        excuse = self._chain.excuse(searched)
        if excuse is not None:
            state = excuse
        elif signer is None:
            subject = f"the answer that {Question(name, rdtype)} does not exist"
            state = await self._chain.walk(searched, subject)
        else:
            state = await self._chain.zone(signer)
        soa_ttl = reply.negative_ttl
        if not state.is_secure:
            self._note(state, soa_ttl)
            return reply.rcode_text
        denial, ttl = self._chain.denial(reply, state)
        rcode = dns.rcode.Rcode(reply.rcode)
        proof = denial.no_name(name) if rcode == dns.rcode.NXDOMAIN else denial.no_data(name, rdtype)
        if proof is Proof.NONE and rcode == dns.rcode.NXDOMAIN and denial.is_nsec:
            # Servers older than NSEC3 say NXDOMAIN at empty non-terminals (against RFC 4592 §2.2.2).
            proof, rcode = denial.no_data(name, rdtype), dns.rcode.NOERROR
        if proof is Proof.NONE:
            raise Verdict(
                Security.BOGUS,
                f"{state.zone} does not prove that {Question(name, rdtype)} does not exist",
                state.zone,
            )
        self._note(state, min(ttl, soa_ttl))
        if proof.is_insecure:
            self._insecure = self._insecure or f"the absence of {name} stands on {proof.value}"
        return dns.rcode.to_text(rcode)


def _zone_search_name(name: Name, strict: bool) -> Name:
    """A DS belongs to the zone above its name."""
    return name.parent() if strict and name != dns.name.root else name


def _speaks_of(reply: Reply, name: Name, rdtype: int) -> bool:
    """Whether this reply goes on about an alias's target, so that it need not be asked for."""
    if reply.find(name, rdtype) is not None or reply.find(name, _CNAME) is not None:
        return True
    if any(r.type == _DNAME and name != r.name and name.is_subdomain(r.name) for r in reply.answer):
        return True
    return any(rrset.type == _SOA and name.is_subdomain(rrset.name) for rrset in reply.authority)


def _single_target(rrset: RRset) -> Name:
    """A second CNAME or an unreadable one is an error (RFC 2181 §10.1). Raises Verdict."""
    rdata = rrset.rdatas[0]
    if len(rrset.rdatas) != 1 or not isinstance(rdata, dns.rdtypes.ANY.CNAME.CNAME):
        raise Verdict(Security.BOGUS, f"{rrset} is not one readable alias")
    return rdata.target


def _through_dname(name: Name, rrset: RRset) -> Name:
    """RFC 6672 §2.2. Raises Verdict."""
    rdata = rrset.rdatas[0]
    if len(rrset.rdatas) != 1 or not isinstance(rdata, dns.rdtypes.ANY.DNAME.DNAME):
        raise Verdict(Security.BOGUS, f"{rrset} is not one readable alias")
    try:
        return name.relativize(rrset.name).concatenate(rdata.target)
    except dns.exception.DNSException:
        raise Verdict(Security.BOGUS, f"{name} through {rrset} is too long for a name") from None
