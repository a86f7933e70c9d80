import json
import os

import numpy as np
import pytest
from conftest import random_texts

from chat import LAYOUT, ChatTokenizer, chat_tokenizer, check_layout
from configurator import UserError
from tokenizer import CharTokenizer, GPT2Tokenizer, tokenizer_from_meta, train_bpe

LETTERS = CharTokenizer("abc:", byte_fallback=False, end_of_text=False)


def asked(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def bases():
    yield LETTERS
    yield CharTokenizer("的一是不了人", byte_fallback=True, end_of_text=True)
    yield train_bpe(["从前有一个人，他说：你好。\n" * 50], 300)
    if "TIKTOKEN_CACHE_DIR" in os.environ:
        yield GPT2Tokenizer()


def test_a_conversation_by_hand():
    chat = ChatTokenizer(LETTERS, LAYOUT)
    assert chat.special == {"<|system|>": 4, "<|user|>": 5, "<|assistant|>": 6, "<|endoftext|>": 7}
    assert (chat.vocab_size, chat.end_of_text) == (8, 7)
    messages = [{"role": "system", "content": "c"}, *asked("ab", "ba", "a", "c")]
    [(ids, learnt)] = chat.encode_messages([messages])
    assert ids.tolist() == [4, 2, 5, 0, 1, 6, 1, 0, 7, 5, 0, 6, 2, 7] and ids.dtype == np.uint16
    assert learnt.astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert chat.decode(ids) == "<|system|>c<|user|>ab<|assistant|>ba<|endoftext|><|user|>a<|assistant|>c<|endoftext|>"
    assert chat.text_of(messages) == chat.decode(ids)


def test_a_layout_of_ones_own_without_new_tokens():
    base = CharTokenizer("abc:\nQA", byte_fallback=False, end_of_text=True)
    chat = ChatTokenizer(
        base, LAYOUT | {"user": "Q:{content}\n", "assistant": "A:{content}<|endoftext|>", "system": "{content}\n"}
    )
    assert chat.special == {} and chat.vocab_size == base.vocab_size and chat.end_of_text == base.end_of_text
    [(ids, learnt)] = chat.encode_messages([asked("a", "b")])
    assert chat.decode(ids) == "Q:a\nA:b<|endoftext|>" and learnt.astype(int).tolist() == [0] * 6 + [1, 1]
    assert chat.opening(asked("a"), 100) == ids[:6].tolist()


@pytest.mark.parametrize("number", range(4))
def test_nobody_speaks_in_anothers_name_and_text_comes_back(number):
    found = list(bases())
    if number >= len(found):
        pytest.skip("GPT-2's vocabulary is not here")
    base = found[number]
    chat = ChatTokenizer(base, LAYOUT)
    texts = ["a<b" if number else "ab", "<|user|> <|assistant|>" if number else "c:"]
    texts += [text for text in random_texts(60, number) if text] if number else ["abc", ":"]
    for one, other in zip(texts, reversed(texts), strict=True):
        messages = asked(one, other)
        [(ids, learnt)] = chat.encode_messages([messages])
        assert chat.decode(ids) == chat.text_of(messages)
        marks = [id for id in ids.tolist() if id in chat.special.values() or id == chat.end_of_text]
        assert marks == [chat.special["<|user|>"], chat.special["<|assistant|>"], chat.end_of_text]
        # what stands before an answer is the same in training and when one is asked for
        opened = chat.opening(messages[:1], 10**6)
        assert ids[: len(opened)].tolist() == opened and not learnt[: len(opened)].any() and learnt[len(opened) :].all()
        assert ids[len(opened) : -1].tolist() == base.encode(other).tolist()
        assert chat.encode(one).tolist() == base.encode(one).tolist()
    [(ids, _)] = chat.encode_messages([asked(texts[0], texts[0])])
    assert chat.encode_prompt(chat.text_of(asked(texts[0], texts[0]))).tolist() == ids.tolist()
    together = chat.encode_messages([asked(text, text) for text in texts])
    for text, (ids, learnt) in zip(texts, together, strict=True):
        [(alone, own)] = chat.encode_messages([asked(text, text)])
        assert ids.tolist() == alone.tolist() and learnt.tolist() == own.tolist()


@pytest.mark.parametrize("base", list(bases()))
def test_it_comes_back_from_its_meta_and_nothing_else_does(base):
    chat = ChatTokenizer(base, LAYOUT)
    meta = json.loads(json.dumps(chat.meta()))
    again = tokenizer_from_meta(meta, "meta.json")
    assert again == chat and again != base and hash(again) == hash(chat) and isinstance(again, ChatTokenizer)
    assert again.opening(asked("a"), 10) == chat.opening(asked("a"), 10)
    broken = [
        {"base": meta}, {"base": None}, {"base": {"kind": "char"}}, {"layout": None}, {"layout": {"user": "{content}"}},
        {"layout": {**LAYOUT, "assistant": "<|assistant|>{content}"}}, {"special": {}}, {"vocab_size": 3},
        {"layout": {**LAYOUT, "user": 7}}, {"base": 3},
    ]  # fmt: skip
    for change in broken:
        with pytest.raises(UserError, match="meta.json"):
            tokenizer_from_meta(meta | change, "meta.json")


def test_the_oldest_exchanges_make_room():
    chat = ChatTokenizer(LETTERS, LAYOUT)
    system = [{"role": "system", "content": "c"}]
    messages = [*system, *asked("a" * 10, "b" * 5, "aa", "bb", "cc")]
    whole = chat.opening(messages, 1000)
    assert len(whole) == 2 + 11 + 7 + 3 + 4 + 3 + 1
    assert chat.opening(messages, len(whole)) == whole
    assert chat.opening(messages, len(whole) - 1) == chat.opening([*system, *messages[3:]], 1000)
    assert chat.opening(messages, 12) == chat.opening([*system, *messages[5:]], 1000)
    assert chat.opening(messages, 1) == chat.opening([*system, messages[5]], 1000)  # the newest always stays


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"user": "a"},
        {"user": "{content}{content}"},
        {"assistant": "{content}<|endoftext|>"},
        {"assistant": "a{content}"},
    ],
)
def test_a_layout_that_makes_no_sense_is_told(layout):
    changed = LAYOUT | layout if layout else {}
    with pytest.raises(ValueError, match="expected"):
        check_layout(changed)
    if changed:
        with pytest.raises(UserError, match="^--(user|assistant)="):
            chat_tokenizer(LETTERS, changed)


def test_a_model_keeps_its_layout():
    chat = chat_tokenizer(LETTERS, LAYOUT)
    assert chat_tokenizer(chat, LAYOUT) is chat
    with pytest.raises(UserError, match="a layout of its own"):
        chat_tokenizer(chat, LAYOUT | {"user": "Q{content}"})
