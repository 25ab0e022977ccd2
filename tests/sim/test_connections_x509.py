"""Connections by X.509 between whole daemons in memory: who is accepted, who is refused, and why it says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from oepy.connections.manager import State
from oepy.connections.messages import Up
from oepy.connections.model import ConnectionSet
from oepy.daemon.revocation import Fetch, Fetcher, FetchFailed, nothing_fetched
from oepy.keys import HostKey
from oepy.model import Authenticated, KeyAnswer
from oepy.x509.certificates import to_der
from tests.fakes.certificates import DNS, NOW, Holder, ocsp_response, points, responder, revocation_list
from tests.fakes.clock import run_virtual
from tests.fakes.connections import good, read
from tests.sim.world import Host, Router, matching_pairs

A, B = "198.18.0.1", "198.18.0.2"
ROOT = Holder("Root")
MIDDLE = Holder("Middle", ROOT)
OTHER_ROOT = Holder("Other root")


def holder(name: str, issuer: Holder = ROOT, **more: Any) -> Holder:
    return Holder(name, issuer, ca=False, alternatives=[DNS(f"{name}.example")], **more)


ALPHA, BETA = holder("alpha"), holder("beta", MIDDLE)


def configured(
    here: str,
    there: str,
    own: Holder,
    *,
    own_id: str | None = None,
    peer_id: str | None = None,
    start: str = "none",
    chain: Sequence[Holder] = (),
    trusted: Sequence[Holder] = (ROOT,),
    pinned: Sequence[Holder] = (),
    remote: dict[str, Any] | None = None,
    local: dict[str, Any] | None = None,
    **more: Any,
) -> ConnectionSet:
    side: dict[str, Any] = {"auth": "x509", "certs": ["own.pem"], "key": "own.key"}
    other: dict[str, Any] = {"auth": "x509", "cacerts": ["ca.pem"]}
    if pinned:
        other["certs"] = ["pinned.pem"]
    if own_id:
        side["id"] = own_id
    if peer_id:
        other["id"] = peer_id
    section = {
        "local_addrs": [here],
        "remote_addrs": [there],
        "local": side if local is None else local,
        "remote": other if remote is None else remote,
        "keyingtries": 1,
        "children": {"net": {"start_action": start}},
        **more,
    }
    text = yaml.safe_dump({"connections": {"site": section}})
    certificates = {
        "own.pem": [own.certificate, *(one.certificate for one in chain)],
        "ca.pem": [one.certificate for one in trusted],
        "pinned.pem": [one.certificate for one in pinned],
    }
    return good(text, {"own.key": HostKey(own.key).to_pem()}, None, certificates)


def world(
    one: ConnectionSet,
    other: ConnectionSet,
    keys: Sequence[Holder],
    fetch: Fetcher = nothing_fetched,
    **router: Any,
) -> tuple[Host, Host]:
    answers: dict[str, KeyAnswer] = {}
    wire = Router(random.Random(1), **router)
    hosts = [
        Host(
            wire,
            address,
            answers,
            configured=wanted,
            keys={"own.key": HostKey(key.key)},
            wall_clock=NOW,
            fetch=fetch,
        )
        for address, wanted, key in ((A, one, keys[0]), (B, other, keys[1]))
    ]
    return hosts[0], hosts[1]


def up(one: Host, other: Host) -> bool:
    states = [host.core.connections.manager.children["site/net"].state for host in (one, other)]
    return states == [State.UP, State.UP] and matching_pairs(one, other)


LIST = "http://ca.example/crl"


def run_with_list(page: bytes | FetchFailed | None, policy: str, key: Holder) -> tuple[Host, Host, list[str]]:
    """alpha with this certificate, and beta, who asks for the list: None is a server that hangs."""
    asked = []

    async def fetch(wanted: Fetch) -> bytes:
        asked.append(wanted.url)
        if page is None:
            await asyncio.sleep(1e6)
        if isinstance(page, FetchFailed):
            raise page
        return page or b""

    async def main() -> tuple[Host, Host]:
        remote = {"auth": "x509", "cacerts": ["ca.pem"], "revocation": policy}
        wanted = configured(A, B, key, start="start"), configured(B, A, BETA, chain=[MIDDLE], remote=remote)
        hosts = world(*wanted, (key, BETA), fetch=fetch)
        await asyncio.sleep(25)
        assert not any(host.named("internal-error") for host in hosts)
        return hosts

    return *run_virtual(main()), asked


REVOKED = holder("alpha", extensions=[points(LIST)])


@pytest.mark.parametrize("policy", ["strict", "ifuri", "relaxed"])
def test_a_revoked_certificate_opens_nothing(policy: str) -> None:
    """Whatever the policy; the reason is told here, and not to the peer."""
    one, other, asked = run_with_list(revocation_list(ROOT, REVOKED), policy, REVOKED)
    assert not one.datapath.pairs
    assert not other.datapath.pairs
    assert "CN=alpha was revoked" in reasons(other)
    assert "revoked" not in one.core.connections.manager.children["site/net"].last_error
    assert asked == [LIST]


@pytest.mark.parametrize("policy", ["strict", "ifuri", "relaxed"])
@pytest.mark.parametrize("page", [None, FetchFailed("away")])
def test_a_server_that_says_nothing(policy: str, page: FetchFailed | None) -> None:
    """Hanging or away: strict and ifuri refuse, relaxed goes on, within the time that IKE waits."""
    one, other, _ = run_with_list(page, policy, REVOKED)
    assert up(one, other) is (policy == "relaxed")
    assert ("nobody could say whether CN=alpha is revoked" in reasons(other)) is (policy != "relaxed")


def test_a_peer_brings_what_its_responder_says() -> None:
    """RFC 4806: alpha asks about its own certificate, beta need not; with `strict`, and no network of beta's."""
    ask = "http://ca.example/ocsp"
    own = holder("alpha", extensions=[responder(ask)])
    asked = []

    async def fetch(wanted: Fetch) -> bytes:
        asked.append(wanted.url)
        return ocsp_response(own, ROOT)

    async def main() -> None:
        strict = {"auth": "x509", "cacerts": ["ca.pem"], "revocation": "strict"}
        wanted = (
            configured(A, B, own, trusted=[ROOT]),
            configured(B, A, BETA, chain=[MIDDLE], remote=strict),
        )
        one, other = world(*wanted, (own, BETA), fetch=fetch)
        other.core.connections.revocation._fetch = nothing_fetched
        watching = asyncio.create_task(one.core.connections.watch_certificates())
        await asyncio.sleep(2)
        one.core.connections.feed(Up("site/net"))
        await asyncio.sleep(5)
        watching.cancel()
        assert up(one, other), other.events
        assert asked == [ask]
        await asyncio.sleep(3600)

    run_virtual(main())


