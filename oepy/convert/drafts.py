"""What a reader of another system's file has found so far, each with its place, and how it becomes oepy's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from oepy.errors import OepyError
from oepy.manual.algorithms import AEADS, CIPHERS, MACS
from oepy.manual.checks import overlaps, reused_spis, without_sa
from oepy.manual.model import MAX_POLICIES, MAX_SAS, ManualPolicy, ManualSa, ManualSet
from oepy.manual.reading import Problem, read_policy, read_sa

MAX_FILE = 4 * 1024 * 1024  # bytes, of all files together
MAX_TOKEN = 4096
MAX_TOKENS = 500_000
MAX_PROBLEMS = 200
_FIRST_PRIORITY, _STEP = 1000, 10

Json = dict[str, Any]
SaKey = tuple[str, str, int]  # destination, protocol, SPI
PolicyKey = tuple[object, ...]  # direction and selector


@dataclass(frozen=True, slots=True)
class Place:
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(slots=True)
class Draft:
    """One SA or policy as a mapping for `manual.reading`. `rank` orders policies: higher first."""

    place: Place
    mapping: Json
    rank: int = 0
    made: bool = False  # follows from another line, does not stand there itself


@dataclass(slots=True)
class Conversion:
    """The result: `manual` is whole where `problems` is empty."""

    sas: list[tuple[Place, ManualSa]] = field(default_factory=list)
    policies: list[tuple[Place, ManualPolicy]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def manual(self) -> ManualSet:
        return ManualSet(tuple(sa for _, sa in self.sas), tuple(policy for _, policy in self.policies))


class Refused(Exception):
    """One statement cannot be converted; the text says why and what to do."""


class Findings:
    """Collects drafts, problems and notes of one conversion."""

    def __init__(self) -> None:
        self.sas: dict[SaKey, Draft] = {}
        self.policies: dict[PolicyKey, Draft] = {}
        self.problems: list[tuple[Place, str]] = []
        self.notes: list[tuple[Place, str]] = []
        self.in_order = False  # of policies the first that matches decides, else the most specific one

    def problem(self, place: Place, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((place, text))

    def note(self, place: Place, text: str) -> None:
        if len(self.notes) < MAX_PROBLEMS:
            self.notes.append((place, text))

    def attempt(self, place: Place, step: Callable[[], None]) -> None:
        """Go on with the next statement where this one is refused."""
        try:
            step()
        except Refused as error:
            self.problem(place, str(error))
        if len(self.sas) > MAX_SAS or len(self.policies) > MAX_POLICIES:
            raise Refused(f"more than {MAX_SAS} SAs or {MAX_POLICIES} policies")

    def finish(self, *, allow_weak: bool) -> Conversion:
        """Read all drafts as the configuration would be read; every mistake at its own line."""
        done = Conversion()
        if self.in_order:
            _settle_order(list(self.policies.values()))
        for draft in self.sas.values():
            if allow_weak and _is_weak(draft.mapping):
                draft.mapping["allow_weak"] = True
                self.note(
                    draft.place, "weak algorithm or unsafe with a static key: `allow_weak: true` is written"
                )
            sa = self._read(draft, lambda d, p: read_sa(d.mapping, (), p, _no_files))
            if sa is not None:
                done.sas.append((draft.place, sa))
        for draft in self.policies.values():
            policy = self._read(draft, lambda d, p: read_policy(d.mapping, (), p))
            if policy is not None:
                done.policies.append((draft.place, policy))
        self._cross_checks(done)
        self.problems.sort(key=lambda item: (item[0].file, item[0].line))
        done.problems = list(dict.fromkeys(f"{place}: {text}" for place, text in self.problems))
        done.notes = list(dict.fromkeys(f"{place}: {text}" for place, text in self.notes))
        return done

    def _read(self, draft: Draft, read: Callable[[Draft, list[Problem]], Any]) -> Any:
        problems: list[Problem] = []
        value = read(draft, problems)
        for problem in problems:
            where = ".".join(str(part) for part in problem.path)
            self.problem(draft.place, f"{where}: {problem.text}" if where else problem.text)
        return value

    def _cross_checks(self, done: Conversion) -> None:
        sas = list(enumerate(sa for _, sa in done.sas))
        policies = list(enumerate(policy for _, policy in done.policies))
        found = [*reused_spis(sas), *overlaps(policies)]
        if len(sas) == len(self.sas):
            found += without_sa(policies, [sa for _, sa in sas])
        for problem in found:
            kind, index = problem.path[0], problem.path[1]
            assert isinstance(index, int)
            place = done.sas[index][0] if kind == "sas" else done.policies[index][0]
            lists: dict[str, list[Any]] = {"sas": done.sas, "policies": done.policies}
            text = re.sub(
                r"(sas|policies)\[(\d+)\]",
                lambda match, lists=lists: f"line {lists[match[1]][int(match[2])][0].line}",  # type: ignore[misc]
                problem.text,
            )
            self.problem(place, text)


def _no_files(_name: str) -> bytes:
    raise OepyError("a converted SA names no key file")


def _is_weak(mapping: Json) -> bool:
    return any(
        table[mapping[name]].weak
        for name, table in (("encryption", CIPHERS), ("aead", AEADS), ("integrity", MACS))
        if mapping.get(name) in table
    )


def _settle_order(policies: list[Draft]) -> None:
    """The first that matches decides there, by rank and then by place; here the lowest priority does. Where no
    two policies have a packet in common the default serves."""
    read = [read_policy({**draft.mapping}, (), []) for draft in policies]
    plain = [(index, policy) for index, policy in enumerate(read) if policy is not None]
    same_priority = [
        (index, ManualPolicy(p.direction, p.selector, p.action, p.templates, 1)) for index, p in plain
    ]
    if not overlaps(same_priority) and not any(draft.rank for draft in policies):
        return
    order = sorted(range(len(policies)), key=lambda index: (-policies[index].rank, index))
    for place, index in enumerate(order):
        policies[index].mapping["priority"] = _FIRST_PRIORITY + _STEP * place


def policy_key(mapping: Json) -> PolicyKey:
    return tuple(mapping.get(name) for name in ("direction", "src", "dst", "protocol", "sport", "dport"))
