"""Held against plain Python loops, tiktoken itself and bytes written out on paper."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer, load_tokenizer, read_meta, tokenizer_from_meta

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
if (SHARED / "data" / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "data" / "tiktoken_cache"))
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set"
)
END = "<|endoftext|>"

# few enough characters that the vocabulary has some of them and lacks others; and anything else
texts = st.text() | st.text(alphabet="ab，。好\n 😀é<|endoftext>")


def slow_ids(text: str, chars: str) -> list[int]:
    ids = []
    for c in text:
        ids += [chars.index(c)] if c in chars else [len(chars) + byte for byte in c.encode("utf-8")]
    return ids


def slow_text(ids: list[int], chars: str) -> str:
    text = ""
    for is_byte, run in groupby(ids, lambda i: len(chars) <= i < len(chars) + 256):
        if is_byte:
            text += bytes(i - len(chars) for i in run).decode("utf-8", errors="replace")
        else:
            text += "".join(chars[i] if i < len(chars) else END for i in run)
    return text


# ---- char


def test_ids_on_paper():
    t = CharTokenizer("abc", byte_fallback=True, end_of_text=False)
    assert (t.kind, t.vocab_size, t.end_of_text, t.dtype) == ("char", 260, 259, np.uint16)
    ids = t.encode("caé")
    assert ids.dtype == np.uint16 and ids.tolist() == [2, 0, 3 + 0xC3, 3 + 0xA9]
    assert t.encode("").tolist() == [] and t.encode("").dtype == np.uint16 and t.decode([]) == ""
    assert t.pieces([2, 3 + 0xC3, 259]) == ["c", "<C3>", END]


@given(texts, st.text(alphabet="ab，。好\n 😀"))
def test_any_text_round_trips_and_has_the_ids_of_the_slow_loop(text, chars):
    chars = "".join(sorted(set(chars)))
    t = CharTokenizer(chars, byte_fallback=True, end_of_text=False)
    ids = t.encode(text)
    assert ids.tolist() == slow_ids(text, chars)
    assert t.decode(ids) == text and t.decode(iter(ids.tolist())) == text
    assert t.decode(t.encode_prompt(text)) == text


@given(st.lists(st.integers(0, 3 + 256)))
def test_any_ids_decode_as_in_the_slow_loop(ids):
    t = CharTokenizer("aé好", byte_fallback=True, end_of_text=False)
    assert t.decode(ids) == slow_text(ids, "aé好")


def test_half_a_character_decodes_to_the_replacement_character():
    t = CharTokenizer("ab", byte_fallback=True, end_of_text=False)
    half = [2 + 0xE5, 2 + 0xA5]  # 好 is E5 A5 BD
    assert t.decode([0, *half, 1]) == "a\ufffdb"
    assert t.decode([*half, 2 + 0xBD]) == "好"


def test_end_of_text_is_a_token_in_a_prompt_only():
    t = CharTokenizer("ab", byte_fallback=True, end_of_text=False)
    assert t.encode(END).tolist() == [2 + b for b in END.encode()]
    assert t.encode_prompt(f"a{END}{END}b").tolist() == [0, 258, 258, 1]
    assert t.encode_prompt(END).tolist() == [258] and t.decode([258]) == END
    without = CharTokenizer("".join(sorted(set(END))), byte_fallback=False, end_of_text=False)
    assert without.end_of_text is None and without.encode_prompt(END).tolist() == without.encode(END).tolist()
    assert CharTokenizer("ab", byte_fallback=False, end_of_text=True).encode_prompt(END).tolist() == [2]


def test_unknown_characters_are_named():
    t = CharTokenizer("ab", byte_fallback=False, end_of_text=False)
    with pytest.raises(UserError) as error:
        t.encode("abé好é")
    assert "'é' (U+00E9, first at position 2), '好' (U+597D, first at position 3):" in str(error.value)
    assert "--byte_fallback=True" in str(error.value)
    with pytest.raises(UserError) as error:
        t.encode("0123456789X")
    assert "'9'" in str(error.value) and "'X'" not in str(error.value) and "…" in str(error.value)


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("ab", True, True), CharTokenizer("ab", False, False), GPT2Tokenizer()]
)
def test_lone_surrogate_is_a_sentence(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D\) at position 1"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize("id", [-1, 260, 10**6])
def test_id_out_of_range(id):
    with pytest.raises(ValueError, match=str(id)):
        CharTokenizer("abc", byte_fallback=True, end_of_text=False).decode([0, id])


def test_ids_are_32_bits_from_65537_tokens_on():
    chars = "".join(map(chr, range(0x20000, 0x20000 + 65536 - 257)))
    full = CharTokenizer(chars, byte_fallback=True, end_of_text=False)
    assert (full.vocab_size, full.dtype, full.meta()["dtype"]) == (65536, np.uint16, "uint16")
    assert full.encode_prompt(END).tolist() == [65535]
    more = CharTokenizer(chars + "a", byte_fallback=True, end_of_text=False)
    assert (more.vocab_size, more.dtype, more.meta()["dtype"]) == (65537, np.uint32, "uint32")
    ids = more.encode_prompt("aé" + END)
    assert ids.dtype == np.uint32 and ids.tolist() == [65279, 65280 + 0xC3, 65280 + 0xA9, 65536]
    assert more.decode(ids) == "aé" + END


# ---- GPT-2


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.get_encoding("gpt2")


mixed = st.text(alphabet="abz19 \n\t.,!?;:'_-，。：é好ſ²\u3000\u00a0\x1c😀", max_size=60) | st.text(max_size=30)
words = st.lists(
    st.sampled_from(["'s", "don't", " the", ".", "  ", "\n\n", "，", "好", "1", "a", "'", "_", ":'ll"])
).map("".join)


@needs_gpt2
@given(mixed | words)
@settings(deadline=None, max_examples=400)
def test_gpt2_pieces_have_the_ids_of_the_whole(tiktoken_gpt2, text):
    t = GPT2Tokenizer()
    whole = tiktoken_gpt2.encode_ordinary(text)
    assert t.encode(text).tolist() == whole
    cut, pieces = t.last_cut(text), []
    rest = text
    while cut:
        pieces.insert(0, rest[cut:])
        rest = rest[:cut]
        cut = t.last_cut(rest)
    pieces.insert(0, rest)
    assert "".join(pieces) == text
    assert sum((tiktoken_gpt2.encode_ordinary(piece) for piece in pieces), []) == whole


@needs_gpt2
def test_gpt2_finds_cuts_near_the_end_and_far_from_it():
    t = GPT2Tokenizer()
    assert t.last_cut("one two, three.") == 14
    assert t.last_cut("one," + "x" * 10000) == 3 and t.last_cut("one," + "x" * 10000, 3) == 0
    assert t.last_cut("onetwo") == 0 and t.last_cut("") == 0 and t.last_cut("_.!-.") == 0


@needs_gpt2
def test_gpt2_long_text_in_threads(tiktoken_gpt2):
    text = "".join(f"第{n}回，she's gone {n * n}!\n\n  “{n}”。" for n in range(12000)) + "x" * 70000
    assert len(text) > 3 * 2**16
    assert GPT2Tokenizer().encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


@needs_gpt2
@given(st.lists(st.sampled_from([END, "a", " ", "  b", "\n", "。"])).map("".join))
@settings(deadline=None)
def test_gpt2_prompts_are_tiktokens(tiktoken_gpt2, text):
    t = GPT2Tokenizer()
    assert t.encode_prompt(text).tolist() == tiktoken_gpt2.encode(text, allowed_special="all")
    assert 50256 not in t.encode(text) and t.decode(t.encode(text)) == text


@needs_gpt2
def test_gpt2_decoding(tiktoken_gpt2):
    t = GPT2Tokenizer()
    ids = t.encode("好 day")
    assert t.decode(np.array(ids)) == "好 day" and ids.dtype == np.uint16
    assert t.decode(ids[:1]) == "\ufffd" and t.pieces(ids[:1]) == [f"<{'好'.encode()[:2].hex(' ').upper()}>"]
    assert t.decode([50256]) == END
    with pytest.raises(ValueError, match="50257"):
        t.decode([50257])


def test_gpt2_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        GPT2Tokenizer().encode("a")


def test_gpt2_without_network_says_which_files_to_put_where(tmp_path):
    pytest.importorskip("tiktoken")
    code = "import tokenizer, configurator; configurator.run(tokenizer.GPT2Tokenizer().encode, 'a')"
    nowhere = "http://127.0.0.1:9"
    env = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": nowhere, "https_proxy": nowhere}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        assert f"{url} as {tmp_path}/{hashlib.sha1(url.encode()).hexdigest()}" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr


# ---- meta


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer("a好😀", True, True),
        CharTokenizer("a好", False, False),
        CharTokenizer("a好", False, True),
        CharTokenizer("", True, True),
        GPT2Tokenizer(),
    ],
)
def test_meta_makes_the_same_tokenizer(tokenizer, tmp_path):
    meta = json.loads(json.dumps(tokenizer.meta()))
    again = tokenizer_from_meta(meta, "here")
    assert again == tokenizer and again.meta() == meta and pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"max_id": 5}), encoding="utf-8")
    assert load_tokenizer(tmp_path) == tokenizer and read_meta(tmp_path) == meta | {"max_id": 5}


def test_tokenizers_differ():
    different = [
        CharTokenizer("ab", True, True),
        CharTokenizer("ba", True, True),
        CharTokenizer("ab", False, False),
        CharTokenizer("ab", False, True),
        GPT2Tokenizer(),
    ]
    assert all((a == b) == (a is b) for a in different for b in different)
    assert CharTokenizer("ab", True, False) == CharTokenizer("ab", True, True)


GOOD = {"kind": "char", "vocab_size": 2, "dtype": "uint16", "chars": "ab", "byte_fallback": False, "end_of_text": None}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"kind": "bpe"}, "bpe"),
        ({"kind": ["char"]}, "unknown kind"),
        ({"kind": None}, "unknown kind"),
        ({"vocab_size": 3}, "vocab_size is 3,"),
        ({"vocab_size": "2"}, "vocab_size"),
        ({"dtype": "uint32"}, "dtype"),
        ({"chars": ["a", "b"]}, "chars"),
        ({"chars": "aa"}, "twice"),
        ({"chars": "a\ud800"}, "surrogate"),
        ({"byte_fallback": 0}, "byte_fallback"),
        ({"end_of_text": 0, "vocab_size": 3}, "end_of_text"),
        ({"kind": "gpt2"}, "vocab_size"),
    ],
)
def test_malformed_meta(change, word):
    with pytest.raises(UserError, match=word) as error:
        tokenizer_from_meta(GOOD | change, "out/ckpt.pt")
    assert "out/ckpt.pt" in str(error.value)


def test_gpt2_needs_no_more_than_its_name():
    assert tokenizer_from_meta({"kind": "gpt2"}, "here") == GPT2Tokenizer()


@pytest.mark.parametrize("key", GOOD)
def test_meta_without_a_key(key):
    with pytest.raises(UserError, match="out/ckpt.pt"):
        tokenizer_from_meta({k: v for k, v in GOOD.items() if k != key}, "out/ckpt.pt")
    assert tokenizer_from_meta(GOOD, "").vocab_size == 2


@pytest.mark.parametrize("meta", [None, [], "char", 3])
def test_meta_that_is_no_dictionary(meta):
    with pytest.raises(UserError, match="somewhere"):
        tokenizer_from_meta(meta, "somewhere")


# ---- dataset folders


@pytest.mark.parametrize("content", [b'{"kind": "char", "ch', b"", b"[1]", b"\xff\xfe", b"[" * 100000])
def test_corrupt_meta_json(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    for function in (load_tokenizer, read_meta):
        with pytest.raises(UserError, match="again") as error:
            function(tmp_path)
        assert str(tmp_path / "meta.json") in str(error.value)


def test_wrong_meta_json(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(GOOD | {"vocab_size": 3}))
    with pytest.raises(UserError, match="again") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "meta.json") in str(error.value)


def test_folders_without_meta(tmp_path):
    assert load_tokenizer(str(tmp_path)) == GPT2Tokenizer() and read_meta(tmp_path) == {}
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def nanogpt_meta(itos: dict, **other) -> bytes:
    return pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}} | other)


def test_nanogpts_pickle_in_any_order(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(nanogpt_meta({2: "c", 0: "好", 1: "b"}))
    t = load_tokenizer(tmp_path)
    assert t.encode("c好b").tolist() == [2, 0, 1] and t.decode([0, 1, 2]) == "好bc"
    assert (t.vocab_size, t.end_of_text, t.dtype) == (3, None, np.uint16)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_pickle_is_not_executed(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a"}, "stoi": Evil(str(mark))}))
    with pytest.raises(UserError, match="mkdir") as error:
        load_tokenizer(tmp_path)
    assert not mark.exists() and str(tmp_path / "meta.pkl") in str(error.value)
    pickle.load(io.BytesIO((tmp_path / "meta.pkl").read_bytes()))
    assert mark.exists(), "the file is as malicious as this test believes"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        nanogpt_meta({0: "a", 1: "b"})[:-9],
        pickle.dumps([1, 2]),
        pickle.dumps({"vocab_size": 2}),
        nanogpt_meta({}),
        nanogpt_meta({0: "a", 2: "b"}),
        nanogpt_meta({0: "a", 1: "bc"}),
        nanogpt_meta({0: "a", 1: "a"}),
        nanogpt_meta({0: "a", 1: 7}),
        nanogpt_meta({0: "a", 1: "b"}, vocab_size=3),
    ],
)
def test_broken_pickles(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UserError, match="meta.pkl"):
        load_tokenizer(tmp_path)
