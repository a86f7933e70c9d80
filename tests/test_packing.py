import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from configurator import UserError
from loader import evaluated, fingerprint, open_mixture, open_split, parts_of, training_batches
from model import GPT, GPTConfig
from packing import BEGINS, LEARNT, Examples, best_fit

NEWER = dict(bias=False, act="relu2", pos="rope", norm="rmsnorm", qk_norm=True, tied=False, smear=3)


def dataset(folder, examples, name="train"):
    """A dataset folder of [(ids, how many of the last are learnt)], the same for both splits."""
    folder.mkdir(exist_ok=True)
    ids = np.concatenate([np.array(ids, "<u2") for ids, _ in examples])
    marks = [np.array([BEGINS] + [0] * (len(ids) - 1 - n) + [LEARNT] * n, np.uint8)[: len(ids)] for ids, n in examples]
    files = {}
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
        np.concatenate(marks).tofile(folder / f"{split}.mask")
        files |= {f"{split}.bin": {"bytes": 2 * len(ids)}, f"{split}.mask": {"bytes": len(ids), "sha256": name}}
    (folder / "meta.json").write_text(json.dumps({"kind": "gpt2", "max_id": int(ids.max()), "files": files}))
    return folder


def some_examples(n=60, seed=0, most=12, vocab_size=50):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, most, n)
    return [(rng.integers(0, vocab_size, size).tolist(), int(rng.integers(1, size))) for size in lengths]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_best_fit_is_what_its_definition_gives(lengths):
    row_of = best_fit(np.array(lengths), 12)
    left: list[int] = []  # the definition, by looking at every row
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=lambda row: left[row])] -= length
        else:
            left.append(12 - length)
    filled = np.bincount(row_of, weights=lengths)
    assert sorted(filled.tolist()) == sorted(12 - room for room in left) and filled.max() <= 12


def test_rows_have_whole_examples_their_targets_and_their_positions(tmp_path):
    #                         cut: 8 targets                                   nothing to learn in its first 8
    examples = [([1, 2, 3, 4], 2), (list(range(10, 21)), 9), ([5, 6], 1), ([7, 8, 9], 0), (list(range(30, 42)), 2)]
    found = open_split(dataset(tmp_path, examples), "train", 8)
    rows = found.rows(8)
    assert (len(rows), rows.cut, rows.left_out, rows.learnt.tolist()) == (2, 1, 2, [7, 3])
    x, y, positions = (t.tolist() for t in found.windows(np.array([0, 1]), 8, 50))
    assert x == [[10, 11, 12, 13, 14, 15, 16, 17], [1, 2, 3, 5, 0, 0, 0, 0]]
    assert y == [[-1, 12, 13, 14, 15, 16, 17, 18], [-1, 3, 4, 6, -1, -1, -1, -1]]
    assert positions == [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 0, 0, 0, 0]]
    with pytest.raises(UserError, match="token id 18"):
        found.windows(np.array([0]), 8, 18)


def test_an_epoch_has_every_target_once_and_an_evaluation_too(tmp_path):
    examples = some_examples()
    data = open_mixture(parts_of(str(dataset(tmp_path, examples))), "train", 16)
    wanted = sorted(tuple(ids[len(ids) - n :]) for ids, n in examples)
    rows = data.blocks(16)[0]

    def answers(x, y, positions):
        """The runs of targets, each the answer of one example."""
        found = []
        for row, where in zip(y.tolist(), positions.tolist(), strict=True):
            for t, (token, position) in enumerate(zip(row, where, strict=True)):
                begins = t == 0 or position <= where[t - 1] or row[t - 1] < 0
                if token >= 0 and begins:
                    found.append([])
                if token >= 0:
                    found[-1].append(token)
        return sorted(map(tuple, found))

    orders = []
    for epoch in range(3):
        numbers = np.arange(epoch * rows, (epoch + 1) * rows)
        assert answers(*data.windows(numbers, 16, 50, seed=3)) == wanted
        orders.append(data.places(numbers, 16, 3)[1].tolist())
    assert len(set(map(tuple, orders))) == 3 and sorted(orders[0]) == list(range(rows))
    split = data.tokens[0]
    assert sorted(evaluated(split, 16, 1, 10**9).ravel().tolist()) == list(range(rows))
    assert len(split.rows(16)) < 1.1 * sum(len(ids) - 1 for ids, _ in examples) / 16 + 1  # next to nothing is empty


@pytest.mark.parametrize("kind", [{}, NEWER])
@pytest.mark.parametrize("own", [False, True])
def test_packed_examples_do_not_see_each_other(kind, own, monkeypatch):
    monkeypatch.setattr(ops, "rounds_products", lambda: own)  # attention by PyTorch, and by ours
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=200, vocab_size=50, n_layer=2, n_head=2, n_embd=32, **kind))
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # smear, and what begins at zero, too
    examples = [torch.randint(50, (n,)) for n in (30, 1, 77, 2, 90)]
    both = (examples, examples[::-1])
    row = torch.stack([torch.cat(each) for each in both])
    positions = torch.stack([torch.cat([torch.arange(len(example)) for example in each]) for each in both])
    logits, _ = model(row, row, positions=positions)
    alone = torch.stack([torch.cat([model(e[None], e[None])[0][0] for e in each]) for each in both])
    assert (logits - alone).abs().max() < 1e-5
    row[0, 40] = (row[0, 40] + 1) % 50  # in the third example: what is before it and in the others stays, bit for bit
    changed, _ = model(row, row, positions=positions)
    there = (changed[0] != logits[0]).any(-1).nonzero().ravel().tolist()
    assert there and min(there) == 40 and max(there) < 30 + 1 + 77
    assert torch.equal(changed[1], logits[1])


