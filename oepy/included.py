"""`include:` of the configuration: files of connections beside the one. Each is read anew only when it, or a file
that it names, is another: with thousands of them, to read one more costs what one costs."""

from __future__ import annotations

import functools
import glob
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from oepy.connections.model import ConnectionSet

MAX_FILES = 20_000
YOUNG_SECONDS = 1.0  # a file may change again without another time stamp
_WILDCARDS = frozenset("*?[")

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """What one file has. `named`: the files that it names, and that were read too."""

    file: str
    connections: ConnectionSet
    problems: tuple[str, ...]
    named: tuple[str, ...]


def find(patterns: Iterable[str], base: Path) -> tuple[list[str], list[str]]:
    """The files, in the order of the patterns and then of their names, and what is wrong with the patterns. Those
    with a wildcard may match nothing."""
    found: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        if not pattern.isprintable() or not pattern:
            problems.append(f"include: {pattern[:40]!r} is no name of a file")
            continue
        matches = sorted(glob.glob(str(base / pattern)))
        if not matches and not _WILDCARDS & set(pattern):
            problems.append(
                f"include: no file {base / pattern}; remove it, or write a pattern such as *.yaml"
            )
        found.update(dict.fromkeys(matches))
    if len(found) > MAX_FILES:
        problems.append(f"include: {len(found)} files; at most {MAX_FILES}")
    return list(found)[:MAX_FILES], problems


class Memory:
    """The parts as last read. `clock` gives wall-clock seconds, like the time stamps of files."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[Part, tuple[_Stamp | None, ...]]] = {}

    def parts(self, files: Iterable[str], read: Callable[[str], Part]) -> list[Part]:
        """Of all files, in their order. Those with problems are read again each time."""
        stamp = functools.cache(_stamp)  # each file is looked at once, however many name it

        def stamps(part: Part) -> tuple[_Stamp | None, ...]:
            return tuple(stamp(one) for one in (part.file, *part.named))

        before, self._kept = self._kept, {}
        found = []
        for file in files:
            known = before.get(file)
            if known is None or known[1] != stamps(known[0]):
                began = self._clock()
                part = read(file)
                known = part, stamps(part)
                if part.problems or _are_young(known[1], began):
                    found.append(part)
                    continue
            self._kept[file] = known
            found.append(known[0])
        return found


def _are_young(stamps: Iterable[_Stamp | None], began: float) -> bool:
    """Whether one of the files may have changed since, or may yet, without another time stamp."""
    return any(stamp is None or stamp[1] / 1e9 > began - YOUNG_SECONDS for stamp in stamps)


def _stamp(file: str) -> _Stamp | None:
    """With the time of the last change of content or rights."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns, status.st_size


def join(main: ConnectionSet, parts: Iterable[Part]) -> tuple[ConnectionSet, list[str]]:
    """All of them in one, and what stands twice."""
    parts = list(parts)
    found = [("the main file", main), *((part.file, part.connections) for part in parts)]
    problems = [f"{part.file}: {problem}" for part in parts for problem in part.problems]
    for kind in ("connections", "pools"):
        owners: dict[str, str] = {}
        for place, one in found:
            for item in getattr(one, kind):
                if owners.setdefault(item.name, place) != place:
                    problems.append(
                        f"{place}: {kind}.{item.name}: stands in {owners[item.name]} too; keep one"
                    )
    sets = [one for _, one in found]
    whole = ConnectionSet(
        connections=tuple(item for one in sets for item in one.connections),
        secrets=tuple(item for one in sets for item in one.secrets),
        authorities=tuple(item for one in sets for item in one.authorities),
        certificates={file: chain for one in sets for file, chain in one.certificates.items()},
        pools=tuple(item for one in sets for item in one.pools),
        ppks=tuple(item for one in sets for item in one.ppks),
        vouching=main.vouching,
    )
    return whole, problems


__all__ = ["Memory", "Part", "find", "join"]
