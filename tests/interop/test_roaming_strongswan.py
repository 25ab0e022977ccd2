"""oepy as a road warrior with two links, of which one fails, and strongSwan's charon as gateway with its userland
ESP. (The matrix has either end that moves to another address.) The topology is that of test_connections_mobike.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.lab.capture import Capture
from oepy.lab.charon import Charon, charon
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.net.daemon_host import Host, kinds
from tests.net.test_connections_mobike import (
    GATE,
    INSIDE,
    Stream,
    client_section,
    lay_out,
    routes,
    wait_for,
)

pytestmark = [pytest.mark.root, pytest.mark.interop]

_SECRET = "wherever we are"
_GATEWAY = f"""
connections {{
  road {{
    version = 2
    encap = yes
    mobike = yes
    dpd_delay = 10s
    local_addrs = {GATE}
    pools = four
    local {{ auth = psk\n id = gate.example }}
    remote {{ auth = psk\n id = one.road.example }}
    children {{ net {{ local_ts = 10.1.0.0/24\n esp_proposals = aes128gcm16-x25519,aes128gcm16 }} }}
  }}
}}
pools {{ four {{ addrs = 10.9.0.0/24\n dns = 10.1.0.53 }} }}
secrets {{ ike-1 {{ id-1 = gate.example\n id-2 = one.road.example\n secret = "{_SECRET}" }} }}
"""


@pytest.fixture(scope="module")
def network() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    with Lab() as lab:
        yield lay_out(lab)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    return tmp_path


def _host(namespace: Namespace, directory: Path) -> Host:
    host = Host(namespace, directory / "oepy")
    (host.directory / "psk").touch(mode=0o600)
    (host.directory / "psk").write_text(_SECRET + "\n")
    return host


def test_oepy_travels(network: tuple[Namespace, Namespace, Namespace], directory: Path) -> None:
    """strongSwan's gateway gives the address; the link in use goes down and comes back: the same SAs go by the
    other and back again, traffic goes on, and strongSwan rekeys in between."""
    warrior, gate, inside = network
    routes(warrior)
    host = _host(warrior, directory)
    with charon(gate.name, directory / "charon") as peer:
        peer.load(_GATEWAY)
        try:
            host.start({}, **client_section())
            up = host.oepy("connection", "up", "home")
            assert up.returncode == 0, up.stdout + up.stderr + host.log() + peer.tail()
            (sa,) = host.json("sas")
            assert sa["local_ts"] == ["10.9.0.1/32"]
            assert sa["local"] == "198.18.6.2:4500"
            with Capture(gate, ["wan0", "wan1"], directory / "wan.pcap") as capture:
                assert None not in ping(inside, "10.9.0.1", count=2, timeout=5), host.log() + peer.tail()
                for down, place in ((True, "198.18.7.2"), (False, "198.18.6.2")):
                    stream = Stream(warrior, INSIDE, "10.9.0.1")
                    stream.goes_on()
                    warrior.ip("link", "set", "eth0", "down" if down else "up")
                    if not down:
                        routes(warrior)
                    wait_for(lambda place=place: _is_at(peer, place), lambda: host.log() + peer.tail())
                    stream.goes_on()
                    lost = stream.close()
                    assert lost <= (20 if down else 0), host.log() + peer.tail()
                    peer.swanctl("--rekey", "--child" if down else "--ike", "net" if down else "road")
                    assert None not in ping(inside, "10.9.0.1", count=3, timeout=5), host.log() + peer.tail()
                capture.flush()
                assert kinds(capture) <= {"ike", "esp"}
            assert "connection-down" not in host.events()
            assert "UPD_SA_ADDR" in peer.log.read_text()
        finally:
            host.stop()


def _is_at(peer: Charon, place: str) -> bool:
    return f"@ {place}[4500]" in peer.sas()
