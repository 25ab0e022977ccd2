"""Connections over the kernel's ESP: an assigned address on the XFRM interface, and MOBIKE."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oepy.lab.capture import Capture
from oepy.lab.charon import charon
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import Pinger, echoes, ping
from tests.net.daemon_host import SECRET, Host, kinds, two_with_a_secret
from tests.net.test_connections_mobike import (
    GATE,
    INSIDE,
    SECRETS,
    client_section,
    gate_section,
    lay_out,
    routes,
    travel,
    wait_for,
)

pytestmark = [pytest.mark.root, pytest.mark.kernel]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]]]:
    with Lab() as lab:
        network = lay_out(lab)
        with two_with_a_secret(*network[:2], tmp_path) as made:
            yield network, made


def test_traffic_goes_on_over_another_link(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """As with the userland datapath: the same SAs go by the other link and back, with the inner address."""
    travel(*hosts, tmp_path, {"datapath": "xfrm"}, 8.0)


def test_ah_by_ike(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """`ah_proposals`: a tunnel of AH between subnet and host, which carries traffic both ways and is rekeyed; the
    wire sees IKE and AH."""
    (warrior, gate, _), (client, server) = hosts
    routes(warrior)
    ah = {"ah_proposals": ["sha256-x25519"]}
    sections = gate_section(), client_section()
    for section, name in zip(sections, ("road", "home"), strict=True):
        section["connections"][name]["children"]["net"].update(ah)
    server.start({}, **sections[0], datapath="xfrm")
    client.start({}, **sections[1], datapath="xfrm")
    up = client.oepy("connection", "up", "home")
    assert up.returncode == 0, up.stdout + up.stderr + client.log() + server.log()
    with Capture(gate, ["wan0", "wan1"], tmp_path / "wan.pcap") as capture:
        for _ in range(2):
            assert None not in ping(warrior, INSIDE, count=3, timeout=10, source="10.9.0.1"), client.log()
            (sa,) = client.json("sas")
            assert (sa["protocol"], sa["encap"]) == ("ah", False)
            assert client.oepy("rekey", INSIDE).returncode == 0
            wait_for(lambda sa=sa: client.json("sas")[0]["spi_in"] != sa["spi_in"], client.log, 60)
        capture.flush()
        assert kinds(capture) == {"ike", "ah"}


def test_ah_in_transport_mode(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """Between the two outer addresses, past the tunnel's device: what goes both ways is AH, nothing in the clear;
    with the peer gone the trap holds it."""
    (warrior, gate, _), (client, server) = hosts
    routes(warrior)
    child = {"mode": "transport", "ah_proposals": ["sha256"], "start_action": "trap"}
    sections = gate_section(), client_section()
    for section, name in zip(sections, ("road", "home"), strict=True):
        connection = section["connections"][name]
        for key in ("vips", "pools"):
            connection.pop(key, None)
        connection["children"] = {"net": child if name == "home" else {**child, "start_action": "none"}}
    server.start({}, **sections[0], datapath="xfrm")
    client.start({}, **sections[1], datapath="xfrm")
    with Capture(gate, ["wan0", "wan1"], tmp_path / "wan.pcap") as capture:
        assert None not in ping(warrior, GATE, count=3, timeout=20), client.log() + server.log()
        (sa,) = client.json("sas")
        assert (sa["protocol"], sa["mode"]) == ("ah", "transport")
        assert None not in ping(gate, "198.18.6.2", count=2, timeout=10, source=GATE), server.log()
        server.stop()
        ping(warrior, GATE, count=2, timeout=1)
        capture.flush()
        assert kinds(capture) <= {"ike", "ah"}


@pytest.mark.parametrize("inward", [42, 43], ids=["one", "two"])
def test_interfaces_of_the_administrators(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path, inward: int
) -> None:
    """`if_id_in` and `if_id_out`: what is routed to the XFRM interface of `if_id_out` goes by these SAs, and
    nowhere without them; what comes back is out of that of `if_id_in`. oepy's own device has no part in it."""
    (warrior, gate, _), (client, server) = hosts
    routes(warrior)
    for namespace, device, ours, theirs in (
        (warrior, "eth0", "10.9.1.1", "10.1.0.0/24"),
        (gate, "wan0", "10.9.1.2", "10.9.1.1"),
    ):
        namespace.ip("link", "add", "ipsec0", "type", "xfrm", "dev", device, "if_id", "42")
        namespace.ip("link", "set", "ipsec0", "up")
        namespace.address("ipsec0", f"{ours}/32")
        namespace.ip("route", "add", theirs, "dev", "ipsec0")
    if inward != 42:
        warrior.ip("link", "add", "ipsec1", "type", "xfrm", "dev", "eth0", "if_id", str(inward))
        warrior.ip("link", "set", "ipsec1", "up")
    sections = gate_section(), client_section()
    for section, name in zip(sections, ("road", "home"), strict=True):
        connection = section["connections"][name]
        for key in ("vips", "pools"):
            connection.pop(key, None)
        inside, outside = (
            (["10.1.0.0/24"], ["10.9.1.1/32"]) if name == "road" else (["10.9.1.1/32"], ["10.1.0.0/24"])
        )
        connection["children"] = {
            "net": {
                "local_ts": inside,
                "remote_ts": outside,
                "if_id_out": 42,
                "if_id_in": inward if name == "home" else 42,
            }
        }
    server.start({}, **sections[0], datapath="xfrm")
    client.start({}, **sections[1], datapath="xfrm")
    with Capture(gate, ["wan0", "wan1"], tmp_path / "wan.pcap") as capture:
        assert ping(warrior, "10.1.0.1", count=2, timeout=1, source="10.9.1.1") == [None, None]
        up = client.oepy("connection", "up", "home")
        assert up.returncode == 0, up.stdout + up.stderr + client.log() + server.log()
        answers = ping(warrior, "10.1.0.1", count=3, timeout=10, source="10.9.1.1")
        assert None not in answers, client.log() + server.log()
        (sa,) = client.json("sas")
        assert sa["packets_out"] >= 3
        came = warrior.run("ip", "-s", "-j", "link", "show", "ipsec0" if inward == 42 else "ipsec1").stdout
        assert json.loads(came)[0]["stats64"]["rx"]["packets"] >= 3
        assert client.oepy("connection", "down", "home").returncode == 0
        assert ping(warrior, "10.1.0.1", count=2, timeout=1, source="10.9.1.1") == [None, None]
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}
    client.stop()
    assert "if_id 0x2a" not in warrior.run("ip", "xfrm", "policy").stdout


