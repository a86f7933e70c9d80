"""The HTTP API beside the page: OpenAI's /v1/completions and /v1/models, /health, and /metrics for Prometheus.

Notable choices:
- Fields, shapes and errors are those of OpenAI's reference for completions, so that its clients work unchanged;
  `top_k`, `min_p` and `repetition_penalty` are ours besides. What cannot be done (a suffix, a logit bias) is refused.
- Whoever hangs up, waiting or reading, ends the work at once; and so does the time that a request may take, also where
  its client sends slowly or reads nothing.
- An answer tells of the request, never of the machine: what goes wrong inside is told on stderr alone.
"""

import asyncio
import codecs
import hmac
import json
import secrets
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configurator import UserError, tell
from connection import cut
from device import is_memory_error
from engine import Engine, Full, Job, Refused
from generate import Piece, Rows, Sampling, Token, beginning, score
from metrics import CONTENT_TYPE, HUNG_UP, Counted, Metrics
from model import GPT
from tokenizer import Tokenizer

MANY = 1024  # prompts of a request, whatever max_samples is
PARTING = 1.0  # seconds in which a client must take the news that its time is over
Id = Annotated[int, Field(ge=0, lt=2**32)]
Some = Field(min_length=1, fail_fast=True)  # a megabyte may hold hundreds of thousands of mistakes
Ids = Annotated[list[Id], Some]
Prompt = str | Annotated[list[str], Some] | Ids | Annotated[list[Ids], Some]


@dataclass(frozen=True)
class Limits:
    """What may be asked for."""

    max_batch: int = 16  # rows that are decoded together, of all requests
    max_samples: int = 16  # texts of a request
    max_tokens: int = 2048  # new tokens in each
    max_prompt: int = 16384  # tokens in a prompt
    max_body: int = 2**20  # bytes of a request
    body_timeout: float = 30.0  # seconds in which it must have been sent
    timeout: float = 600.0  # and in which it is answered, waiting included


class CompletionRequest(BaseModel):
    """What is asked for; a field that is null has its default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    prompt: Prompt | None = Field(None, description="nothing, or an empty text, begins a new text")
    max_tokens: int | None = Field(None, ge=0, description="16 where it is not given")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="drawn at random where it is not given")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    top_k: int | None = Field(None, ge=0, lt=2**31, description="beside OpenAI's: the k likeliest tokens, 0 for all")
    min_p: float | None = Field(None, ge=0, le=1, description="beside OpenAI's")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="beside OpenAI's")
    user: str | None = Field(None, description="not used")
    best_of: int | None = Field(None, ge=1, description="only n")
    suffix: str | None = Field(None, max_length=0, description="only none")
    logit_bias: dict[str, float] | None = Field(None, max_length=0, description="only none")
    presence_penalty: float | None = Field(None, ge=0, le=0, description="only 0")
    frequency_penalty: float | None = Field(None, ge=0, le=0, description="only 0")

    @field_validator("prompt", mode="before")
    @classmethod
    def few(cls, prompt: Any) -> Any:
        """Before each of a hundred thousand is looked at, for so long nobody else would be answered."""
        if isinstance(prompt, list) and len(prompt) > MANY and not isinstance(prompt[0], int):
            raise ValueError(f"{len(prompt):,} prompts are too many")
        return prompt


class Logprobs(BaseModel):
    """The tokens of a text, bytes that are no whole character as 'bytes:\\xe4'; `text_offset` is where in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


class Failure(Exception):
    """An answer that tells why not."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return answer(self.body, self.status, self.headers)


def answer(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII, for half a surrogate pair out of a request has no UTF-8."""
    return Response(json.dumps(body), status, headers, "application/json")


