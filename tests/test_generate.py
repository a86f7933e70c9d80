import codecs
import gc
import math
import os
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

from choose import Choice, draw, keep_min_p, keep_top_k, keep_top_p, key_of, penalize
from configurator import UserError
from generate import (
    SHORT,
    Batch,
    Rows,
    Sampling,
    Writer,
    alike,
    beginning,
    continuations,
    prompt_ids,
    score,
    stream,
    titled,
)
from model import GPT, GPTConfig, derive_seed
from tokenizer import CharTokenizer, GPT2Tokenizer, train_bpe

transformers = pytest.importorskip("transformers")

CHARS = CharTokenizer("\nabcdefgh", byte_fallback=False, end_of_text=False)
BYTES = CharTokenizer("《》天地", byte_fallback=True, end_of_text=True)
STORY = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
CHINESE = CharTokenizer("".join(sorted(set(STORY[:5000]))), byte_fallback=True, end_of_text=True)
SAMPLING = Sampling(max_new_tokens=50, seed=1)


def model_for(tokenizer, padding=0, seed=0, spread=0.2):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size + padding, **TINY)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * spread)
    return model


def favour(model, *ids):
    """Makes the model all but certain to say one of these ids, whatever came before."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.fill_(-1.0)
        for id in ids:
            model.lm_head.weight[id] = 1.0


class Says(GPT):
    """A model whose greedy continuation of one end-of-text token is known: after the id at position n comes said[n]."""

    def __init__(self, tokenizer, said: list[int]):
        super().__init__(GPTConfig(block_size=len(said) + 1, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1,
                                   n_embd=len(said) + 1, bias=False))  # fmt: skip
        with torch.no_grad():
            self.lm_head.weight = torch.nn.Parameter(torch.zeros(tokenizer.vocab_size, len(said) + 1))
            self.transformer.wte.weight.zero_()
            self.transformer.wpe.weight.copy_(1e3 * torch.eye(len(said) + 1))  # a position's own direction
            for block in self.transformer.h:
                for linear in (block.attn.c_proj, block.mlp.c_proj):
                    linear.weight.zero_()
            for position, id in enumerate(said):
                self.lm_head.weight[id, position] = 1.0
        self.eval()


def said(tokenizer, text: str, **more) -> str:
    """What comes out where the model says `text` and then, for ever, its last token's successor, whatever that is."""
    ids = tokenizer.encode(text).tolist()
    sampling = Sampling(**{"max_new_tokens": len(ids), "temperature": 0} | more)
    return continuations(Says(tokenizer, ids), tokenizer, [""], sampling)[0]


# choosing a token


def choose(logits: torch.Tensor, sampling: Sampling, keys: torch.Tensor) -> torch.Tensor:
    """The next ids [rows], all chosen alike."""
    return Choice([sampling] * len(keys), logits.device)(logits, keys)


