"""The queue before a model, with work that is plain Python and with texts of a tiny model, written together."""

import asyncio
import gc
import math
import random
import threading
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from conftest import TINY

from choose import Sampling
from configurator import UserError
from engine import READ, Closing, Engine, Full
from generate import Piece, Rows, continuations
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

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


class NeverDrawn(CharTokenizer):
    unknown_id = 8


LETTERS = NeverDrawn("abcdefghi", byte_fallback=False, end_of_text=False)
torch.manual_seed(0)
# not with exact GELU, for which a switch of the whole process is turned: here two threads compute
MODEL = GPT(GPTConfig(vocab_size=9, tied=False, act="gelu_tanh", **TINY)).eval()
with torch.no_grad():
    for p in MODEL.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    MODEL.transformer.wte.weight[8] = math.nan
FOREVER = 10**6  # tokens


def texts(*prompts: str, opens: int = 0, **how):
    """Work that gives 0, 1, ... and then asks for texts."""

    def work(stopped):
        yield from range(opens)
        return Rows([LETTERS.encode(prompt).tolist() for prompt in prompts], Sampling(**how))

    return work


def told(results: list, rows: int) -> list[str]:
    pieces = [result for result in results if isinstance(result, Piece)]
    return ["".join(piece.text for piece in pieces if piece.row == row) for row in range(rows)]


def started(context=None, max_waiting: int = 10, max_rows: int = 1) -> Engine:
    """An engine that runs, in a `thread` of its own here."""
    engine = Engine(MODEL, LETTERS, context or nullcontext(), max_rows, max_waiting)
    engine.thread = threading.Thread(target=engine.run, daemon=True)
    engine.thread.start()
    return engine


def ended(engine: Engine) -> None:
    engine.end()
    engine.thread.join(WAIT)
    assert not engine.thread.is_alive() and not engine.running and engine.rows == 0 and engine.batch.decoder is None


def check(scenario, max_waiting: int = 10, context=None, max_rows: int = 1):
    """Runs `scenario(engine)` in an event loop; afterwards nothing may be left."""
    engine = started(context, max_waiting, max_rows)

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


def test_jobs_open_one_at_a_time_in_the_order_in_which_they_came():
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
        assert [engine.ahead(job) for job in (running, *waiting)] == [0, 0, 1, 2]
        waiting[1].close()
        waiting[1].close()  # twice is as once
        assert len(engine.queue) == 2 and len(engine.open) == 3 and engine.ahead(waiting[2]) == 1
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
        await until(lambda: not engine.running)
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

    check(scenario, context=Context())
    assert entered[1:] == [None]


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


# texts that are written together


def test_texts_that_are_written_together_are_those_that_each_is_alone():
    asked = [
        (["a"], {"seed": 1}),
        (["bcd", "a", "hgfedcba" * 3], {"seed": 2, "temperature": 0.7, "top_k": 3}),
        (["ab" * 40], {"temperature": 0}),
        (["c"] * 4, {"seed": 3, "repetition_penalty": 1.3, "stop": ["ab", "f"]}),
        (["d", "e"], {"seed": 4, "top_p": 0.5, "max_new_tokens": 3}),
        (["d"], {"max_new_tokens": 0}),
    ] * 3

    async def scenario(engine: Engine) -> None:
        before = time.monotonic()
        jobs = []
        for number, (prompts, how) in enumerate(asked):
            how = {"max_new_tokens": 70} | how
            jobs.append(engine.submit(texts(*prompts, opens=number % 3, **how), len(prompts)))
            await asyncio.sleep(0.002 * (number % 4))
        results = await asyncio.gather(*map(results_of, jobs))
        assert engine.rows == 0 and engine.batch.decoder is None
        drawn = sum(len(result.tokens) for each in results for result in each if isinstance(result, Piece))
        assert engine.drawn == drawn and engine.read > 0
        for number, ((prompts, how), job, result) in enumerate(zip(asked, jobs, results, strict=True)):
            assert result[: number % 3] == list(range(number % 3))
            sampling = Sampling(**({"max_new_tokens": 70} | how))
            assert told(result, len(prompts)) == continuations(MODEL, LETTERS, prompts, sampling)
            assert {piece.row for piece in result[number % 3 :] if piece.finished} == set(range(len(prompts)))
            assert before <= job.submitted <= job.begun <= time.monotonic()
            assert job.first is None if how.get("max_new_tokens") == 0 else job.begun <= job.first

    check(scenario, max_rows=7, max_waiting=20)


