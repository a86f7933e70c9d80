"""Trains a GPT: on a CPU, on a GPU, or on many by torchrun.

    $ python train.py config/train_shakespeare_char.py
    $ python train.py config/train_chinese.py --device=cpu --compile=False --max_iters=1000
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    $ python train.py --init_from=resume --out_dir=out-chinese

Ctrl-C ends a run after the step that it is in and saves it; init_from=resume goes on from there, exactly.
"""

from configurator import Config, UserError, coerce, configure, note, run, user_errors

# I/O
out_dir = "out"  # where checkpoints and the log go
eval_interval = 2000  # evaluate and save every so many iterations, and at the end
log_interval = 1  # print a line every so many iterations
eval_iters = 200  # batches in an evaluation of each split, at most the whole split
eval_only = False  # evaluate once and exit, saving nothing
always_save_checkpoint = False  # let ckpt.pt be the latest evaluation's, not the best one's
init_from = "scratch"  # 'scratch', 'resume', 'gpt2*', or a path: an out_dir, a .pt file, a Hugging Face folder
sample_interval = 0  # print a sample every so many iterations, 0 for never
sample_prompts = ["\n"]  # what the samples begin with; repeat the key for several
sample_tokens = 200  # length of a sample
# wandb
wandb_log = False  # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "owt"  # its project
wandb_run_name = "gpt2"  # its run
# data
dataset = "openwebtext"  # a folder in data/, or a path to one
gradient_accumulation_steps = 5 * 8  # micro-steps in an iteration, over all processes together
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens in a sequence: the model's context
seed = 1337  # of the initial weights, the order of the data and dropout
# model
n_layer = 12  # blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width, divisible by n_head
dropout = 0.0  # 0 for pre-training; 0.1 and more helps against overfitting in fine-tuning
bias = False  # biases in Linears and LayerNorms
# AdamW
learning_rate = 6e-4  # the highest
max_iters = 600000  # iterations, that is, updates of the weights, in all
epochs = 0  # passes over the training split, in place of max_iters; 0 for max_iters
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # decay of the mean of the gradients
beta2 = 0.95  # decay of the mean of their squares
adam_eps = 1e-8  # added to the denominator
grad_clip = 1.0  # clip the gradients' norm to this, 0 for never
# learning rate schedule
decay_lr = True  # warm up and decay; False is a constant rate
lr_schedule = "cosine"  # shape of the decay: 'cosine' or 'linear'
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # where the decay ends, usually max_iters; with epochs, their end unless set
min_lr = 6e-5  # the rate after the decay, usually learning_rate / 10
# system
backend = "nccl"  # 'nccl' or 'gloo' under torchrun; on CPUs always gloo
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16' (with a loss scaler)
compile = True  # torch.compile, where there is a compiler: a slow first step, then faster ones
config = configure(globals())

import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from device import (
    Processes,
    StopSignal,
    autocast,
    can_compile,
    choose_device,
    choose_dtype,
    join_processes,
    memory_error_told,
    try_compiled,
)
from generate import generate_text, prompt_ids
from loader import (
    Tokens,
    blocks_per_epoch,
    check_vocabulary,
    dataset_folder,
    evaluation_batches,
    open_split,
    training_batches,
)
from model import GPT, GPTConfig, derive_seed
from tokenizer import Tokenizer, load_tokenizer, read_meta


@dataclass
class Progress:
    """What a run has done so far; saved in last.pt, so that a resumed run counts on."""

    iter_num: int = 0  # updates in the weights
    sequences_seen: int = 0
    best_val_loss: float = 1e9
    epoch_loss: float = 0.0  # sums over the iterations of the current epoch
    epoch_iters: int = 0
    epoch_seconds: float = 0.0


