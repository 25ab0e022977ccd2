"""`oepy bench peers` with few connections: its JSON has the promised rows, and what it says has happened."""

from __future__ import annotations

import pytest

from oepy.bench.peers import run

pytestmark = pytest.mark.root


def test_the_rows() -> None:
    result = run((2, 12), lambda done, total: None).as_dict()
    assert [row["connections"] for row in result["rows"]] == [2, 12]
    for row in result["rows"]:
        assert min(row[key] for key in ("start", "milliseconds_each", "add", "add_cpu", "floor")) > 0, row
        assert row["memory"] > 10_000_000, row
