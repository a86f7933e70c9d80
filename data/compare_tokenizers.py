"""How the tokenizers take a text apart: their tokens in numbers, and the pieces of a sentence.

    $ python data/compare_tokenizers.py data/chinese/stories_zh.txt
    $ python data/compare_tokenizers.py wiki_zh/AA/wiki_00 --vocab_size=16384
    $ python data/compare_tokenizers.py novel.txt --tokenizer=data/essays --sentence=春眠不觉晓

To look at before training: GPT-2's BPE, made for English, takes most Chinese characters as two or three tokens. char
and bpe are made of the text itself.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[:2]]
from configurator import Config, UserError, configure, note, run

input = ""  # what prepare.py takes: a text, JSON lines, a folder …; a word without dashes
encoding = "auto"  # of text: told from each file, or its name, such as gb18030
max_chars = 5_000_000  # of the text's beginning, which is all that is read: a BPE of so many takes half a minute
vocab_size = 8192  # of the BPE that is trained on the text
tokenizer = []  # more to compare, one each time: a dataset folder, out_dir, .pt file or Hugging Face folder
sentence = ""  # whose pieces are shown; default: the beginning of the text's first long line
config = configure(globals(), positionals=("input",))

import re
import time
import unicodedata
from dataclasses import dataclass

from corpus import choose_tokenizer, open_source
from tokenizer import CharTokenizer, Tokenizer, train_bpe

HEAD = ("tokenizer", "vocabulary", "tokens", "characters/token", "bytes/token", "without a token", "encode MB/s")
LONG_LINE, SHOWN = 20, 50  # characters


@dataclass
class Measured:
    """One tokenizer's row, and its sentence; or, instead, why there are none."""

    row: tuple[str, ...] = ()
    pieces: str = ""
    round_trip: str = ""
    reason: str = ""


def read(c: Config) -> tuple[str, bool]:
    """The text up to max_chars, and whether that is all. UserError where it cannot be read, or there is none."""
    parts, size = [], 0
    for piece in open_source([c.input], c).read():
        parts.append(piece or "\n")
        size += len(parts[-1])
        if size > c.max_chars:
            break
    if not size:
        raise UserError(f"{c.input}: there is no text in it")
    return "".join(parts)[: c.max_chars], size <= c.max_chars


def without_token(t: Tokenizer, text: str) -> int:
    """How many of the text's characters are such that no token is that character alone, with or without a space."""
    tokens = {t.decode_bytes([id]) for id in range(t.vocab_size)}
    return sum(text.count(c) for c in set(text) if not {c.encode(), b" " + c.encode()} & tokens)


def measure(name: str, t: Tokenizer | None, text: str, sentence: str, vocab_size: int) -> Measured:
    """Encodes the text and the sentence by `t`, or by the tokenizer of that name made of the text."""
    try:
        if name == "char":
            t = CharTokenizer("".join(sorted(set(text))), byte_fallback=True, end_of_text=True)
        elif name == "bpe":
            t = train_bpe([text], vocab_size)
        t.encode(text[:1000])  # loads what is loaded once
        times = []
        while sum(times) < 1 and len(times) < 5:  # a short text's first time says little
            start = time.perf_counter()
            tokens = len(t.encode(text))
            times.append(time.perf_counter() - start)
        ids = t.encode(sentence)
    except UserError as error:
        return Measured(reason=re.split("[:;] ", str(error))[0][:100])
    size, rare = len(text.encode()), without_token(t, text)
    rate = size / 1e6 / min(times)
    figures = (
        f"{t.vocab_size:,}",
        f"{tokens:,}",
        f"{len(text) / tokens:.3f}",
        f"{size / tokens:.3f}",
        f"{rare:,} ({rare / len(text):.1%})",
        f"{rate:.1f}" if rate < 100 else f"{rate:.0f}",
    )
    again = t.decode(ids)
    round_trip = "round trip identical" if again == sentence else f"round trip differs: {again}"
    return Measured((name, *figures), "|".join(t.pieces(ids)), f"{len(ids)} tokens, {round_trip}")


def columns(text: str) -> int:
    """The columns of a terminal that a text takes: two for a Chinese character."""
    return sum((unicodedata.east_asian_width(c) in "WF") + (not unicodedata.combining(c)) for c in text)


def main(c: Config) -> None:
    if not c.input:
        raise UserError("which text? name a file: python data/compare_tokenizers.py novel.txt")
    if c.max_chars < 1:
        raise UserError(f"--max_chars={c.max_chars}: expected at least 1")
    if not 257 <= c.vocab_size <= 2**24:
        raise UserError(f"--vocab_size={c.vocab_size}: expected 257 (the bytes and <|endoftext|>) to {2**24}")
    given = {name: choose_tokenizer(name) for name in ("gpt2", *c.tokenizer)}
    text, whole = read(c)
    lines = text.split("\n")
    longest = max(lines, key=len)
    sentence = c.sentence or next((x for x in lines if len(x.strip()) >= LONG_LINE), longest).strip()[:SHOWN]
    part = "all of" if whole else "the beginning of"
    print(f"{part} {c.input}: {len(text):,} characters, {len(set(text)):,} of them distinct, ", end="")
    print(f"{len(text.encode()):,} bytes of UTF-8\n")
    note(f"training a BPE of {c.vocab_size:,} tokens on the text")
    found = {
        name: measure(name, given.get(name), text, sentence, c.vocab_size)
        for name in dict.fromkeys(["char", "gpt2", "bpe", *c.tokenizer])
    }
    rows = [HEAD, *(m.row for m in found.values() if m.row)]
    widths = [max(columns(row[i]) for row in rows) for i in range(len(HEAD))]
    widths[0] = max(map(columns, [HEAD[0], *found]))

    def label(name: str) -> str:
        return name + " " * (widths[0] - columns(name))

    for first, *row in rows[:1] + [m.row or (name,) for name, m in found.items()]:
        cells = [" " * (width - columns(cell)) + cell for cell, width in zip(row, widths[1:], strict=False)]
        print("  ".join([label(first), *(cells or [f"- {found[first].reason}"])]))
    print("\nwithout a token: characters of the text that no token stands for alone; they take several, or are lost")
    print("char and bpe are made of this very text\n")
    print(f"{label('')}  {sentence}")
    for name, m in found.items():
        if m.row:
            print(f"{label(name)}  {m.pieces}\n{label('')}  {m.round_trip}")


if __name__ == "__main__":
    run(main, config)