def test_nothing_is_fetched_for_whoever_cannot_prove_the_key() -> None:
    """The certificate alone, which anybody may have seen, makes nobody fetch."""
    thief = holder("alpha", extensions=[points(LIST)])
    asked = []

    async def fetch(wanted: Fetch) -> bytes:
        asked.append(wanted.url)
        return revocation_list(ROOT)

    async def main() -> None:
        wanted = configured(A, B, thief, start="start")
        stolen = ConnectionSet(
            wanted.connections, (), (), {**wanted.certificates, "own.pem": (REVOKED.certificate,)}
        )
        strict = {"auth": "x509", "cacerts": ["ca.pem"], "revocation": "strict"}
        _, other = world(
            stolen, configured(B, A, BETA, chain=[MIDDLE], remote=strict), (thief, BETA), fetch=fetch
        )
        await asyncio.sleep(8)
        assert "is not by a key" in str(other.named("connection-refused"))

    run_virtual(main())
    assert asked == []


def reasons(host: Host) -> str:
    return str([entry.get("reason") for entry in host.named("certificate-refused")])


def run(
    one: ConnectionSet, other: ConnectionSet, keys: Sequence[Holder] = (ALPHA, BETA), **router: Any
) -> tuple[Host, Host]:
    async def main() -> tuple[Host, Host]:
        hosts = world(one, other, keys, **router)
        await asyncio.sleep(40 if router else 8)
        assert not any(host.named("internal-error") for host in hosts)
        return hosts

    return run_virtual(main())


