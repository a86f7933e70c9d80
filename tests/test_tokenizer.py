"""Held against plain Python loops, tiktoken, transformers, tokenizers, and bytes written out on paper."""

import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from conftest import random_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from tokenizer import (
    CUT,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    cut_up,
    hf_tokenizer,
    load_tokenizer,
    read_meta,
    tokenizer_from_meta,
    train_bpe,
)

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


@given(st.lists(texts, max_size=6), st.text(alphabet="ab，。好\n 😀"))
def test_a_batch_has_the_ids_of_each_text(texts, chars):
    chars = "".join(sorted(set(chars)))
    batch = CharTokenizer(chars, byte_fallback=True, end_of_text=False).encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [slow_ids(text, chars) for text in texts]
    assert all(ids.dtype == np.uint16 for ids in batch)


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
    with pytest.raises(UserError, match="first at position 1\\)"):
        t.encode_batch(["ab", "b好"])


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer("ab", True, True), CharTokenizer("ab", False, False), GPT2Tokenizer()]
)
def test_lone_surrogate_is_a_sentence(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D\) at position 1"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(UserError, match=r"U\+D83D\) at position 1"):
        tokenizer.encode_batch(["ab", "a\ud83d", "\ude00"])


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
    every = "".join(map(chr, range(0x20000, 0x20000 + 65536)))
    for count in (65534, 65535, 65536):  # the last id of 16 bits is a character's, or nobody's
        t = CharTokenizer(every[:count], byte_fallback=False, end_of_text=False)
        assert t.dtype == np.uint16 and t.encode(every[:count]).tolist() == list(range(count))
        with pytest.raises(UserError, match="lacks 'a'"):
            t.encode("a")


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
@given(st.lists(mixed | words | st.sampled_from([END, "a  ", "\n" + END[:5]]), max_size=8))
@settings(deadline=None, max_examples=200)
def test_gpt2_batches_are_tiktokens(tiktoken_gpt2, texts):
    batch = GPT2Tokenizer().encode_batch(texts)
    assert [ids.tolist() for ids in batch] == tiktoken_gpt2.encode_ordinary_batch(texts)
    assert all(ids.dtype == np.uint16 for ids in batch)


@needs_gpt2
def test_gpt2_batch_of_short_and_long_texts_in_threads(tiktoken_gpt2):
    rng = random.Random(5)
    story = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
    texts = ["", story, *sliced("ab the 的，\n\t 我1.<|>é'", 2000), "", story[:50000] * 2, "x" * 70000, " " * 70000]
    rng.shuffle(texts)
    assert [ids.tolist() for ids in GPT2Tokenizer().encode_batch(texts)] == tiktoken_gpt2.encode_ordinary_batch(texts)


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


# ---- Hugging Face's


def trained(name: str):
    """A small tokenizer of the library's, trained on the embedded stories."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    options = {"vocab_size": 2000, "show_progress": False, "max_token_length": 8}
    if name == "byte level":
        t = tokenizers.Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        special = [END]
    elif name == "metaspace":
        t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        t.pre_tokenizer = pre_tokenizers.Metaspace()
        t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    elif name == "llama":
        t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        t.decoder = decoders.Sequence(steps)
    elif name == "unigram":
        vocab = [("<unk>", 0), ("▁", -1), ("他", -2), ("我", -2.5), ("，▁", -3), ("的是", -3), ("的", -4), ("▁the", -5)]
        t = tokenizers.Tokenizer(models.Unigram(vocab, 0))
        t.normalizer, t.pre_tokenizer, t.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
        t.encode_special_tokens = True
        return t
    elif name == "word level":
        t = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        t.pre_tokenizer = pre_tokenizers.Whitespace()
        options.pop("max_token_length")
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[:100000]
    trainer = {"word level": trainers.WordLevelTrainer}.get(name, trainers.BpeTrainer)
    t.train_from_iterator([*text.split("\n"), "she isn't 12 " * 20], trainer(**options, special_tokens=special))
    t.encode_special_tokens = True
    return t


@pytest.mark.parametrize("name", ["byte level", "metaspace", "llama", "unigram", "word level"])
def test_the_librarys_ids_and_text(name):
    theirs = trained(name)
    ours = BPETokenizer(theirs.to_str(), None)
    assert ours.vocab_size == theirs.get_vocab_size() and ours.unknown_id == theirs.token_to_id("<unk>")
    assert ours.encode("").dtype == np.uint16 and ours.decode([]) == ""
    for text in random_texts(2000):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == ids and ours.encode_batch(["", text, text])[1].tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        assert b"".join(ours.decode_bytes([id]) for id in ids) == ours.decode_bytes(ids)
        if ours.lossless:
            assert ours.decode(ids) == text
    assert ours.lossless == (name == "byte level")


def test_what_would_be_cut_off_or_filled_up_or_framed_is_not():
    theirs = trained("byte level")
    plain = BPETokenizer(theirs.to_str(), 0)
    from tokenizers import processors

    theirs.enable_truncation(4)
    theirs.enable_padding(length=50)
    theirs.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    ours = BPETokenizer(theirs.to_str(), 0)
    text = "从前有一只小白兔。" * 3
    assert ours.encode(text).tolist() == plain.encode(text).tolist() and ours.decode(ours.encode(text)) == text
    assert ours == plain and ours.encode_prompt(END + "a").tolist() == [0, *plain.encode("a")]
    assert ours != BPETokenizer(theirs.to_str(), None)


def bert_folder(folder: Path, *more: str, **settings) -> Path:
    """A folder as those of Chinese GPT-2s, whose vocabulary is BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "的", "我", "爱", "你", "，", "。", "!", "##的", "—", *more]
    words += [*"abcdefghxyzPGé0123", *(f"##{c}" for c in "abcdefghnoptxyzé0123"), "python", "the", "##ing", "gpt"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}])
