"""Windows, likelihoods and sums, held against transformers and arithmetic on paper."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY
from test_export import a_run, exported

import scoring
from configurator import UserError
from model import GPT, GPTConfig
from scoring import continuation_likelihoods, likelihoods, summed, windowed, windows

BLOCK = TINY["block_size"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model with random weights, and transformers' model of its export."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("scored")
    model = a_run(folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(exported(folder)).eval()


def random_ids(n: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(vocab_size, size=n).astype(np.uint16)


def guide(n: int, max_length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) as in the loop of https://huggingface.co/docs/transformers/perplexity."""
    found, prev_end = [], 0
    for begin in range(0, n, stride):
        end = min(begin + max_length, n)
        trg_len = end - prev_end  # labels of those before are -100, and the first of all has nothing before it
        found.append((begin, max(end - trg_len, begin + 1), end))
        prev_end = end
        if end == n:
            break
    return found


@pytest.mark.parametrize("block_size", [1, 2, 5, 8])
def test_every_token_but_the_first_is_scored_once_and_the_windows_are_the_guides(block_size):
    for stride in range(1, block_size + 1):
        for n in range(4 * block_size + 2):
            found = list(windows(n, block_size, stride))
            assert [i for _, first, end in found for i in range(first, end)] == list(range(1, n))
            for begin, first, end in found:
                assert 0 <= begin < first < end and end - 1 - begin <= block_size
                assert first - begin >= min(first, block_size - stride) and first - begin >= 1
            if stride < block_size and n > 1:
                assert found == guide(n, block_size, stride)


@pytest.mark.parametrize("stride", [-1, 0, 9])
def test_a_stride_out_of_range_is_a_sentence(stride):
    with pytest.raises(UserError, match=f"stride={stride}: expected 1 to 8"):
        list(windows(20, 8, stride))


def test_a_text_of_less_than_two_tokens_has_nothing_to_score():
    assert list(windows(0, 8, 4)) == list(windows(1, 8, 4)) == []


@torch.inference_mode()
def figures_of_transformers(theirs, ids: np.ndarray, stride: int) -> tuple[float, int]:
    """(negative log-likelihood, tokens that were the likeliest) by a plain loop, one window at a time."""
    ids, nll, hits = torch.from_numpy(ids.astype(np.int64)), 0.0, 0
    places = guide(len(ids), BLOCK, stride)
    if stride == BLOCK:  # where the guide's loop leaves out the first token of each window, which is to be scored too
        places = [
            (0, 1, BLOCK),
            *((i, i + 1, min(i + 1 + BLOCK, len(ids))) for i in range(BLOCK - 1, len(ids) - 1, BLOCK)),
        ]
    for begin, first, end in places:
        logits = theirs(ids[None, begin : end - 1]).logits[0, first - begin - 1 :].double()
        nll += torch.nn.functional.cross_entropy(logits, ids[first:end], reduction="sum").item()
        hits += int((logits.argmax(-1) == ids[first:end]).sum())
    return nll, hits


@pytest.mark.parametrize("stride", [1, 7, 16, BLOCK - 1, BLOCK])
def test_the_sums_are_transformers_in_batches_of_any_size(both, stride, tmp_path):
    model, theirs = both
    ids = random_ids(3 * BLOCK + 5, model.config.vocab_size)
    for i in range(1, len(ids), 3):  # some are to be the likeliest
        seen = torch.from_numpy(ids[max(0, i - BLOCK) : i].astype(np.int64))
        ids[i] = model(seen[None])[0].argmax()
    ids.tofile(tmp_path / "val.bin")
    nll, hits = figures_of_transformers(theirs, ids, stride)
    assert hits > 0
    for batch_size in (1, 3, 8):
        told = []
        mapped = np.memmap(tmp_path / "val.bin", np.uint16, "r")
        sums = summed(model, windowed(mapped, BLOCK, stride, batch_size), told.append)
        assert sums.tokens == len(ids) - 1 == sum(told) and sums.hits == hits
        assert sums.nll == pytest.approx(nll, rel=1e-6)


