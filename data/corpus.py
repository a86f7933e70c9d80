"""Documents into train.bin, val.bin and meta.json, in bounded memory.

Notable choices:
- Everything is read twice in pieces: once to survey it (which documents are kept, which are for validation, which
  characters there are), once to encode and write. In between, a byte is kept for each document, and nothing of it.
- One file is one text: nanoGPT's cut, nothing added, so the .bin files are byte for byte nanoGPT's. Documents are each
  followed by <|endoftext|>, and the hash of its text says whether one is for validation: it stays there whatever is
  added to the corpus.
- A BPE is only ever cut where its pre-tokenizer cuts too, so the pieces' ids are the whole text's ids.
"""

import hashlib
import http.client
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import urllib.request
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from charset import check_encoding
from configurator import Config, UserError, note, user_errors
from documents import FORMATS, NORMALIZE, Found, Source, normalizer, template_of
from reading import files_in
from tokenizer import (
    CODE_POINTS,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    code_points,
    hf_tokenizer,
    last_cut,
    load_tokenizer,
    train_bpe,
)
from writing import SPLITS, DatasetWriter, end_text, held, progress_bar

CHUNK = 2**18  # characters counted and encoded at once, few enough to stay in a cache
LEFT_OUT = len(SPLITS)  # the fate of a document that is in neither
BPE_SAMPLE = 10_000_000  # characters that a BPE is trained on, evenly taken from a larger text: 2.4 GB in Chinese
DEFAULTS = {  # what a prepare.py that lacks a setting means
    "input": [], "val_input": [], "encoding": "auto", "errors": "stop", "normalize": "none", "format": "auto",
    "fields": "", "template": "", "min_star": 0.0, "max_bad": "0.1%", "document": "auto", "dedup": False,
    "min_chars": 1, "val_fraction": 0.1, "tokenizer": "char", "vocab_size": 8192, "byte_fallback": True,
    "min_count": 1, "num_proc": 1, "dest": "",
}  # fmt: skip
TINY_SHAKESPEARE = (  # its address and its SHA-256
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def open_source(inputs: list[str], config: Config, flag: str = "input") -> Source:
    """What the settings of a prepare.py say about reading `inputs`, given by --flag. UserError where they are wrong."""
    o = Config(**(DEFAULTS | vars(config)))
    check_encoding(o.encoding)
    for key, known in (("errors", ("stop", "skip")), ("format", FORMATS),
                       ("document", ("auto", "text", "file", "blank", "line"))):  # fmt: skip
        if getattr(o, key) not in known:
            raise UserError(f"--{key}={getattr(o, key)}: expected {', '.join(known)}")
    steps = tuple(step.strip() for step in o.normalize.split(",") if step.strip() not in ("", "none"))
    if wrong := [step for step in steps if step not in NORMALIZE]:
        raise UserError(f"--normalize={wrong[0]}: expected {', '.join(NORMALIZE)}, or several with commas, or none")
    normalizer(steps)  # which needs its packages now, not after an hour
    fields = tuple(name.strip() for name in o.fields.split(",") if name.strip())
    if fields or o.template:
        fields = template_of(list(fields), o.template).fields
    files = tuple(files_in(inputs, flag))
    document = o.document
    if document == "auto":
        document = "text" if len(files) == 1 and not Path(inputs[0]).is_dir() else "file"
    return Source(files, document, o.format, fields, o.template, o.encoding, o.errors, steps, o.min_star)


class CharacterCounts:
    """How often each code point occurs, counted in large batches."""

    def __init__(self) -> None:
        self._counts = np.zeros(CODE_POINTS, np.int64)
        self._waiting: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        self._waiting.append(text)
        self._size += len(text)
        if self._size >= CHUNK:
            self._count()

    def _count(self) -> None:
        found = np.bincount(code_points("".join(self._waiting)))
        self._counts[: len(found)] += found
        self._waiting, self._size = [], 0

    def merge(self, others: "CharacterCounts") -> None:
        """Adds what the others have counted."""
        others._count()
        self._counts += others._counts

    def characters(self, min_count: int = 1) -> dict[str, int]:
        """The characters that occur at least `min_count` times and how often, in code-point order."""
        if self._waiting:
            self._count()
        codes = np.flatnonzero(self._counts >= max(1, min_count))
        return {chr(c): n for c, n in zip(codes.tolist(), self._counts[codes].tolist(), strict=True)}

    def unknown(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Those of the characters that have no token of their own, and how often each occurs."""
        known = set(tokenizer.chars) if isinstance(tokenizer, CharTokenizer) else None
        return {} if known is None else {c: n for c, n in self.characters().items() if c not in known}


def choose_tokenizer(name: str) -> Tokenizer | None:
    """The tokenizer that --tokenizer names; None for "char" and "bpe", made of the text. UserError where not found."""
    if name in ("char", "bpe"):
        return None
    if name == "gpt2":
        return GPT2Tokenizer()
    path = Path(name)
    checkpoints = [path] if path.suffix == ".pt" else [path / "ckpt.pt", path / "last.pt"]
    if any(p.is_file() for p in checkpoints):
        import checkpoint

        return checkpoint.load_tokenizer_of(name)
    if any((path / p).is_file() for p in ("meta.json", "meta.pkl", "train.bin")):
        return load_tokenizer(path)
    if tokenizer := hf_tokenizer(path):
        return tokenizer
    raise UserError(
        f"--tokenizer={name}: expected char, bpe, gpt2, or the path of a dataset folder, an out_dir, a .pt file or a "
        "Hugging Face folder whose vocabulary is to be used again, and there is none of these"
    )


def check_options(config: Config) -> Tokenizer | None:
    """What choose_tokenizer gives, ready to encode. UserError, before any work, for settings that make no sense."""
    o = Config(**(DEFAULTS | vars(config)))
    chosen = choose_tokenizer(o.tokenizer)
    if not 0 < o.val_fraction < 1:
        raise UserError(f"--val_fraction={o.val_fraction}: expected a part of the text between 0 and 1, such as 0.1")
    for key in ("min_count", "min_chars", "num_proc"):
        if getattr(o, key) < 1:
            raise UserError(f"--{key}={getattr(o, key)}: expected 1 or more")
    if o.min_count > 1 and (o.tokenizer != "char" or not o.byte_fallback):
        raise UserError(
            f"--min_count={o.min_count} needs --tokenizer=char and --byte_fallback=True, for the rarer ones"
        )
    if o.tokenizer == "bpe" and not 257 < o.vocab_size <= 2**24:
        raise UserError(f"--vocab_size={o.vocab_size}: expected more than 257 (the bytes and <|endoftext|>)")
    share_of(o.max_bad)
    if o.tokenizer == "bpe" and importlib.util.find_spec("tokenizers") is None:
        raise UserError("--tokenizer=bpe needs a package: pip install tokenizers")
    if chosen is not None:
        chosen.encode("")  # which needs its library and its files now, not after an hour
    return chosen


def char_tokenizer(counts: CharacterCounts, min_count: int, byte_fallback: bool, end_of_text: bool) -> CharTokenizer:
    """The vocabulary of a counted text, in code-point order, without characters rarer than `min_count`."""
    return CharTokenizer("".join(counts.characters(min_count)), byte_fallback, end_of_text)


@dataclass
class Survey:
    """What the first reading tells. Pairs are (for training, for validation)."""

    found: Found = field(default_factory=Found)
    counts: CharacterCounts = field(default_factory=CharacterCounts)
    documents: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])
    fates: bytearray = field(default_factory=bytearray)  # for each document, the number of its split, or LEFT_OUT
    left_out: Counter = field(default_factory=Counter)  # how many documents, by reason
    cut: int | None = None  # where the one text there is is cut, in characters


def survey(sources: list[Source], o: Config, ended: bool, progress: Callable[[int], Any]) -> Survey:
    """Reads it all once. One source is split, of two the second is for validation. UserError where nothing is left."""
    s = Survey()
    if ended:
        _survey_documents(s, sources, o, progress)
    else:
        for part, source in enumerate(sources):
            for piece in source.read(progress, s.found):
                if source.errors == "skip" and "\udcff" in piece:
                    raise UserError(
                        f"{source.files[0]} is one text with bytes that cannot be decoded, and nothing would be left "
                        "without it: make documents of it with --document=line or --document=blank"
                    )
                s.counts.add(piece)
                s.characters[part] += len(piece)
        s.documents = [1, len(sources) - 1]
    check_malformed(s.found, o.max_bad)
    named = str(sources[0].files[0]) if len(sources[0].files) == 1 else f"these {len(sources[0].files)} files"
    if not sum(s.characters):
        reasons = left_out(s)
        raise UserError(f"{named}: there is no text" + (f" left; left out: {reasons}" if reasons else " in it"))
    if len(sources) == 1 and sum(s.documents) == 1:
        size = sum(s.characters)
        s.cut = int(size * (1 - o.val_fraction))
        if not 0 < s.cut < size:
            raise UserError(
                f"{named}: {size} characters are too few to split with --val_fraction={o.val_fraction}; give more text"
            )
        s.documents, s.characters = [1, 0], [s.cut, size - s.cut]
    elif not all(s.characters):
        raise UserError(f"--{'val_' if s.characters[0] else ''}input: nothing is left of it")
    return s


def _survey_documents(s: Survey, sources: list[Source], o: Config, progress: Callable[[int], Any]) -> None:
    seen, kept = Seen(), []  # (hash, number, characters) of the documents with the lowest and the highest hash
    for part, source in enumerate(sources):
        document = Document()
        for piece in source.read(progress, s.found):
            if piece is not None:
                document.add(piece)
                continue
            if not document.size:
                continue
            number = document.number()
            split = part if len(sources) > 1 else int(number < o.val_fraction * 2**64)
            reason = _reason_to_leave_out(document, seen, o)
            if reason:
                s.left_out[reason] += 1
                split = LEFT_OUT
            else:
                this = (number, len(s.fates), document.size)
                kept = [min(*kept, this), max(*kept, this)] if kept else [this, this]
                s.documents[split] += 1
                s.characters[split] += document.size
                document.count(s.counts)
            s.fates.append(split)
            document = Document()
    if len(sources) == 1 and sum(s.documents) > 1 and not all(s.documents):
        to = s.documents.index(0)  # too few documents for this fraction: the nearest one makes a split of its own
        _, number, size = kept[1 - to]
        s.fates[number] = to
        for pair, amount in ((s.documents, 1), (s.characters, size)):
            pair[to], pair[1 - to] = amount, pair[1 - to] - amount


def _reason_to_leave_out(document: "Document", seen: "Seen", o: Config) -> str:
    if document.undecodable:
        return "not decodable"
    if document.size < o.min_chars:
        return f"shorter than {o.min_chars} characters"
    return "seen before" if o.dedup and not seen.add(document.number()) else ""


class Document:
    """A document as it is read: its hash, its size, its characters."""

    def __init__(self) -> None:
        self.size, self.undecodable = 0, False
        self._hash = hashlib.blake2b(digest_size=8)
        self._texts: list[str] = []
        self._counts: CharacterCounts | None = None  # of a long one, whose text is not kept

    def add(self, piece: str) -> None:
        self.size += len(piece)
        try:
            self._hash.update(piece.encode("utf-8"))
        except UnicodeEncodeError:  # bytes that could not be decoded
            self.undecodable = True
            return
        self._texts.append(piece)
        if self.size > CHUNK and len(self._texts) > 1:
            self._counts = self._counts or CharacterCounts()
            self.count(self._counts)
            self._texts = []

    def number(self) -> int:
        """A number from 0 to 2**64 - 1 that is the same for the same text."""
        return int.from_bytes(self._hash.digest(), "little")

    def count(self, counts: CharacterCounts) -> None:
        """Adds its characters to the counts."""
        for text in self._texts:
            counts.add(text)
        if self._counts is not None and self._counts is not counts:
            counts.merge(self._counts)


class Seen:
    """A set of 64-bit numbers in 8 to 32 bytes each, where Python's own takes a hundred."""

    def __init__(self) -> None:
        self._table, self._count = array("Q", bytes(8 * 1024)), 0  # open addressing; 0 is an empty place

    def add(self, number: int) -> bool:
        """Whether it is new."""
        number = number or 1
        mask = len(self._table) - 1
        at = number & mask
        while found := self._table[at]:
            if found == number:
                return False
            at = (at + 1) & mask
        self._table[at] = number
        self._count += 1
        if 2 * self._count > len(self._table):
            old, self._table, self._count = self._table, array("Q", bytes(16 * len(self._table))), 0
            for found in filter(None, old):
                self.add(found)
        return True


def check_malformed(found: Found, max_bad: str) -> None:
    """UserError where there are more malformed records than this share."""
    allowed = share_of(max_bad)
    if found.malformed > (max(1, allowed * found.records) if allowed else 0):  # a small file may have one
        raise UserError(
            f"{found.malformed:,} of {found.records:,} records are malformed, more than --max_bad={max_bad}: "
            "mend them, or allow more (a .json file is one array, or has an object in each line)"
        )


def share_of(text: str) -> float:
    """A share such as 0.1% or 0.001. UserError where it is none."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--max_bad={text}: expected a share, such as 0.1% or 0.001")
    return share


def prepare(source: Source, config: Config, here: str | Path, layout: str = "") -> dict[str, Any]:
    """Writes `source` as a dataset into config.dest, or `here`, prints a summary, and gives meta.json.

    The config is that of a prepare.py, see DEFAULTS; `layout` is how a document of plain text is laid out. UserError
    where it cannot.
    """
    with held(config.dest or here) as folder:
        return _prepare(source, Config(**(DEFAULTS | vars(config))), check_options(config), folder, layout)


def _prepare(source: Source, o: Config, chosen: Tokenizer | None, folder: Path, layout: str) -> dict[str, Any]:
    sources = [source] + ([open_source(o.val_input, o, "val_input")] if o.val_input else [])
    ended = any(source.ended for source in sources)
    if not ended and (o.dedup or o.min_chars > 1):
        note("note: one text has no documents to leave out: --dedup and --min_chars need --document=line or blank")
    if ended:
        sources = [replace(s, document="file") if s.document == "text" else s for s in sources]
    with user_errors(OSError, about="cannot read the text"):
        size = sum(path.stat().st_size for path in {file.path for s in sources for file in s.files})
    with progress_bar(size, "reading") as progress:
        s = survey(sources, o, ended, progress)
    layout = s.found.layout or layout
    if chosen is None and o.tokenizer == "bpe":
        stride = -(-sum(s.characters) // BPE_SAMPLE)
        with progress_bar(size, "training the BPE") as progress:
            parts = encodable(sources, s, last_cut, progress)
            texts = (
                text for number, (split, text, _) in enumerate(parts) if split == SPLITS[0] and number % stride == 0
            )
            chosen = train_bpe(texts, o.vocab_size)
    elif chosen is None:
        chosen = char_tokenizer(s.counts, o.min_count, o.byte_fallback, ended)
    unknown = s.counts.unknown(chosen)
    if unknown and not chosen.byte_fallback:
        raise chosen.unknown_error(_first_positions(sources, s, chosen))
    if ended and chosen.end_of_text is None:
        raise UserError(
            f"--tokenizer={o.tokenizer}: this vocabulary has no token to end {sum(s.documents)} documents with; give "
            "one file, or --tokenizer=char for a new vocabulary"
        )

    with DatasetWriter(folder, chosen) as writer:
        done = 0
        with progress_bar(size, "encoding") as progress, encoder(chosen, o.num_proc) as encode:
            for split, texts, ends, ids in encode(batches(encodable(sources, s, chosen.last_cut, progress))):
                writer.write(split, ids, expected(chosen, texts, ends) if writer.checks(split) else None)
                done += sum(map(len, texts))
        if done != sum(s.characters):
            raise UserError("the text changed while it was being read; run again")
        return writer.finish(
            documents=s.documents,
            characters=s.characters,
            distinct=len(s.counts.characters()),
            unknown=sum(unknown.values()),
            template=layout,
            notes=notes_of(s, o, ended),
        )


def left_out(s: Survey) -> str:
    """How many documents are left out, and why."""
    found = s.left_out + Counter({"malformed": s.found.malformed, "of too few stars": s.found.few_stars})
    found += Counter({"without text": s.found.empty})
    return ", ".join(f"{n:,} {reason}" for reason, n in found.items())


def notes_of(s: Survey, o: Config, ended: bool) -> list[str]:
    """What a reader of the summary should know besides."""
    lines = []
    if s.found.encodings:
        names = (f"{name} ({n:,} file{'s' * (n > 1)})" for name, n in s.found.encodings.most_common())
        lines.append("encodings: " + ", ".join(names))
    odd = s.counts.characters()
    kept = {"U+3000 (ideographic space)": odd.get("\u3000"), "NUL": odd.get("\0"), "U+FFFD": odd.get("\ufffd")}
    if any(kept.values()):
        lines.append("kept as they are: " + ", ".join(f"{n:,} {name}" for name, n in kept.items() if n))
    if reasons := left_out(s):
        lines.append(f"left out: {reasons}")
    share = s.characters[1] / sum(s.characters)
    if ended and s.cut is None and not o.val_input and not 0.5 < share / o.val_fraction < 2:
        lines.append(f"note: {share:.1%} of the characters are for validation, as documents are kept whole")
    return lines


def encodable(
    sources: list[Source], s: Survey, last_cut: Callable[[str, int], int], progress: Callable[[int], Any]
) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether a document ends behind it), with texts that may be encoded one by one."""
    number, inside, position, waiting, fate = -1, False, 0, "", 0  # `waiting` begins at `position` of the document
    for part, source in enumerate(sources):
        for piece in source.read(progress):
            if piece is None:
                if inside and fate != LEFT_OUT:
                    yield SPLITS[fate], waiting, True
                inside, waiting = False, ""
                continue
            if not inside:
                number, inside, position = number + 1, True, 0
                if s.fates and number == len(s.fates):
                    raise UserError("the text changed while it was being read; run again")
                fate = s.fates[number] if s.fates else part
                fate = 0 if s.cut is not None and fate != LEFT_OUT else fate
            if fate == LEFT_OUT:
                continue
            searched = max(0, len(waiting) - 1)
            waiting += piece
            if s.cut is not None and position < s.cut <= position + len(waiting):
                at = s.cut - position
                yield SPLITS[0], waiting[:at], False
                waiting, position, fate, searched = waiting[at:], s.cut, 1, 0
            if size := last_cut(waiting, searched):
                yield SPLITS[fate], waiting[:size], False
                waiting, position = waiting[size:], position + size
        if waiting:
            yield SPLITS[fate], waiting, False
        inside, waiting = False, ""


def batches(parts: Iterable[tuple[str, str, bool]]) -> Iterator[tuple[str, list[str], list[bool]]]:
    """(split, texts, whether a document ends behind each), up to about CHUNK characters at once."""
    waiting: dict[str, tuple[list[str], list[bool]]] = {split: ([], []) for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text, ends in parts:
        for items, item in zip(waiting[split], (text, ends), strict=True):
            items.append(item)
        sizes[split] += len(text) + 1
        if sizes[split] >= CHUNK:
            yield split, *waiting[split]
            waiting[split], sizes[split] = ([], []), 0
    for split in SPLITS:
        if waiting[split][0]:
            yield split, *waiting[split]


def encode_batch(tokenizer: Tokenizer, texts: list[str], ends: list[bool]) -> np.ndarray:
    """The ids of a batch, with <|endoftext|> where a document ends."""
    end = np.array([tokenizer.end_of_text], tokenizer.dtype) if any(ends) else None
    parts = []
    for ids, is_end in zip(tokenizer.encode_batch(texts), ends, strict=True):
        parts.append(ids)
        if is_end:
            parts.append(end)
    return np.concatenate(parts)


def expected(tokenizer: Tokenizer, texts: list[str], ends: list[bool]) -> str:
    """What the ids of a batch are to be decoded to."""
    return "".join(text + end_text(tokenizer) * is_end for text, is_end in zip(texts, ends, strict=True))


@contextmanager
def encoder(tokenizer: Tokenizer, num_proc: int) -> Iterator[Callable]:
    """A function from batches to (split, texts, ends, ids), in their order: in `num_proc` processes, or with 1 in this
    one, where the libraries of BPE use all cores as well."""
    if num_proc == 1:
        yield lambda batches: ((split, t, e, encode_batch(tokenizer, t, e)) for split, t, e in batches)
        return

    def encode(batches: Iterable) -> Iterator:
        waiting: deque = deque()
        for split, texts, ends in batches:
            waiting.append((split, texts, ends, pool.submit(encode_batch, tokenizer, texts, ends)))
            if len(waiting) > 2 * num_proc:
                *batch, future = waiting.popleft()
                yield *batch, future.result()
        for *batch, future in waiting:
            yield *batch, future.result()

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, context, _work_for_the_parent) as pool:
        try:
            yield encode
        except BrokenProcessPool as error:
            raise UserError("a process that encodes was killed, for lack of memory?: lower --num_proc") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _work_for_the_parent() -> None:
    """In a process that encodes: Ctrl-C is the parent's affair, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_positions(sources: list[Source], s: Survey, tokenizer: CharTokenizer) -> dict[str, int]:
    """Characters that the vocabulary lacks, with their first positions in the whole text; stops after ten."""
    found, position = {}, 0
    for _, text, _ in encodable(sources, s, tokenizer.last_cut, lambda size: None):
        for character, at in tokenizer.unknown(text).items():
            found.setdefault(character, position + at)
        position += len(text)
        if len(found) > 10:
            break
    return found


def tiny_shakespeare(here: Path) -> str:
    """The path of tiny shakespeare, `here`/input.txt, downloaded if need be. UserError where it cannot be had."""
    path = here / "input.txt"
    url, sha256 = TINY_SHAKESPEARE
    if not path.is_file():
        fetch(url, path, sha256)
    return str(path)


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads `url` to `path`, whole and with this SHA-256. UserError where it cannot."""
    beside, digest = path.with_name(path.name + ".tmp"), hashlib.sha256()
    by_hand = f"get {url} by other means (its sha256 is {sha256}) and save it as {path}"
    print(f"downloading {url}", file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, beside.open("wb") as file:
            while data := response.read(CHUNK):
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != sha256:
            raise UserError(f"{url} gave a file with the sha256 {digest.hexdigest()}, not the expected one: {by_hand}")
        os.replace(beside, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({error}): {by_hand}, or give a text of your own with --input"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
