"""Whole daemons in memory when something breaks: the datapath, the peer's manners, our own end."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from oepy.daemon import core, negotiator
from oepy.engine.messages import StartIke
from oepy.errors import OepyError
from oepy.ike.events import Datagram, NeedSignature
from oepy.ike.header import Exchange
from oepy.interfaces import DatapathEvent
from oepy.model import Endpoint, Flow, IpAddress, KeyAnswer, PolicyGroup, SaCounters, Verdict
from tests.fakes.clock import run_virtual
from tests.sim.world import Host, Router


def pair_of_hosts(seed: int = 1, **first: Any) -> tuple[Host, Host]:
    answers: dict[str, KeyAnswer] = {}
    router = Router(random.Random(seed))
    one, other = Host(router, "198.18.0.1", answers, **first), Host(router, "198.18.0.2", answers)
    one.publish()
    other.publish()
    return one, other


def failing(times: int, then: Callable[..., Any]) -> tuple[Callable[..., Any], list[float]]:
    """A coroutine function that raises OepyError so many times, with the times at which it was called."""
    calls: list[float] = []

    async def call(*arguments: Any, **named: Any) -> Any:
        calls.append(asyncio.get_running_loop().time())
        if len(calls) <= times:
            raise OepyError("the datapath process did not start")
        return await then(*arguments, **named)

    return call, calls


def test_a_datapath_that_does_not_start_again_is_tried_until_it_does() -> None:
    """Not once: without it every peer that has a key would be out of reach until the admin comes."""

    async def main() -> None:
        one, other = pair_of_hosts()
        one.send_to(other)
        await asyncio.sleep(5)
        one.datapath.start, calls = failing(4, one.datapath.start)  # type: ignore[method-assign]
        one.core.on_datapath_event(DatapathEvent("failed", detail="killed"))
        await asyncio.sleep(120)
        assert len(calls) == 5
        assert one.named("datapath-restarted")
        assert not one.named("internal-error")
        one.send_to(other)
        await asyncio.sleep(5)
        assert one.verdict_for(other) is Verdict.PRIVATE

    run_virtual(main())


def test_a_datapath_that_dies_again_and_again_is_not_restarted_in_a_busy_loop() -> None:
    """Each process dies at once: within half a minute there are a few starts, not thousands."""

    async def main() -> None:
        one, _ = pair_of_hosts()
        starts = []

        async def start(on_event: Callable[[DatapathEvent], None]) -> None:
            starts.append(on_event)
            dying = DatapathEvent("failed", detail="killed")
            asyncio.get_running_loop().call_later(0.01, on_event, dying)

        one.datapath.start = start  # type: ignore[method-assign]
        one.core.on_datapath_event(DatapathEvent("failed", detail="killed"))
        await asyncio.sleep(30)
        assert 3 <= len(starts) <= 20
        await one.core.unwire(0.1)

    run_virtual(main())


@pytest.mark.parametrize(
    ("group", "verdict"),
    [(PolicyGroup.PRIVATE_OR_CLEAR, Verdict.CLEAR), (PolicyGroup.PRIVATE, Verdict.BLOCK)],
)
def test_a_datapath_that_refuses_every_pair_ends_by_the_table(group: PolicyGroup, verdict: Verdict) -> None:
    """private-or-clear goes on in the clear, private stays shut, and nothing negotiates for ever."""

    async def main() -> None:
        one, other = pair_of_hosts(group=group)
        one.datapath.install, calls = failing(1000, one.datapath.install)  # type: ignore[method-assign]
        one.send_to(other)
        await asyncio.sleep(4)
        assert one.verdict_for(other) is verdict
        assert len(calls) == 1
        if group is PolicyGroup.PRIVATE:
            assert Verdict.CLEAR not in [decided for _, decided in one.trap.history]

    run_virtual(main())


def test_the_look_at_the_traffic_survives_a_datapath_that_does_not_answer() -> None:
    """One failure must not end it silently for the daemon's life."""

    async def main() -> None:
        one, other = pair_of_hosts()
        one.send_to(other)
        await asyncio.sleep(5)

        async def counters(_: object = None) -> list[SaCounters]:
            return []

        one.datapath.counters, calls = failing(2, counters)  # type: ignore[method-assign]
        watching = asyncio.ensure_future(one.core.watch_traffic())
        await asyncio.sleep(45)
        assert len(calls) == 4
        assert not watching.done()
        watching.cancel()

    run_virtual(main())


def test_nothing_begins_while_the_daemon_stops() -> None:
    """The peer gets our Delete and its next packet comes at once: a tunnel made then would have one end."""

    async def main() -> None:
        one, other = pair_of_hosts()
        one.send_to(other)
        await asyncio.sleep(5)
        stopping = asyncio.ensure_future(one.core.unwire(1.5))
        await asyncio.sleep(0.015)  # the Delete is there, its answer is not
        other.send_to(one)
        one.send_to(other)
        await stopping
        one.crash()
        await asyncio.sleep(30)
        assert not other.datapath.pairs
        assert other.verdict_for(one) is Verdict.CLEAR

    run_virtual(main())


