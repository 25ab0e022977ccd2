"""What is wrong between manual SAs and policies that are each right in themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from oepy.manual.model import NOTHING, ManualPolicy, ManualSa, ManualSet, SaIndex, Template
from oepy.manual.reading import KeyFiles, Path, Problem, read_lists
from oepy.model import IpNetwork

_Numbered = Sequence[tuple[int, ManualPolicy]]


def read_manual(value: object, key_files: KeyFiles) -> tuple[ManualSet, list[Problem]]:
    """The whole `manual:` section with all of its mistakes. Where there are any, the set is not to be used."""
    if value in (None, ""):
        return NOTHING, []
    problems: list[Problem] = []
    sas, policies = read_lists(value, problems, key_files)
    # A template is not said to lack the SA that is there with a mistake of its own
    every_sa_read = not any(problem.path[:1] == ("sas",) for problem in problems)
    problems += reused_spis(sas)
    problems += overlaps(policies)
    if every_sa_read:
        problems += without_sa(policies, [sa for _, sa in sas])
    return ManualSet(tuple(sa for _, sa in sas), tuple(policy for _, policy in policies)), problems


def check(manual: ManualSet) -> list[Problem]:
    """All of this page, for a set whose entries have been read before."""
    policies = list(enumerate(manual.policies))
    return [
        *reused_spis(list(enumerate(manual.sas))),
        *overlaps(policies),
        *without_sa(policies, manual.sas),
    ]


def reused_spis(sas: Iterable[tuple[int, ManualSa]]) -> list[Problem]:
    """Destination, protocol and SPI name one SA (RFC 4301 §4.1)."""
    first: dict[tuple[object, ...], int] = {}
    problems = []
    for index, sa in sas:
        other = first.setdefault(sa.key, index)
        if other != index:
            text = f"SPI {sa.spi:#x} to {sa.dst} is the one of sas[{other}]; take another"
            problems.append(Problem(("sas", index, "spi"), text))
    return problems


def overlaps(policies: _Numbered) -> list[Problem]:
    """Policies of which it is not plain which comes first, or of which one never gets a packet."""
    problems: list[Problem] = []
    for direction in ("in", "out", "fwd"):
        for version in (4, 6):
            chosen = [
                item
                for item in policies
                if item[1].direction == direction and item[1].selector.version == version
            ]
            problems += _sweep(chosen)
    return sorted(problems, key=lambda problem: str(problem.path))


def _sweep(policies: _Numbered) -> list[Problem]:
    """Prefixes are nested or apart. In the order of first addresses, whatever meets a policy further up is still
    open: nothing else needs to be compared. Of a gateway to many peers one side is always the same, so the side
    that differs most is taken."""
    sides = [{policy.selector.src for _, policy in policies}, {policy.selector.dst for _, policy in policies}]
    by_source = len(sides[0]) > len(sides[1])

    def network(policy: ManualPolicy) -> IpNetwork:
        return policy.selector.src if by_source else policy.selector.dst

    def place(item: tuple[int, ManualPolicy]) -> tuple[int, int]:
        return (int(network(item[1]).network_address), network(item[1]).prefixlen)

    found: dict[int, Problem] = {}
    open_ones: list[tuple[int, ManualPolicy]] = []
    for index, policy in sorted(policies, key=place):
        first = int(network(policy).network_address)
        while open_ones and int(network(open_ones[-1][1]).broadcast_address) < first:
            open_ones.pop()
        for other_index, other in open_ones:
            if policy.selector.meets(other.selector):
                pair = sorted(((other_index, other), (index, policy)), key=lambda item: item[0])
                problem = _conflict(*pair[0], *pair[1])
                if problem is not None:
                    at = problem.path[1]
                    assert isinstance(at, int)
                    found.setdefault(at, problem)
        open_ones.append((index, policy))
    return list(found.values())


def _conflict(one: int, first: ManualPolicy, two: int, second: ManualPolicy) -> Problem | None:
    """`one` stands before `two` in the list."""
    if first.selector == second.selector:
        return Problem(
            ("policies", two), f"the same direction and selector as policies[{one}]; keep one of both"
        )
    if first.priority == second.priority:
        text = (
            f"some packets are of policies[{one}] ({first.selector}) as well, at the same priority "
            f"{first.priority}; give one of both a lower number, which comes first"
        )
        return Problem(("policies", two, "priority"), text)
    (before, front), (after, behind) = sorted(
        ((one, first), (two, second)), key=lambda item: item[1].priority
    )
    if front.selector.covers(behind.selector):
        text = (
            f"never gets a packet: policies[{before}] ({front.selector}) with priority {front.priority} takes "
            f"them all before; give this one less than that"
        )
        return Problem(("policies", after, "priority"), text)
    return None


def without_sa(policies: _Numbered, sas: Sequence[ManualSa]) -> list[Problem]:
    """Templates that no SA fits."""
    problems = []
    index_of_sas = SaIndex(sas)
    for index, policy in policies:
        for number, template in enumerate(policy.templates):
            if index_of_sas.fitting(template, policy.selector):
                continue
            at: Path = ("policies", index, "template")
            if len(policy.templates) > 1:
                at = ("policies", index, "templates", number)
            problems.append(Problem(at, _no_sa(template, sas)))
    return problems


def _no_sa(template: Template, sas: Sequence[ManualSa]) -> str:
    ends = f"{template.src} to {template.dst}" if template.src else "between addresses of the selector"
    wanted = f"{template.protocol} {template.mode} {ends} with reqid {template.reqid}"
    if template.spi:
        wanted += f" and SPI {template.spi:#x}"
    near = [sa for sa in sas if (sa.src, sa.dst) == (template.src, template.dst)]
    if near:
        there = ", ".join(f"{sa} ({sa.mode}, reqid {sa.reqid})" for sa in near[:3])
        return f"no SA is {wanted}; between these ends there is {there}"
    return f"no SA is {wanted}; add it, traffic of this policy could not pass"