def test_filters_are_those_of_transformers():
    """Each alone on random logits, against the same filter there; ties are not to be expected."""
    from transformers.generation import logits_process as theirs

    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(3000, (40, 60), generator=torch.Generator().manual_seed(1))
    flat = logits / 8  # most tokens are needed for most of the mass
    for p, of in ((0.05, logits), (0.5, logits), (0.95, logits), (0.5, flat), (0.95, flat), (0.99, flat)):
        expected = theirs.TopPLogitsWarper(p)(ids, of.clone())
        assert torch.equal(keep_top_p(of, torch.tensor([[p]])), expected), p
    for p in (0.001, 0.1, 1.0):
        assert torch.equal(keep_min_p(logits, torch.tensor([[p]])), theirs.MinPLogitsWarper(p)(ids, logits.clone()))
    for k in (1, 7, 5000):
        expected = theirs.TopKLogitsWarper(k)(ids, logits.clone())
        values, at = keep_top_k(logits, k)
        assert torch.equal(torch.full_like(logits, -torch.inf).scatter(1, at, values), expected)
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    for penalty in (0.5, 1.3):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        assert torch.equal(penalize(logits, seen, penalty), expected)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=5),
        Sampling(top_p=0.8),
        Sampling(top_k=12, top_p=0.9, min_p=0.05, temperature=0.9),
    ],
)
def test_drawn_frequencies_are_the_probabilities_that_transformers_gives(sampling):
    from transformers.generation import logits_process as theirs

    logits, n = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2, 40000
    warpers = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    expected = logits.clone()
    for warper in warpers:
        expected = warper(None, expected)
    p = expected.softmax(-1)[0]
    keys = torch.tensor([derive_seed(4, number) for number in range(n)])
    counts = torch.bincount(choose(logits.expand(n, -1), sampling, keys), minlength=30)
    assert (counts[p == 0] == 0).all()
    assert ((counts / n - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()  # five standard deviations


def test_numbers_drawn_are_splitmix64s():
    """Its first outputs for the seed 1234567, as in Vigna's public code, are those of the ids 1 to 5 for that key."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    exponential = torch.tensor([-math.log(((x >> 12) + 0.5) * 2**-52) for x in published])
    for probs in torch.rand(50, 5, generator=torch.Generator().manual_seed(0)):
        expected = (probs / exponential).argmax().item()
        assert draw(probs[None], torch.tensor([1234567]), torch.arange(1, 6)).item() == expected


def test_what_is_drawn_depends_on_ids_and_hardly_on_rounding():
    logits = torch.randn(2000, 500, generator=torch.Generator().manual_seed(1)) * 2
    keys = torch.tensor([derive_seed(9, n) for n in range(2000)])
    drawn = choose(logits, Sampling(), keys)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(2))
    shuffled = draw(logits[:, order].softmax(-1), keys, order)
    assert torch.equal(order[shuffled][:, 0], drawn)
    rounded = choose(logits + torch.randn_like(logits) * 1e-6, Sampling(), keys)
    assert (rounded != drawn).sum() <= 1
    assert len(set(drawn.flatten().tolist())) > 200


def test_impossible_tokens_are_never_drawn_and_extremes_are_greedy():
    probs = torch.tensor([[0.0, 1e-30, 0.0, 3e-30, 0.0]]).expand(5000, -1)
    keys = torch.tensor([derive_seed(n) for n in range(5000)])
    counts = torch.bincount(draw(probs, keys, torch.arange(5))[:, 0], minlength=5).tolist()
    assert counts[0] == counts[2] == counts[4] == 0 and 1100 < counts[1] < 1400
    assert draw(torch.tensor([[0.0, 1.0]]).expand(5000, -1), keys, torch.arange(2)).all()
    logits = torch.tensor([[1.0, 5.0, 2.0]]).expand(5000, -1)
    for extreme in ({"temperature": 1e-50}, {"top_p": 1e-50}, {"min_p": 1.0}, {"top_k": 1}):
        assert (choose(logits, Sampling(**extreme), keys) == 1).all(), extreme


def test_a_model_that_diverged_is_a_sentence():
    model = model_for(CHARS)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        continuations(model, CHARS, ["a"], SAMPLING)


def test_seeded_samples_are_those_of_reading_the_whole_row_each_time():
    """Cached in a batch against uncached alone, with all that chooses; equal but where the draw lies within 1e-4."""
    sampling, ties = Sampling(max_new_tokens=90, temperature=1.1, top_k=40, top_p=0.95, min_p=0.01,
                              repetition_penalty=1.2, seed=5), 0  # fmt: skip
    for number in range(6):
        model, prompts = model_for(CHINESE, seed=number), ["小", "小白兔", STORY[100:130], STORY[200:280]]
        pieces = list(stream(model, CHINESE, prompts, sampling))
        for row, prompt in enumerate(prompts):
            ours = [token.id for piece in pieces if piece.row == row for token in piece.tokens]
            ids, begin = prompt_ids(CHINESE, prompt), 0
            begin = max(0, len(ids) - 32)
            for n, id in enumerate(ours):
                if len(ids) - begin > 32:
                    begin = len(ids) - 16
                with torch.no_grad():
                    logits = model(torch.tensor([ids[begin:]]))[0][:, -1]
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[0, ids] = True
                logits = penalize(logits, seen, 1.2)
                key = torch.tensor([key_of(5, row, n)])
                if choose(logits, sampling, key).item() != id:
                    logits[0, id] += 1e-4
                    assert choose(logits, sampling, key).item() == id
                    ties += 1
                ids.append(id)
    print("ties:", ties)
    assert ties <= 3


def test_a_sample_is_the_same_in_any_company():
    model = model_for(CHINESE)
    texts = continuations(model, CHINESE, ["小"] * 7, SAMPLING)
    assert len(set(texts)) == 7
    for k in range(7):
        assert continuations(model, CHINESE, ["小"], SAMPLING, first=k) == texts[k : k + 1]
    assert continuations(model, CHINESE, ["小白兔说", "小", ""], SAMPLING, first=3)[1] == texts[4]
    longer = continuations(model, CHINESE, ["小"], Sampling(max_new_tokens=80, seed=1))[0]
    assert longer.startswith(texts[0])  # the length does not change what comes before
    assert continuations(model, CHINESE, ["小"], Sampling(max_new_tokens=50, seed=2)) != texts[:1]


def test_a_penalty_makes_repetition_rarer_and_it_counts_the_prompt():
    model = model_for(CHARS, spread=0.0)
    favour(model, *CHARS.encode("a").tolist(), *CHARS.encode("b").tolist())
    with torch.no_grad():
        model.lm_head.weight[CHARS.encode("b")[0]] = 0.9
    greedy = Sampling(max_new_tokens=3, temperature=0)
    assert continuations(model, CHARS, ["c", "a"], greedy) == ["aaa", "aaa"]
    penalized = Sampling(max_new_tokens=1, temperature=0, repetition_penalty=2.0)
    assert continuations(model, CHARS, ["c", "a"], penalized) == ["a", "b"]


def test_ids_of_the_padded_vocabulary_and_unknown_ones_never_come():
    model = model_for(CHARS, padding=7)
    favour(model, *range(CHARS.vocab_size, CHARS.vocab_size + 7))
    assert len(continuations(model, CHARS, ["ab"], SAMPLING)[0]) == 50

    class WithUnknown(CharTokenizer):
        unknown_id = 3

    tokenizer = WithUnknown(CHARS.chars, byte_fallback=False, end_of_text=False)
    favour(model, 3)
    for temperature in (0.0, 1.0):
        text = continuations(model, tokenizer, ["ab"], Sampling(max_new_tokens=50, temperature=temperature))[0]
        assert len(text) == 50 and CHARS.chars[3] not in text


def test_log_probabilities_are_the_models_own_and_alternatives_the_likeliest():
    model = model_for(BYTES)
    sampling = Sampling(max_new_tokens=20, temperature=0.5, top_k=3, seed=2)
    tokens = [t for piece in stream(model, BYTES, ["天"], sampling, logprobs=5) for t in piece.tokens]
    ids = prompt_ids(BYTES, "天")
    for token in tokens:
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0][0, -1].double().log_softmax(-1)
        assert abs(token.logprob - expected[token.id]) < 1e-4
        values, best = expected.topk(5)
        assert [id for id, _ in token.top] == best.tolist()
        assert max(abs(a - b) for (_, a), b in zip(token.top, values.tolist(), strict=True)) < 1e-4
        ids.append(token.id)
    assert len(tokens) == 20
    assert all(t.logprob is None for p in stream(model, BYTES, ["天"], sampling) for t in p.tokens)


# where a text ends


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 9, 10, 13, 14, 40, 41])
def test_scores_are_those_of_reading_each_window_by_itself(block_size, length):
    """Position by position, in float64, with the context that the docstring promises."""
    torch.manual_seed(length)
    shape = TINY | {"block_size": block_size, "n_layer": 1}
    model = GPT(GPTConfig(vocab_size=CHARS.vocab_size, **shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    ids = torch.randint(CHARS.vocab_size, (length,)).tolist()
    told = score(model, ids, 2, CHARS.vocab_size)
    assert [token.id for token in told] == ids[1:]
    step = max(1, block_size // 2)
    for at, token in enumerate(told, 1):
        begin = step * math.ceil(max(0, at - block_size) / step)
        assert min(at, math.ceil(block_size / 2)) <= at - begin <= block_size
        logits = model(torch.tensor([ids[begin:at]]))[0][0, -1].double()
        expected = logits.log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4), at
        likeliest = expected.topk(2)
        assert [id for id, _ in token.top] == likeliest.indices.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_scores_are_those_of_transformers_and_alternatives_change_nothing():
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = GPT(GPTConfig(**(TINY | {"block_size": 16}), vocab_size=60, act="gelu_tanh")).eval()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D's are the other way round
    with torch.no_grad():
        for name, p in ours.state_dict().items():
            other = theirs.state_dict()[name]
            p.copy_(other.t() if name.endswith(turned) else other)
    ids = torch.randint(60, (17,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    plain = [token.logprob for token in score(ours, ids, 0, 60)]
    assert plain == pytest.approx(expected, abs=1e-4)
    for alternatives in (1, 5, 60, 1000):
        told = score(ours, ids, alternatives, 60)
        assert [token.logprob for token in told] == plain
        assert all(len(token.top) == min(alternatives, 60) for token in told)
    assert all(token.top == () for token in score(ours, ids, 0, 60))


def test_what_a_vocabulary_is_padded_with_is_no_alternative():
    """Such ids have no text, whatever the model thinks of them."""
    size = BYTES.vocab_size
    model = model_for(BYTES, padding=7)
    with torch.no_grad():
        model.lm_head.weight[size:] = 3 * model.lm_head.weight[:7].abs()  # tied: the last layer's norm is made positive
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias = torch.nn.Parameter(torch.ones(model.config.n_embd))
    assert model(torch.tensor([[1, 2]]))[0][0, -1].argmax() >= size
    sampling = Sampling(max_new_tokens=9, temperature=0)
    drawn = [token for piece in stream(model, BYTES, ["天"], sampling, logprobs=5) for token in piece.tokens]
    for token in (*score(model, [1, 2, 3], 5, size), *drawn):
        assert len(token.top) == 5 and all(id < size for id, _ in token.top)
        assert BYTES.pieces([id for id, _ in token.top])


def test_an_empty_beginning_without_an_end_of_text_token_is_a_line_break():
    assert beginning(BYTES, "") == [BYTES.end_of_text] and beginning(BYTES, "天") == prompt_ids(BYTES, "天")
    with_break = CharTokenizer("\nab", byte_fallback=False, end_of_text=False)
    assert beginning(with_break, "") == [0] and beginning(with_break, "b") == [2]
    without = CharTokenizer("ab", byte_fallback=False, end_of_text=False)
    with pytest.raises(UserError, match="cannot begin a text from nothing"):
        beginning(without, "")


def test_a_model_that_diverged_has_no_scores():
    model = model_for(CHARS)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        score(model, [1, 2, 3], 0, CHARS.vocab_size)


def test_a_title_stands_where_the_layout_has_it():
    assert titled("《{title}》\n{content}\n完", "春天") == "《春天》\n"
    assert titled("{title}: {title} {content}", "{content}") == "{content}: {content} "
    for template in ("{content}", "", "{content} ({title})"):
        with pytest.raises(UserError, match="no layout with a title"):
            titled(template, "春天")


def test_prompts_may_be_ids():
    """What the texts' ids give is what the texts give, in whatever mixture."""
    texts = ["天地", "天", "《天》abc"]
    ids = [BYTES.encode_prompt(text).tolist() for text in texts]
    model = model_for(BYTES)
    pieces = [
        list(stream(model, BYTES, prompts, SAMPLING, logprobs=1)) for prompts in (texts, ids, [*texts[:1], *ids[1:]])
    ]
    assert pieces[0] == pieces[1] == pieces[2] and {piece.row for piece in pieces[0]} == {0, 1, 2}
    assert ids == [BYTES.encode_prompt(text).tolist() for text in texts]  # which are still the caller's own


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_stream_that_is_stopped_ends_all_rows_before_their_next_token(tokens):
    model, asked = model_for(CHARS), 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked == tokens

    free = list(stream(model, CHARS, ["a", "b"], SAMPLING))
    pieces = list(stream(model, CHARS, ["a", "b"], SAMPLING, stopped=stopped))
    assert pieces == free[: 2 * tokens] and asked == tokens
    assert not any(piece.finished for piece in pieces)


def test_end_of_text_ends_each_row_for_itself_and_is_not_shown():
    model = model_for(BYTES)
    favour(model, BYTES.end_of_text)
    assert continuations(model, BYTES, ["天", ""], SAMPLING) == ["", ""]
    last = list(stream(model, BYTES, ["天"], SAMPLING))[-1]
    assert (last.finished, [t.id for t in last.tokens]) == ("end", [BYTES.end_of_text])
    model = model_for(BYTES, spread=0.5)
    finished = {p.row: p.finished for p in stream(model, BYTES, ["天"] * 40, SAMPLING) if p.finished}
    assert set(finished.values()) == {"end", "length"} and len(finished) == 40


@pytest.mark.parametrize("length", [0, 1])
def test_no_or_one_new_token(length):
    pieces = list(stream(model_for(BYTES), BYTES, ["天", "地"], Sampling(max_new_tokens=length)))
    assert sum(len(piece.tokens) for piece in pieces) == 2 * length
    assert {piece.row for piece in pieces if piece.finished} == {0, 1}
    assert list(stream(model_for(BYTES), BYTES, [], SAMPLING)) == []


def test_stop_strings_end_the_text_wherever_tokens_end():
    text = "天地《天地》天x地"
    assert said(BYTES, text) == text
    assert said(BYTES, text, stop=["《天"]) == "天地"  # two tokens
    assert said(BYTES, text, stop=["》天x"]) == "天地《天地"
    assert said(BYTES, text, stop=["x", "》"]) == "天地《天地"  # the earlier one
    assert said(BYTES, text, stop=["地》《"]) == text  # began, and did not come true
    assert said(BYTES, text, stop=["地地"]) == text  # never met; what was held back at the end comes out
    emoji = "天🙂地"  # a stop string whose characters span byte tokens
    assert said(BYTES, emoji, stop=["🙂"]) == "天" and said(BYTES, emoji, stop=["🙂地!"]) == emoji
    model, sampling = Says(BYTES, BYTES.encode("天地《天》").tolist()), Sampling(5, 0, stop=["地《地"])
    pieces = [piece.text for piece in stream(model, BYTES, [""], sampling)]
    assert pieces == ["天", "地《天", "》"]  # held while it may be a stop string, no longer
    long = "天地" * 30
    assert said(BYTES, long, stop=["天地天地》"]) == long


def test_a_stop_string_is_searched_in_what_is_new_alone():
    model = Says(BYTES, BYTES.encode("天地").tolist())
    assert continuations(model, BYTES, ["<|endoftext|>"], Sampling(2, 0, stop=["<|endoftext|>"])) == ["天地"]


def test_sentences_are_finished_past_the_length_and_at_most_twice_as_far():
    text = "天。地天地！天地天地天地天地"
    for length, expected in ((1, "天。"), (2, "天。"), (3, "天。地天地！"), (6, "天。地天地！"), (7, text)):
        got = said(CHINESE, text, max_new_tokens=length, stop_at_sentence=True)
        assert got == expected[: 2 * length], length
    assert said(CHINESE, text, max_new_tokens=3, stop_at_sentence=True, stop_chars="地") == "天。地"
    assert said(CHINESE, "天地\n天", max_new_tokens=2, stop_at_sentence=True) == "天地\n"


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's vocabulary is not on this machine")
def test_gpt2_ids_and_a_stop_inside_a_token():
    gpt2 = GPT2Tokenizer()
    assert gpt2.encode("Not all heroes wear capes.").tolist() == [3673, 477, 10281, 5806, 1451, 274, 13]
    assert said(gpt2, "Not all heroes wear capes.", stop=["ro"]) == "Not all he"
    assert said(gpt2, "All is well. And more", max_new_tokens=2, stop_at_sentence=True) == "All is well."


# text as it comes


def strings(count: int, seed: int):
    """Random Chinese, emoji (joined and with skin tones), mixtures, controls and combining marks."""
    rng = random.Random(seed)
    alphabets = [
        "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里",
        "🙂🚀👨‍👩‍👧‍👦🏳️‍🌈👍🏽🇨🇳❤️🀄𠮷𝒳",
        "abc XYZ,.!?\n\t'\"0123456789",
        "é̃à́ÿñŝ\u200b\u200d\ufeff\ufffd\x00\x7f",
        "ひらがなカタカナ한국어العربيةไทย",
    ]
    for _ in range(count):
        chosen = rng.sample(alphabets, rng.randint(1, 3))
        parts = [rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 24))]
        rare = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        yield "".join(parts) + (rare if rng.random() < 0.1 else "")


