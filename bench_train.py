"""What `python bench.py train` measures: whole iterations on tokens that are there already, forwards, backwards,
clipping and the optimizers' step.

Notable choices:
- With nanoGPT beside, each has a process of its own, so that memory and its allocator are its own too; they take turns
  of half a second, or of one iteration where that takes longer, and while one works the other waits.
- nanoGPT's iteration is that of its train.py on its own model; ours that of our train.py.
"""

import contextlib
import importlib.util
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from configurator import Config, UserError, user_errors
from device import autocast, can_compile, choose_device, choose_matmul, try_compiled
from loader import dataset_folder, open_split, sequence_starts
from model import GPT, GPTConfig, derive_seed, peak_flops
from muon import OPTIMS, build_optimizers
from run_dir import RunDir

TURN = 0.5  # seconds, at least, that one works while the other waits
SAVES = 5  # measured, after a first one that also takes new memory
Figures = dict[str, Any]


def measure(c: Config, say: Callable[[str], None]) -> Figures:
    """The figures of each batch and block size that is asked for, of the first one alone without a list; says a line
    for each."""
    if c.optim not in OPTIMS:
        raise UserError(f"optim={c.optim}: expected {' or '.join(OPTIMS)}")
    with user_errors(ValueError):
        GPTConfig(**shape_of(c))
    if c.against:
        nanogpt_module(c.against)
    if c.real_data:
        try:
            open_split(dataset_folder("openwebtext"), "train", c.block_size)
        except UserError:
            say("note: data/openwebtext is not prepared; taking random tokens")
            c.real_data = False
    c.matmul = choose_matmul(c.matmul, c.device)
    c.compile = c.compile and can_compile(c.device)
    batches, blocks = sizes(c, "batch_size"), sizes(c, "block_size")
    swept = len(batches) * len(blocks) > 1
    if swept and (c.profile or c.save):
        raise UserError("--profile and --save measure one batch size and one block size")
    found = []
    for block_size in blocks:
        for batch_size in batches:
            c.batch_size, c.block_size = batch_size, block_size
            found.append((beside if c.against else alone)(c, say))
    return {"sizes": found} | circumstances(c) if swept else found[0] | circumstances(c)


def sizes(c: Config, key: str) -> list[int]:
    """The batch sizes or block sizes to measure."""
    text = getattr(c, f"{key}s")
    with user_errors(ValueError, about=f"{key}s={text}: expected whole numbers between commas, such as 4,8,16"):
        found = [int(each) for each in text.split(",")] if text else [getattr(c, key)]
    if min(found) < 1:
        raise UserError(f"{key}={min(found)}: expected at least 1")
    return found


class Contender:
    """A model and its optimizers, ready to make iterations on the same tokens as the others."""

    def __init__(self, c: Config, name: str):
        """`name` is 'weigpt' or 'nanogpt'."""
        self.c, self.name, kind = c, name, torch.device(c.device).type
        torch.manual_seed(derive_seed(c.seed))
        self.windows = real_windows(c) if c.real_data else random_windows(c)
        if name == "nanogpt":
            self.model = nanogpt_model(c.against, GPTConfig(**shape_of(c))).to(c.device)
            self.optimizers = [self.model.configure_optimizers(1e-1, 1e-4, (0.9, 0.95), kind)]
        else:
            self.model = random_model(c)
            self.optimizers = build_optimizers(self.model, c.optim, 1e-1, 1e-4, (0.9, 0.95), 1e-8, 1e-3, 0.95, kind)
        self.how = {} if name == "nanogpt" else {"loss_only": True}
        self.scaler = torch.amp.GradScaler(kind, enabled=c.dtype == "float16")
        self.ctx = autocast(c.device, c.dtype)
        self.fast, self.steps = torch.compile(self.model) if c.compile else self.model, 0

    def turn(self) -> list[float]:
        """Iterations for TURN seconds: the seconds of each. The first of several, which finds the caches cold and the
        threads asleep, is left out."""
        times, until = [self.step()], time.perf_counter() + TURN
        while time.perf_counter() + times[0] < until:
            times.append(self.step())
        return times[1:] or times

    def step(self) -> float:
        """One iteration, waited for: seconds."""
        x, y = (t.to(self.c.device) for t in self.windows(self.steps))
        self.steps += 1
        started = time.perf_counter()
        with self.ctx:
            _, loss = self.fast(x, y, **self.how)
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        loss.item()
        if self.c.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def first_step(self) -> float:
        """The first iteration, compiling included: seconds."""
        started = time.perf_counter()
        try_compiled(self.step) if self.c.compile else self.step()
        return time.perf_counter() - started


