"""Between the engine's thread and asyncio: one wake-up of the event loop for each step."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from pyllama_dist.engine.stream import Stream


class Bridge:
    """Wakes those that read streams; `after_step` is for the engine, all else for the loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, observe: Callable[[int, float], None]
    ) -> None:
        """`observe` is told the rows and seconds of each step, in the loop."""
        self._loop, self._observe = loop, observe
        self._readers: set[asyncio.Event] = set()

    def after_step(self, rows: int, seconds: float) -> None:
        """Called by the engine's thread: streams may have got something."""
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._wake, rows, seconds)

    async def read(self, stream: Stream) -> AsyncIterator[list[int]]:
        """The tokens that each step gives, maybe none, until the end; raises as the stream does."""
        event = asyncio.Event()
        self._readers.add(event)
        try:
            while True:
                event.clear()
                yield list(stream.ready())
                if stream.ended:
                    return
                await event.wait()
        finally:
            self._readers.discard(event)

    def _wake(self, rows: int, seconds: float) -> None:
        if rows:
            self._observe(rows, seconds)
        for reader in self._readers:
            reader.set()