@pytest.mark.parametrize(
    ("own", "peer"),
    [
        (None, None),
        ("alpha.example", "beta.example"),
        ("CN=alpha", "CN=BETA"),
        ("alpha.example", "*.example"),
        (None, "CN=*"),
    ],
)
def test_certificates_prove_both(own: str | None, peer: str | None) -> None:
    """By subjects, by alternative names, by wildcards; an intermediate certificate travels along."""
    beta_id = "beta.example" if peer and "=" not in peer else None
    one, other = run(
        configured(A, B, ALPHA, own_id=own, peer_id=peer, start="start"),
        configured(B, A, BETA, own_id=beta_id, chain=[MIDDLE], peer_id=own),
    )
    assert up(one, other), one.events + other.events
    (sa,) = one.datapath.pairs.values()
    assert sa.authenticated is Authenticated.X509


def test_long_chains_arrive_in_fragments_under_loss() -> None:
    one, other = run(
        configured(A, B, ALPHA, start="start", chain=[MIDDLE, OTHER_ROOT], keyingtries=0),
        configured(B, A, BETA, chain=[MIDDLE, OTHER_ROOT]),
        loss=0.2,
        duplication=0.2,
        jitter=0.1,
    )
    assert up(one, other)


@pytest.mark.parametrize(
    ("ours", "theirs", "fragments"),
    [
        ("yes", "yes", True),
        ("yes", "accept", True),
        ("yes", "no", False),
        ("accept", "yes", False),
        ("no", "yes", False),
    ],
)
@pytest.mark.parametrize("we_begin", [True, False])
def test_who_sends_fragments(ours: str, theirs: str, fragments: bool, we_begin: bool) -> None:
    """Whoever may, to a peer that has announced that it reads them."""
    chain = [MIDDLE, OTHER_ROOT]
    one, other = run(
        configured(A, B, ALPHA, start="start" if we_begin else "none", chain=chain, fragmentation=ours),
        configured(B, A, BETA, start="none" if we_begin else "start", chain=chain, fragmentation=theirs),
    )
    assert up(one, other)
    assert (one.router.longest[one.address] <= 1200) is fragments


def test_an_intermediate_that_does_not_travel_is_missed_by_name() -> None:
    one, _ = run(configured(A, B, ALPHA, start="start"), configured(B, A, BETA))
    assert not one.datapath.pairs
    assert "no CA that is trusted or was sent is called 'CN=Middle'" in reasons(one)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trusted": [OTHER_ROOT]}, "CN=Middle: no CA that is trusted or was sent is called 'CN=Root'"),
        ({"peer_id": "*.example"}, "the peer is CN=beta, not *.example"),
        ({"pinned": [holder("beta", MIDDLE)]}, "not one of the certificates that are configured"),
    ],
)
def test_the_initiator_refuses(changes: dict[str, Any], text: str) -> None:
    """No tunnel on either side in the end, and the reason stands in its log and with the connection."""
    one, other = run(
        configured(A, B, ALPHA, start="start", **changes), configured(B, A, BETA, chain=[MIDDLE])
    )
    assert not one.datapath.pairs
    assert not other.datapath.pairs
    assert text in reasons(one)
    assert text in one.core.connections.manager.children["site/net"].last_error


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (holder("alpha", OTHER_ROOT), "no CA that is trusted or was sent is called 'CN=Other root'"),
        (holder("alpha", start=-3, end=-1), "expired"),
        (holder("alpha", start=2), "not valid before"),
        (Holder("alpha", ROOT), ""),
    ],
)
def test_the_responder_refuses(key: Holder, text: str) -> None:
    """It tells its own log why, and the peer no more than AUTHENTICATION_FAILED."""
    one, other = run(
        configured(A, B, key, start="start"), configured(B, A, BETA, chain=[MIDDLE]), (key, BETA)
    )
    if not text:
        assert up(one, other)
        return
    assert not one.datapath.pairs
    assert not other.datapath.pairs
    assert text in reasons(other)
    said = one.core.connections.manager.children["site/net"].last_error
    assert "AUTHENTICATION_FAILED" in said
    assert text not in said


