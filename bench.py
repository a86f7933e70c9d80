"""Measures training (tokens/s, time of an iteration, MFU, peak memory, time of the first step), or generation, or
preparing a text.

    $ python bench.py
    $ python bench.py --device=cpu --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --json
    $ python bench.py --profile
    $ python bench.py --save
    $ python bench.py generate
    $ python bench.py generate --quantize=int8 --init_from=out-demo
    $ python bench.py prepare --input=novel.txt --copies=50

Needs no dataset: without data/openwebtext it takes random tokens. A CPU gets a smaller batch, unless one is set.
"""

from configurator import Config, UserError, configure, run, user_errors

what = "train"  # 'train', 'generate' or 'prepare', a word without dashes
batch_size = 12  # sequences in an iteration; on a CPU 1, unless set; of generation, 1 and this, or else 1, 8 and 32
block_size = 1024  # tokens in a sequence
n_layer = 12  # the model's shape: GPT-2 124M
n_head = 12  # heads in a block
n_embd = 768  # width
dropout = 0.0  # 0 measures what pre-training does
vocab_size = 50304  # GPT-2's, padded
bias = False  # biases in Linears and LayerNorms
real_data = True  # tokens of data/openwebtext, where it has been prepared; else random ones
num_steps = 20  # measured iterations, after half as many for warming up
max_seconds = 60.0  # ends warming up and measuring after this long each, with at least one iteration
seed = 1337  # of the weights and the random tokens
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'
compile = True  # torch.compile, where there is a compiler; on a CPU False, unless set
profile = False  # print the ten hottest operations, and write a trace for a viewer into bench_log/
max_new_tokens = 256  # of generation, after a short prompt
num_rounds = 3  # how often all that generation is compared with is measured, in turns
quantize = ""  # generate with 'int8' or 'bf16' weights, as sample.py does
init_from = ""  # generate with the weights of an out_dir, a .pt file or a Hugging Face folder instead of random ones
transformers = False  # also measure generation by transformers
nanogpt = ""  # a folder with nanoGPT, to measure its generation, or its preparing, as well
input = ""  # a text in UTF-8 to prepare; default: the stories that come with weiGPT
copies = 1  # how often that text is repeated
save = False  # measure what a checkpoint costs the training that goes on, beside torch.save in place
json = False  # print one JSON object and nothing else
config = configure(globals(), positionals=("what",))

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path

import numpy as np
import torch

import bench_generate
import bench_prepare
import checkpoint
from device import autocast, can_compile, choose_device, choose_dtype, memory_error_told, try_compiled
from loader import dataset_folder, open_split, sequence_starts
from model import GPT, GPTConfig, derive_seed
from quantize import check_quantize
from run_dir import RunDir

SAVES = 5  # measured, after a first one that also takes new memory