@pytest.mark.parametrize("kind", ["char", "gpt2", "bpe"])
def test_streaming_ten_thousand_strings_gives_exactly_the_string(kind):
    if kind == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's vocabulary is not on this machine")
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    tokenizer = {"char": lambda: CHINESE, "gpt2": GPT2Tokenizer, "bpe": lambda: train_bpe([STORY], 1000)}[kind]()
    split = 0
    for text in strings(10_000, seed=6):
        ids = tokenizer.encode(text).tolist()
        writer = Writer(tokenizer, Sampling(max_new_tokens=len(ids)))
        pieces = [writer.write(id) for id in ids]
        assert "".join(pieces) == text and writer.finished == "length"
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        split += "" in pieces
    assert split > 1000  # many had characters that span tokens


def test_streamed_bytes_that_are_no_text_are_those_of_the_batch_decode():
    rng = random.Random(7)
    bytes_from = len(CHINESE.chars)
    for _ in range(2000):
        ids = [rng.choice([rng.randrange(bytes_from), bytes_from + rng.randrange(256)]) for _ in range(12)]
        writer = Writer(CHINESE, Sampling(max_new_tokens=len(ids)))
        pieces = [writer.write(id) for id in ids]
        whole, _ = codecs.utf_8_decode(CHINESE.decode_bytes(ids), "replace")  # up to a character that is not ended
        assert "".join(pieces) == whole and CHINESE.decode(ids) in (whole, whole + "\ufffd")
        writer = Writer(CHINESE, Sampling(max_new_tokens=99))
        assert "".join([writer.write(id) for id in [*ids, CHINESE.end_of_text]]) == whole


