"""Sampling: from prompts to their continuations, as text that comes while it is made. Knows ids and text, not files.

Notable choices:
- Texts that are asked for at different times, by whoever it is, are written together: rows of one cache, which come and
  go between any two tokens.
- Text leaves in whole characters: bytes of a half one wait, and so does what may be the beginning of a stop string.
"""

import codecs
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch

from choose import STEP, Choice, Sampling, key_of, penalize
from configurator import UserError
from decoder import Decoder
from model import GPT
from tokenizer import Tokenizer

SHORT = 64  # tokens of a prompt up to which padding costs less than to read it by itself


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


def _diverged() -> UserError:
    return UserError("the model's logits are not finite numbers: its training diverged, or dtype is too narrow")


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


@dataclass(frozen=True)
class Rows:
    """Texts to be written: prompts as ids, and how they go on. Row k is sample first + k. `logprobs`: with each token
    its log-probability and that many alternatives."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    first: int = 0
    logprobs: int | None = None


class Row:
    """One of them, in a batch."""

    def __init__(self, owner: Any, rows: Rows, number: int, tokenizer: Tokenizer):
        self.owner, self.number, self.prompt, self.logprobs = owner, number, rows.prompts[number], rows.logprobs
        self.sampling, self.writer = rows.sampling, Writer(tokenizer, rows.sampling)
        self.sample, self.drawn = rows.first + number, 0  # its number, and tokens so far
        self.newest = -1  # of which the id
        self.seen: torch.Tensor | None = None  # what it has had, [vocab_size], where that is penalized
        self.waiting: list[Token] = []  # that have no text yet

    def take(self, token: Token) -> Piece | None:
        """Goes on with a token: the piece that comes out, if any."""
        self.newest = token.id
        self.drawn += 1
        text = self.writer.write(token.id)
        self.waiting.append(token)
        if not (text or self.writer.finished):
            return None
        tokens, self.waiting = tuple(self.waiting), []
        return Piece(self.number, text, tokens, self.writer.finished)


class Batch:
    """Texts that are written together, a token of each at a step, over one cache: whoever owns some may join, and
    leave, before any step. A text is the same in whatever company, but for the rounding of logits.

    The rows that are being written are the first of the cache, which is there as long as there are any.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_rows: int, *, compiled: bool = False, read_at_once: float = inf
    ):
        """`read_at_once`: of the prompts that wait, so many tokens are read in a step, or one prompt if it has more."""
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.compiled, self.read_at_once = compiled, read_at_once
        device = model.transformer.wte.weight.device
        self.device = device if device.type != "mps" else torch.device("cpu")  # Metal has no float64
        self.unknown = None
        if tokenizer.unknown_id is not None:
            self.unknown = torch.tensor([tokenizer.unknown_id], device=self.device)
        self.read = self.drawn = 0  # tokens of prompts, equal ones that came together once, and tokens drawn
        self.clear()

    def __len__(self) -> int:
        """Rows that are written or wait to be read."""
        return len(self.rows) + len(self.coming)

    def clear(self) -> None:
        """All leave, and nothing stays."""
        self.rows: list[Row] = []  # those of the cache
        self.coming: deque[Row] = deque()
        self.decoder: Decoder | None = None
        self.plan: Plan | None = None  # until rows come or go

    def join(self, owner: Any, rows: Rows) -> None:
        """From the next step on these are written, too. ValueError where there is no room for them."""
        if len(self) + len(rows.prompts) > self.max_rows:
            raise ValueError(f"{len(rows.prompts)} rows beside {len(self)}: a batch has {self.max_rows} at most")
        if not all(map(len, rows.prompts)):
            raise ValueError("a prompt has no tokens")
        self.coming += [Row(owner, rows, number, self.tokenizer) for number in range(len(rows.prompts))]

    def leave(self, owner: Any) -> None:
        """Ends its rows as they are."""
        self.coming = deque(row for row in self.coming if row.owner is not owner)
        self._end([place for place, row in enumerate(self.rows) if row.owner is owner])

    def step(self) -> list[tuple[Any, Piece | UserError]]:
        """The next token of each row: the pieces that come out, each with the owner. One whose model diverged gets a
        UserError, and has left. After any error that is raised, the batch must be cleared."""
        results: list[tuple[Any, Piece | UserError]] = []
        logits = [self.decoder.decode([row.newest for row in self.rows])] if self.rows else []
        for group in alike(self._next(results)):
            self.plan = None
            self.decoder = self.decoder or Decoder(
                self.model, self.max_rows, self.model.config.block_size, self.compiled
            )
            places = list(range(len(self.rows), len(self.rows) + len(group)))
            logits.append(self.decoder.prefill([row.prompt for row in group], places))
            self.read += sum(map(len, {tuple(row.prompt[-self.decoder.time :]) for row in group}))
            self.rows += group
        if not self.rows:
            return results
        self.plan = self.plan or Plan(self.rows, self.tokenizer.vocab_size, self.device)
        tokens = self.plan.draw(logits[0] if len(logits) == 1 else torch.cat(logits), self.unknown)
        ended, failed = [], {}
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if token.id < 0:
                self.decoder.wipe(place)
                failed[id(row.owner)] = row.owner
                continue
            self.drawn += 1
            if piece := row.take(token):
                results.append((row.owner, piece))
                if piece.finished:
                    ended.append(place)
        self._end(ended)
        if failed:
            results = [result for result in results if id(result[0]) not in failed]
        for owner in failed.values():
            self.leave(owner)
            results.append((owner, _diverged()))
        return results

    def _next(self, results: list) -> list[Row]:
        """Those whose prompts are read now; what is to have no token at all ends here."""
        rows, known, tokens = [], set(), 0
        while self.coming:
            row = self.coming[0]
            if row.sampling.limit == 0:
                results.append((row.owner, Piece(row.number, "", (), "length")))
            else:
                new = 0 if (prompt := tuple(row.prompt)) in known else min(len(prompt), self.model.config.block_size)
                if rows and new and tokens + new > self.read_at_once:
                    break
                known.add(prompt)
                tokens += new
                rows.append(row)
            self.coming.popleft()
        return rows

    def _end(self, places: list[int]) -> None:
        """Takes rows out; what then is the last one of the cache comes into each one's place."""
        for place in reversed(places):
            last = self.rows.pop()
            if place < len(self.rows):
                self.rows[place] = last
                self.decoder.move(len(self.rows), place)
            self.plan = None
        if not self.rows:
            self.decoder = None


