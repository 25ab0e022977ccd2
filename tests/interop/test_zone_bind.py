"""Generated zones and BIND: `named-checkzone` agrees with `oepy zone check`, and named hands a zone over."""

from __future__ import annotations

import json
import socket
import subprocess
import time

import dns.exception
import dns.message
import dns.query
import pytest
from click.testing import CliRunner

from oepy.bench.zone import write_inventory
from oepy.cli import main

HOSTS = 300
START_SECONDS = 20.0


@pytest.fixture(scope="module")
def zones(tmp_path_factory):
    """The directory of the zones of some hundred hosts."""
    folder = tmp_path_factory.mktemp("zones")
    write_inventory(folder / "hosts.csv", HOSTS, ipv6=False, shuffled=False)
    made = CliRunner().invoke(main, ["zone", "generate", str(folder / "hosts.csv"), "-o", str(folder)])
    assert made.exit_code == 0, made.output
    return folder


def checkzone(zone: str, path) -> int:
    command = ["named-checkzone", "-q", "-i", "local", zone, str(path)]
    return subprocess.run(command, check=False).returncode


def test_named_checkzone_agrees(zones, tmp_path):
    """Good for both; and bad for both where the name servers are gone, or one has no address."""
    runner = CliRunner()
    good = (zones / "db.bench.example").read_text()
    without_servers = good.replace("@ IN NS ns1.bench.example.\n", "")
    without_address = good.replace("ns1 IN A 192.0.2.53\n", "")
    assert good not in (without_servers, without_address)
    for text, status in ((good, 0), (without_servers, 1), (without_address, 1)):
        path = tmp_path / "db.bench.example"
        path.write_text(text)
        assert checkzone("bench.example", path) == status
        assert runner.invoke(main, ["zone", "check", str(path)]).exit_code == status


def is_served(port: int) -> bool:
    """Whether the zone is loaded, in its signed form."""
    query = dns.message.make_query("bench.example.", "DNSKEY")
    try:
        return bool(dns.query.tcp(query, "127.0.0.1", 1, port).answer)
    except (OSError, EOFError, dns.exception.DNSException):
        return False


@pytest.fixture
def named(zones, tmp_path):
    """BIND on a free port of 127.0.0.1, which signs its zone by dnssec-policy and gives it to the owner of a key;
    yields port and key file."""
    (tmp_path / "db.bench.example").write_bytes((zones / "db.bench.example").read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    key = subprocess.run(["tsig-keygen", "transfer"], capture_output=True, text=True, check=True).stdout
    key_file = tmp_path / "transfer.key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)
    configuration = tmp_path / "named.conf"
    configuration.write_text(
        f'{key}\noptions {{ directory "{tmp_path}"; pid-file none; listen-on port {port} {{ 127.0.0.1; }};\n'
        "listen-on-v6 { none; }; recursion no; notify no; dnssec-validation no;\n"
        "allow-transfer { key transfer; }; };\n"
        "controls { };\n"
        'zone "bench.example" { type primary; file "db.bench.example";\n'
        "dnssec-policy default; inline-signing yes; };\n"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["named", "-g", "-c", str(configuration)], stderr=log)
    try:
        end = time.monotonic() + START_SECONDS
        while not is_served(port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield port, key_file
    finally:
        process.terminate()
        process.wait(20)


def test_a_zone_by_transfer_is_checked_against_the_inventory(zones, named, tmp_path):
    """With the key: nothing wrong; with a host more in the inventory: its records are missing; without the key:
    an error in words."""
    port, key_file = named
    runner = CliRunner()
    arguments = ["zone", "check", "bench.example", "--server", "127.0.0.1", "--port", str(port), "--json"]
    signed = [*arguments, "--tsig-file", str(key_file), "--inventory"]
    good = runner.invoke(main, [*signed, str(zones / "hosts.csv")])
    assert good.exit_code == 0, good.output
    found = json.loads(good.output)
    assert (good.exit_code, found["source"], found["good"], found["counts"]) == (0, "transfer", HOSTS, {})
    more = tmp_path / "more.csv"
    more.write_text((zones / "hosts.csv").read_text() + "new.bench.example,10.0.200.1,,,\n")
    missing = json.loads(runner.invoke(main, [*signed, str(more)]).output)
    assert missing["problems"] == ["new.bench.example. A: is missing: 10.0.200.1"]
    refused = runner.invoke(main, arguments)
    assert refused.exit_code == 1
    assert "no transfer of bench.example. from 127.0.0.1" in refused.output


def test_a_live_zone_signed_by_bind_is_as_the_inventory_says(zones, named, tmp_path):
    """Every record of every host by validated answers, from the zone's own key as anchor."""
    port, _key_file = named
    end = time.monotonic() + START_SECONDS
    anchors = list(tmp_path.glob("Kbench.example.*.key"))
    arguments = ["zone", "check", "bench.example", "--inventory", str(zones / "hosts.csv"), "--json"]
    arguments += ["--resolver", "127.0.0.1", "--resolver-port", str(port), "--trust-anchor", str(anchors[0])]
    while True:  # BIND signs in the background
        live = CliRunner().invoke(main, arguments)
        found = json.loads(live.output)
        if live.exit_code == 0 or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert (found["problems"], found["source"], found["good"]) == ([], "live", HOSTS)
