"""The differences that are meant, each with its reason. One that is not listed here is a failure."""

from __future__ import annotations

import fnmatch

from tests.differential.compare import SECURE, Result

_SHA1 = "RFC 9905: what only SHA-1 protects counts as unsigned"
_STRONGEST = (
    "RFC 4509 §3, for every pair of digests: only the strongest DS of a key counts, or it could be evaded"
)
_SKEW = "oepy's stated skew: expired is expired; unbound forgives an hour to a day"
_AHEAD = "oepy's stated skew: up to 5 minutes ahead are forgiven; delv forgives nothing"
_ANY = "RFC 4035 §5.3.3, RFC 6840 §5.4: one good signature is enough; BIND stops at the first failure"
_MALFORMED = "BIND refuses the whole message as malformed; no data either way"
_OPT_OUT = "RFC 5155 §9.2: what stands on an opt-out range must not count as secure"
_ITERATIONS = "RFC 9276 §3.2: above 50 iterations insecure; the oracles allow 150"
_REVOKED = "RFC 5011 §2.1: a revoked key verifies nothing but its own revocation"
_RCODE = (
    "RFC 4592: servers older than NSEC3 say NXDOMAIN at empty non-terminals; the proof decides, as in unbound"
)
_WILDCARD = (
    "RFC 4035 §5.4: the wildcard has the type, so its absence is not proven; unbound 1.17 overlooks it"
)
_SYNTHESIS = "RFC 6672 §5.3.1: the CNAME must follow from the DNAME; the oracles replace the false one"
_ODD_KEY = "RFC 4035 §5.2: one good path is enough; BIND stops at an unreadable DNSKEY"
_NO_ANCHOR = "RFC 4035 §4.3: without an anchor indeterminate; the oracles have no such word and say unsigned"
_SIDE = "BIND cannot place the answer of the wrong side of the cut and gives up; no data either way"
_ED448 = "RFC 8080: Debian's libunbound is built with nettle and has no Ed448"

# Title (with wildcards), oracle, what the oracle says, why.
KNOWN: tuple[tuple[str, str, str, str], ...] = (
    ("algorithm/[57]/*", "*", "secure", _SHA1),
    ("digest/1", "*", "secure", _SHA1),
    ("algorithm/16/*", "unbound", "insecure", _ED448),
    ("ds/1+2-wrong", "unbound", "secure", _STRONGEST),
    ("sha1/digest/1+2-wrong", "unbound", "secure", _STRONGEST),
    ("ds/2+4-wrong", "*", "secure", _STRONGEST),
    ("signature/*/expired-a-minute-ago", "unbound", "secure", _SKEW),
    ("signature/*/begins-in-four-minutes", "delv", "bogus", _AHEAD),
    ("signature/*/expired-beside", "delv", "bogus", _ANY),
    ("signature/*/empty", "delv", "failed", _MALFORMED),
    ("signature/nsec/labels-fewer", "delv", "failed", _MALFORMED),
    ("denial/opt-out/*", "delv", "secure", _OPT_OUT),
    ("reverse/opt-out/*", "delv", "secure", _OPT_OUT),
    ("known/opt-out/*", "delv", "secure", _OPT_OUT),
    ("iterations/51/*", "*", "secure", _ITERATIONS),
    ("iterations/1[05]0/*", "*", "secure", _ITERATIONS),
    ("false-denial/nsec/wildcard-exists", "unbound", "secure", _WILDCARD),
    ("false-denial/nsec/wildcard-as-no-name", "unbound", "secure", _WILDCARD),
    ("false-denial/nsec/*-as-no-name", "delv", "bogus", _RCODE),
    ("false-denial/*/child-denies-ds", "delv", "failed", _SIDE),
    ("alias/false-synthesis", "*", "secure", _SYNTHESIS),
    ("key/*revoked*", "unbound", "secure", _REVOKED),
    ("key/odd-ones-beside", "delv", "bogus", _ODD_KEY),
    ("anchor/island/www.sea.", "*", "insecure", _NO_ANCHOR),
)
# Here libunbound lacks the algorithm, and delv must agree with us that the answer is secure.
NOT_IN_UNBOUND = "algorithm/16/*"


def used(line: tuple[str, str, str, str], title: str) -> bool:
    return fnmatch.fnmatchcase(title, line[0])


def judge(result: Result) -> tuple[list[str], list[str]]:
    """The listed differences of one case, and what is wrong with it."""
    listed, wrong = [], []
    title = result.case.title
    expected = result.case.expected
    if result.ours.status.value != expected:
        wrong.append(f"{title}: oepy says {result.ours.status.value} ({result.ours.reason}), not {expected}")
    lacking = fnmatch.fnmatchcase(title, NOT_IN_UNBOUND) and result.delv.status == SECURE
    if result.is_unsafe and not lacking:
        wrong.append(
            f"{title}: UNSAFE: oepy secure with TTL {result.ours.ttl}, unbound {result.unbound}, delv {result.delv}"
        )
    for oracle, said in result.differences():
        line = f"{title}: oepy {result.status}, {oracle} {said.status}"
        reason = next(
            (
                why
                for pattern, who, status, why in KNOWN
                if who in (oracle, "*") and status == said.status and fnmatch.fnmatchcase(title, pattern)
            ),
            None,
        )
        if reason:
            listed.append(f"{line}: {reason}")
        else:
            wrong.append(f"{line}, which is not listed [{said.why}] [{result.ours.reason}]")
    return listed, wrong
