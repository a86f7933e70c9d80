"""The processes of a run: joined by torchrun, stopped by the same signal after the same step, and watched, so that one
that dies or freezes is named and the others end instead of waiting for it."""

import atexit
import itertools
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from configurator import UserError, tell

BEAT = 1.0  # seconds between two signs of life


class Heartbeat:
    """Gives a sign of life every second through the store at which the processes met, and listens for the others'.

    Where one has been silent for `patience` beats, this process ends at once with a sentence that names it: whoever
    waits for it inside a collective operation cannot be woken. Beats are counted by each process for itself, so that
    a job that was suspended as a whole, as by Ctrl-Z or a closed laptop, goes on afterwards.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, patience: float):
        self.store, self.rank, self.patience = store, rank, max(4, patience)
        self.others = [other for other in range(world_size) if other != rank]
        self.heard: dict[int, str] = {}  # the last sign of life of each other process
        self.silent = dict.fromkeys(self.others, 0)  # beats since it changed
        self.unanswered = 0  # beats since the store answered
        self.ended, self.parted = threading.Event(), False
        self.client: threading.Thread | None = None
        self._beat(0)

    def start(self) -> None:
        """Once every process has given its first sign of life."""
        # The store's client can hang where its machine has gone, so it has a thread apart from the one that judges.
        self.client = threading.Thread(target=self._exchange, daemon=True)
        self.client.start()
        threading.Thread(target=self._judge, daemon=True).start()
        atexit.register(self.stop)

    def stop(self, in_good_order: bool = False) -> None:
        """No more signs of life; `in_good_order`, the others are told not to look for any."""
        self.parted = in_good_order or self.parted
        self.ended.set()
        if self.client:  # a thread inside the store's client would abort an interpreter that ends
            self.client.join(2 * BEAT)

    def _beat(self, number: int) -> None:
        self.store.set(f"alive/{self.rank}", f"{number} pid {os.getpid()} on {socket.gethostname()}")

    def _exchange(self) -> None:
        for number in itertools.count(1):
            if self.ended.wait(BEAT):
                break
            with suppress(RuntimeError):  # the store's machine is gone; `unanswered` says so in the end
                self._beat(number)
                signs = self.store.multi_get([f"alive/{other}" for other in self.others])
                self.unanswered = 0
                for other, sign in zip(self.others, map(bytes.decode, signs), strict=True):
                    self.silent[other] = self.silent[other] + 1 if sign == self.heard.get(other) else 0
                    self.heard[other] = sign
        if self.parted:
            with suppress(RuntimeError):
                self.store.set(f"alive/{self.rank}", "left")

    def _judge(self) -> None:
        while not self.ended.wait(BEAT):
            self.unanswered += 1
            lost = self.lost(self.patience)
            if lost and not self.ended.is_set():
                tell(f"process {self.rank} gives up: {lost}")
                os._exit(1)

    def lost(self, beats: float) -> str:
        """Who has been silent for so many beats, in words; empty if nobody. Who parted in good order is not lost."""
        silent = [r for r, n in self.silent.items() if n >= beats and not self.heard[r].startswith("left")]
        if silent:
            who = ", ".join(f"{r} ({self.heard[r].partition(' ')[2]})" for r in silent)
            return f"no sign of life from process {who} for {beats * BEAT:.0f} s"
        if self.unanswered > beats:
            return f"the machine at which the processes met has not answered for {beats * BEAT:.0f} s"
        return ""


@dataclass(frozen=True)
class Processes:
    """The processes of a run: this one's rank and how many there are; one alone outside torchrun.

    `control` is a CPU group for flags and figures, so that reading them never waits for a GPU.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @property
    def master(self) -> bool:
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """How many of them are on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.control else 1

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes, in place, on the value's own device."""
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes of a CPU tensor, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def first(self, work: Callable[[], Any]) -> Any:
        """What work() gives in the first process, None in the others. A UserError there ends them all."""
        result = error = None
        if self.master:
            try:
                result = work()
            except UserError as mistake:
                error = mistake
        if self.largest(int(error is not None)):
            raise error or SystemExit(2)
        return result

    def agreed(self, work: Callable[[], str]) -> str:
        """The text that work() gives in the first process, in all of them. A UserError there ends them all."""
        texts = [self.first(work)]
        if self.world_size > 1:
            dist.broadcast_object_list(texts, group=self.control)
        return texts[0]

    def alike(self, value: int) -> bool:
        """Whether all processes have the same value."""
        return self.largest(value) == -self.largest(-value)

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.control)
        return int(values)

    def lost(self) -> str:
        """After a collective operation failed: which processes are gone, in words; empty where all are there."""
        if not self.heartbeat:
            return ""
        for _ in range(20):
            time.sleep(BEAT / 2)
            if lost := self.heartbeat.lost(3):
                return lost
        return ""

    def end(self) -> None:
        """Waits until every process is here, so that torchrun ends none of them early, and parts."""
        if self.control:
            dist.barrier(group=self.control)
            self.heartbeat.stop(in_good_order=True)
            dist.destroy_process_group()