@dataclass
class Run:
    """What belongs together while a run lasts. `out` and `log` are None in every process but the first."""

    c: Config
    processes: Processes
    model: GPT
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    out: Path | None = None
    log: checkpoint.Log | None = None
    wandb: Any = None
    norm: torch.Tensor | float = 0.0  # of the last iteration's gradients, before clipping
    own: set[str] = field(default_factory=set)  # which files in out are this run's, not an earlier one's
    started_at: int = 0  # the iteration from which this process goes on
    epoch_clock: float = 0.0  # when the time of the epoch was last added up

    def say(self, text: str) -> None:
        if not self.processes.master:
            return
        try:
            print(text, flush=True)
        except OSError:  # the terminal was closed, or the pipe's reader left: training goes on without them
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def record(self, kind: str, **figures: Any) -> None:
        """A line in log.jsonl, and the same figures in wandb."""
        if self.log:
            self.log.write(kind=kind, **figures)
        if self.wandb:
            self.wandb.log({k if k == "iter" else f"{kind}/{k}": v for k, v in figures.items()})


@memory_error_told()
def main(c: Config) -> None:
    r, train, val = prepare(c)
    p = r.progress
    if p.iter_num >= c.max_iters and not c.eval_only:
        r.say(f"nothing left to do: all {c.max_iters:,} iterations are done; a larger --max_iters goes on")
        return r.processes.end()
    micro_steps = c.gradient_accumulation_steps // r.processes.world_size
    per_step = c.batch_size * c.gradient_accumulation_steps
    epoch_length = blocks_per_epoch(len(train.ids), c.block_size)
    ctx = autocast(c.device, c.dtype)
    fast, model = accelerate(r, ctx)
    batches = training_batches(
        train, c.block_size, c.batch_size, c.gradient_accumulation_steps, r.model.config.vocab_size, c.seed,
        p.sequences_seen, r.processes.rank, r.processes.world_size, c.device,
    )  # fmt: skip
    stop = None if c.eval_only else StopSignal()
    since = r.epoch_clock = time.perf_counter()
    timed = 0

    while True:
        lr = learning_rate_at(p.iter_num, c)
        for group in r.optimizer.param_groups:
            group["lr"] = lr

        at_evaluation = c.eval_only or p.iter_num % c.eval_interval == 0 or p.iter_num >= c.max_iters
        at_sample = c.sample_interval and p.iter_num and p.iter_num % c.sample_interval == 0 and not c.eval_only
        if at_evaluation:
            evaluate_and_save(r, fast, train, val, ctx, p.sequences_seen / epoch_length)
        if at_sample:
            show_samples(r, ctx)
        if at_evaluation or at_sample:
            since, timed = time.perf_counter(), 0
        if c.eval_only or p.iter_num >= c.max_iters:
            break

        loss = torch.zeros((), device=c.device)
        for k in range(micro_steps):
            micro_step, x, y = next(batches)
            if c.dropout:
                torch.manual_seed(derive_seed(c.seed, p.iter_num, micro_step))
            if r.processes.world_size > 1:  # gradients travel once, after the last micro-step
                model.require_backward_grad_sync = k == micro_steps - 1
            with ctx:
                _, micro_loss = model(x, y)
            r.scaler.scale(micro_loss / micro_steps).backward()
            loss += micro_loss.detach() / micro_steps
        r.scaler.unscale_(r.optimizer)
        r.norm = torch.nn.utils.clip_grad_norm_(r.model.parameters(), c.grad_clip or math.inf)
        r.scaler.step(r.optimizer)
        r.scaler.update()
        r.optimizer.zero_grad(set_to_none=True)
        r.processes.mean(loss)

        done, timed = p.iter_num, timed + 1
        p.iter_num, p.sequences_seen = p.iter_num + 1, p.sequences_seen + per_step
        p.epoch_loss, p.epoch_iters = p.epoch_loss + loss, p.epoch_iters + 1
        if done % c.log_interval == 0:
            check_finite(r)
            now = time.perf_counter()
            report(r, done, loss.item(), lr, r.norm.item(), (now - since) / timed, per_step)
            since, timed = now, 0
        if p.sequences_seen // epoch_length > (p.sequences_seen - per_step) // epoch_length:
            end_epoch(r, done, p.sequences_seen // epoch_length)
        if (signal_number := r.processes.largest(stop.received)) and p.iter_num < c.max_iters:
            leave(r, signal_number)

    if not c.eval_only:
        if c.epochs and p.epoch_iters:  # the last one, which rounding to whole iterations may have cut short
            end_epoch(r, p.iter_num - 1, c.epochs)
        r.say(
            f"done: {p.iter_num:,} iterations, best val loss {p.best_val_loss:.4f}; "
            f"python sample.py --out_dir={c.out_dir}"
        )
    r.processes.end()


def prepare(c: Config) -> tuple[Run, Tokens, Tokens]:
    """Everything that can go wrong before the first step: the machine, the settings, the data, the model, the files."""
    processes = join_processes(c.backend, c.device)
    c.device = choose_device(c.device, processes.local_rank if processes.world_size > 1 else None)
    c.dtype = choose_dtype(c.dtype, c.device)
    path, state = checkpoint.newest(c.out_dir) if c.init_from == "resume" else (None, {})
    inherit(c, state.get("config", {}))
    check(c, processes.world_size)

    folder = dataset_folder(c.dataset)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(derive_seed(c.seed))
    model = build_model(c, path, state, tokenizer)
    train, val = open_split(folder, "train", c.block_size), open_split(folder, "val", c.block_size)
    meta, vocab_size = read_meta(folder), model.config.vocab_size
    processes.first(lambda: [check_vocabulary(tokens, meta, vocab_size) for tokens in (train, val)])
    per_step = c.batch_size * c.gradient_accumulation_steps
    epoch_length = blocks_per_epoch(len(train.ids), c.block_size)
    if c.epochs:
        c.max_iters = max(1, c.epochs * epoch_length // per_step)
        if "lr_decay_iters" not in c.given and not state:
            c.lr_decay_iters = c.max_iters

    model.to(c.device)
    kind = torch.device(c.device).type
    optimizer = model.configure_optimizers(c.weight_decay, c.learning_rate, (c.beta1, c.beta2), kind, c.adam_eps)
    scaler = torch.amp.GradScaler(kind, enabled=c.dtype == "float16")
    r = Run(c, processes, model, tokenizer, optimizer, scaler, Progress())
    r.say(
        f"tokens per iteration will be: {per_step * c.block_size:,}; "
        f"an epoch is {epoch_length / per_step:,.1f} iterations"
    )
    r.say(f"number of parameters: {model.get_num_params() / 1e6:.2f}M; {processes.world_size} x {c.device}, {c.dtype}")
    if state:
        checkpoint.load_optimizer(optimizer, model, state, path)
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
        seen = state["iter_num"] * per_step  # nanoGPT's files do not count sequences
        r.progress = Progress(state["iter_num"], state.get("sequences_seen", seen), state["best_val_loss"])
        for key, value in state.get("epoch", {}).items():
            setattr(r.progress, key, value)
        r.started_at, r.own = r.progress.iter_num, {"ckpt.pt", "last.pt"}
        r.say(f"resuming from {path} at iteration {r.started_at:,}")
    if c.sample_interval:
        for prompt in c.sample_prompts:
            prompt_ids(tokenizer, prompt)
    if not c.eval_only and r.progress.iter_num < c.max_iters:
        processes.first(lambda: open_files(r, path))
    return r, train, val


def open_files(r: Run, resumed_from: Path | None) -> None:
    """Where the first process writes to; last of all, so that a mistake has left an earlier run's files alone."""
    r.wandb = start_wandb(r.c) if r.c.wandb_log else None
    r.out = checkpoint.open_out_dir(r.c.out_dir, resumed_from)
    r.log = checkpoint.Log(r.out, r.progress.iter_num)


def inherit(c: Config, saved: dict[str, Any]) -> None:
    """On resuming, what the user did not set comes from the checkpoint, but for what belongs to this machine."""
    of_this_machine = ("device", "dtype", "compile", "backend", "out_dir", "init_from", "eval_only")
    for key, value in saved.items():
        if key in vars(c) and key not in c.given and key not in of_this_machine:
            setattr(c, key, coerce(value, getattr(c, key), f"{key} in the checkpoint's config"))
    if "max_iters" in c.given and "epochs" not in c.given[c.given.index("max_iters") :]:
        c.epochs = 0


def check(c: Config, world_size: int) -> None:
    """UserError for settings that make no sense."""
    if not c.out_dir:
        raise UserError("out_dir is empty: expected a folder")
    for key in ("batch_size", "block_size", "gradient_accumulation_steps",
                "eval_interval", "eval_iters", "log_interval"):  # fmt: skip
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")
    for key in ("max_iters", "epochs", "warmup_iters", "lr_decay_iters", "sample_interval", "sample_tokens",
                "learning_rate", "min_lr", "weight_decay", "grad_clip"):  # fmt: skip
        if getattr(c, key) < 0:
            raise UserError(f"{key}={getattr(c, key)}: expected 0 or more")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 0 and below 1")
    if c.adam_eps <= 0:
        raise UserError(f"adam_eps={c.adam_eps}: expected more than 0")
    if c.lr_schedule not in ("cosine", "linear"):
        raise UserError(f"lr_schedule={c.lr_schedule}: expected cosine or linear")
    if c.gradient_accumulation_steps % world_size:
        raise UserError(
            f"gradient_accumulation_steps={c.gradient_accumulation_steps} counts the micro-steps of all {world_size} "
            f"processes together, so it must be divisible by {world_size}, such as "
            f"--gradient_accumulation_steps={c.gradient_accumulation_steps * world_size}"
        )


def build_model(c: Config, path: Path | None, state: dict[str, Any], tokenizer: Tokenizer) -> GPT:
    """The model to train, on the CPU, its context cropped to block_size; c's architecture is made to say what it is."""
    architecture = ("n_layer", "n_head", "n_embd", "bias")
    if c.init_from == "scratch":
        vocab_size = 50304 if tokenizer.kind == "gpt2" else tokenizer.vocab_size  # GPT-2's 50257, padded to be faster
        keys = (*architecture, "block_size", "dropout")
        with user_errors(ValueError):
            return GPT(GPTConfig(vocab_size=vocab_size, **{key: getattr(c, key) for key in keys}))
    if state:
        model = checkpoint.model_of(state, path, c.dropout)
        theirs = checkpoint.tokenizer_of(state, path) if "tokenizer" in state else None
    else:
        model, theirs = checkpoint.pretrained(c.init_from, c.dropout)
    source = path or c.init_from
    if theirs not in (None, tokenizer) or not checkpoint.fits(tokenizer, model.config.vocab_size):
        raise UserError(
            f"the dataset {c.dataset} has another tokenizer than {source}: prepare it with --tokenizer={source}"
        )
    for key in architecture:
        own, asked = getattr(model.config, key), getattr(c, key)
        if key in c.given and own != asked:
            if state:
                raise UserError(f"{key}={asked} is set, but {source} has {own}: a resumed run keeps its architecture")
            note(f"note: {key}={own} comes from {source}, not {asked}")
        setattr(c, key, own)
    if c.block_size > model.config.block_size:
        if "block_size" in c.given and state:
            raise UserError(
                f"block_size={c.block_size} is set, but {source} has a context of {model.config.block_size}"
            )
        if "block_size" in c.given:
            note(f"note: block_size={model.config.block_size} comes from {source}, not {c.block_size}")
        c.block_size = model.config.block_size
    if c.block_size < model.config.block_size:
        model.crop_block_size(c.block_size)
    return model


def accelerate(r: Run, ctx) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model, compiled where that works, for evaluation; and the same under DDP where there are many processes."""
    c = r.c
    use_compile = c.compile and can_compile(c.device)
    fast = model = torch.compile(r.model) if use_compile else r.model
    if r.processes.world_size > 1 and not c.eval_only:
        device_ids = [r.processes.local_rank] if c.device.startswith("cuda") else None
        model = DistributedDataParallel(fast, device_ids=device_ids)
    if use_compile:
        r.say("compiling the model... (takes a minute)")
        x, y = (torch.zeros(c.batch_size, c.block_size, dtype=torch.long, device=c.device) for _ in range(2))

        def probe() -> None:
            with ctx:
                _, loss = model(x, y)  # two tensors: for one, given twice, it would compile something else
            loss.backward()

        if not c.eval_only:
            try_compiled(probe)
            r.optimizer.zero_grad(set_to_none=True)
        try_compiled(lambda: loss_and_accuracy(fast.eval(), x, y, ctx))
        fast.train()
    return fast, model


def learning_rate_at(iter_num: int, c: Config) -> float:
    """Linear warm-up, then a cosine or a line down to min_lr at lr_decay_iters, as nanoGPT's."""
    if not c.decay_lr:
        return c.learning_rate
    if iter_num < c.warmup_iters:
        return c.learning_rate * (iter_num + 1) / (c.warmup_iters + 1)
    if iter_num >= c.lr_decay_iters:
        return c.min_lr
    done = (iter_num - c.warmup_iters) / (c.lr_decay_iters - c.warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * done)) if c.lr_schedule == "cosine" else 1 - done
    return c.min_lr + left * (c.learning_rate - c.min_lr)


@torch.no_grad()
def evaluate(r: Run, model: torch.nn.Module, tokens: Tokens, ctx) -> tuple[float, float]:
    """(mean loss in nats, next-token accuracy) over a split's fixed windows, which the processes share."""
    c = r.c
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)  # loss, hits, batches
    offsets = evaluation_batches(len(tokens.ids), c.block_size, c.batch_size, c.eval_iters)
    for starts in offsets[r.processes.rank :: r.processes.world_size]:
        x, y = tokens.windows(starts, c.block_size, r.model.config.vocab_size)
        x, y = x.to(c.device), y.to(c.device)
        total += torch.tensor([*loss_and_accuracy(model, x, y, ctx), 1.0])
    model.train()
    loss, hits, batches = r.processes.sum(total).tolist()
    return loss / batches, hits / batches


