"""Connections over the kernel's ESP: an assigned address on the XFRM interface, and MOBIKE."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from oepy.lab.namespaces import Lab, Namespace
from tests.net.daemon_host import Host
from tests.net.test_connections_mobike import lay_out, travel

pytestmark = [pytest.mark.root, pytest.mark.kernel]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]]]:
    with Lab() as lab:
        network = lay_out(lab)
        made = [Host(namespace, tmp_path / namespace.label) for namespace in network[:2]]
        for host in made:
            (host.directory / "psk").touch(mode=0o600)
            (host.directory / "psk").write_text("wherever we are\n")
        try:
            yield network, (made[0], made[1])
        finally:
            for host in made:
                host.stop()


def test_traffic_goes_on_over_another_link(
    hosts: tuple[tuple[Namespace, Namespace, Namespace], tuple[Host, Host]], tmp_path: Path
) -> None:
    """As with the userland datapath: the same SAs go by the other link and back, with the inner address."""
    travel(*hosts, tmp_path, {"datapath": "xfrm"}, 8.0)
