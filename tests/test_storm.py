"""A short storm: see `storm.py`, of which this is the beginning of a longer one."""

import pytest

from tests.storm import draw, plain_answer, session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def answer():
    return plain_answer()


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_fault_ends_a_session_with_the_right_words_or_not_at_all(answer, seed):
    assert session(draw(seed), answer).wrong == ""
