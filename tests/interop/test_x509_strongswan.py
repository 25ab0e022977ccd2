"""Connections by X.509 with strongSwan's charon, beyond what the matrix shows: ECDSA P-384, Ed25519, distinguished
names as identities, strangers, revocation."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from oepy.keys import HostKey
from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.fakes.certificates import DNS, Holder, pem, revocation_list
from tests.interop.charon import Charon, charon
from tests.net.daemon_host import Host

pytestmark = [pytest.mark.root, pytest.mark.interop]

OURS, THEIRS = "198.18.0.1", "198.18.0.2"
NOW = datetime.datetime.now(datetime.UTC)
KEYS: dict[str, Any] = {
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ecdsa-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
NAMES = {"ours": "alpha.example", "theirs": "gw.example"}
SUBJECTS = {"ours": "CN=alpha", "theirs": "CN=gw"}


class Site:
    """A root, a CA below it, a certificate for each end."""

    def __init__(self, kind: str) -> None:
        make = KEYS[kind]
        self.root = Holder("Root of the test", key=make(), moment=NOW)
        self.middle = Holder("CA of the test", self.root, key=make(), moment=NOW)
        self.ours = Holder(
            "alpha", self.middle, ca=False, key=make(), moment=NOW, alternatives=[DNS("alpha.example")]
        )
        self.theirs = Holder(
            "gw", self.middle, ca=False, key=make(), moment=NOW, alternatives=[DNS("gw.example")]
        )


def swanctl(identity: dict[str, str]) -> str:
    return f"""