def test_jobs_are_in_the_batch_at_the_same_time_as_far_as_there_is_room():
    """And a large one is not overtaken by small ones, for which there would be room."""

    async def scenario(engine: Engine) -> None:
        def begun() -> list[bool]:
            return [job.begun is not None for job in jobs]

        wanted = [1, 2, 4, 1, 3]
        jobs = [engine.submit(texts(*["a"] * rows, max_new_tokens=FOREVER), rows) for rows in wanted]
        await until(lambda: engine.rows == 3)
        drawn = engine.drawn
        await until(lambda: engine.drawn > drawn + 30)
        assert begun() == [True, True, False, False, False] and engine.running == set(jobs[:2])
        assert [engine.ahead(job) for job in jobs] == [0, 0, 0, 1, 2] and len(engine.queue) == 3
        jobs[1].close()
        drawn = engine.drawn
        await until(lambda: engine.drawn > drawn + 30)
        assert begun() == [True, True, False, False, False] and engine.rows == 1
        jobs[0].close()
        await until(lambda: engine.rows == 4)
        assert begun() == [True, True, True, False, False]
        jobs[2].close()
        await until(lambda: engine.rows == 4 and engine.running == set(jobs[3:]))
        assert all(begun()) and not engine.queue
        for job in jobs[3:]:
            job.close()

    check(scenario, max_rows=4)


def test_who_can_be_admitted_at_once_does_not_wait():
    async def scenario(engine: Engine) -> None:
        def ask(rows: int):
            return engine.submit(texts(*["a"] * rows, max_new_tokens=FOREVER), rows)

        jobs = [ask(2), ask(2), ask(1)]  # whether they have begun or not
        engine.check_room(1)
        for _ in range(2):
            with pytest.raises(Full, match="all places are taken"):
                ask(2)
            await until(lambda: engine.rows == 5)
        jobs.append(ask(1))
        with pytest.raises(Full):
            engine.check_room()
        jobs[0].stop()  # its rows are free from now on
        jobs += [ask(1), ask(1)]
        with pytest.raises(Full):
            ask(1)
        await until(lambda: engine.running == set(jobs[1:]))
        for job in jobs:
            job.close()

    check(scenario, max_rows=6, max_waiting=0)


def test_a_small_job_waits_behind_a_large_one_though_there_is_room_for_it():
    async def scenario(engine: Engine) -> None:
        with engine.submit(texts("a", "b", "c", max_new_tokens=FOREVER), 3) as running:
            with engine.submit(texts("a", "b"), 2) as waiting:
                await until(lambda: engine.rows == 3)
                with pytest.raises(Full, match="1 requests are waiting"):
                    engine.check_room(1)
                waiting.stop()
                engine.check_room(1)
                assert engine.running == {running}

    check(scenario, max_rows=4, max_waiting=1)


def test_a_job_that_asks_for_more_rows_than_there_are_is_told_alone():
    async def scenario(engine: Engine) -> None:
        other = engine.submit(texts("a", max_new_tokens=300))
        for rows in (4, 1):  # whether it says so beforehand or not
            with engine.submit(texts("a", "b", "c", "d"), rows) as job, pytest.raises(ValueError, match="at most"):
                async for _ in job:
                    pass
        assert len(told(await results_of(other), 1)[0]) == 300

    check(scenario, max_rows=3)


def test_what_goes_wrong_with_one_is_told_to_nobody_else():
    def fails(stopped):
        yield 1
        raise ValueError("no")

    bad = texts("ab", "i", max_new_tokens=50)  # a token whose embedding is not a number

    async def scenario(engine: Engine) -> None:
        good = [engine.submit(texts("ab", seed=seed, max_new_tokens=200), 1) for seed in range(3)]
        wrong = [engine.submit(work, 2) for work in (bad, fails, bad)]
        good += [engine.submit(texts("ab", seed=seed, max_new_tokens=200), 1) for seed in range(3, 6)]
        found = await asyncio.gather(*map(results_of, (*good, *wrong)), return_exceptions=True)
        for seed in range(6):
            sampling = Sampling(max_new_tokens=200, seed=seed)
            assert told(found[seed], 1) == continuations(MODEL, LETTERS, ["ab"], sampling)
        assert [type(error) for error in found[6:]] == [UserError, ValueError, UserError]
        assert "not finite" in str(found[6])

    check(scenario, max_rows=6)


def test_what_goes_wrong_with_all_is_told_to_all_in_the_batch_and_the_next_are_written():
    beyond = [[9]]  # an id beyond the model's vocabulary, on which the step that all have in common fails

    def work(stopped):
        return Rows(beyond, Sampling())
        yield

    async def scenario(engine: Engine) -> None:
        for _ in range(3):
            going = [engine.submit(texts("a", "b", max_new_tokens=FOREVER), 2) for _ in range(2)]
            await until(lambda: engine.rows == 4)
            waiting = engine.submit(texts("abc", seed=5, max_new_tokens=20), 2)
            going.append(engine.submit(work))
            waiting.close()
            found = await asyncio.gather(*map(results_of, going), return_exceptions=True)
            assert [type(error) for error in found] == [IndexError] * 3
            tensors = [
                value for error in found for frame in frames_of(error) for value in frame.f_locals.values()
                if isinstance(value, torch.Tensor)
            ]  # fmt: skip
            assert tensors == [] and engine.rows == 0 and not engine.running
            after = engine.submit(texts("abc", seed=5, max_new_tokens=20))
            assert told(await results_of(after), 1) == continuations(MODEL, LETTERS, ["abc"], Sampling(20, seed=5))

    check(scenario, max_rows=5)