@torch.no_grad()
def loss_and_accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, ctx) -> tuple[float, float]:
    """(mean loss in nats, share of the positions whose likeliest next token is right) of a batch."""
    with ctx:
        logits, loss = model(x, y)
    return loss.item(), (logits.argmax(-1) == y).float().mean().item()


def evaluate_and_save(r: Run, model: torch.nn.Module, train: Tokens, val: Tokens, ctx, epoch: float) -> None:
    """Prints and logs the losses of both splits; saves ckpt.pt if this is the best yet, and last.pt."""
    c, p = r.c, r.progress
    (train_loss, _), (val_loss, accuracy) = evaluate(r, model, train, ctx), evaluate(r, model, val, ctx)
    r.say(
        f"step {p.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, "
        f"val accuracy {accuracy:.2%}, epoch {epoch:.2f}"
    )
    if c.eval_only:
        return
    if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        raise UserError(diverged(r))
    r.record("eval", iter=p.iter_num, train_loss=train_loss, val_loss=val_loss, val_accuracy=accuracy, epoch=epoch)
    best = val_loss < p.best_val_loss
    p.best_val_loss = min(val_loss, p.best_val_loss)
    if p.iter_num and (best or c.always_save_checkpoint):
        r.say(f"saving checkpoint to {c.out_dir}")
        r.processes.first(lambda: checkpoint.save(r.out / "ckpt.pt", state_of(r)))
        r.own.add("ckpt.pt")
    if p.iter_num > r.started_at:
        save_last(r)


