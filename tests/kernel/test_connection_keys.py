"""Keys of connections' children over the kernel's ESP."""

from __future__ import annotations

import pytest

from tests.net.daemon_host import Host
from tests.net.test_connection_keys import hosts, the_lower_priority_wins

__all__ = ["hosts"]  # the fixture

pytestmark = [pytest.mark.root, pytest.mark.kernel]


def test_the_lower_priority_wins(hosts: tuple[Host, Host]) -> None:
    """As with userland ESP."""
    the_lower_priority_wins(hosts, "xfrm")
