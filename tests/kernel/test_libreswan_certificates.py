"""Opportunistic encryption by certificates with libreswan, whole daemons over kernel ESP; nobody publishes a key.

client  oepy, asks for certificates            certswan  libreswan, has a certificate, takes anybody
server  oepy, has a certificate                nullswan  libreswan, has nothing (RFC 7619), asks for certificates
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from oepy.keys import HostKey
from oepy.lab.libreswan import Pluto
from oepy.lab.network import HostPlan, LabNetwork
from tests.fakes.certificates import DNS, IP, Holder, pem
from tests.interop.nss import take_own, take_root
from tests.kernel.swan_ground import Ground

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.interop, pytest.mark.timeout(900)]

CLIENT = HostPlan("alpha", "198.18.0.10", "2001:2::10", True, "none")
SERVER = HostPlan("beta", "198.18.0.20", "2001:2::20", True, "none")
CERTSWAN = HostPlan("swan", "198.18.0.60", "2001:2::60", False, "none")
NULLSWAN = HostPlan("nullswan", "198.18.0.70", "2001:2::70", False, "none")

COMMON = (
    "\tright=%opportunisticgroup\n\tikev2=insist\n\tkeyingtries=1\n\tretransmit-timeout=10s\n"
    "\tleftupdown=%disabled\n"
)
HAS_CERTIFICATE = (
    "conn clear-or-private\n\tleft={left}\n\tleftcert=own\n\tleftid=%fromcert\n\tleftauth=rsasig\n"
    "\tleftsendcert=always\n\trightauth=null\n\trightid=%null\n\tnegotiationshunt=hold\n"
    f"\tfailureshunt=passthrough\n{COMMON}\tauto=add\n"
)
ASKS = (
    "conn private\n\tleft={left}\n\tleftid=%null\n\tleftauth=null\n\trightauth=rsasig\n\trightid=%fromcert\n"
    f"\trightca=%any\n\trightrsasigkey=%cert\n\tsendca=all\n\tnegotiationshunt=hold\n\tfailureshunt=drop\n{COMMON}"
    "\tauto=ondemand\n"
)


def holder(plan: HostPlan, root: Holder) -> Holder:
    names = [DNS(f"{plan.name}.oe.example"), IP(ip_address(plan.v4))]
    key = rsa.generate_private_key(65537, 3072)
    return Holder(plan.name, root, ca=False, alternatives=names, key=key, moment=_now())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("certswan")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    lab = directory / "lab"
    root = Holder("Root of the test", key=rsa.generate_private_key(65537, 3072), moment=_now())
    (directory / "root.pem").write_bytes(pem(root))
    server = holder(SERVER, root)
    plutos = {}
    for plan in (CERTSWAN, NULLSWAN):
        pluto = Pluto(directory / plan.name, lab / plan.name / "resolv.conf", lab / "ns/anchor.key")
        take_root(pluto.directory, pluto.nss, "root", root)
        plutos[plan.name] = pluto
    swan = plutos["swan"]
    take_own(swan.directory, swan.nss, "own", holder(CERTSWAN, root))
    hosts, keys = (CLIENT, SERVER, CERTSWAN, NULLSWAN), {"beta": HostKey(server.key)}
    with LabNetwork(lab, hosts=hosts, host_keys=keys) as network:
        network.build()
        certificate = network.hosts["beta"].directory / "own.pem"
        certificate.write_bytes(pem(server))
        network.hosts["beta"].certs = (str(certificate),)
        network.hosts["alpha"].policy = {
            "groups": {"private": [CERTSWAN.v4]},
            "certificates": {"cacerts": [str(directory / "root.pem")], "peers": ["198.18.0.0/24"]},
        }
        network.start_daemons()
        try:
            _start(network, plutos)
            with network.capture(directory / "wire.pcap") as capture:
                yield Ground(network, plutos, capture)
        finally:
            for pluto in plutos.values():
                pluto.stop()


def _start(network: LabNetwork, plutos: dict[str, Pluto]) -> None:
    everybody = {"clear-or-private": ["198.18.0.0/24"]}
    plutos["swan"].start(network.hosts["swan"].namespace, HAS_CERTIFICATE.format(left=CERTSWAN.v4), everybody)
    plutos["nullswan"].start(
        network.hosts["nullswan"].namespace, ASKS.format(left=NULLSWAN.v4), {"private": [f"{SERVER.v4}/32"]}
    )


def test_oepy_takes_the_certificate_of_libreswan(ground: Ground) -> None:
    """The group is `private`: the first ping is answered, and nothing is in the clear."""
    since = time.time()
    assert ground.until_answered(CLIENT, CERTSWAN) == 0
    assert ground.only_esp(since, CLIENT, CERTSWAN)
    assert ground.authenticated("alpha", CERTSWAN) == {"x509"}


def test_libreswan_takes_the_certificate_of_oepy(ground: Ground) -> None:
    """libreswan is nobody itself; it loses its first packet."""
    since = time.time()
    ground.until_answered(NULLSWAN, SERVER)
    assert ground.only_esp(since, NULLSWAN, SERVER)
    assert ground.authenticated("beta", NULLSWAN) == {"null"}