def frames_of(error: Exception) -> list:
    """Those in which it was raised, within the batch."""
    frames, step = [], error.__traceback__
    while step:
        frames += [step.tb_frame] if step.tb_frame.f_code.co_filename.endswith(("decoder.py", "generate.py")) else []
        step = step.tb_next
    assert frames
    return frames


def test_who_leaves_in_the_middle_has_no_token_more_and_the_others_go_on():
    async def scenario(engine: Engine) -> None:
        staying = engine.submit(texts("ab", max_new_tokens=1500))
        with engine.submit(texts("a", "b", max_new_tokens=FOREVER), 2) as leaving:
            async for group in leaving.groups():
                if group:
                    break
        await until(lambda: engine.rows == 1)
        assert engine.running == {staying} and leaving.results.qsize() <= 2
        expected = continuations(MODEL, LETTERS, ["ab"], Sampling(max_new_tokens=1500))
        assert told(await results_of(staying), 1) == expected

    check(scenario, max_rows=3)


def test_work_that_opens_a_job_is_done_in_turn_with_the_tokens_of_the_others():
    async def scenario(engine: Engine) -> None:
        def work(stopped):
            for _ in range(50):
                yield engine.drawn

        writing = engine.submit(texts("a", "b", max_new_tokens=FOREVER), 2)
        await until(lambda: engine.drawn > 0)
        drawn = await results_of(engine.submit(work))
        assert [after - before for before, after in zip(drawn, drawn[1:], strict=False)] == [2] * 49
        writing.close()

    check(scenario, max_rows=3)


def test_a_crowd_of_prompts_does_not_hold_up_who_writes():
    """No more of them are read between two tokens than may be: those that were read later have fewer tokens."""
    prompts = ["".join(random.Random(k).choices("abcdefgh", k=32)) for k in range(80)]

    async def scenario(engine: Engine) -> None:
        with engine.submit(texts(*prompts, max_new_tokens=FOREVER), len(prompts)) as crowd:
            await until(lambda: engine.drawn > 1000)
            crowd.stop()
            rows = [piece.row async for piece in crowd]
        written = [rows.count(row) for row in range(80)]
        assert written == [written[0] - k // (READ // 32) for k in range(80)] and engine.read == 80 * 32

    check(scenario, max_rows=100)


def test_the_event_loop_is_not_woken_for_each_token():
    async def scenario(engine: Engine) -> None:
        loop, calls = asyncio.get_running_loop(), 0
        call_soon = loop.call_soon_threadsafe

        def counted(*args):
            nonlocal calls
            calls += threading.current_thread() is engine.thread
            return call_soon(*args)

        loop.call_soon_threadsafe = counted
        jobs = [engine.submit(texts("a", seed=seed, max_new_tokens=500)) for seed in range(8)]
        groups = await asyncio.gather(*map(groups_of, jobs))
        assert engine.drawn == 4000 and calls < 400 and max(map(len, groups)) < 400
        assert all(sum(map(len, each)) == 500 for each in groups)

    check(scenario, max_rows=8)


async def groups_of(job) -> list[list]:
    with job:
        return [group async for group in job.groups()]


def test_another_event_loop_takes_over_from_one_that_ended_in_the_middle():
    """And what is made is handed over while it is made."""
    engine = started(max_rows=4)

    async def read(leave: bool) -> None:
        async with asyncio.timeout(WAIT):
            job, read = engine.submit(texts("a", max_new_tokens=FOREVER)), 0
            async for group in job.groups():
                read += len(group) > 1
                if read == 3:
                    break
            if not leave:
                job.close()

    try:
        for _ in range(3):
            asyncio.run(read(leave=True))
            asyncio.run(read(leave=False))
        assert len(engine.open) == 3
    finally:
        ended(engine)


def test_nothing_is_left_of_many_who_left_in_the_middle():
    rng = random.Random(0)

    async def one(engine: Engine, number: int) -> weakref.ref:
        rows = rng.randint(1, 4)
        work = texts(*["abc"[: 1 + number % 3]] * rows, opens=number % 3, max_new_tokens=rng.choice([1, 20, FOREVER]))
        with engine.submit(work, rows) as job:
            read = 0
            async for _ in job:
                read += 1
                if read > 30 or rng.random() < 0.05:
                    break
        return weakref.ref(job)

    async def scenario(engine: Engine) -> None:
        threads = threading.active_count()
        for _ in range(4):
            jobs = await asyncio.gather(*(one(engine, number) for number in range(50)))
            await until(lambda: engine.rows == 0 and not engine.running and not engine.queue)
            assert engine.batch.decoder is None and engine.batch.plan is None and not engine.batch.coming
            await until(lambda: not engine.post.made and not engine.post.looking)
            gc.collect()
            assert not any(job() for job in jobs) and threading.active_count() == threads

    check(scenario, max_rows=6, max_waiting=100)
