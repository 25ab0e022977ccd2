"""Conventional connections with strongSwan's charon and its userland ESP, beyond what the matrix shows: several
children in one IKE SA, a held first packet, and how long a proof of identity lasts.

    [oepy 198.18.0.1, lo 10.1.0.1 10.1.1.1] ── veth ── [charon 198.18.0.2, lo 10.2.0.1 10.2.1.1]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.interop.charon import Charon, charon
from tests.net.daemon_host import Host, kinds

pytestmark = [pytest.mark.root, pytest.mark.interop]

OURS, THEIRS = "198.18.0.1", "198.18.0.2"
SECRET = "of two ends, and of nobody else"
# name: local_ts, remote_ts as oepy sees them
CHILDREN = {"first": ("10.1.0.0/24", "10.2.0.0/24"), "second": ("10.1.1.0/24", "10.2.1.0/24")}


def swanctl() -> str:
    children = "".join(
        f"{name} {{ local_ts = {theirs}\n remote_ts = {ours}\n esp_proposals = aes128gcm16-x25519,aes128gcm16 }}\n"
        for name, (ours, theirs) in CHILDREN.items()
    )
    return f"""
connections {{
  site {{
    version = 2
    local_addrs = {THEIRS}
    remote_addrs = {OURS}
    encap = yes
    local {{
      auth = psk
      id = gw.example
    }}
    remote {{
      auth = psk
      id = alpha.example
    }}
    children {{ {children} }}
  }}
}}
secrets {{
  ike-site {{
    id-1 = alpha.example
    id-2 = gw.example
    secret = "{SECRET}"
  }}
}}
"""


def section(start: str) -> dict[str, Any]:
    return {
        "connections": {
            "site": {
                "local_addrs": [OURS],
                "remote_addrs": [THEIRS],
                "local": {"auth": "psk", "id": "alpha.example"},
                "remote": {"auth": "psk", "id": "gw.example"},
                "children": {
                    name: {"local_ts": [ours], "remote_ts": [theirs], "start_action": start}
                    for name, (ours, theirs) in CHILDREN.items()
                },
            }
        },
        "secrets": [{"type": "ike", "id": ["alpha.example", "gw.example"], "secret_file": "psk"}],
    }


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[Namespace, Namespace]]:
    with Lab() as lab:
        one, two = lab.namespace("oepy"), lab.namespace("swan")
        lab.veth(one, two, "eth0", "eth0")
        for number, namespace in enumerate((one, two), 1):
            namespace.address("eth0", f"198.18.0.{number}/24")
            namespace.address("lo", f"10.{number}.0.1/24", f"10.{number}.1.1/24")
            namespace.ip("route", "add", "default", "via", f"198.18.0.{3 - number}")
        yield one, two


@pytest.fixture
def ends(wire: tuple[Namespace, Namespace], tmp_path: Path) -> Iterator[tuple[Host, Charon]]:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    host = Host(wire[0], tmp_path / "oepy")
    (host.directory / "psk").touch(mode=0o600)
    (host.directory / "psk").write_text(SECRET + "\n")
    with charon(wire[1].name, tmp_path / "charon") as daemon:
        daemon.load(swanctl())
        try:
            yield host, daemon
        finally:
            host.stop()


def through(host: Host, swan: Namespace, count: int = 3) -> None:
    """Pings between all the subnets, from both sides; none is lost."""
    for number in (0, 1):
        for namespace, here, there in ((host.namespace, 1, 2), (swan, 2, 1)):
            answers = ping(
                namespace, f"10.{there}.{number}.1", count=count, timeout=5, source=f"10.{here}.{number}.1"
            )
            assert None not in answers, host.log()


def test_both_begin_and_both_rekey(
    ends: tuple[Host, Charon], wire: tuple[Namespace, Namespace], tmp_path: Path
) -> None:
    """A held first packet brings the first child up, `connection up` the second on the same IKE SA; strongSwan
    rekeys all, we rekey, pings go on; then strongSwan begins. The wire sees IKE and ESP alone."""
    host, daemon = ends
    swan = wire[1]
    host.start({}, **section("trap"))
    with Capture(swan, ["eth0"], tmp_path / "wire.pcap") as capture:
        first = ping(host.namespace, "10.2.0.1", count=2, timeout=5, source="10.1.0.1")
        assert None not in first, host.log() + daemon.tail()
        up = host.oepy("connection", "up", "site/second")
        assert up.returncode == 0, up.stdout + up.stderr + host.log() + daemon.tail()
        through(host, swan)
        sas = host.json("sas")
        assert {sa["connection"] for sa in sas} == {"site/first", "site/second"}
        assert {sa["authenticated"] for sa in sas} == {"psk"}
        assert daemon.sas().count("ESTABLISHED") == 1

        for what in (("--child", "first"), ("--ike", "site")):
            daemon.swanctl("--rekey", *what)
            through(host, swan, 2)
        for more in ((), ("--ike",)):
            assert host.oepy("rekey", "10.2.1.1", *more).returncode == 0
            through(host, swan, 2)
        assert len(host.json("sas")) == 2

        daemon.swanctl("--terminate", "--ike", "site")
        wait_for(lambda: not host.json("sas"))
        daemon.swanctl("--initiate", "--child", "second", "--timeout", "20")
        daemon.swanctl("--initiate", "--child", "first", "--timeout", "20")
        through(host, swan)
        assert [row["state"] for row in host.json("connection", "list")] == ["up", "up"]
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}


def test_oepy_says_how_long_a_proof_lasts(ends: tuple[Host, Charon]) -> None:
    """AUTH_LIFETIME (RFC 4478): strongSwan has begun, has no rule of its own, and begins anew in time."""
    host, daemon = ends
    ours = section("none")
    ours["connections"]["site"] |= {"reauth_time": "6s", "over_time": "10s"}
    daemon.load(swanctl().replace("encap = yes", "encap = yes\n over_time = 2s"))
    host.start({}, **ours)
    daemon.swanctl("--initiate", "--child", "first", "--timeout", "20")
    another_tunnel(host, "10.1.0.1")
    assert "received AUTH_LIFETIME of 6s" in daemon.tail(400)


def test_strongswan_says_how_long_a_proof_lasts(ends: tuple[Host, Charon]) -> None:
    """It does where it cannot begin itself: to whom it gives an address. We begin anew in time, and keep that."""
    host, daemon = ends
    ours = section("none")
    ours["connections"]["site"]["vips"] = ["0.0.0.0"]
    ours["connections"]["site"]["children"] = {"first": {"remote_ts": ["10.2.0.0/24"]}}
    more = "encap = yes\n pools = four\n reauth_time = 12s\n over_time = 2s\n rand_time = 0s"
    theirs = swanctl().replace("encap = yes", more).replace("remote_ts = 10.1.0.0/24", "remote_ts = dynamic")
    daemon.load(theirs + "pools { four { addrs = 10.9.0.0/24 } }\n")
    host.start({}, **ours)
    assert host.oepy("connection", "up", "site/first").returncode == 0, host.log() + daemon.tail()
    another_tunnel(host, "10.9.0.1")
    assert host.json("status")["counts"]["ike"]["auth_lifetimes"] >= 1
    assert "initiator did not reauthenticate" not in daemon.tail(400)


def another_tunnel(host: Host, source: str) -> None:
    """In the place of the one that there is; it carries traffic."""
    (before,) = host.json("sas")
    wait_for(lambda: any(sa["spi_in"] != before["spi_in"] for sa in host.json("sas")), 30)
    wait_for(lambda: [sa["spi_in"] != before["spi_in"] for sa in host.json("sas")] == [True])
    assert None not in ping(host.namespace, "10.2.0.1", count=3, timeout=5, source=source), host.log()


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
