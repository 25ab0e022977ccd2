"""The DNS room against a real BIND, with delv as the second opinion.

One namespace: `lo` with 198.18.0.53 and 2001:2::53, one named on both (authority of the private tree, and the
resolver in front of it). The test's questions are asked by a thread inside of the namespace.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import dns.rdatatype
import pytest

from oepy.dns.build import make_key_source, make_validator
from oepy.dns.validator import Outcome, Validator
from oepy.dns.zonemap import reverse_name
from oepy.errors import OepyError
from oepy.keys import HostKey
from oepy.lab.nameserver import RESOLVER_IPV4, RESOLVER_IPV6, ExtraHost, LabDns, in_namespace
from oepy.model import MARK_OWN, Absent, Bogus, GatewayType, Insecure, Secure, Security
from oepy.resolvers import Resolver

pytestmark = pytest.mark.root

KEYS = {
    name: HostKey.generate(kind).public
    for name, kind in [
        ("alpha", "ed25519"),
        ("beta", "rsa-3072"),
        ("impostor", "ecdsa-p256"),
        ("unsigned", "ed25519"),
        ("broken", "ed25519"),
        ("classless", "ecdsa-p384"),
    ]
}
EXTRA = [
    ExtraHost(
        f"h{i}.oe.example", IPv4Address("198.19.0.0") + i, IPv6Address("2001:2:0:7::") + i, KEYS["alpha"]
    )
    for i in range(1, 41)
]
RECORDS = {
    "oe.example.": [
        "*.wild.oe.example. IN A 198.18.0.99",
        "alias.oe.example. IN CNAME alpha.oe.example.",
        "deep.x.y.oe.example. IN A 198.18.0.98",
        *(f'big.oe.example. IN TXT "{i:03}{"x" * 240}"' for i in range(30)),
    ],
    "example.": [
        "*.wild.example. IN A 198.18.0.99",
        "dn.example. IN DNAME oe.example.",
    ],
    "18.198.in-addr.arpa.": [
        f"61.0.18.198.in-addr.arpa. IN IPSECKEY 10 3 4 alpha.oe.example. {'A' * 43}=",
        r"63.0.18.198.in-addr.arpa. IN IPSECKEY \# 5 0a 00 04 01 02",
        "64.0.18.198.in-addr.arpa. IN IPSECKEY 10 0 77 . AAAA",
    ],
}


class Lab:
    def __init__(self, namespace: str, dns: LabDns) -> None:
        self.namespace = namespace
        self.dns = dns

    def run(self, use: Callable[[Validator], Coroutine[Any, Any, Any]], resolver=RESOLVER_IPV4) -> Any:
        """Run a coroutine with a fresh validator inside of the namespace."""

        async def main() -> Any:
            anchors = [self.dns.trust_anchor]
            return await use(make_validator([Resolver(resolver)], trust_anchors=anchors, mark=MARK_OWN))

        return in_namespace(self.namespace, lambda: asyncio.run(main()))

    def look(self, owner: str, kind: str, **options: Any) -> Outcome:
        rdtype = int(dns.rdatatype.from_text(kind))
        return self.run(lambda validator: validator.lookup(dns.name.from_text(owner), rdtype), **options)

    def peer(self, subject: str) -> Any:
        return self.run(lambda validator: make_key_source(validator).peer_keys(subject))

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", self.namespace, *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    namespace = f"oedns-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{RESOLVER_IPV4}/32", "dev", "lo"],
            ["addr", "add", f"{RESOLVER_IPV6}/128", "dev", "lo"],
        ):
            subprocess.run(["ip", "-n", namespace, *words], check=True)
        directory = tmp_path_factory.mktemp("lab")
        with LabDns(directory, namespace, KEYS, extra_hosts=EXTRA, resource_records=RECORDS) as server:
            yield Lab(namespace, server)
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


SECURE = [
    ("alpha.oe.example", "A", "NOERROR", 1),
    ("alpha.oe.example", "IPSECKEY", "NOERROR", 1),
    ("alpha.oe.example", "MX", "NOERROR", 0),
    ("nothing.oe.example", "A", "NXDOMAIN", 0),
    ("nothing.example", "A", "NXDOMAIN", 0),
    ("y.oe.example", "A", "NOERROR", 0),
    ("new.wild.oe.example", "A", "NOERROR", 1),
    ("new.wild.example", "A", "NOERROR", 1),
    ("new.wild.example", "AAAA", "NOERROR", 0),
    ("alias.oe.example", "AAAA", "NOERROR", 1),
    ("alpha.dn.example", "A", "NOERROR", 1),
    ("oe.example", "DS", "NOERROR", 1),
    ("oe.example", "DNSKEY", "NOERROR", 1),
    ("1.18.198.in-addr.arpa", "DS", "NOERROR", 0),
    ("10.0.18.198.in-addr.arpa", "IPSECKEY", "NOERROR", 1),
    ("30.0.18.198.in-addr.arpa", "IPSECKEY", "NOERROR", 0),
    ("70.3.18.198.in-addr.arpa", "IPSECKEY", "NOERROR", 1),
    (str(reverse_name(ip_address("2001:2::10"))), "IPSECKEY", "NOERROR", 1),
    (str(reverse_name(ip_address("2001:2::30"))), "IPSECKEY", "NOERROR", 0),
    (str(reverse_name(ip_address("2001:2::31"))), "IPSECKEY", "NXDOMAIN", 0),
    ("big.oe.example", "TXT", "NOERROR", 30),
]
INSECURE = [
    ("10.1.18.198.in-addr.arpa", "IPSECKEY"),
    ("99.1.18.198.in-addr.arpa", "IPSECKEY"),
    (str(reverse_name(ip_address("2001:2:0:1::10"))), "IPSECKEY"),
]
BROKEN = [
    ("10.2.18.198.in-addr.arpa", "IPSECKEY"),
    (str(reverse_name(ip_address("2001:2:0:2::10"))), "PTR"),
]


@pytest.mark.parametrize(("owner", "kind", "rcode", "count"), SECURE)
def test_secure_answers_and_absences(lab, owner, kind, rcode, count):
    """NSEC, NSEC3, wildcards, aliases, TCP after truncation, IPv4 and IPv6 reverse names: secure."""
    outcome = lab.look(owner, kind)
    assert (outcome.status, outcome.reason) == (Security.SECURE, "")
    assert (outcome.rcode, len(outcome.rdatas)) == (rcode, count)
    assert 0 < outcome.ttl <= 300


@pytest.mark.parametrize(("owner", "kind"), INSECURE)
def test_insecure_delegations(lab, owner, kind):
    """Below a delegation without DS: insecure, proven by the zone above."""
    outcome = lab.look(owner, kind)
    assert outcome.status is Security.INSECURE
    assert "proves that" in outcome.reason


@pytest.mark.parametrize(("owner", "kind"), BROKEN)
def test_broken_zones_are_bogus(lab, owner, kind):
    """A DS that fits no key: bogus, and no data."""
    outcome = lab.look(owner, kind)
    assert (outcome.status, outcome.rdatas) == (Security.BOGUS, ())
    assert "fits the DS" in outcome.reason


def test_delv_agrees(lab, tmp_path):
    """BIND's own validator says the same of every name above."""
    flags, protocol, algorithm, key = lab.dns.trust_anchor.read_text().split(None, 7)[4:]
    anchors = tmp_path / "anchors.conf"
    anchors.write_text(
        f'trust-anchors {{ . static-key {flags} {protocol} {algorithm} "{"".join(key.split())}"; }};\n'
    )
    expected = [(o, k, "fully validated") for o, k, _, _ in SECURE]
    expected += [(o, k, "unsigned answer") for o, k in INSECURE] + [(o, k, "failed") for o, k in BROKEN]
    wrong = {}
    for owner, kind, word in expected:
        result = lab.command("delv", "-a", str(anchors), f"@{RESOLVER_IPV4}", owner, kind)
        if word not in result.stdout + result.stderr:
            wrong[owner, kind] = (word, result.stdout[-300:] + result.stderr[-300:])
    assert wrong == {}


