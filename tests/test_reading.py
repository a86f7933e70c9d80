"""Files to text, held against Python's own codecs, open() and the programs' own formats."""

import bz2
import gzip
import json
import lzma
import os
import random
import struct
import sys
import unicodedata
import warnings
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import charset
import reading
from charset import check_encoding, decoded, encoding_of
from configurator import Config, UserError
from reading import File, files_in, read_text

STORIES = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
CLASSICS = SHARED / "data" / "zh" / "four_classics.txt"
TRADITIONAL = (
    "《小貓釣魚》\n\n　　從前，有一隻小貓跟著媽媽到河邊去釣魚。一隻蜻蜓飛來了，"
    "小貓看見了，放下魚竿就去捉蜻蜓。蜻蜓飛走了，"
    "小貓沒捉著，空著手回到河邊。「我為什麼釣不到魚呢？」牠問。媽媽說：「釣魚要專心，一會兒捉蜻蜓，一會兒捉蝴蝶，"
    "怎麼能釣到魚呢？」\n"
)
FOREIGN = {
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. "
    "인간은 천부적으로 이성과 양심을 부여받았다.",
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は理性と良心とを授けられている。",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité. Où est passé le garçon? À bientôt, forêt.",
    "de": "Alle Menschen sind frei und gleich an Würde geboren. Ärger, Übung, Größe, Straße, schön, für, natürlich.",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


@pytest.fixture
def chunk(monkeypatch):
    def change(size: int, sample: int = charset.SAMPLE) -> None:
        monkeypatch.setattr(reading, "CHUNK", size)
        monkeypatch.setattr(charset, "SAMPLE", sample)  # the first read is no smaller

    return change


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def text_of(path: Path, *args) -> str:
    return "".join(read_text(path, *args))


def refused(call, *words: str) -> str:
    """The sentence that `call` is refused with."""
    with pytest.raises(UserError) as error:
        call()
    sentence = str(error.value)
    assert "\n" not in sentence and not [word for word in words if word not in sentence], sentence
    return sentence


# ---- files


def names(files: list[File], folder: Path) -> list[str]:
    return [str(file).removeprefix(f"{folder}{os.sep}").replace(os.sep, "/") for file in files]


def test_folders_patterns_and_files_in_their_order(tmp_path, monkeypatch):
    kept = [
        "b.txt",
        "子/一.TXT",
        "子/wiki_00",
        "子/深/d.jsonl.gz",
        "a.json",
        "c.csv",
        "d.tsv.xz",
        "e.parquet",
        "f.ndjson.zst",
    ]
    left = ["cover.jpg", ".hidden.txt", ".git/x.txt", "__MACOSX/y.txt", "meta.json", "wiki_x", "notes.md", "x.gz"]
    for name in (*kept, *left):
        write(tmp_path / name, b"x")
    assert names(files_in([str(tmp_path)]), tmp_path) == sorted(kept)
    assert names(files_in([str(tmp_path / "notes.md"), str(tmp_path / "b.txt")]), tmp_path) == ["notes.md", "b.txt"]
    assert names(files_in([str(tmp_path / "*.txt")]), tmp_path) == ["b.txt"]
    assert names(files_in([str(tmp_path / "子*")]), tmp_path) == ["子/wiki_00", "子/一.TXT", "子/深/d.jsonl.gz"]
    assert names(files_in([str(tmp_path / "子" / "**")]), tmp_path).count("子/深/d.jsonl.gz") == 1
    odd = write(tmp_path / "odd" / "a[1].txt", b"x")
    assert files_in([str(odd)]) == [File(odd)]
    monkeypatch.chdir(tmp_path)
    assert [str(file) for file in files_in(["b.txt"])] == ["b.txt"]


@pytest.mark.parametrize("name", ["", "nowhere", "nowhere/*.txt", "n" * 5000, "a\0b", "empty"])
def test_what_is_no_file(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(lambda: files_in([name]), f"--input={name}")


def test_archives_that_are_not_read_are_told(tmp_path):
    for name in ("a.tar", "b.tar.gz", "c.tgz"):
        write(tmp_path / name, b"x")
        refused(lambda name=name: files_in([str(tmp_path / name)]), name, "unpack")


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_with_members(tmp_path, method):
    members = {
        "乙/二.txt": "二\r\n",
        "甲.txt": "一",
        "a/b/c.txt.gz": "三",
        "pic.jpg": "",
        "__MACOSX/乙/x.txt": "",
        "z.zip": "",
    }
    data = {
        name: gzip.compress(text.encode()) if name.endswith("gz") else text.encode() for name, text in members.items()
    }
    path = zipped(tmp_path / "书.zip", data | {"空/": b""}, method)
    files = files_in([str(path)])
    assert names(files, path) == ["a/b/c.txt.gz", "乙/二.txt", "甲.txt"]
    assert [text_of(file) for file in files] == ["三", "二\n", "一"]
    assert [file.suffix for file in files] == [".txt"] * 3
    refused(lambda: files_in([str(zipped(tmp_path / "p.zip", {"a.jpg": b""}))]), "p.zip", "no .txt")


def test_names_in_a_zip_from_chinese_windows(tmp_path):
    name = "小说/第一回.txt"
    raw = name.encode("gbk")
    path = zipped(tmp_path / "a.zip", {"x" * len(raw): b"text"})
    path.write_bytes(path.read_bytes().replace(b"x" * len(raw), raw))
    (file,) = files_in([str(path)])
    assert file.member == name and text_of(file) == "text"


def test_a_zip_is_opened_once(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {f"{n}.txt": b"%d" % n for n in range(300)})
    opened = []
    real = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: opened.append(args) or real(*args))
    assert sorted(int(text_of(file)) for file in files_in([str(path)])) == list(range(300)) and len(opened) == 1
    zipped(path, {"new.txt": b"changed"})
    assert [text_of(file) for file in files_in([str(path)])] == ["changed"]


def test_encrypted_zip(tmp_path):
    path = zipped(tmp_path / "a.zip", {"t.txt": b"text"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of encryption, in both headers
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(lambda: text_of(files_in([str(path)])[0]), str(path), "encrypted")


def packers() -> dict:
    made = {".gz": gzip.compress, ".xz": lzma.compress}
    try:
        import zstandard
    except ImportError:
        return made
    return made | {".zst": lambda data: zstandard.ZstdCompressor().compress(data)}


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_packed_files(tmp_path, suffix):
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    pack, data = packers()[suffix], STORIES[:50000].encode()
    path = tmp_path / f"故事.txt{suffix}"
    done = []
    write(path, pack(data))
    assert "".join(read_text(path, progress=done.append)) == STORIES[:50000] and sum(done) == path.stat().st_size
    write(path, pack(data) + pack(b"more"))  # several frames are one file
    assert text_of(path) == STORIES[:50000] + "more"
    write(path, pack(b""))
    assert text_of(path) == ""
    whole = pack(data)
    for size in (1, 10, len(whole) // 2, len(whole) - 1):
        write(path, whole[:size])
        refused(lambda: text_of(path), str(path), "unpacked" if size > 1 else "")
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        write(path, whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            text_of(path)  # some bytes mean nothing: the time in a .gz
        except UserError as error:
            assert str(path) in str(error)


def test_zip_cut_off_or_spoiled(tmp_path):
    path = zipped(tmp_path / "a.zip", {"一.txt": STORIES[:20000].encode(), "二.txt": b"two"})
    whole = path.read_bytes()
    for cut in (0, 3, 30, len(whole) // 2, len(whole) - 1):
        write(path, whole[:cut])
        refused(lambda: files_in([str(path)]), str(path))
    write(path, whole[:1000] + b"\0\1\2\3" + whole[1004:])
    refused(lambda: [text_of(file) for file in files_in([str(path)])], str(path), "一.txt")


def test_zstd_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    refused(lambda: text_of(write(tmp_path / "a.txt.zst", b"x")), "pip install zstandard")


def test_zstd_bombs_are_read_in_pieces(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path / "a.txt.zst", zstandard.ZstdCompressor().compress(bytes(2**26)))
    assert max(map(len, read_text(path))) <= reading.CHUNK + charset.SAMPLE


def test_empty_files(tmp_path):
    assert list(read_text(write(tmp_path / "a.txt", b""))) == []
    for mark in ("utf-8-sig", "utf-16", "utf-32"):
        assert list(read_text(write(tmp_path / "a.txt", "".encode(mark)))) == []


# ---- encodings

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030")


def encoded(text: str) -> dict[str, bytes]:
    found = {encoding: text.encode(encoding) for encoding in ENCODINGS}
    return found | {
        "utf-16-be with a mark": b"\xfe\xff" + text.encode("utf-16-be"),
        "mark": ("\ufeff" + text).encode("gb18030"),
    }


def traditional() -> str:
    opencc = pytest.importorskip("opencc")
    text = opencc.OpenCC("s2t").convert(STORIES[:20000])
    return "".join(c for c in text if c.encode("big5", "ignore"))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_same_text_in_every_encoding(tmp_path, newline):
    text = "ASCII first, 　and NUL \0.\n" * 100 + STORIES[:20000]
    for encoding, data in encoded(text.replace("\n", newline)).items():
        assert text_of(write(tmp_path / "t.txt", data)) == text, encoding


def test_traditional_text_in_big5(tmp_path):
    assert text_of(write(tmp_path / "t.txt", TRADITIONAL.encode("big5"))) == TRADITIONAL
    assert text_of(write(tmp_path / "t.txt", ("～裏‧" + TRADITIONAL).encode("cp950"))) == "～裏‧" + TRADITIONAL
    assert (
        text_of(write(tmp_path / "t.txt", ("佢哋喺嗰度啲嘢" + TRADITIONAL).encode("big5hkscs")))
        == "佢哋喺嗰度啲嘢" + TRADITIONAL
    )
    for encoding, data in encoded(TRADITIONAL).items():
        assert text_of(write(tmp_path / "t.txt", data)) == TRADITIONAL, encoding
    text = traditional()
    assert text_of(write(tmp_path / "t.txt", text.encode("big5"))) == text


def prepared(inputs: Path, dest: Path, **options) -> dict[str, bytes]:
    import corpus

    config = Config(**(corpus.DEFAULTS | {"dest": str(dest)} | options))
    corpus.prepare(corpus.open_source([str(inputs)], config), config, dest)
    return {name: (dest / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}


@pytest.mark.parametrize("text", [STORIES[:8000], TRADITIONAL * 9], ids=["simplified", "traditional"])
def test_every_encoding_makes_the_same_bytes(tmp_path, text):
    documents = [part for part in text.split("\n\n") if part]
    lines = "".join(json.dumps({"text": part}, ensure_ascii=False) + "\r\n" for part in documents)
    encodings = encoded(text) | ({"big5": b""} if "貓" in text else {})
    found: dict[str, list] = {"one": [], "folder": [], "records": []}
    for encoding in encodings:
        code = {"mark": "gb18030", "utf-16-be with a mark": "utf-16"}.get(encoding, encoding)
        where = tmp_path / encoding.replace(" ", "-")
        write(where / "one.txt", text.replace("\n", "\r\n").encode(code))
        for number, part in enumerate(documents):
            write(where / "folder" / f"{number:04}.txt", part.encode(code))
        write(where / "records.jsonl", lines.encode(code))
        for kind, name in (("one", "one.txt"), ("folder", "folder"), ("records", "records.jsonl")):
            found[kind].append(prepared(where / name, where / "out" / kind))
    for kind, made in found.items():
        assert all(files == made[0] for files in made), kind
    assert found["folder"][0]["meta.json"] and found["one"][0] != found["folder"][0]


def extracts(text: str, count: int, sizes: tuple[int, int]) -> list[str]:
    rng = random.Random(7)
    places = [(rng.randrange(len(text) - sizes[1]), rng.randint(*sizes)) for _ in range(count)]
    return [text[at : at + size] for at, size in places]


@pytest.mark.parametrize("source", ["stories", "classics"])
@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-16-le", "utf-16-be"])
def test_short_extracts_are_told(source, encoding):
    if source == "classics" and not CLASSICS.exists():
        pytest.skip(f"no {CLASSICS}")
    text = STORIES if source == "stories" else CLASSICS.read_text(encoding="utf-8")
    wrong = {}
    for sizes, count in (((10, 19), 200), ((20, 99), 200), ((100, 2000), 60)):
        samples = extracts(text, count, sizes)
        if encoding == "big5":
            convert = pytest.importorskip("opencc").OpenCC("s2t").convert
            samples = [convert(t).encode("big5", "ignore").decode("big5") for t in samples]
        wrong[sizes] = 0
        for sample in samples:
            data = sample.encode(encoding)
            try:
                wrong[sizes] += decoded(data, encoding_of(data, File(Path("t")), True)) != sample
            except UserError:
                wrong[sizes] += 1
    assert wrong[20, 99] == wrong[100, 2000] == 0 and wrong[10, 19] <= 4, wrong


@pytest.mark.parametrize(
    "language, encoding",
    [("ko", "euc_kr"), ("ko", "johab"), ("ja", "shift_jis"), ("ja", "euc_jp"), ("ru", "cp1251"), ("ru", "koi8_r"),
     ("ru", "cp866"), ("fr", "latin_1"), ("fr", "cp850"), ("de", "latin_1"), ("de", "mac_roman"), ("th", "cp874"),
     ("ko", "utf-32-le")],
)  # fmt: skip
def test_what_is_not_chinese_is_told(tmp_path, language, encoding):
    text = FOREIGN[language]
    for part in (text, text * 50, "# notes\n\n" * 20 + text):
        path = write(tmp_path / "t.txt", part.encode(encoding, "ignore"))
        refused(lambda path=path: text_of(path), str(path), "--encoding=")
        refused(lambda path=path: text_of(path, "auto", "skip"), str(path))
        named = "".join(read_text(path, encoding))
        assert named == part.encode(encoding, "ignore").decode(encoding)


def test_binary_files_are_told(tmp_path):
    rng = random.Random(3)
    jpeg = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xdb\0C\0" + rng.randbytes(5000)
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\2\0\0\0" + rng.randbytes(5000)
    program = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<40H", *range(65500, 65536), 1, 2, 3, 4) + rng.randbytes(999)
    for data in (jpeg, png, program, gzip.compress(rng.randbytes(999)), bz2.compress(STORIES.encode()[:5000])):
        write(tmp_path / "t.txt", data)
        refused(lambda: text_of(tmp_path / "t.txt"), "t.txt", "encoding")


def test_members_of_one_name_and_archives_inside_archives_are_told(tmp_path, capsys):
    for name, members in (("two.zip", ["a.txt", "a.txt"]), ("nested.zip", ["a.txt", "b.zip", "c.tar.gz"])):
        with zipfile.ZipFile(tmp_path / name, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for member in members:
                archive.writestr(member, "text")
    with pytest.raises(UserError, match="two.zip.*2 of its files are called a.txt"):
        files_in([str(tmp_path / "two.zip")])
    assert [file.member for file in files_in([str(tmp_path / "nested.zip")])] == ["a.txt"]
    assert "b.zip, c.tar.gz is not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "first, second", [("gb18030", "utf-8"), ("utf-8", "gb18030"), ("big5", "utf-8"), ("utf-8", "big5")]
)
def test_mixed_files_are_told(tmp_path, chunk, first, second):
    data = TRADITIONAL.encode(first) * 800, TRADITIONAL.encode(second)
    for size in (2**20, 100, 7):
        chunk(size)
        path = write(tmp_path / "t.txt", b"".join(data))
        sentence = refused(lambda path=path: text_of(path), str(path), first)
        number = int(sentence.split("byte ")[1].split()[0].replace(",", ""))
        assert len(data[0]) <= number < len(data[0]) + 120  # the first six characters without a comma


@pytest.mark.parametrize("size", [2**20, 100, 7])
def test_utf_8_is_not_read_as_the_gb18030_that_its_bytes_are_too(tmp_path, chunk, size):
    pairs = {c: c.encode() * 2 for c in STORIES if "一" <= c <= "龥"}
    second = [pair for pair in pairs.values() if pair.decode("gb18030", "ignore").encode("gb18030") == pair]
    assert len(second) > 100
    first = STORIES[:90000].encode("gb18030")
    path = write(tmp_path / "t.txt", first + b"".join(second))
    chunk(size)
    refused(lambda: text_of(path), str(path), "begins as gb18030", f"byte {len(first):,} is UTF-8")


@pytest.mark.parametrize(
    "head, bad, encoding",
    [(b"a" * 11, b"\xff", "utf-8"), (b"\xef\xbb\xbfa", b"\xff", "utf-8"), (b"a" * (2**20 - 1), b"\xe5\xa5", "utf-8"),
     ("好".encode() * 2**20, b"\x80", "utf-8"), ("的是".encode("gb18030") * 2**19, b"\xff", "gb18030"),
     ("\ufeff的".encode("utf-16-le"), b"\0\xdc", "utf-16"), ("的".encode("utf-16-le") * 99, b"\0\xdca", "utf-16-le")],
)  # fmt: skip
@pytest.mark.parametrize("asked", ["auto", "named"])
def test_where_bytes_cannot_be_decoded(tmp_path, head, bad, encoding, asked):
    if asked == "auto" and head.isascii():
        pytest.skip("a lone bad byte in ASCII has no encoding")
    path = write(tmp_path / "坏.txt", head + bad)
    shown = bad[:4].hex(" ")
    refused(lambda: text_of(path, encoding if asked == "named" else "auto"), str(path), f"byte {len(head):,} ", shown)
    text = text_of(path, encoding, "skip")
    assert text.startswith(head.decode(encoding).removeprefix("\ufeff")) and "\udcff" in text


def test_forced_encodings(tmp_path):
    text = "甲乙丙 abc\n" * 3
    for encoding in ("utf-16", "utf-32"):
        for order in ("-le", "-be"):
            assert text_of(write(tmp_path / "t.txt", text.encode(encoding + order)), encoding) == text
            assert text_of(write(tmp_path / "t.txt", ("\ufeff" + text).encode(encoding + order)), encoding) == text
            assert (
                text_of(write(tmp_path / "t.txt", ("\ufeff" + text).encode(encoding + order)), encoding + order) == text
            )
    assert text_of(write(tmp_path / "t.txt", "镕€".encode("gb18030")), "gb2312") == "镕€"
    assert text_of(write(tmp_path / "t.txt", "été".encode("latin-1")), "latin-1") == "été"
    for encoding in ("klingon", "hex", "rot13", "", "a\0b", "undefined"):
        refused(lambda encoding=encoding: check_encoding(encoding), f"--encoding={encoding}", "gb18030")
    for encoding in ("punycode", "idna", "utf-7", "unicode_escape"):
        refused(
            lambda encoding=encoding: text_of(write(tmp_path / "t.txt", b"\xff\\x+\xff-"), encoding), "t.txt", encoding
        )


# ---- newlines, byte order marks, characters that are kept


@given(
    st.text(st.sampled_from("a\r\n好\0\u3000\ufeff\u2028\x0b"), max_size=30),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-be", "utf-32"]),
    st.integers(1, 9),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@example("\r\n" * 20, "utf-16-be", 3)
def test_reading_is_pythons_universal_newlines(tmp_path_factory, chunk, text, encoding, size):
    text = text.lstrip("\ufeff\0")  # UTF-16's mark and NUL are UTF-32's mark
    path = write(tmp_path_factory.getbasetemp() / "t.txt", text.encode(encoding))
    expected = path.read_text(encoding=encoding)
    chunk(size, max(size, 4))  # a mark is read at once
    pieces = list(read_text(path, encoding))
    assert "".join(pieces) == expected and "" not in pieces
    chunk(size)
    if encoding.startswith("utf-8") or encoding in ("utf-16", "utf-32"):
        assert text_of(path) == expected


@given(st.integers(0, 400), st.integers(1, 9), st.sampled_from(ENCODINGS))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_detection_does_not_depend_on_the_chunk(tmp_path_factory, chunk, ascii, size, encoding):
    text = "ab\r\n" * ascii + STORIES[:300]
    path = write(tmp_path_factory.getbasetemp() / "t.txt", text.encode(encoding))
    chunk(size)
    assert text_of(path) == text.replace("\r\n", "\n")


def test_no_file_is_held_whole(tmp_path, chunk):
    chunk(2**14)
    path = write(tmp_path / "t.txt", "好".encode() * 2**20)
    assert max(map(len, read_text(path))) <= 2**14 + charset.SAMPLE


@given(st.binary(max_size=200), st.sampled_from(["stop", "skip"]))
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_text_or_a_sentence(tmp_path_factory, data, errors):
    path = write(tmp_path_factory.getbasetemp() / "t.txt", data)
    try:
        text = text_of(path, "auto", errors)
    except UserError as error:
        assert str(path) in str(error)
        return
    assert "\r" not in text and (errors == "skip" or not any(unicodedata.category(c) == "Cs" for c in text))


def test_io_errors_are_sentences(tmp_path):
    refused(lambda: text_of(tmp_path / "nowhere.txt"), "nowhere.txt", "No such file")
    refused(lambda: text_of(tmp_path), str(tmp_path))