def test_somebody_elses_certificate_is_no_proof() -> None:
    """The certificate is public; without its key it opens nothing."""
    thief = holder("alpha")
    wanted = configured(A, B, thief, start="start")
    stolen = {**wanted.certificates, "own.pem": (ALPHA.certificate,)}
    one, other = run(
        ConnectionSet(wanted.connections, (), (), stolen),
        configured(B, A, BETA, chain=[MIDDLE]),
        (thief, BETA),
    )
    assert not one.datapath.pairs
    assert not other.datapath.pairs
    assert "is not by a key" in str(other.named("connection-refused"))


def test_a_certificate_for_another_name_is_no_proof_of_this_one() -> None:
    """gamma has a good certificate, claims to be alpha, and is told apart."""
    gamma = holder("gamma")
    wanted = configured(A, B, ALPHA, start="start", own_id="alpha.example")
    mixed = {**wanted.certificates, "own.pem": (gamma.certificate,)}
    _, other = run(
        ConnectionSet(wanted.connections, (), (), mixed),
        configured(B, A, BETA, chain=[MIDDLE], peer_id="alpha.example"),
        (gamma, BETA),
    )
    assert not other.datapath.pairs
    assert "it speaks for gamma.example, CN=gamma, not for alpha.example" in reasons(other)


def test_pinned_certificates_need_no_authority_and_no_transport() -> None:
    """`certs` of the remote side: accepted as they are, even where the peer sends none."""
    one, other = run(
        configured(A, B, ALPHA, start="start", pinned=[BETA], peer_id="CN=beta", trusted=[OTHER_ROOT]),
        configured(B, A, BETA, pinned=[ALPHA], peer_id="CN=alpha", trusted=[OTHER_ROOT], send_cert="never"),
    )
    assert up(one, other), one.events + other.events


def test_a_server_with_a_certificate_serves_clients_that_have_none() -> None:
    """As with a public CA's certificate: the server is proven, the client is nobody."""
    server = configured(B, "%any", BETA, chain=[MIDDLE], own_id="beta.example", remote={"auth": "null"})
    client = configured(A, B, ALPHA, start="start", peer_id="beta.example", local={"auth": "null"})
    one, other = run(client, server)
    assert up(one, other), one.events + other.events
    (sa,), (theirs,) = one.datapath.pairs.values(), other.datapath.pairs.values()
    assert (sa.authenticated, theirs.authenticated) == (Authenticated.X509, Authenticated.NULL)


def test_a_hub_for_anybody_with_a_certificate_leaves_opportunistic_peers_alone() -> None:
    """`id` %any and `remote_addrs` %any: who has no certificate is served by its key in DNS."""

    async def main() -> None:
        hub = configured(B, "%any", BETA, chain=[MIDDLE])
        answers: dict[str, KeyAnswer] = {}
        wire = Router(random.Random(1))
        other = Host(wire, B, answers, configured=hub, keys={"own.key": HostKey(BETA.key)}, wall_clock=NOW)
        stranger = Host(wire, A, answers)
        stranger.publish()
        other.publish()
        stranger.send_to(other)
        await asyncio.sleep(5)
        (sa,) = other.datapath.pairs.values()
        assert (sa.authenticated, sa.connection) == (Authenticated.DNS, "")
        assert matching_pairs(stranger, other)

    run_virtual(main())


def test_a_server_for_anonymous_clients_leaves_anonymous_opportunistic_peers_alone() -> None:
    """They ask for another child than the server has: theirs is the opportunistic one."""

    async def main() -> None:
        server = configured(
            *(B, "%any", BETA),
            chain=[MIDDLE],
            own_id="beta.example",
            remote={"auth": "null"},
            children={"net": {"local_ts": ["10.9.0.0/24"]}},
        )
        answers: dict[str, KeyAnswer] = {}
        wire = Router(random.Random(1))
        other = Host(wire, B, answers, configured=server, keys={"own.key": HostKey(BETA.key)}, wall_clock=NOW)
        stranger = Host(wire, A, answers)
        other.publish()
        stranger.send_to(other)
        await asyncio.sleep(5)
        (sa,) = other.datapath.pairs.values()
        assert (sa.authenticated, sa.connection) == (Authenticated.NULL, "")
        assert matching_pairs(stranger, other)

    run_virtual(main())


