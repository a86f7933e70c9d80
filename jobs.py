"""What was asked for of the engine, and its results on their way from the thread that computes to the event loop."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine import Engine

GATHER, EACH, LONGEST = 0.02, 0.005, 0.1  # seconds in which results are gathered: at least, for each reader, at most
DONE = object()  # after the last result
# Takes a function that says whether to stop; yields results, and returns what is to be written then, Rows or None
Work = Callable[[Callable[[], bool]], Iterator[Any]]


class Refused(Exception):
    """No work is taken now. `retry_after`: seconds after which it may be."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Full(Refused):
    """As many wait as may."""


class Closing(Refused):
    """The engine finishes what it has and takes no more."""


class Job:
    """Work that was taken: `async for` gives its results as they come, those of its work and then a Piece for each of
    its texts in turn, and raises what went wrong. Its times are time.monotonic()'s."""

    def __init__(self, engine: "Engine", work: Work, rows: int):
        self.engine, self.rows = engine, rows  # those that it wants, and then those that it has
        self.work: Work | None = work
        self.submitted = time.monotonic()
        self.begun: float | None = None  # when it was admitted
        self.first: float | None = None  # when its first token was there
        self.newest: float | None = None  # and its newest
        self.results: asyncio.Queue[list[Any]] = asyncio.Queue()  # those that came together
        self.stopped = threading.Event()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stop(self) -> None:
        """Ends the work; what it has given so far can still be read."""
        self.stopped.set()
        if self.engine.leave_queue(self):
            self.results.put_nowait([DONE])

    def close(self) -> None:
        """Ends the work, if it has not ended, for a reader who has left."""
        self.stop()
        self.engine.open.discard(self)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for group in self.groups():
            for result in group:
                yield result

    async def groups(self) -> AsyncIterator[list[Any]]:
        """The results, those that have come together at once."""
        ended = None
        while ended is None:
            group, ended = await self._next()
            if group:
                yield group
        if ended is not DONE:
            raise ended

    async def batches(self, seconds: float) -> AsyncIterator[list[Any]]:
        """The results of each so many seconds, as they pass; of some there may be none."""
        ended = None
        while ended is None:
            batch: list[Any] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while ended is None:
                        group, ended = await self._next()
                        batch += group
            yield batch
        if ended is not DONE:
            raise ended

    async def _next(self) -> tuple[list[Any], Any]:
        """Results, and what ended them: None, DONE or an exception."""
        group = await self.results.get()
        ends = group[-1] is DONE or isinstance(group[-1], Exception)
        return (group[:-1], group[-1]) if ends else (group, None)


class Post:
    """Results on their way. `give` and `call` are for the thread that computes, the rest is the event loop's."""

    def __init__(self):
        self.made: deque[tuple[Job, Any]] = deque()
        self.looking = False  # whether the event loop is going to look there
        self.urgent = False  # and whether it is to at once
        self.loop: asyncio.AbstractEventLoop | None = None

    def to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Where results are read from now on; of a loop that has ended, nobody looks any more."""
        if loop is not self.loop:
            self.loop, self.looking = loop, False
            self.made.clear()

    def give(self, job: Job, result: Any, urgent: bool = False) -> None:
        """To be read after `call`: soon, and where it is urgent at once."""
        self.made.append((job, result))
        self.urgent |= urgent

    def call(self) -> None:
        """Has the event loop look for what was given. To wake it up for each token costs a tenth of a small model's
        speed."""
        if not self.made or self.looking and not self.urgent:
            return
        self.urgent, look = False, self._hand_over
        if not self.looking:
            self.looking, look = True, self._look
        try:
            self.loop.call_soon_threadsafe(look)
        except RuntimeError:  # it has ended
            self.made.clear()
            self.looking = False

    def _look(self) -> None:
        """Hands over what was given, and looks again soon; where nothing was, the thread calls."""
        if not self.made:
            self.looking = False
            if not self.made:
                return
            self.looking = True  # something has come in between, and the thread did not call
        readers = self._hand_over()  # who each write a message of their own, with the interpreter that computes, too
        self.loop.call_later(min(max(GATHER, EACH * readers), LONGEST), self._look)

    def _hand_over(self) -> int:
        """To how many readers."""
        groups: dict[Job, list[Any]] = {}
        for _ in range(len(self.made)):
            job, result = self.made.popleft()
            groups.setdefault(job, []).append(result)
        for job, group in groups.items():
            job.results.put_nowait(group)
        return len(groups)
