"""Text files into train.bin, val.bin and meta.json, in bounded memory.

Notable choices:
- Everything is read twice in pieces: once to count characters (the vocabulary, the split), once to encode and write.
- One file is one text: nanoGPT's cut, nothing added, so the .bin files are byte for byte nanoGPT's. The documents of
  a folder, or of several files, are each followed by <|endoftext|>, and the split falls between them.
- GPT-2's BPE is only ever cut where its pre-tokenizer cuts too, so the pieces' ids are the whole text's ids.
- The new files are written beside the old ones and replace them when all are whole and read back as the text.
"""

import codecs
import hashlib
import http.client
import io
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configurator import Config, UserError, user_errors
from tokenizer import (
    CODE_POINTS,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    code_points,
    hf_tokenizer,
    load_tokenizer,
)

CHUNK = 2**20  # bytes read at once, and characters counted and checked at once
SPLITS = ("train", "val")
TINY_SHAKESPEARE = (  # its address and its SHA-256
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


@dataclass(frozen=True)
class Source:
    """Where a text comes from. `mode`: "text" (one file, one text), "files" (each file is a document) or "blank" (blank
    lines stand between documents). `template`: how the documents are laid out, for meta.json."""

    files: tuple[Path, ...]
    encoding: str = "utf-8"
    mode: str = "text"
    template: str = ""

    def read(self, progress: Callable[[int], Any] = lambda size: None) -> Iterator[str | None]:
        """The text in pieces that are not empty; None after each document, save in mode "text"."""
        if self.mode == "blank":
            yield from _blank_line_documents(self._pieces(self.files[0], progress))
            return
        for path in self.files:
            pieces = self._pieces(path, progress)
            if self.mode == "text":
                yield from pieces
            else:
                yield from _document(pieces)

    def _pieces(self, path: Path, progress: Callable[[int], Any]) -> Iterator[str]:
        return read_text(path, self.encoding, progress)


def open_inputs(inputs: list[str], encoding: str) -> Source:
    """A Source of files and of folders' .txt files. UserError where there are none."""
    try:
        codecs.lookup(encoding)
        "a".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UserError(f"--encoding={encoding}: no such text encoding; try utf-8, gb18030, big5 or utf-16") from error
    files = files_in(inputs, (".txt",))
    lone = len(files) == 1 and not Path(inputs[0]).is_dir()
    return Source(tuple(files), encoding, "text" if lone else "files")


def files_in(inputs: list[str], suffixes: tuple[str, ...]) -> list[Path]:
    """The files among `inputs`, and the folders' files with these suffixes, at any depth, sorted, none hidden."""
    files: list[Path] = []
    for name in inputs:
        if not name:
            raise UserError("--input= is empty: expected a file or a folder")
        path = Path(name)
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file() and p.name[0] != "."]
            if not found:
                raise UserError(f"--input={name}: there is no {' or '.join(suffixes)} file in this folder or below")
            files += sorted(found, key=lambda p: p.relative_to(path).as_posix())
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"--input={name}: there is no such file or folder")
    return files


def read_text(path: Path, encoding: str, progress: Callable[[int], Any] = lambda size: None) -> Iterator[str]:
    """The file's text in pieces, line ends as \\n, without a byte order mark. UserError where it cannot be decoded.

    `progress` is called with the number of bytes of each piece.
    """
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    read = 0
    try:
        with path.open("rb") as file:
            while True:
                data = file.read(CHUNK)
                read += len(data)
                text = decoder.decode(data, final=not data)
                if text:
                    yield text
                if not data:
                    return
                progress(len(data))
    except UnicodeDecodeError as error:
        at = read - len(error.object) + error.start
        wrong = error.object[error.start : max(error.end, error.start + 4)].hex(" ")
        others = [e for e in ("utf-8", "gb18030", "big5", "utf-16") if codecs.lookup(e) != codecs.lookup(encoding)]
        remedy = ", ".join(f"--encoding={e}" for e in others if not (e == "utf-8" and encoding == "utf-8-sig"))
        name = encoding.removesuffix("-sig")
        raise UserError(
            f"{path} is not {name}: byte {at:,} and what follows ({wrong}) cannot be decoded; name the file's encoding "
            f"({remedy}), or save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _document(pieces: Iterable[str]) -> Iterator[str | None]:
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


def _blank_line_documents(pieces: Iterable[str]) -> Iterator[str | None]:
    rest = ""
    for piece in pieces:
        *documents, rest = (rest + piece).split("\n\n")
        for document in documents:
            yield from _document([document.strip("\n")] if document else [])
    yield from _document([rest.strip("\n")])


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
    """The tokenizer that --tokenizer names; None for "char", which is made from the text. UserError where not found."""
    if name == "char":
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
        f"--tokenizer={name}: expected char, gpt2, or the path of a dataset folder, an out_dir, a .pt file or a "
        "Hugging Face folder whose vocabulary is to be used again, and there is none of these"
    )


