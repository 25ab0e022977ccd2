"""docs/interop.md says what runs have seen, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop.matrix.cases import LINES, ROLES, USERLAND, WHERE, obstacle
from tests.interop.matrix.table import FAILS, PAGE, ROWS, WORKS, Recorder, key_of, merged, read, render

PEER = "strongSwan"


def recorder(tmp_path: Path, version: str = "5.9.8") -> Recorder:
    return Recorder(PEER, version, USERLAND, tmp_path / "run.jsonl", tmp_path / "said.jsonl")


def cells(page: str, title: str) -> list[list[str]]:
    """Of every line of that title."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [line[1:] for line in lines if line[0] == title]


def test_the_page_is_made_of_the_committed_rows() -> None:
    """`make interop-table` was run after the last change of rows, cases or layout; no row is of a case gone."""
    rows = read(ROWS)
    assert PAGE.read_text() == render(rows)
    assert merged(rows, []) == rows


def test_what_was_not_run_says_where_it_can_be_and_never_yes() -> None:
    """Without rows every cell names the command that fills it, or the obstacle."""
    page = render({})
    body = [cell for line in LINES for row in cells(page, line.title) for cell in row]
    assert len(body) == sum(len(places) for places in WHERE.values()) * len(ROLES) * len(LINES)
    assert all(cell.startswith(("not run (`make test", "– (")) for cell in body)


def test_a_cell_is_what_the_run_saw(tmp_path: Path) -> None:
    """Works with its facts, or fails: also where the body was ended from outside."""
    made = recorder(tmp_path)
    with made.cell("psk", "initiator") as facts:
        facts |= {"ike": "aes", "esp": "gcm", "encap": True}
    with pytest.raises(KeyboardInterrupt), made.cell("psk", "responder"):
        raise KeyboardInterrupt
    rows = read(tmp_path / "run.jsonl")
    assert [row["result"] for row in rows.values()] == [WORKS, FAILS]
    shown = cells(render(rows), LINES[0].title)[0]
    assert shown[:2] == ["yes, in UDP", "**no**"]
    assert "Algorithms: IKE aes, ESP gcm." in render(rows)


@pytest.mark.parametrize(
    ("said", "facts"),
    [
        ({"result": FAILS}, {}),
        ({"result": WORKS, "encap": False}, {"encap": True}),
        ({"result": WORKS}, {"esp": "x"}),
    ],
)
def test_a_run_that_contradicts_the_page_fails(tmp_path: Path, said: dict, facts: dict) -> None:
    """In either direction, and in the facts; but the page says nothing of another version of the peer."""
    row = {"peer": PEER, "version": "5.9.8", "where": USERLAND, "line": "psk", "role": "initiator"} | said
    (tmp_path / "said.jsonl").write_text(json.dumps(row) + "\n")
    with (
        pytest.raises(AssertionError, match="make interop-table"),
        recorder(tmp_path).cell(*key_of(row)[2:]) as seen,
    ):
        seen.update(facts)
    with recorder(tmp_path, "6.0").cell("psk", "initiator") as seen:
        seen.update(facts)


def test_rows_of_cases_that_are_gone_are_dropped() -> None:
    """And the newest run of a cell counts."""
    row = {
        "peer": PEER,
        "version": "1",
        "where": USERLAND,
        "line": "psk",
        "role": "initiator",
        "result": FAILS,
    }
    newer = row | {"result": WORKS}
    gone = row | {"line": "of another time"}
    assert merged({key_of(r): r for r in (row, gone)}, [{key_of(newer): newer}]) == {key_of(row): newer}


def test_no_obstacle_is_everywhere() -> None:
    """A case that no peer can play would be a case that nobody sees."""
    for line in LINES:
        assert any(
            obstacle(peer, where, line.setup, role) is None
            for peer, places in WHERE.items()
            for where in places
            for role in ROLES
        ), line