def alone(c: Config, say: Callable[[str], None]) -> Figures:
    """Our figures for c's shape."""
    ours = Contender(c, "weigpt")
    say(
        f"{ours.model.get_num_params() / 1e6:.2f}M parameters, {c.batch_size} x {c.block_size} tokens, {c.device}, "
        f"{c.dtype}"
    )
    first_step = ours.first_step()
    say(f"first step{', compiling' if c.compile else ''}: {first_step:.2f}s")
    steps = [lambda: [ours.step()]]
    repeat(c, steps, c.num_steps // 2)
    if c.profile:
        print_profile(lambda n: repeat(c, steps, n), c, say)
        return {}
    (times,) = repeat(c, steps, c.num_steps)
    figures = {"batch_size": c.batch_size, "block_size": c.block_size}
    figures |= figures_of(c, times, first_step, peak_memory(c.device), ours.model)
    say(line(figures))
    if c.save:
        saving = measure_saving(
            lambda: {"model": ours.model.state_dict(), "optimizer": [o.state_dict() for o in ours.optimizers]},
            ours.step,
        )
        say(
            f"saving {saving['save_bytes'] / 1e6:,.0f} MB: training waits {saving['save_wait_seconds']:.3f}s (the "
            f"first time {saving['first_save_wait_seconds']:.3f}s, for new memory); the disk is done after "
            f"{saving['save_seconds']:.2f}s, while steps take {saving['save_slowdown_seconds']:.2f}s longer in all; "
            f"torch.save in place: {saving['save_in_place_seconds']:.2f}s (medians of {SAVES})"
        )
        figures |= saving
    return figures


def beside(c: Config, say: Callable[[str], None]) -> Figures:
    """Our figures and nanoGPT's, each in a process of its own, in turns, and the ratio of their medians."""
    names, spawn = ("weigpt", "nanogpt"), multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as held:
        wires = {}
        for name in names:
            wires[name], theirs = spawn.Pipe()
            process = spawn.Process(target=serve_steps, args=(theirs, c, name), daemon=True)
            process.start()
            theirs.close()
            held.callback(process.join)
            held.callback(wires[name].close)

        def ask(name: str, what: str) -> Any:
            wires[name].send(what)
            try:
                answer = wires[name].recv()
            except EOFError:
                raise UserError(f"the process of {name} died (out of memory? lower --batch_size)") from None
            if isinstance(answer, str):
                raise UserError(f"{name}: {answer}")
            return answer

        first = {name: ask(name, "first_step") for name in names}
        turns = [lambda name=name: ask(name, "turn") for name in names]
        repeat(c, turns, c.num_steps // 2)
        times = dict(zip(names, repeat(c, turns, c.num_steps), strict=True))
        memory = {name: ask(name, "memory") for name in names}
    with torch.device("meta"):
        model = GPT(GPTConfig(**shape_of(c)))  # for counting alone
    found = {name: figures_of(c, times[name], first[name], memory[name], model) for name in names}
    say(f"{c.batch_size} x {c.block_size} tokens, {c.device}, {c.dtype}")
    for name in names:
        say(f"{name}: {line(found[name])}")
    ratios = {
        "tokens_per_second_ratio": found["weigpt"]["tokens_per_second"] / found["nanogpt"]["tokens_per_second"],
        "memory_ratio": memory["weigpt"] / max(1, memory["nanogpt"]),
    }
    say(
        f"weigpt / nanogpt: {ratios['tokens_per_second_ratio']:.2f} times the tokens/s, "
        f"{ratios['memory_ratio']:.2f} times the peak memory"
    )
    return {"batch_size": c.batch_size, "block_size": c.block_size, **found, **ratios}


def serve_steps(wire: Connection, c: Config, name: str) -> None:
    """The work of a process of beside(): an iteration whenever it is asked for one; a text says what went wrong."""
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        try:
            if name == "weigpt":
                choose_device(c.device)  # with what it sets up; nanoGPT runs as it is
                choose_matmul(c.matmul, c.device)
            contender = Contender(c, name)
            answers = {
                "first_step": contender.first_step,
                "turn": contender.turn,
                "memory": lambda: peak_memory(c.device),
            }
            while True:
                wire.send(answers[wire.recv()]())
        except (RuntimeError, MemoryError, ValueError, OSError) as error:
            wire.send((str(error).strip().splitlines() or [type(error).__name__])[0])


def repeat(c: Config, turns: list[Callable[[], list[float]]], steps: int) -> list[list[float]]:
    """The seconds of each iteration of each contender, in turns, whose order is turned around each round, until every
    one has made `steps`; at least one round, and no more than max_seconds for each of them."""
    times, until, rounds = [[] for _ in turns], time.perf_counter() + c.max_seconds * len(turns), 0
    while min(map(len, times)) < max(1, steps) and (not rounds or time.perf_counter() < until):
        order = list(zip(turns, times, strict=True))
        for turn, own in order if rounds % 2 == 0 else reversed(order):
            own += turn()
        rounds += 1
    return times


def figures_of(c: Config, times: list[float], first_step: float, memory: int, model: GPT) -> Figures:
    dt = statistics.median(times)
    flops = model.estimate_flops() * c.batch_size * c.block_size / dt
    peak = peak_flops(torch.device(c.device))
    return {
        "tokens_per_second": c.batch_size * c.block_size / dt,
        "ms_per_iteration": dt * 1000,
        "mfu": peak and flops / peak,
        "flops_per_second": flops,
        "peak_memory_bytes": memory,
        "first_step_seconds": first_step,
        "iterations": len(times),
        "parameters": model.get_num_params(non_embedding=False),
    }


def line(f: Figures) -> str:
    """The figures in words."""
    return (
        f"time per iteration: {f['ms_per_iteration']:.2f}ms (median of {f['iterations']}), "
        f"{f['tokens_per_second']:,.0f} tokens/s, "
        f"MFU: {'n/a' if f['mfu'] is None else format(f['mfu'], '.2%')} ({f['flops_per_second'] / 1e12:.3f} TFLOP/s), "
        f"peak memory: {f['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def shape_of(c: Config) -> dict[str, Any]:
    return {field.name: getattr(c, field.name) for field in fields(GPTConfig)}


def random_model(c: Config) -> GPT:
    """A model of the shape that is asked for, on the device."""
    with user_errors(ValueError):
        return GPT(GPTConfig(**shape_of(c))).to(c.device)


def nanogpt_module(folder: str) -> ModuleType:
    """nanoGPT's model.py from its folder. UserError where it is not there."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise UserError(f"against={folder}: there is no model.py in it; give a folder with a copy of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except Exception as error:  # it is code, and may raise whatever it likes
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def nanogpt_model(folder: str, config: GPTConfig) -> torch.nn.Module:
    """nanoGPT's model of the same shape, from its folder."""
    module = nanogpt_module(folder)
    own = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    with contextlib.redirect_stdout(sys.stderr):  # it says how many parameters it has
        return module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in own}))


