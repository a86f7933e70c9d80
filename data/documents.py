"""Text to documents: plain texts, records of known and unknown corpora, templates, what is left out.

A source is read as pieces of text that are not empty, and None at the end of each document (a single plain text has
none). Whatever is read twice is the same twice.

| format          | files                         | fields                                           |
| wiki2019zh      | JSON lines, wiki_00 and so on | title, text (which repeats the title: once is enough) |
| news2016zh      | JSON lines                    | title, content                                   |
| baike2018qa     | JSON lines                    | title (the question), answer                     |
| webtext2019zh   | JSON lines                    | title (the question), content; star              |
| translation2019zh | JSON lines                  | english, chinese                                 |
| thucnews        | THUCNews/<class>/<number>.txt | first line, the others; of a .tsv the first column |
| essays          | .txt                          | 标题 of the header between two ---, what follows |
"""

import csv
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configurator import UserError, note
from reading import RECORDS, File, read_text, seekable

TEMPLATE = "《{title}》\n{content}"
FIELDS = {  # of the known formats, in the order in which they are recognised by their keys
    "translation2019zh": (("english", "chinese"), "{english}\n{chinese}", {"english", "chinese"}),
    "baike2018qa": (("title", "answer"), "", {"title", "answer", "category"}),
    "webtext2019zh": (("title", "content"), "", {"title", "content", "star"}),
    "news2016zh": (("title", "content"), "", {"title", "content"}),
    "wiki2019zh": (("title", "text"), "", {"title", "text"}),
    "thucnews": (("title", "content"), "", {"title", "content"}),
    "essays": (("title", "content"), "", {"title", "content"}),
}
FORMATS = ("auto", "text", *FIELDS)
BODIES = ("text", "content", "body", "document")  # what the one column of text may be called in other records
NORMALIZE = ("nfkc", "t2s", "strip")
LONGEST = 2**26  # characters of an element of a JSON array
SHOWN = 10  # malformed records that are told one by one


class Malformed(ValueError):
    """A record that makes no document, and why."""


@dataclass
class Found:
    """What reading finds, to be told to the user. With `quiet`, as in a second reading, nothing is said at once."""

    quiet: bool = False
    encodings: Counter = field(default_factory=Counter)
    records: int = 0
    malformed: int = 0
    few_stars: int = 0
    layout: str = ""

    def encoding(self, file: File, name: str) -> None:
        self.encodings[name] += 1
        if not self.quiet and name != "utf-8" and sum(self.encodings.values()) - self.encodings["utf-8"] <= SHOWN:
            note(f"{file} is read as {name}")

    def bad(self, where: str, reason: object) -> None:
        self.malformed += 1
        if not self.quiet and self.malformed <= SHOWN:
            note(f"{where}: malformed, left out: {reason}")
        if self.malformed >= 1000 and self.malformed > self.records / 2:
            raise UserError(f"{where}: more than half of the records are malformed ({reason}): is it another format?")


@dataclass(frozen=True)
class Template:
    """How the fields of a record make a document."""

    fields: tuple[str, ...]
    parts: tuple[tuple[str, str | None], ...]  # text, and the field that follows it

    @property
    def layout(self) -> str:
        """The template with the first field called title, and content for all that follows; '' of a single field."""
        if sum(field is not None for _, field in self.parts) < 2:
            return ""
        (before, _), (between, _), *_ = self.parts
        return f"{before}{{title}}{between}{{content}}" + (self.parts[-1][0] if self.parts[-1][1] is None else "")

    def fill(self, record: dict[str, Any]) -> str:
        """The document of a record; where the first of several fields is empty, of what follows it. Malformed where a
        field is missing or no text."""
        values = {name: _text(record, name) for name in self.fields}
        parts = self.parts
        if len(parts) > 1 and parts[1][1] and not values[parts[0][1]].strip():
            parts = (("", parts[1][1]), *parts[2:])
        return "".join(before + (values[name] if name else "") for before, name in parts)