def random_windows(c: Config):
    """A function of the iteration that gives x and y, int64 [batch_size, block_size]; the same tokens each time."""
    ids = torch.randint(c.vocab_size, (c.batch_size, c.block_size + 1))
    return lambda step: (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def real_windows(c: Config):
    """The same from data/openwebtext. UserError where it is not prepared."""
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


@memory_error_told()
def main(c: Config) -> None:
    if c.what not in ("train", "generate", "prepare"):
        raise UserError(f"what={c.what}: there are train, generate and prepare")
    for key in ("num_steps", "num_rounds", "max_new_tokens"):
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")

    def say(text: str) -> None:
        print(text, file=sys.stderr if c.json else sys.stdout)

    if c.what == "prepare":
        figures = bench_prepare.measure(c, say)
        if c.json:
            print(dumps(figures))
        return
    c.device = choose_device(c.device)
    c.dtype = choose_dtype(c.dtype, c.device)
    if c.device == "cpu":
        c.batch_size = c.batch_size if "batch_size" in c.given else 1
        c.compile = c.compile and "compile" in c.given
    if c.batch_size < 1:
        raise UserError(f"batch_size={c.batch_size}: expected at least 1")
    torch.manual_seed(derive_seed(c.seed))
    if c.what == "generate":
        bench_generation(c, say)
        return
    try:
        windows = real_windows(c) if c.real_data else random_windows(c)
    except UserError:
        say("note: data/openwebtext is not prepared; taking random tokens")
        windows, c.real_data = random_windows(c), False
    model = random_model(c)
    kind = torch.device(c.device).type
    optimizer = model.configure_optimizers(1e-2, 1e-4, (0.9, 0.95), kind)
    scaler = torch.amp.GradScaler(kind, enabled=c.dtype == "float16")
    ctx = autocast(c.device, c.dtype)
    say(
        f"{model.get_num_params() / 1e6:.2f}M parameters, {c.batch_size} x {c.block_size} tokens, {c.device}, {c.dtype}"
    )

    c.compile = c.compile and can_compile(c.device)
    fast = torch.compile(model) if c.compile else model

    def step(number: int = 0) -> float:
        """One iteration, waited for: seconds."""
        started = time.perf_counter()
        x, y = (t.to(c.device) for t in windows(number))
        with ctx:
            _, loss = fast(x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - started

    started = time.perf_counter()
    try_compiled(step) if c.compile else step()
    first_step = time.perf_counter() - started
    say(f"first step{', compiling' if c.compile else ''}: {first_step:.2f}s")

    def repeat(steps: int) -> list[float]:
        times, until = [], time.perf_counter() + c.max_seconds
        while len(times) < max(1, steps) and (not times or time.perf_counter() < until):
            times.append(step(len(times)))
        return times

    repeat(c.num_steps // 2)
    if c.profile:
        print_profile(repeat, c, say)
        return
    times = repeat(c.num_steps)
    dt = statistics.median(times)
    mfu = model.estimate_mfu(c.batch_size, dt)
    figures = {
        "tokens_per_second": c.batch_size * c.block_size / dt,
        "ms_per_iteration": dt * 1000,
        "mfu": mfu,
        "flops_per_second": model.estimate_flops() * c.batch_size * c.block_size / dt,
        "peak_memory_bytes": peak_memory(c.device),
        "first_step_seconds": first_step,
        "iterations": len(times),
        "parameters": model.get_num_params(non_embedding=False),
    } | circumstances(c)
    if c.save:
        figures |= measure_saving(lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step)
    if c.json:
        print(dumps(figures))
        return
    say(
        f"time per iteration: {dt * 1000:.2f}ms (median of {len(times)}), "
        f"{figures['tokens_per_second']:,.0f} tokens/s, "
        f"MFU: {'n/a' if mfu is None else f'{mfu:.2%}'} ({figures['flops_per_second'] / 1e12:.3f} TFLOP/s), "
        f"peak memory: {figures['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    if c.save:
        say(
            f"saving {figures['save_bytes'] / 1e6:,.0f} MB: training waits {figures['save_wait_seconds']:.3f}s (the "
            f"first time {figures['first_save_wait_seconds']:.3f}s, for new memory); the disk is done after "
            f"{figures['save_seconds']:.2f}s, while steps take {figures['save_slowdown_seconds']:.2f}s longer in all; "
            f"torch.save in place: {figures['save_in_place_seconds']:.2f}s (medians of {SAVES})"
        )


def random_model(c: Config) -> GPT:
    """A model of the shape that is asked for, on the device."""
    shape = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    with user_errors(ValueError):
        return GPT(GPTConfig(**{key: getattr(c, key) for key in shape})).to(c.device)


def circumstances(c: Config) -> dict:
    """What the figures depend on."""
    is_cuda = c.device.startswith("cuda")
    return {
        "compiled": c.compile,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name(c.device) if is_cuda else f"{torch.get_num_threads()} CPU threads",
        "config": dict(vars(c)),
    }


def bench_generation(c: Config, say: Callable[[str], None]) -> None:
    """Prints the figures of bench_generate."""
    check_quantize(c.quantize, c.device)
    c.dtype = "float32" if c.quantize else c.dtype
    c.batch_sizes = sorted({1, c.batch_size} if "batch_size" in c.given else {1, 8, 32})
    c.compile = c.compile and can_compile(c.device)
    model = checkpoint.pretrained(c.init_from)[0].to(c.device) if c.init_from else random_model(c)
    ctx = autocast(c.device, c.dtype)
    say(f"{model.get_num_params() / 1e6:.2f}M parameters, {c.device}, {c.quantize or c.dtype}")
    figures = bench_generate.measure(c, model, ctx, say) | circumstances(c)
    tokens = bench_generate.validation_split(c, model.config.block_size) if c.quantize and c.init_from else None
    if tokens:
        figures |= (found := bench_generate.perplexity(c, model, tokens, ctx))
        say(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items()))
    if c.json:
        print(dumps(figures))


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


if __name__ == "__main__":
    run(main, config)
