"""Decoding for many who ask at once: one piece of work at a time, the others wait in a queue of bounded length.

Notable choices:
- The main thread computes, and the event loop has another: a page and an API stay alive while a model writes. The other
  way round costs half of a small model's speed: in a thread that is not the first, OpenMP's go to sleep all the time.
- A job is open from `submit` to the end of its `with` block, whose end stops it, whatever the reason: who hangs up
  leaves nothing behind. A job that waits leaves the queue at once, one that runs ends before its next token.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

GATHER = 0.02  # seconds in which results are gathered
DONE = object()  # after the last result
Work = Callable[[Callable[[], bool]], Iterator[Any]]  # takes a function that says whether to stop, yields results


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
    """Work that was taken: `async for` gives its results as they come, and raises what the work raised."""

    def __init__(self, engine: "Engine", work: Work):
        self.engine, self.work = engine, work
        self.made: deque[Any] = deque()  # results on their way out of the thread
        self.looking = False  # whether the event loop is going to look there
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

    def give(self, result: Any) -> None:
        """Called by `Engine.run`. To wake the event loop for each token costs a tenth of a small model's speed."""
        self.made.append(result)
        if not self.looking or result is DONE:  # the end does not wait
            self.looking = True
            with suppress(RuntimeError):  # the event loop has ended, and nobody waits any more
                self.engine.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        """Hands over what has come, and looks again soon; where nothing has, the thread calls."""
        if not self.made:
            self.looking = False
            if not self.made:
                return
            self.looking = True  # something has come in between, and the thread did not call
        self.results.put_nowait([self.made.popleft() for _ in range(len(self.made))])
        self.engine.loop.call_later(GATHER, self._look)


class Engine:
    """The queue, and `run`, which computes what is in it, in `context` (a model's autocast). All else is to be called
    from one event loop only."""

    def __init__(self, context: AbstractContextManager, max_waiting: int):
        """`max_waiting`: jobs that may wait for the one that runs."""
        self.context, self.max_waiting = context, max_waiting
        self.queue: deque[Job] = deque()
        self.open: set[Job] = set()  # submitted, and not yet left by whoever reads the results
        self.running: Job | None = None
        self.seconds = 1.0  # what a job takes, a mean over the newest
        self.closing = self.ended = False
        self.changed = threading.Condition()

    def submit(self, work: Work) -> Job:
        """Takes work into the queue. Full or Closing where it is not taken."""
        self.loop = asyncio.get_running_loop()
        with self.changed:
            self.check_room()
            job = Job(self, work)
            self.open.add(job)
            self.queue.append(job)
            self.changed.notify()
        return job

    def check_room(self) -> None:
        """Full or Closing where work would not be taken now."""
        if self.closing:
            raise Closing("the server is shutting down and takes no new requests", 5)
        idle = self.running is None or self.running.stopped.is_set()  # what is stopped ends before its next token
        if len(self.queue) - idle >= self.max_waiting:
            wait = math.ceil(self.seconds * (len(self.queue) + 1))
            raise Full(f"{len(self.queue)} requests are waiting already; try again in {wait} s", wait)

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one, the running one included; 0 once it runs."""
        with self.changed:
            return self.queue.index(job) + (self.running is not None) if job in self.queue else 0

    def leave_queue(self, job: Job) -> bool:
        """Whether it was waiting, which it no longer is."""
        with self.changed:
            waiting = job in self.queue
            if waiting:
                self.queue.remove(job)
        return waiting

    def close(self) -> None:
        """Takes no more work; what was taken goes on."""
        self.closing = True

    def abandon(self) -> None:
        """Takes no more work and ends what was taken, running or waiting: its readers get Closing."""
        self.close()
        with self.changed:
            self.queue.clear()
            for job in self.open:
                job.stopped.set()
                job.results.put_nowait([Closing("the server has shut down before the answer was finished", 5)])

    def end(self) -> None:
        """Stops all work: `run` returns before its next result."""
        with self.changed:
            self.closing = self.ended = True
            for job in (*self.open, *([self.running] if self.running else [])):
                job.stopped.set()
            self.queue.clear()
            self.changed.notify()

    def run(self) -> None:
        """Computes, until `end` is called."""
        while True:
            with self.changed:
                while not (self.queue or self.ended):
                    self.changed.wait(0.2)  # without a timeout, Windows would not wake up for Ctrl-C
                if self.ended:
                    return
                job = self.running = self.queue.popleft()
            last = self._compute(job)
            with self.changed:
                self.running = None  # before its reader can ask for more
            job.give(last)
            del job, last  # or what they hold would stay until the next one comes

    def _compute(self, job: Job) -> Any:
        """Runs a job; what is to be its last result, DONE or what it raised."""
        begun = time.monotonic()
        try:
            with self.context:
                for result in job.work(job.stopped.is_set):
                    job.give(result)
                    if job.stopped.is_set():
                        break
            return DONE
        except Exception as error:  # one request's, whose reader raises it; the next has nothing to do with it
            return error
        except BaseException as error:  # such as a panic in a tokenizer's Rust, which must not end all
            return RuntimeError(f"{type(error).__name__}: {error}")
        finally:
            self.seconds += (time.monotonic() - begun - self.seconds) / 8
