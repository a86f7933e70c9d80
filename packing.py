"""Examples of which only some tokens are learnt, such as answers, in rows of a fixed length that hold several.

A split of examples has, beside the ids in train.bin, a byte for each of them in train.mask: 1 where the token is to be
learnt, 2 where an example begins, 3 for both. The examples of a row do not see each other (model.Packed), and so what
an example teaches does not depend on its company. Which ones share a row is decided once: best fit, the longest first
(Johnson 1973), which leaves next to nothing empty where some are short; each epoch takes every row once, in an order of
its own.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from configurator import UserError

LEARNT, BEGINS = 1, 2


@dataclass(frozen=True)
class Rows:
    """Which part of which example is where. An example of n + 1 tokens takes n places: what is read, and one ahead."""

    begins: np.ndarray  # [examples] int64, places of their first tokens in the file; row by row
    lengths: np.ndarray  # [examples] int64
    first: np.ndarray  # [rows + 1] int64, the first example of each row
    learnt: np.ndarray  # [rows] int64, tokens to be learnt
    cut: int  # examples that are longer than a row, and end with it
    left_out: int  # examples without a token to be learnt in what a row holds

    def __len__(self) -> int:
        return len(self.learnt)


@dataclass(frozen=True)
class Examples:
    """One split of a dataset of examples: memory maps of its ids, and of what is to be done with each."""

    path: Path
    ids: np.ndarray  # [n] uint16 or uint32
    marks: np.ndarray  # [n] uint8
    _rows: dict[int, Rows] = field(default_factory=dict)

    def rows(self, block_size: int) -> Rows:
        """The examples in rows of block_size places. UserError where there is nothing to learn in any."""
        if block_size not in self._rows:
            self._rows[block_size] = self._packed(block_size)
        return self._rows[block_size]

    def _packed(self, block_size: int) -> Rows:
        begins = np.flatnonzero(self.marks & BEGINS)
        whole = np.diff(begins, append=len(self.marks)) - 1
        lengths = np.minimum(whole, block_size)
        # of each example the sum over its targets, which begin one behind it
        ends = np.stack((begins + 1, begins + 1 + lengths), 1).ravel()
        marks = np.append(self.marks & LEARNT, np.zeros(2, np.uint8))  # for ends at the end of the file
        learnt = np.where(lengths > 0, np.add.reduceat(marks, ends, dtype=np.int64)[::2], 0)
        kept = learnt > 0
        if not kept.any():
            raise UserError(
                f"{self.path}: within block_size = {block_size} tokens no example has one that is to be learnt: the "
                "prompts are longer than that; raise --block_size, or shorten them"
            )
        row_of = best_fit(lengths[kept], block_size)
        order = np.argsort(row_of, kind="stable")
        first = np.searchsorted(row_of[order], np.arange(row_of.max() + 2))
        sums = np.add.reduceat(learnt[kept][order], first[:-1])
        cut = int((whole > block_size)[kept].sum())
        return Rows(begins[kept][order], lengths[kept][order], first, sums, cut, int((~kept).sum()))

    def windows(
        self, numbers: np.ndarray, block_size: int, vocab_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, y and positions, int64 [len(numbers), block_size], of the rows with these numbers. y is one token ahead,
        and -1 where nothing is to be learnt; positions count from each example's beginning, and what is left of a row
        is alone at each place. UserError on an id beyond vocab_size."""
        rows = self.rows(block_size)
        x, y, positions = (np.full((len(numbers), block_size), fill, np.int64) for fill in (0, -1, 0))
        for i, number in enumerate(numbers.tolist()):
            at = 0
            for example in range(rows.first[number], rows.first[number + 1]):
                begin, length = int(rows.begins[example]), int(rows.lengths[example])
                here, ahead = slice(at, at + length), slice(begin + 1, begin + 1 + length)
                x[i, here], positions[i, here] = self.ids[begin : begin + length], np.arange(length)
                y[i, here] = np.where(self.marks[ahead] & LEARNT, self.ids[ahead].astype(np.int64), -1)
                at += length
        if (largest := max(int(x.max()), int(y.max()))) >= vocab_size:
            raise UserError(beyond(self.path, largest, vocab_size))
        return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(positions)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each of these lengths [n], all from 1 to `room`: the longest first, each into the row in which it
    leaves the least empty, and into a new one where it fits into none."""
    row_of, rows = np.empty(len(lengths), np.int64), 0
    by_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room that is left in them
    there = 0  # bit n is set where a row has room for n
    longest_first = np.argsort(-lengths, kind="stable")
    for i, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        if fitting := there >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                there ^= 1 << left
        else:
            row, left, rows = rows, room, rows + 1
        row_of[i] = row
        by_room[left - length].append(row)
        there |= 1 << left - length
    return row_of


def beyond(path: Path, largest: int, vocab_size: int) -> str:
    return (
        f"{path} holds the token id {largest}, but the model's vocabulary ends at {vocab_size - 1}: "
        f"the file is damaged, or was prepared with another tokenizer"
    )
