"""What the interoperation matrix tries: one list of setups, what is done with them, and which peer can't what."""

from __future__ import annotations

from dataclasses import dataclass

USERLAND, KERNEL = (
    "userland",
    "kernel",
)  # whose ESP; the first is `make test`'s, the second `make test-kernel`'s
INITIATOR, RESPONDER = "initiator", "responder"  # oepy's part
STRONGSWAN, LIBRESWAN, OPENIKED = "strongSwan", "libreswan", "OpenIKED"
ROLES = (INITIATOR, RESPONDER)


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration of both ends. `natted`: in front of whom an address translator is."""

    name: str
    title: str
    auth: str = "psk"  # psk, the kind of the raw keys, or x509- and the kind of the certificates' keys
    mode: str = "tunnel"
    outer: int = 4
    inner: str = "subnets"  # or the two hosts themselves
    inner_version: int = 4
    natted: frozenset[str] = frozenset()
    subnets: int = 1  # of either end
    assigns: bool = False  # who begins is given an inner address by the other
    moves: bool = False  # who begins may go to another outer address
    begins: str = ""  # who does, as soon as that is known
    is_fragmented: bool = False  # IKE_AUTH is larger than a fragment, either way
    peer_rekeys: str = ""  # child or ike: by itself after seconds, where the peer has no command for it
    asking: frozenset[str] = frozenset()  # who asks after seconds of silence whether the other is there

    @property
    def is_x509(self) -> bool:
        return self.auth.startswith("x509")

    @property
    def is_raw(self) -> bool:
        return self.auth != "psk" and not self.is_x509


OEPY, PEER = "oepy", "peer"

PLAIN = Setup("psk", "pre-shared key")
COMING_UP = (
    PLAIN,
    Setup("raw-ed25519", "raw keys, Ed25519", auth="ed25519"),
    Setup("raw-ecdsa-p256", "raw keys, ECDSA P-256", auth="ecdsa-p256"),
    Setup("raw-ecdsa-p384", "raw keys, ECDSA P-384", auth="ecdsa-p384"),
    Setup("raw-rsa", "raw keys, RSA 3072", auth="rsa-3072"),
    Setup("x509-rsa", "X.509, RSA 2048, intermediate CA", auth="x509-rsa"),
    Setup("x509-ecdsa", "X.509, ECDSA P-256, intermediate CA", auth="x509-ecdsa"),
    Setup("inner-v6", "IPv6 subnets through an IPv4 tunnel", inner_version=6),
    Setup("outer-v6", "IPv4 subnets through an IPv6 tunnel", outer=6),
    Setup("hosts", "two hosts, tunnel mode", inner="hosts"),
    Setup("hosts-v6", "two hosts, tunnel mode, IPv6", inner="hosts", outer=6, inner_version=6),
    Setup("transport", "transport mode", mode="transport", inner="hosts"),
    Setup("transport-v6", "transport mode, IPv6", mode="transport", inner="hosts", outer=6, inner_version=6),
    Setup("nat-oepy", "NAT in front of oepy", natted=frozenset({OEPY})),
    Setup("nat-peer", "NAT in front of the peer", natted=frozenset({PEER})),
    Setup("nat-both", "NAT in front of both", natted=frozenset({OEPY, PEER})),
    Setup(
        *("transport-nat-oepy", "transport mode, NAT in front of oepy"),
        mode="transport",
        inner="hosts",
        natted=frozenset({OEPY}),
    ),
    Setup(
        *("transport-nat-peer", "transport mode, NAT in front of the peer"),
        mode="transport",
        inner="hosts",
        natted=frozenset({PEER}),
    ),
    Setup("selectors", "12 subnets at either end, IPv6", subnets=12, outer=6, inner_version=6),
    Setup("fragmentation", "IKE fragmentation (RFC 7383), both ways", auth="x509-rsa", is_fragmented=True),
)
ASSIGNED = Setup("assigned", "configuration payload: who begins is given an address", assigns=True)
MOVING = (
    Setup("mobike", "MOBIKE: who begins moves to another address, the IKE SA stays", moves=True),
    Setup(
        "mobike-assigned", "MOBIKE: the same, with an address that the other gave", assigns=True, moves=True
    ),
)
REKEYED = (
    Setup("rekey", "rekeying", auth="ecdsa-p256"),
    Setup("rekey-nat", "rekeying through NAT in front of oepy", natted=frozenset({OEPY})),
)
REKEYS = {
    "child-oepy": "CHILD SA, by oepy",
    "child-peer": "CHILD SA, by the peer",
    "ike-oepy": "IKE SA, by oepy",
    "ike-peer": "IKE SA, by the peer",
}


def loses(peer: str, kind: str) -> str | None:
    """Why traffic may lose packets in such a rekey, whatever we do; None where it must not lose any."""
    if peer in (LIBRESWAN, OPENIKED) and kind == "child-oepy":
        return "it sends by the new SA as soon as it has answered: what overtakes its answer is lost"
    if peer == OPENIKED and kind == "child-peer":
        return (
            "it sends the Delete of the old SA before it installs the new one, and removes the old one without "
            "waiting for the answer (RFC 7296 §2.8): what arrives meanwhile finds no SA there"
        )
    return None


def notices_late(peer: str) -> str | None:
    """Why nobody waits until it notices a dead oepy; None where that is soon."""
    if peer == OPENIKED:
        return (
            "on Linux it does not see whether its SAs are used, and asks after five minutes without IKE; it "
            "was seen to notice after seven. Until then a new tunnel takes the old one's place with "
            "`set enforcesingleikesa`, or after `ikectl reset`"
        )
    return None


ASKING = (
    Setup("dpd-oepy-asks", "dead peer detection: oepy asks, the peer answers", asking=frozenset({OEPY})),
    Setup("dpd-peer-asks", "dead peer detection: the peer asks, oepy answers", asking=frozenset({PEER})),
)
DYING = Setup("dpd", "dead peer detection", asking=frozenset({OEPY, PEER}))
DEATHS = {
    "oepy-notices": "oepy notices a dead peer",
    "peer-notices": "the peer notices a dead oepy",
    "again": "and they come together again",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table, with a cell for each part that oepy plays."""

    key: str
    title: str
    setup: Setup
    rekey: str = ""  # its kind; no packet may be lost meanwhile, unless `loses` says why


