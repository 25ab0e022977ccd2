"""What the fuzzer once found interesting goes through each target again, without the fuzzer."""

from __future__ import annotations

import pathlib

import pytest

from tests.fuzz.harnesses import HARNESSES

CORPUS = pathlib.Path(__file__).parent / "corpus"


@pytest.mark.parametrize("target", HARNESSES)
def test_the_corpus_keeps_each_targets_promise(target: str) -> None:
    """The promise is the first line of the target's function; there are files for every target."""
    files = sorted((CORPUS / target).iterdir())
    assert len(files) >= 6
    for path in files:
        data = path.read_bytes()
        for end in (len(data), len(data) // 2):
            HARNESSES[target](data[:end])
