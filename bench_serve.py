"""What `python bench.py serve` measures: serve.py as users start it, under many clients at once.

Notable choices:
- Numbers of clients take turns, round after round, so that the ratio of two is a median of ratios in one round.
- Tokens are the server's own count, read at /metrics at both ends of a turn, so that texts half finished are in it.
- What a text is must not depend on who else is served: greedy texts are asked for alone and in company.
"""

import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path
from statistics import median
from typing import Any

import checkpoint
from bench_client import NAME, RETRY, Client, server, status_of
from bench_train import random_model
from configurator import Config, UserError, user_errors
from tokenizer import CharTokenizer

GREEDY, CROWD = 8, 16  # texts that are asked for alone and in company; the clients of that, at most
TIE = 1e-4  # two log-probabilities that differ by less may change places by rounding
SETTLED = 10  # seconds after which memory should not grow
PATIENCE = 60.0  # seconds in which the server must be idle once all have left
END = b"data: [DONE]\n\n\r\n0\r\n\r\n"  # of a stream in HTTP's chunks
Figures = dict[str, Any]


def measure(c: Config, say: Callable[[str], None]) -> Figures:
    """The figures of each number of clients in c.clients, and of the texts asked for in company; says a line for each
    turn, and what they come to."""
    with user_errors(ValueError, about=f"clients={c.clients}: expected whole numbers between commas, such as 1,16,64"):
        numbers = list(dict.fromkeys(int(each) for each in c.clients.split(",")))
    if min(numbers) < 1 or c.hang_ups < 0:
        raise UserError(f"clients={c.clients}, hang_ups={c.hang_ups}: expected at least 1, and at least 0")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source, vocab_size, context = model_in(c, Path(folder))
        with server(c, source, folder) as (port, pid):
            with user_errors(OSError, EOFError, about="the server no longer answers"):
                return asyncio.run(Bench(c, say, port, pid, vocab_size, context).all(numbers))


