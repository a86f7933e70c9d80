"""The files of a dataset, written beside the old ones until they are whole; what is shown meanwhile and at the end."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from configurator import UserError, user_errors
from tokenizer import FILES, Tokenizer, read_meta, settle

CHECKED = 2**20  # characters that are read back and compared
SPLITS = ("train", "val")


@contextmanager
def held(folder: str | Path) -> Iterator[Path]:
    """The folder of a dataset, made and put in order, in which nobody else writes meanwhile; also inside of itself.
    UserError where that cannot be. A folder that was made for nothing goes again."""
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = filelock.FileLock(folder / ".lock", is_singleton=True)
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another prepare.py is writing into {folder}: wait for it, or choose another --dest") from None
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        settle(folder)
        if lock.lock_counter == 1:
            with user_errors(OSError, about=f"cannot clear {folder} of what a killed run left"):
                for left in (*(folder / f"{name}.new" for name in FILES), *folder.glob(".documents-*")):
                    left.unlink(missing_ok=True)
        yield folder
        done = True
    finally:
        lock.release()
        if made and not done:
            with suppress(OSError):
                (folder / ".lock").unlink()
                for path in made:
                    path.rmdir()


class DatasetWriter:
    """train.bin, val.bin and meta.json in a folder: beside the old ones until `finish`, which replaces those.

    A context manager; whatever ends it before `finish` is done leaves the old files as they were and no new ones. With
    `masks`, for examples, train.mask and val.mask have a byte for each token, see packing.py.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, masks: bool = False) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        self._names = [f"{split}.{kind}" for kind in ("bin", *["mask"] * masks) for split in SPLITS]
        self._stored = np.dtype(tokenizer.dtype).newbyteorder("<")
        self._files: dict[str, Any] = {}
        self._held = ExitStack()
        self._hashes = {name: hashlib.sha256() for name in self._names}
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._max_id = -1
        self._sample: list[str] = []  # the text of the first `_sample_tokens` of train.bin
        self._sample_size = self._sample_tokens = 0

    def __enter__(self) -> "DatasetWriter":
        self._held.enter_context(held(self.folder))
        try:
            for name in self._names:
                self._files[name] = self._beside(name).open("wb", buffering=2**20)
        except OSError as error:
            self._discard()
            self._held.__exit__(type(error), error, error.__traceback__)
            raise _cannot_write(self.folder, error) from error
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._discard()
        self._held.__exit__(kind, error, trace)
        if isinstance(error, OSError):
            raise _cannot_write(self.folder, error) from error

    def checks(self, split: str) -> bool:
        """Whether `write` would compare what it is given next with a text."""
        return split == SPLITS[0] and self._sample_size < CHECKED and self._sample_tokens == self._tokens[split]

    def write(self, split: str, ids: np.ndarray, text: str | None = None, marks: np.ndarray | None = None) -> None:
        """Appends ids, and their marks, uint8, where there are masks. `text`, where known, is what they should decode
        to; `finish` checks the first of it."""
        if len(ids) == 0:
            return
        if text is not None and self.checks(split):
            self._sample.append(text)
            self._sample_size += len(text)
            self._sample_tokens += len(ids)
        for name, data in ((f"{split}.bin", ids.astype(self._stored, copy=False)), (f"{split}.mask", marks)):
            if name in self._files:
                self._files[name].write(data)
                self._hashes[name].update(data)
        self._tokens[split] += len(ids)
        self._max_id = max(self._max_id, int(ids.max()))

    def finish(
        self,
        *,
        documents: list[int],
        characters: list[int],
        distinct: int | None,
        unknown: int,
        template: str = "",
        notes: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Checks what was written, puts it in place of the old files, prints a summary, gives meta.json's content.

        `documents` and `characters` are those of each split, `distinct` counts the text's distinct characters (None:
        not counted), `unknown` the occurrences of those without a token of their own; `notes` end the summary.
        """
        for split, tokens in self._tokens.items():
            if not tokens:
                raise UserError(f"{split}.bin would be empty: give more text, or another --val_fraction")
        for file in self._files.values():
            _close(file)
        ids = np.fromfile(self._beside("train.bin"), self._stored, self._sample_tokens)
        sample = "".join(self._sample)
        if self.tokenizer.lossless and self.tokenizer.decode(ids) != sample:
            raise UserError(
                f"round trip: the ids in {self._beside('train.bin')} are not the text; nothing was replaced"
            )
        checked = len(sample) - len(end_text(self.tokenizer)) * int((ids == self.tokenizer.end_of_text).sum())
        files = {}
        for name in self._names:
            split, _, kind = name.partition(".")
            size = self._tokens[split] * (self._stored.itemsize if kind == "bin" else 1)
            files[name] = {"bytes": size, "sha256": self._hashes[name].hexdigest(), "tokens": self._tokens[split]}
        tokens = sum(self._tokens.values())
        meta = self.tokenizer.meta() | ({"template": template} if template else {})
        meta |= {"max_id": self._max_id, "documents": sum(documents), "characters": sum(characters), "tokens": tokens}
        meta |= {"unknown_characters": unknown, "files": files}
        texts = {"meta.json": json.dumps(meta, ensure_ascii=False, indent=1) + "\n"}
        texts |= {"tokenizer.json": meta["json"]} if "json" in meta else {}
        self._replace(texts)

        first = sample.split(end_text(self.tokenizer))[0] if end_text(self.tokenizer) else sample
        line = next((line for line in first.split("\n") if line.strip()), "")
        pieces = self.tokenizer.pieces(self.tokenizer.encode_prompt(line[:200]))
        counted = {"documents": documents, "characters": characters, "tokens": list(self._tokens.values())}
        print(f"{'':<10}" + "".join(f"{name:>17}" for name in (*SPLITS, "in all")))
        for name, pair in counted.items():
            if name != "documents" or sum(pair) > 1:
                print(f"{name:<10}" + "".join(f"{n:>17,}" for n in (*pair, sum(pair))))
        kinds = (
            ""
            if distinct is None
            else f"; {distinct:,} distinct characters, {unknown:,} unknown (no token of their own)"
        )
        print(f"vocabulary: {self.tokenizer.vocab_size:,} tokens ({self.tokenizer.kind}){kinds}")
        print(f"characters per token: {sum(characters) / tokens:.2f}")
        for text in notes:
            print(text)
        print(f"first line: {'|'.join(pieces[:60])}{'|…' if len(pieces) > 60 or len(line) > 200 else ''}")
        if self.tokenizer.lossless:
            print(f"round trip: identical (read back and compared: the first {checked:,} characters)")
        else:
            print("round trip: not compared, as this tokenizer does not keep all of a text (spaces, capitals)")
        print(f"written: {', '.join(str(self.folder / name) for name in (*files, *texts))}")
        return meta

    def _replace(self, texts: dict[str, str]) -> None:
        """Puts the new files in the place of the old ones. From the moment when meta.json.new is there, the new ones
        are the dataset, and whoever reads it next ends what a kill may have interrupted."""
        was_bpe = False
        with suppress(UserError):  # a broken meta.json is replaced
            was_bpe = read_meta(self.folder).get("kind") == "bpe"
        for name, text in texts.items():
            file = self._beside(name).open("w", encoding="utf-8", newline="\n")
            with file:
                file.write(text)
                _close(file)
        for name in FILES:  # meta.json is the last of them
            if name in texts or name in self._names:
                os.replace(self._beside(name), self.folder / f"{name}.new")
        settle(self.folder)
        of_old = [name for name in FILES if name.endswith(".mask") or name == "tokenizer.json" and was_bpe]
        for name in of_old:
            if name not in texts and name not in self._names:
                (self.folder / name).unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        return self.folder / f"{name}.tmp"

    def _discard(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # closing flushes, which a full disk refuses
                file.close()
        for name in FILES:
            with suppress(OSError):
                self._beside(name).unlink()


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write into {folder}: {error.strerror or error}; choose another place with --dest")


def _close(file: Any) -> None:
    """Closes a file that is to be on the disk before anything else happens."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def progress_bar(total: int, name: str, unit: str = "B") -> Iterator[Callable[[int], Any]]:
    """Gives a function to call with what has been done; shown on stderr where that is a terminal and there is tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=total, desc=name, unit=unit, unit_scale=True, disable=None) as bar:
        yield bar.update


def end_text(tokenizer: Tokenizer) -> str:
    """The text of its end-of-text token: <|endoftext|>, but for some of Hugging Face's; empty where it has none."""
    return "" if tokenizer.end_of_text is None else tokenizer.decode([tokenizer.end_of_text])
