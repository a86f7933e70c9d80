"""Files to text: found, unpacked, their encoding told, decoded in pieces.

Notable choices:
- A file is read once, from front to back, in pieces of CHUNK bytes; no file is ever held whole.
- What is strictly UTF-8 is UTF-8. What is not is GB18030, Big5 or UTF-16, whichever makes common characters of it: in
  the right encoding nine of ten characters are common ones, in a wrong one less than half. A detector's guess about
  any other encoding is only told: taken for granted, it would corrupt a text without a word.
- ASCII is the same in all of these (a UTF-16 file shows by its mark or its zeros), so nothing is decided before the
  first byte that is not ASCII.
"""

import codecs
import glob
import gzip
import io
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from configurator import UserError

CHUNK = 2**20  # bytes read at once
PACKED = (".gz", ".xz", ".zst", ".zip")
TEXT, RECORDS = (".txt",), (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
CHINESE = ("gb18030", "big5", "big5hkscs", "utf-16-le", "utf-16-be")
COMMON_SHARE = 0.6  # of the characters that are common ones, from which on an encoding is believed
NOT_FOR_INPUT = ("meta.json", "tokenizer.json")  # what prepare.py itself leaves in a folder


@dataclass(frozen=True)
class File:
    """A file to read: a path, and the name of the member where that path is a .zip."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def inner(self) -> Path:
        """Its name without what only tells how it is packed."""
        name = Path(str(self))
        return name.with_suffix("") if not self.member and name.suffix.lower() in PACKED else name

    @property
    def suffix(self) -> str:
        """What kind of file it is, such as .jsonl."""
        return ".jsonl" if is_wiki_dump(self.inner.name) else self.inner.suffix.lower()


def is_wiki_dump(name: str) -> bool:
    """Whether a file is called wiki_00 and so on, as WikiExtractor and wiki2019zh call their JSON lines."""
    return name.startswith("wiki_") and name[5:].isdigit()


def files_in(inputs: list[str]) -> list[File]:
    """The files among `inputs`; what the folders and patterns among them have of text and records, at any depth,
    sorted, none hidden; a .zip's members likewise. UserError where there is none."""
    files: list[File] = []
    for name in inputs:
        if not name:
            raise UserError("--input= is empty: expected a file, a folder or a pattern such as novels/*.txt")
        path = Path(name)
        if path.is_dir():
            found = [p for p in path.rglob("*") if _is_for_input(p.relative_to(path).as_posix()) and p.is_file()]
            if not found:
                kinds = ", ".join((*TEXT, *RECORDS))
                raise UserError(f"--input={name}: there is no {kinds} file in this folder or below, packed or not")
            paths = sorted(found, key=lambda p: p.relative_to(path).as_posix())
        elif path.is_file():
            paths = [path]
        else:
            paths = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.is_file())
            if not paths:
                raise UserError(f"--input={name}: there is no such file or folder")
        for found in paths:
            files += _members(found) if found.suffix.lower() == ".zip" else [File(found)]
    return files


def _is_for_input(name: str) -> bool:
    path = Path(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts) or path.name in NOT_FOR_INPUT:
        return False
    inner = path.with_suffix("") if path.suffix.lower() in PACKED[:3] else path
    return inner.suffix.lower() in (*TEXT, *RECORDS, ".zip") or is_wiki_dump(inner.name)


def _members(path: Path) -> list[File]:
    with _readable(str(path)), zipfile.ZipFile(path) as archive:
        names = sorted(i.filename for i in archive.infolist() if not i.is_dir())
    members = [File(path, name) for name in names if _is_for_input(name) and not name.lower().endswith(".zip")]
    if not members:
        raise UserError(f"{path}: there is no {', '.join((*TEXT, *RECORDS))} file in this archive")
    return members


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Inside, what goes wrong with reading the file `name` is told as a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{name} cannot be unpacked: {error}; get it again, or unpack it by other means") from error


