"""From a `SaPair` to what the kernel is to hold of it. No IO."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from oepy.errors import OepyError
from oepy.model import (
    MARK_MASK,
    MARK_OWN,
    MARK_PRIVATE,
    XFRM_IF_ID,
    IpAddress,
    Lifetime,
    Mark,
    SaKeys,
    SaPair,
)
from oepy.xfrm import values as v
from oepy.xfrm.algorithms import transforms
from oepy.xfrm.ids import TRAP_REQID, PolicyClass, priority
from oepy.xfrm.selectors import reverse, selectors

OUT, IN, FORWARD = v.PolicyDirection.OUT, v.PolicyDirection.IN, v.PolicyDirection.FORWARD
MAX_WINDOW = 4096
_DONT_ENCAP_DSCP = 1  # the inner DSCP is nobody else's business, and the userland datapath does the same
_OUTBOUND_MARK = Mark(MARK_OWN, MARK_MASK)  # what an SA has made is routed as our own, and not trapped
_ANYWHERE: dict[int, IpAddress] = {4: v.ANY_ADDRESS, 6: v.ANY_ADDRESS_6}
# Without ESN, 2^32 packets and no more (RFC 4303 §3.3.3); the rekey begins before
_LAST_PACKET, _SOFT_PACKET = 2**32 - 1, int(0.875 * 2**32)


@dataclass(frozen=True, slots=True)
class Scheme:
    """What makes a packet subject to our policies: it goes by the tunnel's device (`if_id`), it has the mark,
    or (bare) nothing but the policies' selectors."""

    name: str
    if_id: int = 0
    mark: Mark | None = None


BY_DEVICE = Scheme("interface", if_id=XFRM_IF_ID)
BY_MARK = Scheme("mark", mark=Mark(MARK_PRIVATE, MARK_MASK))
BARE = Scheme("bare")


def _by(if_id: int, scheme: Scheme) -> Scheme:
    """The administrator's interface, where the pair names one."""
    return Scheme("interface of the administrator's", if_id=if_id) if if_id else scheme


def sas(pair: SaPair, reqid: int, scheme: Scheme) -> tuple[v.Sa, v.Sa]:
    """The inbound and the outbound SA. Raises OepyError for what the kernel has not."""
    if pair.protocol not in v.PROTOCOLS:
        raise OepyError(f"protocol {pair.protocol!r} is not known", "esp or ah")
    if pair.local.address.version != pair.remote.address.version:
        raise OepyError(f"{pair.local} and {pair.remote} are of two families", "use two addresses of one")
    if pair.encap and pair.protocol == "ah":
        raise OepyError("AH does not pass a NAT (RFC 3948 §1)", "use ESP")
    inside = _inside(pair)
    inbound = _sa(pair, reqid, _by(pair.if_id_in, scheme), reverse(inside), pair.keys_in)
    outbound = _sa(pair, reqid, _by(pair.if_id_out, scheme), inside, pair.keys_out)
    window, esn = pair.replay_window, pair.suite.esn
    if window > MAX_WINDOW:
        raise OepyError(f"a replay window of {window} packets", f"at most {MAX_WINDOW}")
    # The old field has room for 32 packets, and none for ESN
    wide = v.Replay(max(window, 1)) if esn or window > 32 else None
    tunnel, copied = inbound.mode is v.Mode.TUNNEL, pair.copied
    no_ecn = v.SaFlag.NO_ECN if copied.ecn is False else v.SaFlag.NONE
    return (
        replace(
            inbound,
            source=pair.remote.address,
            destination=pair.local.address,
            spi=pair.spi_in,
            flags=inbound.flags | no_ecn | (v.SaFlag.DECAP_DSCP if copied.dscp_in else v.SaFlag.NONE),
            encapsulation=v.Encapsulation(pair.remote.port, pair.local.port) if pair.encap else None,
            replay=wide,
            replay_window=0 if wide else window,
            set_mark=pair.marks.set_inward,
        ),
        replace(
            outbound,
            encapsulation=v.Encapsulation(pair.local.port, pair.remote.port) if pair.encap else None,
            replay=v.Replay(1),  # the form in which the kernel shows the sequence number in full
            # By default no DF outside: where the path is narrower than the tunnel assumes, fragments arrive and
            # no packet falls into a hole
            flags=outbound.flags | no_ecn | (v.SaFlag.NONE if copied.df else v.SaFlag.NO_PMTU_DISCOVERY),
            set_mark=_OUTBOUND_MARK.joined(pair.marks.set_outward),
            extra_flags=_DONT_ENCAP_DSCP if tunnel and not copied.dscp_out else 0,
            tfc_padding=pair.tfc_padding if tunnel and pair.protocol == "esp" else 0,
        ),
    )


def _sa(pair: SaPair, reqid: int, scheme: Scheme, selector: v.Selector, keys: SaKeys) -> v.Sa:
    """What the two have in common, with the outbound one's addresses and SPI."""
    found = transforms(pair.protocol, pair.suite, keys)
    mode = mode_of(pair)
    flags = v.SaFlag.ESN if pair.suite.esn else v.SaFlag.NONE
    if pair.protocol == "ah" and pair.local.address.version == 4:
        flags |= v.SaFlag.ALIGN4  # as RFC 4302 §3.3.3.2.1 has it; without, the kernel pads as for IPv6
    if mode is v.Mode.TUNNEL:
        flags |= v.SaFlag.AF_UNSPEC  # both families inside, whatever the outer one is
    return v.Sa(
        pair.local.address,
        pair.remote.address,
        pair.spi_out,
        protocol=v.PROTOCOLS[pair.protocol],
        mode=mode,
        reqid=reqid,
        selector=selector,
        limits=limits_of(pair.lifetime, pair.suite.esn),
        encryption=found.encryption,
        integrity=found.integrity,
        aead=found.aead,
        flags=flags,
        if_id=scheme.if_id,
    )


