"""Files to text: found, unpacked, their encoding told, decoded in pieces.

Notable choices:
- A file is read once, from front to back, in pieces of CHUNK bytes; no file is ever held whole.
- ASCII is the same in all encodings that are told (a UTF-16 file shows by its mark or its zeros), so nothing
  is decided before the first byte that is not ASCII.
"""

import codecs
import glob
import gzip
import io
import lzma
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import charset
from charset import CHINESE, RUN, UTF_8_RUN, decoder_of, encoding_of, named
from configurator import UserError, note

CHUNK = 2**20  # bytes read at once
PACKED = (".gz", ".xz", ".zst", ".zip")
TEXT, RECORDS = (".txt",), (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.zst", ".rar", ".7z")
NOT_FOR_INPUT = ("meta.json", "tokenizer.json")  # what prepare.py itself leaves in a folder


@dataclass(frozen=True)
class File:
    """A file to read: a path, and the name of the member where that path is a .zip."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def packed(self) -> str:
        """How it is packed, by its suffix, or ''; what else a .zip's member is packed with."""
        suffix = Path(self.member or self.path).suffix.lower()
        return suffix if suffix in PACKED else ""

    @property
    def inner(self) -> Path:
        """Its name without what only tells how it is packed."""
        name = Path(str(self))
        return name.with_suffix("") if self.packed else name

    @property
    def suffix(self) -> str:
        """What kind of file it is, such as .jsonl."""
        return ".jsonl" if is_wiki_dump(self.inner.name) else self.inner.suffix.lower()


def is_wiki_dump(name: str) -> bool:
    """Whether a file is called wiki_00 and so on, as WikiExtractor and wiki2019zh call their JSON lines."""
    return name.startswith("wiki_") and name[5:].isdigit()


def files_in(inputs: list[str], key: str = "input") -> list[File]:
    """The files among `inputs`, given by --key, those that the patterns among them match, and what folders, given or
    matched, have of text and records, at any depth, sorted, none hidden; a .zip's members likewise. UserError where
    there is none."""
    files: list[File] = []
    for name in inputs:
        if not name:
            raise UserError(f"--{key}= is empty: expected a file, a folder or a pattern such as novels/*.txt")
        with _readable(f"--{key}={name}"):
            paths = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
            paths = [file for path in paths for file in (_below(path) if path.is_dir() else [path])]
            paths = [path for path in dict.fromkeys(paths) if path.is_file()]  # ** matches folders and their files
        if not paths and Path(name).is_dir():
            kinds = ", ".join((*TEXT, *RECORDS))
            raise UserError(f"--{key}={name}: there is no {kinds} file in this folder or below, packed or not")
        if not paths:
            what = "it is no file that can be read twice" if Path(name).exists() else "there is no such file or folder"
            raise UserError(f"--{key}={name}: {what}")
        for path in paths:
            files += _members(path) if path.suffix.lower() == ".zip" else [File(path)]
    if tar := next((file for file in files if file.suffix in TARS), None):
        raise UserError(f"{tar} is an archive: unpack it and give its folder")
    return files


def _below(folder: Path) -> list[Path]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    if inner := [name for name in found if name.lower().endswith(TARS)]:
        note(f"note: {folder}: {', '.join(inner[:3])}{', …' if inner[3:] else ''} is not read: unpack it")
    return [found[name] for name in sorted(found) if _is_for_input(name)]


def _is_for_input(name: str) -> bool:
    path = Path(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts) or path.name in NOT_FOR_INPUT:
        return False
    return path.suffix.lower() == ".zip" or File(path).suffix in (*TEXT, *RECORDS)


def _members(path: Path) -> list[File]:
    with _readable(str(path)):
        names = sorted(_archive(path)[1])
    if inner := [name for name in names if name.lower().endswith((".zip", *TARS))]:
        note(f"note: {path}: {', '.join(inner[:3])}{', …' if inner[3:] else ''} is not read: unpack it")
    members = [File(path, name) for name in names if _is_for_input(name) and not name.lower().endswith(".zip")]
    if not members:
        raise UserError(f"{path}: there is no {', '.join((*TEXT, *RECORDS))} file in this archive")
    return members


def _archive(path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    status = path.stat()
    return _opened(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # its directory may have a million members: to read it anew for each of them would take days
def _opened(path: Path, size: int, changed: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    try:
        archive = zipfile.ZipFile(path)
    except (ValueError, struct.error, OverflowError) as error:
        raise zipfile.BadZipFile(str(error)) from error
    members = [(_name_of(info), info) for info in archive.infolist() if not info.is_dir()]
    names = Counter(name for name, _ in members if _is_for_input(name))
    if names and (most := names.most_common(1)[0])[1] > 1:
        raise zipfile.BadZipFile(f"{most[1]} of its files are called {most[0]}")
    return archive, dict(members)


def _name_of(info: zipfile.ZipInfo) -> str:
    """A member's name: without the mark of UTF-8, Chinese Windows writes GBK, which Python takes for cp437."""
    try:
        return info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode("gb18030")
    except UnicodeError:
        return info.filename


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Inside, what goes wrong with reading the file `name` is told as a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:  # plain ones of zipfile
        raise UserError(f"{name} cannot be unpacked: {error}; get it again, or unpack it by other means") from error


@contextmanager
def open_file(file: File, progress: Callable[[int], Any] = lambda size: None) -> Iterator[BinaryIO]:
    """The file's content, unpacked. `progress` is called with the bytes that have been read of it on the disk."""
    with _readable(str(file)), ExitStack() as stack:
        if file.member:
            archive, members = _archive(file.path)
            content: Any = stack.enter_context(archive.open(members[file.member]))
        else:
            content = _Counted(stack.enter_context(file.path.open("rb", buffering=0)), progress)
        if file.packed:
            content = UNPACK[file.packed](io.BufferedReader(content, CHUNK))
        yield io.BufferedReader(content, CHUNK)
        if file.member:
            progress(members[file.member].compress_size)


class _Zstandard(io.RawIOBase):
    """A .zst file's content. The package's own reader takes a file that was cut off for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise UserError("a .zst file needs a package: pip install zstandard") from error
        self._package, self._file = zstandard, file
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            data = self._packed or self._file.read(2**12)  # which become 128 MiB at the most
            if not data and self._frame:
                raise EOFError("it ends before its end-of-frame marker")
            if not data:
                return 0
            self._frame = self._frame or self._package.ZstdDecompressor().decompressobj()
            try:
                self._plain, self._packed = memoryview(self._frame.decompress(data)), b""
            except self._package.ZstdError as error:
                raise EOFError(error) from error
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size


UNPACK = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".xz": lzma.LZMAFile, ".zst": _Zstandard}


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
        if not file.member and not file.packed:
            yield content
            return
        with tempfile.TemporaryFile() as plain:
            while data := content.read(CHUNK):
                plain.write(data)
            plain.seek(0)
            yield plain


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
    newlines, name, read, ended, text = io.IncrementalNewlineDecoder(None, translate=True), "", 0, False, ""
    decoder: codecs.IncrementalDecoder | None = None
    before = b""  # the end of what has been decoded, where a run of another encoding may have begun
    try:
        with open_file(file, progress) as content:
            while not ended:
                data = content.read(CHUNK if read else max(CHUNK, charset.SAMPLE))
                ended = not data
                if decoder is None and (encoding != "auto" or not data.isascii() or read == 0 and b"\0" in data):
                    data += content.read(charset.SAMPLE)
                    name = encoding_of(data, file, read == 0) if encoding == "auto" else named(encoding, data)
                    decoder = decoder_of(name, errors)
                if encoding == "auto" and name in CHINESE[:3]:
                    if run := UTF_8_RUN.search(before + data):
                        raise _mixed(file, name, read - len(before) + run.start())
                    before = (before + data)[-RUN:]
                begins, read = read == 0, read + len(data)
                text = decoder.decode(data, ended) if decoder else data.decode("ascii")
                if begins and name not in ("utf-16", "utf-32", "utf-8-sig"):  # which do so themselves
                    text = text.removeprefix("\ufeff")
                if text := newlines.decode(text, ended):
                    yield text
        found(name or "utf-8")
    except UnicodeDecodeError as error:
        at = read - len(error.object) + error.start
        raise _undecodable(file, name, encoding, at, error) from error
    except UnicodeError as error:  # of codecs with rules of their own, such as idna
        raise UserError(f"{file} cannot be decoded with --encoding={encoding}: {error}") from error


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


def _mixed(file: File, name: str, at: int) -> UserError:
    return UserError(
        f"{file} begins as {name}, but what follows byte {at:,} is UTF-8: split the file there, or name its encoding "
        "with --encoding="
    )
