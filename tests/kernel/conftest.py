"""Tests for a kernel with ESP, XFRM interfaces and nft's own queue. `make test-kernel` boots one for them."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _second_kernel() -> None:
    if not os.environ.get("OEPY_SECOND_KERNEL"):
        pytest.fail("this test is for the second kernel: run `make test-kernel`")
