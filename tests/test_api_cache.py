"""What requests share: each answer is that of a server which has seen nothing before.

The scripted root's logits are a hash of all that a row sees through the block table, so another
history gives another answer.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api_server import CHAT, Running, send, serving, wait_until

pytestmark = pytest.mark.timeout(120)

STORY = "tell me a long story about nothing at all " * 4
LONG = "word " * 150


@pytest.fixture
def server():
    with serving() as running:
        yield running


def ask(server: Running, *messages: str, **options: object) -> dict:
    """The answer to a conversation, whose turns alternate."""
    roles = ["user", "assistant"]
    said = [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
    asked = {"messages": said, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    with server.client() as client:
        answer = client.post(CHAT, json=asked | options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def fresh(*messages: str, **options: object) -> str:
    """What a server says that has answered nothing yet."""
    with serving() as server:
        return text_of(ask(server, *messages, **options))


def test_l9_the_same_prompt_while_the_first_is_answered(server):
    server.root.pause = 0.005
    long = send(
        server, {"messages": [{"role": "user", "content": STORY}], "temperature": 0, "stream": True}
    )
    with long:
        wait_until(lambda: server.engine.load.running == 1)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: text_of(ask(server, STORY)), range(3)))
    assert found == [fresh(STORY)] * 3
    server.wait_empty()


def test_c2_a_message_in_the_middle_that_was_edited(server):
    first = text_of(ask(server, STORY))
    ask(server, STORY, first, "go on")
    edited = (STORY, first[::-1], "go on")
    assert text_of(ask(server, *edited)) == fresh(*edited)
    original = (STORY, first, "go on")
    assert text_of(ask(server, *original)) == fresh(*original)


def test_c3_the_same_prompt_again_computes_one_token_of_it(server):
    first, before = ask(server, STORY), server.root.computed
    again = ask(server, STORY)
    assert text_of(again) == text_of(first) == fresh(STORY)
    usage = again["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    assert server.root.computed - before == 1 + (usage["completion_tokens"] - 1)


def test_c4_eight_that_begin_alike_get_what_they_get_without_sharing():
    questions = [f"{STORY} Question {number}?" for number in range(8)]

    def answers(server: Running, salted: bool) -> list[str]:
        def one(number: int) -> str:
            salt = str(number) if salted else "one"
            return text_of(ask(server, questions[number], cache_salt=salt))

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(8)))

    with serving() as server:
        shared, computed = answers(server, False), server.root.computed
    with serving() as server:
        assert answers(server, True) == shared
        assert computed < server.root.computed
    assert len(set(shared)) == 8


def test_c5_a_place_is_used_again_after_a_prompt_was_left_half_read(server):
    server.root.pause = 0.02
    leaving = send(server, {"messages": [{"role": "user", "content": LONG}], "temperature": 0})
    wait_until(lambda: server.root.computed > 0)
    leaving.close()
    server.wait_empty()
    half = server.root.computed
    server.root.pause = 0.0
    found = ask(server, LONG)
    assert half < found["usage"]["prompt_tokens"]
    assert text_of(found) == fresh(LONG)
    assert text_of(ask(server, STORY)) == fresh(STORY)


def test_c6_a_full_context_ends_an_answer_and_the_next_is_right(server):
    found = ask(server, LONG, max_tokens=None)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == server.engine.seq_len + 1  # the last is not read
    assert text_of(ask(server, STORY)) == fresh(STORY)
    server.wait_empty()
