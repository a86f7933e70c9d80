"""Sampling: from prompts to their continuations, as text that comes while it is made. Knows ids and text, not files.

Notable choices:
- Logits become a token by small functions, in the usual order: forbidden ids, repetition penalty, temperature, top_k,
  top_p, min_p, and a draw.
- What is random is a function of (seed, the sample's number, the token's number, the candidate's id), with no generator
  whose state could differ: a sample is the same whatever company it is in, and on whatever device, but for rounding.
- Text leaves in whole characters: bytes of a half one wait, and so does what may be the beginning of a stop string.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf, isfinite, log

import torch

from configurator import UserError
from decoder import Decoder
from model import GPT, derive_seed
from tokenizer import Tokenizer

GAMMA, MIX_1, MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # SplitMix64's
STEP = 0xD1342543DE82EF95  # odd, and unrelated to GAMMA: a token's number moves the key, an id the place
CANDIDATES = 1000  # the likeliest tokens nearly always hold top_p of the mass, and finding them is cheaper than sorting


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


@dataclass(frozen=True)
class Token:
    """A token that was drawn: its natural log-probability by the model alone (temperature 1, nothing forbidden), and
    the likeliest tokens in its place with theirs; None and empty where they were not asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a row's text goes on with: whole characters, and the tokens since the row's last piece."""

    row: int
    text: str
    tokens: tuple[Token, ...]
    finished: str = ""  # in a row's last piece, why: 'end' of text, 'stop' string or sentence, 'length'


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids; an empty prompt becomes the end-of-text token, after which a text begins."""
    ids = tokenizer.encode_prompt(prompt).tolist()
    if ids:
        return ids
    if tokenizer.end_of_text is None:
        raise UserError(
            "an empty prompt needs a vocabulary with <|endoftext|>, which this one lacks: give the text a beginning"
        )
    return [tokenizer.end_of_text]


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As `prompt_ids`, but without an end-of-text token an empty prompt becomes a line break, with which nanoGPT's
    samples begin, too."""
    if prompt or tokenizer.end_of_text is not None:
        return prompt_ids(tokenizer, prompt)
    try:
        return prompt_ids(tokenizer, "\n")
    except UserError:
        raise UserError("this model cannot begin a text from nothing: give it a beginning") from None


def titled(template: str, title: str) -> str:
    """What stands before the content in a document of this title."""
    if not has_title(template):
        raise UserError(f"title={title}: this model's dataset has no layout with a title; write it into the beginning")
    return template.partition("{content}")[0].replace("{title}", title)


def has_title(template: str) -> bool:
    """Whether a document of this layout has a title before its content."""
    return "{title}" in template.partition("{content}")[0]


def penalize(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides the positive and multiplies the negative logits of what was `seen`, bool, both [rows, vocab_size]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits and their ids, both [rows, k]."""
    return logits.topk(min(k, logits.size(-1)))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits [rows, n] with -inf for all but the likeliest that together have probability p; the likeliest stays."""
    probs = logits.softmax(-1)
    top = probs.topk(min(CANDIDATES, probs.size(-1))).values
    if (top.sum(-1) < p).any():
        top = probs.sort(-1, descending=True).values
    kept = (top.cumsum(-1) - top < p).sum(-1, keepdim=True).clamp(min=1)  # [rows, 1]
    return torch.where(probs < top.gather(-1, kept - 1), -inf, logits)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits [rows, n] with -inf for those below p times the likeliest's probability."""
    return torch.where(logits < logits.amax(-1, keepdim=True) + log(p), -inf, logits) if p > 0 else logits


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


@torch.inference_mode()
def choose(logits: torch.Tensor, s: Sampling, keys: torch.Tensor) -> torch.Tensor:
    """The next ids [rows, 1] from logits [rows, vocab_size] and a random number a row, `keys` [rows] int64."""
    ids = None
    if s.top_k and s.temperature:  # first of all, so that what follows has k numbers a row to do with
        logits, ids = keep_top_k(logits, s.top_k)
    largest, at = logits.max(-1, keepdim=True)
    _check_finite(largest)
    if s.temperature == 0:
        return at
    ids = torch.arange(logits.size(-1), device=logits.device) if ids is None else ids
    logits = (logits - largest) / max(s.temperature, 1e-20)
    if s.top_p < 1:
        logits = keep_top_p(logits, s.top_p)
    if s.min_p > 0:
        logits = keep_min_p(logits, s.min_p)
    return ids.expand_as(logits).gather(-1, draw(logits.softmax(-1), keys, ids))


def _check_finite(largest: torch.Tensor) -> None:
    if not isfinite(largest.sum().item()):
        raise UserError("the model's logits are not finite numbers: its training diverged, or dtype is too narrow")


