"""Records to conversations, and conversations to train.bin, val.bin and their masks.

| format            | fields                                                                            |
| messages          | messages: a list of {role, content}, the roles being system, user and assistant   |
| conversations     | conversations: a list of {from, value}, of system, human and gpt                  |
| prompt            | prompt, response, and system where there is one                                   |
| instruction       | instruction, input, output                                                        |
| baike2018qa       | title and desc, the question, to answer                                           |
| webtext2019zh     | title and desc, the question, to content; star                                    |
| translation2019zh | english to chinese, and chinese to english                                        |
| news2016zh        | content, the text, to title                                                       |

As with texts, everything is read twice: once to count and to decide what is for validation, once to encode and write.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chat import ROLES, ChatTokenizer, Message, chat_tokenizer, check_layout
from configurator import Config, UserError, user_errors
from corpus import (
    DEFAULTS,
    LEFT_OUT,
    CharacterCounts,
    Document,
    Seen,
    char_tokenizer,
    check_malformed,
    check_options,
    open_source,
)
from documents import Found, Source, field_text
from packing import BEGINS, LEARNT
from records import Malformed, stars_of
from tokenizer import train_bpe
from writing import SPLITS, DatasetWriter, held, progress_bar

KINDS = {  # and the fields by which each is recognised
    "messages": {"messages"},
    "conversations": {"conversations"},
    "prompt": {"prompt", "response"},
    "instruction": {"instruction", "output"},
    "translation2019zh": {"english", "chinese"},
    "baike2018qa": {"title", "answer"},
    "webtext2019zh": {"title", "content", "star"},
    "news2016zh": {"title", "content", "keywords"},
}
FORMATS = ("auto", *KINDS)
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
PAIRS = (("role", "content"), ("from", "value"))  # what a message's two sides are called
DIRECTIONS = ("both", "en-zh", "zh-en")
TO_CHINESE, TO_ENGLISH, TO_TITLE = "翻译成中文：", "翻译成英文：", "给下面的文章起一个标题：\n"
TOGETHER = 1000  # conversations that are encoded at once


@dataclass(frozen=True)
class Dialogues:
    """Conversations in files of records; or `own`, of which those in one list belong together. `fields`: what the
    prompt and the response are called in records of another form."""

    source: Source | None
    format: str = "auto"
    fields: tuple[str, ...] = ()
    direction: str = "both"
    min_star: float = 0.0
    own: tuple[list[list[Message]], ...] = ()

    def read(self, progress: Callable[[int], Any] = lambda size: None, found: Found | None = None) -> Iterator[Any]:
        """Lists of conversations, those of a record together. UserError where a file cannot be read."""
        found, kind = found or Found(quiet=True), self.format
        yield from self.own
        for where, record in self.source.records(progress, found) if self.source else ():
            found.records += 1
            try:
                if isinstance(record, Malformed):
                    raise record
                if not isinstance(record, dict):
                    raise Malformed(f"{type(record).__name__}, where an object with named fields was expected")
                if kind == "auto" and not self.fields:
                    kind = kind_of(record, where)
                if self.min_star and not stars_of(record) >= self.min_star:
                    found.few_stars += 1
                    continue
                conversations = [checked(messages) for messages in self._of(record, kind)]
            except Malformed as error:
                found.bad(where, error)
                continue
            yield conversations

    def _of(self, record: dict[str, Any], kind: str) -> list[list[Message]]:
        """The conversations of a record. Malformed where it has none."""

        def text(*names: str) -> str:
            """The fields' texts, a line each, without those that are empty or not there; the first one must be."""
            texts = [field_text(record, name).strip() for name in names if name in record or name == names[0]]
            return "\n".join(dict.fromkeys(filter(None, texts)))

        def asked(prompt: str, response: str) -> list[Message]:
            system = [{"role": "system", "content": text("system")}] if record.get("system") else []
            return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": response}]

        if self.fields:
            return [asked(text(*self.fields[:-1]), text(self.fields[-1]))]
        if kind in ("messages", "conversations"):
            if not isinstance(record.get(kind), list) or not all(isinstance(said, dict) for said in record[kind]):
                raise Malformed(f'"{kind}" is no list of objects with "role" and "content"')
            role, content = next((p for p in PAIRS if all(p[0] in said for said in record[kind])), PAIRS[0])
            said = [(str(each.get(role)), field_text(each, content).strip()) for each in record[kind]]
            return [[{"role": SPEAKERS.get(who, who), "content": what} for who, what in said]]
        if kind == "translation2019zh":
            english, chinese = text("english"), text("chinese")
            pairs = {"en-zh": (TO_CHINESE + english, chinese), "zh-en": (TO_ENGLISH + chinese, english)}
            if not (english and chinese):
                raise Malformed("one of its two sides is empty")
            return [asked(*pair) for direction, pair in pairs.items() if self.direction in ("both", direction)]
        if kind == "news2016zh":
            content, title = text("content"), text("title")
            return [asked(TO_TITLE + content if content else "", title)]
        prompts = {"prompt": ("prompt",), "instruction": ("instruction", "input")}
        response = {"prompt": "response", "instruction": "output", "baike2018qa": "answer", "webtext2019zh": "content"}
        return [asked(text(*prompts.get(kind, ("title", "desc"))), text(response[kind]))]


