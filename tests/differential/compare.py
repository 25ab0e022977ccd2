"""Asks all three and finds where they differ."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import dns.name
import dns.rdatatype

from oepy.dns.anchors import TrustAnchors, parse_anchors
from oepy.dns.signatures import STRICT, WITH_SHA1
from oepy.dns.transport import StubTransport
from oepy.dns.validator import Outcome, Validator
from oepy.resolvers import Resolver
from tests.differential.cases import Case
from tests.differential.oracles import BOGUS, FAILED, INSECURE, SECURE, Said, Unbound, read_delv, start_delv
from tests.differential.responder import HOST, Responder

# What each word of an oracle may be called by oepy: an answer that neither has.
_WORD = {"indeterminate": FAILED}


@dataclass(frozen=True)
class Result:
    case: Case
    ours: Outcome
    unbound: Said
    delv: Said

    @property
    def status(self) -> str:
        return _WORD.get(self.ours.status.value, self.ours.status.value)

    def differences(self) -> Iterator[tuple[str, Said]]:
        for oracle, said in (("unbound", self.unbound), ("delv", self.delv)):
            if said.status != self.status:
                yield oracle, said

    @property
    def is_unsafe(self) -> bool:
        """Secure for us and not for unbound, or believed for longer."""
        if self.status != SECURE:
            return False
        # libunbound tells the TTL that it was told; delv the one capped by the signature.
        told = [said.ttl for said in (self.unbound, self.delv) if said.status == SECURE and said.ttl >= 0]
        return self.unbound.status != SECURE or self.ours.ttl > min(told, default=0) + 2


def run_case(case: Case, responder: Responder) -> Result:
    responder.serve(case.tree)
    rdtype = int(dns.rdatatype.from_text(case.kind))
    started = start_delv(responder.port, case.anchors, case.owner, case.kind)
    try:
        ours = asyncio.run(_ask(case, responder.port, rdtype))
        said = _ask_unbound(case, responder.port, rdtype)
    finally:
        delv = read_delv(started)  # which also ends it
    return Result(case, ours, said, delv)


def _ask_unbound(case: Case, port: int, rdtype: int) -> Said:
    context = Unbound(HOST, port, case.anchors)
    try:
        return context.ask(case.owner, rdtype)
    finally:
        context.close()


async def _ask(case: Case, port: int, rdtype: int) -> Outcome:
    validator = Validator(
        StubTransport([Resolver(ip_address(HOST), port)]),
        TrustAnchors.of(parse_anchors("\n".join(case.anchors), case.title)),
        time.time,
        time.monotonic,
        WITH_SHA1 if case.sha1 else STRICT,
    )
    for owner in case.before:
        await validator.lookup(dns.name.from_text(owner), rdtype)
    return await validator.lookup(dns.name.from_text(case.owner), rdtype)


__all__ = ["BOGUS", "FAILED", "INSECURE", "SECURE", "Result", "run_case"]
