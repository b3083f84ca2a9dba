"""A short run of `api_fuzz.py`."""

import pytest

pytest.importorskip("schemathesis")

from tests.api_fuzz import fuzz
from tests.api_server import serving


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_any_request_gets_an_answer_that_is_described():
    with serving() as server:
        server.say("Hello there, whoever you are.")
        for sent in fuzz(server.url, 300, first=1):
            assert not sent.wrong
        assert sent.requests == 300
        server.wait_empty()