def check_options(tokenizer: Tokenizer | None, val_fraction: float, min_count: int, byte_fallback: bool) -> None:
    """UserError for settings that make no sense, before any work. `tokenizer` is what choose_tokenizer gave."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction}: expected a part of the text between 0 and 1, such as 0.1")
    if min_count < 1:
        raise UserError(f"--min_count={min_count}: expected 1 (every character has its own token) or more")
    if min_count > 1 and (tokenizer is not None or not byte_fallback):
        raise UserError(f"--min_count={min_count} needs --tokenizer=char and --byte_fallback=True, for the rarer ones")


def end_text(tokenizer: Tokenizer) -> str:
    """The text of its end-of-text token: <|endoftext|>, but for some of Hugging Face's; empty where it has none."""
    return "" if tokenizer.end_of_text is None else tokenizer.decode([tokenizer.end_of_text])


def char_tokenizer(counts: CharacterCounts, min_count: int, byte_fallback: bool, end_of_text: bool) -> CharTokenizer:
    """The vocabulary of a counted text, in code-point order, without characters rarer than `min_count`."""
    return CharTokenizer("".join(counts.characters(min_count)), byte_fallback, end_of_text)


def prepare(source: Source, config: Config, here: Path) -> dict[str, Any]:
    """Writes `source` as a dataset into config.dest, or `here`, prints a summary, and gives meta.json.

    The config is that of a prepare.py: tokenizer, val_fraction, min_count, byte_fallback. UserError where it cannot.
    """
    folder, tokenizer, val_fraction = config.dest or here, config.tokenizer, config.val_fraction
    min_count, byte_fallback = config.min_count, config.byte_fallback
    chosen = choose_tokenizer(tokenizer)
    check_options(chosen, val_fraction, min_count, byte_fallback)
    with user_errors(OSError, about="cannot read the text"):
        size = sum(path.stat().st_size for path in source.files)
    counts, lengths = CharacterCounts(), [0]  # characters of each document
    with progress_bar(size, "counting") as progress:
        for piece in source.read(progress):
            if piece is None:
                lengths.append(0)
            else:
                counts.add(piece)
                lengths[-1] += len(piece)
    lengths = lengths if lengths[-1] else lengths[:-1]
    characters, ended = sum(lengths), source.mode != "text"  # whether end-of-text follows each document
    named = str(source.files[0]) if len(source.files) == 1 else f"these {len(source.files)} files"
    if not characters:
        raise UserError(f"{named}: there is no text in it")
    cut = int(characters * (1 - val_fraction))
    if len(lengths) > 1:
        starts = np.cumsum([0, *lengths[:-1]])
        first = int(np.searchsorted(starts, characters * (1 - val_fraction)))
        cut = int(starts[min(first, len(lengths) - 1)])
    if not 0 < cut < characters:
        raise UserError(
            f"{named}: {characters} characters are too few to split with --val_fraction={val_fraction}; give more text"
        )
    if chosen is None:
        chosen = char_tokenizer(counts, min_count, byte_fallback, ended)
    occurring, unknown = counts.characters(), counts.unknown(chosen)
    if unknown and not chosen.byte_fallback:
        raise chosen.unknown_error(_first_positions(source, chosen))
    if ended and chosen.end_of_text is None:
        raise UserError(
            f"--tokenizer={tokenizer}: this vocabulary has no token to end {len(lengths)} documents with; give "
            "one file, or --tokenizer=char for a new vocabulary"
        )

    with DatasetWriter(folder, chosen) as writer:
        done = 0
        with progress_bar(size, "encoding") as progress:
            for split, text in _encodable(source.read(progress), cut, chosen):
                if text is not None:
                    writer.write(split, chosen.encode(text), text)
                    done += len(text)
                elif ended:
                    writer.write(split, np.array([chosen.end_of_text], chosen.dtype), end_text(chosen))
        if done != characters:
            raise UserError(f"{named}: the text changed while it was being read; run again")
        return writer.finish(
            documents=len(lengths),
            characters=characters,
            distinct=len(occurring),
            unknown=sum(unknown.values()),
            template=source.template,
        )


def _first_positions(source: Source, tokenizer: CharTokenizer) -> dict[str, int]:
    """Characters that the vocabulary lacks, with their first positions in the whole text; stops after ten."""
    found, position = {}, 0
    for piece in source.read():
        for character, at in tokenizer.unknown(piece or "").items():
            found.setdefault(character, position + at)
        position += len(piece or "")
        if len(found) > 10:
            break
    return found


def _encodable(pieces: Iterable[str | None], cut: int, tokenizer: Tokenizer) -> Iterator[tuple[str, str | None]]:
    """(split, text) with texts that may be encoded one by one, and (split, None) at the end of a document."""
    split, position, waiting = SPLITS[0], 0, ""  # `waiting` begins at `position`

    def take(size: int) -> tuple[str, str]:
        nonlocal split, position, waiting
        text, waiting = waiting[:size], waiting[size:]
        split = SPLITS[position >= cut]
        position += size
        return split, text

    for piece in pieces:
        if piece is None:
            if waiting:
                yield take(len(waiting))
            yield split, None
            continue
        searched = max(0, len(waiting) - 1)
        waiting += piece
        if position < cut <= position + len(waiting):
            yield take(cut - position)
            searched = 0
        if size := tokenizer.last_cut(waiting, searched):
            yield take(size)
    if waiting:
        yield take(len(waiting))