@dataclass
class Writer:
    """One row's text from its tokens, and when it ends."""

    tokenizer: Tokenizer
    sampling: Sampling
    finished: str = ""
    tokens: int = 0
    held: str = ""  # may be the beginning of a stop string
    utf8: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def write(self, id: int) -> str:
        """Takes the next token; gives the text that is certain by now."""
        s = self.sampling
        if id == self.tokenizer.end_of_text:
            self.finished = "end"
            return self.held
        self.tokens += 1
        new = self.utf8.decode(self.tokenizer.decode_bytes([id]))  # bytes of a character that is never ended stay here
        if self.tokens == s.limit:
            self.finished = "length"
        if s.stop_at_sentence and self.tokens >= s.max_new_tokens:
            ends = [i for i, character in enumerate(new) if character in s.stop_chars]
            if ends:
                new, self.finished = new[: ends[0] + 1], "stop"
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in s.stop) if at >= 0]
        if found:
            self.finished = "stop"
            return text[: min(found)]
        hold = 0 if self.finished else max((_overlap(text, stop) for stop in s.stop), default=0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    *,
    first: int = 0,
    logprobs: int | None = None,
    compiled: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Continues all prompts, texts or ids, at once and yields pieces of their texts as they come, rows in turn; each
    row ends for itself. A row's pieces are the continuation alone.

    Row k is sample first + k. `logprobs`: with each token its log-probability and that many alternatives. A prompt
    longer than the context is read from where its newest block_size tokens begin. `stopped` is asked before each token
    and ends all rows as they are. UserError for a model that diverged.
    """
    s, rows = sampling, range(len(prompts))
    encoded = {
        prompt: prompt_ids(tokenizer, prompt) for prompt in dict.fromkeys(p for p in prompts if isinstance(p, str))
    }
    ids = [encoded[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if s.limit == 0 or not ids:
        yield from (Piece(row, "", (), "length") for row in rows)
        return
    decoder = Decoder(model, len(ids), max(map(len, ids)) + s.limit, compiled)
    logits = decoder.prefill(ids)
    device = logits.device if logits.device.type != "mps" else torch.device("cpu")
    keys = torch.tensor([derive_seed(s.seed, first + row) for row in rows], device=device)
    unknown = None if tokenizer.unknown_id is None else torch.tensor([tokenizer.unknown_id], device=device)
    seen = torch.zeros(len(ids), tokenizer.vocab_size, dtype=torch.bool, device=device)
    if s.repetition_penalty != 1:
        for row in rows:
            seen[row, ids[row]] = True
    writers = [Writer(tokenizer, s) for _ in rows]
    waiting: list[list[Token]] = [[] for _ in rows]
    for n in count():
        raw = logits.float() if logits.device.type != "mps" else logits.float().cpu()  # Metal has no float64
        logits = raw[:, : tokenizer.vocab_size]  # what a model's vocabulary is padded with has no text
        if unknown is not None:
            logits = logits.index_fill(1, unknown, -inf)
        if s.repetition_penalty != 1:
            logits = penalize(logits, seen, s.repetition_penalty)
        chosen = choose(logits, s, keys + (n * STEP % 2**64 - 2**63))
        if s.repetition_penalty != 1:
            seen.scatter_(1, chosen, True)
        drawn = chosen[:, 0].tolist()
        tokens = (
            [Token(id) for id in drawn]
            if logprobs is None
            else _with_logprobs(raw, chosen, logprobs, tokenizer.vocab_size)
        )
        for row, writer in enumerate(writers):
            if writer.finished:
                continue
            waiting[row].append(tokens[row])
            text = writer.write(drawn[row])
            if text or writer.finished:
                yield Piece(row, text, tuple(waiting[row]), writer.finished)
                waiting[row].clear()
        if all(writer.finished for writer in writers) or stopped():
            return
        logits = decoder.decode([None if writer.finished else id for id, writer in zip(drawn, writers, strict=True)])


@torch.inference_mode()
def _with_logprobs(logits: torch.Tensor, chosen: torch.Tensor, alternatives: int, vocab_size: int) -> list[Token]:
    logprobs = logits.log_softmax(-1)  # [rows, the model's vocab_size]
    values, ids = logprobs[:, :vocab_size].topk(min(alternatives, vocab_size))  # what it is padded with has no text
    own = logprobs.gather(1, chosen)[:, 0].tolist()
    return [
        Token(id, logprob, tuple(zip(top, their, strict=True)))
        for id, logprob, top, their in zip(chosen[:, 0].tolist(), own, ids.tolist(), values.tolist(), strict=True)
    ]


@torch.inference_mode()
def score(model: GPT, ids: Sequence[int], alternatives: int, vocab_size: int) -> list[Token]:
    """How probable the model finds each of `ids` but the first, given those before it; len(ids) - 1 tokens.
    `vocab_size` is the tokenizer's: alternatives are among its tokens.

    A text longer than the context is read in windows that overlap by half, so that each token past the first window is
    predicted from at least block_size / 2 of those before it. UserError for a model that diverged.
    """
    block_size, device, tokens = model.config.block_size, model.transformer.wte.weight.device, []
    for begin in range(0, max(1, len(ids) - 1), max(1, block_size // 2)):
        window = ids[begin : begin + block_size + 1]
        new = len(tokens) - begin  # tokens that the window before has told of
        if len(window) < 2 or new >= len(window) - 1:
            break
        idx = torch.tensor([window], device=device)
        logits = model(idx[:, :-1], idx[:, 1:])[0][0, new:].float()  # [tokens, vocab_size]
        _check_finite(logits.amax(-1))
        tokens += _with_logprobs(logits, idx[0, new + 1 :, None], alternatives, vocab_size)
    return tokens


def continuations(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, **how) -> list[str]:
    """The continuations of all prompts, without the prompts; `how` as for `stream`."""
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, sampling, **how):
        texts[piece.row] += piece.text
    return texts
