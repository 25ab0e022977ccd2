"""The table of docs/interop.md: rows that runs have left, compared with what is committed, merged, and rendered.

python -m tests.interop.matrix.table [FILE...]    # takes the rows of these files into docs/, and renders
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.interop.matrix.cases import (
    INITIATOR,
    KERNEL,
    LINES,
    RESPONDER,
    ROLES,
    USERLAND,
    WHERE,
    Line,
    loses,
    notices_late,
    obstacle,
)

ROOT = Path(__file__).resolve().parents[3]
ROWS, PAGE = ROOT / "docs/interop.jsonl", ROOT / "docs/interop.md"
# In the second kernel what is written here is gone afterwards, but for that directory
RUN_ROWS = Path(os.environ.get("OEPY_OUT") or ROOT / ".interop") / "interop.jsonl"
Key = tuple[str, str, str, str]
Row = dict[str, Any]
WORKS, FAILS = "works", "fails"
_KEY = ("peer", "where", "line", "role")
_COMMANDS = {USERLAND: "make test", KERNEL: "make test-kernel"}
_PARTS = {INITIATOR: "oepy begins", RESPONDER: "oepy answers"}

_INTRO = """\
# Interoperation

Other IKE daemons and oepy, each beginning and answering. Every cell is a test that brings the tunnel up, sends
pings through it both ways, sees nothing but IKE and ESP on the wire, and ends it with a Delete that the other side
follows.

`make test` runs what has userland ESP at both ends, in namespaces; `make test-kernel` what has kernel ESP at both
ends, in a second kernel. A run that sees something else than this page says fails. To write the page anew:

    make test test-kernel interop-table

This page is written by that command from docs/interop.jsonl; the list of cases is tests/interop/matrix/cases.py.
"""


def key_of(row: Row) -> Key:
    return tuple(row[name] for name in _KEY)  # type: ignore[return-value]


def read(path: Path) -> dict[Key, Row]:
    """The last row of each key; empty where there is no file."""
    if not path.exists():
        return {}
    return {key_of(row): row for line in path.read_text().splitlines() if (row := json.loads(line))}


class Recorder:
    """Writes one row for each cell that a run has tried, and holds it against what is committed."""

    def __init__(self, peer: str, version: str, where: str, path: Path = RUN_ROWS, said: Path = ROWS) -> None:
        self._common = {"peer": peer, "version": version, "where": where}
        self._path = path
        self._said = read(said)

    @contextlib.contextmanager
    def cell(self, line: str, role: str) -> Iterator[Row]:
        """The body may add facts that are the same in every run."""
        assert any(known.key == line for known in LINES), line
        facts: Row = {}
        row = {**self._common, "line": line, "role": role}
        try:
            yield facts
        except BaseException:
            self._write(row | {"result": FAILS})
            raise
        row |= {"result": WORKS, **facts}
        self._write(row)
        said = self._said.get(key_of(row))
        if said is not None and said["version"] == row["version"]:
            assert said == row, f"{ROWS.name} says {said}; if the run is right, run `make interop-table`"

    def _write(self, row: Row) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def merged(said: dict[Key, Row], runs: Iterable[dict[Key, Row]]) -> dict[Key, Row]:
    """In the order of the cases; rows of cases that are no more are dropped."""
    rows = dict(said)
    for run in runs:
        rows |= run
    wanted = [
        (peer, where, line.key, role)
        for peer, places in WHERE.items()
        for where in places
        for line in LINES
        for role in ROLES
    ]
    return {key: rows[key] for key in wanted if key in rows}


def render(rows: dict[Key, Row]) -> str:
    parts = [_INTRO]
    for peer, places in WHERE.items():
        versions = sorted({row["version"] for row in rows.values() if row["peer"] == peer})
        columns = [(where, role) for where in places for role in ROLES]
        head = ["", *(f"{_PARTS[role]}, {where} ESP" for where, role in columns)]
        parts += [
            "",
            f"## {peer} {' and '.join(versions)}".rstrip(),
            "",
            _row(head),
            _row(["---"] * len(head)),
        ]
        notes: list[str] = []
        for line in LINES:
            cells = [_cell(rows, peer, where, line, role, notes) for where, role in columns]
            parts.append(_row([line.title, *cells]))
        parts += [line for number, note in enumerate(notes, 1) for line in ("", f"({number}) {note}.")]
        found = {(row["ike"], row["esp"]) for row in rows.values() if row["peer"] == peer and "ike" in row}
        parts += [line for ike, esp in sorted(found) for line in ("", f"Algorithms: IKE {ike}, ESP {esp}.")]
    return "\n".join(parts).rstrip() + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(rows: dict[Key, Row], peer: str, where: str, line: Line, role: str, notes: list[str]) -> str:
    reason = obstacle(peer, where, line.setup, role)
    if line.key == "dpd-peer-notices":
        reason = reason or notices_late(peer)
    if reason is not None:
        return f"– ({_number(reason, notes)})"
    row = rows.get((peer, where, line.key, role))
    if row is None:
        return f"not run (`{_COMMANDS[where]}`)"
    if row["result"] != WORKS:
        return "**no**"
    if line.rekey:
        reason = loses(peer, line.rekey)
        return "yes, none lost" if reason is None else f"yes ({_number(reason, notes)})"
    return "yes, in UDP" if row.get("encap") else "yes"


def _number(reason: str, notes: list[str]) -> int:
    if reason not in notes:
        notes.append(reason)
    return notes.index(reason) + 1


def main(files: list[str]) -> None:
    rows = merged(read(ROWS), [read(Path(name)) for name in files])
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    PAGE.write_text(render(rows))
    failed = [key for key, row in rows.items() if row["result"] != WORKS]
    print(f"{len(rows)} rows, {len(failed)} of them fail; {PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main(sys.argv[1:])
