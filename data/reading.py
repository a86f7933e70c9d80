"""Files to text: found, unpacked, their encoding told, decoded in pieces.

Notable choices:
- A file is read once, from front to back, in pieces of CHUNK bytes; no file is ever held whole.
- What is strictly UTF-8 is UTF-8. What is not is GB18030, Big5 or UTF-16, whichever makes everyday characters of it:
  in the right encoding two of three are, in a wrong one less than one of ten. Only Korean, whose bytes are those of
  common Chinese characters, and Japanese come closer, so they are looked for. A detector's guess about any other
  encoding is only told: taken for granted, it would corrupt a text without a word.
- ASCII is the same in all of these (a UTF-16 file shows by its mark or its zeros), so nothing is decided before the
  first byte that is not ASCII.
- Names that stand for a smaller set in Python than in the files so called mean the larger one (SUPERSETS).
"""

import codecs
import glob
import gzip
import io
import lzma
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from configurator import UserError

CHUNK = 2**20  # bytes read at once
PACKED = (".gz", ".xz", ".zst", ".zip")
TEXT, RECORDS = (".txt",), (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
SAMPLE = 2**16  # bytes, from the first that is not ASCII, by which an encoding is told
BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"\x84\x31\x95\x33", "gb18030"))  # fmt: skip
UTF_16 = ("utf-16-le", "utf-16-be")
CHINESE = ("gb18030", "big5", "big5hkscs", *UTF_16)
UTF_8_RUN, RUN = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}){6}"), 18  # six Chinese characters, and how long that is
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950"}  # as browsers read them
NOT_FOR_INPUT = ("meta.json", "tokenizer.json")  # what prepare.py itself leaves in a folder


EVERYDAY = set(  # the characters most in use, and their traditional forms: two of three in any Chinese text
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家"
    "种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十"
    "民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯"
    "月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女"
    "变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今"
    "切院让识候带导争运曰爷叫兵言夫官众若玉往笑宝请城吃李酒坐云兄亲花娘百父令房连送姐母早忙夜朝故随八七六九呢吗吧春风"
    "雨火车飞跑找红黑黄呀服怕谢快块客字写站齐半步乃吾亦矣這個們來爲國說時會對於過發後裏種經麼學現當沒動還進樣開從實軍"
    "無與長機關點業將兩間問並應戰頭體見產話內給門兒東聲員論處義幾認條氣題爾別變總電數報結務場計資許統區隊決馬書則聽卻"
    "達強難權設記類據邊張該規萬覺術領確傳師觀讓識帶導爭運爺衆寶請喫雲親連隨嗎風車飛紅黃謝塊寫齊裡纔"
)
EVERYDAY |= set("，。、：；？！“”‘’「」『』《》〈〉（）【】—…·﹐\u3000\ufeff")


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


def files_in(inputs: list[str]) -> list[File]:
    """The files among `inputs`, those that the patterns among them match, and what folders, given or matched, have of
    text and records, at any depth, sorted, none hidden; a .zip's members likewise. UserError where there is none."""
    files: list[File] = []
    for name in inputs:
        if not name:
            raise UserError("--input= is empty: expected a file, a folder or a pattern such as novels/*.txt")
        with _readable(f"--input={name}"):
            paths = [Path(name)] if Path(name).exists() else sorted(map(Path, glob.glob(name, recursive=True)))
            paths = [file for path in paths for file in (_below(path) if path.is_dir() else [path])]
            paths = [path for path in dict.fromkeys(paths) if path.is_file()]  # ** matches folders and their files
        if not paths and Path(name).is_dir():
            kinds = ", ".join((*TEXT, *RECORDS))
            raise UserError(f"--input={name}: there is no {kinds} file in this folder or below, packed or not")
        if not paths:
            raise UserError(f"--input={name}: there is no such file or folder")
        for path in paths:
            files += _members(path) if path.suffix.lower() == ".zip" else [File(path)]
    if tar := next((file for file in files if file.suffix in (".tar", ".tgz")), None):
        raise UserError(f"{tar} is an archive: unpack it and give its folder")
    return files


def _below(folder: Path) -> list[Path]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return [found[name] for name in sorted(found) if _is_for_input(name)]


def _is_for_input(name: str) -> bool:
    path = Path(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts) or path.name in NOT_FOR_INPUT:
        return False
    return path.suffix.lower() == ".zip" or File(path).suffix in (*TEXT, *RECORDS)


