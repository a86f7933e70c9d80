"""Text to documents, held against json, csv, pyarrow and plain Python that reads everything at once."""

import csv
import gzip
import io
import json
import random
import re
import unicodedata
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import charset
import corpus
import documents
import reading
import records
from configurator import Config, UserError
from documents import LAST_CUT, TEMPLATE, Found, one_document, split_documents

STORIES = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
FORMATS = SHARED / "data" / "formats"
END = "<|endoftext|>"
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def chunk(monkeypatch):
    def change(size: int) -> None:
        monkeypatch.setattr(reading, "CHUNK", size)
        monkeypatch.setattr(charset, "SAMPLE", size)  # the first read is no smaller than either

    return change


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def read(*paths: Path, found: Found | None = None, **options) -> list[str]:
    """The documents of the files."""
    source = corpus.open_source([str(path) for path in paths], Config(**options))
    pieces, found_documents, parts = list(source.read(found=found)), [], []
    assert "" not in pieces
    for piece in pieces:
        if piece is None:
            found_documents.append("".join(parts))
            parts = []
        else:
            parts.append(piece)
    assert all(found_documents)
    return found_documents + (["".join(parts)] if parts else [])


def refused(call, *words: str) -> str:
    with pytest.raises(UserError) as error:
        call()
    sentence = str(error.value)
    assert not [word for word in words if word not in sentence], sentence
    return sentence