def alike(rows: list[Row]) -> list[list[Row]]:
    """Rows whose prompts are read together: what the longest one of some is, the others are padded to."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        if groups and (len(groups[-1][0].prompt) <= max(SHORT, 2 * len(row.prompt))):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


class Plan:
    """What drawing needs of a batch's rows, as tensors, which are made anew only when rows come or go."""

    def __init__(self, rows: Sequence[Row], vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.choice = Choice([row.sampling for row in rows], device)
        self.keys = torch.tensor([key_of(row.sampling.seed, row.sample, row.drawn) for row in rows], device=device)
        penalized = [row for row in rows if row.sampling.repetition_penalty != 1]
        self.penalty = self.seen = None
        if penalized:
            for row in penalized:
                if row.seen is None:
                    row.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
                    row.seen[torch.tensor(row.prompt, device=device)] = True
            nothing = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen = torch.stack([nothing if row.seen is None else row.seen for row in rows])  # [rows, vocab_size]
            for row, seen in zip(rows, self.seen, strict=True):
                row.seen = None if row.seen is None else seen
            self.penalty = torch.tensor([[float(row.sampling.repetition_penalty)] for row in rows], device=device)
        self.told = {place: row.logprobs for place, row in enumerate(rows) if row.logprobs is not None}
        self.places = None if len(self.told) == len(rows) else torch.tensor(list(self.told), device=device)

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, unknown: torch.Tensor | None) -> list[Token]:
        """The next token of each row, from logits [rows, the model's vocab_size]; the id is -1 where they are not
        finite. Each call draws the token after the one before."""
        raw = logits.to(self.keys.device, torch.float32)
        logits = raw[:, : self.vocab_size]  # what a model's vocabulary is padded with has no text
        if unknown is not None:
            logits = logits.index_fill(1, unknown, -inf)
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.penalty)
        chosen = self.choice(logits, self.keys)  # [rows]
        self.keys += STEP - 2**64  # the same as a signed number
        if self.seen is not None:
            self.seen.scatter_(1, chosen.clamp(min=0)[:, None], True)
        tokens = list(map(Token, chosen.tolist()))
        if self.told:
            of = slice(None) if self.places is None else self.places
            most = max(self.told.values())
            told = _with_logprobs(raw[of], chosen[of, None].clamp(min=0), most, self.vocab_size)
            for (place, alternatives), token in zip(self.told.items(), told, strict=True):
                if tokens[place].id >= 0:
                    tokens[place] = Token(token.id, token.logprob, token.top[:alternatives])
        return tokens


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
    """Continues all prompts, texts or ids, at once and yields pieces of their texts as they come; each row ends for
    itself. A row's pieces are the continuation alone.

    Row k is sample first + k. `logprobs`: with each token its log-probability and that many alternatives. A prompt
    longer than the context is read from where its newest block_size tokens begin. `stopped` is asked before each token
    and ends all rows as they are. UserError for a model that diverged.
    """
    texts = dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str))
    encoded = {text: prompt_ids(tokenizer, text) for text in texts}
    ids = [encoded[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    batch = Batch(model, tokenizer, len(ids), compiled=compiled)
    batch.join(None, Rows(ids, sampling, first, logprobs))
    while batch:
        for _, result in batch.step():
            if isinstance(result, UserError):
                raise result
            yield result
        if batch and stopped():
            return


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
        if not logits.amax(-1).isfinite().all():
            raise _diverged()
        tokens += _with_logprobs(logits, idx[0, new + 1 :, None], alternatives, vocab_size)
    return tokens


def continuations(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, **how) -> list[str]:
    """The continuations of all prompts, without the prompts; `how` as for `stream`."""
    texts = [""] * len(prompts)
    for piece in stream(model, tokenizer, prompts, sampling, **how):
        texts[piece.row] += piece.text
    return texts