def kind_of(record: dict[str, Any], where: str) -> str:
    """The format of a record, by its fields. UserError where there is no such."""
    if known := [kind for kind, keys in KINDS.items() if keys <= record.keys()]:
        return known[0]
    raise UserError(
        f"{where}: which of its fields are the prompt and the response? It has {', '.join(map(str, record))[:300]}: "
        "name them, such as --fields=question,answer, or the corpus with --format="
    )


def checked(messages: list[Message]) -> list[Message]:
    """Messages that can be learnt from. Malformed where they cannot."""
    if wrong := [message["role"] for message in messages if message["role"] not in ROLES]:
        raise Malformed(f'the role "{wrong[0]}" is none of {", ".join(ROLES)}')
    if empty := [message["role"] for message in messages if not message["content"]]:
        raise Malformed(f"what {empty[0]} says is empty")
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise Malformed("nothing in it is an answer to anything")
    try:
        "".join(message["content"] for message in messages).encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("half a surrogate pair, which is no character, or bytes that cannot be decoded") from None
    return messages


def check(c: Config) -> None:
    """UserError for settings that make no sense."""
    for key, known in (("format", FORMATS), ("direction", DIRECTIONS)):
        if getattr(c, key) not in known:
            raise UserError(f"--{key}={getattr(c, key)}: expected {', '.join(known)}")
    of_input = ("val_input", "format", "fields", "direction", "min_star", "encoding", "errors")
    if not c.input and (unused := [key for key in of_input if key in c.given]):
        raise UserError(f"--{unused[0]} is about --input, and there is none")


def open_dialogues(inputs: list[str], c: Config, flag: str = "input") -> Dialogues:
    """What the settings of data/instruct/prepare.py say about reading `inputs`. UserError where they are wrong."""
    fields = tuple(name.strip() for name in c.fields.split(",") if name.strip())
    if len(fields) == 1:
        raise UserError(f"--fields={c.fields}: expected those of the prompt, and behind them the response's")
    of_text = {"encoding": c.encoding, "errors": c.errors, "fields": "", "template": ""}
    source = open_source(inputs, Config(**of_text), flag)
    return Dialogues(source, c.format, fields, c.direction, c.min_star)


@dataclass
class Survey:
    """What the first reading tells. Pairs are (for training, for validation)."""

    found: Found = field(default_factory=Found)
    counts: CharacterCounts = field(default_factory=CharacterCounts)
    documents: list[int] = field(default_factory=lambda: [0, 0])  # conversations
    characters: list[int] = field(default_factory=lambda: [0, 0])
    fates: bytearray = field(default_factory=bytearray)  # for each record, the number of its split, or LEFT_OUT
    seen_before: int = 0


def survey(sources: list[Dialogues], c: Config, progress: Callable[[int], Any]) -> Survey:
    """Reads it all once. One source is split by the hash of each record, of two the second is for validation. UserError
    where nothing is left."""
    s, seen = Survey(), Seen()
    kept: list[tuple[int, int, int, int]] = []  # hash, number, conversations, characters: the lowest and the highest
    for part, source in enumerate(sources):
        for conversations in source.read(progress, s.found):
            document = Document()
            for message in (message for messages in conversations for message in messages):
                document.add(message["content"] + "\n")
            number, size = document.number(), sum(len(m["content"]) for messages in conversations for m in messages)
            split = part if len(sources) > 1 else int(number < c.val_fraction * 2**64)
            if c.dedup and not seen.add(number):
                s.seen_before += 1
                s.fates.append(LEFT_OUT)
                continue
            this = (number, len(s.fates), len(conversations), size)
            kept = [min(*kept, this), max(*kept, this)] if kept else [this, this]
            s.documents[split] += len(conversations)
            s.characters[split] += size
            document.count(s.counts)
            s.fates.append(split)
    check_malformed(s.found, c.max_bad)
    if not sum(s.documents):
        raise UserError("there is no conversation in what --input gives, or none is left")
    if len(sources) > 1 and not all(s.documents):
        raise UserError(f"--{'val_' if s.documents[0] else ''}input: nothing is left of it")
    if not all(s.documents) and kept[0] != kept[1]:
        to = s.documents.index(0)  # too few for this fraction: the nearest one makes a split of its own
        _, number, conversations, size = kept[1 - to]
        s.fates[number] = to
        for pair, amount in ((s.documents, conversations), (s.characters, size)):
            pair[to], pair[1 - to] = amount, pair[1 - to] - amount
    if not all(s.documents):
        raise UserError("one record cannot be split: give more of them, or --val_input")
    return s


