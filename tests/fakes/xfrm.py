"""The kernel's side of XFRM: what only the kernel sends."""

from __future__ import annotations

from oepy.datapath.xfrm import pieces as p
from oepy.datapath.xfrm import requests
from oepy.datapath.xfrm import values as v


def expire_body(sa: v.Sa, hard: bool) -> bytes:
    return requests.sa_body(sa, bytes((hard,)) + bytes(7))


def policy_expire_body(policy: v.Policy, hard: bool) -> bytes:
    whole = requests.policy_body(policy)
    return whole[: p.POLICY.size] + bytes((hard,)) + bytes(7) + whole[p.POLICY.size :]


def acquire_body(acquire: v.Acquire) -> bytes:
    whole = requests.policy_body(acquire.policy)
    head = p.ACQUIRE.pack(
        p.ID.pack(acquire.destination.packed, bytes(4), acquire.protocol),
        acquire.source.packed,
        p.build_selector(acquire.selector),
        whole[: p.POLICY.size],
        *(p.ALL_ALGORITHMS,) * 3,
        acquire.sequence,
    )
    return head + whole[p.POLICY.size :]


def mapping_body(mapping: v.Mapping) -> bytes:
    identity = requests.delete_sa(mapping.id).body[: p.SA_ID.size]
    ports = p.TWO_PORTS.pack(mapping.old_port, mapping.new_port)
    return p.MAPPING.pack(
        identity, mapping.reqid, mapping.old_source.packed, mapping.new_source.packed, ports
    )