def lines_of(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---- the known formats

RECORDS = {
    "wiki2019zh": ({"id": "53", "url": "u", "title": "经济学", "text": "经济学\n\n经济学是科学。\n\n它…"},
                   "《经济学》\n经济学是科学。\n\n它…"),
    "news2016zh": ({"news_id": "6", "keywords": "k", "title": "题", "desc": "d", "content": "文"}, "《题》\n文"),
    "baike2018qa": ({"qid": "q", "category": "c", "title": "问？", "desc": "", "answer": "答\r\r二"},
                    "《问？》\n答\n\n二"),
    "webtext2019zh": ({"qid": 6, "title": "问", "desc": "d", "star": 3, "content": "答"}, "《问》\n答"),
    "translation2019zh": ({"english": "Yes.", "chinese": "是。"}, "Yes.\n是。"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("file", ["a.json", "a.jsonl", "a.ndjson", "wiki_00", "AA/wiki_07", "a.jsonl.gz", "array.json"])
def test_known_records(tmp_path, name, newline, file):
    record, document = RECORDS[name]
    text = lines_of(record, record).replace("\n", newline)
    if file == "array.json":
        text = json.dumps([record, record], indent=1).replace("\n", newline)
    write(tmp_path / file, gzip.compress(text.encode()) if file.endswith("gz") else text)
    for given_format in ("auto", name):
        found = Found(quiet=True)
        assert read(tmp_path / file, found=found, format=given_format) == [document] * 2
        assert found.layout == ("{title}\n{content}" if name == "translation2019zh" else TEMPLATE)
        assert (found.records, found.malformed) == (2, 0)


def test_known_records_as_a_table_and_as_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, (record, document) in RECORDS.items():
        out = io.StringIO()
        table = csv.DictWriter(out, record)
        table.writeheader()
        table.writerows([record] * 3)
        assert read(write(tmp_path / f"{name}.csv", out.getvalue())) == [document] * 3
        parquet.write_table(arrow.Table.from_pylist([record] * 3), tmp_path / f"{name}.parquet", row_group_size=2)
        assert read(tmp_path / f"{name}.parquet") == [document] * 3


def test_titles_that_are_not_plain(tmp_path):
    rows = [{"title": "", "text": "甲"}, {"title": None, "text": "乙"}, {"title": 7, "text": "7\n丙"},
            {"title": "丁", "text": ""}, {"title": 1.5, "text": 2}, {"title": "空", "text": None},
            {"title": "", "text": ""}, {"title": "\n", "text": "戊"},
            {"title": "己", "text": "己\r\n\r\n正文"}, {"title": float("nan"), "text": "庚"}]  # fmt: skip
    expected = ["甲", "乙", "《7》\n丙", "《丁》", "《1.5》\n2", "《空》", "戊", "《己》\n正文", "庚"]
    assert read(write(tmp_path / "a.jsonl", lines_of(*rows))) == expected
    bad = [{"title": "a"}, {"text": "b"}, {"title": [], "text": "c"}, {"title": {}, "text": "d"},
           {"title": True, "text": "e"}, {"title": "f", "text": {"g": "h"}}, "text", 5, None, [1],
           [[]], True, {}]  # fmt: skip
    for form in ("wiki2019zh", "auto"):
        found = Found(quiet=True)
        first = {"title": "甲", "text": "甲\n乙"}
        path = write(tmp_path / "a.jsonl", lines_of(first, *bad, first))
        assert read(path, found=found, format=form) == ["《甲》\n乙", "text", "《甲》\n乙"]
        assert found.malformed == len(bad) - 1


def test_stars(tmp_path):
    rows = [{"title": "问", "content": f"{star}", "star": star} for star in (1, 2.5, "3", 4, None, "x", float("nan"))]
    found = Found(quiet=True)
    path = write(tmp_path / "a.jsonl", lines_of(*rows, {"title": "问", "content": "none"}))
    assert read(path, found=found, min_star=2.5) == ["《问》\n2.5", "《问》\n3", "《问》\n4"]
    assert (found.few_stars, found.malformed) == (2, 3)


def test_one_language_of_a_translation(tmp_path):
    record, _ = RECORDS["translation2019zh"]
    path = write(tmp_path / "a.json", lines_of(record))
    assert read(path, fields="english") == ["Yes."] and read(path, fields="chinese") == ["是。"]
    assert read(path, fields="chinese,english") == ["《是。》\nYes."]


def test_thucnews(tmp_path, monkeypatch):
    text = "标题在此\n　　第一段。\n　　第二段。\n"
    for newline in ("\n", "\r\n"):
        write(tmp_path / "THUCNews" / "体育" / "1.txt", text.replace("\n", newline))
        write(tmp_path / "THUCNews" / "财经" / "2.txt", f"{newline}只有标题")
        expected = ["《标题在此》\n　　第一段。\n　　第二段。", "《只有标题》"]
        assert read(tmp_path / "THUCNews") == expected == read(tmp_path)
        monkeypatch.chdir(tmp_path / "THUCNews")
        assert read(Path("体育"), format="thucnews") == expected[:1]
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("THUCNews/体育/1.txt", text)
    assert read(tmp_path / "t.zip") == expected[:1]
    titles = "".join(f'标题 {n}，"引\t{n % 10}\r\n' for n in range(30))
    for form in ("auto", "thucnews"):
        assert read(write(tmp_path / "titles.tsv", titles), format=form) == [f'标题 {n}，"引' for n in range(30)]
    assert read(write(tmp_path / "t.tsv", "一\t1\n二\t2\n"), fields="1") == ["一", "二"]
    assert read(write(tmp_path / "t.tsv", "一\t1\n二\t2\n"), fields="2,1") == ["《1》\n一", "《2》\n二"]


def test_essays(tmp_path, chunk):
    essay = "---\n标题：我的家\n日期：2020-01-01\n作者：小明\n---\n\n　　我的家很大。\n---\n完\n"
    ascii_colon = "---  \n作者: 乙\n  标题: 二\n--- \n文"
    for size in (2**20, 3):
        chunk(size)
        for newline in ("\n", "\r\n"):
            write(tmp_path / "e" / "1.txt", essay.replace("\n", newline))
            write(tmp_path / "e" / "2.txt", ascii_colon.replace("\n", newline))
            expected = ["《我的家》\n　　我的家很大。\n---\n完", "《二》\n文"]
            assert read(tmp_path / "e") == expected == read(tmp_path / "e", format="essays")
        write(tmp_path / "n" / "1.txt", "---\nno header\n---\n文")
        assert read(tmp_path / "n") == ["---\nno header\n---\n文"]
        found = Found(quiet=True)
        assert read(tmp_path / "n", found=found, format="essays") == [] and found.malformed == 1


@pytest.mark.skipif(not FORMATS.is_dir(), reason=f"no {FORMATS}")
def test_real_records():
    for path in sorted(FORMATS.glob("*_example.jsonl")):
        name = path.name.removesuffix("_example.jsonl")
        record = json.loads(path.read_text(encoding="utf-8"))
        fields, template, _ = documents.FIELDS[name]
        first, second = (re.sub("\r\n|\r", "\n", str(record[field])) for field in fields)
        second = second.removeprefix(first).lstrip("\n") if name == "wiki2019zh" else second
        expected = (template or TEMPLATE).replace(fields[0], "title").replace(fields[1], "content")
        assert read(path) == [expected.format(title=first, content=second).strip("\n")]
    rows = (FORMATS / "thucnews_titles_head.tsv").read_text(encoding="utf-8").splitlines()
    assert read(FORMATS / "thucnews_titles_head.tsv") == [row.split("\t")[0] for row in rows]


@pytest.mark.skipif(not FORMATS.is_dir(), reason=f"no {FORMATS}")
def test_a_real_malformed_record(capsys):
    path = FORMATS / "translation2019zh_head.json"
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = [json.loads(line) for number, line in enumerate(lines, 1) if number != 28]
    assert read(path, found=Found()) == [f"{r['english']}\n{r['chinese']}".strip("\n") for r in expected]
    assert f"{path}, line 28: malformed" in capsys.readouterr().err


# ---- templates


def test_templates(tmp_path):
    path = write(tmp_path / "a.jsonl", lines_of({"标题": "甲", "b c": "{乙}", "text": "丙"}))
    for options, expected in (
        ({"template": r"{标题}\n{b c}\t{标题}"}, "甲\n{乙}\t甲"),
        ({"template": "{{x}} {标题} {{"}, "{x} 甲 {"),
        ({"template": "{{}}: {b c}{text}", "fields": "b c,text"}, "{}: {乙}丙"),
        ({"fields": "标题"}, "甲"),
        ({"fields": " 标题 , b c,text "}, "《甲》\n{乙}\n丙"),
        ({}, "丙"),
    ):
        assert read(path, **options) == [expected]
    path = write(tmp_path / "b.jsonl", lines_of({"a.b": "点", "c": ""}))
    assert read(path, fields="a.b") == ["点"] and read(path, fields="a.b,c", template="{c}: {a.b}") == ["点"]
    refused(lambda: read(path), "a.b, c", "--fields=")


@pytest.mark.parametrize(
    "template",
    ["{title.__class__}", "{0}", "{title!r}", "{title:>10}", "{", "}", "{title", "title}", "{}", "{title[0]}",
     "no field", "{title!}", "{a{b}}", "{title:{content}}", "{other}", "{{title}}"],
)  # fmt: skip
@pytest.mark.parametrize("fields", ["", "title,content"])
def test_templates_that_are_none(tmp_path, template, fields):
    if template == "{other}" and not fields:
        pytest.skip("any name may be a field's")
    path = write(tmp_path / "a.jsonl", lines_of({"title": "a", "content": "b"}))
    refused(lambda: read(path, template=template, fields=fields), f"--template={template}")


# ---- JSON


def test_json_lines(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    good = [
        {"text": "a\u2028b\u0085c"},
        {"text": "\ud83d\ude00"},
        {"text": 10**300},
        {"text": 1e400},
        {"text": "  x\n"},
    ]
    bad = [deep, '{"text": ' + deep + "}", '{"text": ' + "1" * 5000 + "}", "{'text': 1}", '{"text": "a', "nul",
           '"\\ud800"', '{"text": "\\udcff"}', '{"text": "a"} x', '{"text": "\\ud800\\ud800"}', "\x00"]  # fmt: skip
    text = "\n \n\r\n" + "".join(json.dumps(g) + "\r\n" + b + "\n\n" for g, b in zip(good * 3, bad, strict=False))
    found = Found(quiet=True)
    expected = ["a\u2028b\u0085c", "😀", str(10**300), "inf", "  x"]
    assert read(write(tmp_path / "a.jsonl", text), found=found) == (expected * 3)[: len(bad)]
    assert found.malformed == len(bad)
    found = Found(quiet=True)  # what half a surrogate pair stands in is not decodable, for corpus.py to leave out
    assert len(read(tmp_path / "a.jsonl", found=found, errors="skip", normalize="t2s,nfkc,strip")) == len(bad) + 3
    assert found.malformed == len(bad) - 3
    assert read(write(tmp_path / "b.jsonl", '"a"\n"b\\r\\nc"')) == ["a", "b\nc"]


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(reading, "CHUNK", 100)
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.json"):
        path = write(tmp_path / name, ("[" if name == "a.json" else "") + '"' + "a" * 200_000)
        refused(lambda path=path: read(path, fields="1"), str(path), "line 1")
    found = Found(quiet=True)
    assert read(write(tmp_path / "THUCNews" / "1.txt", "a" * 200_000), found=found) == [] and found.malformed == 1


@given(st.lists(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5)
                | st.text(max_size=9000).map(lambda t: {"text": t}), max_size=8),
       st.integers(1, 5000), st.sampled_from([None, 1]), st.booleans())  # fmt: skip
@settings(deadline=None, max_examples=80, suppress_health_check=SLOW)
@example([1234, None, 5], 1, None, False)
def test_json_arrays(values, size, indent, ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert [record for _, record in records.json_array(iter(pieces), "a")] == values
    for cut in range(0, len(text), max(1, len(text) // 7)):
        with pytest.raises(UserError):
            list(records.json_array(iter([text[:cut]]), "a"))


def test_arrays_in_files(tmp_path):
    long = {"text": "长" * (2**20 + 5)}
    assert read(write(tmp_path / "a.json", json.dumps([{"text": "a"}, long, {"text": "b"}]))) == [
        "a",
        long["text"],
        "b",
    ]
    assert read(write(tmp_path / "b.json", ' \n["a", "b"]\n')) == ["a", "b"]
    assert read(write(tmp_path / "c.json", "[]")) == [] == read(write(tmp_path / "d.json", " \n"))
    broken = {
        '["a"\n"b"]': 2, '["a",,"b"]': 1, '[,"a"]': 1, '["a",]': 1, '["a"]\n["b"]': 2, '["a"]x': 1, '\n["a",\n"b': 3,
        '["a"}': 1, "[": 1, '[\n{"text": 1}\n{"text": 2}]': 3, "[1, tru]": 1,
    }  # fmt: skip
    for text, line in broken.items():
        path = write(tmp_path / "e.json", text)
        refused(lambda path=path: read(path), str(path), f"line {line} ", "JSON array is broken")


# ---- tables


def test_tables(tmp_path):
    rows = [["title", "text"], ["一", 'a"b\nc,d'], ["", "二\n\n三"], ["四", ""]]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    expected = ['《一》\na"b\nc,d', "二\n\n三", "《四》"]
    for text in (out.getvalue(), "\ufeff" + out.getvalue(), out.getvalue().replace("\r\n", "\n\n")):
        text = text.replace("b\n\nc", "b\nc")
        assert read(write(tmp_path / "a.csv", text)) == expected
    for fields in ("text,title", "title"):
        first, *rest = fields.split(",")
        column = [row[rows[0].index(first)] for row in rows[1:]]
        documents_read = read(write(tmp_path / "a.csv", out.getvalue()), fields=fields)
        assert all(value in documents_read[i] for i, value in enumerate(c for c in column if c))
    assert read(write(tmp_path / "b.csv", "书名,正文\n甲,乙\n"), fields="正文") == ["乙"]
    refused(lambda: read(tmp_path / "b.csv"), "1, 2", "--fields=1")
    refused(lambda: read(write(tmp_path / "c.tsv", "label\ttitle\n1\t甲\n")), "label, title")
    found = Found(quiet=True)
    text = 'title,text\n1,2,3\n甲,"乙"x\n丙\n \n,\n丁,"戊"\n'
    assert read(write(tmp_path / "d.csv", text), found=found) == ["《丁》\n戊"] and found.malformed == 3
    refused(
        lambda: read(write(tmp_path / "e.csv", 'text\na\n"b\nc\n' + "d\n" * 99)), "e.csv", "line 3 ", "never closed"
    )
    assert read(write(tmp_path / "f.tsv", 'text\tlabel\n"a\t1\nb"\t2\n')) == ['"a', 'b"']


ROWS = st.tuples(st.text(st.sampled_from('a",\n 好'), max_size=6), st.text(st.sampled_from('b",\n'), min_size=1))


@given(st.lists(ROWS, max_size=9), st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_csv_is_pythons(rows, size):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("title", "text"), *rows])
    text = out.getvalue()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    expected = [dict(zip(("title", "text"), row, strict=True)) for row in rows if "".join(row).strip()]
    assert [record for _, record in records.table(iter(pieces), ",", (), "a")] == expected


# ---- Parquet


def test_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"title": str(n) if n % 3 else None, "content": f"文{n}" if n % 4 else None, "star": n, "id": [n]}
        for n in range(700)
    ]
    path = tmp_path / "a.parquet"
    table = arrow.Table.from_pylist(rows)
    broken = arrow.array([2**50] * 700, arrow.timestamp("s"))  # which is no date of Python's
    parquet.write_table(table.append_column("when", broken), path, row_group_size=100)
    expected = [f"《{r['title']}》\n{r['content'] or ''}".strip("\n") if r["title"] else r["content"] for r in rows]
    assert read(path) == [document for document in expected if document]
    assert read(path, min_star=690, fields="content") == [r["content"] for r in rows[690:] if r["content"]]
    refused(lambda: read(path, fields="title,body"), str(path), "no column body", "title, content, star")
    found = Found(quiet=True)
    assert read(path, fields="id", found=found) == [] and found.malformed == 700
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "里/a.parquet")
    assert read(tmp_path / "a.zip", fields="content") == read(path, fields="content")
    whole = path.read_bytes()
    for data in (b"", whole[:-1], whole[:100], b"PAR1" + bytes(20), b"no parquet at all"):
        refused(lambda data=data: read(write(path, data)), str(path))


# ---- plain text


def slow_split(text: str, document: str) -> list[str]:
    lines, groups = text.split("\n"), [[]]
    for line in lines:
        if not line.strip() or document == "line":
            groups.append([])
        if line.strip():
            groups[-1].append(line)
    return ["\n".join(group) for group in groups if group]


@given(
    st.text(st.sampled_from("ab \n\n\t\u3000\u2028\x1c好"), max_size=60),
    st.integers(1, 9),
    st.sampled_from(["file", "blank", "line"]),
)
@settings(deadline=None, max_examples=500)
@example(" \n\nab", 1, "blank")
@example("a\n   \nb", 9, "line")
def test_documents_in_pieces(text, size, document):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    if document == "file":
        found, expected = list(one_document(pieces)), [text.rstrip("\n")] if text.strip() else []
    else:
        found, expected = list(split_documents(pieces, documents.SEPARATORS[document])), slow_split(text, document)
    assert "" not in found and "".join(END if piece is None else piece for piece in found) == "".join(
        d + END for d in expected
    )


def test_plain_files(tmp_path):
    text = "\n甲\r\n　乙 \n\n \u3000\n丙\n"
    path = write(tmp_path / "a.txt", text)
    assert read(path) == ["\n甲\n　乙 \n\n \u3000\n丙\n"]
    assert read(path, document="blank") == ["甲\n　乙 ", "丙"]
    assert read(path, document="line") == ["甲", "　乙 ", "丙"]
    assert read(path, document="file") == ["\n甲\n　乙 \n\n \u3000\n丙"] == read(tmp_path)
    write(tmp_path / "b.txt", " \n\u3000\n")
    assert read(tmp_path / "b.txt", document="line") == [] and len(read(tmp_path)) == 1
    assert read(write(tmp_path / "c.jsonl", '{"text": "x"}'), format="text") == ['{"text": "x"}']


class Worked(str):
    """A text that counts the characters that are copied out of it or joined."""

    done = 0

    def rstrip(self, *args):
        Worked.done += len(self)
        return Worked(str.rstrip(self, *args))

    def __getitem__(self, key):
        part = str.__getitem__(self, key)
        Worked.done += len(part)
        return Worked(part)

    def __add__(self, other):
        Worked.done += len(self) + len(other)
        return Worked(str.__add__(self, other))

    def __radd__(self, other):
        Worked.done += len(self) + len(other)
        return Worked(str.__add__(other, self))


@pytest.mark.parametrize("what", ["a", " ", "\n", " \n", "好 "])
@pytest.mark.parametrize("document", ["file", "blank", "line"])
def test_work_is_linear_without_lines(monkeypatch, what, document):
    size, pieces, joined = 2**12, 2000, []
    monkeypatch.setattr(Worked, "done", 0)
    texts = (Worked((what * size)[:size]) for _ in range(pieces))
    split = documents.SEPARATORS.get(document)
    found = one_document(texts) if split is None else split_documents(texts, split)
    longest = 0
    for piece in found:
        longest = max(longest, len(piece or ""))
        joined.append(len(piece or ""))
    assert sum(joined) <= pieces * size and longest <= 3 * size
    assert Worked.done <= 6 * pieces * size


# ---- normalising

MIXED = "ab1 \n\n\t\u3000，。、“”漢語麼後乾燥①ｱﾞガㅎ한가\u1100\u1161\u11a8e\u0301ﬁ½\u00a8\u0345\x00\x1c\ufdfaЙй"
MIXED += "\u09c7\u09be㍿豈⼀\u037a\ufe70"


@given(
    st.text(st.sampled_from(MIXED), max_size=50),
    st.integers(1, 9),
    st.sampled_from([("nfkc",), ("strip",), ("nfkc", "strip")]),
)
@settings(deadline=None, max_examples=500)
def test_normalising_in_pieces_is_normalising_the_whole(text, size, steps):
    check_normalised(text, size, steps)


@given(st.text(st.sampled_from(MIXED + "干隻隻隻為著一目瞭然乾坤頭髮發展後宮皇后"), max_size=50), st.integers(1, 9),
       st.sampled_from([("t2s",), ("nfkc", "t2s", "strip")]))  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_simplifying_in_pieces_is_simplifying_the_whole(text, size, steps):
    pytest.importorskip("opencc")
    check_normalised(text, size, steps)


def check_normalised(text: str, size: int, steps: tuple[str, ...]) -> None:
    expected = unicodedata.normalize("NFKC", text) if "nfkc" in steps else text
    if "t2s" in steps:
        import opencc

        expected = opencc.OpenCC("t2s").convert(expected)
    if "strip" in steps:
        expected = "".join(c for c in expected if c in "\t\n" or not unicodedata.category(c) == "Cc" or ord(c) > 127)
        expected = "\n".join(line.strip() for line in expected.split("\n")).strip()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    source = documents.Source((), document="file", normalize=steps)
    found = list(source.normalized([*pieces, None, *pieces, None]))
    assert "" not in found
    assert "".join(END if piece is None else piece for piece in found) == (expected + END if expected else "") * 2
    lone = list(documents.Source((), normalize=steps).normalized(pieces))
    assert "".join(lone) == expected and None not in lone


def test_no_letter_behind_a_cut_combines():
    class_of = re.compile(f"[{documents.LETTERS}]")
    letters = [chr(c) for c in range(0x30000) if class_of.match(chr(c)) and unicodedata.category(chr(c)) != "Cn"]
    assert len(letters) > 80_000
    befores = ["a", "\u1100", "\uac00", "\u09c7", "か", "e\u0301", " ", "，", "\u0915"]
    for letter in letters:
        normal = unicodedata.normalize("NFKC", letter)
        assert normal.strip() == normal and unicodedata.combining(unicodedata.normalize("NFKD", letter)[0]) == 0
    for before in befores:
        whole = unicodedata.normalize("NFKC", "".join(before + letter for letter in letters))
        apart = "".join(
            unicodedata.normalize("NFKC", before) + unicodedata.normalize("NFKC", letter) for letter in letters
        )
        assert whole == apart
    assert not LAST_CUT.match("漢語") and LAST_CUT.match("漢，語").end() == 2


def test_a_long_text_is_normalised_in_pieces(tmp_path):
    text = "漢語，" * 10**6
    source = documents.Source((), normalize=("nfkc",))
    pieces = list(source.normalized(text[i : i + 1000] for i in range(0, len(text), 1000)))
    assert "".join(pieces) == "漢語," * 10**6 and max(map(len, pieces)) < 2000


def test_a_long_text_without_a_place_to_cut(monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 5000)
    source = documents.Source((), normalize=("nfkc",))
    assert "".join(source.normalized(["漢" * 1000] * 5)) == "漢" * 5000
    refused(lambda: list(source.normalized(["漢" * 1000] * 6)), "--normalize=nfkc", "5,000")


# ---- anything at all, through the whole of corpus.prepare

PARTS = [
    "《小猫》\n小猫去河边钓鱼，钓到了一条大鱼。",
    "从前有一座山，山上有一个老和尚。",
    "今天天气很好，我们一起去公园玩。",
    "The end, 完了。",
    "他说：“我不知道。”大家都笑了。",
    "月亮出来了，星星也出来了。",
]


def prepared(inputs: Path, dest: Path, **options) -> list[str] | None:
    """The documents of the dataset that is made; None where a sentence refuses to."""
    config = Config(**(corpus.DEFAULTS | {"dest": str(dest), "max_bad": "100%"} | options))
    try:
        meta = corpus.prepare(corpus.open_source([str(inputs)], config), config, dest)
    except UserError as error:
        assert str(error)
        return None
    table = [c.encode() for c in meta["chars"]] + [bytes([b]) for b in range(256)] + [END.encode()]
    import numpy as np

    ids = [i for split in ("train", "val") for i in np.fromfile(dest / f"{split}.bin", "<u2").tolist()]
    return b"".join(table[i] for i in ids).decode("utf-8").split(END)[:-1]


def valid_files(rng: random.Random) -> dict[str, tuple[str, dict]]:
    """Texts of every kind, by file name, with the settings that go with them."""
    rows = [{"title": part[:4], "content": part} for part in PARTS * 3]
    out = io.StringIO()
    csv.DictWriter(out, rows[0]).writeheader()
    csv.DictWriter(out, rows[0]).writerows(rows)
    return {
        "a.jsonl": (lines_of(*rows), {}),
        "b.json": (json.dumps(rows, ensure_ascii=False), {}),
        "c.csv": (out.getvalue(), {}),
        "d.tsv": ("".join(f"{part.replace(chr(10), ' ')}\t{n}\n" for n, part in enumerate(PARTS * 3)), {}),
        "e.txt": ("\n\n".join(PARTS * 3), {"document": rng.choice(["blank", "line", "file", "text"])}),
        "f.txt": ("---\n标题：甲\n作者：乙\n---\n" + "\n".join(PARTS), {"format": rng.choice(["essays", "thucnews"])}),
        "wiki_00": (lines_of(*[{"title": r["title"], "text": r["content"]} for r in rows]), {}),
    }  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 3, 20])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            data[at : at + rng.randint(1, 9)] = b""
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            data[at:at] = rng.choice(
                [b'"', b"\r", b"\n", b"\0", b"[", b"{", b"\\u", b",", b"\xff\xfe", b"---\n", b"\xef\xbb\xbf"]
            )
        else:
            data[at:at] = data[rng.randrange(len(data) + 1) :][:50]
    return bytes(data[: rng.randrange(len(data) + 1)]) if rng.random() < 0.2 else bytes(data)


