import pytest
import torch
from conftest import TINY

from configurator import UserError
from generate import check_sampling, generate_text, prompt_ids
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

CHARS = CharTokenizer("\nabcdefgh", byte_fallback=False, end_of_text=False)
BYTES = CharTokenizer("《》天地", byte_fallback=True, end_of_text=True)
OPTIONS = dict(max_new_tokens=50, temperature=1.0, top_k=0, seed=1)


def model_for(tokenizer, padding=0):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **TINY)).eval()


def favour(model, *ids):
    """Makes the model all but certain to say one of these ids, whatever came before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.fill_(-1.0)
        for id in ids:
            model.lm_head.weight[id] = 1.0


def test_the_same_seed_is_the_same_text_and_another_another():
    model = model_for(CHARS)
    text = generate_text(model, CHARS, "a", **OPTIONS)
    assert text.startswith("a") and len(text) == 51
    assert generate_text(model, CHARS, "a", **OPTIONS) == text
    assert generate_text(model, CHARS, "a", **(OPTIONS | {"seed": 2})) != text


def test_end_of_text_ends_the_text_and_is_not_shown():
    model = model_for(BYTES)
    favour(model, BYTES.end_of_text)
    assert generate_text(model, BYTES, "天", **OPTIONS) == "天"
    assert generate_text(model, BYTES, "", **OPTIONS) == ""


def test_bytes_that_are_no_character_show_as_replacement():
    model = model_for(BYTES)
    favour(model, *BYTES.encode("你")[:1].tolist())
    text = generate_text(model, BYTES, "天", **(OPTIONS | {"max_new_tokens": 3}))
    assert text[0] == "天" and set(text[1:]) == {"\ufffd"}
    favour(model, *BYTES.encode("\x00").tolist())
    assert generate_text(model, BYTES, "地", **(OPTIONS | {"max_new_tokens": 3})) == "地\x00\x00\x00"


def test_ids_of_the_padded_vocabulary_never_come():
    model = model_for(CHARS, padding=7)
    favour(model, *range(CHARS.vocab_size, CHARS.vocab_size + 7))
    assert len(generate_text(model, CHARS, "ab", **OPTIONS)) == 52


def test_a_prompt_may_be_longer_than_the_context_and_may_hold_the_special_token():
    model = model_for(BYTES)
    assert generate_text(model, BYTES, "天" * 100, **OPTIONS).startswith("天" * 100)
    assert prompt_ids(BYTES, "天<|endoftext|>") == [2, BYTES.end_of_text]
    assert prompt_ids(BYTES, "") == [BYTES.end_of_text]


def test_prompts_that_cannot_be_are_sentences():
    with pytest.raises(UserError, match="U+"):
        prompt_ids(CHARS, "天")
    with pytest.raises(UserError, match="empty prompt"):
        prompt_ids(CHARS, "")


@pytest.mark.parametrize("numbers", [(-1, 1.0, 0), (1, -0.1, 0), (1, 1.0, -5), (1, float("inf"), 0)])
def test_numbers_that_make_no_sense_are_sentences(numbers):
    with pytest.raises(UserError):
        check_sampling(*numbers)
