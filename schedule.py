"""How a run proceeds: the micro-steps of an iteration, its learning rate, and how many iterations there are, each a
function of the settings and of what has been done.

Notable choices:
- The batch can grow over the first tokens, and the learning rate go by tokens, as GPT-3's did (Brown et al. 2020,
  appendix B). Both depend on the sequences seen alone, so that a resumed run goes on as if nothing had happened.
- An iteration need not divide evenly among the processes: a run is the same on any number of them. Those that have
  nothing to do wait.
- Of two settings for the same thing, such as max_iters and max_tokens, the one that was given later counts.
"""

import math
from collections.abc import Iterator
from itertools import islice

from configurator import Config, UserError

# what is given later takes the place of the others
INSTEAD = {
    "max_iters": ("epochs", "max_tokens"),
    "epochs": ("max_tokens",),
    "max_tokens": ("epochs",),
    "gradient_accumulation_steps": ("batch_tokens",),
    "lr_decay_iters": ("lr_decay_tokens", "warmup_tokens"),
    "warmup_iters": ("warmup_tokens",),
}


def overrule(c: Config) -> None:
    """Switches off what a setting that was given later replaces."""
    for key, others in INSTEAD.items():
        if key in c.given and (getattr(c, key) or key not in ("epochs", "max_tokens")):  # 0 of these is none
            for other in others:
                if other not in c.given[c.given.index(key) :]:
                    setattr(c, other, 0)


def check_schedule(c: Config) -> None:
    """UserError for a schedule that makes no sense."""
    for key in ("max_iters", "max_tokens", "epochs", "warmup_iters", "warmup_tokens", "lr_decay_iters",
                "lr_decay_tokens", "batch_tokens", "batch_ramp_tokens", "batch_ramp_start"):  # fmt: skip
        if getattr(c, key) < 0:
            raise UserError(f"{key}={getattr(c, key)}: expected 0 or more")
    if c.lr_schedule not in ("cosine", "linear", "wsd"):
        raise UserError(f"lr_schedule={c.lr_schedule}: expected cosine, linear or wsd")
    if not 0 < c.decay_frac <= 1:
        raise UserError(f"decay_frac={c.decay_frac}: expected more than 0 and at most 1")
    if c.warmup_tokens and not c.lr_decay_tokens:
        raise UserError(f"warmup_tokens={c.warmup_tokens}: a schedule by tokens needs lr_decay_tokens, too")


def settle(c: Config, epoch_length: int, iter_num: int = 0, sequences_seen: int = 0) -> None:
    """Puts into the settings what follows from others, for a run that has done so much: gradient_accumulation_steps
    from batch_tokens, max_iters from epochs of `epoch_length` sequences or from max_tokens, to whole iterations down;
    and for a new run lr_decay_iters from max_iters then."""
    if c.batch_tokens:
        c.gradient_accumulation_steps = max(1, round(c.batch_tokens / (c.batch_size * c.block_size)))
    if c.epochs or c.max_tokens:
        left = (c.epochs * epoch_length or c.max_tokens // c.block_size) - sequences_seen
        c.max_iters = max(1, iter_num + iterations_in(left, c, sequences_seen))
        if "lr_decay_iters" not in c.given and not iter_num:
            c.lr_decay_iters = c.max_iters


def micro_steps_at(sequences_seen: int, c: Config) -> int:
    """Micro-steps of the iteration that comes after so many sequences: gradient_accumulation_steps, or on the way
    there, a line from batch_ramp_start tokens up over the first batch_ramp_tokens."""
    whole, seen, one = c.gradient_accumulation_steps, sequences_seen * c.block_size, c.batch_size * c.block_size
    if seen >= c.batch_ramp_tokens:
        return whole
    tokens = c.batch_ramp_start + (whole * one - c.batch_ramp_start) * seen / c.batch_ramp_tokens
    return min(whole, max(1, round(tokens / one)))


def learning_rate_at(iter_num: int, sequences_seen: int, c: Config) -> float:
    """Linear warm-up, then down to min_lr at the end of the decay: by a cosine, as nanoGPT's; by a line; or by a line
    that begins when decay_frac of the whole is left. By iterations, or with lr_decay_tokens by tokens, which is the
    same where all iterations have as many; without warmup_tokens, these are those of the first warmup_iters."""
    if not c.decay_lr:
        return c.learning_rate
    at, one, warmup, end = iter_num, 1, c.warmup_iters, c.lr_decay_iters
    if c.lr_decay_tokens:
        at, one = sequences_seen * c.block_size, micro_steps_at(sequences_seen, c) * c.batch_size * c.block_size
        warmup = c.warmup_tokens or sequences_in(c.warmup_iters, c) * c.block_size
        end = c.lr_decay_tokens
    if at < warmup:
        return c.learning_rate * (at + one) / (warmup + one)
    if at >= end:
        return c.min_lr
    begin = warmup
    if c.lr_schedule == "wsd":
        begin = max(begin, (1 - c.decay_frac) * end)
    done = max(0.0, (at - begin) / (end - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if c.lr_schedule == "cosine" else 1 - done
    return c.min_lr + left * (c.learning_rate - c.min_lr)


def sequences_in(iterations: int, c: Config, sequences_seen: int = 0) -> int:
    """How many sequences so many iterations take, those that come after so many sequences."""
    taken, left = 0, iterations
    for one in islice(_growing(c, sequences_seen), iterations):
        taken, left = taken + one, left - 1
    return taken + left * c.gradient_accumulation_steps * c.batch_size


def iterations_in(sequences: int, c: Config, sequences_seen: int = 0) -> int:
    """How many iterations so many sequences are enough for, those that come after so many others."""
    n, left = 0, sequences
    for one in _growing(c, sequences_seen):
        if one > left:
            return n
        n, left = n + 1, left - one
    return n + max(0, left) // (c.gradient_accumulation_steps * c.batch_size)


def _growing(c: Config, sequences_seen: int) -> Iterator[int]:
    """The sequences of each iteration from there on until the batch is whole."""
    while (micro_steps := micro_steps_at(sequences_seen, c)) < c.gradient_accumulation_steps:
        yield micro_steps * c.batch_size
        sequences_seen += micro_steps * c.batch_size
