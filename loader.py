"""`.bin` files to batches: a pure function of (seed, sequence number), with nothing to save and nothing to restore.

Training draws its sequences without replacement. Of N tokens and contexts of T, each epoch takes max(1, (N - T) // T)
blocks, shifted by a phase of its own and in an order of its own, both keyed by (seed, epoch); the order is a keyed
permutation (a Feistel network, walked until it lands inside the range), which needs no table at any size.
Evaluation reads fixed windows, evenly spread, and draws from nothing. Where a dataset has examples in place of text, a
row of them, see packing.py, is what a block is here.

Of a mixture of datasets, each thousand sequences has as many of each dataset as its weight says, in an order of its
own; the n-th sequence of the run is the m-th of its dataset, and that is drawn as above. A dataset is drawn by its
weight and not by its size, as GPT-3's were (Brown et al. 2020, table 2.2): the small and good ones more than once.
"""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from configurator import ROOT, UserError, user_errors
from model import derive_seed
from packing import Examples, beyond
from tokenizer import read_meta, settle

DRAWN_TOGETHER = 1000  # sequences in which each dataset of a mixture has its share


@dataclass(frozen=True)
class Tokens:
    """One split of a dataset: a memory map of token ids, checked before anything reads it."""

    path: Path
    ids: np.ndarray  # [n] uint16 or uint32

    def windows(self, starts: np.ndarray, block_size: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and y, int64 [len(starts), block_size]; y is one token ahead. UserError on an id beyond vocab_size."""
        block = self.ids[starts[:, None] + np.arange(block_size + 1)]
        if (largest := int(block.max())) >= vocab_size:
            raise UserError(beyond(self.path, largest, vocab_size))
        return torch.from_numpy(block[:, :-1].astype(np.int64)), torch.from_numpy(block[:, 1:].astype(np.int64))


@dataclass(frozen=True)
class Part:
    """A dataset, and its share of what is drawn."""

    name: str  # as the user wrote it
    folder: Path
    share: Fraction  # those of all parts add up to 1


@dataclass(frozen=True)
class Mixture:
    """One split of each of the datasets that are drawn from; most often of one alone."""

    parts: tuple[Part, ...]
    tokens: tuple[Tokens | Examples, ...]  # each part's

    @property
    def packed(self) -> bool:
        """Whether there are rows of examples in it."""
        return any(isinstance(tokens, Examples) for tokens in self.tokens)

    def blocks(self, block_size: int) -> list[int]:
        """How many sequences an epoch of each dataset has. An epoch of the mixture has as many as all together."""
        return [_blocks(tokens, block_size) for tokens in self.tokens]

    def epochs(self, n: int, block_size: int, seed: int) -> list[float]:
        """How often the first n sequences have been through each dataset."""
        drawn = drawn_before(n, tuple(part.share for part in self.parts), seed)
        return [sequences / blocks for sequences, blocks in zip(drawn, self.blocks(block_size), strict=True)]

    def mean(self, figures: list[tuple[float, ...]]) -> tuple[float, ...]:
        """The means, weighted by the shares, of figures of which each dataset has its own."""
        shares = [float(part.share) for part in self.parts]
        return tuple(math.fsum(s * v for s, v in zip(shares, each, strict=True)) for each in zip(*figures, strict=True))

    def windows(
        self, numbers: np.ndarray, block_size: int, vocab_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, y and positions of the run's sequences with these numbers, as those of Tokens and of Examples; positions
        are None where there are no examples. UserError on an id too large."""
        which, own = self.places(numbers, block_size, seed)
        x, y, positions = (torch.empty(len(which), block_size, dtype=torch.int64) for _ in range(3))
        positions[:] = torch.arange(block_size)
        for i in np.unique(which).tolist():
            here = which == i
            x[here], y[here], *of_examples = self.tokens[i].windows(own[here], block_size, vocab_size)
            if of_examples:
                positions[here] = of_examples[0]
        return x, y, positions if self.packed else None

    def places(self, numbers: np.ndarray, block_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """For the run's sequence numbers, int64 [k]: the place of its dataset, and there its offset or its row."""
        which, own = draw(numbers, tuple(part.share for part in self.parts), seed)
        for i in np.unique(which).tolist():
            here = which == i
            own_seed = derive_seed(seed, "dataset", i) if len(self.parts) > 1 else seed
            if isinstance(self.tokens[i], Examples):
                own[here] = sequence_rows(own[here], len(self.tokens[i].rows(block_size)), own_seed)
            else:
                own[here] = sequence_starts(own[here], len(self.tokens[i].ids), block_size, own_seed)
        return which, own

    def learnt(self, numbers: np.ndarray, block_size: int, seed: int) -> np.ndarray:
        """How many tokens there are to learn in each of these sequences, int64 [k]."""
        learnt = np.full(len(numbers), block_size)
        which, own = self.places(numbers, block_size, seed)
        for i, tokens in enumerate(self.tokens):
            if isinstance(tokens, Examples):
                learnt[which == i] = tokens.rows(block_size).learnt[own[which == i]]
        return learnt


def parts_of(dataset: str) -> tuple[Part, ...]:
    """One dataset, by its name or path, or a mixture: 'wiki:6,novels:3'. The weights need not add up to anything.

    What lies there under the whole text is one dataset. UserError for a mixture that makes no sense, or is not there.
    """
    texts = [text.strip() for text in dataset.split(",")]
    mixed = len(texts) > 1 or _named_and_weighed(dataset)
    if not mixed or any(os.path.exists(folder) for folder in _places(dataset)):
        return (Part(dataset, dataset_folder(dataset), Fraction(1)),)
    if len(texts) > DRAWN_TOGETHER:
        raise UserError(f"dataset: a mixture of {len(texts):,} datasets, expected {DRAWN_TOGETHER:,} at most")
    found: dict[Path, tuple[str, Path, Fraction]] = {}
    for text in texts:
        if not (pair := _named_and_weighed(text)):
            raise UserError(f"dataset: {text!r} in a mixture: expected NAME:WEIGHT between commas, such as wiki:0.6")
        name, weight = pair
        folder = dataset_folder(name)
        if folder.resolve() in found:
            raise UserError(f"dataset: {text!r} in a mixture that has {folder} already: give it once, with one weight")
        try:
            if not 0 < float(weight) < math.inf:  # before Fraction, which would write 1e999999999 out
                raise ValueError
            found[folder.resolve()] = name, folder, Fraction(weight)
        except ValueError:
            raise UserError(f"dataset: {text!r} in a mixture: expected a finite weight above 0, as {name}:1") from None
    total = sum(weight for _, _, weight in found.values())
    return tuple(Part(name, folder, weight / total) for name, folder, weight in found.values())


def _named_and_weighed(text: str) -> tuple[str, str] | None:
    """The two sides of the last colon; None where there are none, or a path goes on behind it, as in C:\\data."""
    name, colon, weight = (side.strip() for side in text.rpartition(":"))
    return (name, weight) if name and colon and not {"/", "\\"} & set(weight) else None


def _places(name: str) -> tuple[Path, ...]:
    return Path(name), Path("data") / name, ROOT / "data" / name


def dataset_folder(name: str) -> Path:
    """Where a dataset lies: a folder's path, or data/<name> here or beside the scripts. UserError if nowhere."""
    for folder in _places(name):
        settle(folder)
        if os.path.isfile(folder / "train.bin"):  # Path.is_file raises for a name too long, such as a mixture's
            return folder
    prepare = ROOT / "data" / name / "prepare.py"
    there = os.path.isfile(prepare)
    how = f"make it with: python data/{name}/prepare.py" if there else "its folder needs train.bin, val.bin"
    raise UserError(f"dataset {name} is not there (looked for train.bin in {ROOT / 'data' / name}); {how}")


def open_split(folder: Path, split: str, block_size: int) -> Tokens | Examples:
    """train.bin or val.bin of a dataset folder, with its .mask where it has examples. UserError where it is missing,
    empty, cut short or too short."""
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
    n, mask = size // dtype.itemsize, path.with_suffix(".mask")
    with user_errors(OSError, about=f"{path} cannot be read"):
        if mask.name in meta.get("files", {}):
            if not mask.is_file() or mask.stat().st_size != n:
                raise UserError(
                    f"{mask} does not have the {n:,} bytes that {path.name} asks for; prepare the dataset again"
                )
            found = Examples(path, np.memmap(path, dtype=dtype, mode="r"), np.memmap(mask, np.uint8, "r"))
            found.rows(block_size)
            return found
        if n < block_size + 1:
            raise UserError(
                f"{path} has {n:,} tokens, fewer than block_size + 1 = {block_size + 1}: lower --block_size"
            )
        return Tokens(path, np.memmap(path, dtype=dtype, mode="r"))


def open_mixture(parts: tuple[Part, ...], split: str, block_size: int) -> Mixture:
    """train.bin or val.bin of every part; UserError as open_split's."""
    return Mixture(parts, tuple(open_split(part.folder, split, block_size) for part in parts))


def fingerprint(parts: tuple[Part, ...]) -> dict[str, str]:
    """What tells the datasets' files from others: their sha256 where meta.json has it, else their sizes; in a mixture
    under the place and the share of each, which decide as well what is drawn."""
    found = {}
    for i, part in enumerate(parts):
        files = read_meta(part.folder).get("files", {})
        for name in ("train.bin", "val.bin", *(name for name in files if name.endswith(".mask"))):
            key = f"{i}: {part.share} of {name}" if len(parts) > 1 else name
            found[key] = files.get(name, {}).get("sha256") or f"{(part.folder / name).stat().st_size} bytes"
    return found


def check_vocabulary(tokens: Tokens, meta: dict, vocab_size: int) -> None:
    """UserError if the split holds an id that the model has no embedding for: by meta.json, else by reading it all."""
    chunk = 1 << 24
    largest = meta.get("max_id")
    if largest is None:
        largest = max(int(tokens.ids[i : i + chunk].max()) for i in range(0, len(tokens.ids), chunk))
    if largest >= vocab_size:
        raise UserError(beyond(tokens.path, largest, vocab_size))


def _blocks(tokens: Tokens | Examples, block_size: int) -> int:
    packed = isinstance(tokens, Examples)
    return len(tokens.rows(block_size)) if packed else blocks_per_epoch(len(tokens.ids), block_size)


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


def sequence_rows(numbers: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """The row of examples that each of the run's sequences is, for sequence numbers int64 [k] (counted from 0)."""
    epochs, positions = np.divmod(np.asarray(numbers, np.int64), rows)
    found = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(positions[here], rows, derive_seed(seed, "order", int(epoch)))
    return found


def shared_out(n: int, shares: tuple[Fraction, ...]) -> list[int]:
    """How many of n sequences each dataset has.

    The list is halved, n is shared out between the halves, to the nearest whole number, and so on down to the single
    dataset: so no count falls where n grows, as it would if each count, or each sum of counts, were rounded by itself.
    Where every n * share is whole, those are the counts; else a halving can shift a count by 1/2, so that it is right
    to 1 among four datasets.
    """
    if len(shares) == 1:
        return [n]
    half = len(shares) // 2
    left = math.floor(n * sum(shares[:half]) / sum(shares) + Fraction(1, 2))
    return shared_out(left, shares[:half]) + shared_out(n - left, shares[half:])


def draw(numbers: np.ndarray, shares: tuple[Fraction, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For the run's sequence numbers, int64 [k]: the place of its dataset, and its number there, that is, how many
    sequences of that dataset come before it; int64 [k] each."""
    numbers = np.asarray(numbers, np.int64)
    which, own = np.zeros_like(numbers), numbers.copy()
    if len(shares) > 1:
        thousands, places = np.divmod(numbers, DRAWN_TOGETHER)
        for thousand in np.unique(thousands):
            here = thousands == thousand
            which[here], own[here] = (column[places[here]] for column in _thousand(int(thousand), shares, seed))
    return which, own


def drawn_before(n: int, shares: tuple[Fraction, ...], seed: int) -> list[int]:
    """How many of the first n sequences are of each dataset."""
    counts = shared_out(n - n % DRAWN_TOGETHER, shares)
    which, _ = draw(np.arange(n - n % DRAWN_TOGETHER, n), shares, seed)
    return (np.array(counts) + np.bincount(which, minlength=len(shares))).tolist()


@lru_cache(maxsize=8)
def _thousand(thousand: int, shares: tuple[Fraction, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What draw() gives for all the sequences of one thousand, kept for the batches that come next."""
    before, after = (np.array(shared_out(t * DRAWN_TOGETHER, shares)) for t in (thousand, thousand + 1))
    order = permute(np.arange(DRAWN_TOGETHER), DRAWN_TOGETHER, derive_seed(seed, "mixture", thousand))
    which = np.repeat(np.arange(len(shares)), after - before)[order]
    own = before[which]
    for i in np.unique(which):
        own[which == i] += np.arange(after[i] - before[i])
    return which, own


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
    return _spread(n_tokens - 1 - block_size, (n_tokens - 1) // block_size, batch_size, batches)


def evaluated(tokens: Tokens | Examples, block_size: int, batch_size: int, batches: int) -> np.ndarray:
    """Offsets or rows [<= batches, batch_size], evenly spread, of what an evaluation reads of a split."""
    if not isinstance(tokens, Examples):
        return evaluation_batches(len(tokens.ids), block_size, batch_size, batches)
    rows = len(tokens.rows(block_size))
    return _spread(rows - 1, rows, batch_size, batches)


def _spread(last: int, whole: int, batch_size: int, batches: int) -> np.ndarray:
    """Numbers from 0 to `last`, in `batches` at most, and no more than it takes for `whole` of them."""
    count = max(1, min(batches, -(-whole // batch_size))) * batch_size
    return np.linspace(0, last, count).astype(np.int64).reshape(-1, batch_size)


def training_batches(
    data: Mixture,
    block_size: int,
    batch_size: int,
    micro_steps: Callable[[int], int],
    vocab_size: int,
    seed: int,
    first: int,
    rank: int,
    world_size: int,
    device: str,
) -> Iterator[tuple[int, float, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """(global micro-step, share, x, y, positions) without end, from sequence number `first` on: this process's part of
    each step.

    A step takes batch_size * micro_steps(n) sequences over all processes, where n come before it; of its micro-steps,
    process r takes r, r + world_size, ..., and where another one takes more, besides one that counts nothing: its share
    is infinite. The micro-step's mean loss, divided by `share` and added up over its process's, is the mean over all
    tokens of the step that are to be learnt, once it is averaged over the processes. The next batch is read, and copied
    to the GPU on a stream of its own, while the caller works on this one.
    """
    side = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def read(begin: int, steps: int, micro_step: int) -> tuple[float, list[torch.Tensor | None]]:
        numbers = begin + micro_step % steps * batch_size + np.arange(batch_size)
        share = steps / world_size if micro_step < steps else math.inf
        if data.packed and micro_step < steps:  # there are more tokens to learn in some than in others
            of_step, own = (data.learnt(n, block_size, seed) for n in (begin + np.arange(steps * batch_size), numbers))
            share = float(of_step.sum() / own.sum() / world_size)
        batch = data.windows(numbers, block_size, vocab_size, seed)
        if side is None:
            return share, [t if t is None else t.to(device) for t in batch]
        with torch.cuda.stream(side):
            return share, [t if t is None else t.pin_memory().to(device, non_blocking=True) for t in batch]

    def places() -> Iterator[tuple[int, int, int]]:
        begin = first
        while True:
            steps = micro_steps(begin)
            for micro_step in range(rank, rank + -(-steps // world_size) * world_size, world_size):
                yield begin, steps, micro_step
            begin += steps * batch_size

    upcoming = places()
    with ThreadPoolExecutor(1) as pool:
        place = next(upcoming)
        ahead = pool.submit(read, *place)
        while True:
            micro_step, (share, batch) = place[2], ahead.result()
            if side is not None:
                here = torch.cuda.current_stream(device)
                here.wait_stream(side)
                for t in batch:
                    if t is not None:
                        t.record_stream(here)  # or the side stream might write the next batch over this one
            place = next(upcoming)
            ahead = pool.submit(read, *place)
            yield micro_step, share, *batch