def test_a_character_that_is_not_ended_does_not_come_out():
    half = CHINESE.encode("天🙂").tolist()[:-1]
    writer = Writer(CHINESE, Sampling(max_new_tokens=len(half)))
    assert "".join([writer.write(id) for id in half]) == "天" and writer.finished == "length"


def test_a_stop_string_of_a_trained_vocabulary_begins_inside_a_token():
    pytest.importorskip("tokenizers")
    bpe, text = train_bpe([STORY], 1000), "有一天，小白兔高兴地说：“好！”龘。"
    assert bpe.pieces(bpe.encode(text))[:3] == ["有一天", "，", "小白"] and len(bpe.encode("龘")) == 3
    assert said(bpe, text) == text and said(bpe, text, stop=["天，小"]) == "有一"
    assert said(bpe, text, stop=["龘"]) == text[:-2]


def test_the_pieces_of_a_row_are_its_text_and_account_for_its_tokens():
    model = model_for(BYTES)
    prompts = ["天", "地《", ""]
    texts = ["", "", ""]
    for piece in stream(model, BYTES, prompts, Sampling(max_new_tokens=60, seed=9)):
        texts[piece.row] += piece.text
        assert piece.text or piece.finished
    assert texts == continuations(model, BYTES, prompts, Sampling(max_new_tokens=60, seed=9))


