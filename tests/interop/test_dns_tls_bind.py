"""DNS over TLS and TCP with a real server: BIND, which signs its zone and listens on TLS beside the plain port."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import time

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rdatatype
import pytest
from click.testing import CliRunner

from oepy.cli import main
from oepy.dns.message import Question, Reply
from oepy.dns.transport import StubTransport
from oepy.resolvers import parse_resolver
from tests.fakes.resolver import Authority

HOST = "127.0.0.1"
START_SECONDS = 20.0
BIG = "\n".join(f'big TXT "{number:03} {"x" * 200}"' for number in range(40))


def _is_signed(port: int) -> bool:
    query = dns.message.make_query("www.tls.example.", "A", want_dnssec=True)
    try:
        return len(dns.query.tcp(query, HOST, 1, port).answer) == 2
    except (OSError, EOFError, dns.exception.DNSException):
        return False


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Yields the ports (plain, TLS), the authority's bundle, the pin and the file of the zone's key."""
    folder = tmp_path_factory.mktemp("named")
    certificate, key, pin = (authority := Authority(folder)).issue("dns.example")
    (folder / "db").write_text(
        f"$TTL 300\n@ SOA ns1.tls.example. h.tls.example. 1 3600 600 86400 300\n@ NS ns1\nns1 A 192.0.2.53\n"
        f"www A 192.0.2.80\n{BIG}\n"
    )
    with socket.create_server((HOST, 0)) as one, socket.create_server((HOST, 0)) as two:
        plain, secured = one.getsockname()[1], two.getsockname()[1]
    (folder / "named.conf").write_text(
        f'tls own {{ cert-file "{certificate}"; key-file "{key}"; }};\n'
        f'options {{ directory "{folder}"; pid-file none; listen-on port {plain} {{ {HOST}; }};\n'
        f"listen-on port {secured} tls own {{ {HOST}; }}; listen-on-v6 {{ none; }};\n"
        "recursion no; notify no; dnssec-validation no; };\ncontrols { };\n"
        'zone "tls.example" { type primary; file "db"; dnssec-policy default; inline-signing yes; };\n'
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["named", "-g", "-c", str(folder / "named.conf")], stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while not _is_signed(plain):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        yield plain, secured, authority.bundle, pin, next(folder.glob("Ktls.example.*.key"))
    finally:
        process.terminate()
        process.wait(20)


def lookup(resolver: str, named, *more: str) -> dict:
    arguments = ["dns", "lookup", "www.tls.example", "A", "--json", "--resolver", resolver]
    done = CliRunner().invoke(main, [*arguments, "--trust-anchor", str(named[4]), *more])
    return json.loads(done.output)


def test_a_lookup_over_tls_is_secure_by_name_or_pin(named):
    """The certificate's name, the pin of its key, and neither; nothing is got where neither holds."""
    _, port, bundle, pin, _ = named
    by_name = lookup(f"{HOST}@{port}#dns.example", named, "--tls-cert-bundle", str(bundle))
    assert (by_name["status"], by_name["answers"]) == ("secure", ["192.0.2.80"]), by_name["reason"]
    by_pin = lookup(f"{HOST}@{port}#pin-sha256={base64.b64encode(pin).decode()}", named)
    assert by_pin["status"] == "secure"
    wrong = lookup(f"{HOST}@{port}#other.example", named, "--tls-cert-bundle", str(bundle))
    assert (wrong["status"], wrong["answers"]) == ("indeterminate", [])
    assert "TLS: the certificate does not prove the server" in wrong["reason"]


@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
def test_many_questions_go_over_one_connection(named, tls):
    """200 at once, the large ones truncated over UDP; BIND answers out of order."""
    plain, secured, bundle, _, _ = named
    resolver = parse_resolver(f"{HOST}@{secured}#dns.example" if tls else f"{HOST}@{plain}")

    async def run() -> list[object]:
        stub = StubTransport([resolver], tls_bundle=str(bundle))
        owners = [("big", "TXT") if number % 2 else (f"n{number}", "A") for number in range(200)]
        questions = [
            Question(dns.name.from_text(f"{owner}.tls.example."), int(dns.rdatatype.from_text(kind)))
            for owner, kind in owners
        ]
        replies = await asyncio.gather(*map(stub.ask, questions))
        assert len(stub.servers[0].streams.connections) <= 2
        stub.close()
        await asyncio.sleep(0)
        return list(replies)

    replies = asyncio.run(run())
    assert all(isinstance(reply, Reply) for reply in replies)
    assert [len(reply.answer[0].rdatas) if reply.answer else reply.rcode_text for reply in replies] == [
        40 if number % 2 else "NXDOMAIN" for number in range(200)
    ]
