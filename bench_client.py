"""What `python bench.py serve` starts and asks: serve.py in a process of its own, and clients that cost little.

Notable choices:
- The clients write HTTP by hand on bare sockets, for they share the machine with what they measure.
"""

import asyncio
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import ROOT, Config, UserError

HOST, NAME = "127.0.0.1", "bench"
RETRY = 1.0  # seconds at most that a client waits who was told to come again
PATIENCE = 60.0  # seconds in which the server must have ended
Figures = dict[str, Any]


@contextmanager
def server(c: Config, source: str, folder: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and its process id. UserError where it does not start."""
    source = str(Path(source).absolute()) if Path(source).exists() else source
    how = {"init_from": source, "name": NAME, "host": HOST, "port": 0, "device": c.device, "dtype": c.dtype}
    how |= {"quantize": c.quantize, "max_tokens": max(2048, c.max_new_tokens)}
    options = [f"--{key}={value}" for key, value in how.items()] + shlex.split(c.serve_options)
    command = [sys.executable, str(ROOT / "serve.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, text=True,
                               encoding="utf-8", errors="replace")  # fmt: skip
    try:
        said: list[str] = []
        while not (found := re.search(r"http://\S+?:(\d+)", said[-1] if said else "")):
            if not (line := process.stderr.readline()):
                raise UserError(f"serve.py did not start: {''.join(said[-3:]).strip()}")
            said.append(line)
        # what it says must be read, or it would wait for that one day
        threading.Thread(target=lambda: sys.stderr.writelines(process.stderr), daemon=True).start()
        yield int(found[1]), process.pid
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def status_of(pid: int, key: str) -> int | None:
    """A number of Linux' /proc/PID/status, such as VmRSS in KiB; None where there is none."""
    try:
        found = re.search(rf"^{key}:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"), re.M)
    except OSError:
        return None
    return int(found[1]) if found else None


@dataclass
class Client:
    """A connection that asks for one text after the other. OSError or EOFError where the server breaks it off."""

    port: int
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    sent: float = 0.0  # when it asked last

    async def ask(self, path: str, asked: Figures | None = None) -> tuple[int, float, bytes]:
        """Sends a request; the answer's status, after how many seconds to come again, and its body but for a stream's,
        which is still to be read."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(HOST, self.port, limit=2**24)
        body = b"" if asked is None else json.dumps(asked).encode()
        head = f"{'GET' if asked is None else 'POST'} {path} HTTP/1.1\r\nHost: {HOST}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.sent = time.perf_counter()
        self.writer.write(head.encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        told = dict(re.findall(rb"(content-length|retry-after): (\d+)", answer))
        body = await self.reader.readexactly(int(told.get(b"content-length", 0)))
        return int(answer[9:12]), float(told.get(b"retry-after", 0)), body

    async def patiently(self, asked: Figures, refused: Callable[[], None] = lambda: None) -> tuple[int, bytes]:
        """As `ask` for a completion, again and again while there is no room."""
        while True:
            status, wait, body = await self.ask("/v1/completions", asked)
            if status != 429:
                return status, body
            refused()
            await asyncio.sleep(min(wait, RETRY))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None
