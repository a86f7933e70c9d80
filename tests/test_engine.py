"""The queue before a model, with work that is plain Python."""

import asyncio
import gc
import threading
import weakref
from contextlib import nullcontext

import pytest

from engine import Closing, Engine, Full

WAIT = 20  # seconds after which a test that hangs fails


class Gate:
    """Work that yields 0, 1, ... and asks to be let through before each; `begun` once it runs."""

    def __init__(self, results: int = 1):
        self.begun, self.ended, self.passes = threading.Event(), threading.Event(), threading.Semaphore(0)
        self.results, self.made = results, 0

    def __call__(self, stopped):
        self.begun.set()
        try:
            for n in range(self.results):
                assert self.passes.acquire(timeout=WAIT), "nobody opened the gate"
                self.made += 1
                yield n
        finally:
            self.ended.set()

    def open(self, results: int = 1000) -> None:
        self.passes.release(results)


def numbers(n: int):
    return lambda stopped: iter(range(n))


def started(context=None, max_waiting: int = 10) -> Engine:
    """An engine that runs, in a `thread` of its own here."""
    engine = Engine(context or nullcontext(), max_waiting)
    engine.thread = threading.Thread(target=engine.run, daemon=True)
    engine.thread.start()
    return engine


def ended(engine: Engine) -> None:
    engine.end()
    engine.thread.join(WAIT)
    assert not engine.thread.is_alive() and engine.running is None


def check(scenario, max_waiting: int = 10, context=None):
    """Runs `scenario(engine)` in an event loop; afterwards nothing may be left."""
    engine = started(context, max_waiting)

    async def run() -> None:
        async with asyncio.timeout(WAIT):
            await scenario(engine)

    try:
        asyncio.run(run())
        assert not engine.open and not engine.queue
    finally:
        ended(engine)


async def results_of(job) -> list:
    with job:
        return [result async for result in job]


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_jobs_run_one_at_a_time_in_the_order_in_which_they_came():
    order, inside, most = [], 0, 0

    def work(name: int):
        def steps(stopped):
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            for n in range(5):
                order.append((name, n))
                yield name, n
            inside -= 1

        return steps

    async def scenario(engine: Engine) -> None:
        jobs = [engine.submit(work(name)) for name in range(8)]
        told = await asyncio.gather(*map(results_of, reversed(jobs)))  # whoever reads first
        assert told == [[(name, n) for n in range(5)] for name in reversed(range(8))]

    check(scenario)
    assert order == [(name, n) for name in range(8) for n in range(5)] and most == 1


def test_the_queue_is_bounded_and_a_refusal_says_when_to_come_again():
    async def scenario(engine: Engine) -> None:
        gate = Gate()
        running = engine.submit(gate)
        await happens(gate.begun)
        waiting = [engine.submit(numbers(1)) for _ in range(3)]
        with pytest.raises(Full, match="3 requests are waiting") as refused:
            engine.submit(numbers(1))
        assert refused.value.retry_after >= 1 and isinstance(refused.value.retry_after, int)
        assert len(engine.open) == 4
        waiting[1].close()  # who leaves makes room
        waiting[1] = engine.submit(numbers(2))
        gate.open()
        assert [await results_of(job) for job in (running, *waiting)] == [[0], [0], [0, 1], [0]]

    check(scenario, max_waiting=3)


def test_without_a_queue_one_after_another_is_always_taken():
    async def scenario(engine: Engine) -> None:
        for _ in range(300):
            assert await results_of(engine.submit(numbers(1))) == [0]
        gate = Gate()
        job = engine.submit(gate)
        with pytest.raises(Full):  # whether its thread has begun or not
            engine.submit(numbers(1))
        await happens(gate.begun)
        with pytest.raises(Full):
            engine.submit(numbers(1))
        gate.open()
        await results_of(job)

    check(scenario, max_waiting=0)


def test_a_job_that_was_stopped_leaves_its_place_at_once():
    async def scenario(engine: Engine) -> None:
        gate = Gate()
        job = engine.submit(gate)
        await happens(gate.begun)
        job.stop()  # it computes on until its next result
        after = engine.submit(numbers(1))
        with pytest.raises(Full):
            engine.submit(numbers(1))
        gate.open()
        assert await results_of(after) == [0]
        job.close()

    check(scenario, max_waiting=0)


