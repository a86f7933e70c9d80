"""Labelled texts out of files: records of the fields that a task needs, held out by their hash, and their classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configurator import Config, UserError, user_errors
from model import derive_seed
from reading import File, read_text
from records import Malformed, head_of, json_array, json_lines, table

FIELDS = {
    "single": ["text"],
    "pair": ["text", "text_2"],
    "similarity": ["text", "text_2"],
    "choice": ["text", "choices"],
}
TABLES = {".csv": ",", ".tsv": "\t", ".txt": "\t"}


@dataclass
class Example:
    """A record: its texts (one, two, or one and its choices), its labels (None where there is none) and its rows of
    ids, each from start to extract."""

    where: str
    texts: list[str]
    labels: list[str] | None
    rows: list[list[int]]


def read(c: Config, key: str) -> list[Example]:
    """The records of the file that --key names. UserError for one that has not what the task needs."""
    path, given = getattr(c, key), [name.strip() for name in c.fields.split(",") if name.strip()]
    file, task_fields = File(Path(path)), FIELDS[c.task]
    if not file.path.is_file():
        raise UserError(f"--{key}={path}: expected a file with the fields {', '.join(task_fields)} and label")
    if given and len(given) - len(task_fields) not in (0, 1):
        raise UserError(f"--fields={c.fields}: expected names for {', '.join(task_fields)} and label")
    pieces, examples = read_text(file, c.encoding), []
    try:
        if file.suffix in TABLES:
            records = table(pieces, TABLES[file.suffix], tuple(given[: len(task_fields)]), path)
        elif file.suffix in (".jsonl", ".ndjson", ".json"):
            head, pieces = head_of(pieces)
            is_array = file.suffix == ".json" and head.lstrip().startswith("[")
            records = json_array(pieces, path) if is_array else json_lines(pieces, path)
        else:
            raise UserError(f"--{key}={path}: expected a file that ends in .jsonl, .json, .csv, .tsv or .txt")
        for where, record in records:
            with user_errors(Malformed, about=where):
                examples.append(example(where, record, c, given))
                if examples[-1].labels is None and key != "input":
                    raise Malformed(f"no label among {', '.join(record)[:200]}: name the fields with --fields")
    except UserError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        told = f"{path} cannot be decoded ({error.__cause__.reason}): save it as UTF-8, or name its --encoding"
        raise UserError(told) from error
    if not examples:
        raise UserError(f"{path} is empty")
    return examples


def example(where: str, record: Any, c: Config, given: list[str]) -> Example:
    """What a record says, under the names that are `given` or else the task's. Malformed where something is missing."""
    if isinstance(record, Malformed):
        raise record
    if not isinstance(record, dict):
        raise Malformed(f"{type(record).__name__}, where an object with named fields was expected")
    names = given or [*FIELDS[c.task], "label"]
    if not given and list(record) == [str(i + 1) for i in range(len(record))]:  # a table without names
        names = [str(i + 1) for i in range(len(names))]
    *names, label = names if len(names) > len(FIELDS[c.task]) else [*names, "label"]
    if missing := [name for name in names if name not in record]:
        raise Malformed(f"no {missing[0]} among {', '.join(record)[:200]}: name the fields with --fields")
    values = [record[name] for name in names]
    if c.task == "choice":
        values[1:] = listed(values[1])
    if not all(isinstance(value, str | int | float) and str(value).strip() for value in values):
        raise Malformed(f"a text in {', '.join(names)} is empty or no text")
    value, labels = record.get(label), None
    if value is not None and (value != "" or c.multi_label):
        if isinstance(value, list | dict) and not c.multi_label:
            raise Malformed(f"{label} is a {type(value).__name__}: several labels need --multi_label")
        labels = [str(each).strip() for each in (listed(value) if c.multi_label else [value])]
        if c.task == "choice" and labels[0] not in map(str, range(len(values) - 1)):
            raise Malformed(
                f"{label} is {labels[0]}: expected the index of one of the {len(values) - 1} choices, from 0"
            )
    return Example(where, [str(value).strip() for value in values], labels, [])


def listed(value: Any) -> list[Any]:
    """A list, or the text that stands for it in a table."""
    return value if isinstance(value, list) else [part for part in str(value).split("|") if part.strip()]


def split(examples: list[Example], val_fraction: float) -> tuple[list[Example], list[Example]]:
    """(to train on, held out), by the hash of their texts. UserError where there is nothing to split."""
    numbers = [derive_seed("held out", *each.texts) for each in examples]
    low, high = min(numbers), max(numbers)
    if not val_fraction or low == high:
        raise UserError(f"--val_fraction={val_fraction} of {len(examples)} records leaves one side empty: give --val")
    limit = min(max(val_fraction * 2**63, low + 1), high)  # of a few records, too, each side has one
    sides: tuple[list[Example], list[Example]] = ([], [])
    for number, each in zip(numbers, examples, strict=True):
        sides[number < limit].append(each)
    return sides


def classes(c: Config, examples: list[Example]) -> list[str]:
    """The labels that occur, numbers in their order; of choices the indices. UserError for fewer than two."""
    if c.task == "choice":
        found = {str(i) for each in examples for i in range(len(each.texts) - 1)}
    else:
        found = {label for each in examples for label in each.labels}
    if len(found) < 2:
        what = ", ".join(found) or "empty"
        raise UserError(f"all labels of what is trained on are {what}: expected two classes or more; or give --val")
    return sorted(found, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))


def truth_of(examples: list[Example], labels: list[str]) -> torch.Tensor:
    """Which labels are right, bool [examples, labels]. UserError for one that is not among them."""
    truth = torch.zeros(len(examples), len(labels), dtype=torch.bool)
    for row, each in zip(truth, examples, strict=True):
        for label in each.labels:
            if label not in labels:
                raise UserError(f"{each.where}: the label {label} is none of {', '.join(labels)[:200]}")
            row[labels.index(label)] = True
    return truth