def test_a_prompt_may_be_longer_than_the_context_and_may_hold_the_special_token():
    model = model_for(BYTES)
    long = "天地地" * 100_000
    assert continuations(model, BYTES, [long], SAMPLING) == continuations(model, BYTES, [long[-32:]], SAMPLING)
    assert prompt_ids(BYTES, "天<|endoftext|>") == [2, BYTES.end_of_text]
    assert prompt_ids(BYTES, "") == [BYTES.end_of_text]


def test_prompts_that_cannot_be_are_sentences():
    with pytest.raises(UserError, match="U+"):
        prompt_ids(CHARS, "天")
    with pytest.raises(UserError, match="empty prompt"):
        prompt_ids(CHARS, "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": -1},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": -5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.00000005},
        {"repetition_penalty": 0.0},
        {"stop": [""]},
        {"stop": "ab"},
    ],
)
def test_numbers_that_make_no_sense_are_sentences(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
        Sampling(**wrong)


# texts that are written together


def settings(number: int) -> Sampling:
    """Of many kinds, none like the one before."""
    rng = random.Random(number)
    return Sampling(
        max_new_tokens=rng.choice([1, 5, 30, 60]), temperature=rng.choice([0, 0.5, 1.0, 1.3]),
        top_k=rng.choice([0, 0, 3, 20]), top_p=rng.choice([1.0, 1.0, 0.5, 0.9]), min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]), stop=rng.choice([(), (), ("a", "天地"), ("。",)]),
        stop_at_sentence=rng.random() < 0.2, seed=number,
    )  # fmt: skip