def test_berts_vocabulary_has_berts_ids(tmp_path, settings):
    transformers = pytest.importorskip("transformers")
    ours = hf_tokenizer(bert_folder(tmp_path, **settings))
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    assert (ours.vocab_size, ours.end_of_text, ours.unknown_id) == (len(theirs), 3, 1)
    known = set()
    for text in [
        *random_texts(1000),
        "我爱Python3和thebing 你的，the的!  Gpté[SEP]",
        *sliced("我你爱 abcthexyz，PG é的", 1000),
    ]:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text).tolist() == ids, text
        known |= set(ids)
    assert len(known) > 30


def sliced(text: str, n: int) -> list[str]:
    rng = random.Random(2)
    return ["".join(rng.choices(text, k=rng.randint(1, 40))) for _ in range(n)]


def test_berts_tokens_as_text_on_paper(tmp_path):
    t = hf_tokenizer(bert_folder(tmp_path))
    assert t.decode(t.encode("我爱Python3，the  gptx你 ! ")) == "我爱 python3， the gptx你!"
    assert t.decode(t.encode("the 我")) == "the我"
    assert t.pieces(t.encode("爱the3的")) == ["爱", " the", "3", "的"]
    assert t.pieces([3, 1, t.encode("é")[0]]) == ["[SEP]", "[UNK]", " e"]
    assert t.encode_prompt(f"我{END}爱").tolist() == [6, 3, 7] and 3 not in t.encode("我[SEP]爱")


@pytest.mark.parametrize("name", ["byte level", "bert", "trained here"])
def test_pieces_that_are_cut_have_the_ids_of_the_whole(tmp_path, name):
    if name == "byte level":
        t = BPETokenizer(trained(name).to_str(), None)
    else:
        t = hf_tokenizer(bert_folder(tmp_path)) if name == "bert" else trained_here()
    pieces = 0
    for text in [*random_texts(1500, seed=3), *sliced("ab the 的，\n\t 我1.\x1c\u0301é'", 1500)]:
        cut = t.last_cut(text)
        pieces += cut > 0
        assert [*t.encode(text[:cut]).tolist(), *t.encode(text[cut:]).tolist()] == t.encode(text).tolist(), text
    assert pieces > 500 and t.last_cut("") == 0 and t.last_cut("one two") == 3
    long = "".join(f"第{n}回，the ab gone {n * n}!\n\n  “{n}”。" for n in range(12000)) + "x" * 70000
    assert len(cut_up(long)) > 3 and "".join(cut_up(long)) == long
    whole = t._tokenizer.encode(long, add_special_tokens=False).ids
    assert t.encode(long).tolist() == whole
    batch = ["a, b", long, "", "c"]
    assert [ids.tolist() for ids in t.encode_batch(batch)] == [t.encode(text).tolist() for text in batch]


