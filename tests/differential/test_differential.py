"""Each family of cases beside libunbound and delv; what `python -m tests.differential` prints, as tests."""

from __future__ import annotations

import dataclasses

import pytest

from oepy.model import Security
from tests.differential.cases import FAMILIES, algorithms, all_cases, broken_signatures
from tests.differential.compare import Result, run_case
from tests.differential.known import KNOWN, judge, used
from tests.differential.oracles import Said
from tests.differential.responder import Responder

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_difference_that_is_not_listed(family):
    """Same status from all three, or a difference that is listed with its RFC; never secure for us alone."""
    wrong = []
    with Responder() as responder:
        for case in family():
            wrong += judge(run_case(case, responder))[1]
    assert not wrong, "\n".join(wrong)


def test_there_are_enough_cases_and_their_titles_differ():
    """At least 150, so that the comparison means something."""
    titles = [case.title for case in all_cases()]
    assert len(titles) == len(set(titles)) >= 150


def test_each_listed_difference_speaks_of_some_case():
    """A line that fits no case would hide a difference to come."""
    titles = [case.title for case in all_cases()]
    assert [line[0] for line in KNOWN if not any(used(line, title) for title in titles)] == []


@pytest.fixture(scope="module")
def honest() -> Result:
    case = next(case for case in algorithms() if case.title == "algorithm/13/answer")
    with Responder() as responder:
        return run_case(case, responder)


@pytest.mark.parametrize("said", [Said("insecure"), Said("bogus"), Said("failed"), Said("secure", ttl=100)])
def test_secure_for_us_alone_is_a_failure(honest, said):
    """Also where the case is right otherwise, and where we would keep the answer for longer."""
    assert judge(honest) == ([], [])
    _, wrong = judge(dataclasses.replace(honest, unbound=said))
    assert any("UNSAFE" in line for line in wrong)


def test_another_status_than_expected_is_a_failure():
    """Even where all three agree on it."""
    case = next(case for case in broken_signatures() if case.title == "signature/answer/missing")
    with Responder() as responder:
        result = run_case(case, responder)
    assert result.ours.status is Security.BOGUS
    _, wrong = judge(dataclasses.replace(result, case=dataclasses.replace(case, expected="insecure")))
    assert len(wrong) == 1