def test_the_head_gives_few_logits_at_once_and_reads_nothing_else(both, monkeypatch):
    model, _ = both
    ids, sizes = random_ids(2 * BLOCK, model.config.vocab_size), []
    whole = summed(model, windowed(ids, BLOCK, BLOCK // 2, 4))
    monkeypatch.setattr(scoring, "LOGITS", 5 * model.config.vocab_size)
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: sizes.append(len(logits)))
    pieces = summed(model, windowed(ids, BLOCK, BLOCK // 2, 4))
    hook.remove()
    assert max(sizes) == 5 and sum(sizes) == len(ids) - 1
    assert (pieces.hits, pieces.tokens) == (whole.hits, whole.tokens)
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)


def test_logits_beyond_the_tokenizers_vocabulary_stay_in_the_softmax():
    model = GPT(GPTConfig(**TINY, vocab_size=1000))
    for p in model.parameters():
        p.data.zero_()
    sums = summed(model.eval(), windowed(np.zeros(50, np.uint16), BLOCK, 16, 8))  # ids of a vocabulary of one
    assert sums.nll == pytest.approx(49 * math.log(1000), rel=1e-6) and (sums.hits, sums.tokens) == (49, 49)


@torch.inference_mode()
def test_continuations_are_transformers_in_batches_of_any_size(both):
    model, theirs = both
    rng, pairs, expected = np.random.default_rng(1), [], []
    for i in range(23):
        context = rng.integers(model.config.vocab_size, size=int(rng.integers(1, 2 * BLOCK))).tolist()
        continuation = []
        for _ in range(int(rng.integers(1, 6)) if i else BLOCK):
            ids = torch.tensor([[*context, *continuation][-BLOCK:]])
            continuation.append(int(theirs(ids).logits[0, -1].argmax()))
        if i % 2:
            continuation[-1] = (continuation[-1] + 1) % model.config.vocab_size
        seen = torch.tensor([[*context, *continuation][-BLOCK - 1 :]])
        logits = theirs(seen[:, :-1]).logits[0, -len(continuation) :].double()
        own = logits.log_softmax(-1).gather(1, seen[0, -len(continuation) :, None])
        greedy = logits.argmax(-1).tolist() == continuation
        pairs.append((context, continuation))
        expected.append((own.sum().item(), len(continuation), greedy))
    assert {greedy for _, _, greedy in expected} == {True, False}
    assert any(len(context) + len(continuation) > BLOCK + 1 for context, continuation in pairs)
    for batch_size in (1, 3, 8, 100):
        told = []
        found = continuation_likelihoods(model, pairs, batch_size, told.append)
        assert sum(told) == len(pairs) and [one[1:] for one in found] == [one[1:] for one in expected]
        assert [one.logprob for one in found] == pytest.approx([one[0] for one in expected], rel=1e-6)
    assert continuation_likelihoods(model, [], 8) == []


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (BLOCK + 1))])
def test_a_pair_that_cannot_be_scored(both, pair):
    with pytest.raises(ValueError, match="expected a context, and a continuation of 1 to 32"):
        continuation_likelihoods(both[0], [([1], [2]), pair], 8)


def test_a_model_that_diverged_is_a_sentence():
    model = GPT(GPTConfig(**TINY, vocab_size=10)).eval()
    model.transformer.ln_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        summed(model, windowed(np.zeros(50, np.uint16), BLOCK, 16, 8))


def test_what_is_not_scored_changes_nothing(both):
    model, _ = both
    x = torch.randint(model.config.vocab_size, (2, 20))
    y = torch.full((2, 20), -1)
    assert all(len(t) == 0 for t in likelihoods(model, x, y))
    y[1, 3:5] = x[1, 4:6]
    logprobs, _ = likelihoods(model, x, y)
    x[0], x[1, 5:] = 0, 0
    assert likelihoods(model, x, y)[0].tolist() == pytest.approx(logprobs.tolist(), rel=1e-6) and len(logprobs) == 2