def template_of(fields: list[str], template: str) -> Template:
    """The template that --fields and --template give. UserError where they do not fit together."""
    if not template:
        first, *rest = fields
        template = f"{{{first}}}" if not rest else f"《{{{first}}}》\n" + "\n".join(f"{{{name}}}" for name in rest)
    try:
        parsed = list(string.Formatter().parse(template.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise UserError(f"--template={template}: {error}") from error
    names = [name for _, name, _, _ in parsed if name is not None]
    wrong = [name for name in names if fields and name not in fields]
    if wrong or not names or any(spec or conversion for _, _, spec, conversion in parsed):
        known = ", ".join(f"{{{name}}}" for name in fields) or "fields in braces"
        raise UserError(f"--template={template}: expected text with {known}" + (f", not {wrong[0]}" if wrong else ""))
    return Template(tuple(dict.fromkeys(names)), tuple((text, name) for text, name, _, _ in parsed))


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name, Malformed)
    if value is Malformed:
        raise Malformed(f'no field "{name}" among {", ".join(map(str, record))[:200]}')
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Malformed(f'"{name}" is {type(value).__name__}, not text')
    return str(value).replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Source:
    """Documents in files. `document`: what one is in plain text: "text" (all of it, with no end), "file", "blank"
    (blank lines stand between) or "line"."""

    files: tuple[File, ...]
    document: str = "text"
    format: str = "auto"
    fields: tuple[str, ...] = ()
    template: str = ""
    encoding: str = "auto"
    errors: str = "stop"
    normalize: tuple[str, ...] = ()
    min_star: float = 0

    @property
    def ended(self) -> bool:
        """Whether documents have ends."""
        return self.document != "text" or any(self.kind_of(file) != "text" for file in self.files)

    def kind_of(self, file: File) -> str:
        """How a file is read: "text", "thucnews", "essays" (each a file), or by its suffix, such as ".jsonl"."""
        if file.suffix in RECORDS and self.format != "text":
            return file.suffix
        if self.format == "thucnews" or self.format == "auto" and "THUCNews" in Path(str(file)).parts:
            return "thucnews"
        if self.format in FIELDS:
            return "essays" if self.format == "essays" else ".jsonl"
        return "text"

    def read(self, progress: Callable[[int], Any] = lambda size: None, found: Found | None = None):
        """Pieces of text, and None at the end of each document. UserError where a file cannot be read."""
        found = found or Found(quiet=True)
        whole = self.normalized if self.normalize else lambda pieces: pieces
        for file in self.files:
            kind = self.kind_of(file)
            if kind in RECORDS or kind in FIELDS:
                yield from whole(self._records(file, kind, progress, found))
                continue
            pieces = self._pieces(file, progress, found)
            if self.document == "text":
                yield from whole(pieces)
            elif self.document == "file":
                first = next(pieces, "")
                if self.format == "auto" and re.match(r"---[^\S\n]*\n(?:.*\n){,9}标题[：:]", first):
                    yield from whole(self._records(file, "essays", progress, found))
                else:
                    yield from whole(one_document(_then(first, pieces)))
            else:
                yield from whole(split_documents(pieces, SEPARATORS[self.document]))

    def _pieces(self, file: File, progress: Callable[[int], Any], found: Found) -> Iterator[str]:
        return read_text(file, self.encoding, self.errors, progress, lambda name: found.encoding(file, name))

    def _records(self, file: File, kind: str, progress: Callable[[int], Any], found: Found) -> Iterator[str | None]:
        if kind == ".parquet":
            records = _parquet(file, self.fields, progress)
        else:
            pieces = self._pieces(file, progress, found)
            if kind in (".csv", ".tsv"):
                records = _table(pieces, "," if kind == ".csv" else "\t", self.fields, str(file))
            elif kind in FIELDS:
                records = _headed(pieces, kind, str(file))
            else:
                records = _json(pieces, str(file), kind == ".json")
        filler: Template | None = None
        repeats_title = self.format == "wiki2019zh"
        for where, record in records:
            found.records += 1
            try:
                if isinstance(record, Malformed):
                    raise record
                if isinstance(record, str) and not self.fields:
                    text = record.replace("\r\n", "\n").replace("\r", "\n")
                elif not isinstance(record, dict):
                    raise Malformed(f"{type(record).__name__}, where an object with named fields was expected")
                else:
                    if filler is None:
                        filler, name = self._filler(record, kind, str(file))
                        found.layout, repeats_title = found.layout or filler.layout, name == "wiki2019zh"
                    if self.min_star and _stars(record) < self.min_star:
                        found.few_stars += 1
                        continue
                    if repeats_title and str(record.get("text")).startswith(f"{record['title']}\n"):
                        record = record | {"text": record["text"][len(record["title"]) :].lstrip("\n")}
                    text = filler.fill(record)
                text.encode("utf-8")
            except UnicodeEncodeError:
                if self.errors == "stop":
                    found.bad(where, "half a surrogate pair, which is no character")
                    continue
            except Malformed as error:
                found.bad(where, error)
                continue
            if text := text.strip("\n"):
                yield text
                yield None

    def _filler(self, record: dict[str, Any], kind: str, where: str) -> tuple[Template, str]:
        """The template for a file whose first record this is, and the name of its format."""
        if self.fields or self.template:
            return template_of(list(self.fields), self.template), ""
        name = kind if kind in FIELDS else self.format
        if name == "thucnews" and kind == ".tsv":
            return template_of(["1"], ""), name
        if name == "auto":
            name = next((name for name, (_, _, keys) in FIELDS.items() if keys <= record.keys()), "auto")
        if name in FIELDS:
            fields, template, _ = FIELDS[name]
            return template_of(list(fields), template), name
        bodies = [key for key in BODIES if key in record] or (list(record) if len(record) == 1 else [])
        if not bodies:
            if kind == ".tsv" and len(record) == 2 and str(record["2"]).isdigit():
                return template_of(["1"], ""), name
            raise UserError(
                f"{where}: which of its fields are the text? It has {', '.join(map(str, record))[:300]}: name them, "
                f"such as --fields={next(iter(record), 'text')}, or the corpus with --format="
            )
        return template_of([*(["title"] if "title" in record else []), bodies[0]], ""), name

    def normalized(self, pieces: Iterable[str | None]) -> Iterator[str | None]:
        """The same with the texts changed as `normalize` says, each document as if it were whole."""
        change = normalizer(self.normalize)
        waiting, begun = "", False
        for piece in pieces:
            waiting += piece or ""
            cuts = [0] if piece is None else [m.start() for m in SAFE.finditer(waiting)]
            size = len(waiting) if piece is None else cuts[-1] if cuts else 0
            if text := change(waiting[:size], not begun, piece is None):
                yield text
            begun = (begun or bool(text)) and piece is not None
            waiting = waiting[size:]
            if piece is None:
                yield None
        if text := change(waiting, not begun, True):
            yield text


SEPARATORS = {"line": re.compile(r"\n+"), "blank": re.compile(r"\n(?:[^\S\n]*\n)+")}
# where a text may be cut and its parts be normalised apart: behind a line or a clause, before what never combines
SAFE = re.compile(r"(?<=[\n。！？；，、：.,!?;:])(?=[0-9A-Za-z\u4e00-\u9fff])")


def normalizer(names: Iterable[str]) -> Callable[[str, bool, bool], str]:
    """A function of (text, whether it begins a document, whether it ends one). UserError where a package is missing."""
    steps: list[Callable[[str], str]] = []
    if "nfkc" in names:
        steps.append(lambda text: unicodedata.normalize("NFKC", text))
    if "t2s" in names:
        try:
            import opencc
        except ImportError as error:
            raise UserError("--normalize=t2s needs a package: pip install opencc") from error
        convert = opencc.OpenCC("t2s").convert
        steps.append(lambda text: text if "\udcff" in text else convert(text))

    def change(text: str, begins: bool, ends: bool) -> str:
        for step in steps:
            text = step(text)
        if "strip" in names:
            text = re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text))
            text = text.lstrip() if begins else text
            text = text.rstrip() if ends else text
        return text

    return change


