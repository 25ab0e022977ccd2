"""PPKs (RFC 8784), IKE SAs without a child (RFC 6023), and what peers may say that we don't know."""

from __future__ import annotations

import hmac
from dataclasses import replace

import pytest

from oepy.ike.algorithms import parse_esp_proposal
from oepy.ike.events import (
    ChildUp,
    FailureKind,
    IkeEstablished,
    Known,
    NeedPeerKey,
    NeedPpk,
    NeedPsk,
    Question,
    SessionDown,
    SessionFailed,
)
from oepy.ike.flow import OwnSteps, Send
from oepy.ike.header import Exchange, PayloadType
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import notify
from oepy.ike.settings import ChildRequest, IkeSettings, Lifetimes, Ppk
from oepy.model import Authenticated, PeerIdentity, Secret
from tests.sim.ike_net import Host, Net, assert_one_tunnel, request, two_hosts

QUIET = IkeSettings(liveness_interval=0.0)
SECRET = Secret(b"as long as the universe is old")


def pair(ours: str = "never", **settings: object) -> tuple[Host, Host, Net]:
    a, b = two_hosts(QUIET)
    b.settings = replace(QUIET, ppk=ours, **settings)  # type: ignore[arg-type]
    b.__post_init__()
    return a, b, Net([a, b])


def tell(host: Host, net: Net, data: bytes) -> None:
    """AUTH_LIFETIME in an INFORMATIONAL request of the host's."""
    [info] = host.ike.sessions()
    session = host.ike._context.by_number[info.session]

    def steps(_: object) -> OwnSteps:
        yield Send(Exchange.INFORMATIONAL, [notify(NotifyType.AUTH_LIFETIME, data)])

    session.start("tell", steps)
    net.flush(host)
    net.run(1)


def renewals(host: Host) -> int:
    return host.ike.counters["established"] - 1


@pytest.mark.parametrize("connection", ["office/net", ""])
def test_a_responders_auth_lifetime_is_heeded(connection: str) -> None:
    """RFC 4478: the initiator without a rule of its own begins anew before the time is over, whatever is rekeyed
    meanwhile, and never without a tunnel; an opportunistic one does not, and is ended by the responder."""
    a, b = two_hosts(QUIET)
    b.settings = replace(QUIET, lifetimes=Lifetimes(ike_reauth=100.0, ike_grace=20.0))
    b.__post_init__()
    net = Net([a, b])
    number = a.ike.initiate(request(a, b, connection=connection), net.now)
    net.run(3)
    a.ike.rekey_ike(number, net.now)
    net.run(80)
    assert renewals(a) == 0
    net.run(12)
    assert renewals(a) == (1 if connection else 0)
    net.run(20 if connection else 30)
    assert bool(a.pairs) is bool(connection)
    if connection:
        assert_one_tunnel(a, b)
        net.run(300)
        assert_one_tunnel(a, b)
        assert 3 <= renewals(a) <= 5
        assert a.gaps == b.gaps == []


