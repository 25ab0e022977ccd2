"""`include:` of the configuration: files of connections beside the one. Each is read anew only when it, or a file
that it names, is another: with thousands of them, to read one more costs what one costs."""

from __future__ import annotations

import fnmatch
import functools
import glob
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from oepy.connections.model import EMPTY, Connection, ConnectionSet, SharedSecret

MAX_FILES = 20_000
YOUNG_SECONDS = 1.0  # a file may change again without another time stamp
_WILDCARDS = frozenset("*?[")

_T = TypeVar("_T", Connection, SharedSecret)
_Stamp = tuple[int, int, int]
_Stamps = tuple[_Stamp | None, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What one file has. `pattern`: the number of the one that found it. `named`: the files that it names, and that
    were read too."""

    file: str
    pattern: int
    connections: ConnectionSet
    problems: tuple[str, ...]
    named: tuple[str, ...]


def find(patterns: Iterable[str], base: Path) -> tuple[dict[str, int], list[str]]:
    """The files, in the order of the patterns and then of their names, each with the number of the first pattern
    that finds it; and what is wrong with the patterns. Those with a wildcard may match nothing."""
    found: dict[str, int] = {}
    problems = []
    for number, pattern in enumerate(patterns, 1):
        if not pattern.isprintable() or not pattern:
            problems.append(f"include: {pattern[:40]!r} is no name of a file")
            continue
        matches = _matches(str(base / pattern))
        if not matches and not _WILDCARDS & set(pattern):
            problems.append(
                f"include: no file {base / pattern}; remove it, or write a pattern such as *.yaml"
            )
        for file in matches:
            found.setdefault(file, number)
    if len(found) > MAX_FILES:
        problems.append(f"include: {len(found)} files; at most {MAX_FILES}")
        found = dict(islice(found.items(), MAX_FILES))
    return found, problems


def _matches(pattern: str) -> list[str]:
    """In the order of their names. Most patterns are of one directory, of which glob would take each file apart."""
    directory, name = os.path.split(pattern)
    if _WILDCARDS & set(directory) or not _WILDCARDS & set(name):
        return sorted(glob.glob(pattern))
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    found = sorted(fnmatch.filter(names, name))
    return [f"{directory}/{each}" for each in found if each[0] != "." or name[0] == "."]


class Memory:
    """What was read last. `clock` gives wall-clock seconds, like the time stamps of files."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._main = EMPTY
        self._kept: dict[str, tuple[Part, _Stamps]] = {}

    def main(self, own: ConnectionSet) -> ConnectionSet:
        """The main file's own, with the same objects as before for what is the same: it is read each time."""
        self._main = _with_objects_of(self._main, own)
        return self._main

    def parts(self, files: Mapping[str, int], read: Callable[[str, int], Part]) -> list[Part]:
        """Of all files (each with its pattern's number), in their order. Those with problems are read again each
        time."""
        stamp = functools.cache(_stamp)  # each file is looked at once, however many name it
        before, self._kept = self._kept, {}
        found = []
        for file, pattern in files.items():
            known = before.get(file)
            if known is None or known[0].pattern != pattern or known[1] != _stamps(known[0], stamp):
                began = self._clock()
                part = read(file, pattern)
                stamps = _stamps(part, stamp)
                if part.problems or _are_young(stamps, began):
                    found.append(part)
                    continue
                known = part, stamps
            self._kept[file] = known
            found.append(known[0])
        return found


def _with_objects_of(before: ConnectionSet, now: ConnectionSet) -> ConnectionSet:
    return replace(
        now,
        connections=_with_objects(before.connections, now.connections),
        secrets=_with_objects(before.secrets, now.secrets),
    )


def _with_objects(before: tuple[_T, ...], now: tuple[_T, ...]) -> tuple[_T, ...]:
    known = {one.order: one for one in before}
    return tuple(known[one.order] if known.get(one.order) == one else one for one in now)


def _stamps(part: Part, stamp: Callable[[str], _Stamp | None]) -> _Stamps:
    """Of the file and those that it names."""
    own = _stamp(part.file)
    return (own, *map(stamp, part.named)) if part.named else (own,)


def _are_young(stamps: _Stamps, began: float) -> bool:
    """Whether one of the files may have changed since, or may yet, without another time stamp."""
    return any(stamp is None or stamp[1] / 1e9 > began - YOUNG_SECONDS for stamp in stamps)


def _stamp(file: str) -> _Stamp | None:
    """With the time of the last change of content or rights."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns, status.st_size


def join(main: ConnectionSet, parts: list[Part]) -> tuple[ConnectionSet, list[str]]:
    """All of them in one, and what stands twice."""
    problems = [f"{part.file}: {problem}" for part in parts if part.problems for problem in part.problems]
    sets = [main, *(part.connections for part in parts)]
    connections, secrets, authorities, certificates, pools, ppks = zip(*map(_sections, sets), strict=True)
    whole = ConnectionSet(
        connections=tuple(chain.from_iterable(connections)),
        secrets=tuple(chain.from_iterable(secrets)),
        authorities=tuple(chain.from_iterable(authorities)),
        certificates={file: found for each in filter(None, certificates) for file, found in each.items()},
        pools=tuple(chain.from_iterable(pools)),
        ppks=tuple(chain.from_iterable(ppks)),
        vouching=main.vouching,
    )
    for kind in ("connections", "pools"):
        items = getattr(whole, kind)
        if len({item.name for item in items}) != len(items):
            problems += _twice(kind, ["the main file", *(part.file for part in parts)], sets)
    return whole, problems


_sections = operator.attrgetter("connections", "secrets", "authorities", "certificates", "pools", "ppks")


def _twice(kind: str, places: list[str], sets: list[ConnectionSet]) -> Iterator[str]:
    owners: dict[str, str] = {}
    for place, one in zip(places, sets, strict=True):
        for item in getattr(one, kind):
            if owners.setdefault(item.name, place) != place:
                yield f"{place}: {kind}.{item.name}: stands in {owners[item.name]} too; keep one"


__all__ = ["Memory", "Part", "find", "join"]