def test_cuts_are_after_letters_and_digits_of_old_and_elsewhere_nowhere():
    old = {c for c in map(chr, range(0x110000)) if CUT.match(c + " ")}
    assert {unicodedata.ucd_3_2_0.category(c)[0] for c in old} == {"L", "N"}
    assert {*"09azAZé中龥ぁンж한"} <= old and not {*" _。\u0301😀"} & old


def test_where_nothing_may_be_cut():
    t = BPETokenizer(trained("metaspace").to_str(), None)
    assert t.last_cut("one two, three.") == 0
    theirs = trained("byte level")
    theirs.add_tokens(["a b"])
    t = BPETokenizer(theirs.to_str(), None)
    assert t.last_cut("a b") == 0 and t.encode("a b").tolist() == [2000] and t.decode([2000]) == "a b"


def test_a_megabyte_takes_no_longer_than_its_length():
    t = BPETokenizer(trained("llama").to_str(), None)  # one word, for this one
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
    small, large = (text * 4)[: 2**18], (text * 8)[: 2**21]

    def seconds(text: str) -> float:
        start = time.perf_counter()
        t.encode(text)
        return time.perf_counter() - start

    seconds(small)
    assert seconds(large) < 32 * min(seconds(small) for _ in range(3))  # 8 times the text; 64 times were quadratic


