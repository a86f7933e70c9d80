import codecs
import math
import os
import random

import pytest
import torch
from conftest import ROOT, TINY

from configurator import UserError
from generate import (
    STEP,
    Sampling,
    Writer,
    beginning,
    choose,
    continuations,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize,
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


def test_filters_are_those_of_transformers():
    """Each alone on random logits, against the same filter there; ties are not to be expected."""
    from transformers.generation import logits_process as theirs

    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)) * 4
    ids = torch.randint(3000, (40, 60), generator=torch.Generator().manual_seed(1))
    flat = logits / 8  # most tokens are needed for most of the mass
    for p, of in ((0.05, logits), (0.5, logits), (0.95, logits), (0.5, flat), (0.95, flat), (0.99, flat)):
        expected = theirs.TopPLogitsWarper(p)(ids, of.clone())
        assert torch.equal(keep_top_p(of, p), expected), p
    for p in (0.001, 0.1, 1.0):
        assert torch.equal(keep_min_p(logits, p), theirs.MinPLogitsWarper(p)(ids, logits.clone()))
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
    counts = torch.bincount(choose(logits.expand(n, -1), sampling, keys)[:, 0], minlength=30)
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
    assert torch.equal(order[shuffled], drawn)
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
                key = torch.tensor([derive_seed(5, row)]) + (n * STEP % 2**64 - 2**63)
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
