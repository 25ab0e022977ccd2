"""Several resolvers, their health, and fairness between zones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address

import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oepy.dns import health, slots, transport
from oepy.dns.health import Health
from oepy.dns.message import Question, Reply
from oepy.dns.slots import Slots, Ticket, neighbourhood
from oepy.dns.transport import NoReply, StubTransport
from oepy.resolvers import Resolver
from tests.fakes.resolver import FakeResolver, deaf, plain

A = int(dns.rdatatype.A)


def question(owner: str) -> Question:
    return Question(dns.name.from_text(owner), A)


@asynccontextmanager
async def asking(*resolvers: Resolver):
    stub = StubTransport(resolvers)
    try:
        yield stub
    finally:
        stub.close()
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing here tells when
            await asyncio.sleep(0.01)


def refusing(query):
    reply = dns.message.make_response(query)
    reply.set_rcode(dns.rcode.REFUSED)
    return 0.0, reply


async def test_a_dead_resolver_costs_the_first_lookup_only():
    """The second and all later ones go to the next at once, and the states say why."""
    async with (
        FakeResolver(udp=deaf) as dead,
        FakeResolver(host="127.0.0.2") as good,
        asking(dead.at(), good.at()) as stub,
    ):
        for number in range(6):
            assert isinstance(await stub.ask(question(f"{number}.example.")), Reply)
        bad, fine = stub.states()
        assert bad.state in ("suspect", "down")
        assert fine.state == "up"
        assert bad.reason
        assert fine.replies == 6
    assert dead.names().count("0.example.") == 1  # and of the others it did not hear at all
    assert [name for name in dead.names() if name not in ("0.example.", ".")] == []


async def test_a_resolver_that_comes_back_is_used_again(monkeypatch):
    """Probed now and then at nobody's cost; the order of the configuration holds again."""
    monkeypatch.setattr(health, "FIRST_RETRY", 0.05)
    monkeypatch.setattr(transport, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(transport, "TRY_SECONDS", (0.1, 0.2))
    async with (
        FakeResolver(udp=deaf) as first,
        FakeResolver(host="127.0.0.2") as second,
        asking(first.at(), second.at()) as stub,
    ):
        await stub.ask(question("0.example."))
        await stub.ask(question("1.example."))  # sends the first probe
        await until(lambda: stub.states()[0].state == "down")
        first.udp = plain
        await asyncio.sleep(0.1)
        await stub.ask(question("2.example."))
        await until(lambda: stub.states()[0].state == "up")
        await stub.ask(question("3.example."))
    assert first.names()[-1] == "3.example."
    assert second.names() == ["0.example.", "1.example.", "2.example."]


async def test_a_slow_zone_does_not_make_its_resolver_look_dead(monkeypatch):
    """Others are asked for a moment; the probe's answer puts it first again."""
    monkeypatch.setattr(transport, "TRY_SECONDS", (0.1, 0.2, 1.0))

    def slow_zone(query):
        _, reply = plain(query)
        return (0.5 if str(query.question[0].name).endswith("slow.") else 0.0), reply

    async with (
        FakeResolver(udp=slow_zone) as first,
        FakeResolver(udp=deaf, host="127.0.0.2") as second,
        asking(first.at(), second.at()) as stub,
    ):
        reply = await stub.ask(question("www.slow."))
        assert isinstance(reply, Reply)  # the first try's answer counted, although the second had begun
        assert "www.slow." in second.names()
        await until(lambda: stub.states()[0].state == "up")
        await stub.ask(question("1.quick."))
    assert first.names()[-1] == "1.quick."


async def test_a_resolver_that_refuses_loses_its_place():
    """REFUSED where another answers: each lookup would cost a round trip more."""
    async with (
        FakeResolver(udp=refusing) as first,
        FakeResolver(host="127.0.0.2") as second,
        asking(first.at(), second.at()) as stub,
    ):
        for number in range(4):
            reply = await stub.ask(question(f"{number}.example."))
            assert isinstance(reply, Reply)
            assert reply.rcode == 0
            await until(lambda number=number: not number or stub.states()[0].state == "down")
        assert (stub.states()[0].state, stub.states()[0].reason) == ("down", "REFUSED")
    assert [name for name in first.names() if name != "."] == ["0.example."]


async def test_a_closed_port_is_passed_over_at_once(monkeypatch):
    """ECONNREFUSED needs no waiting: not the first try's time, which is longer than all the question has."""
    monkeypatch.setattr(transport, "TRY_SECONDS", (30.0, 30.0))
    async with (
        FakeResolver(host="127.0.0.2") as good,
        asking(Resolver(ip_address("127.0.0.1"), good.port), good.at()) as stub,
    ):
        assert isinstance(await stub.ask(question("www.example.")), Reply)
        assert "refused" in stub.states()[0].reason


async def test_a_slow_zone_leaves_room_for_others(monkeypatch):
    """All slots taken by questions of one zone that nobody answers: those of another are answered meanwhile."""
    monkeypatch.setattr(transport, "MAX_OPEN", 20)

    def slow_zone(query):
        return (0.0, None) if str(query.question[0].name).endswith("slow.") else plain(query)

    async with FakeResolver(udp=slow_zone) as server, asking(server.at()) as stub:
        waiting = [asyncio.ensure_future(stub.ask(question(f"{number}.zone.slow."))) for number in range(100)]
        await asyncio.sleep(slots.YIELD_SECONDS + 0.05)
        for number in range(30):
            assert isinstance(await stub.ask(question(f"{number}.zone.quick.")), Reply)
        young = [asyncio.ensure_future(stub.ask(question(f"{number}.zone.slow."))) for number in range(20)]
        replies = await asyncio.gather(*(stub.ask(question(f"{number}.zone.other.")) for number in range(50)))
        assert all(isinstance(reply, Reply) for reply in replies)
        assert not all(task.done() for task in waiting)
        for task in (*waiting, *young):
            task.cancel()
        given_up = [
            r for r in await asyncio.gather(*waiting, return_exceptions=True) if isinstance(r, NoReply)
        ]
    assert any("gave way" in reply.reason for reply in given_up)


# ---- the pure parts ----------------------------------------------------------------------------------------


def test_silence_says_nothing_where_others_were_answered_meanwhile():
    """A question of second 1 without an answer, while one of second 2 had its answer: a slow zone."""
    state = Health("192.0.2.53")
    state.replied(2.5, 0.5)
    state.was_silent(3.0, 1.0)
    assert state.is_good
    state.was_silent(4.0, 3.0)
    assert not state.is_good
    assert state.state(6.0).since == 2.0


def test_probes_come_ever_more_rarely():
    """Doubling up to a minute, from a second."""
    state, now, gaps = Health("192.0.2.53"), 100.0, []
    state.failed(now, "no answer")
    assert state.wants_probe(now)
    for _ in range(9):
        state.probe_failed(now, "no answer")
        gaps.append(state.next_probe - now)
        assert not state.wants_probe(now)
        now = state.next_probe
        assert state.wants_probe(now)
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    state.replied(now, 0.01)
    assert state.is_good
    assert state.state(now).state == "up"


@pytest.mark.parametrize(
    ("owner", "area"),
    [
        ("a.b.www.example.com.", "example.com."),
        ("com.", "com."),
        (".", "."),
        ("4.3.2.1.in-addr.arpa.", "2.1.in-addr.arpa."),
        ("1." * 24 + "8.b.d.0.1.0.0.2.ip6.arpa.", "8.b.d.0.1.0.0.2.ip6.arpa."),
        ("arpa.", "arpa."),
    ],
)
def test_neighbourhoods(owner, area):
    """About what one set of name servers answers for."""
    assert neighbourhood(question(owner)) == question(area).key


@given(
    st.lists(
        st.tuples(st.sampled_from(["a.", "b.", "c.", "d."]), st.floats(0, 0.5), st.booleans()), max_size=80
    )
)
def test_slots_are_never_oversubscribed_nor_lost(steps):
    """Whatever comes and goes: at most `limit` open, nobody waits while a slot is free, all can leave."""
    limit, now = 4, 1.0
    held, live, entered = Slots(limit), [], []
    for area, gap, leaves in steps:
        now += gap
        ticket = Ticket(question(area).key, lambda: entered.append(1), lambda: None)
        ticket.on_evict = lambda ticket=ticket: live.remove(ticket)
        live.append(ticket)
        held.enter(ticket, now)
        if leaves:
            held.leave(live.pop(0), now)
        opened = [ticket for ticket in live if ticket.since]
        assert len(held) == len(opened) <= limit
        assert len(opened) == min(limit, len(live))
    for ticket in list(live):
        held.leave(ticket, now)
    assert len(held) == 0