def test_unbound_agrees(lab, tmp_path):
    """So does unbound's library, as a validating stub of the same resolver."""
    configuration = tmp_path / "unbound.conf"
    configuration.write_text(
        f'server:\n chroot: ""\n username: ""\n trust-anchor-file: "{lab.dns.trust_anchor}"\n'
        f"forward-zone:\n name: .\n forward-addr: {RESOLVER_IPV4}\n"
    )
    expected = [(o, k, "(secure)") for o, k, _, _ in SECURE if k != "DS"]
    expected += [(o, k, "(insecure)") for o, k in INSECURE] + [(o, k, "(BOGUS") for o, k in BROKEN]
    wrong = {}
    for owner, kind, word in expected:
        result = lab.command("unbound-host", "-C", str(configuration), "-v", "-t", kind, owner)
        if word not in result.stdout:
            wrong[owner, kind] = (word, result.stdout[-300:] + result.stderr[-300:])
    assert wrong == {}


def test_the_resolver_may_be_asked_over_ipv6(lab):
    """The same over the resolver's IPv6 address."""
    assert lab.look("alpha.oe.example", "A", resolver=RESOLVER_IPV6).status is Security.SECURE


@pytest.mark.parametrize("subject", ["198.18.0.10", "2001:2::10"])
def test_a_peers_key_with_itself_as_gateway(lab, subject):
    """The published key, gateway its own address, by IPv4 and by IPv6."""
    answer = lab.peer(subject)
    assert isinstance(answer, Secure)
    (key,) = answer.keys
    assert (key.key, key.gateways, key.record) == (KEYS["alpha"], (ip_address(subject),), "IPSECKEY")
    assert answer.questions > 0
    assert answer.elapsed > 0