def random_windows(c: Config):
    """A function of the iteration that gives x and y, int64 [batch_size, block_size]; the same tokens each time."""
    ids = torch.randint(c.vocab_size, (c.batch_size, c.block_size + 1))
    return lambda step: (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def real_windows(c: Config):
    """The same from data/openwebtext."""
    tokens = open_split(dataset_folder("openwebtext"), "train", c.block_size)

    def windows(step: int):
        numbers = step * c.batch_size + np.arange(c.batch_size)
        starts = sequence_starts(numbers, len(tokens.ids), c.block_size, c.seed)
        return tokens.windows(starts, c.block_size, c.vocab_size)

    return windows


def peak_memory(device: str) -> int:
    """Bytes: the GPU's largest allocation so far, or the process's largest resident size; 0 where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def circumstances(c: Config) -> dict:
    """What the figures depend on."""
    is_cuda = c.device.startswith("cuda")
    return {
        "compiled": c.compile,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(c.device) if is_cuda else f"{torch.get_num_threads()} CPU threads",
        "config": dict(vars(c)),
    }


def measure_saving(state: Callable[[], dict], step: Callable[[], float]) -> dict[str, float]:
    """Saves in the background while steps go on, in turns with torch.save in place, as in nanoGPT's train.py. Seconds:
    how long training waits, by how much the steps are slower in all until the file is on the disk, and so on."""
    waits, slowdowns, background, in_place = [], [], [], []
    with (
        user_errors(OSError, about="--save needs to write to this folder"),
        tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder,
    ):
        files = RunDir(folder, None)
        for _ in range(1 + SAVES):
            calm = statistics.median(step() for _ in range(5))
            started = time.perf_counter()
            files.save(state() | {"iter_num": 0}, {})
            waits.append(time.perf_counter() - started)
            slowdown = 0.0
            while files.busy:
                slowdown += step() - calm
            files.finish()
            slowdowns.append(slowdown)
            background.append(time.perf_counter() - started)
            started = time.perf_counter()
            torch.save(state(), Path(folder) / "in-place.pt")
            in_place.append(time.perf_counter() - started)
        size = (Path(folder) / "last.pt").stat().st_size
        files.close()
    return {
        "save_bytes": size,
        "first_save_wait_seconds": waits[0],
        "save_wait_seconds": statistics.median(waits[1:]),
        "save_seconds": statistics.median(background[1:]),
        "save_slowdown_seconds": statistics.median(slowdowns[1:]),
        "save_in_place_seconds": statistics.median(in_place[1:]),
    }


def print_profile(repeat, c: Config, say) -> None:
    """Runs five iterations under torch.profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if c.device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        repeat(5)
    column = "self_cuda_time_total" if c.device.startswith("cuda") else "self_cpu_time_total"
    say(profiler.key_averages().table(sort_by=column, row_limit=10))
    Path("bench_log").mkdir(exist_ok=True)
    profiler.export_chrome_trace("bench_log/trace.json")
    say("trace: bench_log/trace.json (open it in chrome://tracing or ui.perfetto.dev)")
