"""What a run has done and what it says of it: the counters that last.pt keeps; lines on the console, in log.jsonl and
in wandb. An iteration's figures are read one iteration late, so that no iteration waits for the device."""

import errno
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from configurator import Config, UserError
from model import GPT
from processes import Processes
from run_dir import Log
from schedule import sequences_in


@dataclass
class Progress:
    """What a run has done so far; saved in last.pt, so that a resumed run counts on."""

    iter_num: int = 0  # updates in the weights
    sequences_seen: int = 0
    best_val_loss: float = 1e9
    evaluated_at: int = -1  # the iteration of the last evaluation, which a run resumed there repeats but does not count
    stale_evaluations: int = 0  # evaluations since the best one
    skipped_steps: int = 0  # updates that the loss scaler left out, because their gradients had overflowed
    epoch_loss: float = 0.0  # sums over the iterations of the current epoch
    epoch_iters: int = 0
    epoch_seconds: float = 0.0
    training_seconds: float = 0.0  # of the whole run, without evaluations, samples and compiling
    evaluation_seconds: float = 0.0  # of evaluations and samples


def what_is_done(c: Config, p: Progress) -> str:
    """Why a run has come to its end, in words; empty if it has not."""
    if p.iter_num > c.max_iters or p.iter_num == c.max_iters == p.evaluated_at:
        limit = next((key for key in ("epochs", "max_tokens") if getattr(c, key)), "max_iters")
        return f"all {c.max_iters:,} iterations are done; a larger --{limit} goes on"
    if c.target_val_loss and p.evaluated_at == p.iter_num and p.best_val_loss <= c.target_val_loss:
        return f"the validation loss is {p.best_val_loss:.4f}; a lower --target_val_loss goes on"
    if c.patience and p.stale_evaluations >= c.patience:
        return f"the validation loss has not fallen in {p.stale_evaluations} evaluations; a larger --patience goes on"
    return ""


@dataclass(frozen=True)
class Step:
    """An iteration's loss and gradient norm on their way from the device."""

    number: int
    lr: float
    figures: torch.Tensor  # [2], on the CPU once `arrived`
    sequences: int  # that it took
    arrived: torch.cuda.Event | None
    ended: float  # when the step ended, in seconds; on a GPU, when it was handed over


