"""Publishing by signed updates against a real BIND that signs as it goes (dnssec-policy, inline-signing).

One namespace as in `test_dns_lab`: the lab's name server is primary of every zone, and takes updates of key
records with one TSIG key.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import dns.message
import dns.name
import dns.query
import dns.rdatatype
import dns.xfr
import dns.zone
import pytest
import yaml

from oepy.keys import HostKey, encode
from oepy.lab.nameserver import RESOLVER_IPV4, RESOLVER_IPV6, ExtraHost, LabDns, in_namespace

pytestmark = pytest.mark.root

OURS, OTHER = HostKey.generate("ed25519").public, HostKey.generate("ed25519").public
SECRET = base64.b64encode(os.urandom(32)).decode()
TSIG = f'key "oepy-update" {{\n\talgorithm hmac-sha256;\n\tsecret "{SECRET}";\n}};\n'
HOSTS = [
    ExtraHost(f"p{i}.oe.example", IPv4Address("198.19.4.0") + i, IPv6Address("2001:2:0:9::") + i, None)
    for i in range(1, 251)
]
# Foreign to oepy, at names where it publishes: none of it may ever change unless --replace is given.
RECORDS = {
    "oe.example.": [
        'p1.oe.example. 1234 IN TXT "v=spf1 -all"',
        f"p2.oe.example. IN IPSECKEY 10 0 {int(OTHER.algorithm)} . {encode(OTHER)}",
        "aliased.oe.example. IN CNAME alpha.oe.example.",
        "away.oe.example. IN NS ns.elsewhere.example.",
    ],
}
ZONES = ["oe.example.", "19.198.in-addr.arpa.", "0.0.0.0.2.0.0.0.1.0.0.2.ip6.arpa."]
_SIGNING = {"RRSIG", "NSEC", "NSEC3", "NSEC3PARAM", "DNSKEY", "CDS", "CDNSKEY", "SOA", "TYPE65534"}


class Lab:
    def __init__(self, namespace: str, directory: Path, server: LabDns) -> None:
        self.namespace, self.directory, self.server = namespace, directory, server
        self.tsig = directory / "tsig.key"
        self.tsig.write_text(TSIG)
        self.tsig.chmod(0o600)

    def words(self, command: str, *words: str, tsig: Path | None = None) -> list[str]:
        more = ["--tsig-file", str(tsig or self.tsig)]
        if command == "verify":
            more = ["--trust-anchor", str(self.server.trust_anchor)]
        head = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "oepy"]
        return [*head, "dns", command, *words, *more, "--resolver", str(RESOLVER_IPV4), "--json"]

    def oepy(self, command: str, *words: str, tsig: Path | None = None) -> tuple[int, Any]:
        """Exit status and the JSON, or what stands on stderr."""
        result = subprocess.run(
            self.words(command, *words, tsig=tsig), capture_output=True, text=True, timeout=90, check=False
        )
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    def content(self) -> dict[str, set[str]]:
        """All zones by transfer, without what the signer makes."""

        def read() -> dict[str, set[str]]:
            found = {}
            for name in ZONES:
                zone = dns.zone.Zone(name, relativize=False)
                query, _ = dns.xfr.make_query(zone)
                query.flags = 0  # with RD the question would go to the resolver's view
                dns.query.inbound_xfr(str(RESOLVER_IPV4), zone, query)
                found[name] = {
                    f"{owner} {ttl} {rdata.rdtype.name} {rdata}"
                    for owner, ttl, rdata in zone.iterate_rdatas()
                    if rdata.rdtype.name not in _SIGNING
                }
            return found

        return in_namespace(self.namespace, read)

    def inventory(self, name: str, hosts: list[ExtraHost], key: Any = OURS, **more: Any) -> str:
        path = self.directory / name
        entries = [
            {
                "name": host.name,
                "addresses": [str(host.ipv4), str(host.ipv6)],
                "keys": [f"{int(key.algorithm)} {encode(key)}"],
                **more,
            }
            for host in hosts
        ]
        path.write_text(yaml.safe_dump({"ttl": 120, "zones": ZONES, "hosts": entries}))
        return str(path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[Lab]:
    namespace = f"oepub-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        for words in (
            ["link", "set", "lo", "up"],
            ["addr", "add", f"{RESOLVER_IPV4}/32", "dev", "lo"],
            ["addr", "add", f"{RESOLVER_IPV6}/128", "dev", "lo"],
        ):
            subprocess.run(["ip", "-n", namespace, *words], check=True)
        directory = tmp_path_factory.mktemp("lab")
        options = {"extra_hosts": HOSTS, "resource_records": RECORDS, "update_key": TSIG}
        with LabDns(directory, namespace, {}, **options) as server:
            yield Lab(namespace, directory, server)
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


def test_publish_verify_withdraw(lab):
    """Only the difference is sent, all servers and the validator agree, and withdrawal leaves no trace."""
    before = lab.content()
    inventory = lab.inventory("four.yaml", [HOSTS[0], *HOSTS[2:5]])
    status, record = lab.oepy("publish", inventory, "--dry-run")
    assert (status, record["changed"], len(record["difference"])) == (0, 12, 12)
    assert lab.content() == before
    status, record = lab.oepy("publish", inventory)
    assert (status, record["names"], record["changed"], record["records_added"]) == (0, 12, 12, 12), record
    assert record["servers"]["oe.example."] == str(RESOLVER_IPV4)
    after = lab.content()
    text = f"p1.oe.example. 120 IPSECKEY 10 0 {int(OURS.algorithm)} . {encode(OURS)}"
    assert text.replace(" ", "") in {line.replace(" ", "") for line in after["oe.example."]}
    assert all(before[zone] <= after[zone] for zone in ZONES)
    status, record = lab.oepy("publish", inventory)
    assert (status, record["changed"], record["unchanged"], record["batches"]) == (0, 0, 12, 0)
    status, record = lab.oepy("verify", inventory, "--server", str(RESOLVER_IPV4))
    assert (status, record["all_right"]) == (0, True), record
    labels = {view["server"] for view in record["servers"]}
    assert {f"ns.oe.example. {RESOLVER_IPV4}", f"ns.oe.example. {RESOLVER_IPV6}", "validator"} <= labels
    # another gateway: the old record goes, the new one comes, in one message
    changed = lab.inventory("four.yaml", [HOSTS[0], *HOSTS[2:5]], precedence=5)
    status, record = lab.oepy("verify", changed, "--no-validator")
    assert (status, record["all_right"]) == (1, False)
    status, record = lab.oepy("publish", changed)
    assert (status, record["records_added"], record["records_removed"]) == (0, 12, 12)
    status, record = lab.oepy("verify", changed, "--no-validator")
    assert status == 0
    status, record = lab.oepy("withdraw", changed)
    assert (status, record["records_removed"]) == (0, 12)
    assert lab.content() == before
    assert lab.oepy("verify", changed, "--no-validator", "--withdrawn")[0] == 0


def test_foreign_records_are_left_alone(lab):
    """A key record of somebody else stops its name only; with --replace it goes; other TXT stays always."""
    before = lab.content()
    inventory = lab.inventory("two.yaml", HOSTS[:2])
    status, record = lab.oepy("publish", inventory)
    assert (status, record["changed"], record["conflict_count"]) == (1, 5, 1)
    assert record["conflicts"][0]["owner"] == "p2.oe.example."
    assert "--replace" in record["conflicts"][0]["mend"]
    assert before["oe.example."] <= lab.content()["oe.example."]
    status, record = lab.oepy("publish", inventory, "--replace")
    assert (status, record["changed"], record["records_removed"]) == (0, 1, 1)
    gone = before["oe.example."] - lab.content()["oe.example."]
    assert len(gone) == 1
    assert "p2.oe.example." in gone.pop()
    alias = ExtraHost("aliased.oe.example", HOSTS[0].ipv4, HOSTS[0].ipv6, None)
    aliased = lab.inventory("alias.yaml", [alias])
    status, record = lab.oepy("publish", aliased)
    assert (status, record["conflict_count"]) == (1, 1)
    assert "alias of alpha.oe.example." in record["conflicts"][0]["reason"]


def test_names_below_a_delegation_are_left_alone(lab):
    """They are in another zone, which this primary does not have, however many are sent in one message."""
    hosts = [
        ExtraHost(
            f"h{i}.away.oe.example", IPv4Address("203.0.113.0") + i, IPv6Address("2001:db8::") + i, None
        )
        for i in range(1, 13)
    ]
    before = lab.content()
    status, record = lab.oepy("publish", lab.inventory("away.yaml", hosts))
    assert (status, record["names"], record["changed"], record["conflict_count"]) == (1, 12, 0, 12)
    assert "delegated" in record["conflicts"][0]["reason"]
    assert lab.content() == before


def test_refusals_name_the_mend(lab):
    """A wrong secret, an unknown key, a zone without permission, a file that others can read: one line each."""
    inventory = lab.inventory("refused.yaml", HOSTS[10:12])
    wrong = lab.directory / "wrong.key"
    wrong.write_text(TSIG.replace(SECRET, base64.b64encode(os.urandom(32)).decode()))
    wrong.chmod(0o600)
    status, text = lab.oepy("publish", inventory, tsig=wrong)
    assert status == 1
    assert "compare the secret of oepy-update." in text
    wrong.write_text(TSIG.replace("oepy-update", "nobody"))
    status, text = lab.oepy("publish", inventory, tsig=wrong)
    assert status == 1
    assert "does not know the TSIG key" in text
    wrong.chmod(0o644)
    status, text = lab.oepy("publish", inventory, tsig=wrong)
    assert "chmod 600" in text
    unsigned = lab.directory / "unsigned.yaml"
    host = {"name": "unsigned.oe.example", "addresses": ["198.18.1.10"], "keys": [f"4 {encode(OURS)}"]}
    unsigned.write_text(yaml.safe_dump({"zones": ["1.18.198.in-addr.arpa"], "hosts": [host]}))
    status, text = lab.oepy("publish", str(unsigned))
    assert status == 1
    assert "REFUSED" in text
    assert "update-policy" in text


def test_a_killed_run_is_resumed(lab):
    """Killed after its first updates, a run is completed by the next, which does not send again what is there."""
    before = lab.content()
    hosts = HOSTS[20:]
    inventory = lab.inventory("many.yaml", hosts)
    process = subprocess.Popen(lab.words("publish", inventory), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while lab.content() == before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait(10)
    there = sum(len(lines) for lines in lab.content().values()) - sum(len(lines) for lines in before.values())
    assert there > 0
    status, record = lab.oepy("publish", inventory)
    assert (status, record["names"]) == (0, 3 * len(hosts))
    assert record["changed"] + there == 3 * len(hosts)
    after = lab.content()
    assert all(before[zone] <= after[zone] for zone in ZONES)
    assert sum(len(after[zone] - before[zone]) for zone in ZONES) == 3 * len(hosts)


def test_this_host(lab):
    """Without an inventory: identity, key and zone come from the configuration and the DNS."""
    key = lab.directory / "host.key"
    mine = HostKey.generate("ed25519")
    mine.save(key)
    config = lab.directory / "oepy.yaml"
    config.write_text(yaml.safe_dump({"identity": {"id": "gamma.oe.example", "key": str(key)}}))
    words = ["--address", "198.18.0.30", "--address", "2001:2::30"]

    def oepy(command: str, *more: str) -> tuple[int, Any]:
        call = lab.words(command, *words, *more)
        at = call.index("dns")
        result = subprocess.run(
            [*call[:at], "-c", str(config), *call[at:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    status, record = oepy("publish")
    assert (status, record["changed"], len(record["servers"])) == (0, 3, 3), record
    status, record = oepy("verify")
    assert (status, record["all_right"]) == (0, True), record
    status, record = oepy("withdraw")
    assert (status, record["records_removed"]) == (0, 3)


def test_key_rotate(lab):
    """A whole roll-over, killed and gone on with: the key in use is in every answer at every moment."""
    key = lab.directory / "rotating.key"
    HostKey.generate("ed25519").save(key)
    config = lab.directory / "rotate.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "identity": {"id": "legacy.oe.example", "key": str(key)},
                "control": {"socket": str(lab.directory / "no.sock")},
            }
        )
    )
    head = ["ip", "netns", "exec", lab.namespace, sys.executable, "-m", "oepy", "-c", str(config)]
    where = ["--address", "198.18.0.40", "--resolver", str(RESOLVER_IPV4), "--json"]
    update = ["--tsig-file", str(lab.tsig), "--ttl", "2"]
    anchor = ["--trust-anchor", str(lab.server.trust_anchor)]

    def oepy(*words: str) -> tuple[int, Any]:
        result = subprocess.run(
            [*head, *words, *where], capture_output=True, text=True, timeout=60, check=False
        )
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    old = HostKey.load(key).public
    status, record = oepy("dns", "publish", *update)
    assert status == 0, record
    missing: list[str] = []
    sampled = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal sampled
        while not stop.wait(0.02):
            before = encode(HostKey.load(key).public)
            query = dns.message.make_query(
                "legacy.oe.example.", "IPSECKEY"
            )  # what a peer's resolver has cached
            answer = dns.query.udp(query, str(RESOLVER_IPV4), timeout=5)
            found = {base64.b64encode(rdata.key).decode() for rrset in answer.answer for rdata in rrset}
            sampled += 1
            if not {before, encode(HostKey.load(key).public)} & found:
                missing.append(before)

    watcher = threading.Thread(target=lambda: in_namespace(lab.namespace, sample))
    watcher.start()
    try:
        killed = subprocess.Popen(
            [*head, "key", "rotate", *update, *anchor, *where],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while not key.with_name("rotating.key.rotation").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        killed.kill()
        killed.wait(10)
        status, record = oepy("key", "rotate", *update, *anchor, "--no-wait")
        assert (status, record["done"], record["step"]) == (1, False, "wait"), record
        status, listed = oepy("key", "list", *anchor)
        assert listed["keys"][0]["state"] == "current"
        assert listed["keys"][0]["published"] == ["legacy.oe.example", "198.18.0.40"]
        assert listed["keys"][1]["state"] == "next"
        assert listed["keys"][1]["fingerprint"] == listed["rotation"]["key"] == record["key"]
        status, record = oepy("key", "rotate", *update, *anchor)
        assert (status, record["done"]) == (0, True), record
        time.sleep(2.5)
    finally:
        stop.set()
        watcher.join(20)
    assert missing == []
    assert sampled > 20
    new = HostKey.load(key).public
    assert new != old
    content = "".join(lab.content()["oe.example."]).replace(" ", "")
    assert encode(new) in content
    assert encode(old) not in content
    status, listed = oepy("key", "list", *anchor)
    assert [row["state"] for row in listed["keys"]] == ["current"]
    assert listed["rotation"] is None
