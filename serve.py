"""Serves a trained model: a page to write in, in Chinese and English, and OpenAI's API for completions beside it.

    $ python serve.py --out_dir=out-demo
    $ python serve.py --init_from=gpt2-xl --quantize=int8
    $ python serve.py --out_dir=out-demo --host=0.0.0.0 --api_key=SECRET

Then http://127.0.0.1:8000 is the page. It needs no network: nothing comes from elsewhere, and nobody is told anything.
The API is at http://127.0.0.1:8000/v1, for `openai.OpenAI(base_url=..., api_key=...)` and the like, and /metrics is for
Prometheus. Ctrl-C ends it. The weights are those that were there at the start, also where training goes on.
"""

from configurator import Config, UserError, configure, note, run

init_from = "resume"  # 'resume' for out_dir, 'gpt2*', or a path: an out_dir, a .pt file, a Hugging Face folder
out_dir = "out"  # ckpt.pt is taken from here, where init_from is 'resume'; the page shows this run's curves
name = ""  # the model's, in the API and on the page; by default that of its folder
# Where it is served
host = "127.0.0.1"  # this machine alone; 0.0.0.0 for all who can reach it
port = 8000  # 0 for any that is free
api_key = ""  # what clients must send as a bearer token, and people type as the password to see the page
# How much at once
max_batch = 16  # texts that are written at once, in one batch, of all requests; as many as memory has room for
max_waiting = 64  # requests that wait for a place in it; more are refused
grace = 30.0  # seconds in which what was accepted may still be finished, after SIGTERM or Ctrl-C
# What a request may be
max_samples = 0  # texts that it may ask for, at most max_batch; 0 for that
max_tokens = 2048  # tokens in each
max_prompt = 16384  # tokens in a prompt; the model's context is a limit besides
max_body = 2**20  # bytes
body_timeout = 30.0  # seconds in which it must have been sent
timeout = 600.0  # seconds in which it must have been answered, waiting included; then it is broken off
# How it is computed
quantize = ""  # 'int8' (CPUs) or 'bf16': a quarter or half of the bytes to read for a token; for large models
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'; float32 where quantize is set
config = configure(globals())

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import checkpoint
from device import autocast, memory_error_told
from engine import Engine


def check(c: Config) -> None:
    least = {"max_waiting": 0, "max_samples": 0, "grace": 0, "max_body": 1024}
    for key in ("max_batch", "max_waiting", "max_samples", "max_tokens", "max_prompt", "max_body", "grace"):
        if getattr(c, key) < least.get(key, 1):
            raise UserError(f"{key}={getattr(c, key)}: expected at least {least.get(key, 1)}")
    for key in ("body_timeout", "timeout"):
        if getattr(c, key) <= 0:
            raise UserError(f"{key}={getattr(c, key)}: expected seconds, more than 0")
    if c.max_samples > c.max_batch:
        raise UserError(
            f"max_samples={c.max_samples}: expected at most max_batch={c.max_batch}, for a request's texts are written "
            "at once"
        )
    c.max_samples = c.max_samples or c.max_batch
    if not 0 <= c.port < 65536:
        raise UserError(f"port={c.port}: expected 0 (any that is free) to 65535")
    if not (c.api_key.isascii() and c.api_key.isprintable() and " " not in c.api_key):
        raise UserError("api_key: expected letters, digits and signs of ASCII, without spaces")


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can already connect to. UserError where the address cannot be had."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        listener = socket.create_server(address, family=family, backlog=1024)
        # inherited by each connection; without it, what is written in two pieces waits 40 ms for the client's receipt
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, UnicodeError) as error:  # the latter for a name that no host can have
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"host={host}, port={port}: {reason}; choose another --port or --host") from None


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def welcome(listener: socket.socket) -> str:
    """Where to go with a browser."""
    host, port = listener.getsockname()[:2]
    everywhere, host = ipaddress.ip_address(host).is_unspecified, f"[{host}]" if ":" in host else host
    here = "127.0.0.1" if everywhere else host
    others = f" (elsewhere http://THIS-MACHINE:{port})" if everywhere else ""
    return f"a page to write in: http://{here}:{port}{others} (Ctrl-C ends it)"


def folder_of(c: Config) -> Path:
    """Where the model comes from, which is where its run's log is."""
    source = Path(c.out_dir if c.init_from == "resume" else c.init_from)
    return source.parent if source.suffix == ".pt" else source


async def serve(server, engine: Engine, listener: socket.socket, welcome: str, grace: float) -> None:
    """Answers until the engine is closed, then finishes what was accepted. `server` is uvicorn's; `welcome` is told
    once it answers."""

    async def finish() -> None:
        while not (server.started or engine.closing):
            await asyncio.sleep(0.01)
        note(welcome)
        while not engine.closing:
            await asyncio.sleep(0.05)
        if engine.open:
            note(f"finishing {len(engine.open)} requests, in {grace:g} s at most; a second Ctrl-C ends at once")
        until = asyncio.get_running_loop().time() + grace
        while engine.open and asyncio.get_running_loop().time() < until and not server.should_exit:
            await asyncio.sleep(0.05)
        if engine.open:
            note(f"{len(engine.open)} requests did not end in time and are cut off")
        engine.abandon()
        # pages that are open still listen for news; that they are cut off is no error to tell of
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True

    try:
        await asyncio.gather(server.serve(sockets=[listener]), finish())
    finally:
        engine.end()


@memory_error_told("take a smaller model, or --quantize=bf16")
def main(c: Config) -> None:
    check(c)
    listener = listen(c.host, c.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which is read when gradio is imported
    try:
        import uvicorn

        from api import Limits, create_app
        from connection import let_go_of_who_reads_nothing, patient
        from page import mount_page
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -r requirements-web.txt") from error
    model, tokenizer, template = checkpoint.open_model(c)

    if not (is_this_machine(c.host) or c.api_key):
        note(f"warning: host={c.host}: whoever can reach this machine can use the model; --api_key=KEY asks for a key")
    engine = Engine(model, tokenizer, autocast(c.device, c.dtype), c.max_batch, c.max_waiting)
    name = c.name or folder_of(c).resolve().name or "model"
    limits = Limits(**{field.name: getattr(c, field.name) for field in fields(Limits)})
    app = create_app(engine, model, tokenizer, name, limits, c.api_key)
    of_the_page = {"max_rows": c.max_samples, "max_tokens": c.max_tokens, "api_key": c.api_key}
    app = mount_page(app, engine, model, tokenizer, template, name, folder_of(c), **of_the_page)
    let_go_of_who_reads_nothing(listener, 2 * c.timeout)  # later than who breaks a stream off
    how = uvicorn.Config(
        app, log_level="warning", access_log=False, http=patient(c.body_timeout), ws="none",
        timeout_graceful_shutdown=1,  # once the work is done, what is still open are pages that listen for news
    )  # fmt: skip
    server, signals = uvicorn.Server(how), []

    def leave(number: int, _: object) -> None:
        signals.append(number)
        engine.close()
        server.should_exit = server.force_exit = len(signals) > 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    with ThreadPoolExecutor(1, "http") as pool:
        serving = pool.submit(asyncio.run, serve(server, engine, listener, welcome(listener), c.grace))
        try:
            engine.run()
        finally:
            engine.close()  # or the other thread would go on serving without it
        serving.result()
    if signals[:1] == [signal.SIGINT]:
        raise KeyboardInterrupt


if __name__ == "__main__":
    run(main, config)