def batches(sources: list[Dialogues], s: Survey, progress: Callable[[int], Any]) -> Iterator[tuple[int, list[Any]]]:
    """(number of the split, conversations), some at once."""
    waiting: tuple[list[Any], list[Any]] = ([], [])
    fates = iter(s.fates)
    for source in sources:
        for conversations in source.read(progress):
            fate = next(fates, None)
            if fate is None:
                raise UserError("the input changed while it was being read; run again")
            if fate == LEFT_OUT:
                continue
            waiting[fate].extend(conversations)
            if len(waiting[fate]) >= TOGETHER:
                yield fate, list(waiting[fate])
                waiting[fate].clear()
    yield from ((split, rest) for split, rest in enumerate(waiting) if rest)


def prepare(source: Dialogues, config: Config, here: str | Path) -> dict[str, Any]:
    """Writes conversations as a dataset of examples into config.dest, or `here`, prints a summary, gives meta.json."""
    with held(config.dest or here) as folder:
        return _prepare(source, Config(**(DEFAULTS | vars(config))), folder)


def _prepare(source: Dialogues, c: Config, folder: Path) -> dict[str, Any]:
    layout = {role: getattr(c, role).replace("\\n", "\n") for role in ROLES}
    with user_errors(ValueError):
        check_layout(layout)
    chosen = check_options(c)
    sources = [source] + ([open_dialogues(c.val_input, c, "val_input")] if c.val_input else [])
    files = {file.path for each in sources if each.source for file in each.source.files}
    with user_errors(OSError, about="cannot read the input"):
        size = sum(path.stat().st_size for path in files)
    with progress_bar(size, "reading") as progress:
        s = survey(sources, c, progress)
    if chosen is None and c.tokenizer == "bpe":
        with progress_bar(size, "training the BPE") as progress:
            chosen = train_bpe(texts_of(batches(sources, s, progress)), c.vocab_size)
    elif chosen is None:
        for character in "".join(layout.values()):  # what is written around the texts needs tokens, too
            s.counts.add(character)
        chosen = char_tokenizer(s.counts, c.min_count, c.byte_fallback, end_of_text=True)
    tokenizer = chat_tokenizer(chosen, layout)
    unknown = s.counts.unknown(getattr(tokenizer, "base", tokenizer))
    with DatasetWriter(folder, tokenizer, masks=True) as writer:
        lengths, learnt, done = [], 0, 0
        with progress_bar(size, "encoding") as progress:
            for split, conversations in batches(sources, s, progress):
                for messages, (ids, learn) in zip(conversations, tokenizer.encode_messages(conversations), strict=True):
                    marks = learn.astype(np.uint8) * np.uint8(LEARNT)
                    marks[0] = BEGINS  # what nothing stands before cannot be learnt
                    text = tokenizer.text_of(messages) if writer.checks(SPLITS[split]) else None
                    writer.write(SPLITS[split], ids, text, marks)
                    lengths.append(len(ids))
                    learnt += int(learn.sum())
                done += len(conversations)
        if done != sum(s.documents):
            raise UserError("the input changed while it was being read; run again")
        return writer.finish(
            documents=s.documents,
            characters=s.characters,
            distinct=len(s.counts.characters()),
            unknown=sum(unknown.values()),
            notes=notes_of(s, tokenizer, np.array(lengths), learnt),
        )


def texts_of(batches: Iterable[tuple[int, list[list[Message]]]]) -> Iterator[str]:
    """What is said in the conversations for training."""
    for split, conversations in batches:
        if split == 0:
            yield from (message["content"] for messages in conversations for message in messages)


def notes_of(s: Survey, tokenizer: ChatTokenizer, lengths: np.ndarray, learnt: int) -> list[str]:
    """What a reader of the summary should know besides."""
    middle, most, longest = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.99, 1))
    lines = [
        f"to be learnt: the answers, {learnt / lengths.sum():.0%} of the tokens",
        f"tokens in a conversation: {middle:,} in the middle, {most:,} or fewer in 99 of 100, {longest:,} at most; "
        "what is longer than --block_size is cut there",
    ]
    if tokenizer.special:
        lines.append(f"new tokens: {', '.join(f'{mark} ({id})' for mark, id in tokenizer.special.items())}")
    reasons = Counter({"malformed": s.found.malformed, "of too few stars": s.found.few_stars})
    reasons += Counter({"seen before": s.seen_before})
    if reasons:
        lines.append("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()))
    return lines
