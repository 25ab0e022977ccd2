"""The zones and answers that the validators are compared on, right ones and wrong ones."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.rrset

from oepy.dns.message import Question
from tests.fakes.signed_tree import SignedTree, Zone, make_dnskey, make_ds, make_private, name

A, TXT, DS, DNSKEY, NSEC, NSEC3, RRSIG, SOA, NS = (
    int(dns.rdatatype.from_text(kind))
    for kind in ("A", "TXT", "DS", "DNSKEY", "NSEC", "NSEC3", "RRSIG", "SOA", "NS")
)
START = int(time.time())
NSEC3_PLAIN = (0, b"", False)
NSEC3_SALTED = (5, b"\xab\xcd", False)
NSEC3_OPT_OUT = (1, b"\xab", True)
DENIALS: dict[str, Any] = {
    "nsec": None,
    "nsec3": NSEC3_PLAIN,
    "nsec3-salted": NSEC3_SALTED,
    "opt-out": NSEC3_OPT_OUT,
}
Message = dns.message.Message
RR = dns.rrset.RRset


@dataclass
class Case:
    """One question to one tree. `expected` is what oepy must say, with `sha1` where SHA-1 protects, and after it
    has asked for `before` (names, of the same type)."""

    title: str
    tree: SignedTree
    owner: str
    kind: str
    expected: str
    anchors: list[str] = field(default_factory=list)
    sha1: bool = False
    before: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.tree.delegate()
        root = self.tree.zones[dns.name.root]
        self.anchors = self.anchors or [f". IN DS {ds}" for ds in root.make_ds()]


@functools.cache
def pooled(algorithm: int, number: int = 0) -> Any:
    """Keys are dear to make: one for each algorithm and number serves all cases."""
    return make_private(algorithm)


def add(tree: SignedTree, origin: str, algorithm: int = 13, **options: Any) -> Zone:
    options.setdefault("private", pooled(algorithm))
    options.setdefault("inception", START - 3600)
    options.setdefault("expiration", START + 86400)
    return tree.add(origin, algorithm=algorithm, **options)


def empty_tree() -> SignedTree:
    tree = SignedTree()
    add(tree, ".")
    return tree


def fill(zone: Zone) -> Zone:
    for owner, kind, text in (
        ("www", "A", "192.0.2.1"),
        ("deep.empty", "A", "192.0.2.2"),
        ("*.wild", "A", "192.0.2.3"),
        ("sub.x.wild", "TXT", '"closer"'),
        ("alias", "CNAME", f"www.{zone.origin}"),
        ("gone", "CNAME", f"nothing.{zone.origin}"),
    ):
        zone.add(owner, kind, text)
    return zone


def tree_with(**options: Any) -> tuple[SignedTree, Zone]:
    """The root and a filled `example.`, with `signed.example.` and `unsigned.example.` below."""
    tree = empty_tree()
    zone = fill(add(tree, "example.", **options))
    add(tree, "signed.example.", private=pooled(13, 1)).add("www", "A", "192.0.2.10")
    add(tree, "unsigned.example.", signed=False).add("www", "A", "192.0.2.9")
    return tree, zone


def lie(tree: SignedTree, owner: str, kind: int | None, change: Callable[[Message], None]) -> None:
    """Change the replies about one name (and type)."""

    def apply(question: Question, reply: Message) -> Message:
        if question.name == name(owner) and kind in (None, question.type):
            change(reply)
        return reply

    tree.lies.append(apply)


def signatures(section: list[RR], covers: int) -> Iterator[RR]:
    return (rrset for rrset in section if rrset.rdtype == RRSIG and rrset.covers == covers)


def each_signature(covers: int, change: Callable[[Any], Any]) -> Callable[[Message], None]:
    def apply(reply: Message) -> None:
        for section in (reply.answer, reply.authority):
            for rrset in signatures(section, covers):
                rdatas = [change(rdata) for rdata in rrset]
                rrset.clear()
                for rdata in rdatas:
                    rrset.add(rdata, rrset.ttl)

    return apply


def without(covers: int) -> Callable[[Message], None]:
    def apply(reply: Message) -> None:
        for section in (reply.answer, reply.authority):
            section[:] = [r for r in section if not (r.rdtype == RRSIG and r.covers == covers)]

    return apply


def resigned(zone: Zone, covers: int, keep: bool = False, **changes: Any) -> Callable[[Message], None]:
    """Other signatures by the zone; `keep` leaves the good one beside."""

    def apply(reply: Message) -> None:
        for section in (reply.answer, reply.authority):
            for rrset in [r for r in section if r.rdtype == covers]:
                for signed in signatures(section, covers):
                    if signed.name == rrset.name:
                        new = zone.signature(rrset, **dict(changes))
                        if not keep:
                            signed.clear()
                        signed.add(new, rrset.ttl)

    return apply


# ---- algorithms and digests --------------------------------------------------------------------------------

QUESTIONS = (
    ("answer", "www.example.", "A"),
    ("no-data", "www.example.", "TXT"),
    ("no-name", "nothing.example.", "A"),
    ("wildcard", "a.wild.example.", "A"),
)


def algorithms() -> Iterator[Case]:
    for algorithm in (5, 7, 8, 10, 13, 14, 15, 16):
        for label, owner, kind in QUESTIONS:
            tree, _ = tree_with(algorithm=algorithm)
            expected = "insecure" if algorithm in (5, 7) else "secure"
            yield Case(f"algorithm/{algorithm}/{label}", tree, owner, kind, expected)


def _odd_ds(good: Any, **changes: Any) -> Any:
    return good.replace(**changes)


def digests() -> Iterator[Case]:
    for kinds in ((1,), (2,), (4,), (1, 2), (1, 4), (2, 4), (1, 2, 4)):
        tree, _ = tree_with(digests=kinds)
        expected = "insecure" if kinds == (1,) else "secure"
        yield Case(f"digest/{'+'.join(map(str, kinds))}", tree, "www.example.", "A", expected)
    key = pooled(13)
    one, two, four = (make_ds(name("example."), make_dnskey(key, 13), kind) for kind in (1, 2, 4))
    other = make_ds(name("example."), make_dnskey(pooled(13, 7), 13), 2)
    unknown = dns.rdata.from_text("IN", "DS", "4711 13 200 00112233")
    gost = dns.rdata.from_text("IN", "DS", f"{two.key_tag} 13 3 {'ab' * 32}")
    foreign = two.replace(algorithm=200)

    def wrong(ds: Any) -> Any:
        return ds.replace(digest=bytes(len(ds.digest)))

    for label, records, expected in (
        ("2-wrong", [wrong(two)], "bogus"),
        ("4-wrong", [wrong(four)], "bogus"),
        ("2-wrong+4", [wrong(two), four], "secure"),
        ("2+4-wrong", [two, wrong(four)], "bogus"),
        ("1+2-wrong", [one, wrong(two)], "bogus"),
        ("1-wrong+2", [wrong(one), two], "secure"),
        ("unknown", [unknown], "insecure"),
        ("gost", [gost], "insecure"),
        ("unknown+2", [unknown, two], "secure"),
        ("unknown+2-wrong", [unknown, wrong(two)], "bogus"),
        ("algorithm-unknown", [foreign], "insecure"),
        ("algorithm-unknown+2", [foreign, two], "secure"),
        ("algorithm-unknown+2-wrong", [foreign, wrong(two)], "bogus"),
        ("other-key", [other], "bogus"),
        ("other-key+2", [other, two], "secure"),
        ("other-key+4", [other, four], "secure"),
        ("wrong-tag", [two.replace(key_tag=two.key_tag ^ 1)], "bogus"),
        ("wrong-algorithm", [two.replace(algorithm=8)], "bogus"),
        ("wrong-algorithm+2", [two.replace(algorithm=8), two], "secure"),
    ):
        tree, _ = tree_with(ds=records)
        yield Case(f"ds/{label}", tree, "www.example.", "A", expected)
    for label, owner, kind in QUESTIONS[1:]:
        tree, _ = tree_with(ds=[unknown])
        yield Case(f"ds/unknown/{label}", tree, owner, kind, "insecure")


# ---- signatures --------------------------------------------------------------------------------------------


def _broken(zone: Zone, covers: int) -> Iterator[tuple[str, Callable[[Message], None], str]]:
    alien = (pooled(13, 9), make_dnskey(pooled(13, 9), 13))
    yield "missing", without(covers), "bogus"
    yield "expired", resigned(zone, covers, inception=START - 400000, expiration=START - 90000), "bogus"
    yield "future", resigned(zone, covers, inception=START + 90000, expiration=START + 400000), "bogus"
    yield "expired-a-minute-ago", resigned(zone, covers, expiration=START - 60), "bogus"
    yield "begins-in-four-minutes", resigned(zone, covers, inception=START + 240), "secure"
    yield "backwards", each_signature(covers, lambda r: r.replace(expiration=r.inception - 1)), "bogus"
    yield "alien-key", resigned(zone, covers, key=alien), "bogus"
    yield "alien-key-beside", resigned(zone, covers, keep=True, key=alien), "secure"
    yield "expired-beside", resigned(zone, covers, keep=True, expiration=START - 90000), "secure"
    yield "sibling-signer", resigned(zone, covers, signer=name("other.")), "bogus"
    yield "changed", each_signature(covers, lambda r: r.replace(signature=bytes(64))), "bogus"
    yield "short", each_signature(covers, lambda r: r.replace(signature=r.signature[:20])), "bogus"
    yield "empty", each_signature(covers, lambda r: r.replace(signature=b"")), "bogus"
    yield "tag", each_signature(covers, lambda r: r.replace(key_tag=r.key_tag ^ 1)), "bogus"
    yield "algorithm", each_signature(covers, lambda r: r.replace(algorithm=15)), "bogus"
    yield "labels-more", each_signature(covers, lambda r: r.replace(labels=r.labels + 1)), "bogus"
    yield "labels-fewer", each_signature(covers, lambda r: r.replace(labels=max(0, r.labels - 1))), "bogus"
    yield "original-ttl", each_signature(covers, lambda r: r.replace(original_ttl=77)), "bogus"


def broken_signatures() -> Iterator[Case]:
    for place, covers, owner, kind in (
        ("answer", A, "www.example.", "A"),
        ("dnskey", DNSKEY, "www.example.", "A"),
        ("ds", DS, "www.signed.example.", "A"),
        ("nsec", NSEC, "nothing.example.", "A"),
        ("nsec3", NSEC3, "nothing.example.", "A"),
    ):
        options = {"nsec3": NSEC3_PLAIN} if place == "nsec3" else {}
        _, model = tree_with(**options)
        for label, _, expected in _broken(model, covers):
            tree, zone = tree_with(**options)
            change = next(c for title, c, _ in _broken(zone, covers) if title == label)
            about = {"answer": owner, "dnskey": "example.", "ds": "signed.example."}.get(place, owner)
            lie(tree, about, {"dnskey": DNSKEY, "ds": DS}.get(place), change)
            yield Case(f"signature/{place}/{label}", tree, owner, kind, expected)


def changed_data() -> Iterator[Case]:
    def other_address(reply: Message) -> None:
        reply.answer[0].clear()
        reply.answer[0].add(dns.rdata.from_text("IN", "A", "203.0.113.66"), 300)

    def one_more(reply: Message) -> None:
        reply.answer[0].add(dns.rdata.from_text("IN", "A", "203.0.113.66"), 300)

    def long_ttl(reply: Message) -> None:
        for rrset in reply.answer:
            rrset.ttl = 80000

    def upper_case(reply: Message) -> None:
        for rrset in reply.answer:
            rrset.name = name("WWW.Example.")

    for label, change, expected in (
        ("other-address", other_address, "bogus"),
        ("one-more", one_more, "bogus"),
        ("long-ttl", long_ttl, "secure"),
        ("upper-case", upper_case, "secure"),
    ):
        tree, _ = tree_with()
        lie(tree, "www.example.", A, change)
        yield Case(f"data/{label}", tree, "www.example.", "A", expected)
    tree, zone = tree_with()
    lie(tree, "www.example.", A, resigned(zone, A, expiration=START + 120))
    yield Case("data/ends-soon", tree, "www.example.", "A", "secure")
    tree, _ = tree_with()
    parent = tree.zones[dns.name.root]
    lie(tree, "www.example.", A, resigned(parent, A, signer=dns.name.root))
    yield Case("data/signed-by-the-root", tree, "www.example.", "A", "secure")
    tree, _ = tree_with()
    child = tree.zones[name("signed.example.")]
    lie(tree, "www.example.", A, resigned(child, A, signer=child.origin))
    yield Case("data/signed-by-a-child", tree, "www.example.", "A", "bogus")


# ---- denial ------------------------------------------------------------------------------------------------

ABSENT = (
    ("no-data", "www.example.", "TXT"),
    ("no-name", "nothing.example.", "A"),
    ("no-name-deep", "a.b.nothing.example.", "A"),
    ("empty-non-terminal", "empty.example.", "A"),
    ("wildcard", "a.wild.example.", "A"),
    ("wildcard-deep", "a.b.wild.example.", "A"),
    ("wildcard-no-data", "a.wild.example.", "TXT"),
    ("below-closer", "a.x.wild.example.", "A"),
    ("alias-to-nothing", "gone.example.", "A"),
    ("no-ds", "www.example.", "DS"),
    ("apex-no-data", "example.", "TXT"),
)


def denials() -> Iterator[Case]:
    insecure_by_opt_out = {
        *("no-name", "no-name-deep", "wildcard", "wildcard-deep", "wildcard-no-data", "below-closer"),
        "alias-to-nothing",
    }
    for label, nsec3 in DENIALS.items():
        for title, owner, kind in ABSENT:
            tree, _ = tree_with(nsec3=nsec3)
            weak = label == "opt-out" and title in insecure_by_opt_out
            yield Case(f"denial/{label}/{title}", tree, owner, kind, "insecure" if weak else "secure")
    for iterations in (1, 50, 51, 100, 150, 151, 500, 2500):
        for title, owner, kind in (ABSENT[1], ABSENT[4]):
            tree, _ = tree_with(nsec3=(iterations, b"\xaa", False))
            expected = "secure" if iterations <= 50 else "insecure"
            yield Case(f"iterations/{iterations}/{title}", tree, owner, kind, expected)


def _drop_denials(reply: Message, keep: Callable[[RR], bool] = lambda rrset: False) -> None:
    reply.authority[:] = [r for r in reply.authority if not ({r.rdtype, r.covers} & {NSEC, NSEC3}) or keep(r)]


def false_denials() -> Iterator[Case]:
    for label in ("nsec", "nsec3"):
        yield from _false_denials(label)


def _false_denials(label: str) -> Iterator[Case]:
    nsec3 = DENIALS[label]

    def case(
        title: str, owner: str, kind: str, change: Callable[[Message, Zone], None], expected: str
    ) -> Case:
        tree, zone = tree_with(nsec3=nsec3)
        lie(tree, owner, int(dns.rdatatype.from_text(kind)), lambda reply: change(reply, zone))
        return Case(f"false-denial/{label}/{title}", tree, owner, kind, expected)

    def none(reply: Message, zone: Zone) -> None:
        _drop_denials(reply)

    def denied(*owners: str, rcode: int = dns.rcode.NOERROR) -> Callable[[Message, Zone], None]:
        def change(reply: Message, zone: Zone) -> None:
            reply.answer, reply.authority = [], []
            reply.set_rcode(dns.rcode.Rcode(rcode))
            SignedTree._put(reply.authority, zone, zone.rrset(zone.origin, SOA))
            reply.authority += zone.denial(*map(name, owners))

        return change

    def rcode(value: int) -> Callable[[Message, Zone], None]:
        return lambda reply, zone: reply.set_rcode(dns.rcode.Rcode(value))

    def first_only(reply: Message, zone: Zone) -> None:
        first = next(r.name for r in reply.authority if r.rdtype in (NSEC, NSEC3))
        _drop_denials(reply, lambda rrset: rrset.name == first)

    def last_only(reply: Message, zone: Zone) -> None:
        last = [r.name for r in reply.authority if r.rdtype in (NSEC, NSEC3)][-1]
        _drop_denials(reply, lambda rrset: rrset.name == last)

    no, gone = dns.rcode.NXDOMAIN, "nothing.example."
    yield case("no-data-none", "www.example.", "TXT", none, "bogus")
    yield case("no-name-none", gone, "A", none, "bogus")
    yield case("wildcard-none", "a.wild.example.", "A", none, "bogus")
    yield case("own-record", "www.example.", "A", denied("www.example."), "bogus")
    yield case("own-record-no-name", "www.example.", "A", denied("www.example.", rcode=no), "bogus")
    yield case("neighbour", "www.example.", "A", denied("alias.example."), "bogus")
    yield case("of-alias", "alias.example.", "TXT", denied("alias.example."), "bogus")
    wild = "a.wild.example."
    yield case("wildcard-exists", wild, "A", denied(wild, "wild.example.", "*.wild.example."), "bogus")
    yield case("wildcard-as-no-name", wild, "A", denied(wild, "wild.example.", rcode=no), "bogus")
    yield case("no-name-first-only", gone, "A", first_only, "bogus")
    yield case("no-name-last-only", gone, "A", last_only, "bogus")
    yield case("no-name-as-no-data", gone, "A", rcode(0), "bogus")
    believed = "secure" if label == "nsec" else "bogus"
    yield case("no-data-as-no-name", "www.example.", "TXT", rcode(no), believed)
    yield case("empty-as-no-name", "empty.example.", "A", rcode(no), believed)
    yield case("cut-side", "www.signed.example.", "A", denied("signed.example."), "bogus")
    yield case("cut-side-no-name", "www.signed.example.", "A", denied("signed.example.", rcode=no), "bogus")
    yield case("ds-stripped", "signed.example.", "DS", denied("signed.example."), "bogus")
    yield case("ds-by-neighbour", "signed.example.", "DS", denied("www.example."), "bogus")
    yield case("apex-of-child", "signed.example.", "A", denied("signed.example."), "bogus")


def moved_wildcard_denial() -> Iterator[Case]:
    tree, zone = tree_with()
    victim = name("sub.x.wild.example.")
    records = zone.denial(name("*.wild.example."))

    def change(reply: Message) -> None:
        reply.answer, reply.authority = [], []
        SignedTree._put(reply.authority, zone, zone.rrset(zone.origin, SOA))
        reply.authority += [dns.rrset.from_rdata_list(victim, r.ttl, list(r)) for r in records]

    lie(tree, str(victim), TXT, change)
    yield Case("false-denial/nsec/expanded", tree, str(victim), "TXT", "bogus")
    for label, denial in (("nsec", None), ("nsec3", NSEC3_PLAIN)):
        tree, zone = tree_with(nsec3=denial)
        child = tree.zones[name("signed.example.")]

        def child_denies(reply: Message, child: Zone = child) -> None:
            reply.answer, reply.authority = [], []
            SignedTree._put(reply.authority, child, child.rrset(child.origin, SOA))
            reply.authority += child.denial(child.origin)

        lie(tree, "signed.example.", DS, child_denies)
        yield Case(f"false-denial/{label}/child-denies-ds", tree, "signed.example.", "DS", "bogus")
        tree, zone = tree_with(nsec3=denial)
        zone.add("dn", "DNAME", "signed.example.")

        def dname_denies(reply: Message, zone: Zone = zone) -> None:
            reply.answer, reply.authority = [], []
            reply.set_rcode(dns.rcode.NXDOMAIN)
            SignedTree._put(reply.authority, zone, zone.rrset(zone.origin, SOA))
            owners = ("www.dn.example.", "dn.example.", "*.dn.example.", "*.example.")
            reply.authority += zone.denial(*map(name, owners))

        lie(tree, "www.dn.example.", A, dname_denies)
        yield Case(f"false-denial/{label}/below-dname", tree, "www.dn.example.", "A", "bogus")


# ---- delegations -------------------------------------------------------------------------------------------


def delegations() -> Iterator[Case]:
    for label, nsec3 in DENIALS.items():
        for title, owner, kind, expected in (
            ("answer", "www.unsigned.example.", "A", "insecure"),
            ("no-data", "www.unsigned.example.", "TXT", "insecure"),
            ("no-name", "nothing.unsigned.example.", "A", "insecure"),
            ("apex", "unsigned.example.", "SOA", "insecure"),
            ("signed-below", "www.signed.example.", "A", "secure"),
        ):
            tree, _ = tree_with(nsec3=nsec3)
            yield Case(f"delegation/{label}/{title}", tree, owner, kind, expected)
        tree, _ = tree_with(nsec3=nsec3)
        lie(tree, "unsigned.example.", DS, _drop_denials)
        yield Case(f"delegation/{label}/no-proof", tree, "www.unsigned.example.", "A", "bogus")
        tree, _ = tree_with(nsec3=nsec3)
        lie(tree, "unsigned.example.", DS, without(NSEC3 if nsec3 else NSEC))
        yield Case(f"delegation/{label}/unsigned-proof", tree, "www.unsigned.example.", "A", "bogus")
        tree, _ = tree_with(nsec3=nsec3)
        tree.zones[name("signed.example.")].signed = False
        tree.zones[name("signed.example.")].ds = tree.zones[name("example.")].make_ds()
        yield Case(f"delegation/{label}/stripped-child", tree, "www.signed.example.", "A", "bogus")
        tree, _ = tree_with(nsec3=nsec3)
        add(tree, "island.unsigned.example.", private=pooled(13, 2)).add("www", "A", "192.0.2.11")
        yield Case(f"delegation/{label}/island", tree, "www.island.unsigned.example.", "A", "insecure")
    tree, _ = tree_with()
    add(tree, "a.b.c.example.", private=pooled(13, 3)).add("www", "A", "192.0.2.12")
    yield Case("delegation/over-empty-names", tree, "www.a.b.c.example.", "A", "secure")
    tree, _ = tree_with()
    add(tree, "a.b.d.example.", signed=False).add("www", "A", "192.0.2.12")
    yield Case("delegation/unsigned-over-empty-names", tree, "www.a.b.d.example.", "A", "insecure")
    tree, _ = tree_with(nsec3=(200, b"", False))
    yield Case("delegation/iterations", tree, "www.unsigned.example.", "A", "insecure")


# ---- aliases -----------------------------------------------------------------------------------------------


def aliases() -> Iterator[Case]:
    def tree_of_aliases() -> tuple[SignedTree, Zone]:
        tree, zone = tree_with()
        bad = add(tree, "bad.", private=pooled(13, 4), expiration=START - 90000, inception=START - 400000)
        bad.add("www", "A", "192.0.2.13")
        zone.add("to-signed", "CNAME", "www.signed.example.")
        zone.add("to-unsigned", "CNAME", "www.unsigned.example.")
        zone.add("to-bad", "CNAME", "www.bad.")
        zone.add("dn", "DNAME", "signed.example.")
        zone.add("dn-unsigned", "DNAME", "unsigned.example.")
        zone.add("dn-bad", "DNAME", "bad.")
        zone.add("chain", "CNAME", "www.dn.example.")
        zone.add("*.w", "CNAME", "www.signed.example.")
        unsigned = tree.zones[name("unsigned.example.")]
        unsigned.add("to-signed", "CNAME", "www.signed.example.")
        unsigned.add("to-bad", "CNAME", "www.bad.")
        unsigned.add("dn", "DNAME", "signed.example.")
        return tree, zone

    for owner, expected in (
        ("alias.example.", "secure"),
        ("to-signed.example.", "secure"),
        ("to-unsigned.example.", "insecure"),
        ("to-bad.example.", "bogus"),
        ("www.dn.example.", "secure"),
        ("nothing.dn.example.", "secure"),
        ("www.dn-unsigned.example.", "insecure"),
        ("www.dn-bad.example.", "bogus"),
        ("chain.example.", "secure"),
        ("a.w.example.", "secure"),
        ("to-signed.unsigned.example.", "insecure"),
        ("to-bad.unsigned.example.", "bogus"),
        ("www.dn.unsigned.example.", "insecure"),
        ("www.bad.", "bogus"),
    ):
        tree, _ = tree_of_aliases()
        yield Case(f"alias/{owner}", tree, owner, "A", expected)
    tree, _ = tree_of_aliases()
    lie(tree, "alias.example.", A, without(int(dns.rdatatype.CNAME)))
    yield Case("alias/unsigned-cname", tree, "alias.example.", "A", "bogus")
    tree, _ = tree_of_aliases()
    lie(tree, "www.dn.example.", A, without(int(dns.rdatatype.DNAME)))
    yield Case("alias/unsigned-dname", tree, "www.dn.example.", "A", "bogus")
    tree, _ = tree_of_aliases()

    def other_target(reply: Message) -> None:
        for rrset in reply.answer:
            if rrset.rdtype == dns.rdatatype.CNAME:
                rrset.clear()
                rrset.add(dns.rdata.from_text("IN", "CNAME", "www.unsigned.example."), 0)

    lie(tree, "www.dn.example.", A, other_target)
    yield Case("alias/false-synthesis", tree, "www.dn.example.", "A", "bogus")
    tree, _ = tree_of_aliases()
    lie(tree, "a.w.example.", A, _drop_denials)
    yield Case("alias/wildcard-without-proof", tree, "a.w.example.", "A", "bogus")


# ---- keys and anchors --------------------------------------------------------------------------------------


def keys() -> Iterator[Case]:
    for label, options, expected in (
        ("zone-signing-flag-only", {"flags": 256}, "secure"),
        ("revoked", {"flags": 257 | 128}, "bogus"),
        ("no-zone-flag", {"flags": 1}, "bogus"),
    ):
        tree, _ = tree_with(**options)
        yield Case(f"key/{label}", tree, "www.example.", "A", expected)

    def split(algorithm: int, flags: int = 257) -> tuple[SignedTree, Zone]:
        tree, zone = tree_with(flags=256)
        zone.add_entry_key(algorithm, pooled(algorithm, 5), flags)
        return tree, zone

    for label, algorithm, flags, expected in (
        ("split", 13, 257, "secure"),
        ("split-two-algorithms", 8, 257, "secure"),
        ("split-revoked-entry", 13, 257 | 128, "bogus"),
    ):
        tree, _ = split(algorithm, flags)
        yield Case(f"key/{label}", tree, "www.example.", "A", expected)
    tree, zone = split(13)
    lie(tree, "example.", DNSKEY, resigned(zone, DNSKEY, key=(zone.private, zone.dnskey)))
    yield Case("key/set-signed-by-the-zone-key-only", tree, "www.example.", "A", "bogus")
    tree, zone = split(13)
    lie(tree, "www.example.", A, resigned(zone, A, key=zone.entry))
    yield Case("key/data-signed-by-the-entry-key", tree, "www.example.", "A", "secure")
    tree, zone = tree_with()
    zone.add_rdata("@", make_dnskey(pooled(13, 6), 13, 257 | 128))
    yield Case("key/revoked-beside", tree, "www.example.", "A", "secure")
    tree, zone = tree_with()
    zone.add_rdata("@", make_dnskey(pooled(13, 6), 13, 257 | 128))
    revoked = (pooled(13, 6), make_dnskey(pooled(13, 6), 13, 257 | 128))
    lie(tree, "www.example.", A, resigned(zone, A, key=revoked))
    yield Case("key/data-signed-by-a-revoked-key", tree, "www.example.", "A", "bogus")
    tree, zone = tree_with()
    lie(tree, "example.", DNSKEY, lambda reply: reply.answer.clear())
    yield Case("key/none", tree, "www.example.", "A", "bogus")
    tree, zone = tree_with()
    zone.add_rdata("@", dns.rdata.from_text("IN", "DNSKEY", "257 3 13 AAAA"))
    zone.add_rdata("@", dns.rdata.from_text("IN", "DNSKEY", "257 3 253 AAAABBBB"))
    yield Case("key/odd-ones-beside", tree, "www.example.", "A", "secure")


def anchors() -> Iterator[Case]:
    tree, _ = tree_with()
    root = tree.zones[dns.name.root]
    good_key, good_ds = f". IN DNSKEY {root.dnskey}", f". IN DS {root.make_ds()[0]}"
    other = make_dnskey(pooled(13, 8), 13)
    bad_key = f". IN DNSKEY {other}"
    bad_ds = f". IN DS {make_ds(dns.name.root, other, 2)}"
    sha384 = f". IN DS {make_ds(dns.name.root, root.dnskey, 4)}"
    for label, lines, expected in (
        ("dnskey", [good_key], "secure"),
        ("ds", [good_ds], "secure"),
        ("ds-sha384", [sha384], "secure"),
        ("two-ds", [bad_ds, good_ds], "secure"),
        ("two-keys", [bad_key, good_key], "secure"),
        ("ds-and-key", [bad_ds, good_key], "secure"),
        ("wrong-ds", [bad_ds], "bogus"),
        ("wrong-key", [bad_key], "bogus"),
    ):
        for title, owner, kind, insecure in (
            ("answer", "www.example.", "A", False),
            ("unsigned", "www.unsigned.example.", "A", True),
        ):
            tree, _ = tree_with()
            wanted = "insecure" if insecure and expected == "secure" else expected
            yield Case(f"anchor/{label}/{title}", tree, owner, kind, wanted, lines)
    for owner, expected in (("www.island.", "secure"), ("nothing.island.", "secure"), ("www.sea.", "none")):
        tree = SignedTree()
        tree.zones[dns.name.root].signed = False
        tree.zones[dns.name.root].records.pop((dns.name.root, DNSKEY))
        island = add(tree, "island.", private=pooled(13, 2))
        island.add("www", "A", "192.0.2.14")
        add(tree, "sea.", signed=False).add("www", "A", "192.0.2.15")
        line = f"island. IN DS {island.make_ds()[0]}"
        yield Case(
            f"anchor/island/{owner}",
            tree,
            owner,
            "A",
            "indeterminate" if expected == "none" else expected,
            [line],
        )


# ---- reverse trees -----------------------------------------------------------------------------------------


def reverse_trees() -> Iterator[Case]:
    for label, nsec3 in (("nsec", None), ("nsec3", NSEC3_PLAIN), ("opt-out", NSEC3_OPT_OUT)):

        def reverse(nsec3: Any = nsec3) -> SignedTree:
            tree = empty_tree()
            add(tree, "arpa.", private=pooled(13, 1))
            add(tree, "in-addr.arpa.", 8, nsec3=nsec3)
            add(tree, "198.in-addr.arpa.", private=pooled(13, 2), nsec3=nsec3)
            zone = add(tree, "100.51.198.in-addr.arpa.", 8, nsec3=nsec3)
            zone.add("1", "PTR", "host.example.")
            for number in (65, 66):
                zone.add(str(number), "CNAME", f"{number}.64/26.100.51.198.in-addr.arpa.")
            add(tree, "64/26.100.51.198.in-addr.arpa.", 15).add("65", "TXT", '"key"')
            add(tree, "101.51.198.in-addr.arpa.", signed=False).add("1", "TXT", '"key"')
            add(tree, "ip6.arpa.", private=pooled(13, 3), nsec3=nsec3)
            six = add(tree, "8.b.d.0.1.0.0.2.ip6.arpa.", 14, nsec3=nsec3)
            six.add("1" + ".0" * 23, "TXT", '"key"')
            add(tree, "9.b.d.0.1.0.0.2.ip6.arpa.", signed=False).add("1" + ".0" * 23, "TXT", '"key"')
            return tree

        weak = label == "opt-out"
        zeros = "0." * 23
        for title, owner, kind, expected in (
            ("ptr", "1.100.51.198.in-addr.arpa.", "PTR", "secure"),
            ("no-data", "1.100.51.198.in-addr.arpa.", "TXT", "secure"),
            ("no-name", "2.100.51.198.in-addr.arpa.", "TXT", "insecure" if weak else "secure"),
            ("rfc2317", "65.100.51.198.in-addr.arpa.", "TXT", "secure"),
            ("rfc2317-no-name", "66.100.51.198.in-addr.arpa.", "TXT", "secure"),
            ("unsigned", "1.101.51.198.in-addr.arpa.", "TXT", "insecure"),
            ("unsigned-no-name", "2.101.51.198.in-addr.arpa.", "TXT", "insecure"),
            ("no-zone", "1.1.1.199.in-addr.arpa.", "TXT", "insecure" if weak else "secure"),
            ("ip6", f"1.{zeros}8.b.d.0.1.0.0.2.ip6.arpa.", "TXT", "secure"),
            ("ip6-no-name", f"2.{zeros}8.b.d.0.1.0.0.2.ip6.arpa.", "TXT", "insecure" if weak else "secure"),
            ("ip6-empty", f"{zeros}8.b.d.0.1.0.0.2.ip6.arpa.", "TXT", "secure"),
            ("ip6-unsigned", f"1.{zeros}9.b.d.0.1.0.0.2.ip6.arpa.", "TXT", "insecure"),
        ):
            yield Case(f"reverse/{label}/{title}", reverse(), owner, kind, expected)


# ---- a resolver that strips --------------------------------------------------------------------------------


def stripping() -> Iterator[Case]:
    def all_signatures(question: Question, reply: Message) -> Message:
        for section in (reply.answer, reply.authority):
            section[:] = [r for r in section if r.rdtype not in (RRSIG, NSEC, NSEC3)]
        return reply

    def no_keys(question: Question, reply: Message) -> Message:
        if question.type in (DS, DNSKEY):
            reply.answer, reply.authority = [], []
        return all_signatures(question, reply)

    for label, change in (("signatures", all_signatures), ("everything", no_keys)):
        for title, owner in (("signed", "www.example."), ("unsigned", "www.unsigned.example.")):
            tree, _ = tree_with()
            tree.lies.append(change)
            yield Case(f"stripped/{label}/{title}", tree, owner, "A", "bogus")
    for title, owner, expected in (
        ("signed", "www.example.", "bogus"),
        ("unsigned", "www.unsigned.example.", "insecure"),
    ):
        tree, _ = tree_with()
        lie(tree, owner, A, lambda reply: all_signatures(Question(dns.name.root, A), reply) and None)
        yield Case(f"stripped/answer-only/{title}", tree, owner, "A", expected)


# ---- by policy, and with what is known already -------------------------------------------------------------


def sha1_by_policy() -> Iterator[Case]:
    """Where SHA-1 is taken for protection, it protects like all else."""
    for algorithm in (5, 7):
        for label, owner, kind in QUESTIONS:
            tree, _ = tree_with(algorithm=algorithm)
            yield Case(f"sha1/{algorithm}/{label}", tree, owner, kind, "secure", sha1=True)
        tree, _ = tree_with(algorithm=algorithm)
        lie(tree, "www.example.", A, each_signature(A, lambda r: r.replace(signature=bytes(128))))
        yield Case(f"sha1/{algorithm}/changed", tree, "www.example.", "A", "bogus", sha1=True)
    for kinds in ((1,), (1, 2), (1, 4)):
        tree, _ = tree_with(digests=kinds)
        title = f"sha1/digest/{'+'.join(map(str, kinds))}"
        yield Case(title, tree, "www.example.", "A", "secure", sha1=True)
    key = make_dnskey(pooled(13), 13)
    one, two = (make_ds(name("example."), key, kind) for kind in (1, 2))
    for label, records in (
        ("1-wrong", [one.replace(digest=bytes(20))]),
        ("1+2-wrong", [one, two.replace(digest=bytes(32))]),
    ):
        tree, _ = tree_with(ds=records)
        yield Case(f"sha1/digest/{label}", tree, "www.example.", "A", "bogus", sha1=True)


def known_ranges() -> Iterator[Case]:
    """Aggressive use of NSEC and NSEC3 (RFC 8198): after many names that do not exist, the truth is still told."""
    before = tuple(f"{letter}{number}.example." for letter in "acegikmoqsuwy" for number in range(3))
    before += ("x.wild.example.", "empty.example.", "www.unsigned.example.", "www.signed.example.")
    for label, nsec3 in DENIALS.items():
        opted = "insecure" if label == "opt-out" else "secure"
        for title, owner, kind, expected in (
            ("no-name", "nothing.example.", "A", opted),
            ("deep-no-name", "a.b.c.nothing.example.", "A", opted),
            ("no-data", "www.example.", "TXT", "secure"),
            ("exists", "www.example.", "A", "secure"),
            ("empty", "empty.example.", "A", "secure"),
            ("below-empty", "deep.empty.example.", "A", "secure"),
            ("wildcard", "q.wild.example.", "A", opted),
            ("wildcard-no-data", "q.wild.example.", "TXT", opted),
            ("alias", "alias.example.", "A", "secure"),
            ("alias-to-nothing", "gone.example.", "A", opted),
            ("below-unsigned", "www.unsigned.example.", "A", "insecure"),
            ("below-signed", "www.signed.example.", "A", "secure"),
            ("no-name-below-signed", "nothing.signed.example.", "A", "secure"),
        ):
            tree, _ = tree_with(nsec3=nsec3)
            yield Case(f"known/{label}/{title}", tree, owner, kind, expected, before=before)


FAMILIES: tuple[Callable[[], Iterator[Case]], ...] = (
    *(algorithms, digests, broken_signatures, changed_data, denials, false_denials, moved_wildcard_denial),
    *(delegations, aliases, keys, anchors, reverse_trees, stripping),
    *(sha1_by_policy, known_ranges),
)


def all_cases() -> Iterator[Case]:
    for family in FAMILIES:
        yield from family()
