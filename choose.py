"""How the next token is chosen: from the logits of many rows at once, each with settings of its own.

Notable choices:
- Logits become a token by small functions, in the usual order: repetition penalty, temperature, top_k, top_p, min_p,
  and a draw. Settings are tensors of one number a row, so that texts of whoever asks are drawn together.
- What is random is a function of (seed, the sample's number, the token's number, the candidate's id), with no generator
  whose state could differ: a sample is the same whatever company it is in, and on whatever device, but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch

from configurator import UserError
from model import derive_seed

GAMMA, MIX_1, MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # SplitMix64's
STEP = 0xD1342543DE82EF95  # odd, and unrelated to GAMMA: a token's number moves the key, an id the place
CANDIDATES = (100, 1000)  # so many likeliest tokens nearly always hold top_p of the mass, and are found sooner than all


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a text ends. UserError where a number makes no sense."""

    max_new_tokens: int = 500
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int = 0  # only the k likeliest; 0 for all
    top_p: float = 1.0  # only the likeliest that together have this probability (Holtzman et al. 2019)
    min_p: float = 0.0  # only those at least this fraction as likely as the likeliest (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # above 1: what is in the text already becomes less likely (Keskar et al. 2019)
    stop: Sequence[str] = ()  # strings that end the text and are not part of it
    stop_at_sentence: bool = False  # go on past max_new_tokens to the next of stop_chars, at most twice as far
    stop_chars: str = "。！？!?.…\n"
    seed: int = 1337

    def __post_init__(self):
        for name, low, high, expected in (
            ("max_new_tokens", 0, inf, "0 or more"),
            ("temperature", 0, inf, "0 (always the likeliest) or more"),
            ("top_k", 0, inf, "0 (every token may come) or more"),
            ("top_p", 5e-324, 1, "above 0, and at most 1 (every token may come)"),
            ("min_p", 0, 1, "0 (every token may come) to 1"),
            ("repetition_penalty", 1e-6, 1e6, "a millionth to a million; 1 is no penalty"),
        ):
            value = getattr(self, name)
            if not low <= value <= high or value == inf:
                raise UserError(f"{name}={value}: expected {expected}")
        if isinstance(self.stop, str) or "" in self.stop:
            raise UserError(f"stop={self.stop!r}: expected strings of at least one character")

    @property
    def limit(self) -> int:
        """Tokens in a text at most."""
        return self.max_new_tokens * (2 if self.stop_at_sentence else 1)


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float | torch.Tensor) -> torch.Tensor:
    """Divides the positive and multiplies the negative logits of what was `seen`, bool, both [rows, vocab_size], by a
    penalty for all or one for each row, [rows, 1]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits, the largest first, and their ids, both [rows, k]."""
    return logits.topk(min(k, logits.size(-1)))


def keep_top_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Logits [rows, n] with -inf for all but the likeliest that together have probability p [rows, 1]; the likeliest
    stays, and where p is 1 all do."""
    probs = logits.softmax(-1)
    for n in (*CANDIDATES, probs.size(-1)):
        top = probs.topk(min(n, probs.size(-1))).values
        if top.size(-1) == probs.size(-1) or not ((top.sum(-1, keepdim=True) < p) & (p < 1)).any():
            break
    kept = (top.cumsum(-1) - top < p).sum(-1, keepdim=True).clamp_(min=1)  # [rows, 1]
    return logits.masked_fill((probs < top.gather(-1, kept - 1)) & (p < 1), -inf)


def keep_min_p(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Logits [rows, n] with -inf for those below p [rows, 1] times the likeliest's probability."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + p.log(), -inf)


def key_of(seed: int, sample: int, token: int) -> int:
    """What the draw of a sample's token depends on, but for the candidates: a signed number of 64 bits, STEP more for
    each token."""
    return (derive_seed(seed, sample) + token * STEP) % 2**64 - 2**63


def draw(probs: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Places [rows, 1] drawn from `probs` [rows, n] of the tokens `ids`, [rows, n] or [n], by the rows' `keys` [rows].

    Each token has an exponential number of its own, -log(u), with u made of (key, id) by SplitMix64 (Steele et al.
    2014), and the smallest -log(u) / probability wins. A rounding of the probabilities changes that only where two are
    as good as equal, whereas an inverse cumulative distribution has an edge for every token that can move across the
    number drawn.
    """
    x = keys[:, None] + ids * GAMMA  # [rows, n] int64, which wraps around as unsigned numbers do
    x = (x ^ (x >> 30 & 2**34 - 1)) * MIX_1
    x = (x ^ (x >> 27 & 2**37 - 1)) * MIX_2
    x = x ^ (x >> 31 & 2**33 - 1)
    u = ((x >> 12 & 2**52 - 1).double() + 0.5) * 2.0**-52  # never 0 nor 1
    return (u.log() / probs).argmax(-1, keepdim=True)


class Choice:
    """How the next tokens of some rows are chosen: a function of their logits and keys."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        """`samplings` are the rows'."""
        kinds = [(s.temperature > 0) * (1 + (s.top_k > 0)) for s in samplings]  # the likeliest; of all; of top_k
        self.groups = []
        for kind in sorted(set(kinds)):
            rows = [row for row, its in enumerate(kinds) if its == kind]
            group = Group([samplings[row] for row in rows], device)
            self.groups.append((None if len(rows) == len(kinds) else torch.tensor(rows, device=device), group))

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The next ids [rows] from logits [rows, vocab_size] and a random number a row, `keys` [rows] int64; -1 where
        logits are not finite numbers."""
        chosen = torch.empty_like(keys)
        for rows, group in self.groups:
            if rows is None:
                return group.choose(logits, keys)
            chosen[rows] = group.choose(logits[rows], keys[rows])
        return chosen


class Group:
    """Rows that take the likeliest token, or draw from all, or draw from their top_k; for the rest each has its own."""

    def __init__(self, samplings: Sequence[Sampling], device: torch.device):
        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, device=device)[:, None]

        k = [s.top_k for s in samplings]
        self.greedy, self.top_k = samplings[0].temperature == 0, max(k)
        self.k = column(k) if len(set(k)) > 1 else None
        self.temperature = column([max(s.temperature, 1e-20) for s in samplings])
        self.top_p = column([s.top_p for s in samplings]) if any(s.top_p < 1 for s in samplings) else None
        self.min_p = column([s.min_p for s in samplings]) if any(s.min_p > 0 for s in samplings) else None

    def choose(self, logits: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        ids = None
        if self.top_k and not self.greedy:  # first of all, so that what follows has k numbers a row to do with
            logits, ids = keep_top_k(logits, self.top_k)
        largest, at = logits.max(-1, keepdim=True)
        if not self.greedy:
            if self.k is not None:
                place = torch.arange(logits.size(-1), device=logits.device)
                logits = logits.masked_fill(place >= self.k, -inf)
            logits = (logits - largest).div_(self.temperature)
            if self.top_p is not None:
                logits = keep_top_p(logits, self.top_p)
            if self.min_p is not None:
                logits = keep_min_p(logits, self.min_p)
            every = torch.arange(logits.size(-1), device=logits.device) if ids is None else ids
            at = draw(logits.softmax(-1), keys, every)
            at = at if ids is None else ids.gather(-1, at)
        return at.masked_fill_(~largest.isfinite(), -1)[:, 0]
