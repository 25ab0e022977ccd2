"""Manual entries in a kernel in memory: whose are touched, in which order, and what is taken back."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from oepy.datapath.xfrm.manual import ManualKernel, is_manual_policy, kernel_policy, kernel_sa, manual_sa
from oepy.errors import OepyError
from oepy.manual.checks import read_manual
from oepy.manual.model import NOTHING, ManualSet
from oepy.model import MARK_OWN
from oepy.netlink import Frame
from oepy.xfrm import pieces as p
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.ids import MANUAL_REQIDS, PolicyClass, class_start
from oepy.xfrm.socket import read
from tests.fakes import manual
from tests.fakes.manual_kernel import MemoryKernel

A, B = "192.0.2.1", "192.0.2.2"


def kernel() -> tuple[MemoryKernel, ManualKernel]:
    memory = MemoryKernel()
    return memory, ManualKernel(memory, lambda address: str(address) == A, bytes)


def read_set(section: dict[str, Any]) -> ManualSet:
    found, problems = read_manual(section, lambda _: b"")
    assert problems == []
    return found


SECTION = manual.section(A, B)


def test_what_is_made_is_found_again() -> None:
    """Keys, numbers and order survive the way into the kernel and back."""
    section = {
        "sas": [
            *manual.sas(
                A, B, reqid=7, replay_window=64, esn=True, lifetime={"soft_bytes": 5, "hard_seconds": 9}
            ),
            manual.sa(A, B, 0x3000, protocol="ah", encap=None, encryption=None, encryption_key=None),
        ],
        "policies": [
            *manual.policies(A, B, template={"reqid": 7}),
            {
                "direction": "fwd",
                "src": "2001:db8::/32",
                "dst": "::/0",
                "protocol": "tcp",
                "dport": 25,
                "action": "block",
            },
            {"direction": "out", "src": A, "dst": "192.0.2.53", "action": "bypass", "priority": 9},
            {
                "direction": "in",
                "src": B,
                "dst": A,
                "protocol": "udp",
                "template": {"protocol": "ah", "mode": "tunnel", "src": A, "dst": B, "level": "use"},
            },
        ],
    }
    wanted = read_set(section)
    memory, ours = kernel()
    ours.change(NOTHING, wanted)
    found = ours.current()
    assert sorted(found.sas, key=lambda sa: sa.spi) == sorted(wanted.sas, key=lambda sa: sa.spi)
    assert {policy.key: policy for policy in found.policies} == {
        policy.key: policy for policy in wanted.policies
    }
    assert len(memory.policies) == 5
    priorities = [
        policy.priority
        for body in memory.policies.values()
        if isinstance(policy := read(Frame(p.MSG_NEWPOLICY, 0, 0, body)), v.Policy)
    ]
    start, end = class_start(PolicyClass.MANUAL), class_start(PolicyClass.FIXED)
    assert all(start < priority < end for priority in priorities)


def test_nothing_of_others_is_changed() -> None:
    """Another program's SA and policy with our very selector are in the way, and stay."""
    memory, ours = kernel()
    wanted = read_set(SECTION)
    foreign_sa = requests.new_sa(v.Sa(ip_address(A), ip_address(B), 0x7777, reqid=4))
    selector = kernel_policy(wanted.policies[0], 0).selector
    foreign = requests.new_policy(
        v.Policy(v.PolicyDirection.OUT, selector, action=v.PolicyAction.BLOCK, index=9)
    )
    memory.carry_out([foreign_sa, foreign])
    with pytest.raises(OepyError, match="there is one already"):
        ours.change(NOTHING, wanted)
    assert (len(memory.sas), len(memory.policies)) == (1, 1)
    assert ours.current() == NOTHING
    ours.change(wanted, NOTHING)  # as a daemon would that believes them to be there
    assert (len(memory.sas), len(memory.policies)) == (1, 1)
    assert len(ours.sa_views(everybodys=True)) == 1


@pytest.mark.parametrize(("kind", "good"), [(p.MSG_NEWSA, 1), (p.MSG_NEWPOLICY, 0), (p.MSG_NEWPOLICY, 1)])
def test_a_refusal_takes_back_what_was_done(kind: int, good: int) -> None:
    """Nothing is half done: SAs and policies made before the refused one go again."""
    memory, ours = kernel()
    memory.refuse[kind] = good
    with pytest.raises(OepyError, match="the kernel refused it"):
        ours.change(NOTHING, read_set(SECTION))
    assert (memory.sas, memory.policies) == ({}, {})


def test_what_stays_is_not_touched() -> None:
    """Of two sets only the difference is carried out: new SAs first, then policies, then what goes."""
    memory, ours = kernel()
    old = read_set(SECTION)
    ours.change(NOTHING, old)
    memory.history.clear()
    more = manual.sas(A, B)
    more[0] = {**more[0], "spi": "0x5001"}
    new = read_set({"sas": more, "policies": [{**policy, "priority": 44} for policy in SECTION["policies"]]})
    ours.change(old, new)
    assert memory.history == [p.MSG_NEWSA, p.MSG_UPDPOLICY, p.MSG_UPDPOLICY, p.MSG_DELSA]
    assert ours.current().policies[0].priority == 44
    memory.history.clear()
    ours.change(new, new)
    assert memory.history == []


def test_numbers_tell_ours() -> None:
    """reqid and index lie in the range of manual keying, also for policies without a template."""
    memory, ours = kernel()
    block = [{"direction": way, "src": A, "dst": B, "action": "block"} for way in ("in", "out", "fwd")]
    ours.change(NOTHING, read_set({"policies": block}))
    policies = [read(Frame(p.MSG_NEWPOLICY, 0, 0, body)) for body in memory.policies.values()]
    assert all(isinstance(policy, v.Policy) and is_manual_policy(policy) for policy in policies)
    assert [policy.index & 7 for policy in policies if isinstance(policy, v.Policy)] == [0, 1, 2]
    sa = kernel_sa(read_set({"sas": manual.sas(A, B, reqid=3)}).sas[0], outbound=True)
    assert sa.reqid == MANUAL_REQIDS.start + 3
    assert sa.set_mark is not None
    assert sa.set_mark.value == MARK_OWN
    assert manual_sa(sa).reqid == 3


def test_level_use_of_an_outbound_tunnel_is_refused_beforehand() -> None:
    """The kernel takes it for transport mode only, and says no more than EINVAL."""
    memory, ours = kernel()
    with pytest.raises(OepyError, match="write level require"):
        ours.change(
            NOTHING,
            read_set({"sas": manual.sas(A, B), "policies": manual.policies(A, B, template={"level": "use"})}),
        )
    assert memory.history == []
