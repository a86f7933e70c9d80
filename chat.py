"""Conversations as tokens: who speaks is told by tokens that no text has.

Notable choices:
- A vocabulary is kept as it is, and grows at its end by a token for each mark in the layout, such as <|user|>. Where a
  message spells one out, it has its characters, so nobody can speak in another's name.
- An answer ends with the end-of-text token, at which every generator here stops already.
- A message's text is encoded by itself, between its marks: so what stands before an answer is the same ids in training
  and when one is asked for.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from configurator import UserError
from tokenizer import END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant")
LAYOUT = {
    "system": "<|system|>{content}",
    "user": "<|user|>{content}",
    "assistant": "<|assistant|>{content}<|endoftext|>",
}
MARK = re.compile(r"(<\|\w+\|>)")
Message = dict[str, str]  # its "role", one of ROLES, and its "content"


def check_layout(layout: dict[str, str]) -> None:
    """ValueError for a layout that lacks a role, or {content}, or what opens or ends an answer."""
    for role in ROLES:
        if not isinstance(layout.get(role), str) or layout[role].count("{content}") != 1:
            raise ValueError(f"{role}={layout.get(role)!r}: expected a text with {{content}} in it, once")
    before, after = layout["assistant"].split("{content}")
    if not before or END_OF_TEXT not in after:
        raise ValueError(
            f"assistant={layout['assistant']!r}: expected something before {{content}}, which opens an answer, and "
            f"{END_OF_TEXT} behind it, which ends one"
        )


class ChatTokenizer(Tokenizer):
    """The vocabulary of `base`, and a token for each mark in `layout`, which says how a message of each role is
    written; {content} stands for its text. ValueError for a layout that makes no sense."""

    kind = "chat"

    def __init__(self, base: Tokenizer, layout: dict[str, str]) -> None:
        check_layout(layout)
        self.base, self.layout = base, {role: layout[role] for role in ROLES}
        marks = dict.fromkeys(mark for text in self.layout.values() for mark in MARK.findall(text))
        if base.end_of_text is not None:
            marks.pop(END_OF_TEXT, None)
        self.special = {mark: base.vocab_size + n for n, mark in enumerate(marks)}
        self.end_of_text = self.special.get(END_OF_TEXT, base.end_of_text)
        self.vocab_size = base.vocab_size + len(self.special)
        self.lossless, self.unknown_id = base.lossless, base.unknown_id
        self._marks = {id: mark for mark, id in self.special.items()}
        self._ids = self.special | {END_OF_TEXT: self.end_of_text}

    def __reduce__(self) -> tuple:
        return ChatTokenizer, (self.base, self.layout)

    def meta(self) -> dict[str, Any]:
        return super().meta() | {"base": self.base.meta(), "special": self.special, "layout": self.layout}

    def encode(self, text: str) -> np.ndarray:
        return self.base.encode(text).astype(self.dtype, copy=False)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids.astype(self.dtype, copy=False) for ids in self.base.encode_batch(texts)]

    def encode_prompt(self, text: str) -> np.ndarray:
        """As `encode`, but the marks are their tokens."""
        parts = [[self._ids[part]] if part in self._ids else self.encode(part) for part in MARK.split(text)]
        return np.concatenate([np.asarray(part, self.dtype) for part in parts])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        parts = []
        for is_mark, run in groupby(self._checked(ids).tolist(), lambda id: id in self._marks):
            run = list(run)
            parts += [self._marks[id].encode() for id in run] if is_mark else [self.base.decode_bytes(run)]
        return b"".join(parts)

    def last_cut(self, text: str, start: int = 0) -> int:
        return self.base.last_cut(text, start)

    @cached_property
    def around(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The ids that stand before a message of each role, and those behind it."""
        parts = {role: text.split("{content}") for role, text in self.layout.items()}
        return {role: tuple(self.encode_prompt(part) for part in pair) for role, pair in parts.items()}

    def encode_messages(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each conversation's ids, [n] of `dtype`, and which of them are to be learnt, bool [n]: the assistant's texts
        and what ends them."""
        contents = iter(self.encode_batch([message["content"] for messages in conversations for message in messages]))
        encoded = []
        for messages in conversations:
            parts, learnt = [], []
            for message in messages:
                (before, after), content = self.around[message["role"]], next(contents)
                parts += [before, content, after]
                answered = np.full(len(content) + len(after), message["role"] == "assistant")
                learnt += [np.zeros(len(before), bool), answered]
            encoded.append((np.concatenate(parts), np.concatenate(learnt)))
        return encoded

    def opening(self, messages: Sequence[Message], room: int) -> list[int]:
        """The ids that the assistant's next answer goes on from: the messages, and what opens an answer.

        Where they are more than `room`, the oldest exchanges are left out, but not the system's message at the
        beginning, nor the newest message.
        """
        turns = [ids.tolist() for ids, _ in self.encode_messages([[message] for message in messages])]
        opened = self.around["assistant"][0].tolist()
        system = [turns.pop(0)] if messages and messages[0]["role"] == "system" else []
        roles = [message["role"] for message in messages[len(system) :]]
        while len(turns) > 1 and sum(map(len, [*system, *turns, opened])) > room:
            turns.pop(0), roles.pop(0)
            while len(turns) > 1 and roles[0] == "assistant":  # an answer goes with its question
                turns.pop(0), roles.pop(0)
        return [id for part in [*system, *turns, opened] for id in part]

    def text_of(self, messages: Sequence[Message]) -> str:
        """The conversation as its ids are decoded."""
        end = self.decode([self.end_of_text])
        texts = (self.layout[m["role"]].replace(END_OF_TEXT, end).split("{content}") for m in messages)
        return "".join(m["content"].join(around) for m, around in zip(messages, texts, strict=True))


def chat_tokenizer(base: Tokenizer, layout: dict[str, str]) -> ChatTokenizer:
    """The tokenizer of conversations in this layout; `base` itself where it is one already. UserError for a layout that
    makes no sense, or another one than a model has been trained with."""
    if isinstance(base, ChatTokenizer):
        if {role: layout[role] for role in ROLES} not in (base.layout, LAYOUT):
            raise UserError("this vocabulary has a layout of its own: leave out --system, --user and --assistant")
        return base
    try:
        return ChatTokenizer(base, layout)
    except ValueError as error:
        raise UserError(f"--{error}") from error
