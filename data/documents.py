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

import itertools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from configurator import UserError, note
from reading import RECORDS, File, read_text
from records import BODIES, LONGEST, Malformed, head_of, headed, json_array, json_lines, parquet_rows, stars_of, table

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
NORMALIZE = ("nfkc", "t2s", "strip")
SHOWN = 10  # malformed records that are told one by one


@dataclass
class Found:
    """What reading finds, to be told to the user. With `quiet`, as in a second reading, nothing is said at once."""

    quiet: bool = False
    encodings: Counter = field(default_factory=Counter)
    records: int = 0
    malformed: int = 0
    few_stars: int = 0
    empty: int = 0
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
        return self.join({name: field_text(record, name) for name in self.fields})

    def join(self, values: dict[str, str]) -> str:
        """The document of the fields' texts."""
        parts = self.parts
        if len(parts) > 1 and parts[1][1] and not values[parts[0][1]].strip():
            parts = (("", parts[1][1]), *parts[2:])
        return "".join(before + (values[name] if name else "") for before, name in parts)


def template_of(fields: list[str], template: str) -> Template:
    """The template that --fields and --template give. UserError where they do not fit together."""
    if not template:
        around = [""] * 2 if len(fields) == 1 else ["《", "》\n", *["\n"] * (len(fields) - 2), ""]
        parts = tuple((text, name) for text, name in zip(around, [*fields, None], strict=True) if text or name)
        return Template(tuple(fields), parts)
    parts: list[list[Any]] = [["", None]]  # what lies between braces that are doubled is no part of its own
    written = template.replace("\\n", "\n").replace("\\t", "\t")
    try:
        for text, name, spec, conversion in string.Formatter().parse(written):
            if spec or conversion:
                raise ValueError("a format or a conversion cannot be given")
            parts[-1][0] += text
            if name is not None:
                parts[-1][1] = name
                parts.append(["", None])
    except ValueError as error:
        raise UserError(f"--template={template}: {error}") from error
    names = [name for _, name in parts if name is not None]
    if fields:
        wrong = [name for name in names if name not in fields]
    else:  # as in Python's own templates, which reach into values: no field's name, unless --fields says so
        wrong = [name for name in names if name in ("", "0") or set(name) & set(".[]")]
    if wrong or not names:
        known = ", ".join(f"{{{name}}}" for name in fields) or "the names of fields in braces (of a table, 1 and so on)"
        raise UserError(
            f"--template={template}: expected text with {known}" + (f", not {{{wrong[0]}}}" if wrong else "")
        )
    return Template(tuple(dict.fromkeys(names)), tuple((text, name) for text, name in parts if text or name))


def field_text(record: dict[str, Any], name: str) -> str:
    value = record.get(name, Malformed)
    if value is Malformed:
        raise Malformed(f'no field "{name}" among {", ".join(map(str, record))[:200]}')
    if value is None or value != value:  # NaN, a table's way to say that there is nothing
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

    def read(
        self, progress: Callable[[int], Any] = lambda size: None, found: Found | None = None
    ) -> Iterator[str | None]:
        """Pieces of text, and None at the end of each document. UserError where a file cannot be read."""
        found = found or Found(quiet=True)
        for file in self.files:
            pieces = self._documents(file, progress, found)
            yield from self.normalized(pieces) if self.normalize else pieces

    def _documents(self, file: File, progress: Callable[[int], Any], found: Found) -> Iterator[str | None]:
        kind = self.kind_of(file)
        if kind == ".parquet":
            return self._records(parquet_rows(file, self._columns, progress), kind, file, found)
        pieces = read_text(file, self.encoding, self.errors, progress, lambda name: found.encoding(file, name))
        if kind == "text" and self.document == "text":
            return pieces
        if kind == "text" and self.document != "file":
            return split_documents(pieces, SEPARATORS[self.document])
        if kind == "text":
            head, pieces = head_of(pieces)
            if self.format != "auto" or not HEADER.match(head.lstrip("\n")):
                return one_document(pieces)
            kind = "essays"
        records = headed(pieces, kind, str(file)) if kind in FIELDS else self._out_of(pieces, kind, file)
        return self._records(records, kind, file, found)

    def _out_of(self, pieces: Iterator[str], kind: str, file: File) -> Iterator[tuple[str, Any]]:
        """(where, record) of a text that is .csv, .tsv, .json or JSON lines."""
        if kind in (".csv", ".tsv"):
            return table(pieces, "," if kind == ".csv" else "\t", self.fields, str(file))
        head, pieces = head_of(pieces)
        if kind == ".json" and head.lstrip().startswith("["):
            return json_array(pieces, str(file))
        return json_lines(pieces, str(file))

    def records(self, progress: Callable[[int], Any], found: Found) -> Iterator[tuple[str, Any]]:
        """(where, record, or a Malformed) of files of records. UserError where one has none, or cannot be read."""
        for file in self.files:
            if file.suffix == ".parquet":
                yield from parquet_rows(file, lambda names, where: names, progress)
            elif file.suffix in RECORDS:
                pieces = read_text(file, self.encoding, self.errors, progress, partial(found.encoding, file))
                yield from self._out_of(pieces, file.suffix, file)
            else:
                raise UserError(f"{file} is plain text; expected records, in a file of {', '.join(RECORDS)}")

    def _records(self, records: Iterable[tuple[str, Any]], kind: str, file: File, found: Found) -> Iterator[str | None]:
        filler: Template | None = None
        repeats_title = False
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
                        if SURROGATE.search("".join(record)):
                            raise Malformed("the name of a field cannot be decoded")
                        filler, name = self._filler(record, kind, str(file))
                        found.layout, repeats_title = found.layout or filler.layout, name == "wiki2019zh"
                    if self.min_star and not stars_of(record) >= self.min_star:
                        found.few_stars += 1
                        continue
                    values = {name: field_text(record, name) for name in filler.fields}
                    if repeats_title and values["text"].startswith(values["title"] + "\n"):
                        values["text"] = values["text"][len(values["title"]) :].lstrip("\n")
                    text = filler.join(values)
                if self.errors == "stop":
                    text.encode("utf-8")
            except UnicodeEncodeError:
                found.bad(where, "half a surrogate pair, which is no character")
                continue
            except Malformed as error:
                found.bad(where, error)
                continue
            if text := text.strip("\n"):
                yield text
                yield None
            else:
                found.empty += 1

    def _columns(self, names: list[str], where: str) -> list[str]:
        """Those of a table's columns that are read. UserError where it lacks them."""
        wanted = self.fields or self._filler(dict.fromkeys(names), ".parquet", where)[0].fields
        wanted = [*wanted, *(["star"] if self.min_star else [])]
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{where} has no column {missing[0]}: it has {', '.join(names)[:300]}")
        return wanted

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
            if kind == ".tsv" and list(record) == ["1", "2"] and str(record["2"]).isdigit():
                return template_of(["1"], ""), name
            raise UserError(
                f"{where}: which of its fields are the text? It has {', '.join(map(str, record))[:300]}: name them, "
                f"such as --fields={next(iter(record), 'text')}, or the corpus with --format="
            )
        return template_of([*(["title"] if "title" in record else []), bodies[0]], ""), name

    def normalized(self, pieces: Iterable[str | None]) -> Iterator[str | None]:
        """The same with the texts changed as `normalize` says, each document as if it were whole. UserError for one
        longer than LONGEST in which there is no place to cut it."""
        change, ended = normalizer(self.normalize), self.ended
        waiting: list[str] = []  # what no safe cut has been found in; only its end is looked at again
        size, begun = 0, False
        for piece in itertools.chain(pieces, [None]):  # a lone text has no end of its own
            if piece is not None:
                last = waiting[-1][-1:] if waiting else ""
                match = LAST_CUT.match(last + piece)
                if not match:
                    waiting.append(piece)
                    size += len(piece)
                    if size > LONGEST:
                        raise UserError(
                            f"{LONGEST:,} characters have no place where --normalize={','.join(self.normalize)} could "
                            "begin anew: break the text into lines"
                        )
                    continue
                cut = match.end() - len(last)
                text, waiting, size = "".join((*waiting, piece[:cut])), [piece[cut:]], len(piece) - cut
            else:
                text, waiting, size = "".join(waiting), [], 0
            if text := change(text, not begun, piece is None):
                begun = True
                yield text
            if piece is None:
                if begun and ended:
                    yield None
                begun = False


