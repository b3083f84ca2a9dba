"""Requests that schemathesis makes of /openapi.json, valid and not, against a server.

    python -m tests.api_fuzz --requests 10000 --seed 1
    python -m tests.api_fuzz --requests 1000 --seed 1 --real

Every answer must be one that the description knows: no 5xx, errors with their shape, wrong bodies
refused. Afterwards the server must hold nothing for anyone, and take no more than it did when a
tenth of the requests had come.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode, checks

from tests.api_process import GRAMMAR, Taken, grown, real, scripted

TOKENS = 64  # of an answer at most: the built-in model is slow
VOCABULARY = 1000  # of each server's model there are as many tokens
_ROUND = 50  # requests to one route, before the next
# The description does not say all that is wrong: a tool's result needs the id of a call.
_NOT_CHECKED = [checks.positive_data_acceptance]
_TOO_LARGE = [*_NOT_CHECKED, checks.negative_data_rejection]  # which knows no 413


@dataclass
class Sent:
    """What was asked, and what came."""

    statuses: Counter[str] = field(default_factory=Counter)  # by route, kind of data and status
    wrong: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())


def fuzz(url: str, requests: int, first: int) -> Iterator[Sent]:
    """Sends requests, and gives what has become of them after each round."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    sent, number = Sent(), first
    while sent.requests < requests:
        for operation in operations:
            for mode in GenerationMode:
                if sent.requests < requests and _can_be(operation, mode):
                    count = min(_ROUND, requests - sent.requests)
                    strategy = operation.as_strategy(generation_mode=mode)
                    _round(sent, strategy, mode, count, number)
                    number += 1
                    yield sent


def _can_be(operation: Any, mode: GenerationMode) -> bool:
    """A route that takes no body takes nothing that is wrong."""
    return mode == GenerationMode.POSITIVE or bool(operation.body)


def _round(sent: Sent, strategy: Any, mode: GenerationMode, count: int, number: int) -> None:
    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def ask(case: Any) -> None:
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _whole(case.body)
            _mend(case.body, number)
        answer = case.call(timeout=60)
        sent.statuses[f"{case.operation.label} {mode.value} {answer.status_code}"] += 1
        not_checked = _TOO_LARGE if answer.status_code == 413 else _NOT_CHECKED
        try:
            case.validate_response(answer, excluded_checks=not_checked)
        except schemathesis.errors.FailureGroup as failures:
            sent.wrong.append(f"seed {number}: {str(failures)[:4000]}")

    ask()


def _whole(value: Any) -> Any:
    """The same with integers for 1.0, which JSON Schema counts among them, and the server not."""
    match value:
        case dict():
            return {name: _whole(one) for name, one in value.items()}
        case list():
            return [_whole(one) for one in value]
        case float() if value.is_integer():
            return int(value)
    return value


def _mend(body: dict[str, Any], number: int) -> None:
    """Makes answers short, and in two rounds of three what no schema says, so that one comes."""
    body.pop("ignore_eos", None)
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], TOKENS)
    if number % 3 == 0:
        return
    body.pop("model", None)
    for name in ("tokens", "stop_token_ids"):
        if body.get(name):
            body[name] = [token % VOCABULARY for token in body[name]]
    for message in body.get("messages") or ():
        if isinstance(message.get("content"), list):
            message["content"] = [{"type": "text", "text": str(message["content"])}]
        if message.get("role") == "tool":
            message["tool_call_id"] = "call_1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--real", action="store_true", help="a model on three nodes answers")
    chosen = parser.parse_args()
    start: Callable[[], Any] = real if chosen.real else scripted
    before, sent, told = None, Sent(), 0
    with start() as server:
        httpx.post(f"{server.url}/v1/chat/completions", json=GRAMMAR, timeout=60, trust_env=False)
        for sent in fuzz(server.url, chosen.requests, chosen.seed):
            for wrong in sent.wrong[told:]:
                print(wrong, flush=True)
            told = len(sent.wrong)
            if before is None and sent.requests >= chosen.requests / 10:
                server.wait_empty()
                before = Taken.by(server.pid)
        server.wait_empty()
        after = Taken.by(server.pid)
    assert before is not None
    wrong = len(sent.wrong)
    print(
        json.dumps(
            {
                "requests": sent.requests,
                "wrong": wrong,
                "grown": grown(before, after),
                "before": asdict(before),
                "after": asdict(after),
                "statuses": sent.statuses,
            },
            indent=1,
            sort_keys=True,
        )
    )
    sys.exit(bool(wrong or grown(before, after)))


if __name__ == "__main__":
    main()