def test_a_renewed_certificate_ends_nothing_and_is_shown_from_then_on() -> None:
    """The old one has expired for newcomers; what is up stays; the next IKE SA has the new one. Another CA in the
    file of those that are trusted begins the connection anew."""

    async def main() -> None:
        one, other = world(
            configured(A, B, ALPHA, start="start"), configured(B, A, BETA, chain=[MIDDLE]), (ALPHA, BETA)
        )
        await asyncio.sleep(3)
        assert up(one, other)
        before = set(one.datapath.pairs)
        renewed = holder("alpha", key=ALPHA.key)
        one.core.connections.load(configured(A, B, renewed, start="start"), one.keys)
        await asyncio.sleep(3)
        assert set(one.datapath.pairs) == before
        book = one.core.connections.book
        shown = book.trusts.settings(book.configured.connections[0]).chain
        assert shown == (to_der(renewed.certificate),)
        one.core.connections.load(configured(A, B, renewed, start="start", trusted=[OTHER_ROOT]), one.keys)
        await asyncio.sleep(3)
        assert not one.datapath.pairs
        assert "no CA that is trusted" in reasons(one)

    run_virtual(main())


@pytest.mark.parametrize(
    ("side", "text"),
    [
        ({"local": {"auth": "x509", "key": "own.key"}}, "needs the own certificate"),
        ({"local": {"auth": "x509", "certs": ["own.pem"]}}, "needs the certificate's private key"),
        ({"local": {"auth": "x509", "certs": ["own.pem"], "key": "beta.key"}}, "is of another key"),
        (
            {"local": {"auth": "x509", "certs": ["own.pem"], "key": "own.key", "id": "x.example"}},
            "does not speak for x.example, but for: alpha.example; CN=alpha",
        ),
        ({"local": {"auth": "psk", "certs": ["own.pem"]}}, "certificates are for `auth: x509`"),
        ({"remote": {"auth": "x509"}}, "needs whom to trust"),
        ({"remote": {"auth": "x509", "cacerts": ["none.pem"]}}, "does not exist"),
        ({"remote": {"auth": "psk", "cacerts": ["ca.pem"]}}, "certificates are for `auth: x509`"),
        (
            {"remote": {"auth": "x509", "cacerts": ["ca.pem"], "id": "CN=a, XX=b"}},
            "write it like CN=gw.example",
        ),
    ],
)
def test_mistakes_are_named(side: dict[str, Any], text: str) -> None:
    section = {
        "remote_addrs": [B],
        "local": {"auth": "x509", "certs": ["own.pem"], "key": "own.key"},
        "remote": {"auth": "x509", "cacerts": ["ca.pem"]},
        "children": {"net": {}},
        **side,
    }
    _, problems = read(
        yaml.safe_dump({"connections": {"site": section}}),
        {"own.key": HostKey(ALPHA.key).to_pem(), "beta.key": HostKey(BETA.key).to_pem()},
        None,
        {"own.pem": [ALPHA.certificate], "ca.pem": [ROOT.certificate]},
    )
    assert text in str([problem.text for problem in problems])


def test_certificates_that_end_are_told_once_a_day() -> None:
    """Our own and the CA's, from two weeks before; with what to do."""

    async def main() -> None:
        own = holder("alpha", end=10)
        one, _ = world(configured(A, B, own), configured(B, A, BETA, chain=[MIDDLE]), (own, BETA))
        watching = asyncio.create_task(one.core.connections.watch_certificates())
        await asyncio.sleep(7200)
        (told,) = one.named("certificate-ends")
        assert "CN=alpha in own.pem expires in 10.0 days; renew it, and `oepy connection load`" in str(told)
        one.wall_clock += 31 * 86400
        await asyncio.sleep(120)
        texts = [str(entry["reason"]) for entry in one.named("certificate-ends")[1:]]
        assert [text.split(" in ")[0] for text in texts] == ["CN=alpha", "CN=Root"]
        assert all("has expired" in text for text in texts)
        watching.cancel()

    run_virtual(main())
