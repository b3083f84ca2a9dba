"""What tests of /v1/responses share: streams read as clients read them, and what holds of each."""

import json
from typing import Any

RESPONSES = "/v1/responses"
Json = dict[str, Any]


def events(text: str) -> list[Json]:
    """The events of a stream; names of lines are types of events, and numbers have no gaps."""
    found = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        found.append(told)
    assert [told["sequence_number"] for told in found] == list(range(len(found)))
    return found


def types(found: list[Json]) -> list[str]:
    """Types of events without `response.`; neighbours of one type are one."""
    names = [told["type"].removeprefix("response.") for told in found]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


def replayed(found: list[Json]) -> Json:
    """The response that a stream ends with, whose items must be what its events say."""
    first, second, *middle, last = found
    assert (first["type"], second["type"]) == ("response.created", "response.in_progress")
    for told in (first, second):
        assert told["response"]["status"] == "in_progress"
        assert told["response"]["output"] == []
        assert told["response"]["usage"] is None
    items: list[Json] = []
    for told in middle:
        if told["type"] == "response.in_progress":
            assert told["response"]["status"] == "in_progress"
            continue
        index, type_ = told["output_index"], told["type"].removeprefix("response.")
        if type_ == "output_item.added":
            assert index == len(items)
            assert told["item"]["status"] == "in_progress"
            assert told["item"].get("content", []) == []
            assert told["item"].get("arguments", "") == ""
            items.append({"id": told["item"]["id"], "text": "", "done": None})
            continue
        assert index == len(items) - 1, "one item at a time"
        item = items[index]
        assert item["done"] is None
        if type_ == "output_item.done":
            item["done"] = told["item"]
        else:
            assert told["item_id"] == item["id"]
            assert told.get("content_index", 0) == 0
            assert ("content_index" in told) == ("arguments" not in type_)
            if type_.endswith(".delta"):
                assert told["delta"]
                item["text"] += told["delta"]
            elif type_.endswith("_text.done"):
                assert told["text"] == item["text"]
            elif type_.endswith("arguments.done"):
                assert told["arguments"] == item["text"]
    response = last["response"]
    assert last["type"] == f"response.{response['status']}"
    assert response["id"] == first["response"]["id"]
    if response["status"] != "failed":
        assert [item["done"] for item in items] == response["output"]
    for item, done in zip(items, response["output"], strict=True):
        assert item["text"] == text_of(done)
    return response


def text_of(item: Json) -> str:
    """The text of an item of the output."""
    if item["type"] == "function_call":
        return item["arguments"]
    (part,) = item["content"]
    return part["text"]


def without_ids(response: Json) -> Json:
    """A response without what differs whenever it is asked for, or depends on the cache."""
    response = json.loads(json.dumps(response))
    for name in ("id", "created_at", "completed_at"):
        del response[name]
    del response["usage"]["input_tokens_details"]
    for item in response["output"]:
        del item["id"]
        item.pop("call_id", None)
    return response