@pytest.mark.parametrize(
    ("teller", "data", "renewed"),
    [
        ("responder", (60).to_bytes(4, "big"), 1),
        ("responder", bytes(4), 1),
        ("responder", b"", 0),
        ("responder", bytes(8), 0),
        ("responder", b"\xff" * 4, 0),
        ("initiator", (60).to_bytes(4, "big"), 0),
    ],
)
def test_auth_lifetime_at_any_time(teller: str, data: bytes, renewed: int) -> None:
    """In INFORMATIONAL, from the responder alone; 0 is soon; one of a wrong length says nothing."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    a.ike.initiate(request(a, b, connection="office/net"), net.now)
    net.run(3)
    tell(b if teller == "responder" else a, net, data)
    net.run(60)
    assert renewals(a) == renewed
    assert renewals(b) == renewed
    assert_one_tunnel(a, b)


def test_auth_lifetime_does_not_lengthen_our_own_time() -> None:
    """The shorter of both counts, and a peer that gives no time at all does not keep us busy."""
    a, b = two_hosts(replace(QUIET, lifetimes=Lifetimes(ike_reauth=50.0)))
    b.settings = replace(QUIET, lifetimes=Lifetimes(ike_reauth=5000.0))
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b, connection="office/net"), net.now)
    net.run(60)
    assert renewals(a) == 1
    a, b = two_hosts(QUIET)
    b.settings = replace(QUIET, lifetimes=Lifetimes(ike_reauth=0.1, ike_grace=1000.0))
    b.__post_init__()
    net = Net([a, b])
    a.ike.initiate(request(a, b, connection="office/net"), net.now)
    net.run(60)
    assert 4 <= renewals(a) <= 7


def knows(host: Host, *names: bytes) -> None:
    before = host.reply

    def reply(question: Question) -> object:
        if isinstance(question, NeedPpk):
            return SECRET if question.name in names else None
        return before(question)

    host.reply = reply  # type: ignore[method-assign]


@pytest.mark.parametrize("auth", ["pubkey", "psk", "null"])
@pytest.mark.parametrize("responder", ["accept", "require"])
@pytest.mark.parametrize("required", [True, False])
def test_a_ppk_goes_into_the_keys(auth: str, responder: str, required: bool) -> None:
    """Both have it: SK_d is prf+ of it on both sides, whatever proves the peers, and whoever insists."""
    a, b, net = pair(responder)
    knows(b, b"moon")
    b.psks[a.address] = Secret(b"psk")
    changes: dict[str, object] = {"own_auth": auth}
    if auth == "psk":
        changes |= {"psk": Secret(b"psk"), "remote_keys": ()}
    a.ike.initiate(request(a, b, ppk=Ppk(b"moon", SECRET, required), **changes), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    assert a.ike.counters["ppk_used"] == b.ike.counters["ppk_used"] == 1


def test_the_keys_with_a_ppk_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8784 §3: SK_d = prf+ (PPK, SK_d'), computed by plain HMAC."""
    from oepy.ike import ppk

    before: list[bytes] = []
    mixed = ppk.mixed

    def spy(session: object, keys: ppk.Keys, secret: Secret) -> ppk.Keys:
        before.append(keys.d.reveal())
        return mixed(session, keys, secret)  # type: ignore[arg-type]

    monkeypatch.setattr(ppk, "mixed", spy)
    a, b, net = pair("accept")
    knows(b, b"moon")
    number = a.ike.initiate(request(a, b, ppk=Ppk(b"moon", SECRET)), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    session = a.ike._context.by_number[number]
    assert session.sk_d is not None
    assert session.suite is not None
    assert session.suite.prf == "prfsha256"
    assert before[0] == before[1]
    assert session.sk_d.reveal() == hmac.new(SECRET.reveal(), before[0] + b"\1", "sha256").digest()


@pytest.mark.parametrize("responder", ["never", "accept"])
def test_a_ppk_that_is_a_wish_is_left_out(responder: str) -> None:
    """The responder knows nothing of it, or not this one: NO_PPK_AUTH proves the initiator all the same."""
    a, b, net = pair(responder)
    a.ike.initiate(request(a, b, ppk=Ppk(b"moon", SECRET, required=False)), net.now)
    net.run(3)
    assert_one_tunnel(a, b)
    assert "ppk_used" not in b.ike.counters


@pytest.mark.parametrize("responder", ["never", "accept"])
def test_a_ppk_that_is_required_is_not_left_out(responder: str) -> None:
    """Nor by the one nor by the other side; and a different secret of the same name is no proof."""
    a, b, net = pair(responder)
    a.ike.initiate(request(a, b, ppk=Ppk(b"moon", SECRET)), net.now)
    net.run(20)
    assert a.of(SessionFailed)
    assert not a.pairs
    assert not b.pairs
    a, b, net = pair("require")
    a.ike.initiate(request(a, b), net.now)
    net.run(20)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.notify == "AUTHENTICATION_FAILED"
    a, b, net = pair("accept")
    knows(b, b"moon")
    a.ike.initiate(request(a, b, ppk=Ppk(b"moon", Secret(b"another"), required=False)), net.now)
    net.run(20)
    [failed] = b.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert failed.kind is FailureKind.PROOF_FAILED
    assert not b.pairs


# ---- without a child -----------------------------------------------------------------------------------


def test_an_ike_sa_without_a_child() -> None:
    """RFC 6023: it comes up, stays as long as the settings say, and gets its children later."""
    patient = replace(QUIET, childless="accept", childless_lifetime=float("inf"))
    a, b, net = pair(childless="accept", childless_lifetime=float("inf"))
    number = a.ike.initiate(
        request(a, b, childless="force", local_ts=(), remote_ts=(), settings=patient), net.now
    )
    net.run(300)
    for host in (a, b):
        assert host.of(IkeEstablished)
        assert not host.of(ChildUp, SessionDown)
    a.ike.create_child(number, ChildRequest(a.selector, b.selector), net.now)
    net.run(3)
    assert_one_tunnel(a, b)


def test_an_ike_sa_without_a_child_is_not_for_every_peer() -> None:
    """A responder that does not announce it gets no such IKE_AUTH; one that we are refuses the child as before."""
    a, b, net = pair()
    a.ike.initiate(request(a, b, childless="force"), net.now)
    net.run(3)
    [failed] = a.of(SessionFailed)
    assert isinstance(failed, SessionFailed)
    assert "RFC 6023" in failed.text
    net.run(60)
    assert not b.ike.sessions()


# ---- what the daemon may say of a peer whose name is known ---------------------------------------------


@pytest.mark.parametrize("auth", ["pubkey", "psk"])
def test_settings_of_the_connection_once_the_name_is_known(auth: str) -> None:
    """The responder answers under the connection's name, with its suites, and says how it knew the key."""
    a, b, net = pair()
    other = replace(
        QUIET,
        identity=PeerIdentity.parse("gw.example"),
        esp_offers=(parse_esp_proposal("aes128gcm16"),),
        own_auth=auth if auth != "psk" else "pubkey",
    )

    def reply(question: Question) -> object:
        if isinstance(question, (NeedPeerKey, NeedPsk)):
            assert question.local is not None
            return Known(a.public, Secret(b"psk"), Authenticated.X509, other)
        return Host.reply(b, question)

    b.reply = reply  # type: ignore[method-assign]
    changes: dict[str, object] = {"own_auth": auth}
    if auth == "psk":
        changes |= {"psk": Secret(b"psk"), "remote_keys": ()}
    a.ike.initiate(request(a, b, expected_identity=PeerIdentity.parse("gw.example"), **changes), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert str(one.peer) == "gw.example"
    assert one.suite.encryption == "aes128gcm16"
    assert two.authenticated is (Authenticated.X509 if auth == "pubkey" else Authenticated.PSK)


# ---- what we don't know --------------------------------------------------------------------------------


def test_vendor_ids_and_unknown_notifies_are_ignored() -> None:
    """In every message of the handshake and after it; so is ESP_TFC_PADDING_NOT_SUPPORTED, as we send none."""
    a, b = two_hosts(QUIET)
    net = Net([a, b])
    strange = [
        (PayloadType.VENDOR, b"vendor of " * 20),
        notify(NotifyType.ESP_TFC_PADDING_NOT_SUPPORTED),
        notify(NotifyType.SET_WINDOW_SIZE, b"\0\0\0\1"),
        notify(40_000, b"private status"),  # type: ignore[arg-type]
    ]
    from oepy.ike import session as module

    original = module.Session.build

    def build(
        self: module.Session, exchange: int, number: int, payloads: list, *, response: bool
    ) -> list[bytes]:  # type: ignore[type-arg]
        return original(self, exchange, number, [*payloads, *strange], response=response)

    module.Session.build = build  # type: ignore[method-assign]
    try:
        number = a.ike.initiate(request(a, b), net.now)
        net.run(3)
        assert_one_tunnel(a, b)
        a.ike.rekey_ike(number, net.now)
        net.run(3)
        b.ike.rekey_child(next(iter(b.pairs)), net.now)
        net.run(3)
    finally:
        module.Session.build = original  # type: ignore[method-assign]
    assert_one_tunnel(a, b)
    assert a.ike.counters["ike_rekeyed"] == 1
    assert "malformed" not in a.ike.counters


@pytest.mark.parametrize(
    ("first", "second", "esn"),
    [("esn-noesn", "esn-noesn", True), ("esn", "esn-noesn", True), ("esn-noesn", "noesn", False)],
)
def test_extended_sequence_numbers_are_negotiated(first: str, second: str, esn: bool) -> None:
    """Both are offered; the best that both know, with a preference for 64 bits."""
    a, b, net = pair(esp_offers=(parse_esp_proposal(f"aes128gcm16-{second}"),))
    a.ike.initiate(request(a, b, esp_offers=(parse_esp_proposal(f"aes128gcm16-{first}"),)), net.now)
    net.run(3)
    one, two = assert_one_tunnel(a, b)
    assert one.suite.esn == two.suite.esn == esn
