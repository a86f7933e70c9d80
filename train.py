"""Trains a GPT: on a CPU, on a GPU, or on many by torchrun.

    $ python train.py config/train_shakespeare_char.py
    $ python train.py config/train_chinese.py --device=cpu --compile=False --max_iters=1000
    $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    $ python train.py --init_from=resume --out_dir=out-chinese

Ctrl-C ends a run after the step that it is in and saves it; init_from=resume goes on from there, exactly, and
init_from=auto does so where there is something to go on from.
"""

from configurator import Config, UserError, configure, note, run

# I/O
out_dir = "out"  # where checkpoints and the log go
eval_interval = 2000  # evaluate and save every so many iterations, and at the end; 0 for the end alone
log_interval = 1  # print a line every so many iterations
eval_iters = 200  # batches in an evaluation of each split, at most the whole split
eval_only = False  # evaluate once and exit, saving nothing
target_val_loss = (
    0.0  # stop once the loss of the whole validation split is so low, and say how long it took; 0 for never
)
patience = 0  # stop after so many evaluations in a row that do not lower the validation loss, 0 for never
always_save_checkpoint = False  # let ckpt.pt be the latest evaluation's, not the best one's
save_interval = (
    0  # save last.pt every so many iterations besides, 0 for evaluations only; left out while one is written
)
keep_checkpoints = 0  # keep so many numbered checkpoints, ckpt-1000.pt and so on (last-1000/ with 'fsdp'), besides
checkpoint_interval = 0  # iterations from one numbered checkpoint to the next, 0 for eval_interval
init_from = "scratch"  # 'scratch', 'resume', 'auto' (which of them), 'gpt2*', or a path: out_dir, .pt file, HF folder
sample_interval = 0  # print a sample every so many iterations, 0 for never
sample_prompts = ["\n"]  # what the samples begin with; repeat the key for several
sample_tokens = 200  # length of a sample
# wandb
wandb_log = False  # log to Weights & Biases too (WANDB_MODE=offline works)
wandb_project = "owt"  # its project
wandb_run_name = "gpt2"  # its run
# data
dataset = "openwebtext"  # a folder in data/, or a path to one; or several with weights: 'wiki:0.6,novels:0.4'
gradient_accumulation_steps = 5 * 8  # micro-steps in an iteration, over all processes together
batch_tokens = 0  # tokens in an iteration, to the nearest micro-step, in place of that; 0 for that
batch_ramp_tokens = 0  # grow to that batch over the first so many tokens, 0 for not growing
batch_ramp_start = 32768  # tokens in the first iteration then, to the nearest micro-step
batch_size = 12  # sequences in a micro-step
block_size = 1024  # tokens in a sequence: the model's context
seed = 1337  # of the initial weights, the order of the data and dropout
# model
model_size = ""  # a paper's: 'gpt2' to 'gpt2-xl', 'gpt3-125m' to 'gpt3-175b': shape, biases, batch, GPT-3's rate
n_layer = 12  # blocks
n_head = 12  # attention heads in a block
n_embd = 768  # width, divisible by n_head
dropout = 0.0  # 0 for pre-training; 0.1 and more helps against overfitting in fine-tuning
bias = False  # biases in Linears and LayerNorms
act = "gelu"  # 'gelu', 'gelu_tanh', or 'relu2', ReLU squared
pos = "learned"  # positions are 'learned', or 'rope', turned queries and keys
norm = "layernorm"  # 'layernorm', or 'rmsnorm', without gains
qk_norm = False  # queries and keys normalised
tied = True  # the head is the token embedding; False gives it a matrix of its own
zero_init = False  # matrices that end on the residual begin at zero, and the head where it is not tied
attn_pattern = "dense"  # the layers' attention in turn, such as 'dense,banded', GPT-3's
attn_window = 256  # of banded layers: how many tokens a token sees, itself among them
smear = 0  # so many tokens before each are mixed into what a block and its MLP read
# adaptation: train a few parameters of the model that init_from opens (adapt.py)
lora_rank = 0  # LoRA: rank of the two thin matrices beside each of lora_targets, 8 is usual; 0 for no LoRA
lora_alpha = 16.0  # what they give is multiplied by lora_alpha / lora_rank
lora_dropout = 0.0  # dropout of what they read
lora_targets = "c_attn"  # the blocks' matrices that have them: some of 'c_attn,c_proj,c_fc'
adapter_dim = 0  # adapters: width of the small network after attention and MLP, such as 8; 0 for none
freeze = ""  # train a part: 'all_but_head', 'all_but_last_4' (or any number), 'every_other', 'all_but_attention'
# optimizer
optim = "adamw"  # 'adamw', or 'muon': Muon on the blocks' matrices, AdamW on all the rest
learning_rate = 6e-4  # AdamW's, the highest
max_iters = 600000  # iterations, that is, updates of the weights, in all
max_tokens = 0  # tokens in all, to whole iterations down, in place of max_iters; 0 for max_iters
epochs = 0  # passes over the training split (of all datasets together), in place of max_iters; 0 for max_iters
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # decay of the mean of the gradients
beta2 = 0.95  # decay of the mean of their squares
adam_eps = 1e-8  # added to the denominator
muon_learning_rate = 0.02  # Muon's, the highest; it follows the same schedule
muon_momentum = 0.95  # decay of the sum of the gradients
muon_momentum_warmup = 300  # iterations in which it rises to that from 0.85
grad_clip = 1.0  # clip the gradients' norm to this, 0 for never
# learning rate schedule
decay_lr = True  # warm up and decay; False is a constant rate
lr_schedule = "cosine"  # shape of the decay: 'cosine', 'linear', or 'wsd': constant, then a line at the end
decay_frac = 0.2  # of 'wsd': how much of the whole is that line
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # where the decay ends, usually max_iters; with epochs or max_tokens, their end unless set
warmup_tokens = 0  # with lr_decay_tokens, in place of warmup_iters; 0 for those
lr_decay_tokens = 0  # by tokens, in place of lr_decay_iters: where the decay ends; 0 for by iterations
min_lr = 6e-5  # the rate after the decay, usually learning_rate / 10
# system
parallel = "ddp"  # under torchrun: 'ddp', each process has the whole model, or 'fsdp', each a part of it
activation_checkpointing = False  # keep of a block what it reads alone, and compute the rest again on the way back
backend = "nccl"  # 'nccl' or 'gloo' under torchrun; on CPUs always gloo
peer_timeout = 60  # seconds without a sign of life from another process after which this one gives up
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16' (with a loss scaler)
matmul = "auto"  # products of float32 matrices on a CPU: 'float32', 'bfloat16', or 'auto', bfloat16 where it has AMX
compile = True  # torch.compile, where there is a compiler: a slow first step, then faster ones
config = configure(globals())

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from adapt import saved_weights
from device import autocast, can_compile, memory_error_told, try_compiled
from fsdp import gathered, is_shared_out, saved_parameters, whole
from generate import Sampling, continuations
from loader import Mixture, evaluated, training_batches
from model import derive_seed
from processes import StopSignal
from progress import Diverged, what_is_done
from run_dir import memory_left
from schedule import learning_rate_at, micro_steps_at
from startup import Run, prepare

