"""The second kernel is what the tests in here take it for: else their green would say nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from oepy.lab.namespaces import Lab, Namespace
from oepy.lab.probe import ping
from tests.net.harness import A4, B4, Wired, wired

pytestmark = [pytest.mark.kernel, pytest.mark.root]

_KEY = "0x" + "11" * 20
_SELECTORS = (f"{A4}/32", f"{B4}/32")


@pytest.fixture
def net() -> Iterator[Wired]:
    with wired() as made:
        yield made


def run(namespace: Namespace, *words: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", namespace.name, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def test_it_is_another_kernel_with_native_queue_and_xfrm_interfaces() -> None:
    """XFRM interfaces, nft's queue expression and its view on IPsec can all be had."""
    with Lab() as lab:
        inside = lab.namespace("k")
        run(inside, "ip", "link", "add", "oe9", "type", "xfrm", "dev", "lo", "if_id", "7")
        assert "if_id 0x7" in run(inside, "ip", "-d", "link", "show", "oe9")
        run(inside, "nft", "add", "table", "inet", "t")
        run(inside, "nft", "add", "chain", "inet", "t", "c", "{ type filter hook input priority 0; }")
        run(inside, "nft", "add", "rule", "inet", "t", "c", "meta", "ipsec", "exists", "queue", "num", "9")
        assert "queue to 9" in run(inside, "nft", "list", "ruleset")


def test_it_carries_esp_of_ip_xfrm(net: Wired) -> None:
    """SAs made by `ip xfrm` alone carry a ping: the kernel has ESP, and counts it."""
    for inside, local, remote in ((net.a, A4, B4), (net.b, B4, A4)):
        for source, destination, spi in ((A4, B4, "0x1001"), (B4, A4, "0x1002")):
            state = (
                f"ip xfrm state add src {source} dst {destination} proto esp spi {spi} reqid 5 mode tunnel"
            )
            run(inside, *state.split(), "aead", "rfc4106(gcm(aes))", _KEY, "128")
        for direction, source, destination in (("out", local, remote), ("in", remote, local)):
            policy = f"ip xfrm policy add src {source} dst {destination} dir {direction}"
            template = f"tmpl src {source} dst {destination} proto esp reqid 5 mode tunnel"
            run(inside, *policy.split(), *template.split())
    assert None not in ping(net.a, B4, count=3, timeout=2.0)
    counted = run(
        net.b, "ip", "-s", "xfrm", "state", "get", "src", A4, "dst", B4, "proto", "esp", "spi", "0x1001"
    )
    assert "3(packets)" in counted