def join_processes(backend: str, device: str, patience: float) -> Processes:
    """The processes that torchrun started, joined by nccl on GPUs and gloo on CPUs; or this one alone.

    One that gives no sign of life for `patience` seconds ends the others.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= set(os.environ):
        return Processes()
    on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if backend not in ("nccl", "gloo"):
        raise UserError(f"backend={backend}: expected nccl or gloo")
    rank, local_rank, world_size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    store = _connect()
    session = _meet(store, rank, world_size)
    dist.init_process_group(
        backend if on_gpu and dist.is_nccl_available() else "gloo",
        store=dist.PrefixStore(session, store), rank=rank, world_size=world_size,
    )  # fmt: skip
    if not on_gpu:
        # torchrun gives each process a single thread unless told otherwise
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    control = dist.new_group(backend="gloo")
    # a connection of its own: one client of the store serves one thread at a time
    heartbeat = Heartbeat(dist.PrefixStore(session, _connect()), rank, world_size, patience / BEAT)
    dist.barrier(group=control)
    if world_size > 1:
        heartbeat.start()
    return Processes(rank, local_rank, world_size, control, heartbeat)


def _connect() -> dist.Store:
    """A new connection to the store at which the processes meet: torchrun's, else the first process's own."""
    return next(dist.rendezvous("env://"))[0]


def _meet(store: dist.Store, rank: int, world_size: int, seconds: float = 600) -> str:
    """A prefix for the store's keys that all processes of this attempt know, and no earlier attempt has used.

    A job that torchrun restarts finds the store as the attempt before left it: without a prefix, processes read the
    addresses of the dead, and the new attempt fails too, unless they happen to come in a lucky order. The first
    process calls its token out to each token that it finds; only a process that lives answers.
    """
    token, until = uuid.uuid4().hex, time.monotonic() + seconds
    if rank > 0:
        store.set(f"here/{rank}", token)
        session = store.get(f"session/{token}").decode()  # waits until it is there
        store.set(f"{session}/met/{rank}", "")
        return session
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"here/{other}"]):
                store.set(f"session/{store.get(f'here/{other}').decode()}", token)
        missing = [other for other in missing if not store.check([f"{token}/met/{other}"])]
        if missing and time.monotonic() > until:
            raise UserError(f"processes {missing} of {world_size} did not come within {seconds:.0f} s")
        time.sleep(0.02)
    return token


class StopSignal:
    """Notes Ctrl-C, SIGTERM and a closed terminal, so that the step under way is finished first; a second Ctrl-C
    leaves at once."""

    def __init__(self):
        self.received, self.at = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.note)

    def note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        # torchrun passes on the Ctrl-C that the terminal has sent to every process already: one press, not two
        if self.received and number == signal.SIGINT and now - self.at > 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.at = number, now
            if os.environ.get("RANK", "0") == "0":  # not print, which a signal may have interrupted
                with suppress(OSError):  # the terminal may be what has gone
                    os.write(2, b"stopping after this step, then saving (Ctrl-C again: at once, without saving)\n")