def test_packed_logits_are_those_of_transformers_for_each_example(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=64)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    folder = dataset(tmp_path / "d", [(list(range(n, n + 13)), 5) for n in range(0, 40, 7)])
    x, y, positions = open_split(folder, "train", 64).windows(np.array([0, 1]), 64, 60)
    logits, loss = model(x, y, positions=positions)
    total, count = 0.0, 0
    for n in range(0, 40, 7):
        example = torch.arange(n, n + 13)[None]
        wanted = theirs(example).logits[0, :-1]  # [12, vocab]
        [(row, at)] = ((x == n) & (positions == 0) & (torch.roll(x, -1, 1) == n + 1)).nonzero().tolist()
        assert (logits[row, at : at + 12] - wanted).abs().max() < 1e-5
        total += F.cross_entropy(wanted[-5:], example[0, -5:], reduction="sum").item()
        count += 5
    assert abs(loss.item() - total / count) < 1e-5


@pytest.mark.parametrize("large", [1, 1 << 24])
def test_what_is_not_learnt_gets_no_gradient_at_all(tmp_path, large, monkeypatch):
    monkeypatch.setattr(ops, "LARGE", large)  # the loss in pieces, and at once
    folder = dataset(tmp_path, some_examples())
    x, y, positions = open_split(folder, "train", 16).windows(np.arange(4), 16, 50)
    model, hidden = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)), []
    model.transformer.ln_f.register_forward_hook(lambda module, given, out: (out.retain_grad(), hidden.append(out))[0])
    _, loss = model(x, y, loss_only=True, positions=positions)
    loss.backward()
    assert (hidden[0].grad[y < 0] == 0).all() and (hidden[0].grad[y >= 0] != 0).any(-1).all()
    logits, loss = model(x, y, positions=positions)
    logits.retain_grad()
    loss.backward()
    assert (logits.grad[y < 0] == 0).all() and (logits.grad[y >= 0] != 0).all()


def test_a_step_is_the_mean_over_its_targets_however_it_is_divided(tmp_path):
    data = open_mixture(parts_of(str(dataset(tmp_path, some_examples()))), "train", 16)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16))
    common = dict(block_size=16, batch_size=2, micro_steps=lambda n: 4, vocab_size=50, seed=9, first=0, device="cpu")
    x, y, positions = data.windows(np.arange(8), 16, 50, 9)
    wanted = model(x, y, positions=positions)[1]  # over all targets at once
    counts = (y >= 0).sum(1)
    assert counts.tolist() == data.learnt(np.arange(8), 16, 9).tolist() and len(set(counts.tolist())) > 1
    for world in (1, 2, 4):
        found = 0.0
        for rank in range(world):
            batches = training_batches(data, rank=rank, world_size=world, **common)
            for _ in range(4 // world):
                _, share, x, y, positions = next(batches)
                found += model(x, y, loss_only=True, positions=positions)[1] / share / world
        assert abs(found.item() - wanted.item()) < 1e-6


def test_text_and_examples_in_one_mixture(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "val"):
        np.arange(400, dtype="<u2").tofile(text / f"{split}.bin")
    folder = dataset(tmp_path / "examples", some_examples())
    data = open_mixture(parts_of(f"{text}:1,{folder}:1"), "train", 16)
    x, y, positions = data.windows(np.arange(40), 16, 500, 1)
    of_text = (positions == torch.arange(16)).all(1) & (y >= 0).all(1)
    assert of_text.sum() == 20 and (y[of_text] == x[of_text] + 1).all() and (y[~of_text] < 0).any(1).all()
    learnt = data.learnt(np.arange(40), 16, 1)
    assert learnt.tolist() == (y >= 0).sum(1).tolist()


def test_another_mask_is_another_dataset_and_a_missing_one_is_told(tmp_path):
    folder = dataset(tmp_path, some_examples())
    before = fingerprint(parts_of(str(folder)))
    dataset(tmp_path, some_examples(), name="another")
    assert before != fingerprint(parts_of(str(folder))) and "train.mask" in before
    (folder / "train.mask").write_bytes(b"\2")
    with pytest.raises(UserError, match="train.mask does not have the"):
        open_split(folder, "train", 16)
    dataset(tmp_path, [([1, 2, 3, 4, 5], 1), ([1, 2, 3], 0)])
    with pytest.raises(UserError, match="raise --block_size"):
        open_split(folder, "train", 2)
    assert isinstance(open_split(folder, "train", 4), Examples)
