"""IKEv2 with strongSwan's charon: both directions, PSK and raw public keys, rekeys, deletes, liveness."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from oepy.ike.authentication import PrivateKey
from oepy.ike.events import ChildDown, ChildUp, DownReason, IkeEstablished, IkeRekeyed, SessionFailed
from oepy.ike.settings import IkeSettings, Initiate
from oepy.keys import to_public_key
from oepy.model import Authenticated, Endpoint, PeerIdentity, Secret, TrafficSelector
from tests.interop.charon import OURS, OURS6, THEIRS, THEIRS6, Charon, Lab, charon, lab
from tests.interop.ike_driver import Driver, driver
from tests.sim.ike_net import ED25519_A, ED25519_B, P256, P384, Host, rsa_key

pytestmark = [pytest.mark.root, pytest.mark.interop]

SETTINGS = IkeSettings(identity=PeerIdentity.parse("alpha.example"), liveness_interval=0.0)
_SEEDS = itertools.count(1)

CONF = """
connections {{
  oepy {{
    version = 2
    local_addrs = {theirs}
    remote_addrs = {ours}
    encap = yes
    fragmentation = yes
    {extra}
    local {{ auth = {auth}
      id = beta.example
      {local_key} }}
    remote {{ auth = {auth}
      id = alpha.example
      {remote_key} }}
    children {{
      net {{
        local_ts = {theirs}
        remote_ts = {ours}
        mode = tunnel
        {child}
      }}
    }}
  }}
}}
secrets {{
  ike-oepy {{ id-a = alpha.example
    id-b = beta.example
    secret = "much ado about nothing" }}
}}
"""
SECRET = Secret(b"much ado about nothing")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Charon]]:
    directory = tmp_path_factory.mktemp("charon")
    with lab() as names, charon(names.theirs, directory / "d") as daemon:
        yield names, daemon


@pytest.fixture
def clean(ground: tuple[Lab, Charon]) -> Iterator[tuple[Lab, Charon]]:
    yield ground
    ground[1].swanctl("--terminate", "--ike", "oepy", "--force", "--timeout", "1", check=False)


def _pem(key: PrivateKey) -> tuple[bytes, bytes]:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return private, public


def configure(
    daemon: Charon,
    ours: PrivateKey | None = None,
    theirs: PrivateKey | None = None,
    extra: str = "",
    child: str = "",
    addresses: tuple[str, str] = (OURS, THEIRS),
) -> None:
    fields = {"auth": "psk", "local_key": "", "remote_key": "", "extra": extra, "child": child}
    files: dict[str, bytes] = {}
    if ours is not None and theirs is not None:
        fields |= {"auth": "pubkey", "local_key": "pubkeys = own.pem", "remote_key": "pubkeys = peer.pem"}
        files["private/own.pem"], files["pubkey/own.pem"] = _pem(theirs)
        files["pubkey/peer.pem"] = _pem(ours)[1]
    daemon.load(CONF.format(ours=addresses[0], theirs=addresses[1], **fields), files)


def host_with(key: PrivateKey | None, their_key: PrivateKey | None, settings: IkeSettings = SETTINGS) -> Host:
    host = Host("alpha", OURS, key, settings, next(_SEEDS))
    host.psks["beta.example"] = SECRET
    if their_key is not None:
        host.keys["beta.example"] = [to_public_key(their_key.public_key())]
    return host


def start(side: Driver, their_key: PrivateKey | None, **changes: object) -> int:
    ours, theirs = changes.pop("addresses", (OURS, THEIRS))  # type: ignore[misc]
    fields: dict[str, object] = {
        "local": Endpoint(ip_address(ours), 500),
        "remote": Endpoint(ip_address(theirs), 500),
        "local_ts": (TrafficSelector.of(ip_address(ours)),),
        "remote_ts": (TrafficSelector.of(ip_address(theirs)),),
    }
    if their_key is None:
        fields |= {"psk": SECRET, "own_auth": "psk"}
    else:
        fields["remote_keys"] = (to_public_key(their_key.public_key()),)
    return side.host.ike.initiate(Initiate(**(fields | changes)), time.monotonic())  # type: ignore[arg-type]


def now() -> float:
    return time.monotonic()


def assert_up(side: Driver, daemon: Charon, who: Authenticated) -> None:
    host = side.host
    assert side.pump(lambda: host.pairs or host.of(SessionFailed)), daemon.tail()
    assert not host.of(SessionFailed), (host.of(SessionFailed), daemon.tail())
    [established] = host.of(IkeEstablished)
    assert isinstance(established, IkeEstablished)
    assert established.authenticated is who
    assert str(established.identity) == "beta.example"
    [pair] = host.pairs.values()
    side.pump(lambda: False, 0.2)
    listed = daemon.sas()
    assert "ESTABLISHED" in listed
    assert "INSTALLED, TUNNEL" in listed, listed + daemon.tail()
    assert f"{pair.spi_in:08x}" in listed
    assert f"{pair.spi_out:08x}" in listed


KEYS = {
    "ed25519": (ED25519_A, ED25519_B),
    "rsa": (rsa_key(), rsa_key()),
    "p256": (P256, P256),
    "p384": (P384, P384),
    "psk": (None, None),
}


@pytest.mark.parametrize("kind", KEYS)
def test_we_initiate(clean: tuple[Lab, Charon], kind: str) -> None:
    """charon accepts our proof, we accept its, and both list the same SPIs."""
    names, daemon = clean
    ours, theirs = KEYS[kind]
    configure(daemon, ours, theirs)
    with driver(host_with(ours, theirs), names.ours, [OURS]) as side:
        start(side, theirs)
        assert_up(side, daemon, Authenticated.PSK if theirs is None else Authenticated.DNS)


@pytest.mark.parametrize("kind", KEYS)
def test_charon_initiates(clean: tuple[Lab, Charon], kind: str) -> None:
    """The same with charon as the initiator."""
    names, daemon = clean
    ours, theirs = KEYS[kind]
    configure(daemon, ours, theirs)
    with driver(host_with(ours, theirs), names.ours, [OURS]) as side:
        command = daemon.begin("--initiate", "--child", "net", "--timeout", "10")
        assert_up(side, daemon, Authenticated.PSK if theirs is None else Authenticated.DNS)
        assert side.pump(lambda: command.poll() is not None)
        assert command.returncode == 0


def test_over_ipv6(clean: tuple[Lab, Charon]) -> None:
    """The outer addresses may be IPv6."""
    names, daemon = clean
    configure(daemon, ED25519_A, ED25519_B, addresses=(OURS6, THEIRS6))
    with driver(host_with(ED25519_A, ED25519_B), names.ours, [OURS6]) as side:
        start(side, ED25519_B, addresses=(OURS6, THEIRS6))
        assert_up(side, daemon, Authenticated.DNS)


@pytest.mark.parametrize(
    "proposal", ["aes128gcm16-prfsha256-ecp256", "chacha20poly1305-prfsha512-x25519", "aes256-sha384-ecp384"]
)
def test_suites(clean: tuple[Lab, Charon], proposal: str) -> None:
    """charon insists on one IKE suite; ours has it, and asks again in another group where it must."""
    names, daemon = clean
    configure(daemon, None, None, extra=f"proposals = {proposal}")
    with driver(host_with(None, None), names.ours, [OURS]) as side:
        start(side, None)
        assert_up(side, daemon, Authenticated.PSK)


def test_an_impostor_is_noticed(clean: tuple[Lab, Charon]) -> None:
    """charon proves another key than the published one."""
    names, daemon = clean
    configure(daemon, ED25519_A, ED25519_B)
    with driver(host_with(ED25519_A, ED25519_A), names.ours, [OURS]) as side:
        start(side, ED25519_A)
        assert side.pump(lambda: side.host.of(SessionFailed))
        [failed] = side.host.of(SessionFailed)
        assert isinstance(failed, SessionFailed)
        assert failed.kind.value == "proof-failed"
        assert side.pump(lambda: "ESTABLISHED" not in daemon.sas(), 3), daemon.sas()


@pytest.mark.parametrize("kind", ["ed25519", "psk"])
def test_charon_refuses_a_wrong_proof(clean: tuple[Lab, Charon], kind: str) -> None:
    """Our key or secret is another than charon knows: REJECTED with AUTHENTICATION_FAILED, nothing stays."""
    names, daemon = clean
    ours, theirs = KEYS[kind]
    configure(daemon, ED25519_B if ours else None, theirs)
    with driver(host_with(ours, theirs), names.ours, [OURS]) as side:
        start(side, theirs, **({} if theirs else {"psk": Secret(b"wrong")}))
        assert side.pump(lambda: side.host.of(SessionFailed)), daemon.tail()
        [failed] = side.host.of(SessionFailed)
        assert isinstance(failed, SessionFailed)
        assert (failed.kind.value, failed.notify) == ("rejected", "AUTHENTICATION_FAILED")
        assert not side.host.ike.sessions()
        assert "ESTABLISHED" not in daemon.sas()


def test_rekeys_and_delete_by_us(clean: tuple[Lab, Charon]) -> None:
    """We rekey the child and the IKE SA, ask for liveness, and delete; charon agrees each time."""
    names, daemon = clean
    configure(daemon, ED25519_A, ED25519_B)
    with driver(host_with(ED25519_A, ED25519_B), names.ours, [OURS]) as side:
        session = start(side, ED25519_B)
        assert_up(side, daemon, Authenticated.DNS)
        host, [old] = side.host, list(side.host.pairs)
        host.ike.rekey_child(old, now())
        assert side.pump(lambda: len(host.of(ChildUp)) == 2 and old not in host.pairs), daemon.tail()
        host.ike.rekey_ike(session, now())
        assert side.pump(lambda: host.of(IkeRekeyed)), daemon.tail()
        host.ike.check_liveness(session, now())
        host.ike.rekey_child(next(iter(host.pairs)), now())
        assert side.pump(lambda: len(host.of(ChildUp)) == 3 and len(host.pairs) == 1), daemon.tail()
        listed = daemon.sas()
        assert f"{next(iter(host.pairs)):08x}" in listed, listed + daemon.tail()
        assert listed.count("INSTALLED") == 1
        host.ike.terminate(session, now())
        assert side.pump(lambda: not host.ike.sessions()), daemon.tail()
        assert "ESTABLISHED" not in daemon.sas()


def test_rekeys_and_delete_by_charon(clean: tuple[Lab, Charon]) -> None:
    """charon rekeys both kinds with PFS and deletes; we follow without a gap."""
    names, daemon = clean
    configure(daemon, ED25519_A, ED25519_B, child="esp_proposals = aes256gcm16-x25519")
    with driver(host_with(ED25519_A, ED25519_B), names.ours, [OURS]) as side:
        start(side, ED25519_B)
        assert_up(side, daemon, Authenticated.DNS)
        host, [old] = side.host, list(side.host.pairs)
        rekey = daemon.begin("--rekey", "--child", "net")
        assert side.pump(lambda: len(host.of(ChildUp)) == 2 and old not in host.pairs), daemon.tail()
        assert side.pump(lambda: rekey.poll() is not None)
        assert host.sendable == set(host.pairs)
        rekey = daemon.begin("--rekey", "--ike", "oepy")
        assert side.pump(lambda: host.of(IkeRekeyed)), daemon.tail()
        assert side.pump(lambda: rekey.poll() is not None)
        assert host.gaps == []
        gone = daemon.begin("--terminate", "--ike", "oepy")
        assert side.pump(lambda: not host.ike.sessions()), daemon.tail()
        assert side.pump(lambda: gone.poll() is not None)
        down = host.of(ChildDown)[-1]
        assert isinstance(down, ChildDown)
        assert down.reason is DownReason.PEER_DELETE


def test_liveness_by_charon(clean: tuple[Lab, Charon]) -> None:
    """charon's DPD is answered; when we fall silent it gives up."""
    names, daemon = clean
    configure(daemon, None, None, extra="dpd_delay = 1s")
    with driver(host_with(None, None), names.ours, [OURS]) as side:
        start(side, None)
        assert_up(side, daemon, Authenticated.PSK)
        before = side.host.ike.counters["received"]
        side.pump(lambda: False, 3.5)
        assert side.host.ike.counters["received"] >= before + 2
        assert "ESTABLISHED" in daemon.sas()


def test_small_fragments_both_ways(clean: tuple[Lab, Charon]) -> None:
    """RFC 7383 with RSA signatures: our fragments are read, and so are charon's."""
    names, daemon = clean
    configure(daemon, rsa_key(), rsa_key(), extra="fragmentation = force")
    settings = replace(SETTINGS, fragment_size=300)
    with driver(host_with(rsa_key(), rsa_key(), settings), names.ours, [OURS]) as side:
        start(side, rsa_key())
        assert_up(side, daemon, Authenticated.DNS)


def test_a_second_handshake_after_the_first(clean: tuple[Lab, Charon], tmp_path: Path) -> None:
    """A restarted oepy replaces its old IKE SA in charon by INITIAL_CONTACT."""
    names, daemon = clean
    configure(daemon, ED25519_A, ED25519_B)
    for _ in range(2):
        with driver(host_with(ED25519_A, ED25519_B), names.ours, [OURS]) as side:
            start(side, ED25519_B)
            assert_up(side, daemon, Authenticated.DNS)
            assert daemon.sas().count("INSTALLED") == 1
