"""`oepy bench peers` with few connections: its JSON has the promised rows, and what it says has happened."""

from __future__ import annotations

import pytest

from oepy.bench.peers import run

pytestmark = pytest.mark.root


def test_the_rows() -> None:
    result = run((2, 12), lambda done, total: None).as_dict()
    assert [row["connections"] for row in result["rows"]] == [2, 12]
    assert all(
        row["start"] > 0
        and row["milliseconds_each"] > 0
        and row["add"] > row["add_cpu"] > 0
        and row["memory"] > 10_000_000
        for row in result["rows"]
    )
