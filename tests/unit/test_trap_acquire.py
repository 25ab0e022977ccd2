"""The kernel's own trap, over a kernel in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ipaddress import ip_address, ip_network

import pytest

from oepy.errors import MisuseError, OepyError
from oepy.interfaces import PolicyRule, TrapPolicy
from oepy.model import Flow, PolicyGroup, Verdict
from oepy.trap import acquire_plan as plan
from oepy.trap.acquire import AcquireTrap
from oepy.xfrm import values as v
from oepy.xfrm.ids import ASK_REQID, PolicyClass, priority
from tests.fakes.xfrm import FakeEvents, FakeKernel

GROUP = PolicyGroup
B = ip_address("198.18.0.2")
PRIVATE_HOST = ip_address("203.0.113.7")


def policy(*rules: tuple[PolicyGroup, str], default: PolicyGroup = GROUP.PRIVATE_OR_CLEAR) -> TrapPolicy:
    made = tuple(PolicyRule(group, ip_network(network)) for group, network in rules)
    return TrapPolicy(made, default, (ip_address("198.18.0.53"),))


class Made:
    """A trap over fakes; `asked` is what it has asked the engine."""

    def __init__(self) -> None:
        self.kernel, self.events = FakeKernel(), FakeEvents()
        self.sysctls: dict[str, int] = {"net/core/xfrm_larval_drop": 1, "net/core/xfrm_acq_expires": 30}
        self.asked: list[tuple[PolicyGroup, Flow]] = []
        self.trap = AcquireTrap(
            open_xfrm=lambda: self.kernel,
            open_events=lambda _groups: self.events,  # type: ignore[arg-type,return-value]
            write_sysctls=self._write,
        )

    def _write(self, values: Mapping[str, int]) -> dict[str, int]:
        before = {name: self.sysctls[name] for name in values}
        self.sysctls.update(values)
        return before

    def start(self, chosen: TrapPolicy) -> None:
        self.trap.start(chosen, lambda group, flow: self.asked.append((group, flow)))

    def out(self, destination: str) -> list[v.Policy]:
        """Outward policies for this very prefix, the first that the kernel takes first."""
        found = [
            item
            for item in self.kernel.policies.values()
            if item.direction is v.PolicyDirection.OUT
            and item.selector.destination == ip_network(destination)
            and not item.selector.protocol
        ]
        return sorted(found, key=lambda item: item.priority)

    async def acquire(self, destination: str, source: str = "198.18.0.1") -> None:
        asking = next(
            item
            for item in self.kernel.policies.values()
            if plan.asks(item) and self._covers(item, destination)
        )
        selector = v.Selector(ip_network(source), ip_network(destination), 17, (1025, 0xFFFF), (0, 0xFFFF))
        event = v.Acquire(ip_address(source), ip_address(destination), 50, selector, asking, 1)
        self.events.send(event)
        await asyncio.sleep(0.01)

    @staticmethod
    def _covers(item: v.Policy, destination: str) -> bool:
        address = ip_address(destination)
        network = item.selector.destination
        return network.version == address.version and address in network


@pytest.fixture
def made() -> Made:
    return Made()


async def test_a_first_packet_is_asked_about_once_and_without_its_false_ports(made: Made) -> None:
    """Two ACQUIREs of one destination are one question; ports of an ACQUIRE are not passed on."""
    made.start(policy())
    await made.acquire(str(B))
    await made.acquire(str(B))
    assert made.asked == [(GROUP.PRIVATE_OR_CLEAR, Flow(ip_address("198.18.0.1"), B, 17))]
    assert made.trap.held() == {(GROUP.PRIVATE_OR_CLEAR, B): 1}


async def test_clear_is_a_policy_that_runs_out_and_held_packets_look_again(made: Made) -> None:
    """CLEAR lets the destination pass before the asking policy, for its lifetime; that one is then replaced."""
    made.start(policy())
    await made.acquire(str(B))
    made.trap.decide(GROUP.PRIVATE_OR_CLEAR, B, Verdict.CLEAR, 59.2)
    (decided,) = made.out(f"{B}/32")
    assert (decided.action, decided.templates, decided.limits.hard_seconds) == (v.PolicyAction.ALLOW, (), 60)
    assert decided.priority < made.out("0.0.0.0/0")[0].priority
    before = len(made.kernel.asked)
    made.trap.commit()
    assert len(made.kernel.asked) == before + 1
    assert made.trap.held() == {}


async def test_private_leaves_the_way_to_the_policies_of_the_sas(made: Made) -> None:
    """PRIVATE removes what was decided before; an ACQUIRE for it later is not asked again."""
    made.start(policy())
    made.trap.decide(GROUP.PRIVATE_OR_CLEAR, B, Verdict.CLEAR, 60)
    made.trap.decide(GROUP.PRIVATE_OR_CLEAR, B, Verdict.PRIVATE, None)
    assert made.out(f"{B}/32") == []
    await made.acquire(str(B), source="198.18.0.9")
    assert made.asked == []


async def test_block_and_forget(made: Made) -> None:
    """BLOCK drops; forgotten, the destination is asked about again."""
    made.start(policy())
    made.trap.decide(GROUP.PRIVATE_OR_CLEAR, B, Verdict.BLOCK, 60)
    assert made.out(f"{B}/32")[0].action is v.PolicyAction.BLOCK
    made.trap.forget([(GROUP.PRIVATE_OR_CLEAR, B)])
    assert made.out(f"{B}/32") == []
    await made.acquire(str(B))
    assert len(made.asked) == 1


async def test_what_fails_closed_does_not_run_out_and_is_shut_inward(made: Made) -> None:
    """A killed daemon locks nobody out of the rest, and opens nothing of `private`."""
    made.start(policy((GROUP.PRIVATE, "203.0.113.0/24")))
    private, rest = made.out("203.0.113.0/24")[0], made.out("0.0.0.0/0")[0]
    assert (private.limits.hard_seconds, rest.limits.hard_seconds) == (0, plan.OPEN_SECONDS)
    assert private.priority < rest.priority
    for direction in (v.PolicyDirection.IN, v.PolicyDirection.FORWARD):
        inward = [
            item
            for item in made.kernel.policies.values()
            if item.direction is direction and item.selector.source == ip_network("203.0.113.0/24")
        ]
        assert [item.action for item in inward] == [v.PolicyAction.BLOCK]


async def test_private_never_goes_in_the_clear(made: Made) -> None:
    """A decision that would open `private` is refused as our own mistake."""
    made.start(policy((GROUP.PRIVATE, "203.0.113.0/24")))
    with pytest.raises(MisuseError):
        made.trap.decide(GROUP.PRIVATE, PRIVATE_HOST, Verdict.CLEAR, 60)


async def test_rules_for_single_ports_are_refused(made: Made) -> None:
    """It cannot serve them, says so, and leaves nothing behind."""
    rules = (PolicyRule(GROUP.CLEAR, ip_network("0.0.0.0/0"), 6, 22),)
    with pytest.raises(OepyError, match="trap: nfqueue"):
        made.start(TrapPolicy(rules, GROUP.PRIVATE_OR_CLEAR, ()))
    assert made.kernel.policies == {}
    assert made.sysctls["net/core/xfrm_larval_drop"] == 1


async def test_stop_leaves_nothing_or_the_guard(made: Made) -> None:
    """Without guard all is as before; with it, what fails closed is dropped, and the rest passes."""
    foreign = v.Policy(v.PolicyDirection.OUT, v.Selector(v.ANY_NETWORK, ip_network("10.0.0.0/8")), priority=7)
    made.kernel.policies[foreign.id] = foreign
    made.start(policy((GROUP.PRIVATE, "203.0.113.0/24")))
    assert made.sysctls["net/core/xfrm_larval_drop"] == 0
    made.trap.stop(guard=True)
    assert made.sysctls == {"net/core/xfrm_larval_drop": 1, "net/core/xfrm_acq_expires": 30}
    assert made.out("203.0.113.0/24")[0].action is v.PolicyAction.BLOCK
    assert made.out("0.0.0.0/0")[0].action is v.PolicyAction.ALLOW
    made.events = FakeEvents()
    made.start(policy())
    made.trap.stop(guard=False)
    assert list(made.kernel.policies.values()) == [foreign]


async def test_a_reload_keeps_what_is_decided_and_still_true(made: Made) -> None:
    """Only decisions whose destination has changed its group are forgotten."""
    made.start(policy())
    for address in (B, PRIVATE_HOST):
        made.trap.decide(GROUP.PRIVATE_OR_CLEAR, address, Verdict.CLEAR, 60)
    made.trap.reload(policy((GROUP.PRIVATE, "203.0.113.0/24")))
    assert made.out(f"{B}/32") != []
    assert made.out(f"{PRIVATE_HOST}/32") == []
    made.trap.reload(policy())
    assert made.out("203.0.113.0/24") == []


def test_neighbour_discovery_dns_and_sas_come_before_what_asks() -> None:
    """The order of the classes is the order of safety."""
    chosen = policy((GROUP.PRIVATE, "::/0"), (GROUP.PRIVATE, "0.0.0.0/0"))
    made = list(plan.policies(chosen))
    asking = [item for item in made if plan.asks(item)]
    assert {template.reqid for item in asking for template in item.templates} == {ASK_REQID}
    sa = priority(PolicyClass.OPPORTUNISTIC, v.Selector(v.ANY_NETWORK, ip_network("198.18.0.2/32")))
    exempt = [item for item in made if item.selector.protocol]
    assert max(item.priority for item in exempt) < sa < min(item.priority for item in asking)
    discovery = [item for item in made if item.selector.protocol == 58]
    assert {item.direction for item in discovery} == set(v.PolicyDirection)
    assert {item.selector.source_port for item in discovery} == {(n, 0xFFFF) for n in range(133, 138)}