def failure_of(error: Exception) -> Failure:
    """What to answer where this was raised."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, UserError):
        return Failure(400, str(error))
    if isinstance(error, Refused):
        wait = {"Retry-After": str(error.retry_after)}
        if isinstance(error, Full):
            return Failure(429, str(error), code="queue_full", **wait)
        return Failure(503, str(error), code="closing", **wait)
    if is_memory_error(error):
        return Failure(503, "out of memory: ask for fewer or shorter samples", code="out_of_memory")
    tell("".join(traceback.format_exception(error)))
    return Failure(500, "the request failed for a reason inside the server, where it is logged")


class BodyLimit:
    """Refuses a request of too many bytes, told beforehand or not, and one that takes too long to come. When it came is
    in state["arrived"], as time.monotonic() tells it."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.most, self.seconds = app, limits.max_body, limits.body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope.setdefault("state", {})["arrived"] = time.monotonic()
        too_large = Failure(413, f"the request is too large: at most {self.most:,} bytes")
        told, read, whole = Headers(scope=scope).get("content-length", "0"), 0, False
        if not told.isdecimal() or int(told[:20]) > self.most:
            return await too_large.response()(scope, receive, send)

        async def limited() -> Message:
            nonlocal read, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with time_left(scope, self.seconds):
                    message = await receive()
            except TimeoutError:
                late = f"the request was not sent within {self.seconds:g} s"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self.most:
                raise HTTPException(too_large.status, str(too_large))
            return message

        await self.app(scope, limited, send)


def time_left(scope: Scope, seconds: float) -> asyncio.Timeout:
    """Ends so many seconds after the request has arrived."""
    return asyncio.timeout(scope["state"]["arrived"] + seconds - time.monotonic())


class HungUp(Exception):
    """The client is gone."""


async def hang_up(receive: Receive) -> None:
    """Waits until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_hung_up(receive: Receive, work: Coroutine) -> Any:
    """What `work` returns; it is cancelled, and HungUp raised, where the client goes away before."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hang_up(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HungUp
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, and the job behind them, which ends with them."""

    media_type = "text/event-stream"

    def __init__(self, made: "Completions", job: Job, metrics: Metrics, seconds: float):
        """`seconds` after the request's arrival it is broken off."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.made, self.job, self.metrics, self.seconds = made, job, metrics, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.job, suppress(HungUp):
            try:
                await unless_hung_up(receive, self.write(scope, send))
            except TimeoutError:  # even that was not read
                if not cut(scope):
                    raise
                await hang_up(receive)
            finally:
                self.metrics.ended(self.job, max(self.made.written))

    async def write(self, scope: Scope, send: Send) -> None:
        async def event(data: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more})

        async with time_left(scope, self.seconds):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with too_late(self.seconds):
                async with time_left(scope, self.seconds):
                    async for data in self.made.events(self.job):
                        await event(json.dumps(data))
                    await event("[DONE]", more=False)
        except Exception as error:
            self.job.close()
            failure = failure_of(error)
            scope["state"]["outcome"] = failure.status
            async with asyncio.timeout(PARTING):
                await event(json.dumps(failure.body))
                await event("[DONE]", more=False)


@contextmanager
def too_late(seconds: float) -> Iterator[None]:
    """What to answer where time was over."""
    try:
        yield
    except TimeoutError:
        message = f"the answer was not finished within {seconds:g} s: ask for fewer or shorter samples, or later"
        raise Failure(504, message, code="timeout") from None


@dataclass
class Speaker:
    """One choice of an answer: turns pieces into what it goes on with, in OpenAI's shape."""

    index: int
    tokenizer: Tokenizer
    logprobs: bool
    length: int = 0  # characters of its text so far
    offset: int = 0  # characters in its tokens so far
    utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def say(self, text: str, tokens: Sequence[Token], finished: str = "") -> dict[str, Any]:
        self.length += len(text)
        told = None
        if self.logprobs:
            told = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for token in tokens:
                raw, name, at = self.tokenizer.decode_bytes([token.id]), self.name(token.id), self.offset
                self.offset += len(self.utf8.decode(raw))
                if name.encode() == raw:  # whole; half a character before it that nothing completes is U+FFFD
                    at = self.offset - len(name)
                if finished in ("end", "stop") and at >= self.length:  # what ends a text is not part of it
                    break
                top: dict[str, float | None] = {}
                for id, logprob in token.top:
                    top.setdefault(self.name(id), logprob)  # of two that are written alike the likelier
                own = {name: token.logprob}
                told["tokens"].append(name)
                told["token_logprobs"].append(token.logprob)
                told["top_logprobs"].append(None if token.logprob is None else top | own)
                told["text_offset"].append(at)
        reason = {"": None, "length": "length"}.get(finished, "stop")
        return {"index": self.index, "text": text, "logprobs": told, "finish_reason": reason}

    def name(self, id: int) -> str:
        raw = self.tokenizer.decode_bytes([id])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice's parts as one."""
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    return parts[-1] | {
        "text": "".join(part["text"] for part in parts),
        "logprobs": {key: [x for each in told for x in each[key]] for key in told[0]} if told else None,
    }


