"""Text to token ids and back: the characters of a text, or GPT-2's BPE.

Notable choices:
- `char` keeps nanoGPT's ids (characters in code-point order). With byte fallback, 256 byte tokens and <|endoftext|>
  follow, so that any text round-trips: a character outside the vocabulary becomes the bytes of its UTF-8.
- In a text, <|endoftext|> spelled out is thirteen plain characters; only `encode_prompt` reads it as the token.
- A dataset folder says which tokenizer it is for: meta.json (ours), meta.pkl (nanoGPT's), or nothing (GPT-2's).
"""

import json
import os
import pickle
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError, user_errors

END_OF_TEXT = "<|endoftext|>"
CODE_POINTS = 0x110000
GPT2_FILES = {  # what tiktoken looks for in TIKTOKEN_CACHE_DIR (the SHA-1 of the address), and where it is from
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee": "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6": "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
}
# GPT-2's pre-tokenizer always ends a piece between a letter or digit and one of these, and looks only ahead from there
GPT2_CUT = re.compile(r"[^\W_](?=[\s。，、！？；：.,!?;:])")


class Tokenizer(ABC):
    """What every kind has. `dtype` is that of the ids, in arrays and in .bin files; `end_of_text` an id or None."""

    kind: str
    vocab_size: int
    end_of_text: int | None
    unknown_id: int | None = None  # the token that stands for what the vocabulary lacks

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        return np.uint32 if self.vocab_size > 65536 else np.uint16

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The text's ids, [tokens] of `dtype`. UserError where the text cannot be expressed."""

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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.meta() == other.meta()

    def __hash__(self) -> int:
        return hash((self.kind, self.vocab_size))


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
        codes = code_points(text)
        ids = self._id_of[codes]  # [characters], -1 where unknown
        unknown = ids < 0
        if not unknown.any():
            return ids.astype(self.dtype)
        if not self.byte_fallback:
            raise self.unknown_error(self.unknown(text))
        rare = codes[unknown]
        width = np.ones(len(ids), np.int64)  # tokens for each character
        width[unknown] += (rare >= 0x80).astype(np.int64) + (rare >= 0x800) + (rare >= 0x10000)
        ids = np.repeat(ids, width)
        utf8 = rare.tobytes().decode("utf-32-le").encode("utf-8")
        ids[ids < 0] = len(self.chars) + np.frombuffer(utf8, np.uint8).astype(np.int32)
        return ids.astype(self.dtype)

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
        at = np.flatnonzero(self._id_of[codes] < 0)
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
    def _id_of(self) -> np.ndarray:  # [code points] int32
        table = np.full(CODE_POINTS, -1, np.int32)
        table[code_points(self.chars)] = np.arange(len(self.chars), dtype=np.int32)
        return table

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
        size, parts, start = 2**16, [], 0
        while len(text) - start > 2 * size and (match := GPT2_CUT.search(text, start + size)):
            parts.append(text[start : match.end()])
            start = match.end()
        parts.append(text[start:])
        if len(parts) == 1:
            return np.array(self._encoding.encode_ordinary(text), self.dtype)
        encoded = self._encoding.encode_ordinary_batch(parts, num_threads=min(8, os.cpu_count() or 1))
        return np.concatenate([np.array(ids, self.dtype) for ids in encoded])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes(self._checked(ids).tolist())

    def last_cut(self, text: str, start: int = 0) -> int:
        for begin in (len(text) - 4096, start):
            cuts = [match.end() for match in GPT2_CUT.finditer(text, max(begin, start))]
            if cuts:
                return cuts[-1]
        return 0

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
    elif isinstance(meta, dict) and "kind" in meta:
        raise UserError(f"{where}: unknown kind of tokenizer {kind!r}; this version knows char and gpt2")
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
    if not folder.is_dir():
        raise UserError(f"no dataset folder {folder}: give a folder that a prepare.py has filled")
    if (folder / "meta.json").exists():
        meta = read_meta(folder)
        with user_errors(UserError, about="run the dataset's prepare.py again"):
            return tokenizer_from_meta(meta, str(folder / "meta.json"))
    if (folder / "meta.pkl").exists():
        return _nanogpt_tokenizer(folder / "meta.pkl")
    return GPT2Tokenizer()


def read_meta(folder: str | Path) -> dict[str, Any]:
    """A dataset folder's meta.json, {} where there is none. UserError where it is no JSON object."""
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