def state_of(r: Run) -> dict[str, Any]:
    """A checkpoint in nanoGPT's layout, and the tokenizer."""
    return {
        "model": r.model.state_dict(),
        "optimizer": r.optimizer.state_dict(),
        "model_args": r.model.config.model_args(),
        "iter_num": r.progress.iter_num,
        "best_val_loss": r.progress.best_val_loss,
        "config": dict(vars(r.c)),
        "tokenizer": r.tokenizer.meta(),
    }


def save_last(r: Run) -> None:
    """last.pt: all that a resumed run needs to be the run that was never interrupted."""
    check_finite(r)
    measure_epoch(r)
    p = r.progress

    def work() -> None:
        more = {
            "sequences_seen": p.sequences_seen,
            "scaler": r.scaler.state_dict(),
            "optimizers": checkpoint.named_state(r.model, r.optimizer),
            "epoch": {
                "epoch_loss": float(p.epoch_loss),
                "epoch_iters": p.epoch_iters,
                "epoch_seconds": p.epoch_seconds,
            },
        }
        keep_as = r.out / "last.prev.pt" if "last.pt" in r.own else None
        checkpoint.save(r.out / "last.pt", state_of(r) | more, keep_as)
        r.own.add("last.pt")
        if "ckpt.pt" not in r.own:  # an earlier run's, kept in previous/, would speak in this one's name
            (r.out / "ckpt.pt").unlink(missing_ok=True)

    r.processes.first(work)


