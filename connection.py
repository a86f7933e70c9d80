"""A client's connection: uvicorn's, which would wait for a request for ever, and cannot be cut.

Notable choices:
- Who connects and sends no whole head of a request is let go; so is who goes on to send a body that was refused.
- A closed connection still waits until its client has read what is on its way, and who reads nothing never has: what
  answers finds the transport in the request's state, to cut it off.
"""

import asyncio
import socket

from starlette.types import Scope
from uvicorn.protocols.http.auto import AutoHTTPProtocol


class Connection(AutoHTTPProtocol):
    patience = 30.0  # seconds in which a request must have begun
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = self.app_state | {"transport": transport}  # of which each request's state is a copy
        self.watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.rest()

    def watch(self) -> None:
        """Closes the connection in a while, unless a request is being answered by then."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.rest()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.patience, self.transport.close)

    def rest(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def patient(seconds: float) -> type[Connection]:
    """Connections that wait for so long."""
    return type("Connection", (Connection,), {"patience": seconds})


def cut(scope: Scope) -> bool:
    """Whether the connection that a request came by was cut off, and what is on its way with it."""
    transport = scope.get("state", {}).get("transport")
    if transport is not None:
        transport.abort()
    return transport is not None


def let_go_of_who_reads_nothing(listener: socket.socket, seconds: float) -> None:
    """Lets the system drop connections whose client has taken nothing of what it was sent for so long, where it can:
    a whole answer on its way is out of uvicorn's hands."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux's, inherited by each connection
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(min(seconds * 1000, 2**31 - 1)))