class Reporter:
    """Says and logs what a run does. Every process has one and checks the figures; the first one speaks and writes."""

    def __init__(self, c: Config, processes: Processes, model: GPT, progress: Progress, scaled: bool):
        """`scaled` tells that a loss scaler skips the updates whose gradients overflow."""
        self.c, self.processes, self.model, self.progress, self.scaled = c, processes, model, progress, scaled
        self.log: Log | None = None  # where the first process writes
        self.wandb: Any = None
        self.seen = progress.sequences_seen  # sequences of the iterations that are settled
        self.total = self.seen + sequences_in(max(0, c.max_iters - progress.iter_num), c, self.seen)  # of the whole run
        self.waiting: Step | None = None
        self.compile_seconds = 0.0
        self.start_clock()

    def say(self, text: str) -> None:
        if self.processes.master:
            say(text)

    def record(self, kind: str, **figures: Any) -> None:
        """A line in log.jsonl, and the same figures in wandb."""
        if self.log:
            self.log.write(kind=kind, **figures)
        if self.wandb:
            self.wandb.log({k if k == "iter" else f"{kind}/{k}": v for k, v in flat(figures).items()})

    def start_clock(self) -> None:
        """Before the first iteration. What was before counts as no time of the run."""
        self.since = self.measured = self.epoch_clock = time.perf_counter()
        self.timed, self.sequences, self.running = 0, 0, True

    def stop_clock(self) -> None:
        """Before an interruption of training that does not count as its time, after settle()."""
        self.measure()
        self.running = False

    def restart_clock(self) -> None:
        """After such an interruption."""
        self.measure()
        self.running = True
        self.since, self.timed, self.sequences = time.perf_counter(), 0, 0

    def step(self, lr: float, loss: torch.Tensor, norm: torch.Tensor, sequences: int) -> None:
        """Takes the figures of the iteration that has just been done, and settles the one before."""
        figures = torch.stack((loss, norm.to(loss.dtype))).detach()
        cuda = figures.is_cuda
        figures, arrived = figures.to("cpu", non_blocking=cuda), torch.cuda.Event() if cuda else None
        if arrived:
            arrived.record()
        new = Step(self.progress.iter_num - 1, lr, figures, sequences, arrived, time.perf_counter())
        before, self.waiting = self.waiting, new
        self._settle(before)

    def settle(self) -> None:
        """Checks and reports every iteration so far, which may wait for the device. Raises Diverged.

        Nothing is saved, and no epoch is ended, before this.
        """
        before, self.waiting = self.waiting, None
        self._settle(before)

    def _settle(self, step: Step | None) -> None:
        if step is None:
            return
        ended = step.ended
        if step.arrived:
            step.arrived.synchronize()
            ended = time.perf_counter()
        loss, norm = step.figures.tolist()
        if not math.isfinite(loss) or not (self.scaled or math.isfinite(norm)):
            what = "gradient norm" if math.isfinite(loss) else "loss"
            raise Diverged(f"the {what} of iteration {step.number}", step.number)
        p = self.progress
        p.skipped_steps += not math.isfinite(norm)
        p.epoch_loss, p.epoch_iters = p.epoch_loss + loss, p.epoch_iters + 1
        self.timed += 1
        self.sequences, self.seen = self.sequences + step.sequences, self.seen + step.sequences
        if step.number % self.c.log_interval == 0:
            self._report(step, loss, norm, (ended - self.since) / self.timed)
            self.since, self.timed, self.sequences = ended, 0, 0

    def _report(self, step: Step, loss: float, norm: float, dt: float) -> None:
        """The line of an iteration, as nanoGPT's and more; dt is seconds an iteration."""
        per_step = self.sequences / self.timed
        mfu = self.model.estimate_mfu(per_step / self.processes.world_size, dt)
        speed = per_step * self.c.block_size / dt
        left = int((self.total - self.seen) / per_step * dt)
        eta = f"{left // 3600}h{left % 3600 // 60:02}m" if left >= 3600 else f"{left // 60}m{left % 60:02}s"
        skipped = {"skipped_steps": self.progress.skipped_steps} if self.scaled else {}
        self.say(
            f"iter {step.number}: loss {loss:.4f}, time {dt * 1000:.2f}ms, "
            f"mfu {'n/a' if mfu is None else f'{mfu:.2%}'}, {speed:,.0f} tokens/s, lr {step.lr:.2e}, "
            f"norm {norm:.3f}, eta {eta}" + "".join(f", skipped {n}" for n in skipped.values())
        )
        self.record(
            "train", iter=step.number, loss=loss, lr=step.lr, grad_norm=norm, ms=dt * 1000, tokens_per_second=speed,
            mfu=mfu, **skipped,
        )  # fmt: skip

    def measure(self) -> None:
        """Adds the time since the last call to the run's, and to the epoch's."""
        now, p = time.perf_counter(), self.progress
        if self.running:
            p.training_seconds += now - self.measured
        else:
            p.evaluation_seconds += now - self.measured
        p.epoch_seconds += now - self.epoch_clock
        self.measured = self.epoch_clock = now

    def end(self) -> None:
        """The line of a run that is over: what it took, and whether it took it to target_val_loss."""
        c, p = self.c, self.progress
        tokens = p.sequences_seen * c.block_size
        reached = {"target_val_loss": c.target_val_loss, "reached": p.best_val_loss <= c.target_val_loss}
        self.say(
            f"{p.iter_num:,} steps, {tokens:,} tokens: {p.training_seconds:.2f}s of training, "
            f"{p.evaluation_seconds:.2f}s of evaluation, {self.compile_seconds:.2f}s of compiling"
        )
        self.record(
            "end", iter=p.iter_num, tokens=tokens, training_seconds=p.training_seconds,
            evaluation_seconds=p.evaluation_seconds, compile_seconds=self.compile_seconds,
            val_loss=p.best_val_loss, **(reached if c.target_val_loss else {}),
        )  # fmt: skip

    def end_epoch(self, epochs: int) -> None:
        """The line of an epoch, the run's `epochs`-th: its mean training loss and its time."""
        self.settle()
        self.measure()
        p = self.progress
        mean = p.epoch_loss / p.epoch_iters
        self.say(f"epoch {epochs}: mean loss {mean:.4f}, time {p.epoch_seconds:.1f}s")
        self.record("epoch", iter=p.iter_num - 1, epoch=epochs, mean_loss=mean, seconds=p.epoch_seconds)
        p.epoch_loss, p.epoch_iters, p.epoch_seconds = 0.0, 0, 0.0


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures inside figures under one name each: {"datasets": {"wiki": 1}} as {"datasets/wiki": 1}."""
    found = {}
    for key, value in figures.items():
        inner = flat(value) if isinstance(value, dict) else {}
        found |= {f"{key}/{k}": v for k, v in inner.items()} if inner else {key: value}
    return found


class Diverged(UserError):
    """A loss or a gradient norm is no finite number: the weights of `iteration` and of those after it are of no use."""

    def __init__(self, what: str, iteration: int):
        super().__init__(
            f"{what} is no finite number: training has diverged; lower learning_rate, or raise warmup_iters, and start "
            f"again, or go on from the last good state with --init_from=resume"
        )
        self.iteration = iteration


def say(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:  # a full disk takes the line later, out of the stream's own buffer
        if error.errno in (errno.EPIPE, errno.EIO):  # the pipe's reader left, or the terminal was closed
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
