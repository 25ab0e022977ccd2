"""All cases of one peer after each other: its daemon and ours are started once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.matrix.cases import WHERE

_HERE = Path(__file__).parent
_ORDER = {peer: place for place, peer in enumerate(WHERE)}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [place for place, item in enumerate(items) if item.path.parent == _HERE]
    found = sorted((items[place] for place in places), key=lambda item: _ORDER[item.callspec.params["game"]])  # type: ignore[attr-defined]
    for place, item in zip(places, found, strict=True):
        items[place] = item
