"""Publishing into Knot DNS, which signs as it goes: the same commands as with BIND, another implementation of RFC
2136. One namespace with one address; knotd is the primary, and answers for its own zone as the resolver."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.query
import dns.rcode
import pytest
import yaml

from oepy.keys import HostKey, encode
from oepy.lab.nameserver import in_namespace

pytestmark = [pytest.mark.root, pytest.mark.interop]

ADDRESS = "198.18.0.54"
SECRET = base64.b64encode(os.urandom(32)).decode()
TSIG = f'key "oepy-update" {{\n\talgorithm hmac-sha256;\n\tsecret "{SECRET}";\n}};\n'
OURS, OTHER = HostKey.generate("rsa-2048").public, HostKey.generate("ed25519").public
ZONE = f"""\
$ORIGIN knot.example.
$TTL 600
@ SOA ns hostmaster 1 7200 900 1209600 60
@ NS ns
ns A {ADDRESS}
a TXT "v=spf1 -all"
b IPSECKEY 10 0 4 . {encode(OTHER)}
c CNAME a
"""
CONFIGURATION = """\
server:
    rundir: {directory}
    user: root:root
    listen: {address}@53
    pidfile: {directory}/knot.pid
log:
  - target: {directory}/knot.log
    any: info
database:
    storage: {directory}/db
key:
  - id: oepy-update
    algorithm: hmac-sha256
    secret: {secret}
acl:
  - id: keys
    key: oepy-update
    action: update
    update-type: [IPSECKEY, TXT]
zone:
  - domain: knot.example
    storage: {directory}
    file: db.knot.example
    acl: keys
    dnssec-signing: on
    zonefile-sync: -1
    zonefile-load: difference
    journal-content: all
"""


class Knot:
    def __init__(self, namespace: str, directory: Path) -> None:
        self.namespace, self.directory = namespace, directory

    def records(self, owner: str, kind: str) -> list[tuple[int, str]]:
        query = dns.message.make_query(owner, kind)

        def ask() -> dns.message.Message:
            return dns.query.tcp(query, ADDRESS, timeout=3)

        answer = in_namespace(self.namespace, ask)
        return [(rrset.ttl, str(rdata).replace(" ", "")) for rrset in answer.answer for rdata in rrset]

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if self.records("knot.example.", "DNSKEY"):
                    return
            except (OSError, EOFError, dns.exception.DNSException):
                pass
            time.sleep(0.05)
        raise AssertionError(f"knotd is not ready: {(self.directory / 'knot.err').read_text()[-1000:]}")

    def oepy(self, command: str, inventory: Path, *words: str) -> tuple[int, Any]:
        more = (
            ["--tsig-file", str(self.directory / "tsig.key")] if command != "verify" else ["--no-validator"]
        )
        call = ["ip", "netns", "exec", self.namespace, sys.executable, "-m", "oepy", "dns", command]
        call += [str(inventory), *more, *words, "--server", ADDRESS, "--resolver", ADDRESS, "--json"]
        result = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
        return result.returncode, json.loads(result.stdout) if result.stdout else result.stderr

    def inventory(self, ttl: int) -> Path:
        key = [f"{int(OURS.algorithm)} {encode(OURS)}"]
        hosts = [
            {"name": f"{label}.knot.example", "keys": key, "records": ["ipseckey", "txt"]} for label in "abcd"
        ]
        path = self.directory / "hosts.yaml"
        path.write_text(yaml.safe_dump({"ttl": ttl, "zones": ["knot.example"], "hosts": hosts}))
        return path


@pytest.fixture
def knot(tmp_path) -> Iterator[Knot]:
    namespace = f"oeknot-{os.getpid()}-{secrets.token_hex(3)}"
    found = shutil.which("knotd", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert found, "knotd is missing: scripts/install-system test"
    (tmp_path / "db").mkdir()
    (tmp_path / "tsig.key").write_text(TSIG)
    (tmp_path / "tsig.key").chmod(0o600)
    (tmp_path / "db.knot.example").write_text(ZONE)
    text = CONFIGURATION.format(directory=tmp_path, address=ADDRESS, secret=SECRET)
    (tmp_path / "knot.conf").write_text(text)
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        subprocess.run(["ip", "-n", namespace, "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "-n", namespace, "addr", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
        call = ["ip", "netns", "exec", namespace, found, "-c", str(tmp_path / "knot.conf")]
        with (tmp_path / "knot.err").open("wb") as errors:
            process = subprocess.Popen(call, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            made = Knot(namespace, tmp_path)
            made.wait(process)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


def test_publish_into_knot(knot):
    """Difference, conflict, alias, TTL, verification and withdrawal; what is foreign stays with its TTL."""
    status, record = knot.oepy("publish", knot.inventory(120))
    assert (status, record["changed"], record["conflict_count"]) == (1, 2, 2), record
    assert {one["owner"] for one in record["conflicts"]} == {"b.knot.example.", "c.knot.example."}
    texts = knot.records("a.knot.example.", "TXT")
    assert len(texts) == 2
    assert (600, '"v=spf1-all"') in texts
    assert [ttl for ttl, _ in knot.records("d.knot.example.", "TXT")] == [120]
    status, record = knot.oepy("verify", knot.inventory(120))
    assert (status, record["servers"][0]["right"], record["servers"][0]["different"]) == (1, 2, 2)
    status, record = knot.oepy("publish", knot.inventory(60), "--replace")
    assert (status, record["conflict_count"], record["changed"]) == (1, 1, 3), record
    assert [ttl for ttl, _ in knot.records("d.knot.example.", "IPSECKEY")] == [60]
    assert (600, '"v=spf1-all"') in knot.records("a.knot.example.", "TXT")
    status, record = knot.oepy("publish", knot.inventory(60))
    assert (record["changed"], record["unchanged"]) == (0, 3)
    status, record = knot.oepy("withdraw", knot.inventory(60))
    assert (status, record["changed"]) == (0, 3), record
    assert knot.records("a.knot.example.", "TXT") == [(600, '"v=spf1-all"')]
    assert knot.records("b.knot.example.", "IPSECKEY") == []
    assert knot.oepy("verify", knot.inventory(60), "--withdrawn")[0] == 0
