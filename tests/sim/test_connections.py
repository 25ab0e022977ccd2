"""Conventional connections between whole daemons in memory, over a router that misbehaves, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from ipaddress import ip_address

import pytest

from oepy.connections.manager import State
from oepy.connections.messages import Asked, Down, Up
from oepy.ike.child import ChildSa, note_tfc
from oepy.ike.header import Header
from oepy.ike.message import Message
from oepy.ike.notify import NotifyType
from oepy.ike.payloads import build_chain, notify, parse_chain
from oepy.keys import HostKey
from oepy.model import Authenticated, EspSuite, Flow, KeyAnswer, Verdict
from tests.fakes.clock import run_virtual
from tests.fakes.connections import between, good
from tests.sim.world import Host, Router, matching_pairs

A, B = "198.18.0.1", "198.18.0.2"
PSK = {"psk": b"correct horse battery staple\n"}


def pair(router: Router, start: str = "none", other_secret: bytes = b"", **more: object) -> tuple[Host, Host]:
    answers: dict[str, KeyAnswer] = {}
    one = good(between(A, B, own="a.example", peer="b.example", start=start, **more), PSK)
    secret = {"psk": other_secret} if other_secret else PSK
    two = good(between(B, A, own="b.example", peer="a.example", **more), secret)
    return Host(router, A, answers, configured=one), Host(router, B, answers, configured=two)


def child(host: Host, label: str = "site/net"):  # type: ignore[no-untyped-def]
    return host.core.connections.manager.children[label]


def up(host: Host, label: str = "site/net") -> None:
    host.core.connections.feed(Up(label))


def quiet(*hosts: Host) -> bool:
    return not any(host.named("internal-error") for host in hosts)


def test_start_brings_a_psk_connection_up() -> None:
    """start_action start: one SA pair with equal keys, by PSK; the trap leads the peer's address in."""

    async def main() -> None:
        one, other = pair(Router(random.Random(1)), "start")
        await asyncio.sleep(3)
        assert matching_pairs(one, other)
        (sa,) = one.datapath.pairs.values()
        assert (sa.authenticated, sa.connection) == (Authenticated.PSK, "site/net")
        assert (child(one).state, child(other).state) == (State.UP, State.UP)
        assert one.trap.joined[child(one).number] == ((ip_address(B), ip_address(B)),)
        assert other.trap.joined[child(other).number] == ((ip_address(A), ip_address(A)),)
        assert quiet(one, other)

    run_virtual(main())


@pytest.mark.parametrize("seed", range(6))
def test_it_comes_up_under_loss_whoever_begins(seed: int) -> None:
    """30 % loss, duplicates, reordering, both sides at once: one SA pair in the end, the same on both."""

    async def main() -> None:
        router = Router(random.Random(seed), loss=0.3, duplication=0.2, jitter=0.3)
        one, other = pair(router, "start", keyingtries=0)
        up(other)
        await asyncio.sleep(300)
        assert child(one).state is State.UP
        assert matching_pairs(one, other)
        assert len(one.datapath.pairs) == 1
        assert quiet(one, other)

    run_virtual(main())


def test_a_packet_brings_a_trapped_child_up_and_down_goes_back_to_the_trap() -> None:
    """start_action trap: nothing begins by itself, a held packet begins it; `down` asks again for the next one."""

    async def main() -> None:
        one, other = pair(Router(random.Random(2)), "trap")
        await asyncio.sleep(5)
        assert not one.datapath.pairs
        number = child(one).number
        assert child(one).state is State.TRAPPED
        flow = Flow(ip_address(A), ip_address(B), 6, 40000, 80)
        one.core.connections.feed(Asked(number, flow))
        await asyncio.sleep(1)
        assert child(one).state is State.UP
        one.core.connections.feed(Down("site/net"))
        await asyncio.sleep(1)
        assert child(one).state is State.TRAPPED
        assert one.trap.joined[number] == ()
        assert not one.datapath.pairs
        assert not other.datapath.pairs
        rules = [rule for rule in one.core.connections.traffic.rules() if rule.required]
        assert len(rules) == 3

    run_virtual(main())


