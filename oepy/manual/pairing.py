"""Manual SAs and policies as the userland datapath takes them: pairs of SAs with selectors.

Theory of operation. An outbound policy and the inbound one with the same selector the other way round belong
together. Their templates name SAs; outbound and inbound ones make pairs in the order in which they were given.
Policies with the same SAs share a pair, whose selectors are those of all of them. What has no counterpart, or the
userland datapath has not, is said, and not left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from oepy.interfaces import ConfiguredRule, Way
from oepy.manual.algorithms import AEADS, CIPHERS, MACS
from oepy.manual.model import ManualPolicy, ManualSa, ManualSet, SaIndex, SaKey, Selector, Template
from oepy.manual.reading import Problem
from oepy.model import (
    NAT_T_PORT,
    Authenticated,
    Endpoint,
    EspSuite,
    PeerIdentity,
    SaKeys,
    SaPair,
    TrafficSelector,
    Verdict,
)

CONNECTION = "manual"  # SaPair.connection of all of them
_WAYS = {"out": Way.OUT, "in": Way.IN, "fwd": Way.FORWARD}


@dataclass(slots=True)
class Pairing:
    """`waiting` says why an SA is not in use, `incomplete` which policies have no counterpart yet (commands give
    them one after the other), `problems` why the set cannot be served at all."""

    pairs: list[SaPair] = field(default_factory=list)
    waiting: dict[SaKey, str] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Association:
    outs: list[ManualSa]
    ins: list[ManualSa]
    selectors: list[Selector]


def pair_up(manual: ManualSet) -> Pairing:
    """Never raises."""
    made = Pairing()
    for sa in manual.sas:
        made.problems += [f"{sa}: {text}" for text in _not_in_userland(sa)]
    associations = _associations(manual, made)
    used: set[SaKey] = set()
    for association in associations:
        _check_product(association, made.problems)
        for out, back in zip(association.outs, association.ins, strict=False):
            if out.key in used or back.key in used:
                made.problems.append(
                    f"{out} is in use by policies that want different SAs; give each its own reqid"
                )
                continue
            used |= {out.key, back.key}
            differing = _differences(out, back)
            if differing:
                made.problems.append(
                    f"{out} and {back} differ in {differing}; in userland both must be alike"
                )
                continue
            made.pairs.append(_sa_pair(out, back, association.selectors))
    for sa in manual.sas:
        if sa.key not in used:
            made.waiting[sa.key] = "waits for a policy and for the SA of the other direction"
    return made


def userland_problems(manual: ManualSet) -> list[Problem]:
    """What of a whole configuration the userland datapath cannot serve, as far as possible with the place."""
    problems = [
        Problem(("sas", index), text) for index, sa in enumerate(manual.sas) for text in _not_in_userland(sa)
    ]
    made = pair_up(manual)
    problems += [Problem(("policies",), text) for text in made.incomplete]
    return problems or [Problem((), text) for text in made.problems]


def _not_in_userland(sa: ManualSa) -> Iterable[str]:
    if sa.protocol != "esp":
        yield "AH is in the kernel only; take `datapath: xfrm`, or ESP with encryption null"
        return
    if sa.encap is None:
        yield "the userland datapath sends ESP in UDP only; add encap with both ports, 4500 and 4500"
    for table, name in ((CIPHERS, sa.encryption), (AEADS, sa.encryption), (MACS, sa.integrity)):
        if name in table and not table[name].userland:
            yield f"{name} is in the kernel only; take `datapath: xfrm`, or another algorithm"


def _associations(manual: ManualSet, made: Pairing) -> list[_Association]:
    sas = SaIndex(manual.sas)
    outward = {
        policy.selector for policy in manual.policies if (policy.direction, policy.action) == ("out", "ipsec")
    }
    inward = {policy.selector: policy for policy in manual.policies if policy.direction == "in"}
    found: dict[tuple[tuple[SaKey, ...], tuple[SaKey, ...]], _Association] = {}
    for policy in manual.policies:
        if policy.action != "ipsec":
            continue
        if len(policy.templates) != 1:
            made.problems.append(f"{policy}: several templates are in the kernel only; take `datapath: xfrm`")
            continue
        back = _mirrored(policy.selector)
        if policy.direction != "out":
            if back not in outward:
                made.incomplete.append(f"{policy}: in userland it needs an `out` policy the other way round")
            continue
        opposite = inward.get(back)
        (template,) = policy.templates
        if opposite is None or len(opposite.templates) != 1 or not _answers(opposite.templates[0], template):
            made.incomplete.append(
                f"{policy}: in userland it needs an `in` policy the other way round, its template too"
            )
            continue
        outs = sas.fitting(template, policy.selector)
        ins = sas.fitting(opposite.templates[0], back)
        keys = (tuple(sa.key for sa in outs), tuple(sa.key for sa in ins))
        association = found.setdefault(keys, _Association(outs, ins, []))
        association.selectors.append(policy.selector)
    return list(found.values())


def _mirrored(selector: Selector) -> Selector:
    return Selector(selector.dst, selector.src, selector.protocol, selector.dport, selector.sport)


def _answers(inward: Template, outward: Template) -> bool:
    return (inward.protocol, inward.mode, inward.src, inward.dst) == (
        outward.protocol,
        outward.mode,
        outward.dst,
        outward.src,
    )


def _check_product(association: _Association, problems: list[str]) -> None:
    """A pair carries what goes from any of its local selectors to any of its remote ones, of one family."""
    for version in (4, 6):
        selectors = [selector for selector in association.selectors if selector.version == version]
        local = {_side(selector, local=True) for selector in selectors}
        remote = {_side(selector, local=False) for selector in selectors}
        if len(local) * len(remote) != len(selectors):
            problems.append(
                f"policies that share the SAs of {selectors[0]} are not every combination of their ends; "
                "give each its own reqid"
            )


def _side(selector: Selector, *, local: bool) -> tuple[object, ...]:
    return (
        (selector.src, selector.protocol, selector.sport)
        if local
        else (selector.dst, selector.protocol, selector.dport)
    )


def _differences(out: ManualSa, back: ManualSa) -> str:
    names = ("encryption", "integrity", "mode", "replay_window", "esn", "lifetime")
    found = [name for name in names if getattr(out, name) != getattr(back, name)]
    if out.encap is not None and back.encap is not None:
        if out.encap.source_port != back.encap.destination_port:
            found.append("our port of encap")
        if out.encap.destination_port != back.encap.source_port:
            found.append("the peer's port of encap")
        if out.encap.source_port != NAT_T_PORT:
            found.append(f"encap: our own port must be {NAT_T_PORT}")
    if (out.src, out.dst) != (back.dst, back.src):
        found.append("their ends")
    return ", ".join(found)


def _sa_pair(out: ManualSa, back: ManualSa, selectors: Sequence[Selector]) -> SaPair:
    encap = out.encap
    ports = (encap.source_port, encap.destination_port) if encap is not None else (NAT_T_PORT, NAT_T_PORT)
    return SaPair(
        spi_in=back.spi,
        spi_out=out.spi,
        local=Endpoint(out.src, ports[0]),
        remote=Endpoint(out.dst, ports[1]),
        suite=EspSuite(out.encryption, out.integrity, out.esn),
        keys_in=SaKeys(back.encryption_key, back.integrity_key),
        keys_out=SaKeys(out.encryption_key, out.integrity_key),
        local_ts=_sides(selectors, local=True),
        remote_ts=_sides(selectors, local=False),
        authenticated=Authenticated.MANUAL,
        peer=PeerIdentity.address(out.dst),
        encap=encap is not None,
        mode=out.mode,
        protocol=out.protocol,
        replay_window=out.replay_window,
        lifetime=out.lifetime,
        connection=CONNECTION,
    )


def _sides(selectors: Sequence[Selector], *, local: bool) -> tuple[TrafficSelector, ...]:
    found: dict[TrafficSelector, None] = {}
    for selector in selectors:
        network, port = (selector.src, selector.sport) if local else (selector.dst, selector.dport)
        found[TrafficSelector.of(network, selector.protocol, port or None)] = None
    return tuple(found)


# ---- for the trap ------------------------------------------------------------------------------------------


def configured_rules(manual: ManualSet, served: frozenset[Selector] | None) -> tuple[ConfiguredRule, ...]:
    """The policies for the trap, in the order in which they match. `served`: the outbound selectors that have a
    pair in userland, or None where the kernel itself applies the policies, so that the trap only has to let them
    pass."""
    ordered = sorted(manual.policies, key=lambda policy: policy.priority)
    return tuple(
        ConfiguredRule(
            way=_WAYS[policy.direction],
            source=policy.selector.src,
            destination=policy.selector.dst,
            verdict=_verdict(policy, served),
            protocol=policy.selector.protocol,
            source_port=policy.selector.sport,
            destination_port=policy.selector.dport,
            required=policy.required,
            rank=(0, number),  # before those of connections
        )
        for number, policy in enumerate(ordered)
    )


def _verdict(policy: ManualPolicy, served: frozenset[Selector] | None) -> Verdict:
    if policy.action == "block":
        return Verdict.BLOCK
    if policy.action == "bypass" or served is None:
        return Verdict.CLEAR
    if policy.direction != "out":  # what comes out of the tunnel has passed before
        return Verdict.BLOCK if policy.required else Verdict.CLEAR
    if policy.required or policy.selector in served:
        return Verdict.PRIVATE  # without an SA the datapath drops it
    return Verdict.CLEAR
