"""A fleet published to a real BIND, killed half-way and resumed; tests/scale has the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scale.publish import run

pytestmark = [pytest.mark.root, pytest.mark.long]


def test_twenty_thousand_hosts_killed_and_resumed(tmp_path: Path) -> None:
    """Complete, nothing foreign touched, and the second run sends only what the first had not."""
    tmp_path.chmod(0o755)
    result = run(20_000, tmp_path, signed=True)
    assert result["problems"] == []
    assert result["killed"]
    resumed = result["resumed"]
    assert resumed["unchanged"] + resumed["changed"] == resumed["names"] == 20_000
    assert resumed["unchanged"] >= 10_000