class DatasetWriter:
    """train.bin, val.bin and meta.json in a folder: beside the old ones until `finish`, which replaces those.

    A context manager; whatever ends it before `finish` is done leaves the old files as they were and no new ones.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        self._stored = np.dtype(tokenizer.dtype).newbyteorder("<")
        self._files: dict[str, Any] = {}
        self._hashes = {split: hashlib.sha256() for split in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._max_id = -1
        self._sample: list[str] = []  # the text of the first `_sample_tokens` of train.bin
        self._sample_size = self._sample_tokens = 0

    def __enter__(self) -> "DatasetWriter":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                self._files[split] = self._beside(f"{split}.bin").open("wb", buffering=2**20)
        except OSError as error:
            self._discard()
            raise self._cannot_write(error) from error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._discard()
        if isinstance(error, OSError):
            raise self._cannot_write(error) from error

    def write(self, split: str, ids: np.ndarray, text: str | None = None) -> None:
        """Appends ids. `text`, where known, is what they should decode to; `finish` checks the first of it."""
        if len(ids) == 0:
            return
        if split == SPLITS[0] and text is not None and self._sample_tokens == self._tokens[split]:
            if self._sample_size < CHUNK:
                self._sample.append(text)
                self._sample_size += len(text)
                self._sample_tokens += len(ids)
        data = ids.astype(self._stored, copy=False).tobytes()
        self._files[split].write(data)
        self._hashes[split].update(data)
        self._tokens[split] += len(ids)
        self._max_id = max(self._max_id, int(ids.max()))

    def finish(
        self, *, documents: int, characters: int, distinct: int | None, unknown: int, template: str = ""
    ) -> dict[str, Any]:
        """Checks what was written, puts it in place of the old files, prints a summary, gives meta.json's content.

        `distinct` counts the text's distinct characters (None: not counted), `unknown` the occurrences of those without
        a token of their own.
        """
        for split, file in self._files.items():
            if not self._tokens[split]:
                raise UserError(f"{split}.bin would be empty: give more text, or another --val_fraction")
            file.flush()
            os.fsync(file.fileno())
            file.close()
        ids = np.fromfile(self._beside("train.bin"), self._stored, self._sample_tokens)
        sample = "".join(self._sample)
        if self.tokenizer.lossless and self.tokenizer.decode(ids) != sample:
            raise UserError(
                f"round trip: the ids in {self._beside('train.bin')} are not the text; nothing was replaced"
            )
        checked = len(sample) - len(end_text(self.tokenizer)) * int((ids == self.tokenizer.end_of_text).sum())
        files = {
            f"{split}.bin": {
                "bytes": self._tokens[split] * self._stored.itemsize,
                "sha256": self._hashes[split].hexdigest(),
                "tokens": self._tokens[split],
            }
            for split in SPLITS
        }
        tokens = sum(self._tokens.values())
        meta = self.tokenizer.meta() | ({"template": template} if template else {})
        meta |= {"max_id": self._max_id, "documents": documents, "characters": characters, "tokens": tokens}
        meta |= {"unknown_characters": unknown, "files": files}
        with self._beside("meta.json").open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name in (*files, "meta.json"):
            os.replace(self._beside(name), self.folder / name)
        (self.folder / "meta.pkl").unlink(missing_ok=True)

        line = next((line for line in sample.split("\n") if line.strip()), "")
        pieces = self.tokenizer.pieces(self.tokenizer.encode(line[:200]))
        print(f"documents: {documents:,}")
        kinds = "" if distinct is None else f"{distinct:,} distinct, {unknown:,} unknown (without a token of their own)"
        print(f"characters: {characters:,}" + (f", {kinds}" if kinds else ""))
        print(f"tokens: {tokens:,} of {self.tokenizer.vocab_size:,} kinds (train {self._tokens['train']:,}, ", end="")
        print(f"val {self._tokens['val']:,}), {characters / tokens:.2f} characters per token")
        print(f"first line: {'|'.join(pieces[:60])}{'|…' if len(pieces) > 60 or len(line) > 200 else ''}")
        if self.tokenizer.lossless:
            print(f"round trip: identical (read back and compared: the first {checked:,} characters)")
        else:
            print("round trip: not compared, as this tokenizer does not keep all of a text (spaces, capitals)")
        print(f"written: {', '.join(str(self.folder / name) for name in (*files, 'meta.json'))}")
        return meta

    def _beside(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"

    def _discard(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing flushes, which a full disk refuses
                file.close()
        for name in (*(f"{split}.bin" for split in SPLITS), "meta.json"):
            with suppress(OSError):
                self._beside(name).unlink()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write into {self.folder}: {error.strerror or error}; choose another place with --dest"
        )


@contextmanager
def progress_bar(total: int, name: str, unit: str = "B") -> Iterator[Callable[[int], Any]]:
    """Gives a function to call with what has been done; shown on stderr where that is a terminal and there is tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=None) as bar:
        yield bar.update


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
