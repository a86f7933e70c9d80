import json
import math

import numpy as np
import pytest
import torch

from configurator import UserError
from loader import (
    blocks_per_epoch,
    check_vocabulary,
    dataset_folder,
    evaluation_batches,
    open_mixture,
    open_split,
    parts_of,
    permute,
    sequence_starts,
    training_batches,
)


def make(folder, n=1000, dtype="uint16", meta=None, modulus=50):
    for split in ("train", "val"):
        (np.arange(n) % modulus).astype(dtype).tofile(folder / f"{split}.bin")
    if meta is not None:
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_the_permutation_takes_every_place_once(size):
    for key in (0, 1, 2**62):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_permutation_is_a_function_of_key_and_place():
    whole = permute(np.arange(1000), 1000, 5)
    assert permute(np.array([7]), 1000, 5)[0] == whole[7]
    assert (permute(np.arange(1000), 1000, 6) != whole).mean() > 0.9
    # far beyond what a table could hold
    assert (permute(np.arange(5), 10**12, 1) < 10**12).all()


def test_the_permutation_mixes():
    order = permute(np.arange(10000), 10000, 3)
    assert abs(np.corrcoef(order, np.arange(10000))[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) < 3).mean() < 0.01


@pytest.mark.parametrize("n, block", [(1000, 10), (1001, 10), (1009, 10), (11, 10), (12, 10), (25, 10)])
def test_an_epoch_takes_every_block_once_and_stays_inside(n, block):
    blocks = blocks_per_epoch(n, block)
    assert blocks == max(1, (n - block) // block)
    phases = set()
    for epoch in range(20):
        starts = sequence_starts(np.arange(epoch * blocks, (epoch + 1) * blocks), n, block, seed=1)
        ordered = np.sort(starts)
        assert (np.diff(ordered) == block).all() and ordered[0] >= 0 and ordered[-1] + block + 1 <= n
        phases.add(int(ordered[0]))
    assert max(phases) <= n - 1 - blocks * block and (len(phases) > 1 or n - blocks * block == 1)


def test_a_sequence_depends_on_seed_and_number_alone():
    all_at_once = sequence_starts(np.arange(500), 1003, 10, seed=4)
    one_by_one = [sequence_starts(np.array([k]), 1003, 10, seed=4)[0] for k in range(500)]
    assert all_at_once.tolist() == one_by_one
    assert all_at_once.tolist() != sequence_starts(np.arange(500), 1003, 10, seed=5).tolist()


def test_windows_are_the_files_tokens_and_targets_are_one_ahead(tmp_path):
    ids = np.random.default_rng(0).integers(0, 60000, 500).astype("<u2")
    ids.tofile(make(tmp_path) / "train.bin")
    x, y = open_split(tmp_path, "train", 8).windows(np.array([0, 77, 491]), 8, 60000)
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    for row, start in enumerate((0, 77, 491)):
        assert x[row].tolist() == ids[start : start + 8].tolist()
        assert y[row].tolist() == ids[start + 1 : start + 9].tolist()


def test_uint32_where_meta_says_so(tmp_path):
    make(tmp_path, dtype="uint32", modulus=100000, meta={"dtype": "uint32", "max_id": 70000})
    x, _ = open_split(tmp_path, "train", 8).windows(np.array([900]), 8, 100000)
    assert x[0].tolist() == list(range(900, 908))


def take(batches, n):
    return [(m, share, x.tolist(), y.tolist()) for m, share, x, y, _ in (next(batches) for _ in range(n))]


def test_processes_share_what_one_process_reads_alone(tmp_path):
    tokens = open_mixture(parts_of(str(make(tmp_path))), "train", 8)
    common = dict(block_size=8, batch_size=2, micro_steps=lambda n: 4, vocab_size=50, seed=9, first=6, device="cpu")
    alone = take(training_batches(tokens, rank=0, world_size=1, **common), 12)
    assert [(m, share) for m, share, _, _ in alone] == [(m, 4) for m in (0, 1, 2, 3)] * 3
    for world in (2, 4):
        ranks = [training_batches(tokens, rank=r, world_size=world, **common) for r in range(world)]
        shared = [one for _ in range(12 // world) for batches in ranks for one in take(batches, 1)]
        assert [(m, 4, x, y) for m, _, x, y in shared] == alone and {one[1] for one in shared} == {4 / world}
    # beginning later is skipping: a step is 8 sequences
    later = take(training_batches(tokens, rank=0, world_size=1, **(common | {"first": 14})), 8)
    assert later == alone[4:]


@pytest.mark.parametrize("micro_steps, world", [(4, 3), (2, 3), (1, 4), (5, 2)])
def test_processes_compute_as_often_as_each_other_and_what_is_beyond_counts_nothing(tmp_path, micro_steps, world):
    tokens = open_mixture(parts_of(str(make(tmp_path))), "train", 8)
    common = dict(block_size=8, batch_size=2, micro_steps=lambda n: micro_steps, vocab_size=50, seed=9, first=0)
    alone = take(training_batches(tokens, rank=0, world_size=1, device="cpu", **common), 2 * micro_steps)
    each = math.ceil(micro_steps / world)
    found = []
    for rank in range(world):
        batches = training_batches(tokens, rank=rank, world_size=world, device="cpu", **common)
        for step in range(2):
            own = take(batches, each)
            assert [m for m, *_ in own] == [rank + n * world for n in range(each)]
            assert all(share == (micro_steps / world if m < micro_steps else math.inf) for m, share, *_ in own)
            found += [(step, m, x, y) for m, share, x, y in own if share < math.inf]
    assert sorted(found) == [(n // micro_steps, m, x, y) for n, (m, _, x, y) in enumerate(alone)]


def test_evaluation_windows_are_fixed_evenly_spread_and_at_most_the_split():
    starts = evaluation_batches(10001, 100, 4, 5)
    assert starts.shape == (5, 4) and starts[0, 0] == 0 and starts[-1, -1] == 10001 - 1 - 100
    gaps = np.diff(starts.reshape(-1))
    assert gaps.max() - gaps.min() <= 1
    assert evaluation_batches(10001, 100, 4, 10**6).shape == (25, 4)
    assert evaluation_batches(101, 100, 4, 200).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "missing"),
        (b"", "0 bytes"),
        (b"\x01\x00\x02", "3 bytes"),
        (b"\x01\x00" * 8, "fewer than block_size"),
    ],
)
def test_broken_splits_are_sentences(tmp_path, content, words):
    make(tmp_path)
    path = tmp_path / "train.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_split(tmp_path, "train", 8)
    path.write_bytes(b"\x01\x00" * 9)
    assert len(open_split(tmp_path, "train", 8).ids) == 9


def test_a_split_of_another_size_than_meta_promises_is_a_sentence(tmp_path):
    make(tmp_path, meta={"dtype": "uint16", "files": {"train.bin": {"bytes": 2002}}})
    with pytest.raises(UserError, match="promises"):
        open_split(tmp_path, "train", 8)


def test_ids_beyond_the_vocabulary_are_sentences_by_meta_by_scan_and_by_batch(tmp_path):
    tokens = open_split(make(tmp_path), "train", 8)
    check_vocabulary(tokens, {}, 50)
    check_vocabulary(tokens, {"max_id": 49}, 50)
    for meta in ({}, {"max_id": 49}):
        with pytest.raises(UserError, match="token id 49"):
            check_vocabulary(tokens, meta, 49)
    with pytest.raises(UserError, match="token id 49"):
        tokens.windows(np.array([45]), 8, 49)


def test_datasets_are_found_by_name_and_by_path_and_missing_ones_say_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)
    make(tmp_path / "data" / "mine")
    assert dataset_folder("mine").resolve() == (tmp_path / "data" / "mine").resolve()
    assert dataset_folder(str(tmp_path / "data" / "mine")) == tmp_path / "data" / "mine"
    with pytest.raises(UserError, match="python data/openwebtext/prepare.py"):
        dataset_folder("openwebtext")
    with pytest.raises(UserError, match="train.bin"):
        dataset_folder("nowhere")