def test_every_class_of_answer(lab):
    """Absent by NSEC and by NSEC3, insecure with its keys, bogus, RFC 2317, by name."""
    assert isinstance(lab.peer("198.18.0.30"), Absent)
    assert isinstance(lab.peer("2001:2::30"), Absent)
    insecure = lab.peer("198.18.1.10")
    assert isinstance(insecure, Insecure)
    assert [key.key for key in insecure.keys] == [KEYS["unsigned"]]
    assert isinstance(lab.peer("198.18.2.10"), Bogus)
    classless = lab.peer("198.18.3.70")
    assert isinstance(classless, Secure)
    assert classless.keys[0].owner == "70.64/26.3.18.198.in-addr.arpa."
    by_name = lab.peer("alpha.oe.example")
    assert isinstance(by_name, Secure)
    assert set(by_name.keys[0].gateways) == {ip_address("198.18.0.10"), ip_address("2001:2::10")}


def test_gateway_names_and_odd_records(lab):
    """A gateway name is resolved; a malformed record alone is bogus; an unknown algorithm is absent."""
    named = lab.peer("198.18.0.61")
    assert isinstance(named, Secure)
    assert named.keys[0].gateway_type is GatewayType.NAME
    assert ip_address("198.18.0.10") in named.keys[0].gateways
    malformed = lab.peer("198.18.0.63")
    assert isinstance(malformed, Bogus)
    assert "malformed" in malformed.reason
    unknown = lab.peer("198.18.0.64")
    assert isinstance(unknown, Absent)
    assert "algorithm 77" in unknown.reason


def test_forty_cold_peers_at_once(lab):
    """Every one of many first-time lookups is answered, sharing the chain's questions."""

    async def all_of(validator: Validator) -> list[Any]:
        source = make_key_source(validator)
        hosts = [str(host.ipv4) for host in EXTRA] + [str(host.ipv6) for host in EXTRA]
        random.shuffle(hosts)
        return await asyncio.gather(*map(source.peer_keys, hosts))

    answers = lab.run(all_of)
    assert {type(answer) for answer in answers} == {Secure}
    assert sum(answer.questions for answer in answers) < 3 * len(answers)


def test_the_commands(lab):
    """`dns lookup` and `dns peer` with their JSON, their options and exit statuses."""
    options = ["--resolver", str(RESOLVER_IPV4), "--trust-anchor", str(lab.dns.trust_anchor), "--json"]

    def oepy(*words: str) -> tuple[int, Any]:
        result = lab.command(sys.executable, "-m", "oepy", "dns", *words, *options)
        return result.returncode, json.loads(result.stdout)

    status, record = oepy("lookup", "alias.oe.example", "A")
    assert status == 0
    assert (record["status"], record["answers"]) == ("secure", ["198.18.0.10"])
    assert (record["canonical_name"], record["rcode"], record["reason"]) == (
        "alpha.oe.example.",
        "NOERROR",
        "",
    )
    assert [entry["zone"] for entry in record["chain"]] == [".", "example.", "oe.example."]
    assert set(record["chain"][0]) == {"zone", "algorithm", "key_tags", "status"}
    status, record = oepy("lookup", "alpha.oe.example", "A", "--at", "20200101000000")
    assert (status, record["status"]) == (1, "bogus")
    assert "not valid before" in record["reason"]
    status, record = oepy("peer", "198.18.0.10")
    assert (status, record["status"]) == (0, "secure")
    assert record["keys"][0]["gateway"] == "198.18.0.10"
    assert {"algorithm", "public_key", "gateway_type", "precedence", "record", "owner", "ttl"} <= set(
        record["keys"][0]
    )
    status, record = oepy("peer", "198.18.0.30")
    assert (status, record["status"], record["keys"]) == (1, "absent", [])


def test_a_lab_that_cannot_start_says_why_and_leaves_no_process(tmp_path):
    """Without the resolver's addresses in the namespace: an error in words, and named is gone."""
    namespace = f"oedns-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        server = LabDns(tmp_path, namespace, KEYS)
        with pytest.raises(OepyError, match="not ready"):
            server.start(seconds=1)
        assert server.pid is None
        left = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
        assert left.stdout == ""
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)
