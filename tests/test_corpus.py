"""The prepare scripts, run as a user runs them; what they write is held against plain Python and tiktoken."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import charset
import corpus
import reading
from configurator import Config, UserError
from reading import File
from tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if (SHARED / "data" / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "data" / "tiktoken_cache"))
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set"
)
SHAKESPEARE = SHARED / "data" / "en" / "tinyshakespeare.txt"
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"no {SHAKESPEARE}")
END = "<|endoftext|>"


def run(name: str, *words, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd or ROOT, env=os.environ | env, capture_output=True, timeout=120)
    done.out = done.stdout.decode(env.get("PYTHONIOENCODING", "utf-8"))
    done.err = done.stderr.decode(env.get("PYTHONIOENCODING", "utf-8"), errors="replace")
    return done


def options(**changed) -> Config:
    """The settings of a prepare.py."""
    settings = {"tokenizer": "char", "val_fraction": 0.1, "min_count": 1, "byte_fallback": True, "dest": ""}
    return Config(**(settings | changed))


def prepared(name: str, dest: Path, *words, **options) -> dict:
    """Runs the script into `dest`, which must work, and gives meta.json after checking it against the files."""
    done = run(name, f"--dest={dest}", *words, **options)
    assert done.returncode == 0, done.err
    assert "round trip: identical" in done.out
    raw = (dest / "meta.json").read_bytes().decode("utf-8")
    meta = json.loads(raw)
    assert raw.endswith("}\n") and not list(dest.glob("*.tmp"))
    tokens = [np.fromfile(dest / f"{split}.bin", "<u2") for split in ("train", "val")]
    for split, ids in zip(("train", "val"), tokens, strict=True):
        data = (dest / f"{split}.bin").read_bytes()
        described = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "tokens": len(data) // 2}
        assert meta["files"][f"{split}.bin"] == described and len(ids) > 0
    assert meta["tokens"] == sum(map(len, tokens)) and meta["max_id"] == max(ids.max() for ids in tokens)
    return meta


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.err, done.err
    sentence = done.err.strip().splitlines()[-1]
    assert sentence.startswith("prepare.py: ") and not [w for w in words if w not in sentence], sentence


def hashed(document: str) -> float:
    """Where a document's hash lies between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "little") / 2**64