class Panic(BaseException):
    """As what PyO3 makes of a panic in Rust."""


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("no"), MemoryError(), Panic("no"), SystemExit(1)])
def test_what_a_job_raises_is_told_to_its_reader_alone(error):
    def fails(stopped):
        yield 1
        raise error

    async def scenario(engine: Engine) -> None:
        jobs = [engine.submit(work) for work in (numbers(3), fails, numbers(3), fails, numbers(2))]
        kind = type(error) if isinstance(error, Exception) else RuntimeError
        for job, expected in zip(jobs, ([0, 1, 2], None, [0, 1, 2], None, [0, 1]), strict=True):
            if expected is not None:
                assert await results_of(job) == expected
                continue
            read = []
            with job, pytest.raises(kind):
                async for result in job:
                    read.append(result)
            assert read == [1]
        with engine.submit(fails) as job, pytest.raises(kind):
            async for _ in job.batches(0.01):
                pass
        assert await results_of(engine.submit(numbers(1))) == [0] and engine.thread.is_alive()

    check(scenario)


def test_who_leaves_while_waiting_leaves_the_queue_at_once():
    async def scenario(engine: Engine) -> None:
        gate, never = Gate(), Gate()
        running = engine.submit(gate)
        await happens(gate.begun)
        waiting = [engine.submit(work) for work in (numbers(1), never, numbers(1))]
        assert [engine.ahead(job) for job in (running, *waiting)] == [0, 1, 2, 3]
        waiting[1].close()
        waiting[1].close()  # twice is as once
        assert len(engine.queue) == 2 and len(engine.open) == 3 and engine.ahead(waiting[2]) == 2
        gate.open()
        assert [await results_of(job) for job in (running, waiting[0], waiting[2])] == [[0], [0], [0]]
        assert not never.begun.is_set()

    check(scenario)


def test_who_leaves_a_running_job_ends_it_before_its_next_result():
    async def scenario(engine: Engine) -> None:
        gate = Gate(results=1000)
        with engine.submit(gate) as job:
            following = engine.submit(numbers(1))
            gate.open(3)
            read = job.__aiter__()
            assert [await anext(read) for _ in range(3)] == [0, 1, 2]
        assert job not in engine.open
        gate.open(1)
        assert await results_of(following) == [0]
        assert gate.made == 4 and gate.ended.is_set()  # the one under way, and none after it

    check(scenario)


def test_what_a_stopped_job_has_given_can_still_be_read():
    async def scenario(engine: Engine) -> None:
        gate, never = Gate(results=1000), Gate()
        with engine.submit(gate) as running, engine.submit(never) as waiting:
            gate.open(2)
            await until(lambda: gate.made == 2)
            for job in (running, waiting):
                job.stop()
                job.stop()
            assert not engine.queue and engine.open == {running, waiting}
            gate.open(1)
            assert [result async for result in running] == [0, 1, 2]
            assert [batch async for batch in waiting.batches(WAIT)] == [[]]
            assert not never.begun.is_set()

    check(scenario)


def test_work_is_told_to_stop():
    asking, told = threading.Event(), threading.Event()

    def work(stopped):
        while not stopped():
            asking.set()
        told.set()
        yield from ()

    async def scenario(engine: Engine) -> None:
        with engine.submit(work):
            await happens(asking)
        await happens(told)

    check(scenario)


def test_batches_are_all_results_in_order_as_time_passes():
    async def scenario(engine: Engine) -> None:
        gate = Gate(results=5)
        with engine.submit(gate) as job:
            batches = job.batches(0.02)
            assert await anext(batches) == []  # and the page stays alive
            gate.open(2)
            got = []
            while len(got) < 2:
                got += await anext(batches)
            assert await anext(batches) == []
            gate.open(3)
            async for batch in batches:
                got += batch
        assert got == [0, 1, 2, 3, 4]
        with engine.submit(numbers(2000)) as job:
            assert [n async for batch in job.batches(0.001) for n in batch] == list(range(2000))
        with engine.submit(numbers(0)) as job:
            assert [batch async for batch in job.batches(1)] == [[]]

    check(scenario)


