"""`oepy bench ike` with few handshakes: all rows are there, and are of something that happened."""

from __future__ import annotations

import pytest

from oepy.bench.ike import run

pytestmark = [pytest.mark.root, pytest.mark.interop]


def test_the_rows() -> None:
    """Both responders by PSK and by key; ML-KEM between two oepy alone; memory at few and at many SAs."""
    steps: list[tuple[int, int]] = []
    result = run(("psk", "ed25519"), (False, True), (1, 4), 6, 1, 40, lambda *step: steps.append(step))
    assert result.missing == ""
    found = {(row.auth, row.kem, row.at_once, row.responder): row for row in result.rows}
    assert set(found) == {
        (auth, kem, at_once, responder)
        for auth in ("psk", "ed25519")
        for kem in (False, True)
        for at_once in (1, 4)
        for responder in ("oepy", "charon")
        if not (kem and responder == "charon")
    }
    assert steps[-1][0] == steps[-1][1] == len(steps)
    for row in found.values():
        assert 0 < row.p50 <= row.p99 < 10
        assert row.rate > 0
        assert row.retransmits == 0
        floor = result.floor(row)
        assert row.responder_cpu > floor.responder / 2 > 0  # the CPU clock is that of the right process
        assert row.initiator_cpu > floor.initiator / 2 > 0
        assert (result.by_charon(row) is not None) == (row.responder == "oepy" and not row.kem)
    memory = {(row.responder, row.sas, row.traced is not None): row for row in result.memory}
    assert set(memory) == {
        ("oepy", 40, False),
        ("charon", 40, False),
        ("oepy", 10, True),
        ("oepy", 40, True),
    }
    assert all(row.traced is None or 1_000 < row.traced < 100_000 for row in memory.values())
    assert {"rows", "floor", "memory", "missing"} == set(result.as_dict())
