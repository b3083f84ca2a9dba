"""The worker's side of `measurer.py`: orders come as lines of JSON, and answers go as such.

An order is an object with one key, its name; the value has its arguments. What an order raises is
answered with {"error": "..."}. Needs nothing but Python: llama.cpp's environment has no more.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Orders = Mapping[str, Callable[..., dict[str, Any]]]


def serve(orders: Orders, *failures: type[Exception]) -> None:
    """Answers orders until the input ends.

    Args:
        orders: what to call, by name.
        failures: what an order may raise; anything else ends the process.
    """
    # Answers go to what was stdout; whatever a library prints goes to stderr.
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            [(name, details)] = json.loads(line).items()
            answer: dict[str, Any]
            try:
                answer = orders[name](**details)
            except failures as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), file=answers)