def test_a_closed_engine_finishes_what_it_took_and_takes_no_more():
    async def scenario(engine: Engine) -> None:
        gate = Gate()
        jobs = [engine.submit(gate), engine.submit(numbers(2))]
        engine.close()
        with pytest.raises(Closing) as refused:
            engine.submit(numbers(1))
        assert refused.value.retry_after > 0
        gate.open()
        assert [await results_of(job) for job in jobs] == [[0], [0, 1]]

    check(scenario)


def test_an_abandoned_engine_tells_all_who_still_read():
    async def scenario(engine: Engine) -> None:
        gate, never = Gate(results=1000), Gate()
        jobs = [engine.submit(gate), engine.submit(never)]
        reading = [asyncio.create_task(results_of(job)) for job in jobs]
        await happens(gate.begun)
        engine.abandon()
        told = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(each) for each in told] == [Closing, Closing]
        with pytest.raises(Closing):
            engine.submit(numbers(1))
        gate.open(1)
        await until(lambda: engine.running is None)
        assert gate.made == 1 and not never.begun.is_set()

    check(scenario)


def test_the_end_stops_what_runs_and_drops_what_waits():
    async def scenario(engine: Engine) -> None:
        going = threading.Event()

        def work(stopped):
            while not stopped():
                going.set()
                yield 1

        with engine.submit(work), engine.submit(numbers(1)):
            await happens(going)
            await asyncio.to_thread(ended, engine)
            assert not engine.queue
        with pytest.raises(Closing):
            engine.submit(numbers(1))

    check(scenario)


def test_a_job_of_which_nobody_reads_the_rest_harms_nothing_when_the_loop_has_ended():
    engine, gate = started(), Gate(results=3)

    async def leave() -> None:
        engine.submit(gate)
        await happens(gate.begun)

    asyncio.run(leave())
    gate.open()
    assert gate.ended.wait(WAIT)
    ended(engine)


def test_work_is_done_in_the_engines_thread_and_context():
    entered = []

    class Context:
        def __enter__(self):
            entered.append(threading.current_thread())

        def __exit__(self, *_):
            entered.append(None)

    def work(stopped):
        yield list(entered), threading.current_thread()

    async def scenario(engine: Engine) -> None:
        for _ in range(2):
            ((inside, thread),) = await results_of(engine.submit(work))
            assert inside == [engine.thread] and thread is engine.thread is not threading.current_thread()
            assert entered == [engine.thread, None]
            entered.clear()

    check(scenario, context=Context())


def test_nothing_is_left_of_a_job():
    """What a job holds, such as a model's cache, goes when it is done, and not when the next one comes."""

    class Big:
        pass

    def work_with(big):
        def work(stopped):
            yield 1
            yield big is None

        return work

    async def scenario(engine: Engine) -> None:
        gc.disable()  # by counting references alone
        try:
            for read_all in (True, False):
                big = Big()
                alive = weakref.ref(big)
                with engine.submit(work_with(big)) as job:
                    async for _ in job:
                        if not read_all:
                            break
                del job, big
                for _ in range(5000):
                    if alive() is None:
                        break
                    await asyncio.sleep(0.001)
                assert alive() is None, f"a job lives on, its results {'all' if read_all else 'not all'} read"
        finally:
            gc.enable()

    check(scenario)


def test_who_asks_much_is_told_to_wait_longer():
    """retry_after follows what jobs take and how many are before."""

    async def scenario(engine: Engine) -> None:
        gate = Gate()
        jobs = [engine.submit(gate)]
        await happens(gate.begun)
        engine.seconds = 7.5  # as after jobs that took so long
        jobs += [engine.submit(numbers(1)) for _ in range(2)]
        with pytest.raises(Full) as refused:
            engine.submit(numbers(1))
        assert refused.value.retry_after == 23  # ceil(7.5 * 3)
        gate.open()
        for job in jobs:
            await results_of(job)
        assert engine.seconds < 7.5  # they took next to nothing

    check(scenario, max_waiting=2)
