"""A client that leaves ends what is done for it."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from pyllama_dist.api.errors import ApiError

_LEFT = 499  # as nginx has it; nobody is there to read it
_T = TypeVar("_T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What comes of some work; it is cancelled when the client leaves.

    Raises:
        ApiError: the client has left.
    """
    task = asyncio.create_task(work)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if watching.done():
            raise ApiError(_LEFT, "the client has left") from None
        raise  # the server ends
    finally:
        watching.cancel()
        task.cancel()
        await asyncio.wait([watching, task])