def report(r: Run, done: int, loss: float, lr: float, norm: float, dt: float, per_step: int) -> None:
    """The line of an iteration, as nanoGPT's and more; dt is seconds an iteration, per_step its sequences."""
    c = r.c
    mfu = r.model.estimate_mfu(per_step / r.processes.world_size, dt)
    speed = per_step * c.block_size / dt
    left = int((c.max_iters - r.progress.iter_num) * dt)
    eta = f"{left // 3600}h{left % 3600 // 60:02}m" if left >= 3600 else f"{left // 60}m{left % 60:02}s"
    r.say(
        f"iter {done}: loss {loss:.4f}, time {dt * 1000:.2f}ms, mfu {'n/a' if mfu is None else f'{mfu:.2%}'}, "
        f"{speed:,.0f} tokens/s, lr {lr:.2e}, norm {norm:.3f}, eta {eta}"
    )
    r.record("train", iter=done, loss=loss, lr=lr, grad_norm=norm, ms=dt * 1000, tokens_per_second=speed, mfu=mfu)


def measure_epoch(r: Run) -> None:
    """Adds the time since the last call to the epoch's."""
    now = time.perf_counter()
    r.progress.epoch_seconds += now - r.epoch_clock
    r.epoch_clock = now


def end_epoch(r: Run, done: int, epochs: int) -> None:
    """The line of an epoch: its mean training loss and its time."""
    check_finite(r)
    measure_epoch(r)
    p = r.progress
    mean = float(p.epoch_loss) / p.epoch_iters
    r.say(f"epoch {epochs}: mean loss {mean:.4f}, time {p.epoch_seconds:.1f}s")
    r.record("epoch", iter=done, epoch=epochs, mean_loss=mean, seconds=p.epoch_seconds)
    p.epoch_loss, p.epoch_iters, p.epoch_seconds = 0.0, 0, 0.0


