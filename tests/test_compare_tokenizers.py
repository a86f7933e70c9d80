"""data/compare_tokenizers.py as users run it, its figures against len, set and the libraries themselves."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, run_script

FILE = ROOT / "data" / "chinese" / "stories_zh.txt"
STORY = FILE.read_text(encoding="utf-8")


def compare(cwd, *args, **options):
    pytest.importorskip("tokenizers")
    done = run_script("data/compare_tokenizers.py", *args, cwd=cwd, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output: str) -> dict[str, list[float]]:
    """Each tokenizer's vocabulary, tokens, characters/token, bytes/token, characters without a token, MB/s."""
    table = output.split("\n\n")[1].split("\n")
    found = {}
    for line in table[1:]:
        name, *numbers = re.sub(r" \(.*?%\)", "", line).split()
        found[name] = [float(n.replace(",", "")) for n in numbers] if numbers[0] != "-" else []
    return found


def test_the_figures_are_those_of_the_text_and_the_libraries(tmp_path):
    output = compare(tmp_path, FILE, "--vocab_size=3000")
    size, found = len(STORY.encode()), rows(output)
    assert list(found) == ["char", "gpt2", "bpe"]
    assert f"{len(STORY):,} characters, {len(set(STORY)):,} of them distinct, {size:,} bytes" in output
    vocabulary, tokens, per_token, bytes_per_token, without, rate = found["char"]
    assert (vocabulary, tokens, per_token, without) == (len(set(STORY)) + 257, len(STORY), 1, 0) and rate > 0
    assert bytes_per_token == pytest.approx(size / len(STORY), abs=5e-4)
    vocabulary, tokens, per_token, bytes_per_token, without, rate = found["bpe"]
    assert vocabulary == 3000 and tokens < 0.7 * len(STORY) and 0 < without < 0.05 * len(STORY) and rate > 0
    assert per_token == pytest.approx(len(STORY) / tokens, abs=5e-4)
    assert bytes_per_token == pytest.approx(size / tokens, abs=5e-4)
    first = next(line for line in STORY.split("\n") if len(line) >= 20)[:50]
    assert f"  {first}\n" in output and "|".join(first) in output
    assert output.count("round trip identical") == 2 + bool(found["gpt2"])


def test_gpt2s_row_is_tiktokens(tmp_path):
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's vocabulary is not on this machine")
    encoding = pytest.importorskip("tiktoken").get_encoding("gpt2")
    output = compare(tmp_path, FILE, "--vocab_size=300", "--sentence=好 day，龘")
    counts, tokens = Counter(STORY), len(encoding.encode_ordinary(STORY))
    # a character that is alone one token, or one after a space
    known = {c for c in counts if 1 in (len(encoding.encode_ordinary(c)), len(encoding.encode_ordinary(" " + c)))}
    found = rows(output)["gpt2"]
    assert found[:2] == [50257, tokens] and found[2] == pytest.approx(len(STORY) / tokens, abs=5e-4)
    assert found[4] == sum(n for c, n in counts.items() if c not in known)
    pieces = [encoding.decode_single_token_bytes(id) for id in encoding.encode_ordinary("好 day，龘")]
    shown = ["<E5 A5>", "<BD>", " day", "<EF>", "<BC>", "<8C>"]
    assert b"".join(pieces[:2]) == "好".encode() and "|".join(shown) in output
    assert f"{len(pieces)} tokens, round trip identical" in output


def test_columns_stand_under_each_other_with_chinese_names_too(tmp_path, stories):
    (tmp_path / "数据集").symlink_to(stories)
    output = compare(tmp_path, FILE, "--vocab_size=300", "--tokenizer=数据集", "--max_chars=30000", "--sentence=天龘")
    table = output.split("\n\n")[1].encode("gb18030").split(b"\n")  # in which a Chinese character takes two bytes
    assert len({len(line) for line in table if b" - " not in line}) == 1
    assert "the beginning of" in output and "30,000 characters" in output
    assert rows(output)["数据集"][1] > 30000 and "数据集     天|<E9>|<BE>|<98>\n" in output


def test_without_gpt2s_vocabulary_its_row_says_so_and_the_others_are_there(tmp_path):
    nowhere = "http://127.0.0.1:9"
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    found = rows(output := compare(tmp_path, FILE, "--vocab_size=300", "--max_chars=2000", env=env))
    assert "gpt2       - GPT-2's vocabulary cannot be loaded (" in output
    assert found["gpt2"] == [] and found["char"][1] == 2000 and found["bpe"][0] == 300


def test_a_gbk_console_and_a_gb18030_text(tmp_path):
    pytest.importorskip("tokenizers")
    text = "春眠不觉晓，处处闻啼鸟。😀夜来风雨声，花落知多少。\n" * 3
    (tmp_path / "古文.txt").write_text(text, encoding="gb18030")
    command = [sys.executable, ROOT / "data" / "compare_tokenizers.py", "古文.txt", "--encoding=gb18030"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "gbk"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    output = done.stdout.decode("gbk")
    assert f"all of 古文.txt: {len(text)} characters, {len(set(text))} of them distinct" in output
    assert rows(output)["char"][:2] == [len(set(text)) + 257, len(text)]
    assert "鸟|。|?|夜" in output  # GBK has no emoji


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "which text?"),
        (["nowhere.txt"], "nowhere.txt: there is no such file"),
        (["empty.txt"], "empty.txt: there is no text in it"),
        (["gbk.txt", "--encoding=utf-8"], "gbk.txt is not utf-8"),
        (["gbk.txt", "--encoding=klingon"], "--encoding=klingon: no such"),
        ([FILE, "--tokenizer=nowhere"], "--tokenizer=nowhere"),
        ([FILE, "--vocab_size=256"], "--vocab_size=256: expected 257"),
        ([FILE, "--max_chars=0"], "--max_chars=0"),
    ],
)
def test_mistakes_are_sentences(tmp_path, args, word):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "gbk.txt").write_text("春眠不觉晓", encoding="gbk")
    done = run_script("data/compare_tokenizers.py", *args, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