def _inside(pair: SaPair) -> v.Selector:
    """The SA's own selector. Of a tunnel the policies see to what may be inside. In transport mode the kernel
    passes what no policy forbids, so that there the SA itself must."""
    if mode_of(pair) is v.Mode.TUNNEL:
        return v.EVERYTHING
    found = selectors(pair.local_ts, pair.remote_ts)
    if len(found) > 1:
        raise OepyError(
            "transport mode with several traffic selectors: the kernel's SA has one",
            "agree on one of each side, or on tunnel mode",
        )
    return found[0]


def mode_of(pair: SaPair) -> v.Mode:
    """Raises OepyError."""
    try:
        return {"tunnel": v.Mode.TUNNEL, "transport": v.Mode.TRANSPORT}[pair.mode]
    except KeyError:
        raise OepyError(f"mode {pair.mode!r} is not known", "tunnel or transport") from None


def class_of(pair: SaPair) -> int:
    if not pair.connection:
        return PolicyClass.OPPORTUNISTIC
    return PolicyClass.FIXED + pair.priority if pair.priority else PolicyClass.CONFIGURED


def inward_policies(pair: SaPair, reqid: int, scheme: Scheme) -> Iterator[v.Policy]:
    """What demands that packets of the peer's come by an SA of this reqid. The outer source is left open: it
    moves with a NAT's mapping and proves nothing (RFC 4303 §2.1 names an SA by its SPI); the reqid decides.

    A `fwd` policy is needed too where packets are for others; they are not where the selector is ourselves.
    """
    anywhere = _ANYWHERE[pair.local.address.version]
    template = v.Template(anywhere, anywhere, v.PROTOCOLS[pair.protocol], mode_of(pair), reqid)
    for outward in selectors(pair.local_ts, pair.remote_ts):
        selector = reverse(outward)
        for direction in (IN,) if _only(selector, pair.local.address) else (IN, FORWARD):
            yield _policy(pair, direction, selector, template, _by(pair.if_id_in, scheme))


def outward_policies(pair: SaPair, reqid: int, scheme: Scheme) -> Iterator[v.Policy]:
    """What sends packets by this very SA."""
    template = v.Template(
        pair.local.address,
        pair.remote.address,
        v.PROTOCOLS[pair.protocol],
        mode_of(pair),
        reqid,
        pair.spi_out,
    )
    for selector in selectors(pair.local_ts, pair.remote_ts):
        yield _policy(pair, OUT, selector, template, _by(pair.if_id_out, scheme))


def _policy(
    pair: SaPair, direction: v.PolicyDirection, selector: v.Selector, template: v.Template, scheme: Scheme
) -> v.Policy:
    wanted = pair.marks.outward if direction is OUT else pair.marks.inward
    outward = selector if direction is OUT else reverse(selector)  # both ways in one order
    return v.Policy(
        direction,
        selector,
        (template,),
        priority=priority(class_of(pair), outward, marked=wanted is not None),
        # Of the scheme's mark, only what we send knows
        mark=scheme.mark.joined(wanted) if direction is OUT and scheme.mark is not None else wanted,
        if_id=scheme.if_id,
    )


def _only(selector: v.Selector, address: IpAddress) -> bool:
    network = selector.destination
    return network.prefixlen == network.max_prefixlen and network.network_address == address


def limits_of(lifetime: Lifetime, esn: bool) -> v.Limits:
    """Whole seconds, rounded up."""
    soft, hard = lifetime.soft_packets, lifetime.hard_packets
    if not esn:
        soft = min(soft or _SOFT_PACKET, _SOFT_PACKET)
        hard = min(hard or _LAST_PACKET, _LAST_PACKET)
    return v.Limits(
        lifetime.soft_bytes,
        lifetime.hard_bytes,
        soft,
        hard,
        math.ceil(lifetime.soft_seconds),
        math.ceil(lifetime.hard_seconds),
    )


# ---- policies of nobody's SA -------------------------------------------------------------------------------


def closing_policies(scheme: Scheme, families: Iterable[v.Selector]) -> Iterator[v.Policy]:
    """Below all others: what no SA covers does not pass. Outward the kernel is to ask (ACQUIRE), and holds
    nothing for it; where we can say only by the mark what is ours, it drops. In the bare scheme all traffic is
    subject to our policies, and what no SA covers is the trap's."""
    if scheme == BARE:
        return
    for selector in families:
        for direction in (IN, FORWARD) if scheme.if_id else ():
            closed = v.Policy(
                direction,
                selector,
                action=v.PolicyAction.BLOCK,
                priority=priority(PolicyClass.CLOSED, selector),
                if_id=scheme.if_id,
            )
            yield closed
        yield asking_policy(selector, scheme)


def asking_policy(selector: v.Selector, scheme: Scheme) -> v.Policy:
    """A packet that it matches waits for an SA that never comes: it is dropped, and we are told of it. In
    transport mode the template takes the packet's own addresses."""
    anywhere = _ANYWHERE[selector.version]
    template = v.Template(anywhere, anywhere, v.ESP, v.Mode.TRANSPORT, TRAP_REQID)
    policy = v.Policy(OUT, selector, (template,), priority=priority(PolicyClass.TRAP, selector))
    return replace(policy, mark=scheme.mark, if_id=scheme.if_id)