def test_another_secret_fails_on_both_sides_and_says_which_identities() -> None:
    """A wrong secret, and one that isn't there, look alike to the peer; our own log names the pair."""

    async def main() -> None:
        one, other = pair(Router(random.Random(3)), "start", b"wrong", keyingtries=1)
        await asyncio.sleep(5)
        assert not one.datapath.pairs
        assert child(one).state is State.DOWN
        assert "AUTHENTICATION_FAILED" in child(one).last_error
        assert "a.example" in str(other.named("connection-refused"))
        assert "correct horse" not in str(one.events + other.events)

        lone = good(
            between(A, B, own="stranger.example", peer="b.example", start="start", keyingtries=1), PSK
        )
        third = Host(one.router, A, one.answers, configured=lone)
        await asyncio.sleep(5)
        assert "AUTHENTICATION_FAILED" in child(third).last_error
        (told,) = other.named("no-secret-for-peer")
        assert "stranger.example" in str(told)

    run_virtual(main())


def test_raw_keys_and_a_peer_with_another_key() -> None:
    """`auth: pubkey` with raw keys of both kinds; the host key answers where no file is named."""
    keys = HostKey.generate("ed25519"), HostKey.generate("ecdsa-p256")

    def configured(here: str, there: str, own: str, peer: str, key: HostKey, start: str):  # type: ignore[no-untyped-def]
        text = f"""
connections:
  site:
    remote_addrs: {there}
    local: {{auth: pubkey, id: {own}}}
    remote: {{auth: pubkey, id: {peer}, pubkeys: [peer]}}
    children: {{net: {{start_action: {start}}}}}
"""
        return good(text, public={"peer": key.public})

    async def main() -> None:
        router = Router(random.Random(4))
        one = Host(
            router, A, {}, key=keys[0], configured=configured(A, B, "a.example", "b.example", keys[1], "none")
        )
        two = Host(
            router, B, {}, key=keys[1], configured=configured(B, A, "b.example", "a.example", keys[0], "none")
        )
        up(one)
        await asyncio.sleep(2)
        assert matching_pairs(one, two)
        (sa,) = two.datapath.pairs.values()
        assert sa.authenticated is Authenticated.MANUAL
        two.core.connections.feed(Down("site/net"))
        await asyncio.sleep(2)
        impostor = Host(router, A, {}, configured=configured(A, B, "a.example", "b.example", keys[1], "none"))
        up(impostor)
        await asyncio.sleep(5)
        assert not two.datapath.pairs
        assert quiet(one, two, impostor)

    run_virtual(main())


def test_several_children_share_one_ike_sa() -> None:
    """Two children, one IKE SA; each has its own selectors; one goes down alone."""
    children = {
        name: {"local_ts": "dynamic", "remote_ts": f"dynamic[tcp/{port}]"}
        for name, port in (("web", 80), ("db", 5432))
    }
    mirrored = {
        name: {"local_ts": f"dynamic[tcp/{port}]", "remote_ts": "dynamic"}
        for name, port in (("web", 80), ("db", 5432))
    }

    async def main() -> None:
        router = Router(random.Random(5))
        one = Host(
            router,
            A,
            {},
            configured=good(between(A, B, own="a.example", peer="b.example", children=children), PSK),
        )
        two = Host(
            router,
            B,
            {},
            configured=good(between(B, A, own="b.example", peer="a.example", children=mirrored), PSK),
        )
        up(one, "site/web")
        up(one, "site/db")
        await asyncio.sleep(3)
        assert {pair.connection for pair in one.datapath.pairs.values()} == {"site/web", "site/db"}
        assert matching_pairs(one, two)
        assert len(one.core.negotiator.endpoint.sessions()) == 1
        one.core.connections.feed(Down("site/web"))
        await asyncio.sleep(2)
        assert {pair.connection for pair in two.datapath.pairs.values()} == {"site/db"}
        assert child(two, "site/web").state is State.DOWN

    run_virtual(main())


def test_rekeys_stay_in_their_child() -> None:
    """Short lifetimes: many rekeys later there is one SA pair, of the same child, and it never was down."""

    async def main() -> None:
        life = {"rekey_time": "60", "life_time": "80", "rand_time": "10"}
        one, other = pair(Router(random.Random(6)), "start", child=life, rekey_time="200")
        await asyncio.sleep(900)
        assert matching_pairs(one, other)
        assert len(one.datapath.pairs) == 1
        assert len(one.named("connection-up")) == 1
        assert not one.named("connection-down")
        assert next(iter(one.datapath.pairs.values())).lifetime.hard_seconds == 80

    run_virtual(main())


