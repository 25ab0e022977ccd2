"""Whole daemons in memory: a server with a certificate and no key in the DNS, and clients that hold neither."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

from oepy.connections.model import EMPTY, ConnectionSet
from oepy.connections.vouching import Files, Wanted, add_vouching
from oepy.daemon.revocation import Fetch, Fetcher, FetchFailed, nothing_fetched
from oepy.daemon.trust import endings
from oepy.keys import HostKey, to_public_key
from oepy.model import Absent, Authenticated, Bogus, Insecure, KeyAnswer, PeerIdentity, PolicyGroup, Verdict
from oepy.policy import NO_PREFIXES, PrefixSet
from oepy.x509.identity import identities_of
from tests.fakes.certificates import DNS, IP, NOW, Holder, points, revocation_list
from tests.fakes.clock import run_virtual
from tests.sim.world import Host, Router, matching_pairs

CLIENT, SERVER = "198.18.0.1", "198.18.0.2"
NAME = "server.example"
ROOT, OTHER = Holder("Root"), Holder("Other")
LIST = "http://ca.example/crl"
ASKED = PrefixSet([ip_network("198.18.0.0/24")])


def certificate(*names: Any, issuer: Holder = ROOT, **more: Any) -> Holder:
    return Holder("server", issuer, ca=False, alternatives=list(names), **more)


BY_ADDRESS = certificate(IP(ip_address(SERVER)), DNS(NAME))
BY_NAME = certificate(DNS(NAME))


def vouching(
    shown: Holder | None = None,
    trusted: Sequence[Holder] = (),
    identity: str = "",
    revocation: str = "ifuri",
) -> ConnectionSet:
    content = {
        "own.pem": (shown.certificate,) if shown else (),
        "ca.pem": tuple(one.certificate for one in trusted),
    }
    found, problems = add_vouching(
        EMPTY,
        Wanted(
            PeerIdentity.parse(identity) if identity else None,
            ["own.pem"] if shown else [],
            ["ca.pem"] if trusted else [],
            revocation,
        ),
        Files(
            lambda name: (name, content[name]),
            lambda: HostKey(shown.key).public if shown else HostKey.generate().public,
            lambda one: to_public_key(one.public_key()),
            identities_of,
        ),
    )
    assert not problems
    return found


def hosts(
    shown: Holder,
    *,
    identity: str = "",
    trusted: Sequence[Holder] = (ROOT,),
    group: PolicyGroup = PolicyGroup.PRIVATE_OR_CLEAR,
    certified: PrefixSet = ASKED,
    revocation: str = "ifuri",
    fetch: Fetcher = nothing_fetched,
) -> tuple[Host, Host]:
    answers: dict[str, KeyAnswer] = {}
    wire = Router(random.Random(5))
    trust = vouching(trusted=trusted, revocation=revocation)
    client = Host(
        *(wire, CLIENT, answers),
        group=group,
        configured=trust,
        certified=certified,
        wall_clock=NOW,
        fetch=fetch,
    )
    server = Host(*(wire, SERVER, answers), key=HostKey(shown.key), configured=vouching(shown, (), identity))
    if identity:
        server.identity = identity
        server.start()
    return client, server


async def first_packet(client: Host, server: Host, seconds: float = 2.0) -> None:
    client.send_to(server)
    await asyncio.sleep(seconds)
    assert not client.named("internal-error")
    assert not server.named("internal-error")


def authenticated(client: Host, server: Host) -> tuple[Authenticated, Authenticated]:
    assert matching_pairs(client, server)
    (ours,), (theirs,) = client.datapath.pairs.values(), server.datapath.pairs.values()
    assert not ours.connection + theirs.connection
    return ours.authenticated, theirs.authenticated


def reasons(host: Host) -> str:
    return "; ".join(str(entry["reason"]) for entry in host.named("certificate-refused"))


def test_a_certificate_that_names_the_address_satisfies_private() -> None:
    async def main() -> None:
        for identity in ("", NAME):
            client, server = hosts(BY_ADDRESS, identity=identity, group=PolicyGroup.PRIVATE)
            await first_packet(client, server)
            assert client.verdict_for(server) is Verdict.PRIVATE, client.events
            assert authenticated(client, server) == (Authenticated.X509, Authenticated.NULL)

    run_virtual(main())


def test_a_certificate_for_a_name_that_leads_there_counts_as_a_name() -> None:
    async def main() -> None:
        client, server = hosts(BY_NAME, identity=NAME)
        client.core.keys.places[NAME] = (server.address,)  # type: ignore[attr-defined]
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.PRIVATE, client.events
        assert authenticated(client, server) == (Authenticated.NAME, Authenticated.NULL)

    run_virtual(main())


def test_a_name_that_leads_elsewhere_gains_nothing() -> None:
    """Anybody has a certificate for some name."""

    async def main() -> None:
        client, server = hosts(BY_NAME, identity=NAME)
        client.core.keys.places[NAME] = (ip_address("198.18.0.9"),)  # type: ignore[attr-defined]
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.CLEAR
        assert not client.datapath.pairs
        assert not server.datapath.pairs
        assert "server.example does not lead to 198.18.0.2" in reasons(client)
        assert not [event for event in client.events if event.get("alert")]

    run_virtual(main())


def test_a_name_never_satisfies_private() -> None:
    async def main() -> None:
        client, server = hosts(BY_NAME, identity=NAME, group=PolicyGroup.PRIVATE)
        client.core.keys.places[NAME] = (server.address,)  # type: ignore[attr-defined]
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.BLOCK
        assert not client.datapath.pairs
        assert "the group private wants proof of the address itself" in reasons(client)

    run_virtual(main())


def test_who_is_refused_is_as_if_it_had_not_been_asked() -> None:
    """By another CA, ended, for another address, or revoked: in the clear where that is allowed, else shut."""
    revoked = certificate(IP(ip_address(SERVER)), extensions=[points(LIST)])

    async def fetch(wanted: Fetch) -> bytes:
        if wanted.url != LIST:
            raise FetchFailed("not there")
        return revocation_list(ROOT, revoked)

    async def main() -> None:
        for shown, text in (
            (certificate(IP(ip_address(SERVER)), issuer=OTHER), "CN=Other"),
            (certificate(IP(ip_address("198.18.0.3")), DNS(NAME)), "it speaks for"),
            (certificate(IP(ip_address(SERVER)), start=-10, end=-1), "expired"),
            (revoked, "revoked"),
        ):
            for group, verdict in (
                (PolicyGroup.PRIVATE_OR_CLEAR, Verdict.CLEAR),
                (PolicyGroup.PRIVATE, Verdict.BLOCK),
            ):
                client, server = hosts(shown, group=group, fetch=fetch)
                await first_packet(client, server)
                assert client.verdict_for(server) is verdict
                assert not client.datapath.pairs
                assert text in reasons(client)
                alerts = [
                    event for event in client.events if event["event"] == "ike-failed" and event.get("alert")
                ]
                assert not alerts

    run_virtual(main())


def test_nobody_is_asked_but_whom_the_configuration_names() -> None:
    async def main() -> None:
        client, server = hosts(BY_ADDRESS, certified=NO_PREFIXES)
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.CLEAR
        assert client.router.carried == 0

    run_virtual(main())


def test_a_silent_host_holds_packets_for_seconds_only() -> None:
    async def main() -> None:
        client, server = hosts(BY_ADDRESS)
        server.crash()
        await first_packet(client, server, 3.5)
        assert client.verdict_for(server) is Verdict.CLEAR
        carried = client.router.carried
        await asyncio.sleep(30)
        client.send_to(server)
        await asyncio.sleep(1)
        assert client.router.carried == carried, "not asked again while the record's absence lasts"

    run_virtual(main())


def test_what_the_dns_says_comes_first() -> None:
    """A published key must be proven, a bogus answer closes; an unsigned zone is as none."""

    async def main() -> None:
        for answer, verdict in (
            (Bogus(SERVER, "owner.", 60, "signature"), Verdict.BLOCK),
            (Insecure(SERVER, "owner.", 60, "unsigned"), Verdict.PRIVATE),
            (Absent(SERVER, "owner.", 60), Verdict.PRIVATE),
        ):
            client, server = hosts(BY_ADDRESS)
            client.answers[SERVER] = answer
            await first_packet(client, server)
            assert client.verdict_for(server) is verdict, answer
        client, server = hosts(BY_ADDRESS)
        server.publish(HostKey.generate().public)
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.BLOCK
        assert not client.datapath.pairs

    run_virtual(main())


def test_a_published_key_is_proven_as_before_by_a_host_that_has_a_certificate() -> None:
    async def main() -> None:
        client, server = hosts(BY_ADDRESS)
        server.publish()
        await first_packet(client, server)
        assert authenticated(client, server) == (Authenticated.DNS, Authenticated.NULL)

    run_virtual(main())


def test_anonymous_peers_see_the_certificate_unasked_and_others_do_not() -> None:
    """libreswan's clients do not ask; who is known by its key in the DNS has no use for it."""

    async def main() -> None:
        sent = []
        for publishes in (False, True):
            client, server = hosts(BY_ADDRESS, certified=NO_PREFIXES)
            server.publish()
            if publishes:
                client.publish()
            await first_packet(client, server)
            assert matching_pairs(client, server)
            sent.append(client.router.bytes_of[server.address])
        assert sent[0] > sent[1] + 300

    run_virtual(main())


