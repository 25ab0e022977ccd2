"""What `explain` and `doctor` say of a resolver that strips DNSSEC, is dead, or is another than it should be."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import dns.message
import dns.name
import dns.rdatatype
import pytest
import yaml
from click.testing import CliRunner

from oepy import config as configuration
from oepy.cli import main
from oepy.daemon import doctor
from tests.differential.responder import HOST, Responder
from tests.fakes.signed_tree import SignedTree

PEER = "192.0.2.20"
_DNSSEC = {
    dns.rdatatype.RRSIG,
    dns.rdatatype.NSEC,
    dns.rdatatype.NSEC3,
    dns.rdatatype.DS,
    dns.rdatatype.DNSKEY,
}


def strip(_question, reply: dns.message.Message) -> dns.message.Message:
    """As forwarders do that know nothing of DO: the records and signatures of DNSSEC are gone."""
    for section in (reply.answer, reply.authority):
        section[:] = [rrset for rrset in section if rrset.rdtype not in _DNSSEC]
    return reply


@pytest.fixture
def responder():
    with Responder() as running:
        yield running


@pytest.fixture
def config(responder, tmp_path):
    """A configuration with that resolver and a tree that it serves, both signed now."""
    now = int(time.time())
    tree = SignedTree()
    zone = tree.add("2.0.192.in-addr.arpa.")
    zone.add("20", "TXT", '"no key"')
    for each in tree.zones.values():
        each.inception, each.expiration = now - 3600, now + 86400
    tree.delegate()
    responder.serve(tree)
    anchors = tmp_path / "anchors.key"
    anchors.write_text("".join(f". IN DS {ds}\n" for ds in tree.zones[dns.name.root].make_ds()))
    path = tmp_path / "oepy.yaml"
    resolvers = [f"{HOST}@{responder.port}"]
    path.write_text(
        yaml.safe_dump(
            {
                "identity": {"id": PEER, "key": str(tmp_path / "host.key")},
                "dns": {"resolvers": resolvers, "trust_anchors": [str(anchors)]},
                "control": {"socket": str(tmp_path / "oepy.sock")},
            }
        )
    )
    return path, tree


def explain(path) -> dict:
    done = CliRunner().invoke(main, ["-c", str(path), "explain", PEER, "--json"])
    return json.loads(done.output)


def findings(path) -> dict[str, doctor.Finding]:
    return {each.subject: each for each in asyncio.run(doctor._names(configuration.load(path)))}


def test_a_resolver_that_strips_is_named_by_explain_and_doctor(config, responder):
    """Blocked as bogus, and the words say whose fault it is and what to do; without the stripping all is well."""
    path, tree = config
    good = explain(path)
    assert (good["dns"]["status"], findings(path)["DNSSEC"].verdict) == ("absent", "good")
    tree.lies.append(strip)
    responder.serve(tree)
    found = explain(path)
    assert found["dns"]["status"] == "bogus"
    assert "the resolver strips DNSSEC" in found["dns"]["reason"]
    assert "the resolver strips DNSSEC" in found["next"]
    finding = findings(path)["DNSSEC"]
    assert finding.verdict == "bad"
    assert "strips DNSSEC" in finding.text
    assert "passes DNSSEC records on" in finding.mend


def test_a_dead_resolver_beside_a_good_one_is_found(config, tmp_path):
    """Fail-over hides it from lookups, but not from the doctor."""
    path, _ = config
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind((HOST, 0))
        dead = f"{HOST}@{unused.getsockname()[1]}"
    data = yaml.safe_load(path.read_text())
    data["dns"]["resolvers"].append(dead)
    path.write_text(yaml.safe_dump(data))
    found = findings(path)
    assert found["DNSSEC"].verdict == "good"
    assert found["resolver"].verdict == "bad"
    assert dead in found["resolver"].text
