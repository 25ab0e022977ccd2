"""Opportunistic encryption with libreswan at the other end, whole daemons over kernel ESP, keys in signed DNS.

alpha   oepy, publishes an RSA key              swan      libreswan, publishes an RSA key
gamma   oepy, publishes nothing                 nullswan  libreswan, publishes nothing: AUTH NULL (RFC 7619)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from oepy.control import protocol
from oepy.keys import HostKey
from oepy.lab.libreswan import Pluto
from oepy.lab.nameserver import ExtraHost
from oepy.lab.network import HOSTS, HostPlan, LabNetwork
from tests.kernel.swan_ground import Ground

pytestmark = [pytest.mark.kernel, pytest.mark.root, pytest.mark.interop, pytest.mark.timeout(900)]

ALPHA, BETA, GAMMA = HOSTS[0], HOSTS[1], HOSTS[2]
SWAN = HostPlan("swan", "198.18.0.60", "2001:2::60", False, "none")
NULLSWAN = HostPlan("nullswan", "198.18.0.70", "2001:2::70", False, "none")

COMMON = """
\tright=%opportunisticgroup
\tnegotiationshunt=hold
\tfailureshunt=drop
\tikev2=insist
\tkeyingtries=1
\tretransmit-timeout=10s
\tleftupdown=%disabled
\tauto=ondemand
"""
BOTH_PUBLISH = (
    "conn private\n\tleft={left}\n\tleftckaid={ckaid}\n\tauthby=rsasig\n\trightrsasigkey=%dnsondemand"
    + COMMON
)
# For initiators without a record of their own
WE_PUBLISH = (
    "conn clear-or-private\n\tleft={left}\n\tleftckaid={ckaid}\n\tleftauth=rsasig\n"
    "\trightauth=null\n\trightid=%null"
    + COMMON.replace("auto=ondemand", "auto=add").replace("=drop", "=passthrough")
)
NOBODY_PUBLISHES = "conn private\n\tleft={left}\n\tleftid=%null\n\trightid=%null\n\tauthby=null" + COMMON


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    directory = tmp_path_factory.mktemp("libreswan")
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(0o755)
    lab = directory / "lab"
    plutos = {
        plan.name: Pluto(directory / plan.name, lab / plan.name / "resolv.conf", lab / "ns/anchor.key")
        for plan in (SWAN, NULLSWAN)
    }
    record = ExtraHost(
        "swan.oe.example",
        ip_address(SWAN.v4),
        ip_address(SWAN.v6),
        plutos["swan"].make_key(),  # type: ignore[arg-type]
    )
    with LabNetwork(
        lab,
        hosts=(ALPHA, BETA, GAMMA, SWAN, NULLSWAN),
        extra_dns=[record],
        host_keys={name: HostKey.generate("rsa-3072") for name in ("alpha", "beta")},
        gateway="none",  # libreswan takes no other
    ) as network:
        network.build()
        network.start_daemons()
        try:
            _start(network, plutos)
            with network.capture(directory / "wire.pcap") as capture:
                yield Ground(network, plutos, capture)
        finally:
            for pluto in plutos.values():
                pluto.stop()


def _start(network: LabNetwork, plutos: dict[str, Pluto]) -> None:
    swan = plutos["swan"]
    settings = {"left": SWAN.v4, "ckaid": swan.ckaid}
    swan.start(
        network.hosts["swan"].namespace,
        f"{BOTH_PUBLISH}\n{WE_PUBLISH}".format(**settings),
        {"private": [f"{ALPHA.v4}/32", f"{BETA.v4}/32"], "clear-or-private": [f"{GAMMA.v4}/32"]},
    )
    plutos["nullswan"].start(
        network.hosts["nullswan"].namespace,
        NOBODY_PUBLISHES.format(left=NULLSWAN.v4),
        {"private": [f"{GAMMA.v4}/32"]},
    )


def test_oepy_starts_with_keys_of_both_in_dns(ground: Ground) -> None:
    """The first ping of all is answered, through ESP; libreswan has proved the key that its record names."""
    since = time.time()
    assert ground.until_answered(ALPHA, SWAN) == 0
    assert ground.only_esp(since, ALPHA, SWAN)
    assert ground.authenticated("alpha", SWAN) == {"dns"}


def test_libreswan_starts_with_keys_of_both_in_dns(ground: Ground) -> None:
    """libreswan's own first pings are lost to it, then both ping through ESP; nothing is in the clear."""
    since = time.time()
    ground.until_answered(SWAN, BETA, timeout=0.5)
    assert ground.until_answered(BETA, SWAN) == 0
    assert ground.only_esp(since, BETA, SWAN)
    assert ground.authenticated("beta", SWAN) == {"dns"}


def test_after_our_delete_both_come_together_again(ground: Ground) -> None:
    """Our Delete ends the tunnel on both sides; the next ping of ours makes a new one and is answered.

    (libreswan, when a Delete arrives, loses its own trap and would speak in the clear: that is why oepy starts.)
    """
    time.sleep(1.5)  # the kernel's own trap does not ask again within a second
    ground.host("alpha").client.post(protocol.TERMINATE, {"destination": SWAN.v4})
    since = time.time()
    assert ground.until_answered(ALPHA, SWAN) == 0
    assert ground.only_esp(since, ALPHA, SWAN)


def test_oepy_starts_without_a_record_of_its_own(ground: Ground) -> None:
    """gamma is anonymous (AUTH NULL) and has libreswan prove its key; the first ping is answered through ESP."""
    since = time.time()
    assert ground.until_answered(GAMMA, SWAN) == 0
    assert ground.only_esp(since, GAMMA, SWAN)
    assert ground.authenticated("gamma", SWAN) == {"dns"}


def test_libreswan_starts_and_both_are_anonymous(ground: Ground) -> None:
    """AUTH NULL on both sides: libreswan starts, oepy answers and says of the tunnel that nobody is proved."""
    since = time.time()
    ground.until_answered(NULLSWAN, GAMMA, timeout=0.5)
    assert ground.until_answered(GAMMA, NULLSWAN) == 0
    assert ground.only_esp(since, GAMMA, NULLSWAN)
    assert ground.authenticated("gamma", NULLSWAN) == {"null"}