def test_either_side_may_rekey() -> None:
    """The responder as well: its certificate still speaks for its address."""

    async def main() -> None:
        client, server = hosts(BY_ADDRESS)
        await first_packet(client, server)
        for host in (client, server):
            before = set(host.datapath.pairs)
            (spi,) = before
            host.core.negotiator.rekey(spi)
            await asyncio.sleep(5)
            assert not set(host.datapath.pairs) & before
            assert authenticated(client, server) == (Authenticated.X509, Authenticated.NULL)

    run_virtual(main())


def test_a_reload_takes_trust_back_and_gives_it() -> None:
    async def main() -> None:
        client, server = hosts(BY_ADDRESS)
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.PRIVATE
        client.core.connections.load(vouching(trusted=[OTHER]), {})
        await asyncio.sleep(1)
        assert not client.datapath.pairs
        assert not server.datapath.pairs
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.CLEAR
        assert "CN=Root" in reasons(client) or "no trusted" in reasons(client)

    run_virtual(main())


def test_what_was_decided_without_a_certificate_is_asked_anew_after_a_reload() -> None:
    from oepy.engine.messages import Reloaded

    async def main() -> None:
        client, server = hosts(BY_ADDRESS, certified=NO_PREFIXES)
        await first_packet(client, server)
        engine = client.core.engine
        engine.settings = replace(engine.settings, by_certificate=ASKED.__contains__)
        client.core.feed(Reloaded())
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.PRIVATE

    run_virtual(main())