def model_in(c: Config, folder: Path) -> tuple[str, int, int]:
    """What to serve: c.init_from, or a checkpoint of random weights in `folder`; its ids and its context's tokens."""
    if c.init_from:
        model, tokenizer = checkpoint.pretrained(c.init_from)
        if tokenizer is None:
            raise UserError(f"init_from={c.init_from} holds no tokenizer, without which it cannot be served")
        return c.init_from, tokenizer.vocab_size, model.config.block_size
    if not 2 <= c.vocab_size <= 10**6 or c.block_size < 8:
        raise UserError("to measure serving, vocab_size must be 2 to a million, block_size at least 8")
    model = random_model(c)
    chars = "".join(map(chr, range(0x10000, 0x10000 + c.vocab_size)))
    tokenizer = CharTokenizer(chars, byte_fallback=False, end_of_text=False)  # whose texts end by their length alone
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    state = {"model": weights, "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "ckpt.pt", state)
    return str(folder), c.vocab_size, c.block_size


@dataclass
class Seen:
    """What the clients of one turn met."""

    first: list[float] = field(default_factory=list)  # seconds to each text's first token
    finished: int = 0  # texts
    tokens: int = 0  # in those
    refused: int = 0
    errors: Counter = field(default_factory=Counter)  # by status or code

    def refuse(self) -> None:
        self.refused += 1


class Bench:
    """A server that runs, and those who ask it."""

    def __init__(self, c: Config, say: Callable[[str], None], port: int, pid: int, vocab_size: int, context: int):
        self.c, self.say, self.port, self.pid = c, say, port, pid
        self.vocab_size, self.longest = vocab_size, max(1, min(64, context // 2))

    async def all(self, numbers: list[int]) -> Figures:
        alone = await self.greedy(at_once=False)
        turns: dict[int, list[Figures]] = {number: [] for number in numbers}
        for round in range(self.c.num_rounds):
            for number in numbers:
                turns[number].append(turn := await self.turn(number, round))
                if not turn["tokens_per_second"]:
                    raise UserError(f"max_seconds={self.c.max_seconds:g} was too little for a token: take more")
                turn["ratio"] = turn["tokens_per_second"] / turns[numbers[0]][round]["tokens_per_second"]
                self.say(line(number, turn))
        clients = {str(number): summary(each) for number, each in turns.items()}
        for number, each in clients.items():
            self.say(
                f"{number} clients, median of {self.c.num_rounds} rounds: {each['tokens_per_second']:,.1f} tokens/s, "
                f"{each['ratio']:.2f} times those with {numbers[0]}"
            )
        async with self.company(crowd := min(max(numbers), CROWD), -1):
            greedy = compared(alone, await self.greedy(at_once=True))
        self.say(
            f"greedy texts in the company of {crowd} clients: {greedy['differ']} of {greedy['texts']} differ, "
            f"{greedy['ties']} of them where two tokens' log-probabilities are within {TIE:g}"
        )
        found = {"clients": clients, "greedy": greedy}
        return found | ({"hang_ups": await self.hang_ups()} if self.c.hang_ups else {})

    def asked(self, rng: random.Random, **more: Any) -> Figures:
        prompt = [rng.randrange(self.vocab_size) for _ in range(rng.randint(1, self.longest))]
        asked = {"model": NAME, "prompt": prompt, "max_tokens": self.c.max_new_tokens}
        return asked | {"seed": rng.getrandbits(32)} | more

    async def told(self, path: str) -> bytes:
        client = Client(self.port)
        _, _, body = await client.ask(path)
        client.close()
        return body

    async def idle(self) -> bool:
        """Waits until nothing is left of those who have gone; whether that came."""
        for _ in range(int(PATIENCE / 0.1)):
            health = json.loads(await self.told("/health"))
            if not any(health[key] for key in ("open", "rows", "waiting", "running")):
                return True
            await asyncio.sleep(0.1)
        return False

    async def drawn(self) -> tuple[float, float]:
        """Tokens that the server has drawn so far, and when."""
        found = re.search(rb"^weigpt_generated_tokens_total (\S+)", await self.told("/metrics"), re.M)
        return float(found[1]), time.perf_counter()

    async def turn(self, number: int, round: int) -> Figures:
        """So many clients, for c.max_seconds."""
        async with self.company(number, round) as seen:
            (before, begun), memory = await self.drawn(), []
            while (left := begun + self.c.max_seconds - time.perf_counter()) > 0:
                await asyncio.sleep(min(1.0, left))
                memory.append((time.perf_counter() - begun, status_of(self.pid, "VmRSS")))
            after, ended = await self.drawn()
        settled = [kib for seconds, kib in memory if seconds >= SETTLED and kib is not None]
        return {
            "tokens": after - before,
            "tokens_per_second": (after - before) / (ended - begun),
            "first_token_seconds": seen.first,
            "finished": seen.finished,
            "finished_tokens": seen.tokens,
            "refused": seen.refused,
            "errors": dict(seen.errors),
            "memory_growth_kib": settled[-1] - settled[0] if settled else None,
        }

    @asynccontextmanager
    async def company(self, number: int, round: int) -> AsyncIterator[Seen]:
        """Clients who ask while the block lasts, and then hang up; the server is idle before and after."""
        await self.idle()
        seen = Seen()
        rngs = [random.Random(f"{self.c.seed} {round} {client}") for client in range(number)]
        tasks = [asyncio.create_task(self.client(seen, rng)) for rng in rngs]
        try:
            yield seen
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended
            await self.idle()

    async def client(self, seen: Seen, rng: random.Random) -> None:
        """One text after the other, for ever."""
        client, more = Client(self.port), {"stream": True, "stream_options": {"include_usage": True}}
        try:
            while True:
                try:
                    await self.text(client, seen, self.asked(rng, **more))
                except (OSError, EOFError) as error:
                    seen.errors[type(error).__name__] += 1
                    client.close()
                    await asyncio.sleep(RETRY)
        finally:
            client.close()

    async def text(self, client: Client, seen: Seen, asked: Figures) -> None:
        status, _ = await client.patiently(asked, seen.refuse)
        if status != 200:
            seen.errors[str(status)] += 1
            await asyncio.sleep(RETRY)
            return
        await client.reader.readuntil(b"data: {")
        first = time.perf_counter() - client.sent
        begins = await client.reader.readexactly(len(b'"error"'))
        if begins != b'"error"':
            seen.first.append(first)
        rest = begins + await client.reader.readuntil(END)
        if failed := re.search(rb'(?:^|data: {)"error": .*?"code": "?(\w+)', rest):
            seen.errors[failed[1].decode()] += 1
            return
        seen.finished += 1
        seen.tokens += int(re.search(rb'"completion_tokens": (\d+)', rest)[1])

    async def greedy(self, at_once: bool) -> list[Figures]:
        """The same few texts each time, one by one or at once: their log-probabilities, as OpenAI's API tells them."""
        rng, more = random.Random(self.c.seed), {"temperature": 0, "logprobs": 2}
        more["max_tokens"] = min(self.c.max_new_tokens, 32)

        async def ask(asked: Figures) -> Figures:
            client = Client(self.port)
            status, body = await client.patiently(asked)
            client.close()
            if status != 200:
                raise UserError(f"the server answered with {status}: {body.decode(errors='replace')}")
            return json.loads(body)["choices"][0]["logprobs"]

        texts = [ask(self.asked(rng, **more)) for _ in range(GREEDY)]
        return await asyncio.gather(*texts) if at_once else [await text for text in texts]

    async def hang_ups(self) -> Figures:
        """What is left of clients who leave in the midst of a stream."""

        async def leave(number: int) -> bool:
            client, rng = Client(self.port), random.Random(number)
            try:
                status, _ = await client.patiently(self.asked(rng, stream=True, max_tokens=2048))
                if status == 200:
                    await client.reader.readuntil(b"data: {")
                return status == 200
            except (OSError, EOFError):
                return False
            finally:
                client.close()

        def state() -> Figures:
            return {"threads": status_of(self.pid, "Threads"), "memory_kib": status_of(self.pid, "VmRSS")}

        await asyncio.gather(*map(leave, range(self.c.hang_ups)))  # the first ones make threads, which are kept
        await self.idle()
        before = state()
        left = await asyncio.gather(*map(leave, range(self.c.hang_ups)))
        idle = await self.idle()
        found = {
            "clients": sum(left),
            "errors": len(left) - sum(left),
            "idle": idle,
            "before": before,
            "after": state(),
        }
        now, then = ([f"{key} {value}" for key, value in found[when].items()] for when in ("after", "before"))
        self.say(
            f"{found['clients']} clients hung up in the midst of a stream, {found['errors']} could not: "
            f"{'nothing' if idle else 'something'} of theirs is left; {', '.join(now)}, before {', '.join(then)}"
        )
        return found


def compared(alone: list[Figures], company: list[Figures]) -> Figures:
    """How many of the same greedy texts differ, and in how many of these the tokens where they part were as likely."""
    gaps = []
    for one, other in zip(alone, company, strict=True):
        if one["tokens"] != other["tokens"]:
            pairs = zip(one["tokens"], other["tokens"], one["top_logprobs"], strict=False)
            parted = ((top[mine] - top.get(theirs, -inf)) for mine, theirs, top in pairs if mine != theirs)
            gaps.append(next(parted, inf))
    return {"texts": len(alone), "differ": len(gaps), "ties": sum(abs(gap) < TIE for gap in gaps)}


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that so many of them do not exceed; None of none."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)] if values else None


def summary(turns: list[Figures]) -> Figures:
    """The figures of one number of clients from its turns."""
    first = [seconds for turn in turns for seconds in turn["first_token_seconds"]]
    errors = sum((Counter(turn["errors"]) for turn in turns), Counter())
    return {
        "tokens_per_second": median(turn["tokens_per_second"] for turn in turns),
        "tokens_per_second_of_rounds": [turn["tokens_per_second"] for turn in turns],
        "ratio": median(turn["ratio"] for turn in turns),
        "first_token_seconds": percentile(first, 0.5),
        "first_token_seconds_95": percentile(first, 0.95),
        "memory_growth_kib": [turn["memory_growth_kib"] for turn in turns],
        "errors": dict(errors),
    } | {key: sum(turn[key] for turn in turns) for key in ("tokens", "finished", "finished_tokens", "refused")}


def line(number: int, turn: Figures) -> str:
    """One turn in words."""
    middle, late = (percentile(turn["first_token_seconds"], share) for share in (0.5, 0.95))
    text = f"{number} clients: {turn['tokens_per_second']:,.1f} tokens/s ({turn['ratio']:.2f})"
    if middle is not None:
        text += f", the first token after {middle:.3f}s, for one in twenty after {late:.3f}s"
    text += f"; {turn['finished']} texts, {turn['refused']} times 429, {sum(turn['errors'].values())} errors"
    text += "".join(f", {count} of {kind}" for kind, count in turn["errors"].items())
    growth = turn["memory_growth_kib"]
    return text + (f"; memory {growth / 1024:+.1f} MiB after {SETTLED} s" if growth is not None else "")