def test_each_row_is_chosen_by_its_own_settings_as_if_it_were_alone():
    generator = torch.Generator().manual_seed(0)
    for spread, size in ((0.3, 1500), (4.0, 1500), (2.0, 40)):  # so flat that a thousand candidates do not do
        for first in range(0, 200, 20):
            samplings = [settings(first + k) for k in range(20)]
            logits = torch.randn(20, size, generator=generator) * spread
            keys = torch.tensor([key_of(s.seed, k, 3) for k, s in enumerate(samplings)])
            together = Choice(samplings, logits.device)(logits, keys)
            for k, sampling in enumerate(samplings):
                alone = choose(logits[k : k + 1], sampling, keys[k : k + 1])
                assert together[k] == alone[0], sampling
            logits[3, 5], logits[8, :2], logits[11] = math.nan, math.inf, -math.inf
            again = Choice(samplings, logits.device)(logits, keys)
            assert (again == -1).nonzero()[:, 0].tolist() == [3, 8, 11]
            kept = [k for k in range(20) if k not in (3, 8, 11)]
            assert torch.equal(again[kept], together[kept])


def test_a_draws_number_is_its_seeds_its_samples_and_its_tokens_which_go_up_by_a_step():
    batch, sampling = Batch(model_for(CHARS), CHARS, 3), Sampling(max_new_tokens=9, seed=-5)
    batch.join(None, Rows([[1]], sampling, first=7))
    for token in range(6):
        batch.step()
        if token == 3:
            batch.join(None, Rows([[2]], sampling))  # what is drawn with is made anew
        else:
            expected = (derive_seed(-5, 7) + (token + 1) * 0xD1342543DE82EF95 - 2**63) % 2**64
            assert batch.plan.keys[0].item() % 2**64 == expected


ARCHITECTURES = [
    {},
    {"pos": "rope", "norm": "rmsnorm", "qk_norm": True, "bias": False, "act": "relu2"},
    {"attn_pattern": "dense,banded", "attn_window": 7},
    {"smear": 3},
    {"pos": "rope", "smear": 2, "attn_pattern": "banded", "attn_window": 5, "tied": False},
]


class Asked:
    """What one of many has asked for, and what came of it."""

    def __init__(self, number: int, tokenizer):
        rng = random.Random(number)
        lengths = [rng.choice([1, 2, 5, 12, 31, 32, 45]) for _ in range(rng.choice([1, 1, 2, 3]))]
        prompts = [[rng.randrange(tokenizer.vocab_size - 1) for _ in range(length)] for length in lengths]
        prompts += prompts[:1] * (rng.random() < 0.2)
        logprobs = rng.choice([None, None, 0, 2, 5])
        self.rows = Rows(prompts, settings(number), rng.randrange(5), logprobs)
        self.begins, self.leaves = rng.randrange(150), rng.choice([None, None, None, 1, 9, 30])
        self.pieces, self.steps = [], 0

    def told(self, pieces, row: int):
        """A row's text so far, why it ended, and its tokens."""
        own = [piece for piece in pieces if piece.row == row]
        tokens = [token for piece in own for token in piece.tokens]
        return "".join(piece.text for piece in own), "".join(piece.finished for piece in own), tokens


