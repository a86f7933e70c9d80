"""What the server tells Prometheus at /metrics, in its text format.

Notable choices:
- What the engine counts and holds, the page's share included, is read off it when somebody asks, who waits for nothing.
- Requests are counted by a middleware, by what came of them: a stream that was broken off has the status of its error,
  and one whose client hung up has 499.
"""

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import Engine, Job

CONTENT_TYPE = CONTENT_TYPE_LATEST
COMPLETIONS = "/v1/completions"
HUNG_UP = 499  # nginx's status for a client who did not wait for the answer
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds of a request
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)  # seconds of a token


class OfTheEngine(Collector):
    """The engine's own figures, as they are when they are asked for."""

    def __init__(self, engine: Engine, max_batch: int):
        self.engine, self.max_batch = engine, max_batch

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        yield CounterMetricFamily("weigpt_generated_tokens", "Tokens drawn.", value=engine.drawn)
        yield CounterMetricFamily("weigpt_prompt_tokens", "Tokens of prompts read.", value=engine.read)
        yield GaugeMetricFamily("weigpt_jobs_waiting", "Jobs in the queue.", value=len(engine.queue))
        yield GaugeMetricFamily("weigpt_jobs_running", "Jobs in the batch.", value=len(engine.running))
        yield GaugeMetricFamily("weigpt_batch_rows", "Rows in the batch, each a text.", value=engine.rows)
        yield GaugeMetricFamily("weigpt_batch_max_rows", "Rows that the batch may have.", value=self.max_batch)


class Metrics:
    """A server's figures, in a registry of their own."""

    def __init__(self, engine: Engine, max_batch: int):
        self.registry = CollectorRegistry()
        self.registry.register(OfTheEngine(engine, max_batch))
        own = {"registry": self.registry}
        self.requests = Counter("weigpt_http_requests", "Requests by what came of them.", ["path", "status"], **own)
        self.whole = Histogram(
            "weigpt_request_seconds", "A completion from when it was taken to its last byte.", buckets=LONG, **own
        )
        self.queued = Histogram("weigpt_queue_seconds", "A completion's wait in the queue.", buckets=LONG, **own)
        self.first = Histogram(
            "weigpt_first_token_seconds", "A completion's wait for its first token.", buckets=LONG, **own
        )
        self.next = Histogram(
            "weigpt_next_token_seconds", "Of a completion's tokens after the first, their mean.", buckets=SHORT, **own
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)

    def ended(self, job: Job, tokens: int) -> None:
        """Takes a completion's times. `tokens` are those of its longest text: texts of one request grow together."""
        if job.begun is not None:
            self.queued.observe(job.begun - job.submitted)
        if job.first is not None:
            self.first.observe(job.first - job.submitted)
            self.whole.observe(time.monotonic() - job.submitted)
            if tokens > 1:
                self.next.observe((job.newest - job.first) / (tokens - 1))


class Counted:
    """Counts requests. An answer that turns out otherwise than its status says puts that into state["outcome"]."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, whole = 500, False  # what an exception becomes further out
        state = scope.setdefault("state", {})

        async def seen(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = whole or message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, seen)
            status = state.get("outcome", status if whole else HUNG_UP)
        finally:
            path = COMPLETIONS if scope["path"] == COMPLETIONS else "other"
            self.metrics.requests.labels(path, str(status)).inc()