@contextmanager
def open_file(file: File, progress: Callable[[int], Any] = lambda size: None) -> Iterator[BinaryIO]:
    """The file's content, unpacked. `progress` is called with the bytes that have been read of it on the disk."""
    with _readable(str(file)), file.path.open("rb", buffering=0) as raw:
        counted = io.BufferedReader(_Counted(raw, progress), CHUNK)
        kind = file.path.suffix.lower()
        if file.member:
            with zipfile.ZipFile(raw) as archive, archive.open(file.member) as member:
                yield io.BufferedReader(member, CHUNK)
                progress(archive.getinfo(file.member).compress_size)
        elif kind in UNPACK:
            yield io.BufferedReader(UNPACK[kind](counted), CHUNK)
        else:
            yield counted


def _zstandard(file: BinaryIO) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise UserError("a .zst file needs a package: pip install zstandard") from error

    class Reader(io.RawIOBase):  # its errors are of a class of their own
        source = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            try:
                return self.source.readinto(buffer)
            except zstandard.ZstdError as error:
                raise EOFError(error) from error

    return Reader()


UNPACK = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".xz": lzma.LZMAFile, ".zst": _zstandard}


class _Counted(io.RawIOBase):
    """A file that tells how many of its bytes have been read for the first time."""

    def __init__(self, raw: io.FileIO, progress: Callable[[int], Any]) -> None:
        self.raw, self.progress, self.told = raw, progress, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def readinto(self, buffer: Any) -> int:
        size = self.raw.readinto(buffer)
        if (at := self.raw.tell()) > self.told:
            self.progress(at - self.told)
            self.told = at
        return size


@contextmanager
def seekable(file: File, progress: Callable[[int], Any] = lambda size: None) -> Iterator[BinaryIO]:
    """The file's content, unpacked into a temporary file where it is packed, for what is read back to front."""
    with open_file(file, progress) as content:
        if not file.member and file.path.suffix.lower() not in PACKED:
            yield content
            return
        with tempfile.TemporaryFile() as plain:
            while data := content.read(CHUNK):
                plain.write(data)
            plain.seek(0)
            yield plain


def check_encoding(encoding: str) -> None:
    """UserError where there is no such encoding of text."""
    try:
        if encoding != "auto":
            codecs.getincrementaldecoder(encoding)
            "a".encode(encoding)
    except (LookupError, UnicodeError, ValueError, TypeError) as error:
        known = "auto, utf-8, gb18030, big5 or utf-16"
        raise UserError(f"--encoding={encoding}: no such text encoding; try {known}") from error


def read_text(
    file: File | Path,
    encoding: str = "auto",
    errors: str = "stop",
    progress: Callable[[int], Any] = lambda size: None,
    found: Callable[[str], Any] = lambda encoding: None,
) -> Iterator[str]:
    """The file's text in pieces that are not empty, line ends as \\n, without a byte order mark.

    With the encoding "auto" it is told from the file; `found` is called with its name. Bytes that cannot be decoded are
    a UserError; with `errors` = "skip" they stand in the text as lone surrogates, for the reader to see.
    """
    file = file if isinstance(file, File) else File(file)
    decoder = None if encoding == "auto" else _decoder(encoding, errors)
    newlines, name, read, ended = io.IncrementalNewlineDecoder(None, translate=True), encoding, 0, False
    try:
        with open_file(file, progress) as content:
            while not ended:
                data = content.read(CHUNK)
                ended = not data
                if decoder is None and (not data.isascii() or read == 0 and b"\0" in data):
                    data += content.read(CHUNK)
                    name = _encoding_of(data, file, read == 0)
                    decoder = _decoder(name, errors)
                read += len(data)
                text = decoder.decode(data, ended) if decoder else data.decode("ascii")
                if text := newlines.decode(text, ended):
                    yield text
        found("utf-8" if decoder is None else name)
    except UnicodeDecodeError as error:
        at = read - len(error.object) + error.start
        raise _undecodable(file, name, encoding, at, error) from error


