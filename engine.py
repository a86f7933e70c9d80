"""Decoding for many who ask at once: what they ask for is written together, and who finds no room waits in a queue.

Notable choices:
- The main thread computes, and the event loop has another: a page and an API stay alive while a model writes. The other
  way round costs half of a small model's speed: in a thread that is not the first, OpenMP's go to sleep all the time.
- A job opens with work of its own, in turn with the others' tokens, and then has rows in the batch, which come and go
  between any two tokens. Jobs are admitted in the order in which they came: a large one is not overtaken.
- A job is open from `submit` to the end of its `with` block, whose end stops it, whatever the reason: who hangs up
  leaves nothing behind. A job that waits leaves the queue at once, one that runs ends before its next token.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from traceback import clear_frames
from typing import Any

from generate import Batch, Rows
from jobs import DONE, Closing, Full, Job, Post, Refused, Work
from model import GPT
from tokenizer import Tokenizer

__all__ = ["Closing", "Engine", "Full", "Job", "Refused", "Work"]
READ = 512  # tokens of prompts, or one prompt, that are read between two tokens of those who write


class Engine:
    """The queue, and `run`, which computes what is in it, in `context` (a model's autocast). All else is to be called
    from one event loop only."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, context: AbstractContextManager, max_rows: int, max_waiting: int
    ):
        """`max_rows`: texts that are written together. `max_waiting`: jobs that may wait for room among them."""
        self.context, self.max_rows, self.max_waiting = context, max_rows, max_waiting
        self.batch = Batch(model, tokenizer, max_rows, read_at_once=READ)
        self.queue: deque[Job] = deque()
        self.open: set[Job] = set()  # submitted, and not yet left by whoever reads the results
        self.running: set[Job] = set()  # admitted, and not yet ended
        self.opening: tuple[Job, Iterator[Any]] | None = None  # the one whose own work is being done
        self.post = Post()
        self.seconds = 1.0  # what a job takes, a mean over the newest
        self.closing = self.ended = False
        self.changed = threading.Condition()

    @property
    def rows(self) -> int:
        """Texts that are written now."""
        return len(self.batch)

    @property
    def drawn(self) -> int:
        """Tokens drawn since the start."""
        return self.batch.drawn

    @property
    def read(self) -> int:
        """Tokens of prompts that were read into the cache since the start; of equal prompts of a job but once."""
        return self.batch.read

    def submit(self, work: Work, rows: int = 1) -> Job:
        """Takes work that is going to want so many rows. Full or Closing where it is not taken."""
        self.post.to(asyncio.get_running_loop())
        with self.changed:
            self.check_room(rows)
            job = Job(self, work, max(1, rows))
            self.open.add(job)
            self.queue.append(job)
            self.changed.notify()
        return job

    def check_room(self, rows: int = 1) -> None:
        """Full or Closing where work for so many rows would not be taken now."""
        if self.closing:
            raise Closing("the server is shutting down and takes no new requests", 5)
        with self.changed:
            going = [job.rows for job in self.running if not job.stopped.is_set()]  # who is stopped goes before a token
            free, waiting = self.max_rows - sum(going), 0
            for wanted in (*(job.rows for job in self.queue), max(1, rows)):
                waits = waiting > 0 or wanted > free
                free -= 0 if waits else wanted
                waiting += waits
        if waits and waiting > self.max_waiting:
            wait = math.ceil(self.seconds * waiting / max(1, len(going)))
            why = f"{waiting - 1} requests are waiting already" if waiting > 1 else "all places are taken"
            raise Full(f"{why}; try again in {wait} s", wait)

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one in the queue; 0 for the next one, and once it was admitted."""
        with self.changed:
            return self.queue.index(job) if job in self.queue else 0

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
            for job in (*self.open, *self.running):
                job.stopped.set()
            self.queue.clear()
            self.changed.notify()

    # ---- the thread that computes

    def run(self) -> None:
        """Computes, until `end` is called."""
        with self.context:
            while self._wait():
                self._dismiss()
                self._open()
                self._step()
                self.post.call()
            self._dismiss()
            self.post.call()

    def _wait(self) -> bool:
        """Returns once there is something to do; False where all is to end."""
        with self.changed:
            while not (self.queue or self.running or self.ended):
                self.changed.wait(0.2)  # without a timeout, Windows would not wake up for Ctrl-C
            return not self.ended

    def _dismiss(self) -> None:
        """Ends those who were stopped."""
        for job in [job for job in self.running if job.stopped.is_set()]:
            try:
                self.batch.leave(job)
            except BaseException as error:  # such as a GPU's, which comes late
                self._fail(_told(error))  # ends this one, too
                return
            self._end(job, DONE)

    def _open(self) -> None:
        """Goes on with the work that jobs open with, until some has given a result, and takes in who has room."""
        while job := self._admitted():
            try:
                if self.opening is None:
                    self.opening = job, iter(job.work(job.stopped.is_set))
                self.post.give(job, next(self.opening[1]))
                return
            except StopIteration as ended:
                self.opening = None
                try:
                    self._join(job, ended.value)
                except Exception as error:
                    self._end(job, error)
            except BaseException as error:  # one request's, whose reader raises it; the next has nothing to do with it
                self._end(job, _told(error))

    def _admitted(self) -> Job | None:
        """The job whose work is open, else the first of the queue, where there is room for it."""
        if self.opening is not None:
            return self.opening[0]
        with self.changed:
            held = sum(job.rows for job in self.running)
            # what would never have room is admitted, and told so once it asks for it
            if not self.queue or min(self.queue[0].rows, self.max_rows) > self.max_rows - held:
                return None
            job = self.queue.popleft()
            self.running.add(job)
        job.begun = time.monotonic()
        return job

    def _join(self, job: Job, rows: Rows | None) -> None:
        if rows is None or not rows.prompts:
            return self._end(job, DONE)
        self.batch.join(job, rows)
        job.work, job.rows = None, len(rows.prompts)

    def _step(self) -> None:
        """The next token of all."""
        if not self.batch:
            return
        try:
            results = self.batch.step()
        except BaseException as error:  # such as for want of memory
            self._fail(_told(error))
            return
        now = time.monotonic()
        for job, result in results:
            if isinstance(result, Exception):
                self._end(job, result)
                continue
            begins = job.first is None and len(result.tokens) > 0
            if result.tokens:
                job.newest = now
            if begins:
                job.first = now
            self.post.give(job, result, urgent=begins)
            if result.finished:
                job.rows -= 1
                if not job.rows:
                    self._end(job, DONE)

    def _fail(self, error: Exception) -> None:
        """Ends all who have rows."""
        clear_frames(error.__traceback__)  # whose tensors would live as long as a reader keeps the error
        self.batch.clear()
        for job in [job for job in self.running if job.work is None]:
            self._end(job, error)

    def _end(self, job: Job, last: Any) -> None:
        """Nothing of a job stays. `last` is its last result: DONE, or what its reader is to raise."""
        if self.opening is not None and self.opening[0] is job:
            self.opening = None
        job.work, job.rows = None, 0
        with self.changed:
            self.running.discard(job)  # before its reader can ask for more
        if not job.stopped.is_set():
            self.seconds += (time.monotonic() - job.begun - self.seconds) / 8
        self.post.give(job, last, urgent=True)


def _told(error: BaseException) -> Exception:
    """What a reader can raise of an error, such as a panic in a tokenizer's Rust, which must not end all."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
