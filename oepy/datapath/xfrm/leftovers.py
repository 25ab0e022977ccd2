"""What an earlier run has left in the kernel: SAs and policies outlive whoever made them."""

from __future__ import annotations

import contextlib

from oepy.datapath.xfrm import device
from oepy.errors import OepyError
from oepy.model import XFRM_IF_ID
from oepy.xfrm import requests
from oepy.xfrm import values as v
from oepy.xfrm.answers import counted
from oepy.xfrm.ids import AUTOMATIC_REQIDS, QUESTION_REQIDS, TRAP_REQID
from oepy.xfrm.socket import Xfrm, XfrmSocket, read


def asks(policy: v.Policy) -> bool:
    """Whether it is one that tells us of packets without an SA."""
    return any(template.reqid in QUESTION_REQIDS for template in policy.templates)


def _is_ours(policy: v.Policy) -> bool:
    return policy.if_id == XFRM_IF_ID or any(
        template.reqid == TRAP_REQID or template.reqid in AUTOMATIC_REQIDS for template in policy.templates
    )


def remove_entries(kernel: Xfrm) -> None:
    """All SAs and policies that a datapath of ours has made, known by reqid and if_id. Raises OepyError."""
    policies = [
        found.id
        for frame in kernel.dump(requests.dump_policies())
        if isinstance(found := read(frame), v.Policy) and _is_ours(found)
    ]
    kernel.carry_out([requests.delete_policy(name) for name in policies])
    sas = [
        found.id
        for frame in kernel.dump(requests.dump_sas())
        # An SA of SPI 0 waits for an ACQUIRE's answer: nothing but time removes it alone
        if (told := counted(frame)).reqid in AUTOMATIC_REQIDS
        and told.spi
        and isinstance(found := read(frame), v.Sa)
    ]
    kernel.carry_out([requests.delete_sa(name) for name in sas])


def remove_all(device_name: str) -> None:
    """Entries and device, for a datapath that has no use for them. Nothing where the kernel has no IPsec."""
    with contextlib.suppress(OepyError):
        kernel = XfrmSocket()
        try:
            remove_entries(kernel)
        finally:
            kernel.close()
        device.remove(device_name)
