"""Text to token ids and back: the characters of a text, GPT-2's BPE, or what a Hugging Face folder brings.

Notable choices:
- `char` keeps nanoGPT's ids (characters in code-point order). With byte fallback, 256 byte tokens and <|endoftext|>
  follow, so that any text round-trips: a character outside the vocabulary becomes the bytes of its UTF-8.
- `train_bpe` makes a BPE for a text of one's own. It never merges Chinese characters with letters, digits or
  punctuation, so that its tokens are words and parts of words.
- In a text, <|endoftext|> spelled out is thirteen plain characters; only `encode_prompt` reads it as the token.
- Each token has bytes of its own, whatever the kind, so that a text can be shown while it grows.
- A dataset folder says which tokenizer it is for: meta.json (ours), meta.pkl (nanoGPT's), or nothing (GPT-2's).
"""

import hashlib
import json
import os
import pickle
import re
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError, user_errors

END_OF_TEXT = "<|endoftext|>"
CODE_POINTS = 0x110000
# of a dataset, in the order in which they are replaced; the masks are those of examples, see packing.py
FILES = ("train.bin", "val.bin", "train.mask", "val.mask", "tokenizer.json", "meta.json")
GPT2_FILES = {  # what tiktoken looks for in TIKTOKEN_CACHE_DIR (the SHA-1 of the address), and where it is from
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
}
GPT2_SHA256 = (
    "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"  # of GPT-2's tokens in the order of their ids
)
# GPT-2's pre-tokenizer always ends a piece between a letter or digit and one of these, and looks only ahead from there;
# BERT's does too. The letters are some that Unicode 3.2 had: on later ones Python and a library may differ
CUT = re.compile(
    "[0-9A-Za-zÀ-ÖØ-öø-ȟΑ-ΡΣ-ώЀ-ҁא-תء-غف-يअ-हก-ะぁ-ゔァ-ヺ㐀-䶵一-龥가-힣]"
    r"(?=[ \t\n\r\u3000。，、！？；：.,!?;:])"
)
# What `train_bpe` merges within: an English ending; Chinese characters; other letters; digits; punctuation; line breaks
# and the indentation after them; indentation; other spaces, but the last, which goes with what follows. A CUT ends a
# piece here too. The bounds are for training, in which the time for a piece grows with its square.
PIECES = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])",
        r"\p{Han}{1,32}",
        r" ?[\p{L}\p{M}&&[^\p{Han}]]{1,64}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}\p{Han}]{1,64}",
        "[\\r\\n]{1,64}\u3000{0,64}",
        "\u3000{1,64}",
        "[^\\S\\r\\n\u3000]{1,64}(?!\\S)",
        "[^\\S\\r\\n\u3000]{1,64}",
    )
)
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
# byte-level BPE writes its tokens with a visible character for each byte: the byte's own, else one from U+0100 on
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in VISIBLE}
BYTE_OF |= {chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}


class Tokenizer(ABC):
    """What every kind has. `dtype` is that of the ids, in arrays and in .bin files; `end_of_text` an id or None, and so
    `unknown_id`, which stands for any text that has no token. `lossless`: whether decoding gives the text again."""

    kind: str
    vocab_size: int
    end_of_text: int | None
    unknown_id: int | None = None
    lossless = True

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint32 if self.vocab_size > 65536 else np.uint16

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The text's ids, [tokens] of `dtype`. UserError where the text cannot be expressed."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's ids, as `encode` gives them; many short texts cost less so than one by one."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of these tokens, which may begin or end inside a character. ValueError for an id out of range."""

    @abstractmethod
    def last_cut(self, text: str, start: int = 0) -> int:
        """The last position after `start` where encoding the two sides apart is encoding the whole; 0 where none."""

    def meta(self) -> dict[str, Any]:
        """Plain values from which `tokenizer_from_meta` makes this tokenizer again."""
        dtype = np.dtype(self.dtype).name
        return {"kind": self.kind, "vocab_size": self.vocab_size, "dtype": dtype, "end_of_text": self.end_of_text}

    def encode_prompt(self, text: str) -> np.ndarray:
        """As `encode`, but <|endoftext|> is the token, where this tokenizer has one."""
        if self.end_of_text is None:
            return self.encode(text)
        first, *rest = text.split(END_OF_TEXT)
        parts = [self.encode(first)]
        for part in rest:
            parts += [np.array([self.end_of_text], self.dtype), self.encode(part)]
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these tokens, U+FFFD where bytes are no UTF-8. ValueError for an id out of range."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token's text by itself, to show to a person: bytes that are no whole character as <E4 B8>."""
        shown = []
        for id in self._checked(ids).tolist():
            piece = self.decode_bytes([id])
            try:
                shown.append(piece.decode("utf-8"))
            except UnicodeDecodeError:
                shown.append(f"<{piece.hex(' ').upper()}>")
        return shown

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        ids = np.asarray(ids if hasattr(ids, "__array__") or isinstance(ids, list) else list(ids)).reshape(-1)
        if len(ids) == 0:
            return np.empty(0, np.int64)
        if ids.dtype.kind not in "iu":
            raise ValueError(f"token ids are whole numbers, not {ids.dtype}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside this {self.kind} vocabulary of {self.vocab_size} tokens")
        return ids.astype(np.int64, copy=False)

    def identity(self) -> dict[str, Any]:
        """What is the same in two tokenizers that give every text the same ids."""
        return self.meta()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.identity() == other.identity()

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.end_of_text))