connections {{
  site {{
    version = 2
    local_addrs = {THEIRS}
    remote_addrs = {OURS}
    encap = yes
    local {{
      auth = pubkey
      certs = own.pem
      id = "{identity["theirs"]}"
    }}
    remote {{
      auth = pubkey
      id = "{identity["ours"]}"
      cacerts = root.pem
    }}
    children {{ net {{ local_ts = {THEIRS}/32
 remote_ts = {OURS}/32
 esp_proposals = aes128gcm16 }} }}
  }}
}}
"""


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[Namespace, Namespace]]:
    with Lab() as lab:
        one, two = lab.namespace("oepy"), lab.namespace("swan")
        lab.veth(one, two, "eth0", "eth0")
        for number, namespace in enumerate((one, two), 1):
            namespace.address("eth0", f"198.18.0.{number}/24")
        yield one, two


@pytest.fixture
def ends(wire: tuple[Namespace, Namespace], tmp_path: Path) -> Iterator[tuple[Host, Charon]]:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    host = Host(wire[0], tmp_path / "oepy")
    with charon(wire[1].name, tmp_path / "charon") as daemon:
        try:
            yield host, daemon
        finally:
            host.stop()


def configure(host: Host, daemon: Charon, site: Site, identity: dict[str, str]) -> dict[str, Any]:
    (host.directory / "own.key").touch(mode=0o600)
    (host.directory / "own.key").write_bytes(HostKey(site.ours.key).to_pem())
    (host.directory / "own.pem").write_bytes(pem(site.ours, site.middle))
    (host.directory / "root.pem").write_bytes(pem(site.root))
    files = {
        "private/own.pem": HostKey(site.theirs.key).to_pem(),
        "x509/own.pem": pem(site.theirs),
        "x509ca/root.pem": pem(site.root),
        "x509ca/middle.pem": pem(site.middle),
    }
    daemon.load(swanctl(identity), files)
    return {
        "connections": {
            "site": {
                "local_addrs": [OURS],
                "remote_addrs": [THEIRS],
                "local": {"auth": "x509", "certs": ["own.pem"], "key": "own.key", "id": identity["ours"]},
                "remote": {"auth": "x509", "cacerts": ["root.pem"], "id": identity["theirs"]},
                "children": {"net": {"local_ts": [f"{OURS}/32"], "remote_ts": [f"{THEIRS}/32"]}},
            }
        }
    }


@pytest.mark.parametrize(
    ("kind", "names"),
    [("ecdsa", SUBJECTS), ("ecdsa-p384", NAMES), ("ed25519", NAMES)],
    ids=["subjects", "ecdsa-p384", "ed25519"],
)
def test_both_begin(
    ends: tuple[Host, Charon], wire: tuple[Namespace, Namespace], kind: str, names: dict[str, str]
) -> None:
    """Each side sends its certificate with the intermediate one, by names and by subjects."""
    host, daemon = ends
    host.start({}, **configure(host, daemon, Site(kind), names))
    up = host.oepy("connection", "up", "site/net")
    assert up.returncode == 0, up.stdout + up.stderr + host.log() + daemon.tail()
    (sa,) = host.json("sas")
    assert sa["authenticated"] == "x509"
    assert None not in ping(host.namespace, THEIRS, count=2, timeout=5), host.log() + daemon.tail()
    daemon.swanctl("--terminate", "--ike", "site")
    daemon.swanctl("--initiate", "--child", "net", "--timeout", "20")
    (sa,) = host.json("sas")
    assert sa["authenticated"] == "x509"
    assert None not in ping(wire[1], OURS, count=2, timeout=5), host.log() + daemon.tail()


def test_a_stranger_is_refused_on_both_sides(ends: tuple[Host, Charon]) -> None:
    """A certificate of another CA with the right names: neither accepts the other."""
    host, daemon = ends
    site, foreign = Site("ecdsa"), Site("ecdsa")
    section = configure(host, daemon, site, NAMES)
    (host.directory / "own.key").write_bytes(HostKey(foreign.ours.key).to_pem())
    (host.directory / "own.pem").write_bytes(pem(foreign.ours, foreign.middle))
    (host.directory / "root.pem").write_bytes(pem(foreign.root))
    host.start({}, **section)
    up = host.oepy("connection", "up", "site/net")
    assert up.returncode != 0
    assert "AUTHENTICATION_FAILED" in up.stdout + up.stderr
    assert not host.json("sas")
    daemon.swanctl("--initiate", "--child", "net", "--timeout", "5", check=False)
    assert not host.json("sas")
    assert "CN=CA of the test: the signature is not by CN=Root of the test" in host.log()


def test_a_certificate_that_its_ca_revoked_opens_nothing(ends: tuple[Host, Charon]) -> None:
    """strongSwan's certificate is on the CA's list, which `authorities` names: nobody gets through, it says why.
    A list without it lets it through again, after `connection load`."""
    host, daemon = ends
    site = Site("ecdsa")
    section = configure(host, daemon, site, NAMES)
    section["connections"]["site"]["remote"]["revocation"] = "strict"
    (host.directory / "middle.pem").write_bytes(pem(site.middle))
    section["authorities"] = {
        "root": {"cacert": "root.pem", "crl_uris": [f"file://{host.directory}/root.crl"]},
        "middle": {"cacert": "middle.pem", "crl_uris": [f"file://{host.directory}/middle.crl"]},
    }
    (host.directory / "root.crl").write_bytes(revocation_list(site.root, moment=NOW))
    (host.directory / "middle.crl").write_bytes(revocation_list(site.middle, site.theirs, moment=NOW))
    host.start({}, **section)
    up = host.oepy("connection", "up", "site/net")
    assert up.returncode != 0
    assert "CN=gw was revoked" in up.stdout + up.stderr
    daemon.swanctl("--initiate", "--child", "net", "--timeout", "5", check=False)
    assert not host.json("sas")
    (host.directory / "middle.crl").write_bytes(revocation_list(site.middle, moment=NOW))
    assert host.oepy("connection", "load").returncode == 0
    up = host.oepy("connection", "up", "site/net")
    assert up.returncode == 0, up.stdout + up.stderr + host.log() + daemon.tail()