def one_document(pieces: Iterable[str]) -> Iterator[str | None]:
    """One document without its trailing newlines, then None; nothing at all where nothing is left."""
    newlines, empty = "", True
    for piece in pieces:
        body = piece.rstrip("\n")
        if body:
            yield newlines + body
            newlines, empty = "", False
        newlines += piece[len(body) :]
    if not empty:
        yield None


def split_documents(pieces: Iterable[str], separator: re.Pattern) -> Iterator[str | None]:
    """The documents that the separator, line breaks with white space between, stands between; none of them empty."""
    held, begun = "", False  # white space that may be part of a separator; whether a document has begun
    for piece in pieces:
        text = held + piece
        body = text.rstrip()
        held = text[len(body) :]
        for number, part in enumerate(separator.split(body) if body else ()):
            if number and begun:
                yield None
                begun = False
            if part := part if begun else part.lstrip("\n"):
                begun = True
                yield part
    if begun:
        if rest := held.partition("\n")[0]:
            yield rest
        yield None


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text, with their ends."""
    parts: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        parts.append(first)
        for other in others:
            yield "".join(parts) + "\n"
            parts = [other]
    if any(parts):
        yield "".join(parts)


def _json(pieces: Iterator[str], name: str, may_be_array: bool) -> Iterator[tuple[str, Any]]:
    """(where, object) of JSON lines, or of the elements of a .json array."""
    pieces, first = iter(pieces), ""
    while may_be_array and not first.strip() and (piece := next(pieces, "")):
        first += piece
    if first.lstrip().startswith("["):
        yield from _json_array(_then(first, pieces), name)
        return
    for number, line in enumerate(_lines(_then(first, pieces)), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = Malformed(error)
        yield f"{name}, line {number:,}", record


def _then(first: str, pieces: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
    yield from pieces


def _json_array(pieces: Iterator[str], name: str) -> Iterator[tuple[str, Any]]:
    """The elements of one array, decoded as they come. UserError where it is broken, as nothing tells what follows."""
    decode, buffer, at, number, line = json.JSONDecoder().raw_decode, "", 0, 0, 1
    skip = re.compile(r"[\s,]*")
    ended = wanted = 0
    opened = False
    while True:
        while not ended and len(buffer) - at <= wanted:
            piece = next(pieces, None)
            ended = piece is None
            line += buffer.count("\n", 0, at)
            buffer, at = buffer[at:] + (piece or ""), 0
        if not opened:
            at, opened = buffer.index("[") + 1, True
        at = skip.match(buffer, at).end()
        if buffer.startswith("]", at):
            return
        try:
            record, end = decode(buffer, at)
            if end == len(buffer) and not ended:
                raise ValueError  # a number may go on
        except (ValueError, RecursionError) as error:
            wanted = 2 * (len(buffer) - at)
            if not ended and wanted < LONGEST:
                continue
            broken = line + buffer.count("\n", 0, at)
            raise UserError(f"{name}, from line {broken:,} on: the JSON array is broken: {error}") from error
        at, number, wanted = end, number + 1, 0
        yield f"{name}, element {number:,}", record


def _table(pieces: Iterator[str], delimiter: str, fields: tuple[str, ...], name: str) -> Iterator[tuple[str, Any]]:
    """(where, row by its columns' names) of .csv or .tsv; of one without names of columns, "1", "2" and so on.

    Tabs are never quoted. In a .csv with an open quote the rest is one field, so that is malformed.
    """
    csv.field_size_limit(LONGEST)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(_lines(pieces), delimiter=delimiter, quoting=quoting, strict=True)
    names: list[str] = []
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{name}, line {rows.line_num:,}", Malformed(error)
            continue
        if not row:
            continue
        if not names:
            known = set(fields) or {*BODIES, "title", "answer", "english", "chinese", "label"}
            is_header = known <= set(row) if fields else bool(known & {column.strip().lower() for column in row})
            names = [c.strip() for c in row] if is_header else [str(i + 1) for i in range(len(row))]
            if is_header:
                continue
        if len(row) != len(names):
            yield f"{name}, line {rows.line_num:,}", Malformed(f"{len(row)} columns instead of {len(names)}")
        else:
            yield f"{name}, line {rows.line_num:,}", dict(zip(names, row, strict=True))


def _headed(pieces: Iterator[str], kind: str, name: str) -> Iterator[tuple[str, Any]]:
    """The one record of a text whose title stands in its first line or in a header between two lines of ---."""
    text = "".join(pieces).strip("\n")
    if kind == "thucnews":
        title, _, content = text.partition("\n")
        yield name, {"title": title.strip(), "content": content.strip("\n")} if text else Malformed("it is empty")
        return
    header = re.match(r"---[^\S\n]*\n(.*?)^---[^\S\n]*(?:\n(.*)|\Z)", text, re.DOTALL | re.MULTILINE)
    title = header and re.search(r"^[^\S\n]*标题[^\S\n]*[：:](.*)", header[1], re.MULTILINE)
    missing = Malformed("it does not begin with a header of --- , 标题：… and ---")
    yield name, {"title": title[1].strip(), "content": (header[2] or "").strip("\n")} if title else missing


def _parquet(file: File, fields: tuple[str, ...], progress: Callable[[int], Any]) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("a .parquet file needs a package: pip install pyarrow") from error
    try:
        with seekable(file, progress) as content:
            table, number = parquet.ParquetFile(content), 0
            for batch in table.iter_batches(batch_size=256, columns=list(fields) or None):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number:,}", record
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from error


def _stars(record: dict[str, Any]) -> float:
    try:
        return float(record["star"])
    except (KeyError, TypeError, ValueError):
        raise Malformed('--min_star needs a number in the field "star"') from None