EVALUATED_AT_ONCE = 1 << 22  # logits, or activations of an MLP, on a CPU


@memory_error_told()
def main(c: Config) -> None:
    with ExitStack() as held:
        r, train, val = prepare(c, held)
        if (done := what_is_done(r.c, r.progress)) and not c.eval_only:
            r.reporter.say(f"nothing left to do: {done}")
        else:
            with work_kept(r):
                train_until_done(r, train, val)
            if not c.eval_only:
                finish(r)
    r.processes.end()


def train_until_done(r: Run, train: Mixture, val: Mixture) -> None:
    """The training loop."""
    c, p = r.c, r.progress
    rank, world_size = r.processes.rank, r.processes.world_size
    epoch_length = sum(train.blocks(c.block_size))
    ctx = autocast(c.device, c.dtype)
    fast, model = accelerate(r, ctx, train.packed)
    batches = training_batches(
        train, c.block_size, c.batch_size, partial(micro_steps_at, c=c), r.model.config.vocab_size, c.seed,
        p.sequences_seen, rank, world_size, c.device,
    )  # fmt: skip
    stop = None if c.eval_only else StopSignal()
    r.reporter.start_clock()

    while True:
        lr = learning_rate_at(p.iter_num, p.sequences_seen, c)
        set_rates(r, lr)

        if c.eval_only or p.iter_num >= c.max_iters or c.eval_interval and p.iter_num % c.eval_interval == 0:
            evaluate_and_save(r, fast, train, val, ctx, p.sequences_seen / epoch_length)
        elif p.iter_num > r.started_at and (is_due(p.iter_num, c.save_interval) or number_is_due(p.iter_num, c)):
            save(r, put_off=not number_is_due(p.iter_num, c))
        if is_due(p.iter_num, c.sample_interval) and not c.eval_only:
            show_samples(r, ctx)
        if c.eval_only or what_is_done(c, p):
            break

        loss = torch.zeros((), device=c.device)
        micro_steps = micro_steps_at(p.sequences_seen, c)
        # a process without a micro-step of its own takes one that counts nothing
        own = -(-micro_steps // world_size)
        for k in range(own):
            micro_step, share, x, y, positions = next(batches)
            if c.dropout or c.lora_dropout:
                torch.manual_seed(derive_seed(c.seed, p.iter_num, micro_step))
            if isinstance(model, DistributedDataParallel):  # gradients travel once, after the last micro-step
                model.require_backward_grad_sync = k == own - 1
            with ctx:
                _, micro_loss = model(x, y, loss_only=True, positions=positions)
            r.scaler.scale(micro_loss / share).backward()
            loss += micro_loss.detach() / share
        r.processes.mean(loss)
        for optimizer in r.optimizers:
            r.scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(r.model.parameters(), c.grad_clip or math.inf))
        r.whole = False
        for optimizer in r.optimizers:
            r.scaler.step(optimizer)
        r.scaler.update()
        taken = micro_steps * c.batch_size
        p.iter_num, p.sequences_seen = p.iter_num + 1, p.sequences_seen + taken
        r.whole = True
        r.model.zero_grad(set_to_none=True)

        r.reporter.step(lr, loss, norm, taken)
        if p.sequences_seen // epoch_length > (p.sequences_seen - taken) // epoch_length:
            r.reporter.end_epoch(p.sequences_seen // epoch_length)
        if r.files:
            r.files.report()
        if (signal_number := r.processes.largest(stop.received)) and p.iter_num < c.max_iters:
            leave(r, signal_number)


def is_due(iter_num: int, interval: int) -> bool:
    """Whether what comes every `interval` iterations comes now; never for 0."""
    return bool(interval and iter_num and iter_num % interval == 0)


def number_is_due(iter_num: int, c: Config) -> bool:
    """Whether this iteration's state is to be kept as a numbered checkpoint."""
    return bool(c.keep_checkpoints) and is_due(iter_num, c.checkpoint_interval or c.eval_interval)


def finish(r: Run) -> None:
    """The last lines of a run that has come to its end; UserError where its last state could not be saved."""
    c, p = r.c, r.progress
    if p.iter_num < c.max_iters:
        r.reporter.say(f"stopped early: {what_is_done(c, p)}")
    elif c.epochs and p.epoch_iters:  # the last one, which rounding to whole iterations may have cut short
        r.reporter.end_epoch(c.epochs)
    if r.saves:
        r.saves.finish()
    else:
        r.processes.first(lambda: r.files.finish())
    r.reporter.end()
    r.reporter.say(
        f"done: {p.iter_num:,} iterations, best val loss {p.best_val_loss:.4f}; python sample.py --out_dir={c.out_dir}"
    )


@contextmanager
def work_kept(r: Run) -> Iterator[None]:
    """Before an exception leaves the training loop, what is done is saved, and a process that is gone is named."""
    try:
        yield
    except Exception as error:
        lost = r.processes.lost() if isinstance(error, RuntimeError) else ""
        # a GPU that waits for the process that is gone would not give its weights out
        stuck = lost and r.c.device.startswith("cuda")
        if r.saves:  # a save takes all the processes, at the same step
            if r.files and not isinstance(error, UserError):
                note("note: at an error nothing is saved with parallel=fsdp; what was saved before is there")
        elif r.files and r.whole and r.progress.iter_num > r.started_at and not (stuck or isinstance(error, Diverged)):
            try:
                save(r, wait=True)
                note(f"saved at iteration {r.progress.iter_num}, before the error")
            except Exception as why:  # the error to tell is the first one
                note(f"warning: nothing was saved at iteration {r.progress.iter_num}: {why}")
        if r.files and isinstance(error, Diverged):
            r.files.set_aside(error.iteration)
        if lost:
            r.processes.heartbeat.stop(in_good_order=True)
            raise SystemExit(
                f"process {r.processes.rank} ends after iteration {r.progress.iter_num}: {lost}"
            ) from error
        raise


def accelerate(r: Run, ctx, packed: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model, compiled where that works, for evaluation; and the same under DDP where there are many processes."""
    c = r.c
    use_compile = c.compile and can_compile(c.device)
    shared_out = is_shared_out(r.model.lm_head.weight)
    for block in r.model.transformer.h:
        if use_compile and shared_out:  # what puts a block together, or its norms, stays outside of what is compiled
            for part in (block,) if c.dtype == "float32" else (block.attn, block.mlp):
                part.forward = torch.compile(part.forward)
        if c.activation_checkpointing:
            block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    fast = model = torch.compile(r.model) if use_compile and not shared_out else r.model
    if r.processes.world_size > 1 and not (c.eval_only or shared_out):
        device_ids = [r.processes.local_rank] if c.device.startswith("cuda") else None
        every_time = c.gradient_accumulation_steps == r.processes.world_size  # a static graph wants gradients sent
        model = DistributedDataParallel(
            fast, device_ids=device_ids, gradient_as_bucket_view=True, static_graph=every_time
        )
    if use_compile:
        r.reporter.say("compiling the model... (takes a minute the first time; what comes of it is kept)")
        started = time.perf_counter()
        # tensors of their own: for one, given twice, it would compile something else
        x, y, *more = (torch.zeros(c.batch_size, c.block_size, dtype=torch.long, device=c.device) for _ in range(3))
        positions = more[0] if packed else None

        def probe() -> None:
            with ctx:
                _, loss = model(x, y, loss_only=True, positions=positions)
            loss.backward()

        if not c.eval_only:
            try_compiled(probe)
            r.model.zero_grad(set_to_none=True)
        try_compiled(lambda: loss_and_accuracy(fast.eval(), ctx, x, y, positions))
        fast.train()
        r.reporter.compile_seconds = time.perf_counter() - started
        r.reporter.say(f"compiled, first step included, in {r.reporter.compile_seconds:.1f}s")
    return fast, model


def set_rates(r: Run, lr: float) -> None:
    """Puts AdamW's rate of this iteration into the optimizers, and Muon's, which is the same part of its highest one;
    and Muon's momentum, which rises from 0.85 (Jordan et al. 2024, modded-nanogpt)."""
    c, adamw, *muon = r.c, *r.optimizers
    for group in adamw.param_groups:
        group["lr"] = lr
    risen = min(1.0, r.progress.iter_num / c.muon_momentum_warmup) if c.muon_momentum_warmup else 1.0
    for group in muon[0].param_groups if muon else ():
        group["lr"] = c.muon_learning_rate * lr / c.learning_rate
        group["momentum"] = c.muon_momentum - (1 - risen) * max(0.0, c.muon_momentum - 0.85)


@torch.no_grad()
def evaluate(r: Run, model: torch.nn.Module, split: Mixture, ctx, batches: int) -> list[tuple[float, float]]:
    """(mean loss in nats, next-token accuracy) of each dataset over its fixed windows, which the processes share:
    `batches` of them at most, and no more than read the whole split once."""
    c = r.c
    model.eval()
    totals = torch.zeros(len(split.tokens), 3, dtype=torch.float64)  # loss, hits, tokens
    together = 1
    if c.device == "cpu" and not c.compile:  # small batches, read for their results alone, are mostly overhead there
        widest = max(r.model.config.vocab_size, 4 * r.model.config.n_embd)
        together = max(1, EVALUATED_AT_ONCE // (c.batch_size * c.block_size * widest))
    for tokens, total in zip(split.tokens, totals, strict=True):
        of_split = evaluated(tokens, c.block_size, c.batch_size, batches)
        own = of_split[r.processes.rank :: r.processes.world_size]
        for first in range(0, -(-len(of_split) // r.processes.world_size), together):
            windows = own[first : first + together]
            counts = len(windows) > 0  # each process computes as often as the others, with FSDP they do so together
            windows = (windows if counts else of_split[:1]).reshape(-1)
            batch = tokens.windows(windows, c.block_size, r.model.config.vocab_size)
            loss, hits, learnt = loss_and_accuracy(model, ctx, *(t.to(c.device) for t in batch))
            total += counts * torch.tensor([loss * learnt, hits, learnt], dtype=torch.float64)
    model.train()
    return [(loss / learnt, hits / learnt) for loss, hits, learnt in r.processes.sum(totals).tolist()]


@torch.no_grad()
def loss_and_accuracy(
    model: torch.nn.Module, ctx, x: torch.Tensor, y: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[float, int, int]:
    """(mean loss in nats, tokens that were the likeliest, tokens) of a batch, of those that are to be learnt."""
    with ctx:
        logits, loss = model(x, y, positions=positions)
    return loss.item(), int((logits.argmax(-1) == y).sum()), int((y >= 0).sum())


def evaluate_and_save(r: Run, model: torch.nn.Module, train: Mixture, val: Mixture, ctx, epoch: float) -> None:
    """Prints and logs the losses of both splits; saves ckpt.pt if this is the best yet, and last.pt."""
    c, p = r.c, r.progress
    r.reporter.settle()
    r.reporter.stop_clock()
    on_train = evaluate(r, model, train, ctx, c.eval_iters)
    on_val = evaluate(r, model, val, ctx, sys.maxsize if c.target_val_loss else c.eval_iters)
    (train_loss, _), (val_loss, accuracy) = train.mean(on_train), val.mean(on_val)
    r.reporter.say(
        f"step {p.iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, "
        f"val accuracy {accuracy:.2%}, epoch {epoch:.2f}"
    )
    if datasets := figures_of_datasets(r, train, on_train, on_val):
        one = "{} ({weight:.2%}): val loss {val_loss:.4f}, epoch {epoch:.2f}".format
        r.reporter.say("  " + "; ".join(one(name, **figures) for name, figures in datasets.items()))
    if c.eval_only:
        return
    if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        raise Diverged(f"the loss at iteration {p.iter_num}", p.iter_num)
    r.reporter.record(
        "eval", iter=p.iter_num, train_loss=train_loss, val_loss=val_loss, val_accuracy=accuracy, epoch=epoch,
        **({"datasets": datasets} if datasets else {}),
    )  # fmt: skip
    if p.evaluated_at != p.iter_num:
        p.stale_evaluations = 0 if val_loss < p.best_val_loss else p.stale_evaluations + 1
        p.best_val_loss, p.evaluated_at = min(val_loss, p.best_val_loss), p.iter_num
        if p.iter_num:
            save(r, val_loss)
        elif r.files:
            r.files.best_val_loss = val_loss  # an untrained model's file would be of no use
    elif p.iter_num and r.processes.largest(bool(r.files and val_loss < r.files.best_val_loss)):
        save(r, val_loss)  # ckpt.pt is damaged, or an earlier run's
    r.reporter.restart_clock()


def figures_of_datasets(
    r: Run, train: Mixture, on_train: list[tuple[float, float]], on_val: list[tuple[float, float]]
) -> dict[str, dict[str, float]]:
    """What an evaluation found for each dataset of a mixture, by name; nothing for one alone, whose figures are the
    run's. An epoch is one of the dataset's own."""
    if len(train.parts) == 1:
        return {}
    epochs = train.epochs(r.progress.sequences_seen, r.c.block_size, r.c.seed)
    return {
        part.name: {"weight": float(part.share), "train_loss": a, "val_loss": b, "val_accuracy": right, "epoch": own}
        for part, (a, _), (b, right), own in zip(train.parts, on_train, on_val, epochs, strict=True)
    }


def state_of(r: Run, weights: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """A checkpoint in nanoGPT's layout, and what sampling needs of the dataset; of a model that is shared out with the
    `weights` that were gathered, and without moments."""
    alone = len(r.optimizers) == 1 and not r.saves
    return {
        "model": weights or saved_weights(r.model),
        "optimizer": r.optimizers[0].state_dict() if alone else None,  # nanoGPT's AdamW
        "model_args": r.model.config.model_args(),
        "iter_num": r.progress.iter_num,
        "best_val_loss": r.progress.best_val_loss,
        "config": dict(vars(r.c)),
        "tokenizer": r.tokenizer.meta(),
        "template": r.template,
        **r.adapter,
    }


def save(r: Run, val_loss: float | None = None, *, put_off: bool = False, wait: bool = False) -> None:
    """last.pt: all that a resumed run needs to be the run that was never interrupted; ckpt.pt, if val_loss is the best.

    With `put_off`, not while another save is being written; with `wait`, returns once it is on the disk.
    """
    r.reporter.settle()
    if not (r.saves or r.files) or put_off and (r.saves or r.files).busy:
        return
    r.reporter.measure()
    c, p = r.c, r.progress
    more = {
        "sequences_seen": p.sequences_seen,
        "scaler": r.scaler.state_dict(),
        "optimizers": checkpoint.named_state(r.model, r.optimizers),
        "progress": asdict(p),
        "data": r.data,
    }
    kept = c.keep_checkpoints if number_is_due(p.iter_num, c) else 0
    if r.saves:
        best = save_shares(r, more, val_loss, wait)
    else:
        best = r.files.save(state_of(r), more, val_loss, always=c.always_save_checkpoint, numbered_kept=kept, wait=wait)
    if best:
        r.reporter.say(f"saving checkpoint to {c.out_dir}")


def save_shares(r: Run, more: dict[str, Any], val_loss: float | None, wait: bool) -> bool:
    """`save` for a model that is shared out, in every process; whether ckpt.pt is written."""
    files, ckpt = r.files, None
    r.saves.background.report(wait=True)  # only then is it known which loss ckpt.pt has
    if best := r.processes.largest(bool(files and files.is_best(val_loss, r.c.always_save_checkpoint))):
        weights = weights_together(r)
        if weights:
            ckpt = state_of(r, weights) | {"best_val_loss": min(val_loss, files.best_val_loss)}
        elif files:
            note("warning: there is no memory for the whole weights; ckpt.pt is not written")
    state = state_of(r) | more | {"numbered": number_is_due(r.progress.iter_num, r.c)}
    tensors = {f"model/{name}": p.detach() for name, p in saved_parameters(r.model).items()}
    for name, entry in state.pop("optimizers").items():
        tensors |= {f"optimizers/{name}/{key}": value for key, value in entry.items()}
    del state["model"], state["optimizer"]
    r.saves.save(tensors, state, ckpt, wait)
    return bool(best)


def weights_together(r: Run) -> dict[str, torch.Tensor] | None:
    """All the weights of a model that is shared out, in the first process, if there is memory for them."""
    room = 4 * r.model.get_num_params(False) < memory_left()
    return gathered(r.model, r.processes.master and room)


def show_samples(r: Run, ctx) -> None:
    """Prints and logs what the model makes of sample_prompts now; one that is shared out on the first process's CPU."""
    r.reporter.settle()
    r.reporter.stop_clock()
    weights, model = weights_together(r) if r.saves else None, r.model
    if r.saves and r.processes.master:
        ctx = nullcontext()
        try:  # a failure of one process alone would leave the others waiting
            model = checkpoint.model_of(state_of(r, weights), r.c.out_dir) if weights else None
        except (UserError, RuntimeError, MemoryError) as error:
            note(f"warning: {error}")
            model = None
        if model is None:
            note("note: no sample is written: it takes the whole model on the CPU")
    if not r.processes.master or model is None:
        r.reporter.restart_clock()
        return
    c, iter_num = r.c, r.progress.iter_num
    seed = derive_seed(c.seed, "sample", iter_num)
    sampling = Sampling(max_new_tokens=c.sample_tokens, temperature=0.8, top_k=200, seed=seed)
    model.eval()
    with ctx:
        texts = continuations(model, r.tokenizer, c.sample_prompts, sampling)
    model.train()
    for prompt, text in zip(c.sample_prompts, texts, strict=True):
        r.reporter.say(f"sample at iteration {iter_num}:\n{prompt}{text}\n---------------")
        r.reporter.record("sample", iter=iter_num, prompt=prompt, text=prompt + text)
    r.reporter.restart_clock()


def leave(r: Run, signal_number: int) -> None:
    """Saves and exits as the signal asked, every process after the same step."""
    r.reporter.settle()
    if r.saves:
        save(r, wait=True)
    else:
        r.processes.first(lambda: save(r, wait=True))
    r.reporter.say(
        f"saved at iteration {r.progress.iter_num}; "
        f"go on with: python train.py --init_from=resume --out_dir={r.c.out_dir}"
    )
    r.processes.end()
    raise SystemExit(128 + signal_number)


if __name__ == "__main__":
    run(main, config)