def by_hash(documents: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """(train, val) of documents with different texts; where one would be empty, the nearest document is in it."""
    val = {d for d in documents if hashed(d) < val_fraction} or {min(documents, key=hashed)}
    if len(val) == len(documents):
        val -= {max(documents, key=hashed)}
    return [d for d in documents if d not in val], [d for d in documents if d in val]


def ids(dest: Path, split: str) -> list[int]:
    return np.fromfile(dest / f"{split}.bin", "<u2").tolist()


def slow_text(dest: Path, split: str) -> str:
    """Decodes by hand: characters, then 256 bytes, then <|endoftext|>."""
    chars = json.loads((dest / "meta.json").read_text(encoding="utf-8"))["chars"]
    table = [c.encode() for c in chars] + [bytes([b]) for b in range(256)] + [END.encode()]
    return b"".join(table[i] for i in ids(dest, split)).decode("utf-8")


# ---- nanoGPT's own datasets


@needs_shakespeare
def test_shakespeare_char_is_nanogpts(tmp_path):
    meta = prepared("shakespeare_char", tmp_path, f"--input={SHAKESPEARE}")
    text = SHAKESPEARE.read_text(encoding="utf-8")
    chars = sorted(set(text))
    number = {c: i for i, c in enumerate(chars)}
    cut = int(len(text) * 0.9)
    expected = {split: [number[c] for c in part] for split, part in (("train", text[:cut]), ("val", text[cut:]))}
    assert (len(chars), len(expected["train"]), len(expected["val"])) == (65, 1003854, 111540)
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.bin").read_bytes() == np.array(expected[split], np.uint16).tobytes()
    assert (meta["vocab_size"], meta["chars"], meta["end_of_text"]) == (65, "".join(chars), None)
    assert (meta["documents"], meta["characters"], meta["unknown_characters"], meta["max_id"]) == (1, 1115394, 0, 64)


@needs_shakespeare
@needs_gpt2
def test_shakespeare_is_nanogpts(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    meta = prepared("shakespeare", tmp_path, f"--input={SHAKESPEARE}")
    text = SHAKESPEARE.read_text(encoding="utf-8")
    cut, encoding = int(len(text) * 0.9), tiktoken.get_encoding("gpt2")
    expected = {"train": encoding.encode_ordinary(text[:cut]), "val": encoding.encode_ordinary(text[cut:])}
    assert (len(expected["train"]), len(expected["val"])) == (301966, 36059)
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.bin").read_bytes() == np.array(expected[split], np.uint16).tobytes()
    assert (meta["kind"], meta["vocab_size"], meta["dtype"], meta["end_of_text"]) == ("gpt2", 50257, "uint16", 50256)


# ---- the stories, and Chinese texts of one's own


def test_stories_with_no_argument_from_anywhere_on_a_gbk_console(tmp_path):
    if (ROOT / "data" / "chinese" / "input.txt").exists():
        pytest.skip("data/chinese/input.txt takes the stories' place")
    console = {"PYTHONIOENCODING": "gbk", "LANG": "C", "LC_ALL": "C"}
    meta = prepared("chinese", tmp_path / "new" / "folder", cwd=tmp_path, **console)
    dest = tmp_path / "new" / "folder"
    stories = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")
    assert [slow_text(dest, split) for split in ("train", "val")] == [
        "".join(story + END for story in stories if (hashed(story) < 0.1) == (split == "val"))
        for split in ("train", "val")
    ]
    assert (meta["documents"], meta["template"]) == (723, "《{title}》\n{content}")
    assert meta["characters"] == sum(map(len, stories)) and meta["vocab_size"] == 1054 + 256 + 1
    assert all(story.startswith("《") for story in stories)


def test_gbk_console_shows_what_it_can(tmp_path):
    (tmp_path / "t.txt").write_text("好😀é\n" * 20, encoding="utf-8")
    done = run("chinese", f"--input={tmp_path / 't.txt'}", f"--dest={tmp_path}", PYTHONIOENCODING="gbk")
    assert done.returncode == 0 and "first line: 好|?|é" in done.out
    done = run("chinese", f"--input={tmp_path / 't.txt'}", f"--dest={tmp_path}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "first line: ?|?|?" in done.out


def test_gbk_file_without_and_with_its_encoding(tmp_path):
    text = "第一回　天气很好。\n" * 300
    file = tmp_path / "小说.txt"
    file.write_bytes(b"ascii first\n" + text.encode("gb18030"))
    done = run("chinese", f"--input={file}", f"--dest={tmp_path / 'out'}", "--encoding=utf-8")
    refused(done, str(file), "byte 12 ", "b5 da", "--encoding=gb18030")  # 第 is B5 DA
    assert not (tmp_path / "out").exists()
    for word in ("--encoding=auto", "--encoding=gb18030"):
        prepared("chinese", tmp_path / "out", f"--input={file}", word)
        assert slow_text(tmp_path / "out", "train") + slow_text(tmp_path / "out", "val") == "ascii first\n" + text
    refused(run("chinese", f"--input={file}", "--encoding=klingon"), "klingon", "gb18030")
    refused(run("chinese", f"--input={file}", "--encoding=hex"), "hex", "gb18030")


def test_crlf_and_bom(tmp_path):
    for name, data in (
        ("plain", "一二\n三\n" * 50),
        ("dos", "\ufeff" + "一二\r\n三\r\n" * 50),
        ("mac", "一二\r三\r" * 50),
    ):
        (tmp_path / f"{name}.txt").write_bytes(data.encode("utf-8"))
        prepared("chinese", tmp_path / name, f"--input={tmp_path / name}.txt")
        for file in ("train.bin", "val.bin", "meta.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_folder_and_several_files_are_documents(tmp_path):
    folder = tmp_path / "books"
    (folder / "sub").mkdir(parents=True)
    for name, text in {
        "b.txt": "乙" * 30 + "\n\n\n",
        "a.TXT": "甲\n\n甲" * 10,
        "sub/c.txt": "丙" * 9 + "\n" + "丁" * 10,
        "empty.txt": "\n\n",
        "notes.md": "not read",
        ".hidden.txt": "not read",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    documents = ["甲\n\n甲" * 10, "乙" * 30, "丙" * 9 + "\n" + "丁" * 10]
    for fraction in (0.2, 0.001, 0.999):
        meta = prepared("chinese", tmp_path / "out", f"--input={folder}", f"--val_fraction={fraction}")
        for split, part in zip(("train", "val"), by_hash(documents, fraction), strict=True):
            assert slow_text(tmp_path / "out", split) == "".join(d + END for d in part)
        assert (meta["documents"], meta["characters"], meta["tokens"]) == (3, 90, 93)
    files = [f"--input={folder / name}" for name in ("sub/c.txt", "b.txt")]
    meta = prepared("shakespeare_char", tmp_path / "out", *files)
    assert (meta["chars"], meta["end_of_text"], meta["vocab_size"]) == ("\n丁丙乙", 4, 5)
    expected = {documents[2]: [2] * 9 + [0] + [1] * 10 + [4], documents[1]: [3] * 30 + [4]}
    for split, part in zip(("train", "val"), by_hash(list(expected), 0.1), strict=True):
        assert ids(tmp_path / "out", split) == expected[part[0]]


def test_a_document_stays_where_it_is_whatever_is_added(tmp_path):
    lines = [f"第{n}句话。" for n in range(400)]
    for name, part in (("few", lines[:200]), ("many", lines)):
        (tmp_path / "t.txt").write_text("\n".join(part), encoding="utf-8")
        prepared("chinese", tmp_path / name, f"--input={tmp_path / 't.txt'}", "--document=line")
        for split, expected in zip(("train", "val"), by_hash(part, 0.1), strict=True):
            assert slow_text(tmp_path / name, split) == "".join(line + END for line in expected)
    few, many = (set(slow_text(tmp_path / name, "val").split(END)) for name in ("few", "many"))
    assert few < many and 20 < len(many) < 60


def test_folder_with_one_file_is_a_document_with_its_end(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "t.txt").write_text("ab\n" * 10 + "\n\n")
    meta = prepared("shakespeare_char", tmp_path / "out", f"--input={tmp_path / 'in'}")
    # without its last newlines, cut inside (there is no other place), and <|endoftext|> at its end
    assert ids(tmp_path / "out", "train") + ids(tmp_path / "out", "val") == [1, 2, 0] * 9 + [1, 2, 3]
    assert len(ids(tmp_path / "out", "train")) == int(29 * 0.9) and meta["documents"] == 1


# ---- in pieces


@given(st.text(alphabet="ab好1 \n.,'。", min_size=20, max_size=200), st.integers(1, 40), st.floats(0.1, 0.9))
@settings(deadline=None, max_examples=150)
@needs_gpt2
def test_pieces_have_the_ids_of_the_whole(text, chunk, val_fraction):
    encoding = pytest.importorskip("tiktoken").get_encoding("gpt2")
    cut = int(len(text) * (1 - val_fraction))
    chars = sorted(set(text))
    sizes, (reading.CHUNK, charset.SAMPLE) = (reading.CHUNK, charset.SAMPLE), (chunk, chunk)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "t.txt")
            path.write_bytes(text.encode("utf-8"))
            source = corpus.Source((File(path),))
            corpus.prepare(source, options(tokenizer="gpt2", val_fraction=val_fraction), folder)
            assert ids(Path(folder), "train") == encoding.encode_ordinary(text[:cut])
            assert ids(Path(folder), "val") == encoding.encode_ordinary(text[cut:])
            corpus.prepare(source, options(val_fraction=val_fraction), folder)
            assert ids(Path(folder), "train") == [chars.index(c) for c in text[:cut]]
            assert ids(Path(folder), "val") == [chars.index(c) for c in text[cut:]]
    finally:
        reading.CHUNK, charset.SAMPLE = sizes


@needs_gpt2
def test_stories_in_gpt2_tokens(tmp_path):
    encoding = pytest.importorskip("tiktoken").get_encoding("gpt2")
    stories = ROOT / "data" / "chinese" / "stories_zh.txt"
    source = corpus.Source((File(stories),), document="blank")
    meta = corpus.prepare(source, options(tokenizer="gpt2"), tmp_path)
    documents = stories.read_text(encoding="utf-8").strip("\n").split("\n\n")
    for split, part in zip(("train", "val"), by_hash(documents, 0.1), strict=True):
        assert ids(tmp_path, split) == [id for story in part for id in (*encoding.encode_ordinary(story), 50256)]
    assert ids(tmp_path, "train")[-1] == 50256 and meta["max_id"] == 50256


# ---- which documents


def lines_of(dest: Path) -> tuple[list[str], list[str]]:
    """The documents of both splits."""
    return tuple(slow_text(dest, split).split(END)[:-1] for split in ("train", "val"))


def test_duplicates_and_short_documents_are_left_out(tmp_path):
    words = ["春天来了", "夏", "春天来了", "秋天也来了", "", "夏", "冬天", "秋天也来了"] + [
        f"第{n}天" for n in range(40)
    ]
    (tmp_path / "t.txt").write_text("\n".join(words), encoding="utf-8")
    given = f"--input={tmp_path / 't.txt'}", "--document=line"
    meta = prepared("chinese", tmp_path / "all", *given)
    assert meta["documents"] == 47 and sorted(sum(lines_of(tmp_path / "all"), [])) == sorted(filter(None, words))
    done = run("chinese", *given, "--dedup", "--min_chars=2", f"--dest={tmp_path / 'some'}")
    kept = [w for w in dict.fromkeys(words) if len(w) >= 2]
    assert lines_of(tmp_path / "some") == by_hash(kept, 0.1)
    assert "left out: 2 shorter than 2 characters, 2 seen before" in done.out
    # a character of what was left out is not in the vocabulary
    assert "夏" in meta["chars"] and "夏" not in load_tokenizer(tmp_path / "some").chars


def test_a_long_document_that_is_left_out_leaves_no_trace(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    long = "长" * 2_500_000  # in more than one piece
    for name, text in {"a": long, "b": long, "c": long + "文", "d": "短文"}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    meta = prepared("chinese", tmp_path / "out", f"--input={folder}", "--dedup")
    assert meta["documents"] == 3 and meta["characters"] == 2 * len(long) + 3
    assert sorted(sum(lines_of(tmp_path / "out"), []), key=len) == ["短文", long, long + "文"]
    meta = prepared("chinese", tmp_path / "out", f"--input={folder}", "--min_chars=3", "--dedup")
    assert meta["documents"] == 2 and "短" not in meta["chars"]


def test_a_corpus_own_validation_file(tmp_path):
    records = [json.dumps({"title": f"题{n}", "content": f"文{n}"}, ensure_ascii=False) for n in range(30)]
    (tmp_path / "train.json").write_text("\n".join(records[:20]), encoding="utf-8")
    (tmp_path / "valid.json").write_text("\n".join(records[20:] + records[:1]), encoding="utf-8")
    given = f"--input={tmp_path / 'train.json'}", f"--val_input={tmp_path / 'valid.json'}"
    meta = prepared("chinese", tmp_path / "out", *given, "--dedup")
    train, val = ([f"《题{n}》\n文{n}" for n in part] for part in (range(20), range(20, 30)))
    assert lines_of(tmp_path / "out") == (train, val) and meta["template"] == "《{title}》\n{content}"
    # of two plain texts, each is a split, whole and without an end
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 30)
    given = f"--input={tmp_path / 'a.txt'}", f"--val_input={tmp_path / 'b.txt'}"
    prepared("shakespeare_char", tmp_path / "out", *given[:1])
    prepared("chinese", tmp_path / "out", *given)
    assert (ids(tmp_path / "out", "train"), ids(tmp_path / "out", "val")) == ([0] * 30, [1] * 30)
    refused(run("chinese", *given[:1], "--val_input=nowhere.txt", f"--dest={tmp_path}"), "nowhere.txt")


def test_undecodable_bytes_stop_or_cost_one_document(tmp_path):
    lines = [f"第{n}行好".encode("gb18030") for n in range(50)]
    lines[7] += b"\xff\xff"
    (tmp_path / "t.txt").write_bytes(b"\n".join(lines))
    given = f"--input={tmp_path / 't.txt'}", "--document=line", f"--dest={tmp_path / 'out'}"
    at = sum(len(line) + 1 for line in lines[:7]) + len(lines[7]) - 2
    refused(run("chinese", *given), "t.txt", "gb18030", f"byte {at:,} ", "(ff ff", "--errors=skip")
    assert not (tmp_path / "out").exists()
    done = run("chinese", *given, "--errors=skip")
    assert "left out: 1 not decodable" in done.out
    assert lines_of(tmp_path / "out") == by_hash([f"第{n}行好" for n in range(50) if n != 7], 0.1)
    refused(run("chinese", given[0], given[2], "--errors=skip"), "t.txt", "--document=line")


def test_malformed_records_are_told_and_too_many_stop(tmp_path):
    records = [json.dumps({"text": f"文{n}"}, ensure_ascii=False) for n in range(2000)]
    for bad, words, status in (([5], [], 0), ([5, 9], [], 0), ([5, 9, 11], [], 2), ([5, 9, 11], ["--max_bad=1%"], 0),
                               ([5], ["--max_bad=0"], 2), ([5, 9, 11], ["--max_bad=0.0015"], 0)):  # fmt: skip
        lines = ["{broken" if n in bad else record for n, record in enumerate(records)]
        (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
        done = run("chinese", f"--input={tmp_path / 't.jsonl'}", f"--dest={tmp_path / 'out'}", *words)
        assert done.returncode == status, (bad, words, done.err)
        assert all(f"t.jsonl, line {n + 1}: malformed" in done.err for n in bad)
        if status:
            refused(done, f"{len(bad)} of 2,000", "--max_bad")
        else:
            kept = [f"文{n}" for n in range(2000) if n not in bad]
            assert lines_of(tmp_path / "out") == by_hash(kept, 0.1)
            assert f"left out: {len(bad)} malformed" in done.out
    refused(run("chinese", f"--input={tmp_path / 't.jsonl'}", "--max_bad=much"), "--max_bad=much")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2", "bpe"])
def test_processes_that_encode_change_nothing(tmp_path, tokenizer):
    if tokenizer == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set")
    pytest.importorskip({"char": "numpy", "gpt2": "tiktoken", "bpe": "tokenizers"}[tokenizer])
    (tmp_path / "t.txt").write_text(
        "".join(f"第{n}回，他说：「好。」\n" * 20 + "\n" for n in range(3000)), encoding="utf-8"
    )
    given = f"--input={tmp_path / 't.txt'}", f"--tokenizer={tokenizer}", "--vocab_size=400", "--document=blank"
    for number in (1, 2):
        prepared("chinese", tmp_path / str(number), *given, f"--num_proc={number}")
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_what_is_kept_is_counted(tmp_path):
    (tmp_path / "t.txt").write_bytes("　　一\0二\ufffd\n".encode() * 20)
    done = run("chinese", f"--input={tmp_path / 't.txt'}", f"--dest={tmp_path / 'out'}")
    assert "kept as they are: 40 U+3000 (ideographic space), 20 NUL, 20 U+FFFD" in done.out
    assert slow_text(tmp_path / "out", "train").startswith("　　一\0二\ufffd\n")
    done = run("chinese", f"--input={tmp_path / 't.txt'}", f"--dest={tmp_path / 'out'}", "--normalize=strip,nfkc")
    assert "kept" not in done.out.replace("U+FFFD", "") or "U+3000" not in done.out
    assert slow_text(tmp_path / "out", "train").startswith("一二\ufffd\n一")
    refused(run("chinese", "--normalize=nfc"), "--normalize=nfc")


def test_a_text_that_grows_while_it_is_read_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("一行\n" * 40, encoding="utf-8")
    survey = corpus.survey

    def slow_survey(*args):
        found = survey(*args)
        with path.open("a", encoding="utf-8") as file:
            file.write("又一行\n" * 40)
        return found

    monkeypatch.setattr(corpus, "survey", slow_survey)
    for document in ("line", "text"):
        source = corpus.Source((File(path),), document=document)
        with pytest.raises(UserError, match="changed while it was being read"):
            corpus.prepare(source, options(), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_that_encode_end_with_their_parent(tmp_path, number):
    (tmp_path / "t.txt").write_text("".join(f"第{n}回，他说：「好。」\n" for n in range(200_000)), encoding="utf-8")
    script = str(ROOT / "data" / "chinese" / "prepare.py")
    command = [sys.executable, script, f"--input={tmp_path / 't.txt'}", "--num_proc=2", f"--dest={tmp_path / 'out'}"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, workers = time.monotonic() + 60, []
    while len(workers) < 2 and parent.poll() is None and time.monotonic() < deadline:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    parent.send_signal(number)
    parent.wait()
    assert len(workers) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_has_no_text_is_counted_and_a_wrong_flag_is_named(tmp_path):
    records = [{"text": f"文{n}"} for n in range(30)] + [{"text": ""}, {"text": None}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    given = f"--input={tmp_path / 't.jsonl'}", f"--dest={tmp_path / 'out'}"
    done = run("chinese", *given)
    assert done.returncode == 0 and "left out: 2 without text" in done.out
    refused(run("chinese", *given, "--val_input=/nowhere"), "--val_input=/nowhere")
    (tmp_path / "b.jsonl").write_text('{"a{b}": "文"}\n' * 30, encoding="utf-8")
    done = run("chinese", f"--input={tmp_path / 'b.jsonl'}", given[1])
    assert done.returncode == 0 and done.out.split()[:4] == ["train", "val", "in", "all"], done.err


def test_seen_is_a_set():
    rng = np.random.default_rng(0)
    numbers = [0, 1, 2**64 - 1, *rng.integers(0, 2**63, 5000).tolist()]
    numbers += numbers[::3]
    seen, reference = corpus.Seen(), set()
    for number in numbers:
        assert seen.add(number or 1) == ((number or 1) not in reference)
        reference.add(number or 1)


# ---- vocabularies


def test_rare_characters_take_the_byte_path(tmp_path):
    text = "一一一二二二三三四" * 10 + "稀é"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    meta = prepared("chinese", tmp_path / "out", f"--input={tmp_path / 't.txt'}", "--min_count=11")
    assert (meta["chars"], meta["unknown_characters"]) == ("一三二", 12)  # 四 ten times, 稀 and é once
    assert slow_text(tmp_path / "out", "train") + slow_text(tmp_path / "out", "val") == text
    four = [3 + byte for byte in "四".encode()]
    assert ids(tmp_path / "out", "train")[:11] == [0, 0, 0, 2, 2, 2, 1, 1, *four]
    refused(run("shakespeare_char", f"--input={tmp_path / 't.txt'}", "--min_count=2"), "--byte_fallback=True")
    refused(run("chinese", f"--input={tmp_path / 't.txt'}", "--min_count=0"), "--min_count=0")


def test_vocabulary_of_another_dataset(tmp_path):
    (tmp_path / "a.txt").write_text("cab" * 10, encoding="utf-8")
    (tmp_path / "b.txt").write_text("abc好bQ" * 10, encoding="utf-8")
    prepared("chinese", tmp_path / "a", f"--input={tmp_path / 'a.txt'}")
    meta = prepared("chinese", tmp_path / "b", f"--input={tmp_path / 'b.txt'}", f"--tokenizer={tmp_path / 'a'}")
    assert (meta["chars"], meta["unknown_characters"]) == ("abc", 20)
    assert ids(tmp_path / "b", "train")[:8] == [0, 1, 2, 3 + 0xE5, 3 + 0xA5, 3 + 0xBD, 1, 3 + ord("Q")]
    assert slow_text(tmp_path / "b", "train") + slow_text(tmp_path / "b", "val") == "abc好bQ" * 10

    prepared("shakespeare_char", tmp_path / "a", f"--input={tmp_path / 'a.txt'}")
    before = {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    done = run("chinese", f"--input={tmp_path / 'b.txt'}", f"--tokenizer={tmp_path / 'a'}", f"--dest={tmp_path / 'b'}")
    refused(done, "'好' (U+597D, first at position 3)", "'Q' (U+0051, first at position 5)", "--byte_fallback=True")
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == before


def test_nanogpts_vocabulary(tmp_path):
    itos = {0: "c", 1: "好", 2: "a"}
    with (tmp_path / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}}, file)
    (tmp_path / "t.txt").write_text("a好c" * 10, encoding="utf-8")
    words = f"--input={tmp_path / 't.txt'}", f"--tokenizer={tmp_path}"
    prepared("shakespeare_char", tmp_path / "out", *words)
    assert ids(tmp_path / "out", "train") == [2, 1, 0] * 9
    refused(run("chinese", words[0], *words, f"--dest={tmp_path / 'out'}"), "no token to end 2 documents with")
    # in the folder itself, the new meta.json takes the pickle's place
    prepared("shakespeare_char", tmp_path, *words)
    assert not (tmp_path / "meta.pkl").exists() and load_tokenizer(tmp_path).encode("ca").tolist() == [0, 2]


def test_vocabulary_of_a_checkpoint(tmp_path):
    torch = pytest.importorskip("torch")
    meta = CharTokenizer("cab", byte_fallback=True, end_of_text=True).meta()
    torch.save({"model": {}, "model_args": {"vocab_size": 260}, "tokenizer": meta}, tmp_path / "ckpt.pt")
    (tmp_path / "t.txt").write_text("abcd" * 10, encoding="utf-8")
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        prepared("chinese", tmp_path / "out", f"--input={tmp_path / 't.txt'}", f"--tokenizer={path}")
        assert ids(tmp_path / "out", "train") == [1, 2, 0, 3 + ord("d")] * 9
    done = run("chinese", f"--tokenizer={tmp_path / 'last.pt'}", f"--dest={tmp_path / 'new'}")
    refused(done, str(tmp_path / "last.pt"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_vocabularies_that_cannot_be_had(tmp_path):
    (tmp_path / "t.txt").write_text("abc" * 10)
    words = f"--input={tmp_path / 't.txt'}", f"--dest={tmp_path / 'out'}", f"--tokenizer={tmp_path}"
    refused(run("chinese", *words), f"--tokenizer={tmp_path}", "dataset folder")
    refused(run("chinese", *words[:2], "--tokenizer=word"), "--tokenizer=word")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil(str(tmp_path / "executed"))}))
    refused(run("chinese", *words), str(tmp_path / "meta.pkl"), "mkdir")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "meta.json").write_text('{"kind": "char", "chars"')
    refused(run("chinese", *words), str(tmp_path / "meta.json"), "prepare.py again")
    assert not (tmp_path / "out").exists()


# ---- what a user can get wrong


def test_texts_that_are_not_there_or_too_small(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    for name, *words in (
        ("empty.txt", "no text"),
        ("one.txt", "too few"),
        ("folder", "there is no .txt"),
        ("nowhere.txt", "no such file"),
    ):
        done = run("chinese", f"--input={tmp_path / name}", f"--dest={tmp_path / 'out'}")
        refused(done, str(tmp_path / name), *words)
    for fraction in ("0", "1", "-0.1", "2"):
        refused(run("chinese", f"--val_fraction={fraction}", f"--dest={tmp_path / 'out'}"), "--val_fraction=")
    assert not (tmp_path / "out").exists()
    refused(run("chinese", f"--dest={tmp_path / 'one.txt'}"), str(tmp_path / "one.txt"), "--dest")


@pytest.mark.parametrize("name", ["chinese", "shakespeare_char", "shakespeare", "openwebtext"])
def test_help_is_fast(name):
    command = [sys.executable, "-X", "importtime", str(ROOT / "data" / name / "prepare.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0 and "--val_fraction=" in done.stdout and "--dest=" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "configurator" in imported and not imported & {"numpy", "torch", "tiktoken", "datasets", "tqdm"}


# ---- downloads


def test_fetch(tmp_path):
    (tmp_path / "there.txt").write_bytes(b"hello")
    url, sha256 = (tmp_path / "there.txt").as_uri(), hashlib.sha256(b"hello").hexdigest()
    corpus.fetch(url, tmp_path / "here.txt", sha256)
    assert (tmp_path / "here.txt").read_bytes() == b"hello"
    for address, expected in ((url, "0" * 64), ("http://127.0.0.1:9/x.txt", sha256)):
        with pytest.raises(UserError) as error:
            corpus.fetch(address, tmp_path / "new.txt", expected)
        assert all(word in str(error.value) for word in (address, expected, str(tmp_path / "new.txt")))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["here.txt", "there.txt"]


@pytest.mark.parametrize("name", ["shakespeare", "shakespeare_char"])
def test_shakespeare_without_network(tmp_path, name):
    if (ROOT / "data" / name / "input.txt").exists():
        pytest.skip("it has been downloaded already")
    nowhere = "http://127.0.0.1:9"
    done = run(name, f"--dest={tmp_path}", HTTPS_PROXY=nowhere, https_proxy=nowhere, no_proxy="", NO_PROXY="")
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    refused(done, url, "86c4e6aa9db7c042", str(ROOT / "data" / name / "input.txt"))
    assert not list(tmp_path.iterdir()) and not list((ROOT / "data" / name).glob("*.tmp"))


# ---- openwebtext, from local files

DOCUMENTS = [f"Document {n}: 它说{END}。\n\n" + "word " * (n % 7) for n in range(30)] + [""]


@pytest.fixture
def offline(tmp_path):
    pytest.importorskip("datasets")
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf")}


def shuffled(documents: list[str], val_count: int) -> tuple[list[str], list[str]]:
    """The split of nanoGPT's seed: the permutation's beginning is for validation."""
    order = np.random.default_rng(2357).permutation(len(documents)).tolist()
    return [documents[i] for i in order[val_count:]], [documents[i] for i in order[:val_count]]


@needs_gpt2
def test_openwebtext_from_jsonl(tmp_path, offline):
    encoding = pytest.importorskip("tiktoken").get_encoding("gpt2")
    lines = [json.dumps({"content": text, "id": n}, ensure_ascii=n % 2 == 0) for n, text in enumerate(DOCUMENTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [f"--input={tmp_path / 'd.jsonl'}", "--val_fraction=0.1", "--num_proc=2"]
    meta = prepared("openwebtext", tmp_path / "out", *words, "--text_column=content", cwd=tmp_path, **offline)
    for split, documents in zip(("train", "val"), shuffled(DOCUMENTS, 4), strict=True):
        expected = [encoding.encode_ordinary(text) + [50256] for text in documents]
        assert ids(tmp_path / "out", split) == sum(expected, [])
    assert (meta["documents"], meta["characters"]) == (31, sum(map(len, DOCUMENTS)))
    refused(run("openwebtext", *words, f"--dest={tmp_path}", **offline), "--text_column", "content, id")


def test_openwebtext_from_parquet_in_characters(tmp_path, offline):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": DOCUMENTS}), tmp_path / "d.parquet")
    words = [f"--input={tmp_path}", "--tokenizer=char", "--num_proc=1", "--min_count=2"]
    meta = prepared("openwebtext", tmp_path / "out", *words, **offline)
    train, val = shuffled(DOCUMENTS, 1)
    assert slow_text(tmp_path / "out", "train") == "".join(text + END for text in train)
    assert slow_text(tmp_path / "out", "val") == "".join(text + END for text in val)
    assert meta["chars"] == "".join(sorted(set("".join(DOCUMENTS)))) and meta["unknown_characters"] == 0


@needs_gpt2
def test_openwebtext_from_text_files(tmp_path, offline):
    encoding = pytest.importorskip("tiktoken").get_encoding("gpt2")
    (tmp_path / "in").mkdir()
    for n, text in enumerate(("第一\r\n", "second\n\nstill second", "3")):
        (tmp_path / "in" / f"{n}.txt").write_bytes(text.encode("gb18030"))
    words = [f"--input={tmp_path / 'in'}", "--val_fraction=0.3", "--num_proc=1"]
    prepared("openwebtext", tmp_path / "out", *words, "--encoding=gb18030", **offline)
    for split, documents in zip(("train", "val"), shuffled(["第一\n", "second\n\nstill second", "3"], 1), strict=True):
        expected = [encoding.encode_ordinary(text) + [50256] for text in documents]
        assert ids(tmp_path / "out", split) == sum(expected, [])
    refused(run("openwebtext", *words, f"--dest={tmp_path}", **offline), str(tmp_path / "in"), "--encoding")


def test_openwebtext_without_the_hub(tmp_path, offline):
    refused(
        run("openwebtext", f"--dest={tmp_path / 'out'}", **offline), "Skylion007/openwebtext", "HF_ENDPOINT", "--input"
    )
    assert not (tmp_path / "out").exists()


def test_openwebtext_without_datasets(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError('none here')")
    done = run("openwebtext", f"--dest={tmp_path / 'out'}", PYTHONPATH=str(tmp_path))
    refused(done, "pip install datasets")


# ---- a tokenizer for both


@needs_gpt2
def test_choosing_a_tokenizer(tmp_path):
    assert corpus.choose_tokenizer("char") is None and corpus.choose_tokenizer("gpt2") == GPT2Tokenizer()
    (tmp_path / "train.bin").touch()  # nanoGPT's GPT-2 datasets have no meta at all
    assert corpus.choose_tokenizer(str(tmp_path)) == GPT2Tokenizer()


def test_a_hugging_face_folders_own_end_of_text_ends_each_document(tmp_path):
    alphabet = pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: id for id, c in enumerate([*sorted(alphabet), "</s>"])}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": step, "decoder": step, "model": model}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    source = corpus.Source((File(tmp_path / "a.txt"), File(tmp_path / "b.txt")), document="file")
    for path in source.files:
        path.path.write_text("好 day", encoding="utf-8")
    meta = corpus.prepare(source, options(tokenizer=str(tmp_path / "hf")), tmp_path)
    spelled = "".join({0xE5: "å", 0xA5: "¥", 0xBD: "½", 0x20: "Ġ"}.get(b, chr(b)) for b in "好 day".encode())
    assert np.fromfile(tmp_path / "train.bin", "<u2").tolist() == [*(vocab[c] for c in spelled), 256]
    assert meta["kind"] == "bpe" and meta["end_of_text"] == 256 and load_tokenizer(tmp_path).decode([256]) == "</s>"
