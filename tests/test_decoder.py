"""Generation over the key-value cache, held against reading the whole row each time, and against transformers."""

import shutil

import pytest
import torch

from decoder import LEAST, Decoder
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SHAPES = [
    dict(n_layer=1, n_head=1, n_embd=16, vocab_size=61, block_size=8),
    dict(n_layer=2, n_head=4, n_embd=32, vocab_size=101, block_size=33),
    dict(n_layer=3, n_head=2, n_embd=48, vocab_size=257, block_size=64, bias=False),
    dict(n_layer=4, n_head=3, n_embd=24, vocab_size=512, block_size=17, act="gelu_tanh"),
    dict(n_layer=2, n_head=8, n_embd=64, vocab_size=1000, block_size=50, bias=False, act="gelu_tanh"),
    dict(n_layer=6, n_head=2, n_embd=32, vocab_size=91, block_size=1),
]
TIE = 1e-4  # where the deciding logits are closer than this, rounding decides


def random_model(number: int) -> GPT:
    """Every parameter random, gains and biases too, so that what a token sees matters."""
    torch.manual_seed(number)
    model = GPT(GPTConfig(**SHAPES[number])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
    return model


@torch.no_grad()
def uncached(model: GPT, prompt: list[int], new: int, temperature=0.0, top_k=None) -> tuple[list[int], list[float]]:
    """nanoGPT's loop, which reads the row anew for every token, but for a full context, of which the newer half stays.
    The ids, and for each new one by how much its logit was ahead of the next."""
    ids, block_size = torch.tensor([prompt]), model.config.block_size
    begin, margins = max(0, len(prompt) - block_size), []
    for _ in range(new):
        if ids.size(1) - begin > block_size:
            begin = ids.size(1) - max(1, block_size // 2)
        logits = model(ids[:, begin:])[0][:, -1]
        best = logits.topk(2).values[0]
        margins.append(float(best[0] - best[1]))
        if temperature == 0:
            drawn = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            drawn = torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat((ids, drawn), 1)
    return ids[0].tolist(), margins


def ties(ours: list[int], reference: list[int], margins: list[float]) -> int:
    """0 where both are equal, 1 where they part at a tie; anything else fails."""
    if ours == reference:
        return 0
    at = next(i for i, (a, b) in enumerate(zip(ours, reference, strict=True)) if a != b)
    assert margins[at - (len(reference) - len(margins))] < TIE, f"position {at}"
    print("a tie at position", at)
    return 1


def prompts_for(model: GPT) -> list[list[int]]:
    """Of lengths 1, some, all but one, all and twice the context."""
    n, generator = model.config.block_size, torch.Generator().manual_seed(5)
    lengths = sorted({1, max(1, n // 3), max(1, n - 1), n, 2 * n})
    return [torch.randint(model.config.vocab_size, (k,), generator=generator).tolist() for k in lengths]


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_greedy_and_seeded_samples_are_those_without_the_cache(number):
    model, counted = random_model(number), 0
    new = 2 * model.config.block_size + 5
    for prompt in prompts_for(model):
        ours = model.generate(torch.tensor([prompt]), new, temperature=0)[0].tolist()
        counted += ties(ours, *uncached(model, prompt, new))
        torch.manual_seed(7)
        ours = model.generate(torch.tensor([prompt]), new, temperature=0.9, top_k=20)[0].tolist()
        torch.manual_seed(7)
        assert ours == uncached(model, prompt, new, 0.9, min(20, model.config.vocab_size))[0]
    assert counted <= 1


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("compiled", [False, True])
def test_each_row_of_a_batch_is_the_same_prompt_alone(number, compiled):
    """Rows of five lengths and two equal ones, one of which rests for a while, past the end of the context."""
    if compiled and (number not in (1, 3) or not shutil.which("g++")):
        pytest.skip("two shapes tell, and take a C++ compiler")
    model = random_model(number)
    prompts = prompts_for(model)
    prompts.append(prompts[1])
    new, rests = 2 * model.config.block_size + 5, range(3, 9)
    decoder = Decoder(model, len(prompts), model.config.block_size, compiled)
    logits, rows, resting = decoder.prefill(prompts), [list(prompt) for prompt in prompts], len(prompts) - 1
    held = None
    for step in range(new + len(rests)):
        ids: list = logits.argmax(-1).tolist()
        if step in rests:  # it has read what it has read, and goes on later with the token that it had
            held = ids[resting] if held is None else held
            ids[resting] = None
        elif held is not None:
            ids[resting], held = held, None
        for row, id in zip(rows, ids, strict=True):
            row += [] if id is None else [id]
        logits = decoder.decode(ids)
    counted = 0
    for prompt, row in zip(prompts, rows, strict=True):
        reference, margins = uncached(model, prompt, new)
        counted += ties(row[: len(reference)], reference, margins)
    assert counted <= 1


def test_a_row_that_rests_keeps_what_it_has_read():
    model = random_model(1)
    alone = Decoder(model, 1, 33)
    alone.prefill([[1, 2, 3, 4, 5]])
    decoder = Decoder(model, 2, 33)
    decoder.prefill([[1, 2, 3, 4, 5], [6, 7]])
    for id in range(20):  # the other row passes by
        decoder.decode([None, id])
    torch.testing.assert_close(decoder.decode([8, 9])[:1], alone.decode([8]), atol=1e-4, rtol=0)


def test_greedy_equals_transformers_with_its_own_cache(tmp_path):
    config = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=48, vocab_size=101, n_positions=64)
    torch.manual_seed(3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    x = torch.randint(101, (3, 14), generator=torch.Generator().manual_seed(2))
    reference = theirs.generate(x, max_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(x, 50, temperature=0).tolist() == reference.tolist()


def sizes(decoder: Decoder) -> set[torch.Size]:
    return {tensor.shape for layer in decoder.layers for tensor in layer}


def test_the_cache_is_one_tensor_a_layer_that_grows_twofold_up_to_what_is_needed():
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=101, block_size=200)).eval()
    decoder = Decoder(model, 7, 150)
    assert sizes(decoder) == {(0, 4, 0, 8)}
    decoder.prefill([[1, 2]])
    assert sizes(decoder) == {(1, 4, LEAST, 8)} and len(decoder.layers) == 2
    found = []
    for id in range(160):
        decoder.decode([id % 101])
        (size,) = sizes(decoder)
        found += [size[2]] if found[-1:] != [size[2]] else []
    assert found == [LEAST, 2 * LEAST, 4 * LEAST, 150]
    for row in range(1, 7):
        decoder.prefill([[row]], [row])
        assert sizes(decoder) == {((1, 2, 4, 4, 7, 7, 7)[row], 4, 150, 8)}
    assert Decoder(model, batch=1, time=1000).time == 200


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_as_many_rows_are_computed_as_there_are_ids_and_the_last_takes_the_place_of_one_that_ends(number):
    """Rows come at any time and the first one ends every few tokens; each is the same prompt alone."""
    model, counted, computed = random_model(number), 0, []
    vocab_size, n = model.config.vocab_size, model.config.block_size
    model.transformer.ln_f.register_forward_hook(lambda _, args, y: computed.append(len(y)))
    decoder, rows, ended = Decoder(model, 4, n), [], []
    decoder.net.ln_f = model.transformer.ln_f  # which the hook is on
    ids: list[int] = []
    for step in range(3 * n + 20):
        if ids:
            computed.clear()
            logits = decoder.decode(ids)
            assert len(logits) == len(ids) and max(computed) <= len(ids)
            ids = logits.argmax(-1).tolist()
        if len(rows) < 4 and step % 2 == 0:
            prompt = [(7 * step + k) % vocab_size for k in range(1 + step % (n + 2))]
            ids.append(decoder.prefill([prompt], [len(rows)]).argmax(-1).item())
            rows.append((prompt, list(prompt)))
        for (_, row), id in zip(rows, ids, strict=True):
            row.append(id)
        if step % 5 == 4:
            last = len(rows) - 1
            ended.append(rows[0])
            if last:
                decoder.move(last, 0)
                rows[0], ids[0] = rows[last], ids[last]
            rows.pop(), ids.pop()
    for prompt, row in ended + rows:
        reference, margins = uncached(model, prompt, len(row) - len(prompt))
        counted += ties(row, reference, margins)
    assert len(ended) > 3 and counted <= 1


def test_numbers_that_are_not_finite_stay_in_their_row_and_go_with_it():
    model = GPT(GPTConfig(**SHAPES[1], tied=False)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[7] = torch.nan
    decoder, alone = Decoder(model, 2, 33), Decoder(model, 1, 33)
    logits = decoder.prefill([[1, 2, 3], [4, 7, 5, 6, 8, 9]])
    torch.testing.assert_close(logits[0], alone.prefill([[1, 2, 3]])[0])
    assert logits[1].isnan().all() and decoder.decode([4, 5]).isnan().any(-1).tolist() == [False, True]
    decoder.wipe(1)
    decoder.prefill([[4, 5]], [1])
    alone.prefill([[4, 5]])
    logits = decoder.decode([5, 6])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], alone.decode([6])[0])


def test_a_full_context_is_read_again_once_for_each_half():
    """Amortised: with a context of 32, 160 new tokens after 32 are ten prefills of 16, not 160 of 32."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=50, block_size=32)).eval()
    decoder, read = Decoder(model, 1, 32), []
    prefill = decoder.prefill
    decoder.prefill = lambda prompts, rows=None: (read.append(len(prompts[0])), prefill(prompts, rows))[1]
    decoder.prefill([[1] * 32])
    for id in range(160):
        decoder.decode([id % 50])
    assert read == [32] + [16] * 10


def test_autocast_decides_the_cache_and_the_models_mode_nothing():
    model = random_model(2)
    prompt, new = prompts_for(model)[1], 30
    expected = model.generate(torch.tensor([prompt]), new, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoder(model, 1, 8).layers[0][0].dtype == torch.bfloat16
        assert model.generate(torch.tensor([prompt]), new, temperature=0).shape == expected.shape
        decoder, alone = Decoder(model, 2, 40), Decoder(model, 1, 40)
        decoder.prefill([[1, 2, 3, 4], [5]])
        alone.prefill([[5]])
        for id in range(9):  # rows of different lengths
            together, single = decoder.decode([7, id]), alone.decode([id])
        torch.testing.assert_close(together[1:].float(), single.float(), atol=0.3, rtol=0.05)
    dropping = GPT(GPTConfig(**SHAPES[2], dropout=0.5))
    dropping.load_state_dict(model.state_dict())
    assert torch.equal(dropping.train().generate(torch.tensor([prompt]), new, temperature=0), expected)
    assert torch.backends.mkldnn.enabled  # what decoding turns off for a token is on again


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_nothing_is_compiled_again_as_rows_grow():
    model = random_model(1)
    decoder = Decoder(model, 2, 33, compiled=True)
    decoder.prefill([[1], [2, 3]])
    decoder.decode([4, 5])
    with torch.compiler.set_stance("fail_on_recompile"):
        for id in range(28):
            decoder.decode([id, id])
        again = Decoder(model, 2, 10, compiled=True)
        again.prefill([[1] * 5, [2, 3]])
        again.decode([4, 5])


def test_what_stands_in_a_layers_place_is_used():
    """An adapter from outside replaces a Linear: decoding calls it, as forward does."""
    model = random_model(1)

    class Louder(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 3 * self.inner(x)

    before = model.generate(torch.tensor([[1, 2]]), 20, temperature=0)[0].tolist()
    model.transformer.h[0].mlp.c_fc = Louder(model.transformer.h[0].mlp.c_fc)
    after = model.generate(torch.tensor([[1, 2]]), 20, temperature=0)[0].tolist()
    assert after == uncached(model, [1, 2], 20)[0] != before
