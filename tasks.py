"""Task files to questions, and a model's likelihoods of the answers to figures.

A task is a .jsonl file in UTF-8, an object in each line, and the fields say of what kind it is:

| fields                                   | the question                                       |
| ---------------------------------------- | -------------------------------------------------- |
| `context`, `continuation`                | does the model go on like this? (LAMBADA)          |
| `query`, `choices`, `gold`               | which of these is it? `gold` is its place, from 0  |
| `context_options`, `continuation`, `gold` | after which of these is this likelier? (Winogrande) |

Notable choices:
- Prompts, tokens and figures are those of lm-evaluation-harness 0.4.13 (`_encode_pair`, `acc`, `acc_norm`), so that
  figures from here and from there can stand in one table. A text is text: <|endoftext|> spelled out is no token.
- The examples that stand before a question, GPT-3's few-shot setting, depend on (seed, the row's number) alone.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError, user_errors
from loader import permute
from model import GPT, derive_seed
from scoring import continuation_likelihoods
from tokenizer import Tokenizer

FIELDS = {  # of each kind, in the order in which they are looked for
    "contexts": ("context_options", "continuation", "gold"),
    "choices": ("query", "choices", "gold"),
    "continuation": ("context", "continuation"),
}
KNOWN = "; or ".join(", ".join(fields) for fields in reversed(FIELDS.values()))


@dataclass(frozen=True)
class Row:
    """A question: its (context, answer) pairs, of which the one at `gold` is right."""

    pairs: tuple[tuple[str, str], ...]
    gold: int
    where: str = field(compare=False)  # file and line


@dataclass(frozen=True)
class Task:
    """The questions of a file, all of one kind, one of FIELDS."""

    path: str
    kind: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Shots:
    """So many answered questions before each, out of `task`; which ones is decided by `seed`."""

    task: Task
    count: int
    seed: int

    def before(self, number: int, row: Row) -> list[Row]:
        """Those that stand before the row with this number: never the row itself. UserError where there are not
        enough."""
        rows, key = self.task.rows, derive_seed(self.seed, "shots", number)
        for drawn in (min(len(rows), self.count + 16), len(rows)):  # an order of all of them is seldom needed
            order = permute(np.arange(drawn), len(rows), key).tolist()
            if len(found := [rows[i] for i in order if rows[i] != row]) >= self.count:
                return found[: self.count]
        raise UserError(
            f"shots={self.count}: {self.task.path} has {len(found)} rows other than this one: lower --shots"
        )


def read_task(path: str) -> Task:
    """The task in a file. UserError, naming file and line, for what is none."""
    with user_errors(OSError, about=f"the task {path} cannot be read"):
        data = Path(path).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the task {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    kind, rows = "", []
    for number, line in enumerate(lines, 1):
        if line and not line.isspace():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is no JSON: {error}; expected an object in each line") from error
            kind = kind or _kind_of(record, where)
            rows.append(_row(record, kind, where))
    if not rows:
        raise UserError(f"the task {path} is empty: expected a JSON object in each line, with the fields {KNOWN}")
    return Task(path, kind, tuple(rows))


def _kind_of(record: Any, where: str) -> str:
    names = set(record) if isinstance(record, dict) else set()
    for kind, fields in FIELDS.items():
        if names >= set(fields):
            return kind
    has = f"it has {', '.join(map(repr, record))[:200] or 'none'}" if isinstance(record, dict) else "it is no object"
    raise UserError(f"{where}: expected an object with the fields {KNOWN}; {has}")


def _row(record: Any, kind: str, where: str) -> Row:
    fields = FIELDS[kind]
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with the fields {', '.join(fields)}")
    if missing := [name for name in fields if name not in record]:
        raise UserError(f"{where}: the field {missing[0]!r} is missing; the rows before have {', '.join(fields)}")

    def text(name: str, value: Any, may_be_empty: bool = False) -> str:
        if not isinstance(value, str) or not (value or may_be_empty):
            raise UserError(f"{where}: {name} is {_shown(value)}, expected {'a' if may_be_empty else 'some'} text")
        return value

    if kind == "continuation":
        pair = text("context", record["context"], True), text("continuation", record["continuation"])
        return Row((pair,), 0, where)
    name = "choices" if kind == "choices" else "context_options"
    options, gold = record[name], record["gold"]
    if not isinstance(options, list) or len(options) < 2:
        raise UserError(f"{where}: {name} is {_shown(options)}, expected a list of two texts or more")
    options = [text(f"one of {name}", option, kind == "contexts") for option in options]
    if type(gold) is not int or not 0 <= gold < len(options):
        raise UserError(
            f"{where}: gold is {_shown(gold)}, expected the place of one of the {len(options)} {name}, "
            f"0 to {len(options) - 1}"
        )
    if kind == "choices":
        query = text("query", record["query"], True)
        return Row(tuple((query, option) for option in options), gold, where)
    continuation = text("continuation", record["continuation"])
    return Row(tuple((option, continuation) for option in options), gold, where)


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of what follows it, as lm-evaluation-harness has them: the spaces at the context's end
    go to the continuation, and the continuation's ids are those of the whole behind as many as the context alone has.

    What that harness stops at is done here too: a context of spaces alone counts as an empty one, for which the
    end-of-text token stands; and where the whole has no ids behind the context's, the continuation is encoded by
    itself. UserError for an empty context without such a token, and for a continuation that has no tokens.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = tokenizer.encode(stripped).tolist()
    after = tokenizer.encode(stripped + continuation).tolist()[len(before) :] or tokenizer.encode(continuation).tolist()
    if not before:
        if tokenizer.end_of_text is None:
            raise UserError("nothing stands before the answer, and this model's vocabulary has no <|endoftext|> for it")
        before = [tokenizer.end_of_text]
    if not after:
        raise UserError(f"the answer {_shown(continuation)} has no tokens in this model's vocabulary")
    return before, after


def prompts(task: Task, number: int, delimiter: str, shots: Shots | None) -> list[tuple[str, str]]:
    """The texts of the pairs in the row with this number: the context behind the `shots`, and the delimiter with the
    answer. UserError where there are too few shots."""
    row, before = task.rows[number], ""
    if shots is not None and shots.count:
        for example in shots.before(number, row):
            before += f"{delimiter.join(example.pairs[example.gold])}\n\n"
    return [(before + context, delimiter + answer) for context, answer in row.pairs]


def check_shots(task: Task, shots: Shots) -> None:
    """UserError where the shots are of another kind than the task, or there are too few."""
    if shots.task.kind != task.kind:
        expected = ", ".join(FIELDS[task.kind])
        raise UserError(f"the shots of {shots.task.path} are of another kind than {task.path}: expected {expected}")
    if not 0 <= shots.count <= len(shots.task.rows):
        raise UserError(f"shots={shots.count}: expected 0 to {len(shots.task.rows)}, the rows of {shots.task.path}")


def measured(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    delimiter: str,
    shots: Shots | None,
    batch_size: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> dict[str, float | int | None]:
    """The task's figures: `accuracy` and others of its kind (shares, with the standard error of each), `perplexity` of
    the continuations; how many `rows` there are, and how many of them were `truncated`, that is, cut on the left to fit
    into the context. `progress` is called with the pairs that are done. UserError, naming file and line, where a text
    has no tokens, or an answer is longer than the context."""
    room, pairs, truncated = model.config.block_size, [], 0
    for number, row in enumerate(task.rows):
        with user_errors(UserError, about=row.where):
            own = [encode_pair(tokenizer, *texts) for texts in prompts(task, number, delimiter, shots)]
            if (longest := max(len(answer) for _, answer in own)) > room:
                raise UserError(f"an answer has {longest:,} tokens, and the model's context holds {room:,}")
        truncated += any(len(context) + len(answer) > room + 1 for context, answer in own)
        pairs += own
    found = iter(continuation_likelihoods(model, pairs, batch_size, progress))
    rows = [(row, [next(found) for _ in row.pairs]) for row in task.rows]
    counts = {"rows": len(rows), "truncated": truncated}
    if task.kind == "continuation":
        right = [likelihood.greedy for _, (likelihood,) in rows]
        nll = -math.fsum(likelihood.logprob for _, (likelihood,) in rows) / len(rows)
        return accuracy("accuracy", right) | {"perplexity": exp(nll)} | counts
    measures: dict[str, Callable[[str, Any], float]] = {"accuracy": lambda answer, found: found.logprob}
    if task.kind == "choices":
        measures["accuracy_norm"] = lambda answer, found: found.logprob / len(answer)
        measures["accuracy_per_token"] = lambda answer, found: found.logprob / found.tokens
    figures: dict[str, float | int | None] = {}
    for name, measure in measures.items():
        right = []
        for row, own in rows:
            scores = [measure(answer, each) for (_, answer), each in zip(row.pairs, own, strict=True)]
            right.append(int(np.argmax(scores)) == row.gold)  # of several equal ones the first
        figures |= accuracy(name, right)
    return figures | counts


def accuracy(name: str, right: Sequence[bool]) -> dict[str, float | None]:
    """The share of what is right, and its standard error, sqrt(p (1 - p) / (n - 1)); None of a single one."""
    n, p = len(right), sum(right) / len(right)
    return {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def exp(x: float) -> float:
    """e to the x, infinite where that is beyond what a float holds."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