class Completions:
    """A request's answer in the making: its prompts' ids, its work, its choices."""

    def __init__(self, asked: CompletionRequest, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits):
        """Failure or UserError for what cannot be done. Encodes, which may take a moment."""
        self.asked, self.model, self.tokenizer, self.max_prompt = asked, model, tokenizer, limits.max_prompt
        prompt = "" if asked.prompt is None else asked.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        given = prompt if several else [prompt]
        self.n = asked.n or 1
        if asked.best_of not in (None, self.n):
            raise Failure(400, f"best_of={asked.best_of}: only n, {self.n}, can be had", "best_of")
        if len(given) * self.n > limits.max_samples:
            raise Failure(400, f"{len(given)} prompts with n={self.n}: at most {limits.max_samples} texts at once", "n")
        self.prompts = [self.encoded(each) for each in given]
        self.texts = [each if isinstance(each, str) else tokenizer.decode(each) for each in given]
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        self.sampling = Sampling(
            max_new_tokens=16 if asked.max_tokens is None else asked.max_tokens,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_k=asked.top_k or 0,
            top_p=1.0 if asked.top_p is None else max(asked.top_p, 1e-9),
            min_p=asked.min_p or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            stop=tuple(stop),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
        self.speakers = [Speaker(k, tokenizer, asked.logprobs is not None) for k in range(len(self.prompts) * self.n)]
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        self.written = [0] * len(self.speakers)  # tokens

    def encoded(self, prompt: str | list[int]) -> list[int]:
        ids = beginning(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
        if len(ids) > (context := self.model.config.block_size):
            message = f"the prompt has {len(ids):,} tokens, and the model's context holds {context:,}: shorten it"
            raise Failure(400, message, "prompt", "context_length_exceeded")
        if len(ids) > self.max_prompt:
            raise Failure(400, f"the prompt has {len(ids):,} tokens: at most {self.max_prompt:,} here", "prompt")
        if max(ids) >= self.tokenizer.vocab_size:
            raise Failure(
                400, f"token id {max(ids)} is beyond the vocabulary of {self.tokenizer.vocab_size:,}", "prompt"
            )
        return ids

    def work(self, stopped: Callable[[], bool]) -> Generator[list[Token], None, Rows]:
        """For the engine: with echo and logprobs each prompt's tokens, and then the texts to be written."""
        if self.asked.echo and self.asked.logprobs is not None:
            for ids in self.prompts:
                yield [Token(ids[0]), *score(self.model, ids, self.asked.logprobs, self.tokenizer.vocab_size)]
        rows = [ids for ids in self.prompts for _ in range(self.n)]
        return Rows(rows, self.sampling, logprobs=self.asked.logprobs)

    async def parts(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """What the choices go on with, as it comes."""
        scored: list[list[Token]] = []
        waits = self.asked.echo
        async for group in job.groups():
            scored += [result for result in group if isinstance(result, list)]
            pieces = [result for result in group if isinstance(result, Piece)]
            if pieces and waits:
                for speaker in self.speakers:
                    which = speaker.index // self.n
                    yield speaker.say(self.texts[which], scored[which] if scored and self.texts[which] else [])
                    speaker.utf8.reset()  # what goes on is decoded by itself
                    speaker.offset = speaker.length
                waits = False
            for row in dict.fromkeys(piece.row for piece in pieces):
                own = [piece for piece in pieces if piece.row == row]
                tokens = [token for piece in own for token in piece.tokens]
                self.written[row] += len(tokens)
                yield self.speakers[row].say("".join(piece.text for piece in own), tokens, own[-1].finished)

    def usage(self) -> dict[str, int]:
        prompt, written = sum(map(len, self.prompts)), sum(self.written)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    async def whole(self, job: Job) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self.speakers]
        async for part in self.parts(job):
            parts[part["index"]].append(part)
        return self.head | {"choices": [joined(each) for each in parts], "usage": self.usage()}

    async def events(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        with_usage = (self.asked.stream_options or {}).get("include_usage", False)
        more = {"usage": None} if with_usage else {}
        async for part in self.parts(job):
            yield self.head | {"choices": [part]} | more
        if with_usage:
            yield self.head | {"choices": [], "usage": self.usage()}


def create_app(
    engine: Engine, model: GPT, tokenizer: Tokenizer, name: str, limits: Limits, api_key: str = ""
) -> FastAPI:
    """The API alone. `name` is the model's; where there is an `api_key`, /v1 and /metrics want it as a bearer token."""
    quiet = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
    app = FastAPI(title="weiGPT", docs_url=None, redoc_url=None, telemetry=quiet)
    metrics = Metrics(engine, limits.max_batch)
    app.add_middleware(BodyLimit, limits)
    app.add_middleware(Counted, metrics)  # around the one before
    created = int(time.time())
    bearer = HTTPBearer(auto_error=False)

    def authorized(key: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if api_key and not (key and hmac.compare_digest(key.credentials.encode(), api_key.encode())):
            message = "the API key is missing or wrong: expected Authorization: Bearer KEY"
            raise Failure(401, message, code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    @app.exception_handler(Failure)
    async def failed(_: Request, error: Failure) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = next((str(part) for part in first["loc"][1:]), None)
        message = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] == "json_invalid":
            return Failure(400, "the body is no valid JSON").response()
        if first["type"] == "extra_forbidden":
            message = "there is no such field"
        elif param == "prompt" and first["type"] != "value_error":
            message = (
                "expected a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
            )
        return Failure(400, f"{param or 'body'}: {message}", param).response()

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return Failure(error.status_code, str(error.detail), **(error.headers or {})).response()

    responses = {status: {"model": ErrorBody} for status in (400, 401, 404, 408, 413, 429, 503, 504)}
    guarded: dict[str, Any] = {"dependencies": [Depends(authorized)], "responses": responses}

    def about() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "weigpt"}

    def check_name(asked: str) -> None:
        if asked != name:
            raise Failure(404, f"there is no such model here, only {name!r}", "model", "model_not_found")

    @app.get("/health", responses={503: {}})
    async def health() -> Response:
        """Whether requests are taken; how many run, with how many rows in the batch, and how many wait."""
        state = {"status": "closing" if engine.closing else "ok", "running": len(engine.running), "rows": engine.rows}
        return answer(state | {"waiting": len(engine.queue), "open": len(engine.open)}, 503 if engine.closing else 200)

    @app.get("/metrics", dependencies=[Depends(authorized)], include_in_schema=False)
    async def measured() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", **guarded)
    async def models() -> Response:
        return answer({"object": "list", "data": [about()]})

    @app.get("/v1/models/{model:path}", **guarded)
    async def retrieve(model: str) -> Response:
        check_name(model)
        return answer(about())

    answers = responses | {200: {"model": Completion, "content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", **guarded | {"responses": answers})
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        check_name(asked.model)
        if (asked.max_tokens or 0) > limits.max_tokens:
            raise Failure(400, f"max_tokens={asked.max_tokens}: at most {limits.max_tokens:,} here", "max_tokens")
        try:
            with too_late(limits.timeout):
                async with time_left(request.scope, limits.timeout):
                    engine.check_room()  # before the prompts are encoded, which costs more than to say no
                    made = await asyncio.to_thread(Completions, asked, model, tokenizer, name, limits)
                    job = engine.submit(made.work, len(made.speakers))
                    if asked.stream:
                        return EventStream(made, job, metrics, limits.timeout)
                    with job:
                        try:
                            return answer(await unless_hung_up(request.receive, made.whole(job)))
                        finally:
                            metrics.ended(job, max(made.written))
        except HungUp:
            return Response(status_code=HUNG_UP)
        except Exception as error:
            raise failure_of(error) from None

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"]

    @app.api_route("/v1/{path:path}", methods=methods, include_in_schema=False)
    async def nothing(path: str, request: Request) -> Response:
        allowed = "POST" if path == "completions" else "GET" if path.split("/")[0] == "models" else request.method
        if allowed != request.method:
            raise Failure(405, f"this address takes {allowed} requests alone", **{"Allow": allowed})
        raise Failure(404, "there is nothing at this address: see /openapi.json for what there is")

    described = app.openapi

    def openapi() -> dict[str, Any]:
        """Without FastAPI's own kind of 422, which is a 400 here."""
        document = described()
        for methods in document["paths"].values():
            for method in methods.values():
                method["responses"].pop("422", None)
        return document

    app.openapi = openapi
    return app