LINES = (
    *(Line(setup.name, setup.title, setup) for setup in (*COMING_UP, ASSIGNED)),
    *(
        Line(f"{setup.name}-{kind}", f"{setup.title}: {title}, under traffic", setup, kind)
        for setup in REKEYED
        for kind, title in REKEYS.items()
    ),
    *(Line(setup.name, setup.title, setup) for setup in (*MOVING, *ASKING)),
    *(Line(f"{DYING.name}-{kind}", f"{DYING.title}: {title}", DYING) for kind, title in DEATHS.items()),
)

WHERE = {STRONGSWAN: (USERLAND, KERNEL), LIBRESWAN: (KERNEL,), OPENIKED: (KERNEL,)}


def obstacle(peer: str, where: str, setup: Setup, role: str) -> str | None:
    """Why this peer can't take part in it; None where it can."""
    if peer == OPENIKED and setup.asking == {PEER}:
        return "in silence it asks after five minutes only"
    if peer == LIBRESWAN and setup.mode == "transport" and setup.natted:
        return "4.10 does not put the addresses that it sees into selectors (RFC 7296 §2.23.1)"
    if peer == LIBRESWAN and setup.moves and not setup.assigns:
        return "4.10 has MOBIKE only where who begins is given an address (ipsec.conf(5))"
    if peer == OPENIKED and setup.moves and role == RESPONDER:
        return "it has MOBIKE as responder only (iked.conf(5))"
    if peer == STRONGSWAN and where == USERLAND and setup.mode == "transport":
        return "its userland ESP has tunnel mode only"
    if peer == OPENIKED and setup.inner_version != setup.outer:
        return "on Linux its SAs take packets of the outer family only"
    if peer in (LIBRESWAN, OPENIKED) and setup.auth == "ed25519":
        return "it has no EdDSA"
    if peer == LIBRESWAN and setup.auth == "ecdsa-p384":
        return "4.10 ends by itself when it is given a raw key of P-384"
    if peer == LIBRESWAN and setup.subnets > 1:
        return "a connection of its has one pair of subnets"
    return None
