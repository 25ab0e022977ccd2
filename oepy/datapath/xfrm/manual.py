"""Manual SAs and policies in the kernel: what was made by hand is told by its numbers, and nothing else is touched.

An SA is ours by its reqid (ids.MANUAL_REQIDS: ours plus the one that the user gave), a policy by its index, which
lies in the same range. The kernel's priority is that of the class of configured policies plus the user's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from oepy.errors import OepyError
from oepy.manual.model import (
    MAX_PRIORITY,
    MIN_PRIORITY,
    Encap,
    ManualPolicy,
    ManualSa,
    ManualSet,
    SaKey,
    Selector,
    Template,
)
from oepy.manual.presenting import policy_mapping, sa_view
from oepy.model import MARK_MASK, MARK_OWN, EspSuite, IpAddress, Lifetime, Mark, SaKeys, Secret
from oepy.xfrm import pieces as p
from oepy.xfrm import values as v
from oepy.xfrm.algorithms import CIPHERS, MACS, transforms
from oepy.xfrm.ids import MANUAL_REQIDS, PolicyClass, class_start
from oepy.xfrm.requests import (
    Request,
    delete_policy,
    delete_sa,
    dump_policies,
    dump_sas,
    new_policy,
    new_sa,
    update_policy,
)
from oepy.xfrm.socket import Refused, Xfrm, explained, read

_DIRECTIONS = {
    "in": v.PolicyDirection.IN,
    "out": v.PolicyDirection.OUT,
    "fwd": v.PolicyDirection.FORWARD,
}
_DIRECTION_NAMES = {direction: name for name, direction in _DIRECTIONS.items()}
_PROTOCOL_NAMES = {number: name for name, number in v.PROTOCOLS.items()}
_MODES = {"tunnel": v.Mode.TUNNEL, "transport": v.Mode.TRANSPORT}
_LEGACY_WINDOW = 32  # beyond it, and with ESN, the window is an attribute of its own
_ANY_PORT_MASK = 0xFFFF
_INDEX_STEP = 8  # the kernel keeps the direction in the lowest three bits of an index
_PRIORITIES = class_start(PolicyClass.MANUAL)

PolicyKey = tuple[str, Selector]


class ManualKernel:
    """The manual part of the kernel's SAD and SPD. Whatever the kernel refuses is an OepyError with the mend."""

    def __init__(
        self,
        xfrm: Xfrm,
        is_own: Callable[[IpAddress], bool],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """`is_own`: whether an address is this host's, which makes an SA from it an outbound one."""
        self._xfrm = xfrm
        self._is_own = is_own
        self._random = random

    # ---- looking -------------------------------------------------------------------------------------------

    def _sas(self) -> Iterator[v.Sa]:
        with _told():
            for frame in self._xfrm.dump(dump_sas()):
                answer = read(frame)
                if isinstance(answer, v.Sa):
                    yield answer

    def _policies(self) -> Iterator[v.Policy]:
        with _told():
            for frame in self._xfrm.dump(dump_policies()):
                answer = read(frame)
                # Of a socket's own policies the directions are others, and no user asks for them
                if isinstance(answer, v.Policy) and answer.direction in _DIRECTION_NAMES:
                    yield answer

    def current(self) -> ManualSet:
        """What is there by hand, keys included."""
        sas = tuple(manual_sa(sa) for sa in self._sas() if is_manual_sa(sa))
        policies = sorted(filter(is_manual_policy, self._policies()), key=lambda policy: policy.priority)
        return ManualSet(sas, tuple(manual_policy(policy) for policy in policies))

    def sa_views(self, *, everybodys: bool) -> list[dict[str, Any]]:
        """For `oepy sa list`, without keys. Everybody's: those of other programs and of IKE, too."""
        return [kernel_sa_view(sa) for sa in self._sas() if everybodys or is_manual_sa(sa)]

    def policy_views(self, *, everybodys: bool) -> list[dict[str, Any]]:
        """For `oepy policy list`, in the order in which the kernel looks."""
        chosen = [policy for policy in self._policies() if everybodys or is_manual_policy(policy)]
        return [
            kernel_policy_view(policy)
            for policy in sorted(chosen, key=lambda policy: (policy.direction, policy.priority))
        ]

    # ---- changing ------------------------------------------------------------------------------------------

    def change(self, old: ManualSet, new: ManualSet) -> None:
        """From `old`, which is in the kernel, to `new`: first what is added, so that nothing goes in the clear
        that both protect. What is in both stays as it is, its sequence numbers too. Raises OepyError where the
        kernel refuses something; then all is as before, but for an SA that was to get other keys."""
        there, wanted_sas = ({sa.key: sa for sa in manual.sas} for manual in (old, new))
        gone = [sa for key, sa in there.items() if wanted_sas.get(key) != sa]
        fresh = [sa for key, sa in wanted_sas.items() if there.get(key) != sa]
        replaced = [sa for sa in gone if sa.key in wanted_sas]
        before = {policy.key: policy for policy in old.policies}
        changed = [policy for policy in new.policies if before.get(policy.key) != policy]
        after = {policy.key for policy in new.policies}
        self.check(ManualSet(policies=tuple(changed)))
        done: list[Request] = []  # what takes back what was done
        try:
            self._all([delete_sa(_sa_id(sa.key)) for sa in replaced], [], done)
            self._all(
                [new_sa(kernel_sa(sa, outbound=self._is_own(sa.src))) for sa in fresh],
                [delete_sa(_sa_id(s.key)) for s in fresh],
                done,
            )
            indexes = self._free_indexes(len(changed))
            for policy, index in zip(changed, indexes, strict=True):
                known = before.get(policy.key)
                wanted = kernel_policy(policy, index)
                back = (
                    delete_policy(wanted.id) if known is None else update_policy(kernel_policy(known, index))
                )
                make = new_policy(wanted) if known is None else update_policy(wanted)
                self._all([make], [back], done)
        except OepyError:
            self._xfrm.carry_out(done[::-1])
            raise
        self._remove([policy.key for policy in old.policies if policy.key not in after])
        self._all([delete_sa(_sa_id(sa.key)) for sa in gone if sa.key not in wanted_sas], [], [])

    def _all(self, requests: Sequence[Request], back: Sequence[Request], done: list[Request]) -> None:
        """Carry out each; `back` undoes the one of the same place. Raises for the first that is refused."""
        outcome = self._xfrm.carry_out(requests)
        done += [undo for undo, refused in zip(back, outcome, strict=False) if refused is None]
        for refused in outcome:
            if refused is not None and not _already_gone(refused):
                raise explained(refused)

    def check(self, manual: ManualSet) -> None:
        """Raises OepyError for policies that the kernel is known to refuse."""
        for policy in manual.policies:
            for template in policy.templates:
                if (policy.direction, template.level, template.mode) == ("out", "use", "tunnel"):
                    raise OepyError(
                        f"{policy}: the kernel knows level use outward in transport mode only",
                        "write level require",
                    )

    def _free_indexes(self, count: int) -> list[int]:
        """For policies that are new. The lowest bits are still to be filled with the direction."""
        if not count:
            return []
        used = {policy.index // _INDEX_STEP for policy in self._policies()}
        first, places = MANUAL_REQIDS.start // _INDEX_STEP, len(MANUAL_REQIDS) // _INDEX_STEP
        found: list[int] = []
        candidate = int.from_bytes(self._random(4), "big")
        while len(found) < count:
            candidate += 1
            number = first + candidate % places
            if number not in used:
                found.append(number * _INDEX_STEP)
        return found

    def _remove(self, keys: Sequence[PolicyKey]) -> None:
        """Policies of ours alone: the kernel's key would find another program's as well."""
        if not keys:
            return
        wanted = set(keys)
        ours = [
            found.id for found in self._policies() if is_manual_policy(found) and _key_of(found) in wanted
        ]
        self._all([delete_policy(found) for found in ours], [], [])


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise explained(refused) from None


def _already_gone(refused: Refused) -> bool:
    """A hard limit may have been quicker than we."""
    deletion = refused.request.kind in (p.MSG_DELSA, p.MSG_DELPOLICY)
    return deletion and refused.errno in (errno.ESRCH, errno.ENOENT)


# ---- ours or not -------------------------------------------------------------------------------------------


def is_manual_sa(sa: v.Sa) -> bool:
    return sa.reqid in MANUAL_REQIDS


def is_manual_policy(policy: v.Policy) -> bool:
    return policy.index in MANUAL_REQIDS


# ---- to the kernel -----------------------------------------------------------------------------------------


def kernel_sa(sa: ManualSa, *, outbound: bool) -> v.Sa:
    """Raises OepyError for what the kernel has not. What an outbound SA has made is marked as our own, so that a
    trap lets it pass."""
    keys = SaKeys(sa.encryption_key, sa.integrity_key)
    chosen = transforms(sa.protocol, EspSuite(sa.encryption, sa.integrity, sa.esn), keys)
    wide = sa.esn or sa.replay_window > _LEGACY_WINDOW
    flags = v.SaFlag.ESN if sa.esn else v.SaFlag.NONE
    if sa.mode == "tunnel":
        flags |= v.SaFlag.AF_UNSPEC  # both families inside
    limits = sa.lifetime
    return v.Sa(
        source=sa.src,
        destination=sa.dst,
        spi=sa.spi,
        protocol=v.PROTOCOLS[sa.protocol],
        mode=_MODES[sa.mode],
        reqid=MANUAL_REQIDS.start + sa.reqid,
        limits=v.Limits(
            limits.soft_bytes,
            limits.hard_bytes,
            limits.soft_packets,
            limits.hard_packets,
            int(limits.soft_seconds),
            int(limits.hard_seconds),
        ),
        encryption=chosen.encryption,
        integrity=chosen.integrity,
        aead=chosen.aead,
        encapsulation=None
        if sa.encap is None
        else v.Encapsulation(sa.encap.source_port, sa.encap.destination_port),
        replay=v.Replay(sa.replay_window) if wide else None,
        replay_window=0 if wide else sa.replay_window,
        flags=flags,
        set_mark=Mark(MARK_OWN, MARK_MASK) if outbound else None,
    )


def kernel_selector(selector: Selector) -> v.Selector:
    source_port, destination_port = (
        (port, _ANY_PORT_MASK) if port else v.ANY_PORT for port in (selector.sport, selector.dport)
    )
    return v.Selector(selector.src, selector.dst, selector.protocol, source_port, destination_port)


def kernel_policy(policy: ManualPolicy, index: int) -> v.Policy:
    direction = _DIRECTIONS[policy.direction]
    return v.Policy(
        direction=direction,
        selector=kernel_selector(policy.selector),
        templates=tuple(_kernel_template(item, policy.selector.version) for item in policy.templates),
        action=v.PolicyAction.BLOCK if policy.action == "block" else v.PolicyAction.ALLOW,
        priority=_PRIORITIES + policy.priority,
        index=index + direction,
    )


def _kernel_template(template: Template, version: int) -> v.Template:
    nowhere = IPv4Address(0) if version == 4 else IPv6Address(0)
    return v.Template(
        source=template.src or nowhere,
        destination=template.dst or nowhere,
        protocol=v.PROTOCOLS[template.protocol],
        mode=_MODES[template.mode],
        reqid=MANUAL_REQIDS.start + template.reqid,
        spi=template.spi,
        optional=template.level == "use",
    )


def _sa_id(key: SaKey) -> v.SaId:
    destination, protocol, spi = key
    return v.SaId(destination, spi, v.PROTOCOLS[protocol])


# ---- from the kernel ---------------------------------------------------------------------------------------


def manual_sa(sa: v.Sa) -> ManualSa:
    """The mirror of `kernel_sa`, for one of ours."""
    encryption, encryption_key = _cipher(sa)
    limits = sa.limits
    window = sa.replay.window if sa.replay is not None else sa.replay_window
    return ManualSa(
        src=sa.source,
        dst=sa.destination,
        protocol=_PROTOCOL_NAMES[sa.protocol],
        spi=sa.spi,
        mode=sa.mode.name.lower(),
        encryption=encryption,
        encryption_key=encryption_key,
        integrity=_mac(sa),
        integrity_key=sa.integrity.key if sa.integrity is not None else Secret(b""),
        reqid=sa.reqid - MANUAL_REQIDS.start if is_manual_sa(sa) else sa.reqid,
        encap=None
        if sa.encapsulation is None
        else Encap(sa.encapsulation.source_port, sa.encapsulation.destination_port),
        replay_window=window,
        esn=bool(sa.flags & v.SaFlag.ESN),
        lifetime=Lifetime(
            limits.soft_seconds,
            limits.hard_seconds,
            limits.soft_bytes,
            limits.hard_bytes,
            limits.soft_packets,
            limits.hard_packets,
        ),
    )


def _cipher(sa: v.Sa) -> tuple[str, Secret]:
    """Our name, or the kernel's where we have none."""
    found = sa.aead or sa.encryption
    if found is None:
        return "", Secret(b"")
    for name, cipher in CIPHERS.items():
        if (cipher.kernel, cipher.key + cipher.salt) == (found.name, len(found.key)):
            return name, found.key
    return found.name, found.key


def _mac(sa: v.Sa) -> str:
    found = sa.integrity
    if found is None:
        return ""
    for name, mac in MACS.items():
        if (mac.kernel, mac.key, mac.icv_bits) == (found.name, len(found.key), found.icv_bits):
            return name
    return found.name


def manual_policy(policy: v.Policy) -> ManualPolicy:
    """The mirror of `kernel_policy`; of another program's policy what our words can say of it."""
    ours = is_manual_policy(policy)
    action = "block" if policy.action is v.PolicyAction.BLOCK else "ipsec" if policy.templates else "bypass"
    priority = policy.priority - _PRIORITIES if ours else policy.priority
    return ManualPolicy(
        direction=_DIRECTION_NAMES[policy.direction],
        selector=_selector(policy.selector),
        action=action,
        templates=tuple(_template(item, ours=ours) for item in policy.templates),
        priority=min(max(priority, MIN_PRIORITY), MAX_PRIORITY) if ours else priority,
    )


def _selector(selector: v.Selector) -> Selector:
    return Selector(
        selector.source,
        selector.destination,
        selector.protocol,
        selector.source_port[0],
        selector.destination_port[0],
    )


def _template(template: v.Template, *, ours: bool) -> Template:
    anywhere = int(template.destination) == 0
    return Template(
        protocol=_PROTOCOL_NAMES.get(template.protocol, str(template.protocol)),
        mode=template.mode.name.lower(),
        src=None if anywhere else template.source,
        dst=None if anywhere else template.destination,
        level="use" if template.optional else "require",
        reqid=template.reqid - MANUAL_REQIDS.start if ours else template.reqid,
        spi=template.spi,
    )


def _key_of(policy: v.Policy) -> PolicyKey:
    return (_DIRECTION_NAMES[policy.direction], _selector(policy.selector))


def kernel_sa_view(sa: v.Sa) -> dict[str, Any]:
    """An SA of anybody's, without keys, with what the kernel has counted."""
    view = sa_view(manual_sa(sa)) if sa.protocol in _PROTOCOL_NAMES else {"dst": str(sa.destination)}
    return view | {
        "manual": is_manual_sa(sa),
        "bytes": sa.usage.bytes,
        "packets": sa.usage.packets,
        "added": sa.usage.added,
        "replayed": sa.replayed + sa.out_of_window,
        "integrity_failures": sa.integrity_failed,
    }


def kernel_policy_view(policy: v.Policy) -> dict[str, Any]:
    return policy_mapping(manual_policy(policy)) | {"manual": is_manual_policy(policy)}