def test_sessions_leave_nothing_behind() -> None:
    async def main() -> None:
        client, server = hosts(BY_ADDRESS)
        for _ in range(3):
            await first_packet(client, server)
            (spi,) = client.datapath.pairs
            client.core.negotiator.close(spi)
            await asyncio.sleep(1)
        server.crash()
        await first_packet(client, server, 60)
        assert not client.core.connections.vouched._sessions

    run_virtual(main())


# ---- certificates at both ends -------------------------------------------------------------------------


CLIENTS = Holder("client", ROOT, ca=False, alternatives=[IP(ip_address(CLIENT))])


def both(
    clients: Holder = CLIENTS,
    *,
    group: PolicyGroup = PolicyGroup.PRIVATE,
    certified: PrefixSet = ASKED,
    trusted: Sequence[Holder] = (ROOT,),
) -> tuple[Host, Host]:
    """Both show and ask; `certified` and `trusted` are the server's."""
    answers: dict[str, KeyAnswer] = {}
    wire = Router(random.Random(6))
    client = Host(
        *(wire, CLIENT, answers),
        group=group,
        key=HostKey(clients.key),
        configured=vouching(clients, (ROOT,)),
        certified=ASKED,
        wall_clock=NOW,
    )
    server = Host(
        *(wire, SERVER, answers),
        group=group,
        key=HostKey(BY_ADDRESS.key),
        configured=vouching(BY_ADDRESS, trusted),
        certified=certified,
        wall_clock=NOW,
    )
    return client, server


def test_two_certificates_are_private_at_both_ends() -> None:
    """Neither publishes a key, and neither takes an anonymous peer. Both may rekey."""

    async def main() -> None:
        client, server = both()
        await first_packet(client, server)
        assert client.verdict_for(server) is Verdict.PRIVATE, client.events
        for host in (client, server):
            (spi,) = host.datapath.pairs
            host.core.negotiator.rekey(spi)
            await asyncio.sleep(5)
            assert spi not in host.datapath.pairs
            assert authenticated(client, server) == (Authenticated.X509, Authenticated.X509)

    run_virtual(main())


def test_a_server_that_does_not_ask_meets_an_anonymous_client() -> None:
    async def main() -> None:
        client, server = both(group=PolicyGroup.PRIVATE_OR_CLEAR, certified=NO_PREFIXES)
        await first_packet(client, server)
        assert authenticated(client, server) == (Authenticated.X509, Authenticated.NULL)

    run_virtual(main())


def test_a_client_whose_certificate_does_not_count_is_refused() -> None:
    """Another CA, or another host's certificate: no tunnel, and no state at the server."""
    strangers = Holder("client", ROOT, ca=False, alternatives=[IP(ip_address("198.18.0.7"))])

    async def main() -> None:
        for clients, trusted in ((CLIENTS, (OTHER,)), (strangers, (ROOT,))):
            client, server = both(clients, trusted=trusted)
            await first_packet(client, server, 4)
            assert client.verdict_for(server) is Verdict.BLOCK
            await asyncio.sleep(30)
            assert not client.datapath.pairs
            assert not server.datapath.pairs
            assert not server.core.connections.vouched._sessions

    run_virtual(main())


def test_a_clients_published_key_counts_before_its_certificate() -> None:
    """Its own, and another that it cannot prove."""

    async def main() -> None:
        client, server = both()
        client.publish()
        await first_packet(client, server)
        assert authenticated(client, server) == (Authenticated.X509, Authenticated.DNS)
        client, server = both()
        client.publish(HostKey.generate().public)
        await first_packet(client, server, 5)
        assert not server.datapath.pairs
        assert client.verdict_for(server) is Verdict.BLOCK

    run_virtual(main())


def test_certificates_of_both_sides_are_told_of_before_they_end() -> None:
    ends = certificate(IP(ip_address(SERVER)), end=5)
    found = endings(vouching(ends, (ROOT,)), NOW)
    assert [(one.file, one.own, round(one.remaining / 86400)) for one in found] == [("own.pem", True, 5)]
    assert "oepy connection load" in found[0].mend
