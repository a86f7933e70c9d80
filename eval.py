"""Figures of one model or of several: loss, perplexity and bits on texts, accuracy on tasks.

    $ python eval.py out-chinese                                 # the validation split that it was trained with
    $ python eval.py out-gpt out-muon --data=novel.txt --stride=64
    $ python eval.py out-chinese --task=data/endings/val.jsonl --delimiter=
    $ python eval.py gpt2 --task=arc_easy.jsonl --delimiter='\\nAnswer: ' --shots=2 --shots_from=arc_easy_train.jsonl
    $ python eval.py out-chinese/hf --data=shakespeare --json > figures.json

A model is an out_dir, a .pt file, a folder in the Hugging Face layout, or the name of one of OpenAI's, such as gpt2.

Of a text, all tokens but the first are scored, each once, in windows that move on by `stride`; of conversations, what
the assistant says, a row of them at a time, as in training. With a stride below the context the windows are those of
Hugging Face's guide to perplexity; with the whole context as stride, that one leaves out a token in each window:

- loss: nats per token. perplexity: e to the loss. bits_per_token: the loss in bits
- bits_per_byte, bits_per_character: all bits, those for special tokens too, over the bytes and the characters of the
  text of the scored tokens. Special tokens, such as the end of a text, have none. A character counts where its first
  byte does. They can be compared between models with different vocabularies, where losses per token cannot
- accuracy: the share of the tokens that were the likeliest in their places

Of a task, whose kinds tasks.py lists, with the names that lm-evaluation-harness has for the same figures:

- accuracy (acc): the share of right answers, the likeliest ones; of LAMBADA, where each token was the likeliest
- accuracy_norm (acc_norm): right by the log-likelihood per character; accuracy_per_token: per token, as for GPT-3
- perplexity (LAMBADA): e to the mean negative log-likelihood of the continuations
- truncated: rows that were cut on the left to fit into the context. In --json, each accuracy's standard error

The table goes to stdout, all else to stderr.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent / "data")]
from configurator import Config, UserError, configure, note, run, user_errors

models = []  # out_dirs, .pt files, Hugging Face folders, 'gpt2*'; also words without a key; default: out_dir
init_from = "resume"  # where none is named, the one, as in sample.py: 'resume' for out_dir, or any of these
out_dir = "out"  # ckpt.pt is taken from here then
# What it is measured on
data = []  # text files, datasets (several: --data=A --data=B); without a task, default: what it was trained with
split = "val"  # of datasets, or 'train'
stride = 0  # tokens that a window moves on by, 1 to the model's context: the fewer, the more is seen; 0 for half of it
encoding = "auto"  # of text files: told from each, or its name, such as gb18030
task = []  # .jsonl files of questions, see tasks.py (several: --task=A --task=B)
delimiter = " "  # between a question and its answer; \n is a line break; empty for Chinese
shots = 0  # so many answered questions stand before each
shots_from = ""  # the file they are from, such as the task's training questions; default: the task's own other rows
limit = 0  # only the first so many rows of each task; 0 for all
seed = 1337  # decides which shots stand before a question
# How it is computed and shown
batch_size = 8  # windows or answers computed together; the figures are the same but for rounding
quantize = ""  # 'int8' (CPUs) or 'bf16', to see what these cost
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'; float32 where quantize is set
json = False  # one JSON list on stdout in place of the table, null where there is no figure
config = configure(globals(), positionals=("models",))

import json as json_format
import math
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

import checkpoint
from charset import check_encoding
from chat import ChatTokenizer
from device import autocast, memory_error_told
from loader import check_vocabulary, open_split, parts_of
from model import GPT
from packing import Examples
from reading import PACKED, TEXT, File, read_text
from scoring import Batch, Sums, summed, windowed
from tasks import Shots, Task, check_shots, exp, measured, read_task
from tokenizer import Tokenizer, load_tokenizer, read_meta
from writing import progress_bar

TEXT_COLUMNS = ("loss", "perplexity", "bits_per_token", "bits_per_byte", "bits_per_character", "accuracy", "tokens")
TASK_COLUMNS = ("accuracy", "accuracy_norm", "accuracy_per_token", "perplexity", "rows", "truncated")
Figures = dict[str, Any]


class TextSizes:
    """The bytes and the characters that each token adds to a text, counted over targets as they are scored."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = {tokenizer.end_of_text, tokenizer.unknown_id}
        special |= set(tokenizer.special.values()) if isinstance(tokenizer, ChatTokenizer) else set()
        texts = [b"" if id in special else tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)]
        begins = [sum(byte & 0xC0 != 0x80 for byte in text) for text in texts]  # of a character's bytes only the first
        self._sizes = np.array([[len(text) for text in texts], begins]).T  # [vocab_size, 2]
        self.bytes = self.characters = 0

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, their targets counted."""
        for batch in batches:
            targets = batch[1].numpy()
            sizes = self._sizes[targets[targets >= 0]].sum(0)
            self.bytes, self.characters = self.bytes + int(sizes[0]), self.characters + int(sizes[1])
            yield batch


def figures_of(sums: Sums, sizes: TextSizes) -> Figures:
    """The figures of a text from the sums over its tokens."""
    loss, bits = sums.nll / sums.tokens, sums.nll / math.log(2)
    return {
        "loss": loss,
        "perplexity": exp(loss),
        "bits_per_token": bits / sums.tokens,
        "bits_per_byte": bits / sizes.bytes if sizes.bytes else None,
        "bits_per_character": bits / sizes.characters if sizes.characters else None,
        "accuracy": sums.hits / sums.tokens,
        "tokens": sums.tokens,
        "bytes": sizes.bytes,
        "characters": sizes.characters,
    }


def ids_of_text(path: str, tokenizer: Tokenizer, encoding: str) -> np.ndarray:
    """The ids of a text file, [n]. UserError where it cannot be read, or has too few."""
    if Path(path).suffix == ".bin":
        raise UserError(f"{path} holds token ids: name its dataset, --data={Path(path).parent}")
    try:
        text = "".join(read_text(File(Path(path)), encoding))
    except UserError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        told = f"{path} cannot be decoded ({error.__cause__.reason}): save it as UTF-8, or name its --encoding"
        raise UserError(told) from error
    with user_errors(UserError, about=path):
        ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UserError(f"{path} has {len(ids)} tokens: expected two at least, as the first is not scored")
    return ids


def texts_of(c: Config, source: str, model: GPT, tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray | Examples]]:
    """What --data names, or else what the model was trained with: the names, and the ids or the examples of each.
    UserError for what is not there, or was prepared with another tokenizer."""
    names = c.data or ([] if c.task else [trained_with(source)])
    for name in names:
        if Path(name).is_file():
            yield name, ids_of_text(name, tokenizer, c.encoding)
            continue
        if Path(name).suffix in (*TEXT, *PACKED) and not Path(name).exists():
            raise UserError(f"--data={name}: there is no such file")
        for part in parts_of(name):
            base = tokenizer.base if isinstance(tokenizer, ChatTokenizer) else tokenizer
            if load_tokenizer(part.folder) not in (tokenizer, base):  # in a vocabulary with marks, the others are kept
                raise UserError(
                    f"the dataset {part.folder} was prepared with another tokenizer than that of {source}: prepare it "
                    f"with --tokenizer={source}, or give its text file to --data"
                )
            meta = read_meta(part.folder)
            has_examples = f"{c.split}.mask" in meta.get("files", {})
            tokens = open_split(part.folder, c.split, model.config.block_size if has_examples else 1)
            check_vocabulary(tokens, meta, tokenizer.vocab_size)
            yield part.name, tokens if has_examples else tokens.ids


def trained_with(source: str) -> str:
    """The dataset of a checkpoint. UserError where it has none."""
    dataset = ""
    if checkpoint.is_checkpoint(source):
        dataset = (checkpoint.peek(checkpoint.best_path(source)).get("config") or {}).get("dataset", "")
    if not isinstance(dataset, str) or not dataset:
        raise UserError(f"{source} does not say what it was trained with: name a text file or a dataset with --data")
    return dataset


def evaluated(c: Config, source: str, tasks: list[tuple[Task, Shots | None]]) -> Iterator[Figures]:
    """The figures of one model, as they come: a row for each text, then for each task."""
    named = source or (c.out_dir if c.init_from == "resume" else c.init_from)
    own = Config(**vars(c) | {"init_from": source or c.init_from})
    model, tokenizer, _ = checkpoint.open_model(own)
    settings = {"block_size": model.config.block_size, "batch_size": c.batch_size, "device": own.device}
    settings |= {"dtype": own.dtype, "quantize": c.quantize}
    with autocast(own.device, own.dtype):
        for text in texts_of(c, named, model, tokenizer):
            yield {"model": named} | of_text(c, named, *text, model, tokenizer) | settings
        for task in tasks:
            yield {"model": named} | of_task(c, named, *task, model, tokenizer) | settings


def of_text(c: Config, named: str, name: str, data: np.ndarray | Examples, model: GPT, tokenizer: Tokenizer) -> Figures:
    """The figures of one text or dataset. UserError for a stride that does not fit the model."""
    packed, room = isinstance(data, Examples), model.config.block_size
    stride, sizes = None if packed else c.stride or max(1, room // 2), TextSizes(tokenizer)
    if packed:
        rows = data.rows(room)
        total, numbers = int(rows.learnt.sum()), np.arange(len(rows))
        parts = (numbers[first : first + c.batch_size] for first in range(0, len(rows), c.batch_size))
        batches = (data.windows(part, room, tokenizer.vocab_size) for part in parts)
    else:
        total, batches = len(data) - 1, windowed(data, room, stride, c.batch_size)
    with progress_bar(total, f"{named}, {name}", " tokens") as progress:
        figures = figures_of(summed(model, sizes.counted(batches), progress), sizes)
    return {"data": name, "split": None if Path(name).is_file() else c.split, **figures, "stride": stride}


def of_task(c: Config, named: str, task: Task, shots: Shots | None, model: GPT, tokenizer: Tokenizer) -> Figures:
    """The figures of one task."""
    delimiter, answers = c.delimiter.replace("\\n", "\n"), sum(len(row.pairs) for row in task.rows)
    with progress_bar(answers, f"{named}, {task.path}", " answers") as progress:
        figures = measured(model, tokenizer, task, delimiter, shots, c.batch_size, progress)
    if cut := figures["truncated"]:
        fits = f"do not fit into the context of {model.config.block_size:,} tokens and are cut on the left"
        note(f"note: {named}, {task.path}: {cut:,} of {figures['rows']:,} rows {fits}")
    asked = {"delimiter": delimiter, "shots": c.shots, "shots_from": shots.task.path if shots else None}
    return {"task": task.path} | figures | asked | {"limit": c.limit, "seed": c.seed}


def tasks_of(c: Config) -> list[tuple[Task, Shots | None]]:
    """The tasks, with what stands before their questions. UserError for what cannot be read or does not fit."""
    found = []
    for path in c.task:
        task, shots = read_task(path), None
        if c.shots:
            shots = Shots(read_task(c.shots_from) if c.shots_from else task, c.shots, c.seed)
            check_shots(task, shots)
        rows = task.rows[: c.limit] if c.limit else task.rows
        found.append((Task(path, task.kind, rows), shots))
    return found


def check(c: Config) -> None:
    """UserError, before any work, for settings that make no sense, and for models that are not there."""
    for key, least in (("batch_size", 1), ("stride", 0), ("limit", 0), ("shots", 0)):
        if getattr(c, key) < least:
            raise UserError(f"{key}={getattr(c, key)}: expected at least {least}")
    if c.split not in ("val", "train"):
        raise UserError(f"split={c.split}: expected val or train")
    check_encoding(c.encoding)
    if c.shots_from and not c.shots:
        raise UserError(f"shots_from={c.shots_from} needs to know how many: --shots=2")
    if (c.shots or c.limit) and not c.task:
        raise UserError(f"{'shots' if c.shots else 'limit'} is for tasks: name one with --task")
    for key in ("data", "task"):
        if "" in getattr(c, key):
            raise UserError(f"--{key}= is empty: expected the name of a file{' or a dataset' * (key == 'data')}")
    for name in c.data:
        if Path(name).is_file() and {".zip", ".jsonl", ".json", ".csv", ".tsv", ".parquet"} & set(Path(name).suffixes):
            raise UserError(
                f"--data={name}: expected a plain text, or a dataset, which data/chinese/prepare.py makes of it, "
                f"with --tokenizer={(c.models or [c.out_dir])[0]}"
            )
    for source in c.models or [c.init_from] * (c.init_from != "resume"):
        path, expected = Path(source), "expected an out_dir, a .pt file, a Hugging Face folder, or gpt2"
        if not path.exists() and not source.startswith("gpt2"):
            raise UserError(f"no model {source}: {expected}{'; a key begins with two dashes' * ('=' in source)}")
        if path.is_file() and path.suffix != ".pt":
            raise UserError(f"{source} is no model: {expected}")
        if path.is_dir() and not checkpoint.is_checkpoint(source) and not (path / "config.json").is_file():
            raise UserError(f"there is no model in {source} (no ckpt.pt, last.pt or config.json): {expected}")


def table(rows: list[Figures], what: str, columns: Iterable[str]) -> str:
    """The rows as lines of aligned columns, without those columns that are empty in all of them."""
    columns = [name for name in columns if any(row.get(name) is not None for row in rows)]
    names = ["model", what, *columns]
    cells = [names] + [[row["model"], row[what], *(shown(name, row.get(name)) for name in columns)] for row in rows]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        fills = [" " * (room - width(cell)) for cell, room in zip(line, widths, strict=True)]
        aligned = [c + f if i < 2 else f + c for i, (c, f) in enumerate(zip(line, fills, strict=True))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def shown(name: str, value: float | int | None) -> str:
    """A figure as the table has it."""
    if value is None:
        return "-"
    if name == "perplexity":
        return f"{value:,.3f}" if value < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def width(text: str) -> int:
    """The columns that a text takes on a terminal, where Chinese characters take two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text if not unicodedata.combining(c))


def as_json(rows: list[Figures]) -> str:
    """The rows as a JSON list, null for what JSON has no number for; in ASCII, which any console can show."""
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    return json_format.dumps(finite, indent=1, allow_nan=False)


@memory_error_told("lower batch_size, take a smaller model, or --quantize=bf16")
def main(c: Config) -> None:
    check(c)
    tasks = tasks_of(c)
    rows: list[Figures] = []
    try:
        for source in c.models or [""]:
            with user_errors(UserError, about=source if len(c.models) > 1 else ""):
                rows.extend(evaluated(c, source, tasks))
    finally:  # also before a later mistake is told, or after Ctrl-C
        if c.json and rows:
            print(as_json(rows))
        elif rows:
            kinds = (("data", TEXT_COLUMNS), ("task", TASK_COLUMNS))
            parts = [(k, columns, [row for row in rows if k in row]) for k, columns in kinds]
            print("\n\n".join(table(own, k, columns) for k, columns, own in parts if own))


if __name__ == "__main__":
    run(main, config)
