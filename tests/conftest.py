"""What every test may rely on. A test that this machine can't run fails loudly, with the reason."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", choices=["rootless", "root"], help="only the tests with the mark `root`, or without"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is None:
        return
    of_part, others = [], []
    for item in items:
        needs_root = item.get_closest_marker("root") is not None
        (of_part if needs_root == (part == "root") else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = of_part


@pytest.fixture(autouse=True)
def _root_only(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("root") and os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and needs root: run `make test` as root")
