"""Keys of connections' children over the kernel's ESP."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.net.daemon_host import Host
from tests.net.test_connection_keys import INSIDE, hosts, the_lower_priority_wins, what_is_copied

__all__ = ["hosts"]  # the fixture

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def test_the_lower_priority_wins(hosts: tuple[Host, Host]) -> None:
    """As with userland ESP."""
    the_lower_priority_wins(hosts, "xfrm")


def test_what_is_copied_between_the_headers(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """By default ECN alone; DSCP out, DF and no ECN; DSCP in."""
    what_is_copied(
        hosts,
        tmp_path,
        "xfrm",
        [
            ({}, {}, 0x01, False, INSIDE),
            (
                {"copy_dscp": "out", "copy_ecn": False, "copy_df": True},
                {"copy_dscp": "out"},
                *(0xB8, True, INSIDE),
            ),
            ({"copy_dscp": "no"}, {"copy_dscp": "in"}, 0x01, False, 0x01),
        ],
    )