def _members(path: Path) -> list[File]:
    with _readable(str(path)):
        names = sorted(_archive(path)[1])
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
    return archive, {_name_of(info): info for info in archive.infolist() if not info.is_dir()}


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
    except (EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
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
    newlines, name, read, ended, text = io.IncrementalNewlineDecoder(None, translate=True), "", 0, False, ""
    decoder: codecs.IncrementalDecoder | None = None
    before = b""  # the end of what has been decoded, where a run of another encoding may have begun
    try:
        with open_file(file, progress) as content:
            while not ended:
                data = content.read(CHUNK if read else max(CHUNK, SAMPLE))
                ended = not data
                if decoder is None and (encoding != "auto" or not data.isascii() or read == 0 and b"\0" in data):
                    data += content.read(SAMPLE)
                    name = encoding_of(data, file, read == 0) if encoding == "auto" else _named(encoding, data)
                    decoder = _decoder(name, errors)
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


def _decoder(encoding: str, errors: str) -> codecs.IncrementalDecoder:
    encoding = SUPERSETS.get(codecs.lookup(encoding).name, encoding)
    return codecs.getincrementaldecoder(encoding)({"stop": "strict", "skip": MARK}.get(errors, errors))


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


def _mixed(file: File, name: str, at: int) -> UserError:
    return UserError(
        f"{file} begins as {name}, but what follows byte {at:,} is UTF-8: split the file there, or name its encoding "
        "with --encoding="
    )


def encoding_of(data: bytes, file: File, first: bool) -> str:
    """The encoding of a file by a part of it that is not ASCII; `first` tells whether that is its beginning. UserError
    where it cannot be told."""
    if first:
        for mark, name in BOMS:
            if data.startswith(mark):
                return name
        if b"\0" in data[:SAMPLE]:  # which ASCII is full of in UTF-16
            best = max(UTF_16, key=lambda name: _sense(data, name))
            if _sense(data, best) >= 0.6:
                return best
    begin = next((i for i in range(0, len(data), 64) if not data[i : i + 64].isascii()), len(data))
    begin = next((i for i in range(begin, len(data)) if data[i] >= 0x80), len(data))
    sample = data[begin : begin + SAMPLE]
    with suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(sample)
        return "utf-8"
    readings = {name: _beyond(sample, name) for name in CHINESE[:3]}
    readings |= {name: _beyond(data[:SAMPLE], name) for name in UTF_16 if first}
    shares = {name: _share(characters, EVERYDAY) for name, characters in readings.items()}
    best = max(readings, key=lambda name: (shares[name], -readings[name].count("\ufffd")))
    if shares[best] >= 0.4:
        return best
    valid = [character.encode("utf-8") for character in _beyond(sample, "utf-8") if "~" < character != "\ufffd"]
    high = sum(byte >= 0x80 for byte in sample)
    if len(b"".join(valid)) >= 0.9 * high or sum(len(c) for c in valid if len(c) > 2) >= 0.6 * high:
        return "utf-8"  # with a few bytes that are not
    if shares[best] >= 0.1 and _share(readings[best], _common()) >= 0.75 and not _is_foreign(sample):
        return best
    try:
        import charset_normalizer

        match = charset_normalizer.from_bytes(data[: 2**14]).best()
        guess = f" (charset-normalizer's guess is {match.encoding})" if match else ""
    except ImportError:
        guess = ""
    raise UserError(
        f"{file}: its encoding is neither UTF-8 nor, in Chinese, GB18030, Big5 or UTF-16{guess}: name it with "
        "--encoding=, or save the file as UTF-8"
    )


def _named(encoding: str, data: bytes) -> str:
    """The encoding that the user names; with its order of bytes where it is UTF-16 or UTF-32 without a mark."""
    name = codecs.lookup(encoding).name
    if name in ("utf-16", "utf-32") and not data.startswith(tuple(mark for mark, of in BOMS if of == name)):
        return max((f"{name}-le", f"{name}-be"), key=lambda order: _sense(data, order))
    return encoding


def _decoded(data: bytes, encoding: str) -> str:
    return _decoder(encoding, "replace").decode(data)


def _beyond(data: bytes, encoding: str) -> list[str]:
    """The characters, of those that this encoding makes of the bytes, that are no ASCII text."""
    return [c for c in _decoded(data, encoding) if c > "~" or c < " " and c not in "\t\n\f\r"]


def _sense(data: bytes, encoding: str) -> float:
    """How many of the characters that this encoding makes of the bytes are ASCII text or everyday ones, as a share."""
    text = _decoded(data[:SAMPLE], encoding)
    return sum(" " <= c <= "~" or c in "\t\n\r" or c in EVERYDAY for c in text) / (len(text) + 1)


def _share(characters: list[str], known: set[str]) -> float:
    return sum(c in known for c in characters) / (len(characters) + 2)  # of one or two, none can be sure


def _is_foreign(sample: bytes) -> bool:
    """Whether it is of a language and in an encoding whose bytes are those of common Chinese characters."""
    languages = (("euc_kr", "가", "힣", 0.8), ("euc_jp", "ぁ", "ヺ", 0.3), ("koi8_r", "А", "я", 0.9))
    for encoding, first, last, share in languages:
        characters = _beyond(sample, encoding)
        if sum(first <= c <= last for c in characters) >= share * len(characters):
            return True
    return False


@cache
def _common() -> set[str]:
    """Level 1 of GB 2312 and of Big5, which are the characters in daily use, and Chinese punctuation."""
    levels = (("gb2312", 0xB0A1, 0xD7F9), ("big5", 0xA440, 0xC67E))
    common = {chr(c) for c in (*range(0x3000, 0x3020), *range(0xFF01, 0xFF5F), 0xB7)} | EVERYDAY
    for encoding, first, last in levels:
        pairs = [bytes(divmod(code, 256)) for code in range(first, last + 1) if code % 256 >= 0x40]
        common |= {pair.decode(encoding, "ignore") for pair in pairs}
    return common - {""}