@torch.no_grad()
def uncached(model, asked: Asked, row: int, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalized logits after a row's prompt and `ids`, read anew, and the key of the draw that is next."""
    n, prompt, sampling = model.config.block_size, asked.rows.prompts[row], asked.rows.sampling
    begin, whole = max(0, len(prompt) - n), [*prompt, *ids]
    for length in range(len(prompt) + 1, len(whole) + 1):
        if length - begin > n:
            begin = length - n // 2
    logits = model(torch.tensor([whole[begin:]]))[0][:, -1]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, whole] = True
    key = key_of(sampling.seed, asked.rows.first + row, len(ids))
    return penalize(logits, seen, sampling.repetition_penalty), torch.tensor([key])


@pytest.mark.parametrize("number", range(len(ARCHITECTURES)))
def test_texts_that_come_and_go_are_those_that_each_is_alone(number):
    """Past the end of the context, with all settings beside each other; equal but where the draw lies within 1e-4."""
    torch.manual_seed(number)
    model = GPT(GPTConfig(vocab_size=BYTES.vocab_size, **(TINY | ARCHITECTURES[number]))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    everyone = [Asked(1000 * number + k, BYTES) for k in range(60)]
    batch, waiting, inside, most, ties = Batch(model, BYTES, 9, read_at_once=40), list(everyone), [], 0, 0
    waiting.sort(key=lambda asked: asked.begins)
    for step in range(10_000):
        while waiting and waiting[0].begins <= step and len(batch) + len(waiting[0].rows.prompts) <= 9:
            inside.append(waiting.pop(0))
            batch.join(inside[-1], inside[-1].rows)
        for asked in [asked for asked in inside if asked.steps == asked.leaves]:
            batch.leave(asked)
            inside.remove(asked)
        most = max(most, len(batch))
        for asked, piece in batch.step():
            asked.pieces.append(piece)
        for asked in list(inside):
            asked.steps += 1
            if sum(1 for piece in asked.pieces if piece.finished) == len(asked.rows.prompts):
                inside.remove(asked)
        if not (waiting or inside):
            break
    assert len(batch) == 0 and most == 9
    compared = 0
    for asked in everyone:
        rows = asked.rows
        for row, prompt in enumerate(rows.prompts):
            alone = list(stream(model, BYTES, [prompt], rows.sampling, first=rows.first + row, logprobs=rows.logprobs))
            text, finished, tokens = asked.told(asked.pieces, row)
            its_text, its_end, its_tokens = asked.told(alone, 0)
            ids, its_ids = [token.id for token in tokens], [token.id for token in its_tokens]
            if ids != its_ids[: len(ids)]:
                at = next(k for k, (a, b) in enumerate(zip(ids, its_ids, strict=False)) if a != b)
                logits, key = uncached(model, asked, row, ids[:at])
                for id in (ids[at], its_ids[at]):
                    nearly = logits.clone()
                    nearly[0, id] += 1e-4
                    assert choose(nearly, rows.sampling, key).item() == id, (at, rows)
                ties += 1
                continue
            compared += len(ids)
            assert its_text.startswith(text)
            assert (text, finished) == (its_text, its_end) or asked.leaves is not None and not finished
            for token, other in zip(tokens, its_tokens, strict=False):
                assert (token.logprob is None) == (rows.logprobs is None)
                if token.logprob is not None:
                    assert token.logprob == pytest.approx(other.logprob, abs=1e-3)
                    assert len(token.top) == rows.logprobs
                    assert [p for _, p in token.top] == pytest.approx([p for _, p in other.top], abs=1e-3)
    print("ties:", ties, "of", compared)
    assert ties <= 2 and compared > 1000


def test_a_row_is_computed_like_one_row_in_a_batch_of_many_and_the_cache_is_no_larger_than_it_must_be():
    model = model_for(CHARS)
    batch, generator, compact = Batch(model, CHARS, 16), random.Random(0), 0
    batch.join("long", Rows([[1]], Sampling(max_new_tokens=400)))
    for step in range(300):
        if step % 7 == 0 and step < 200:
            batch.join(step, Rows([[2]] * generator.randint(1, 16 - len(batch)), Sampling(generator.randint(1, 5))))
        if step % 7 == 6 and step < 200:
            assert len(batch) == 1  # the others have ended
        before = len(batch)
        batch.step()
        shapes = {tuple(tensor.shape) for layer in batch.decoder.layers for tensor in layer}
        assert len(shapes) == 1 and max(shapes) <= (16, 2, 32, 16)
        if before == 1 and batch.decoder.lengths[0] > 17:  # not read again at this step
            assert {len(tensor) for layer in batch.decoder.computed for tensor in layer} == {1}
            compact += 1
    assert compact > 50
    batch.leave("long")
    assert not batch and batch.decoder is None and batch.plan is None


def test_a_crowd_of_prompts_is_read_in_turn_with_the_tokens_of_those_who_write():
    model = GPT(GPTConfig(vocab_size=50, **(TINY | {"block_size": 128}))).eval()
    letters = CharTokenizer("".join(map(chr, range(100, 150))), byte_fallback=False, end_of_text=False)
    batch = Batch(model, letters, 40, read_at_once=100)
    batch.join("first", Rows([[1]] * 2, Sampling(max_new_tokens=50)))
    batch.step()
    assert (batch.read, batch.drawn) == (1, 2)  # equal prompts are read once
    lengths = [30, 30, 60, 128, 20, 100, 101, 10]
    for k, length in enumerate(lengths):
        batch.join(k, Rows([[k] * length] * 3, Sampling(max_new_tokens=50)))
    told = []
    while batch.coming:
        before, drawn, writing = batch.read, batch.drawn, len(batch.rows)
        batch.step()
        told.append(batch.read - before)
        assert batch.drawn - drawn == len(batch.rows) > writing
    assert told == [60, 60, 128, 20, 100, 101, 10]


def test_prompts_are_padded_to_the_longest_of_those_that_are_alike():
    def grouped(*lengths: int) -> list[list[int]]:
        return [
            [len(row.prompt) for row in group] for group in alike([SimpleNamespace(prompt=[0] * n) for n in lengths])
        ]

    assert grouped(10, 1000, *[10] * 14) == [[1000], [10] * 15]
    assert grouped(1, SHORT, 30) == [[SHORT, 30, 1]] and grouped() == []
    assert grouped(100, 400, 200, 150, 99) == [[400, 200], [150, 100, 99]]


def test_one_whose_numbers_are_not_finite_is_told_alone():
    """A token whose embedding is not a number: who has it is told, also of his other rows, and nobody else notices."""

    class NeverDrawn(CharTokenizer):
        unknown_id = 8

    tokenizer = NeverDrawn(CHARS.chars, byte_fallback=False, end_of_text=False)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, tied=False, **TINY)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        model.transformer.wte.weight[8] = math.nan
    sampling = Sampling(max_new_tokens=40, temperature=0)
    prompts = [[1, 2], [3], [4, 5, 6]]
    alone = [continuations(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]
    batch, texts, errors = Batch(model, tokenizer, 6), {}, []

    def step() -> None:
        for owner, result in batch.step():
            if isinstance(result, UserError):
                errors.append(owner)
            else:
                texts[owner] = texts.get(owner, "") + result.text

    batch.join(0, Rows([prompts[0]], sampling))
    step()
    batch.join("bad", Rows([[1], [2, 8, 3, 4, 5, 6], [8], [3]], sampling))
    batch.join(1, Rows([prompts[1]], sampling))
    step()
    assert errors == ["bad"] and "bad" not in texts and len(batch) == 2
    batch.join(2, Rows([prompts[2]], sampling))  # into a row that held what is not a number
    while batch:
        step()
    assert [texts[k] for k in range(3)] == alone and errors == ["bad"]


def test_who_finds_no_room_or_says_nothing_is_told_and_changes_nothing():
    batch = Batch(model_for(CHARS), CHARS, 2)
    batch.join("a", Rows([[1]], SAMPLING))
    for prompts, told in (([[1], [2]], "2 rows beside 1: a batch has 2"), ([[]], "no tokens")):
        with pytest.raises(ValueError, match=told):
            batch.join("b", Rows(prompts, SAMPLING))
        assert len(batch) == 1
    batch.leave("b"), batch.leave("a")  # before it was read
    assert not batch and batch.step() == [] and batch.drawn == batch.read == 0


def test_nothing_of_a_batch_is_left_once_all_have_gone():
    batch = Batch(model_for(CHARS), CHARS, 4)
    gc.collect(), gc.disable()  # by counting references alone
    try:
        for way in ("end", "leave", "clear"):
            owner = Asked(0, CHARS)
            batch.join("other", Rows([[1]], Sampling(max_new_tokens=9)))
            batch.join(owner, Rows([[1, 2], [3]], Sampling(5, repetition_penalty=1.1), logprobs=1))
            for _ in range(3):
                batch.step()
            kept = [weakref.ref(owner), weakref.ref(batch.decoder), weakref.ref(batch.decoder.layers[0][0])]
            kept += [weakref.ref(batch.plan.seen), *(weakref.ref(row) for row in batch.rows)]
            if way == "leave":
                batch.leave(owner)
                assert kept[0]() is owner and len(batch) == 1
                batch.leave("other")
            elif way == "clear":
                batch.clear()
            while batch:
                batch.step()
            del owner
            assert not any(each() for each in kept), way
    finally:
        gc.enable()