def packed(name: str, data: bytes, how: str) -> tuple[str, bytes]:
    if how == ".zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, data)
        return name + how, out.getvalue()
    return (name + how, gzip.compress(data)) if how == ".gz" else (name, data)


FUZZED, EXAMPLES = 700, 300  # of files


def test_any_file_makes_a_dataset_or_a_sentence(tmp_path, monkeypatch):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(arrow.table({"title": PARTS, "content": PARTS}), out)
    made = 0
    for seed in range(FUZZED):
        rng = random.Random(seed)
        monkeypatch.setattr(reading, "CHUNK", rng.choice([7, 100, 2**20]))
        files = valid_files(rng)
        name = rng.choice([*files, "g.parquet", "random.txt", "random.jsonl"])
        if name in files:
            text, options = files[name]
            encoding = rng.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "utf-32"])
            data = text.encode(encoding)
        else:
            data, options = (out.getvalue() if "parquet" in name else rng.randbytes(rng.randrange(300))), {}
        how = rng.choice(["", "", "", ".gz", ".zip"])
        if rng.random() < 0.5:
            name, data = packed(name, mutated(data, rng), how)
        else:
            name, data = packed(name, data, how)
            data = mutated(data, rng)
        normalize = rng.choice(["none", "none", "nfkc,strip"])
        path = write(tmp_path / "in" / name, data)
        found = prepared(path, tmp_path / "out", errors=rng.choice(["stop", "skip"]), normalize=normalize, **options)
        made += bool(found)
        path.unlink()
    assert made > FUZZED / 6


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.floats(0, 1)), min_size=4, max_size=25),
       st.sampled_from(["utf-8", "utf-8-sig", "gb18030", "big5", "utf-16", "utf-16-be"]),
       st.sampled_from(["blank", "line", "jsonl", "array", "csv", "file"]),
       st.sampled_from([1, 50, 2**20]))  # fmt: skip
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=SLOW)
def test_only_what_cannot_be_decoded_is_left_out(tmp_path_factory, chunk, parts, encoding, form, size):
    """Some of the documents are spoiled by bytes that their encoding does not have; the others are kept."""
    code = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le"}.get(encoding, encoding)
    traditional = "我們去看書，老師說這個字很好，大家都笑了，今天天氣不錯。"
    folder, texts, kept = tmp_path_factory.mktemp("d"), [], []
    for number, (which, spoiled, where) in enumerate(parts):
        text = f"{number}：" + (traditional if encoding == "big5" else PARTS[which].replace("\n", " "))
        spoiled = spoiled and sum(s is not None for s in texts) < len(parts) and number % 3 == 1
        data = text.encode(code)
        if spoiled:
            at = int(where * len(text))
            bad = b"\0\xdc" if code == "utf-16-le" else b"\xdc\0" if code == "utf-16-be" else b"\xff"
            data = text[:at].encode(code) + bad + text[at:].encode(code)
        else:
            kept.append(text)
        texts.append(data)
    chunk(size)
    before = {"jsonl": '{"text": "', "array": '{"text": "', "csv": '"'}.get(form, "").encode(code)
    behind = {"jsonl": '"}\n', "array": '"}', "csv": '"\n'}.get(form, "").encode(code)
    between = {"blank": "\n\n", "line": "\n", "array": ",\n"}.get(form, "").encode(code)
    data = between.join(before + text + behind for text in texts)
    start = {"array": "[", "csv": "text\n"}.get(form, "").encode(code)
    mark = {"utf-8-sig": b"\xef\xbb\xbf", "utf-16": b"\xff\xfe"}.get(encoding, b"")
    if form == "file":
        for number, text in enumerate(texts):
            write(folder / "in" / f"{number:03}.txt", mark + text)
    else:
        suffix = {"jsonl": ".jsonl", "array": ".json", "csv": ".csv"}.get(form, ".txt")
        write(folder / "in" / f"a{suffix}", mark + start + data + ("]".encode(code) if form == "array" else b""))
    document = form if form in ("blank", "line") else "file"
    named = "auto" if size == 2**20 else encoding  # which a few bytes cannot tell
    found = prepared(folder / "in", folder / "out", errors="skip", document=document, encoding=named)
    assert found is not None and sorted(found) == sorted(kept)
