"""How probable a model finds a given text: the sums behind its loss and perplexity, and the likelihoods of answers.

Notable choices:
- A long text is read in windows of block_size tokens that move on by `stride`; each scores what no earlier one has, so
  every token but the first is scored once, and sees at least block_size - stride tokens before it. With a stride
  below block_size they are the windows of Hugging Face's guide to the perplexity of fixed-length models.
- The probabilities are the model's own: ids that its vocabulary is padded with take part in the softmax, as they do in
  transformers and lm-evaluation-harness.
- The head reads only the places that are scored, and in pieces, so that the logits never are many at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from configurator import UserError
from model import GPT

LOGITS = 2**24  # numbers that the head gives at once, about
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # x, y, positions: see `likelihoods`


@dataclass
class Sums:
    """Over scored tokens: their negative log-probabilities in nats, how many were the likeliest in their places, and
    how many there are."""

    nll: float = 0.0
    hits: int = 0
    tokens: int = 0


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its tokens' natural log-probabilities, how many they are, and whether each was the
    likeliest in its place."""

    logprob: float
    tokens: int
    greedy: bool


def windows(n: int, block_size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of the windows over n tokens: `first` to end - 1 are scored, from the inputs `begin` to
    end - 2. Every token but the first is scored once. UserError for a stride below 1 or above block_size."""
    if not 1 <= stride <= block_size:
        raise UserError(f"stride={stride}: expected 1 to {block_size}, the model's context; or 0 for half of it")
    first, begin = 1, 0
    while first < n:
        end = min(begin + block_size, n)
        if end > first:  # a context of one token has nothing to score in its first window
            yield min(begin, first - 1), first, end
        first, begin = max(first, end), begin + stride


def windowed(ids: np.ndarray, block_size: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """The windows over `ids` [n], which may be a memory map, in batches of `batch_size`."""
    places = windows(len(ids), block_size, stride)
    while batch := list(islice(places, batch_size)):
        rows = [(ids[begin : end - 1], ids[first:end]) for begin, first, end in batch]
        yield *padded(rows), None


def padded(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, int64 [rows, the longest], of inputs and of the targets of the last of them; y is -1 where nothing is
    scored. Rows are padded on their right, which no token before sees."""
    longest = max(len(inputs) for inputs, _ in rows)
    x, y = np.zeros((len(rows), longest), np.int64), np.full((len(rows), longest), -1, np.int64)
    for i, (inputs, targets) in enumerate(rows):
        x[i, : len(inputs)] = inputs
        y[i, len(inputs) - len(targets) : len(inputs)] = targets
    return torch.from_numpy(x), torch.from_numpy(y)


@torch.inference_mode()
def likelihoods(
    model: GPT, x: torch.Tensor, y: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ids x and targets y, one position ahead and -1 where nothing is scored, both [batch, time], with `positions`
    as in GPT.forward: the targets' natural log-probabilities, float64 [scored], and whether each was the likeliest,
    bool [scored]; row by row, on the CPU. UserError for a model that diverged."""
    device = model.transformer.wte.weight.device
    x, y = x.to(device), y.to(device)
    hidden = model.hidden(x, None if positions is None else positions.to(device))
    hidden, targets = hidden[y >= 0], y[y >= 0]  # [scored, n_embd], [scored]
    logprobs, hits = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    rows = max(1, LOGITS // model.config.vocab_size)
    for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.lm_head(part).float()  # [rows, vocab_size]
        own = logits.gather(1, wanted[:, None])[:, 0]
        logprobs.append((own - logits.logsumexp(-1)).cpu())
        hits.append((logits.argmax(-1) == wanted).cpu())
    found = torch.cat(logprobs).double()
    if not found.isfinite().all():
        raise UserError("the model's logits are not finite numbers: its training diverged, or dtype is too narrow")
    return found, torch.cat(hits)


def summed(model: GPT, batches: Iterable[Batch], progress: Callable[[int], Any] = lambda done: None) -> Sums:
    """The sums over all that is scored in the batches; `progress` is called with the tokens of each. UserError for a
    model that diverged."""
    sums = Sums()
    for batch in batches:
        logprobs, hits = likelihoods(model, *batch)
        sums.nll -= logprobs.sum().item()
        sums.hits += int(hits.sum())
        sums.tokens += len(hits)
        progress(len(hits))
    return sums


def continuation_likelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Likelihood]:
    """How likely each continuation is after its context, for pairs of both as ids; `progress` is called with the pairs
    of each batch.

    Of a pair that is longer than block_size + 1 the newest tokens are seen, as in lm-evaluation-harness. Those of like
    length share a batch, so that little is padded. ValueError for a pair without a context or a continuation, or with
    a continuation longer than block_size; UserError for a model that diverged.
    """
    room = model.config.block_size
    if wrong := [pair for pair in pairs if not (len(pair[0]) and 0 < len(pair[1]) <= room)]:
        before, after = map(len, wrong[0])
        raise ValueError(f"{before} and {after} tokens: expected a context, and a continuation of 1 to {room}")
    found: list[Likelihood] = [None] * len(pairs)  # type: ignore[list-item]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        own = order[start : start + batch_size]
        x, y = padded([([*pairs[i][0], *pairs[i][1]][-(room + 1) : -1], pairs[i][1]) for i in own])
        sizes = [len(pairs[i][1]) for i in own]
        for i, logprobs, hits in zip(own, *(t.split(sizes) for t in likelihoods(model, x, y)), strict=True):
            found[i] = Likelihood(logprobs.sum().item(), len(hits), bool(hits.all()))
        progress(len(own))
    return found