class CharTokenizer(Tokenizer):
    """One id for each of `chars`, in that order; then, with `byte_fallback`, 256 bytes and always <|endoftext|>."""

    kind = "char"

    def __init__(self, chars: str, byte_fallback: bool, end_of_text: bool) -> None:
        code_points(chars)
        if len(set(chars)) != len(chars):
            raise ValueError("a character stands twice in the vocabulary")
        self.chars, self.byte_fallback = chars, byte_fallback
        ids = len(chars) + 256 * byte_fallback
        self.end_of_text = ids if byte_fallback or end_of_text else None
        self.vocab_size = ids + (self.end_of_text is not None)

    def __reduce__(self) -> tuple:  # to another process without the tables
        return CharTokenizer, (self.chars, self.byte_fallback, self.end_of_text is not None)

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"chars": self.chars, "byte_fallback": self.byte_fallback}

    def encode(self, text: str) -> np.ndarray:
        return self._encode(text, np.zeros(0, np.intp))[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return _split(*self._encode("".join(texts), np.cumsum([len(text) for text in texts], dtype=np.intp)))
        except UserError:  # its position is to be that in its own text
            return super().encode_batch(texts)

    def _encode(self, text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The text's ids, and where among them these positions in the text have come to be."""
        codes = code_points(text)
        ids = self._id_of.take(codes)  # [characters]
        if ids.max(initial=0) < self._no_id:
            return ids.astype(self.dtype, copy=False), ends
        if not self.byte_fallback:
            raise self.unknown_error(self.unknown(text))
        at = np.flatnonzero(ids == self._no_id)
        rare = codes[at]
        more = (rare >= 0x80).astype(np.intp) + (rare >= 0x800) + (rare >= 0x10000)  # bytes after its first
        utf8 = np.frombuffer(rare.tobytes().decode("utf-32-le").encode("utf-8"), np.uint8)
        ids = np.insert(ids, np.repeat(at, more), self._no_id)
        ids[ids == self._no_id] = utf8.astype(ids.dtype) + ids.dtype.type(len(self.chars))
        return ids.astype(self.dtype, copy=False), ends + np.cumsum([0, *more])[at.searchsorted(ends)]

    def decode(self, ids: Iterable[int]) -> str:
        ids = self._checked(ids)
        if len(ids) and ids.max() >= len(self.chars):
            return super().decode(ids)
        return code_points(self.chars)[ids].tobytes().decode("utf-32-le")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes_of[id] for id in self._checked(ids).tolist()])

    def last_cut(self, text: str, start: int = 0) -> int:
        return len(text)

    def unknown(self, text: str) -> dict[str, int]:
        """The characters that the vocabulary lacks, each with its first position in `text`, in that order."""
        codes = code_points(text)
        at = np.flatnonzero(self._id_of[codes] == self._no_id)
        _, first = np.unique(codes[at], return_index=True)
        return {text[i]: i for i in at[np.sort(first)].tolist()}

    def unknown_error(self, unknown: dict[str, int]) -> UserError:
        """The sentence about `unknown`, characters with their first positions."""
        shown = ", ".join(f"{c!r} (U+{ord(c):04X}, first at position {i:,})" for c, i in list(unknown.items())[:10])
        shown += ", …" if len(unknown) > 10 else ""
        return UserError(
            f"this vocabulary of {len(self.chars)} characters lacks {shown}: take them out of the text, or prepare the "
            "dataset with --byte_fallback=True, which has tokens for any text"
        )

    @cached_property
    def _id_of(self) -> np.ndarray:  # [code points]
        dtype = np.uint16 if self.vocab_size < 65536 else np.uint32  # the smaller, the more of it stays in a cache
        table = np.full(CODE_POINTS, np.iinfo(dtype).max, dtype)
        table[code_points(self.chars)] = np.arange(len(self.chars), dtype=dtype)
        return table

    @property
    def _no_id(self) -> int:  # where a character is unknown
        return int(np.iinfo(self._id_of.dtype).max)

    @cached_property
    def _bytes_of(self) -> list[bytes]:  # [vocab_size]
        table = [c.encode("utf-8") for c in self.chars]
        table += [bytes([b]) for b in range(256)] if self.byte_fallback else []
        return table + ([END_OF_TEXT.encode("utf-8")] if self.end_of_text is not None else [])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE, by tiktoken, which is loaded at the first use."""

    kind, vocab_size, end_of_text = "gpt2", 50257, 50256

    def __reduce__(self) -> tuple:
        return GPT2Tokenizer, ()

    def encode(self, text: str) -> np.ndarray:
        check_text(text)
        return self._encode(text, set())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(END_OF_TEXT in text for text in texts):  # there it is text, which cannot also stand between texts
            return super().encode_batch(texts)
        for text in texts:
            check_text(text)
        ids = self._encode("".join([text + END_OF_TEXT for text in texts]), {END_OF_TEXT})
        is_end = ids == self.end_of_text
        return _split(ids[~is_end], np.flatnonzero(is_end) - np.arange(len(texts)))

    def _encode(self, text: str, special: set[str]) -> np.ndarray:
        """The text's ids, where what is in `special` and in the text is a token. No CUT is inside <|endoftext|>."""
        library, parts = self._encoding, cut_up(text)

        def encode(part: str) -> np.ndarray:  # encode_to_numpy makes no list, and other threads may run meanwhile
            return library.encode_to_numpy(part, allowed_special=special, disallowed_special=()).astype(self.dtype)

        if len(parts) == 1:
            return encode(text)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(list(pool.map(encode, parts)))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids).tolist())

    def last_cut(self, text: str, start: int = 0) -> int:
        return last_cut(text, start)

    @cached_property
    def _encoding(self):  # tiktoken.Encoding
        try:
            import tiktoken
        except ImportError as error:
            raise UserError("GPT-2's tokenizer needs tiktoken: pip install tiktoken") from error
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken lets those of requests, of the file system and its own through
            folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "FOLDER"
            files = " and ".join(f"{url} as {folder}/{name}" for name, url in GPT2_FILES.items())
            reason = str(error) if 0 < len(str(error)) < 100 else type(error).__name__
            raise UserError(
                f"GPT-2's vocabulary cannot be loaded ({reason}): where there is a network, save {files}; "
                "then name that folder in the environment variable TIKTOKEN_CACHE_DIR"
            ) from error


class BPETokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers` by the text of its tokenizer.json: byte-level BPE, BPE or Unigram with
    ▁ for a space and with byte tokens, or BERT's WordPiece. The library is loaded when there is a text to encode.

    WordPiece knows no spaces: one is put before a token that begins a word of an alphabet, none between Chinese
    characters. ValueError where the text is no such tokenizer, or end_of_text none of its ids.
    """

    kind = "bpe"

    def __init__(self, definition: str, end_of_text: int | None) -> None:
        self.json, self.end_of_text = definition, end_of_text
        try:
            parsed = json.loads(definition)
            self._pipeline = {key: parsed.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
            model, self._added = parsed["model"], {t["content"]: t["id"] for t in parsed.get("added_tokens") or []}
            vocab, unknown = model["vocab"], model.get("unk_token")
            if isinstance(vocab, list):  # Unigram's, with their scores
                vocab = {token: id for id, (token, _) in enumerate(vocab)}
                unknown = None if model.get("unk_id") is None else list(vocab)[model["unk_id"]]
            self.ids = vocab | self._added
            self._steps = _decoding_steps(parsed.get("decoder"))
            self._all_special = all(t["special"] for t in parsed.get("added_tokens") or [])
            sound = all(type(id) is int and 0 <= id < 2**24 for id in self.ids.values())
            self.vocab_size = max(self.ids.values()) + 1
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"this is no tokenizer.json that can be read: {type(error).__name__}: {error}") from None
        if not sound or end_of_text is not None and not 0 <= end_of_text < self.vocab_size:
            raise ValueError(f"ids, or end_of_text = {end_of_text}, are outside this vocabulary of {self.vocab_size}")
        id = self.ids.get(unknown)
        self.unknown_id = None if id == end_of_text else id

    def __reduce__(self) -> tuple:
        return BPETokenizer, (self.json, self.end_of_text)

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"json": self.json}

    def identity(self) -> dict[str, Any]:
        if self._is_gpt2:
            return GPT2Tokenizer().identity()
        return super().meta() | {"pipeline": self._pipeline, "added": self._added}

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            check_text(text)
        library = self._tokenizer
        parts = [cut_up(text) if self._can_be_cut else [text] for text in texts]
        try:
            encoded = library.encode_batch_fast([part for own in parts for part in own], add_special_tokens=False)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"the tokenizer cannot encode this text: {error}") from error
        ids = iter([np.array(part.ids, self.dtype) for part in encoded])
        return [np.concatenate([next(ids) for _ in own]) for own in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes_of[id] for id in self._checked(ids).tolist()])

    def decode(self, ids: Iterable[int]) -> str:
        """As for every kind, without the space that such a tokenizer puts before a text."""
        text = super().decode(ids)
        return text[1:] if text[:1] == " " and any(map(_begins_with_space, self._steps)) else text

    def last_cut(self, text: str, start: int = 0) -> int:
        return last_cut(text, start) if self._can_be_cut else 0

    @property
    def _splits_as_gpt2(self) -> bool:
        split = self._pipeline["pre_tokenizer"] or {}
        plain = not self._pipeline["normalizer"] and not split.get("add_prefix_space") and split.get("use_regex", True)
        return plain and split.get("type") == "ByteLevel"

    @property
    def _is_byte_level(self) -> bool:  # by a pre-tokenizer that loses nothing, GPT-2's or ours
        ours = not self._pipeline["normalizer"] and self._pipeline["pre_tokenizer"] == PRE_TOKENIZER
        return ours or self._splits_as_gpt2

    @property
    def lossless(self) -> bool:
        return self._is_byte_level and self.ids.keys() >= BYTE_OF.keys()

    @property
    def _can_be_cut(self) -> bool:
        types = [(self._pipeline[key] or {}).get("type") for key in ("normalizer", "pre_tokenizer")]
        return self._all_special and (self._is_byte_level or types == ["BertNormalizer", "BertPreTokenizer"])

    @cached_property
    def _is_gpt2(self) -> bool:
        if not (self.vocab_size == 50257 and self.end_of_text == 50256 and self._splits_as_gpt2):
            return False
        return hashlib.sha256("\n".join(sorted(self.ids, key=self.ids.get)).encode("utf-8")).hexdigest() == GPT2_SHA256

    @cached_property
    def _bytes_of(self) -> list[bytes]:  # [vocab_size], empty for an id without a token
        table = [b""] * self.vocab_size
        for token, id in self.ids.items():
            table[id] = _bytes_of_token(token, self._steps)
        return table

    @cached_property
    def _tokenizer(self):  # tokenizers.Tokenizer
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise UserError("this model's tokenizer needs a package: pip install tokenizers") from error
        try:
            tokenizer = Library.from_str(self.json)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"tokenizers cannot read this model's tokenizer.json: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # spelled out in a text, they are text
        return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of `texts` with `vocab_size` tokens: 256 bytes, the merges, and <|endoftext|>, the last.

    There are fewer tokens where the texts have fewer pairs that occur twice, and never a merge between two texts. The
    same texts give the same tokenizer. Takes about 80 bytes of memory and 2 microseconds for each byte of texts that do
    not repeat themselves: 3.4 GB and two minutes for 42 MB of novels; of more, a sample does. UserError for a wrong
    vocab_size, a lone surrogate, and where the package `tokenizers` is missing.
    """
    if not 257 <= vocab_size <= 2**24:
        raise UserError(f"a BPE vocabulary of {vocab_size}: expected 257 (the bytes and {END_OF_TEXT}) to {2**24}")
    try:
        from tokenizers import Tokenizer as Library
        from tokenizers import trainers
    except ImportError as error:
        raise UserError("training a BPE needs a package: pip install tokenizers") from error

    def pieces() -> Iterator[str]:
        for text in texts:
            check_text(text)
            yield from cut_up(text)

    model = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"pre_tokenizer": PRE_TOKENIZER, "decoder": PRE_TOKENIZER["pretokenizers"][1]}
    library = Library.from_str(tokenizer_json(model, {}, **parts))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=sorted(BYTE_OF), show_progress=False
    )
    in_python = threading.current_thread() is threading.main_thread() and signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:  # the library does not come back to Python for minutes, so Ctrl-C ends the process by itself
        library.train_from_iterator(pieces(), trainer)
    finally:
        if in_python:
            signal.signal(signal.SIGINT, in_python)
    library.add_special_tokens([END_OF_TEXT])
    return BPETokenizer(library.to_str(), library.token_to_id(END_OF_TEXT))


def _decoding_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's decoder. ValueError for one that cannot be done token by token."""
    if decoder is None:
        return [{"type": "Spaces"}]
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoding_steps(part)]
    known = ("Replace", "Metaspace", "WordPiece", "ByteFallback", "ByteLevel", "Fuse", "Strip")
    if decoder["type"] not in known or decoder["type"] == "Replace" and "String" not in decoder["pattern"]:
        raise ValueError(f"a decoder of the type {decoder['type']} is not read here")
    return [decoder]


def _begins_with_space(step: dict[str, Any]) -> bool:
    """Whether a decoder with this step takes away the space before the first word."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    return step["type"] in ("WordPiece", "Spaces") or step["type"] == "Strip" and step["start"] > 0


def _bytes_of_token(token: str, steps: list[dict[str, Any]]) -> bytes:
    """The bytes that a token adds to a text."""
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif step["type"] == "Spaces":
            token = " " + token
        elif step["type"] == "WordPiece" and token.startswith(step["prefix"]):
            token = token.removeprefix(step["prefix"])
        elif step["type"] == "WordPiece" and token[:1].isalnum() and token < "\u2e80":  # where CJK begins
            token = " " + token
        elif step["type"] == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        elif step["type"] == "ByteLevel" and all(c in BYTE_OF for c in token):
            return bytes([BYTE_OF[c] for c in token])
    return token.encode("utf-8", errors="replace")


def cut_up(text: str, size: int = 2**14) -> list[str]:
    """The text in pieces of at least `size` characters that may be encoded apart, where it has a CUT."""
    parts, start = [], 0
    while len(text) - start > 2 * size and (match := CUT.search(text, start + size)):
        parts.append(text[start : match.end()])
        start = match.end()
    return [*parts, text[start:]]


def _split(ids: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """The parts of `ids` that end at these positions."""
    return [ids[start:end] for start, end in pairwise([0, *ends.tolist()])]


def last_cut(text: str, start: int = 0) -> int:
    """The last CUT after `start`; 0 where there is none."""
    for begin in (len(text) - 4096, start):
        cuts = [match.end() for match in CUT.finditer(text, max(begin, start))]
        if cuts:
            return cuts[-1]
    return 0


def code_points(text: str) -> np.ndarray:
    """[characters] uint32. UserError for a lone surrogate, which is no character."""
    try:
        return np.frombuffer(text.encode("utf-32-le"), np.dtype("<u4"))
    except UnicodeEncodeError as error:
        raise surrogate_error(error) from error


def check_text(text: str) -> None:
    """UserError for a lone surrogate, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise surrogate_error(error) from error


def surrogate_error(error: UnicodeEncodeError) -> UserError:
    code = ord(error.object[error.start])
    return UserError(
        f"the text has a lone surrogate (U+{code:04X}) at position {error.start:,}, which is half a character, as in "
        "text that was read in a wrong encoding: save the text as UTF-8"
    )


def tokenizer_from_meta(meta: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that `Tokenizer.meta` described. UserError, naming `where`, for anything else."""
    kind = meta.get("kind") if isinstance(meta, dict) else None
    if kind == "gpt2":
        tokenizer = GPT2Tokenizer()
    elif kind == "char":
        chars, byte_fallback = meta.get("chars"), meta.get("byte_fallback")
        if not isinstance(chars, str) or not isinstance(byte_fallback, bool):
            raise UserError(f'{where}: a char tokenizer needs "chars" (text) and "byte_fallback" (true or false)')
        try:
            tokenizer = CharTokenizer(chars, byte_fallback, meta.get("end_of_text") is not None)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    elif kind == "bpe":
        definition, end_of_text = meta.get("json"), meta.get("end_of_text")
        if not isinstance(definition, str) or type(end_of_text) not in (int, type(None)):
            raise UserError(f'{where}: a bpe tokenizer needs "json" (text) and "end_of_text" (an id or null)')
        with user_errors(ValueError, about=where):
            tokenizer = BPETokenizer(definition, end_of_text)
    elif kind == "chat":
        from chat import ChatTokenizer  # which imports this file

        base, layout = meta.get("base"), meta.get("layout")
        if not isinstance(layout, dict) or not isinstance(base, dict) or base.get("kind") == kind:
            raise UserError(f'{where}: a chat tokenizer needs "base" (a tokenizer) and "layout" (a text for each role)')
        with user_errors(ValueError, about=where):
            tokenizer = ChatTokenizer(tokenizer_from_meta(base, where), layout)
    elif isinstance(meta, dict) and "kind" in meta:
        raise UserError(f"{where}: unknown kind of tokenizer {kind!r}; this version knows char, gpt2, bpe and chat")
    else:
        raise UserError(f'{where} does not describe a tokenizer: it has no "kind"')
    for key, value in tokenizer.meta().items():
        found = meta.get(key, value if kind == "gpt2" else "missing")  # the word gpt2 says everything
        if type(found) is not type(value) or found != value:
            raise UserError(f"{where}: the tokenizer's {key} is {found!r}, but {value!r} is what the rest of it makes")
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a dataset folder: meta.json, else nanoGPT's meta.pkl, else GPT-2's. UserError where broken."""
    folder = Path(folder)
    settle(folder)
    if not folder.is_dir():
        raise UserError(f"no dataset folder {folder}: give a folder that a prepare.py has filled")
    if (folder / "meta.json").exists():
        meta = read_meta(folder)
        with user_errors(UserError, about="run the dataset's prepare.py again"):
            return tokenizer_from_meta(meta, str(folder / "meta.json"))
    if (folder / "meta.pkl").exists():
        return _nanogpt_tokenizer(folder / "meta.pkl")
    return GPT2Tokenizer()


def settle(folder: str | Path) -> None:
    """Ends what a killed prepare.py had begun: a new dataset that is whole, which meta.json.new says, takes the old
    one's place. UserError where the folder cannot be written to."""
    folder = Path(folder)
    if not os.path.exists(folder / "meta.json.new"):  # Path.exists raises for a name too long
        return
    with user_errors(OSError, about=f"the dataset {folder} cannot be put in order"):
        for name in FILES:
            with suppress(FileNotFoundError):
                os.replace(folder / f"{name}.new", folder / name)
        (folder / "meta.pkl").unlink(missing_ok=True)


def read_meta(folder: str | Path) -> dict[str, Any]:
    """A dataset folder's meta.json, {} where there is none. UserError where it is no JSON object."""
    settle(folder)
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the dataset's prepare.py again") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} is not a JSON object; run the dataset's prepare.py again")
    files = meta.get("files", {})
    sound = (
        meta.get("dtype", "uint16") in ("uint16", "uint32")
        and isinstance(meta.get("max_id", 0), int)
        and isinstance(files, dict)
        and all(isinstance(file, dict) and isinstance(file.get("bytes", 0), int) for file in files.values())
    )
    if not sound:
        raise UserError(f'{path} has a wrong "dtype", "max_id" or "files"; run the dataset\'s prepare.py again')
    return meta


def hf_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else vocab.json and merges.txt, else BERT's vocab.txt;
    None where there are none of them. UserError, naming the file, where one is broken.

    Its end of text is what the folder calls its eos token, where that is inside the vocabulary, else <|endoftext|>,
    </s> or [SEP]. tokenizer_config.json is asked first: config.json's is often GPT-2's 50256, left there by oversight.
    """
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    path = next((p for name in names if (p := Path(folder) / name).is_file()), None)
    if path is None or path.name == "vocab.json" and not path.with_name("merges.txt").is_file():
        return None
    first, *others = (f"{name}.json" for name in ("tokenizer_config", "config", "generation_config"))
    broken = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError)
    with user_errors(*broken, about=str(path)):
        settings = _read_object(path.with_name(first))
        definition = path.read_text(encoding="utf-8")
        if path.name == "vocab.json":
            merges = path.with_name("merges.txt").read_text(encoding="utf-8")
            definition = _gpt2_json(json.loads(definition), merges, settings)
        elif path.name == "vocab.txt":
            definition = _bert_json(definition, settings)
        tokenizer, ours = BPETokenizer(definition, None), settings.get("weigpt_tokenizer")
        if isinstance(ours, dict) and ours.get("vocab_size") == tokenizer.vocab_size:
            return tokenizer_from_meta(ours, first)
        eos = _eos_id([settings, *(_read_object(path.with_name(name)) for name in others)], tokenizer.ids)
    return BPETokenizer(definition, eos)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file. ValueError where it is none."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return found


def _eos_id(settings: list[dict[str, Any]], ids: dict[str, int]) -> int | None:
    known = {id: id for id in ids.values()} | ids  # tokens and their ids alike
    for found in settings:
        token, id = found.get("eos_token"), found.get("eos_token_id")
        for name in (
            token.get("content") if isinstance(token, dict) else token,
            *(id if isinstance(id, list) else [id]),
        ):
            if name in known:
                return known[name]
    return next((ids[token] for token in (END_OF_TEXT, "</s>", "[SEP]") if token in ids), None)


def tokenizer_json(model: dict[str, Any], special: dict[str, int], **pipeline: dict[str, Any]) -> str:
    """The text of a tokenizer.json: its model, its special tokens and their ids, and, where it has them, a normalizer,
    a pre_tokenizer and a decoder."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": id, "content": token, **flags} for token, id in sorted(special.items(), key=lambda item: item[1])]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return json.dumps(
        {"version": "1.0", "added_tokens": added, **parts, **pipeline, "model": model}, ensure_ascii=False
    )


def byte_level_json(vocab: dict[str, int], merges: list[list[str]], special: dict[str, int]) -> str:
    """The text of a tokenizer.json for BPE over bytes, as GPT-2 has it."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return tokenizer_json(model, special, pre_tokenizer=step, decoder=step)


def _gpt2_json(vocab: dict[str, int], merges: str, settings: dict[str, Any]) -> str:
    lines = [line for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    added = {token["content"]: int(id) for id, token in settings.get("added_tokens_decoder", {}).items()}
    special = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    return byte_level_json(vocab, [line.split(" ") for line in lines], special | added)


def _bert_json(lines: str, settings: dict[str, Any]) -> str:
    vocab = {token: id for id, token in enumerate(lines.removesuffix("\n").split("\n"))}
    names = [settings.get(f"{name}_token", f"[{name.upper()}]") for name in ("unk", "sep", "pad", "cls", "mask")]
    names = [name["content"] if isinstance(name, dict) else name for name in names]
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": settings.get("do_lower_case", True),
    }
    model = {"type": "WordPiece", "unk_token": names[0], "continuing_subword_prefix": "##", "vocab": vocab}
    return tokenizer_json(
        model | {"max_input_chars_per_word": 100},
        {name: vocab[name] for name in names if name in vocab},
        normalizer=normalizer,
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


class _PlainUnpickler(pickle.Unpickler):
    """Admits what pickle has opcodes for (text, numbers, dict, list); nothing that must be imported, so no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(f"it would import {module}.{name}, which is refused because a pickle can run any code")


def _nanogpt_tokenizer(path: Path) -> CharTokenizer:
    again = "prepare the dataset again, or remove the file if its tokens are GPT-2's"
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # a broken pickle can raise nearly anything
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read ({reason}): {again}") from error
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos or set(itos) != set(range(len(itos))):
        raise UserError(f'{path} has no "itos" that gives the ids 0 to n-1 their characters: {again}')
    chars = [itos[id] for id in range(len(itos))]
    if not all(isinstance(c, str) and len(c) == 1 for c in chars) or len(set(chars)) != len(chars):
        raise UserError(f'{path}: "itos" must give each id a character of its own: {again}')
    if meta.get("vocab_size", len(chars)) != len(chars):
        raise UserError(f"{path}: vocab_size is {meta['vocab_size']}, but itos has {len(chars)} characters: {again}")
    try:
        return CharTokenizer("".join(chars), byte_fallback=False, end_of_text=False)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