SEPARATORS = {"line": re.compile(r"\n(?:[^\S\n]*\n)*"), "blank": re.compile(r"\n(?:[^\S\n]*\n)+")}
BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)*")
HEADER = re.compile(r"---[^\S\n]*\n(?:.*\n){,9}[^\S\n]*标题[^\S\n]*[：:]")
# What never combines with anything before it, nor is white space: the scripts' letters without marks. And what is in no
# phrase that is converted as a whole, nor becomes so: ASCII, punctuation.
LETTERS = (
    "0-9A-Za-z\u00c0-\u00ff\u0100-\u017e\u0388-\u03ce\u0400-\u0481\u05d0-\u05ea\u0620-\u064a\u0904-\u0939\u0e01-\u0e30"
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U00020000-\U0002fa1f"
)
LAST_CUT = re.compile(rf"[\s\S]*[\x00-\x7f\u2010-\u2027\u3000-\u3002\u3008-\u3011\uff01-\uff5e](?=[{LETTERS}])")


@cache
def normalizer(names: tuple[str, ...]) -> Callable[[str, bool, bool], str]:
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
        steps.append(lambda text: text if SURROGATE.search(text) else convert(text))

    def change(text: str, begins: bool, ends: bool) -> str:
        for step in steps:
            text = step(text)
        if "strip" in names:
            text = re.sub(r"[^\S\n]*\n[^\S\n]*", "\n", re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text))
            text = text.lstrip() if begins else text
            text = text.rstrip() if ends else text
        return text

    return change


SURROGATE = re.compile("[\ud800-\udfff]")


def one_document(pieces: Iterable[str]) -> Iterator[str | None]:
    """One document without its trailing newlines, then None; nothing at all where there is only white space."""
    held: list[str] = []  # the white space that it begins with
    newlines, empty = 0, True
    for piece in pieces:
        if empty and piece.isspace():
            held.append(piece)
            continue
        piece, held, empty = "".join((*held, piece)), [], False
        if body := piece.rstrip("\n"):
            yield "\n" * newlines + body
            newlines = 0
        newlines += len(piece) - len(body)
    if not empty:
        yield None


def split_documents(pieces: Iterable[str], separator: re.Pattern) -> Iterator[str | None]:
    """The documents that the separator, line breaks with white space between, stands between; none of them empty."""
    held, begun = [""], False  # white space that may be part of a separator; whether a document has begun
    for piece in pieces:
        if not (body := piece.rstrip()):
            held.append(piece)
            continue
        text, held = "".join((*held, body)), [piece[len(body) :]]
        if not begun:
            text, begun = text[BLANK_LINES.match(text).end() :], True
        first, *others = separator.split(text)
        if first:
            yield first
        for part in others:
            yield None
            yield part
    if begun:
        if rest := "".join(held).partition("\n")[0]:
            yield rest
        yield None