def test_a_flood_behind_a_waiting_step_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datagrams are lost rather than queued without end; IKE sends them again."""

    async def main() -> None:
        monkeypatch.setattr(core, "MAX_WAITING_STEPS", 50)
        one, _ = pair_of_hosts()
        one.core.steps.do(lambda: asyncio.sleep(60))
        for _ in range(1000):
            one.core._send([])
        assert len(one.core.steps) == 50

    run_virtual(main())


def test_a_mistake_in_the_engine_is_told_and_its_timers_go_on() -> None:
    """One entry's exception must not stop all the others."""

    async def main() -> None:
        one, other = pair_of_hosts()
        engine = one.core.engine
        handle, failed = engine.handle, []

        def broken(message: object, now: float) -> object:
            if not failed:
                failed.append(message)
                raise ValueError("a mistake")
            return handle(message, now)  # type: ignore[arg-type]

        engine.handle = broken  # type: ignore[method-assign, assignment]
        one.core._internal_error = lambda error: one.core.journal.add(  # type: ignore[method-assign]
            "internal-error", reason=str(error)
        )
        one.send_to(other)
        one.send_to(other)
        await asyncio.sleep(5)
        assert [event["reason"] for event in one.named("internal-error")] == ["a mistake"]
        assert one.verdict_for(other) is Verdict.PRIVATE

    run_virtual(main())


class SpoofingRouter(Router):
    """Delivers what `forger` sends, from an exchange on, as if it came from `victim`."""

    forger: IpAddress
    victim: IpAddress
    exchanges: tuple[Exchange, ...] = ()

    def _deliver(self, datagram: Datagram) -> None:
        if datagram.local.address == self.forger and datagram.data[18] in self.exchanges:
            datagram = dataclasses.replace(datagram, local=Endpoint(self.victim, datagram.local.port))
        super()._deliver(datagram)


@pytest.mark.parametrize("exchanges", [(), (Exchange.IKE_AUTH,)])
def test_a_null_peer_with_a_forged_source_never_speaks_for_another_address(
    exchanges: tuple[Exchange, ...],
) -> None:
    """It gets the answer to IKE_SA_INIT at its own address and forges the victim's from IKE_AUTH on: with a
    tunnel for the victim it would get (or blackhole) what we send there."""

    async def main() -> None:
        router = SpoofingRouter(random.Random(9))
        us, victim, forger = (Host(router, f"198.18.0.{n}", {}) for n in (1, 2, 3))
        us.publish()
        forger.answers.update(us.answers)
        router.forger, router.victim, router.exchanges = forger.address, victim.address, exchanges
        group = PolicyGroup.PRIVATE_OR_CLEAR
        forger.core.on_trapped(group, Flow(victim.address, us.address, 6, 40000, 80))
        await asyncio.sleep(20)
        assert not us.datapath.pairs
        assert us.verdict_for(victim) is None
        assert us.named("offer-refused")

    run_virtual(main())


def test_a_null_peer_is_not_followed_to_another_address() -> None:
    """An established NULL tunnel stays with its address, whatever source a later message has."""

    async def main() -> None:
        router = SpoofingRouter(random.Random(9))
        us, victim, forger = (Host(router, f"198.18.0.{n}", {}) for n in (1, 2, 3))
        us.publish()
        forger.answers.update(us.answers)
        forger.send_to(us)
        router.forger, router.victim = forger.address, victim.address
        await asyncio.sleep(5)
        (pair,) = us.datapath.pairs.values()
        router.exchanges = (Exchange.INFORMATIONAL, Exchange.CREATE_CHILD_SA)
        (spi,) = forger.datapath.pairs
        forger.core.negotiator.rekey(spi)
        await asyncio.sleep(5)
        assert {p.remote.address for p in us.datapath.pairs.values()} == {pair.remote.address}

    run_virtual(main())


def test_an_offer_whose_lookups_take_for_ever_is_refused() -> None:
    """Names of the peer's choice are looked up: it must not keep our questions running without end."""

    async def main() -> None:
        one, other = pair_of_hosts()

        async def slow(_: object) -> None:
            await asyncio.sleep(1000)

        other.core.negotiator._admissions.decide = slow  # type: ignore[method-assign, assignment]
        one.send_to(other)
        await asyncio.sleep(25)
        assert len(other.named("offer-refused")) >= 1
        assert not other.core.negotiator._tasks

    run_virtual(main())


def test_no_more_questions_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it peers are refused at once."""

    async def main() -> None:
        monkeypatch.setattr(negotiator, "MAX_QUESTIONS", 0)
        one, other = pair_of_hosts()
        one.send_to(other)
        await asyncio.sleep(5)
        assert not other.datapath.pairs
        assert not other.core.negotiator._tasks

    run_virtual(main())


def test_peers_that_cannot_read_our_signature_do_not_fill_the_log() -> None:
    """Any stranger can offer hashes that do not suit: one alert a minute."""

    async def main() -> None:
        one, _ = pair_of_hosts()
        for _number in range(1000):
            one.core.negotiator._sign(NeedSignature(1, 1, b"octets", frozenset({1})))
            await asyncio.sleep(0.1)
        assert len(one.named("cannot-sign")) == 1000
        assert len([event for event in one.named("cannot-sign") if event.get("alert")]) == 2

    run_virtual(main())


def test_calling_off_what_is_over_leaves_nothing_behind() -> None:
    """An attempt that is called off before its session begins never begins; a finished one costs no memory."""

    async def main() -> None:
        one, other = pair_of_hosts()
        one.send_to(other)
        await asyncio.sleep(5)
        one.core.negotiator.cancel(1)
        assert not one.core.negotiator._cancelled
        assert one.datapath.pairs
        gone = StartIke(77, other.address, other.address, (other.key.public,), one.address)
        one.core.negotiator.start(gone)
        one.core.negotiator.cancel(77)
        before = one.router.carried
        await asyncio.sleep(5)
        assert one.router.carried == before
        assert not one.core.negotiator._cancelled | one.core.negotiator._starting

    run_virtual(main())