def _decoder(encoding: str, errors: str) -> codecs.IncrementalDecoder:
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"
    return codecs.getincrementaldecoder(encoding)("strict" if errors == "stop" else MARK)


def _mark(error: UnicodeError) -> tuple[str, int]:
    """For every byte that cannot be decoded, half a surrogate pair, which no text has."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\udcff" * (error.end - error.start), error.end


MARK = "weigpt-mark"
codecs.register_error(MARK, _mark)


def _undecodable(file: File, name: str, asked: str, at: int, error: UnicodeDecodeError) -> UserError:
    wrong = error.object[error.start : max(error.end, error.start + 4)].hex(" ")
    codec = codecs.lookup(name)
    others = [e for e in ("utf-8", "gb18030", "big5", "utf-16") if codecs.lookup(e) != codec]
    remedy = ", ".join(f"--encoding={e}" for e in others)
    taken = f"seems to be {name}, but" if asked == "auto" else f"is not {name}:"
    return UserError(
        f"{file} {taken} byte {at:,} and what follows ({wrong}) cannot be decoded; name the file's encoding "
        f"({remedy}), save it as UTF-8, or leave out the documents that cannot be decoded with --errors=skip"
    )


def _encoding_of(data: bytes, file: File, first: bool) -> str:
    """The encoding of a file by a part of it that is not ASCII; `first` tells whether that is its beginning. UserError
    where it cannot be told."""
    if first:
        for mark, name in BOMS:
            if data.startswith(mark):
                return name
        zeros = [data[i::2].count(0) / (len(data) / 2) for i in range(2)]  # ASCII in UTF-16 has one in each unit
        if max(zeros) > 0.3 and min(zeros) < 0.05:
            return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    begin = next(i for i in range(0, len(data), 64) if not data[i : i + 64].isascii())
    begin = next(i for i in range(begin, len(data)) if data[i] >= 0x80)
    samples = dict.fromkeys(("utf-8", *CHINESE[:3]), data[begin : begin + 2**16])
    samples |= dict.fromkeys(CHINESE[3:] if first and data[:2] else (), data[: 2**16])
    shares = {name: _common_share(sample, name) for name, sample in samples.items()}
    best = max(shares, key=shares.get)
    if shares[best] >= COMMON_SHARE:
        return best
    try:
        import charset_normalizer

        match = charset_normalizer.from_bytes(data[: 2**18]).best()
        guess = f" (charset-normalizer's guess is {match.encoding})" if match else ""
    except ImportError:
        guess = ""
    raise UserError(
        f"{file}: its encoding is neither UTF-8 nor, in Chinese, GB18030, Big5 or UTF-16{guess}: name it with "
        "--encoding=, or save the file as UTF-8"
    )


def _common_share(data: bytes, encoding: str) -> float:
    """How many of the characters beyond ASCII that this encoding makes of the bytes are common ones, as a share; of
    UTF-8, in which no other encoding's bytes make sense, how many are characters at all."""
    text = codecs.getincrementaldecoder(encoding)("replace").decode(data)
    beyond = [c for c in text if c > "\x7f"]
    common = len(beyond) - beyond.count("\ufffd") if encoding == "utf-8" else sum(c in _common() for c in beyond)
    return common / len(beyond) if beyond else 0.0


@cache
def _common() -> set[str]:
    """Level 1 of GB 2312 and of Big5, which are the characters in daily use, and Chinese punctuation."""
    levels = (("gb2312", 0xB0A1, 0xD7F9), ("big5", 0xA440, 0xC67E))
    common = {chr(c) for c in (*range(0x3000, 0x3020), *range(0xFF01, 0xFF5F), 0xB7)} | set("—‘’“”…\ufeff")
    for encoding, first, last in levels:
        pairs = [bytes(divmod(code, 256)) for code in range(first, last + 1) if code % 256 >= 0x40]
        common |= {pair.decode(encoding, "ignore") for pair in pairs}
    return common - {""}
