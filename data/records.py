"""Records out of text and of Parquet: (where it stands, the record, or a Malformed that says why there is none).

Notable choices:
- A record is held whole, a file never; one beyond LONGEST characters is told as a mistake.
- Tabs are never quoted; in a .csv, quotes are those of RFC 4180.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from configurator import UserError
from reading import File, seekable

LONGEST = 2**26  # characters of a record, or of a text without a place to cut it: what is held at once
HEAD = 2**12  # characters by which the kind of a file is told
BODIES = ("text", "content", "body", "document")  # what the one column of text may be called in other records


class Malformed(ValueError):
    """A record that makes no document, and why."""


def head_of(pieces: Iterator[str]) -> tuple[str, Iterator[str]]:
    """The text's first HEAD characters or more from the first that is no white space, and all of its pieces."""
    first, size = [], 0
    for piece in pieces:
        first.append(piece)
        size += len(piece) if size else len(piece.lstrip())
        if size >= HEAD:
            break
    return "".join(first), itertools.chain(first, pieces)


def _lines(pieces: Iterable[str], name: str) -> Iterator[str]:
    """The lines of a text, with their ends. UserError for one longer than LONGEST."""
    parts: list[str] = []
    size, number = 0, 1
    for piece in pieces:
        first, *others = piece.split("\n")
        parts.append(first)
        size += len(first)
        if size > LONGEST:
            raise UserError(f"{name}: line {number:,} is longer than {LONGEST:,} characters: is it another format?")
        for other in others:
            yield "".join(parts) + "\n"
            parts, size, number = [other], len(other), number + 1
    if any(parts):
        yield "".join(parts)


def json_lines(pieces: Iterator[str], name: str) -> Iterator[tuple[str, Any]]:
    """(where, object) of JSON lines."""
    for number, line in enumerate(_lines(pieces, name), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = Malformed(error)
        yield f"{name}, line {number:,}", record


def json_array(pieces: Iterator[str], name: str) -> Iterator[tuple[str, Any]]:
    """(where, element) of one array, decoded as it comes. UserError where it is broken: what follows is unknown."""
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    buffer, at, line, number, ended = "", 0, 1, 0, False
    expected = "["  # then an element or ], behind an element , or ], behind , an element, behind ] nothing

    def more(wanted: int) -> None:
        """Fills the buffer up to `wanted` characters from `at` on."""
        nonlocal buffer, at, line, ended
        parts, size = [buffer[at:]], len(buffer) - at
        line, at = line + buffer.count("\n", 0, at), 0
        while size < wanted and not ended:
            parts.append(next(pieces, ""))
            size, ended = size + len(parts[-1]), not parts[-1]
        buffer = "".join(parts)

    def broken(reason: object) -> UserError:
        where = line + buffer.count("\n", 0, at)
        return UserError(f"{name}, from line {where:,} on: the JSON array is broken: {reason}")

    while True:
        at = space.match(buffer, at).end()
        while at == len(buffer) and not ended:
            more(1)
            at = space.match(buffer, at).end()
        if at == len(buffer) and not expected:
            return
        if at == len(buffer):
            raise broken("it has no end")
        sign = buffer[at]
        if sign in "[,]" and sign in expected:
            at, expected = at + 1, {"[": "]element", ",": "element", "]": ""}[sign]
            continue
        if "element" not in expected:
            raise broken(f"{sign!r} where {' or '.join(expected) or 'the end of the file'} was expected")
        while True:
            try:
                record, end = decode(buffer, at)
                if end < len(buffer) or ended:
                    break
                reason: Exception = ValueError("it has no end")  # a number may go on
            except (ValueError, RecursionError) as error:
                reason = error
            wanted = max(2 * (len(buffer) - at), HEAD)
            if ended or wanted > LONGEST:
                raise broken(reason) from reason
            more(wanted)
        at, number, expected = end, number + 1, ",]"
        yield f"{name}, element {number:,}", record


def table(pieces: Iterator[str], delimiter: str, fields: tuple[str, ...], name: str) -> Iterator[tuple[str, Any]]:
    """(where, row by its columns' names) of .csv or .tsv; of one without names of columns, "1", "2" and so on.

    Tabs are never quoted. UserError where a quote is left open, as all that follows it would be lost.
    """
    csv.field_size_limit(LONGEST)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(_lines(pieces, name), delimiter=delimiter, quoting=quoting, strict=True)
    names: list[str] = []
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise UserError(f"{name}, from line {first:,} on: a quote is opened and never closed") from error
            row = Malformed(error)
        where = f"{name}, line {first:,}" + (f" to {rows.line_num:,}" if rows.line_num > first else "")
        if isinstance(row, Malformed):
            yield where, row
            continue
        if not "".join(row).strip():
            continue
        if not names:
            names = [str(i + 1) for i in range(len(row))]
            if _is_header(row, fields):
                names = [column.strip() for column in row]
                continue
        if len(row) != len(names):
            yield where, Malformed(f"{len(row)} columns instead of {len(names)}")
        else:
            yield where, dict(zip(names, row, strict=True))


def _is_header(row: list[str], fields: tuple[str, ...]) -> bool:
    """Whether a table's first row names its columns. `fields` that are all numbers count those of one without names."""
    columns = {column.strip() for column in row}
    if fields:
        return set(fields) <= columns and not all(name.isdigit() for name in fields)
    known = {*BODIES, "title", "answer", "english", "chinese", "label", "prompt", "response", "instruction", "output"}
    return bool(columns & known)


def headed(pieces: Iterator[str], kind: str, name: str) -> Iterator[tuple[str, Any]]:
    """The one record of a text whose title stands in its first line or in a header between two lines of ---."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece)
        if sum(map(len, parts)) > LONGEST:
            yield name, Malformed(f"it is longer than {LONGEST:,} characters")
            return
    text = "".join(parts).strip("\n")
    if kind == "thucnews":
        title, _, content = text.partition("\n")
        yield name, {"title": title.strip(), "content": content.strip("\n")} if text else Malformed("it is empty")
        return
    header = re.match(r"---[^\S\n]*\n(.*?)^---[^\S\n]*(?:\n(.*)|\Z)", text, re.DOTALL | re.MULTILINE)
    title = header and re.search(r"^[^\S\n]*标题[^\S\n]*[：:](.*)", header[1], re.MULTILINE)
    missing = Malformed("it does not begin with a header of --- , 标题：… and ---")
    yield name, {"title": title[1].strip(), "content": (header[2] or "").strip("\n")} if title else missing


def parquet_rows(
    file: File, columns: Callable[[list[str], str], list[str]], progress: Callable[[int], Any]
) -> Iterator[tuple[str, Any]]:
    """(where, row), in which only those columns are read that `columns` gives of all their names."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("a .parquet file needs a package: pip install pyarrow") from error
    try:
        with seekable(file, progress) as content:
            table, number = parquet.ParquetFile(content), 0
            names = table.schema_arrow.names
            wanted = columns(names, str(file))
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number:,}", dict.fromkeys(names) | record
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # some of what breaks is no Arrow exception
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def stars_of(record: dict[str, Any]) -> float:
    try:
        return float(record["star"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Malformed('--min_star needs a number in the field "star"') from None