def test_a_dead_peer_and_dpd_action_start() -> None:
    """The peer crashes: DPD ends the SA, dpd_action start tries until it is back; keyingtries 0 never gives up."""

    async def main() -> None:
        one, other = pair(Router(random.Random(7)), "start", child={"dpd_action": "restart"}, dpd_delay="5")
        await asyncio.sleep(3)
        assert child(one).state is State.UP
        other.crash()
        await asyncio.sleep(120)
        assert child(one).state is State.CONNECTING
        other.start()
        await asyncio.sleep(700)
        assert child(one).state is State.UP
        assert matching_pairs(one, other)

    run_virtual(main())


def test_a_load_touches_only_what_changed() -> None:
    """The same connection keeps its SAs over a load; a changed one is taken down and made anew."""

    async def main() -> None:
        one, other = pair(Router(random.Random(8)), "start")
        await asyncio.sleep(3)
        before = set(one.datapath.pairs)
        one.core.connections.load(one.configured, {})
        await asyncio.sleep(3)
        assert set(one.datapath.pairs) == before
        changed = good(between(A, B, own="a.example", peer="b.example", start="start", dpd_delay="7"), PSK)
        one.core.connections.load(changed, {})
        await asyncio.sleep(5)
        assert len(one.datapath.pairs) == 1
        assert set(one.datapath.pairs) != before
        assert matching_pairs(one, other)
        one.core.connections.load(good("{}"), {})
        await asyncio.sleep(3)
        assert not one.datapath.pairs
        assert not other.datapath.pairs

    run_virtual(main())


def test_the_engine_keeps_off_and_opportunistic_offers_are_refused() -> None:
    """Both publish keys, too: their traffic still is the connection's, and an opportunistic offer for it is
    refused although the peer proves its published key."""

    async def main() -> None:
        one, other = pair(Router(random.Random(9)), "trap")
        one.publish()
        other.publish()
        group, why = one.core.engine.settings.group_of(other.address)
        assert (group.value, why) == ("clear", "connection site/net")
        other.core.connections.load(good("{}"), {})
        other.send_to(one)
        await asyncio.sleep(20)
        assert not one.datapath.pairs
        assert any("belongs to the connection site/net" in str(event) for event in one.named("offer-refused"))

    run_virtual(main())


def test_a_decision_goes_when_a_tunnel_takes_its_destination() -> None:
    """Decided by its group before: forgotten with the connection's tunnel, and nothing else is. And again when the
    tunnel has gone."""

    async def main() -> None:
        router = Router(random.Random(5))
        one, other = pair(router)
        third = Host(router, "198.18.0.3", {})
        for there in (other, third):
            one.send_to(there)
        await asyncio.sleep(1)
        assert [one.verdict_for(there) for there in (other, third)] == [Verdict.CLEAR, Verdict.CLEAR]
        up(one)
        await asyncio.sleep(1)
        assert child(one).state is State.UP
        assert [one.verdict_for(there) for there in (other, third)] == [None, Verdict.CLEAR]
        assert one.core.engine.find(other.address) is None
        one.core.connections.feed(Down("site/net"))
        await asyncio.sleep(1)
        one.send_to(other)
        await asyncio.sleep(1)
        assert one.verdict_for(other) is Verdict.CLEAR

    run_virtual(main())


def test_padding_is_for_peers_that_take_it() -> None:
    """tfc_padding of our side goes to our datapath; a peer that says ESP_TFC_PADDING_NOT_SUPPORTED gets none."""

    async def main() -> None:
        router = Router(random.Random(5))
        one, other = pair(router, "start", child={"tfc_padding": "mtu"})
        other.core.connections.load(
            good(between(B, A, own="b.example", peer="a.example", child={"tfc_padding": 0}), PSK), {}
        )
        await asyncio.sleep(3)
        (ours,), (theirs,) = one.datapath.pairs.values(), other.datapath.pairs.values()
        assert (ours.tfc_padding, theirs.tfc_padding) == (65_535, 0)
        refused = ChildSa(1, 2, EspSuite("aes128gcm16"), local_ts=(), remote_ts=(), initiator=True)
        said = [notify(NotifyType.ESP_TFC_PADDING_NOT_SUPPORTED)]
        kind, data = build_chain(said)
        note_tfc(refused, Message(Header(bytes(8), bytes(8), 0, 32, 35, 0, 1), parse_chain(data, kind), data))
        assert not refused.takes_tfc

    run_virtual(main())
