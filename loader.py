"""`.bin` files to batches: a pure function of (seed, sequence number), with nothing to save and nothing to restore.

Training draws its sequences without replacement. Of N tokens and contexts of T, each epoch takes max(1, (N - T) // T)
blocks, shifted by a phase of its own and in an order of its own, both keyed by (seed, epoch); the order is a keyed
permutation (a Feistel network, walked until it lands inside the range), which needs no table at any size.
Evaluation reads fixed windows, evenly spread, and draws from nothing.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, UserError
from model import derive_seed
from tokenizer import read_meta, settle


@dataclass(frozen=True)
class Tokens:
    """One split of a dataset: a memory map of token ids, checked before anything reads it."""

    path: Path
    ids: np.ndarray  # [n] uint16 or uint32

    def windows(self, starts: np.ndarray, block_size: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y, int64 [len(starts), block_size]; y is one token ahead. UserError on an id beyond vocab_size."""
        block = self.ids[starts[:, None] + np.arange(block_size + 1)]
        if (largest := int(block.max())) >= vocab_size:
            raise UserError(_beyond(self.path, largest, vocab_size))
        block = block.astype(np.int64)
        return torch.from_numpy(block[:, :-1].copy()), torch.from_numpy(block[:, 1:].copy())


def dataset_folder(name: str) -> Path:
    """Where a dataset lies: a folder's path, or data/<name> here or beside the scripts. UserError if nowhere."""
    for folder in (Path(name), Path("data") / name, ROOT / "data" / name):
        settle(folder)
        if (folder / "train.bin").is_file():
            return folder
    prepare = ROOT / "data" / name / "prepare.py"
    how = f"make it with: python data/{name}/prepare.py" if prepare.is_file() else "its folder needs train.bin, val.bin"
    raise UserError(f"dataset {name} is not there (looked for train.bin in {ROOT / 'data' / name}); {how}")


def open_split(folder: Path, split: str, block_size: int) -> Tokens:
    """train.bin or val.bin of a dataset folder. UserError where it is missing, empty, cut short or too short."""
    path = folder / f"{split}.bin"
    meta = read_meta(folder)
    dtype = np.dtype(meta.get("dtype", "uint16")).newbyteorder("<")
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the dataset again")
    size = path.stat().st_size
    expected = meta.get("files", {}).get(path.name, {}).get("bytes", size)
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes where meta.json promises {expected:,}; prepare the dataset again")
    if size == 0 or size % dtype.itemsize:
        raise UserError(f"{path} has {size:,} bytes, which is not a whole number of {dtype.name} tokens above zero")
    n = size // dtype.itemsize
    if n < block_size + 1:
        raise UserError(f"{path} has {n:,} tokens, fewer than block_size + 1 = {block_size + 1}: lower --block_size")
    return Tokens(path, np.memmap(path, dtype=dtype, mode="r"))


def fingerprint(folder: Path) -> dict[str, str]:
    """What tells a dataset's files from others: their sha256 where meta.json has it, else their sizes."""
    files = read_meta(folder).get("files", {})
    names = ("train.bin", "val.bin")
    return {n: files.get(n, {}).get("sha256") or f"{(folder / n).stat().st_size} bytes" for n in names}


def check_vocabulary(tokens: Tokens, meta: dict, vocab_size: int) -> None:
    """UserError if the split holds an id that the model has no embedding for: by meta.json, else by reading it all."""
    chunk = 1 << 24
    largest = meta.get("max_id")
    if largest is None:
        largest = max(int(tokens.ids[i : i + chunk].max()) for i in range(0, len(tokens.ids), chunk))
    if largest >= vocab_size:
        raise UserError(_beyond(tokens.path, largest, vocab_size))


def _beyond(path: Path, largest: int, vocab_size: int) -> str:
    return (
        f"{path} holds the token id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
        f"the file is damaged, or was prepared with another tokenizer"
    )


def blocks_per_epoch(n_tokens: int, block_size: int) -> int:
    """How many sequences an epoch has."""
    return max(1, (n_tokens - block_size) // block_size)


def sequence_starts(numbers: np.ndarray, n_tokens: int, block_size: int, seed: int) -> np.ndarray:
    """The offset at which each of the run's sequences begins, for sequence numbers int64 [k] (counted from 0)."""
    blocks = blocks_per_epoch(n_tokens, block_size)
    epochs, positions = np.divmod(np.asarray(numbers, np.int64), blocks)
    starts = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        phase = derive_seed(seed, "phase", int(epoch)) % (n_tokens - blocks * block_size)
        order = permute(positions[here], blocks, derive_seed(seed, "order", int(epoch)))
        starts[here] = phase + order * block_size
    return starts


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of range(size), chosen by the key, sends each position; int64 [k], constant memory.

    A Feistel network of six rounds on the smallest even number of bits that holds `size`; what falls outside is sent
    through again (cycle walking, Black and Rogaway 2002), less than four times on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(derive_seed(key, i)) for i in range(6)]

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & mask)
        return (left << half) | right

    result = once(np.asarray(positions, np.uint64))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = once(result[outside])
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014); uint64 wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def evaluation_batches(n_tokens: int, block_size: int, batch_size: int, batches: int) -> np.ndarray:
    """Offsets [<= batches, batch_size] of evenly spread windows, no more than it takes to read the whole split once."""
    whole = -(-((n_tokens - 1) // block_size) // batch_size)
    count = max(1, min(batches, whole)) * batch_size
    return np.linspace(0, n_tokens - 1 - block_size, count).astype(np.int64).reshape(-1, batch_size)


def training_batches(
    tokens: Tokens,
    block_size: int,
    batch_size: int,
    micro_steps: int,
    vocab_size: int,
    seed: int,
    first: int,
    rank: int,
    world_size: int,
    device: str,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(global micro-step, x, y) without end, from sequence number `first` on: this process's share of each step.

    A step takes batch_size * micro_steps sequences over all processes; of its micro-steps, process r takes
    r, r + world_size, ... The next batch is read, and for CUDA pinned, while the caller works on this one.
    """
    cuda = device.startswith("cuda")

    def read(step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = first + (step * micro_steps + micro_step) * batch_size + np.arange(batch_size)
        starts = sequence_starts(numbers, len(tokens.ids), block_size, seed)
        pair = tokens.windows(starts, block_size, vocab_size)
        return tuple(t.pin_memory() for t in pair) if cuda else pair

    places = ((step, m) for step in itertools.count() for m in range(rank, micro_steps, world_size))
    with ThreadPoolExecutor(1) as pool:
        place = next(places)
        ahead = pool.submit(read, *place)
        while True:
            micro_step, (x, y) = place[1], ahead.result()
            place = next(places)
            ahead = pool.submit(read, *place)
            yield micro_step, x.to(device, non_blocking=True), y.to(device, non_blocking=True)