_CHARON_AH = """
connections {
  road {
    version = 2
    local_addrs = 198.18.8.1
    local { auth = psk\n id = gate.example }
    remote { auth = psk\n id = one.road.example }
    children { net { local_ts = 10.1.0.0/24\n ah_proposals = sha256-x25519,sha256 } }
  }
}
secrets { ike-1 { id-1 = gate.example\n id-2 = one.road.example\n secret = "%s" } }
"""


def test_ah_with_strongswan(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """Both kernels' AH in tunnel mode: oepy begins, either side rekeys, pings go on; the wire sees IKE and AH."""
    (warrior, gate, inside), (client, _) = hosts
    routes(warrior)
    warrior.ip("route", "replace", "default", "via", "198.18.6.1")  # some way to what comes out of the tunnel
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    section = client_section()
    section["connections"]["home"].pop("vips")
    section["connections"]["home"]["children"]["net"] = {
        "remote_ts": ["10.1.0.0/24"],
        "ah_proposals": ["sha256-x25519"],
    }
    with charon(gate.name, tmp_path / "charon") as peer:
        peer.load(_CHARON_AH % SECRET)
        client.start({}, **section, datapath="xfrm")
        # On our side: at strongSwan's, whose policies have no device, a capture sees what has been decrypted, too
        with Capture(warrior, ["eth0", "eth1"], tmp_path / "wan.pcap") as capture:
            up = client.oepy("connection", "up", "home")
            assert up.returncode == 0, up.stdout + up.stderr + client.log() + peer.tail()
            assert None not in ping(inside, "198.18.6.2", count=3, timeout=10), client.log() + peer.tail()
            for rekey in (
                lambda: client.oepy("rekey", INSIDE),
                lambda: peer.swanctl("--rekey", "--child", "net"),
            ):
                (sa,) = client.json("sas")
                assert (sa["protocol"], sa["mode"]) == ("ah", "tunnel")
                rekey()
                wait_for(lambda sa=sa: client.json("sas")[-1]["spi_in"] != sa["spi_in"], client.log, 60)
                wait_for(lambda: len(client.json("sas")) == 1, client.log, 60)
                assert None not in ping(inside, "198.18.6.2", count=3, timeout=10), peer.tail()
            capture.flush()
            assert kinds(capture) == {"ike", "ah"}


COLOURS = {"red": 0x11, "blue": 0x22}


def _coloured(own: str, ours: str, theirs: str, *, reverse: bool) -> dict[str, Any]:
    """Two connections with the same selectors, of which each has its mark and its address of the gateway's."""
    connections = {}
    for number, (name, mark) in enumerate(COLOURS.items(), 1):
        gate, peer = f"198.18.8.{number}", "gate.example" if own != "gate.example" else "one.road.example"
        connections[name] = {
            "local_addrs": [gate] if reverse else ["198.18.6.2"],
            "remote_addrs": ["198.18.6.2"] if reverse else [gate],
            "local": {"auth": "psk", "id": own},
            "remote": {"auth": "psk", "id": peer},
            "children": {
                "net": {
                    "local_ts": [ours],
                    "remote_ts": [theirs],
                    "mark_in": mark,
                    "mark_out": f"{mark:#x}/0xff",
                    "set_mark_in": "%same",
                    "start_action": "trap" if name == "red" and not reverse else "none",
                }
            },
        }
    return {"connections": connections, "secrets": SECRETS}


def test_two_connections_side_by_side_by_their_marks(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """With the same selectors: each packet goes by the tunnel of its mark, and comes back by it. Whichever traps
    holds its first packet; what has no mark, or one whose tunnel is down, is its group's, which is `private`:
    nothing leaves in the clear. Another mark reaches the kernel by a reload."""
    (warrior, gate, _), (client, server) = hosts
    warrior.address("lo", "10.9.1.1/32")
    warrior.ip("route", "add", "10.1.0.0/24", "via", "198.18.6.1")
    for number in (1, 2):
        warrior.ip("route", "replace", f"198.18.8.{number}/32", "via", "198.18.6.1")
    gate.address("lo", "198.18.8.2/32")
    gate.sysctl("net.ipv4.fwmark_reflect", "1")
    sections = (
        _coloured("gate.example", "10.1.0.0/24", "10.9.1.1/32", reverse=True),
        _coloured("one.road.example", "10.9.1.1/32", "10.1.0.0/24", reverse=False),
    )
    private = {"policy": {"default": "clear", "groups": {"private": ["10.1.0.0/24"]}}, "datapath": "xfrm"}
    server.start({}, **sections[0], datapath="xfrm")
    client.start({}, **sections[1], **private)

    def marked(mark: int, count: int = 3, timeout: float = 15) -> list[float | None]:
        with warrior.entered(), Pinger("10.1.0.1", source="10.9.1.1") as pinger:
            pinger.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            return echoes(pinger, count, timeout)

    def sent() -> dict[str, int]:
        return {sa["connection"]: sa["packets_out"] for sa in client.json("sas")}

    with Capture(gate, ["wan0", "wan1"], tmp_path / "wan.pcap") as capture:
        assert None not in marked(0x11), client.log() + server.log()
        assert sent() == {"red/net": 3}
        assert marked(0, 2, 1) == [None, None]
        assert marked(0x22, 2, 1) == [None, None]
        up = client.oepy("connection", "up", "blue")
        assert up.returncode == 0, up.stdout + up.stderr + client.log() + server.log()
        assert None not in marked(0x22), client.log() + server.log()
        assert None not in marked(0x4422), client.log()  # the mask leaves the other bits open
        assert sent() == {"red/net": 3, "blue/net": 6}
        told = client.json("explain", "10.1.0.1")
        assert {(row["connection"], row["mark"], row["disposition"]) for row in told["marked"]} == {
            ("red/net", "0x11/0xff", "private"),
            ("blue/net", "0x22/0xff", "private"),
        }
        for section in sections:
            child = section["connections"]["blue"]["children"]["net"]
            child |= {"mark_in": 0x33, "mark_out": "0x33/0xff"}
        server.reload({}, **sections[0], datapath="xfrm")
        client.reload({}, **sections[1], **private)
        assert client.oepy("connection", "up", "blue").returncode == 0, client.log()
        assert None not in marked(0x33), client.log() + server.log()
        assert marked(0x22, 2, 1) == [None, None]
        server.stop()
        assert client.oepy("connection", "down", "red").returncode in (0, 1)
        assert marked(0x11, 2, 1) == [None, None]
        capture.flush()
        assert kinds(capture) == {"ike", "esp"}
    client.stop()
    assert "mark" not in warrior.run("ip", "xfrm", "policy").stdout