def test_byte_level_files_without_tokenizer_json(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = trained("byte level")
    theirs.model.save(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["merges.txt", "vocab.json"]
    ours, reference = hf_tokenizer(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.end_of_text, ours.unknown_id, ours.vocab_size) == (0, None, 2000)
    for text in random_texts(500):
        wanted = reference(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == theirs.encode(text).ids == wanted
    (tmp_path / "merges.txt").unlink()
    assert hf_tokenizer(tmp_path) is None and hf_tokenizer(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "files, end",
    [
        ({}, 2),
        ({"config": {"eos_token_id": 7}}, 7),
        ({"config": {"eos_token_id": 50256}}, 2),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [9, 8]}}, 9),
        ({"config": {"eos_token_id": 7}, "tokenizer_config": {"eos_token": "<s>"}}, 1),
        ({"tokenizer_config": {"eos_token": {"content": "<s>", "lstrip": False}}}, 1),
        ({"tokenizer_config": {"eos_token": "<nowhere>"}, "config": {"eos_token_id": 7}}, 7),
    ],
)
def test_the_end_of_text_is_the_folders_eos(tmp_path, files, end):
    (tmp_path / "tokenizer.json").write_text(trained("metaspace").to_str(), encoding="utf-8")
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    assert hf_tokenizer(tmp_path).end_of_text == end


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100000),
        ("tokenizer.json", '{"model": {"vocab": {}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0.5}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999999}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}}, "decoder": {"type": "CTC"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[" * 100000),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
        ("vocab.json", '["a"]'),
    ],
)
def test_broken_files_are_a_sentence(tmp_path, name, content):
    if name != "tokenizer.json":
        (tmp_path / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
        (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match="json") as error:
        hf_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_only_the_library_can_tell_is_a_sentence(tmp_path):
    t = BPETokenizer('{"model": {"vocab": {"a": 0}, "type": "Other"}}', None)
    assert t.decode([0]) == "a"
    with pytest.raises(UserError, match="^tokenizers cannot read this model's tokenizer.json"):
        t.encode("a")
    t = hf_tokenizer(bert_folder(tmp_path, unk_token="[NONE]"))
    with pytest.raises(UserError, match="cannot encode"):
        t.encode("龘")


def test_ids_become_text_without_the_library_and_text_becomes_a_sentence(monkeypatch):
    theirs = trained("byte level")
    ids = theirs.encode("从前").ids
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    t = BPETokenizer(theirs.to_str(), None)
    assert t.decode(ids) == "从前"
    with pytest.raises(UserError, match="^this model's tokenizer needs a package: pip install tokenizers"):
        t.encode("从前")


# ---- trained here

STORY = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")


@cache
def trained_here(vocab_size: int = 2000) -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return train_bpe([STORY[:100000], "she isn't 12 the " * 20], vocab_size)


def test_a_trained_vocabulary_is_the_bytes_the_merges_and_the_end(tmp_path):
    t = trained_here()
    assert (t.kind, t.vocab_size, t.end_of_text, t.dtype, t.unknown_id) == ("bpe", 2000, 1999, np.uint16, None)
    assert t.lossless and sorted(t.ids.values()) == list(range(2000)) and t.ids[END] == 1999
    assert sorted(t.decode_bytes([id]) for id in range(256)) == [bytes([b]) for b in range(256)]
    merges = json.loads(t.json)["model"]["merges"]
    assert [t.ids["".join(pair)] for pair in merges] == list(range(256, 1999))
    assert END not in STORY and t.encode(END).tolist() != [1999] and t.encode_prompt(END).tolist() == [1999]
    assert len(t.encode(STORY)) < 0.85 * len(STORY) and t.decode(t.encode(STORY)) == STORY
    (tmp_path / "tokenizer.json").write_text(t.json, encoding="utf-8")
    assert hf_tokenizer(tmp_path) == t and t != GPT2Tokenizer()
    assert tokenizer_from_meta(json.loads(json.dumps(t.meta())), "here") == t and pickle.loads(pickle.dumps(t)) == t


def test_merges_on_paper():
    pytest.importorskip("tokenizers")
    t = train_bpe(["从前从前 abab", "从前", "ab", "前ab"], 10**6)  # 从 is E4 BB 8E, 前 E5 89 8D
    tokens = [t.decode_bytes([id]) for id in range(256, t.vocab_size)]
    # by count, then by ids; those of a, BB, E4, E5 follow each other, and 89 and 8D, which have no sign, come after all
    four_times = [b"ab", b"\xe5\x89", b"\xe5\x89\x8d"]
    assert tokens == [*four_times, b"\xbb\x8e", b"\xe4\xbb\x8e", "从前".encode(), END.encode()]
    assert t.pieces(t.encode("从前ab从b")) == ["从前", "ab", "从", "b"]
    assert [train_bpe(texts, 257).vocab_size for texts in (["abab"], [], [""])] == [257] * 3
    assert train_bpe(["ab", "ba"], 300).vocab_size == 257 and train_bpe(["ab"] * 2, 300).encode("ab").tolist() == [256]


def test_pieces_within_which_is_merged_on_paper():
    splitter = trained_here()._tokenizer.pre_tokenizer
    for pieces in (
        "他说|：“|don|'t| |用|Python| |3|.|14|写|123|456|7|行",
        "it|'s|'|s\u0301| ok|'|such| —|他|”。|\n\n\u3000\u3000|第二| |段|\r\n| |\n\u3000|x|  | y",
        "\u3000\u3000|古|  |\n|e\u0301te| né| 😀👍！|⼀一〇々|カタカナ한국어| |½|\t\x85|\xa0|z| ",
        "好" * 32 + "|" + "好" * 8 + "|" + "ж" * 64 + "|ж|" + "。" * 64 + "|。|" + "\n" * 64 + "|\n\u3000|x",
    ):
        text = pieces.replace("|", "")
        spans = [span for _, span in splitter.pre_tokenize_str(text)]
        assert [text[start:end] for start, end in spans] == pieces.split("|")


def test_any_text_has_the_ids_that_transformers_gives_and_round_trips(tmp_path):
    transformers = pytest.importorskip("transformers")
    t = trained_here()
    (tmp_path / "tokenizer.json").write_text(t.json, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in random_texts(2000):
        ids = t.encode(text).tolist()
        assert t.decode(ids) == text and b"".join(t.decode_bytes([id]) for id in ids) == text.encode()
        if END not in text:
            assert ids == theirs(text, add_special_tokens=False)["input_ids"]


@given(mixed | words | texts, st.lists(mixed | words, max_size=4))
@settings(deadline=None, max_examples=400)
def test_pieces_of_what_was_trained_have_the_ids_of_the_whole(text, others):
    t = trained_here()
    whole = t._tokenizer.encode(text, add_special_tokens=False).ids
    assert t.encode(text).tolist() == whole and t.decode(whole) == text
    ends = {end for _, (_, end) in t._tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    assert {match.end() for match in CUT.finditer(text)} <= ends  # also where no token would be cut
    pieces = every_cut(t, text)
    assert "".join(pieces) == text and sum((t.encode(piece).tolist() for piece in pieces), []) == whole
    assert [ids.tolist() for ids in t.encode_batch([text, *others])] == [t.encode(x).tolist() for x in [text, *others]]


def every_cut(t, text: str) -> list[str]:
    pieces = []
    while cut := t.last_cut(text):
        pieces.insert(0, text[cut:])
        text = text[:cut]
    return [text, *pieces]


def test_every_letter_before_a_cut_is_one_for_the_library():
    """Each of them with each of what may follow; the library's tables of characters are not Python's."""
    splitter = trained_here()._tokenizer.pre_tokenizer
    for after in " \t\n\r\u3000。，、！？；：.,!?;:":
        text = "".join(c + after for c in map(chr, range(0x10000)) if CUT.match(c + after))
        ends = {end for _, (_, end) in splitter.pre_tokenize_str(text)}
        assert len(text) > 70000 and ends >= set(range(1, len(text), 2))


@pytest.mark.parametrize(
    "text",
    [
        "好" * 300_000,
        "\n" * 10**6,
        "\u3000" * 300_000,
        " " * 10**6,
        "x" * 10**6,
        "0123456789" * 10**5,
        "。" * 300_000,
        "好。\n\u3000\u3000x1, " * 25_000,
        STORY,
    ],
    ids=["han", "newlines", "indentation", "spaces", "letters", "digits", "punctuation", "mixture", "stories"],
)
def test_a_megabyte_of_anything_has_the_ids_of_the_whole(text):
    t = trained_here()
    assert t.encode(text).tolist() == t._tokenizer.encode(text, add_special_tokens=False).ids
    assert t.decode(t.encode(text)) == text
    again = train_bpe([text], 500)  # which would take hours, were a run one piece
    assert len(again.encode(text)) < len(text.encode()) / 2 and again.decode(again.encode(text)) == text


def test_the_same_texts_give_the_same_file():
    """In processes with other hash seeds and other numbers of threads, where many pairs are equally frequent."""
    pytest.importorskip("tokenizers")
    code = "import hashlib, sys, tokenizer; text = open(sys.argv[1], encoding='utf-8').read()[:60000]; "
    code += "print(hashlib.sha256(tokenizer.train_bpe([text], 30000).json.encode()).hexdigest())"
    made = set()
    for threads in (1, 2, 5):
        env = os.environ | {"PYTHONHASHSEED": str(threads), "RAYON_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", code, str(ROOT / "data" / "chinese" / "stories_zh.txt")]
        made.add(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)
    assert made == {hashlib.sha256(train_bpe([STORY[:60000]], 30000).json.encode()).hexdigest() + "\n"}


@pytest.mark.parametrize("vocab_size", [256, 0, 2**24 + 1])
def test_an_impossible_size_is_a_sentence(vocab_size):
    with pytest.raises(UserError, match=f"of {vocab_size}: expected 257"):
        train_bpe(["text"], vocab_size)


def test_training_on_half_a_character_or_without_the_library_is_a_sentence(monkeypatch):
    pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=r"U\+D83D\) at position 1"):
        train_bpe(["ab", "a\ud83d"], 300)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        train_bpe(["text"], 300)


# ---- meta


@pytest.mark.parametrize(
    "tokenizer",
    [
        BPETokenizer('{"model": {"vocab": {"a": 0, "b": 5}}}', 5),
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
        BPETokenizer('{"model": {"vocab": {"a": 0, "b": 1}}}', None),
        BPETokenizer('{"model": {"vocab": {"a": 0, "b": 1}}}', 1),
        BPETokenizer('{"model": {"vocab": {"a": 1, "b": 0}}}', 1),
    ]
    assert all((a == b) == (a is b) for a in different for b in different)
    assert CharTokenizer("ab", True, False) == CharTokenizer("ab", True, True)


GOOD = {"kind": "char", "vocab_size": 2, "dtype": "uint16", "chars": "ab", "byte_fallback": False, "end_of_text": None}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"kind": "bpe"}, "bpe"),
        ({"kind": "bpe", "json": "{"}, "tokenizer.json"),
        ({"kind": "bpe", "json": '{"model": {"vocab": {"a": 0}}}'}, "vocab_size"),
        ({"kind": "bpe", "json": '{"model": {"vocab": {"a": 0}}}', "vocab_size": 1, "end_of_text": 1}, "end_of_text"),
        ({"kind": "bpe", "json": '{"model": {"vocab": {"a": 0}}}', "vocab_size": 1, "end_of_text": "a"}, "end_of_text"),
        ({"kind": "wordpiece"}, "char, gpt2, bpe and chat"),
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