def show_samples(r: Run, ctx) -> None:
    """Prints and logs what the model makes of sample_prompts now."""
    if not r.processes.master:
        return
    c, iter_num = r.c, r.progress.iter_num
    r.model.eval()
    for k, prompt in enumerate(c.sample_prompts):
        seed = derive_seed(c.seed, "sample", iter_num, k)
        with ctx:
            text = generate_text(
                r.model, r.tokenizer, prompt, max_new_tokens=c.sample_tokens, temperature=0.8, top_k=200, seed=seed
            )
        r.say(f"sample at iteration {iter_num}:\n{text}\n---------------")
        r.record("sample", iter=iter_num, prompt=prompt, text=text)
    r.model.train()


def check_finite(r: Run) -> None:
    """UserError once a loss was infinite or no number; it stays visible in the epoch's sum. A loss scaler skips
    iterations whose gradients overflow, so under one their norm may be infinite."""
    if not math.isfinite(r.progress.epoch_loss) or not (r.scaler.is_enabled() or math.isfinite(r.norm)):
        raise UserError(diverged(r))


def diverged(r: Run) -> str:
    return (
        f"the loss is no longer a finite number at iteration {r.progress.iter_num}: training has diverged, nothing was "
        f"saved over the checkpoints in {r.c.out_dir}; lower learning_rate, or raise warmup_iters, and start again, or "
        f"go on from the last good state with --init_from=resume"
    )


def leave(r: Run, signal_number: int) -> None:
    """Saves and exits as the signal asked, every process after the same step."""
    save_last(r)
    r.say(
        f"saved at iteration {r.progress.iter_num}; "
        f"go on with: python train.py --init_from=resume --out_dir={r.c.out_dir}"
    )
    r.processes.end()
    raise SystemExit(128 + signal_number)


def start_wandb(c: Config) -> Any:
    """A wandb run; its settings come from its own environment variables, such as WANDB_MODE=offline."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs a package: pip install wandb; or pass --wandb_log=False") from None
    with user_errors(wandb.Error, about="wandb could not start (WANDB_MODE=offline needs no account)"):
        return wandb.init(project=c.wandb_project, name=c.wandb_run_name, config=dict(vars(c)))


if __name__ == "__main__":
    run(main, config)
