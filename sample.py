"""Speaks from a trained model.

    $ python sample.py --out_dir=out-shakespeare-char
    $ python sample.py --out_dir=out-demo --title=小白兔 --num_samples=3
    $ python sample.py --out_dir=out-demo --interactive
    $ python sample.py --out_dir=out-instruct --ask=给这个故事起个题目：小猫病了。
    $ python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --quantize=int8
    $ python sample.py --out_dir=out-chinese --start=FILE:prompt.txt --temperature=0 --show_probs

Opens a checkpoint of ours or of nanoGPT's, GPT-2's weights, or a folder in the Hugging Face layout. The samples are
drawn together and go to stdout, all else to stderr. Of a prompt that is longer than the model's context the newest
block_size tokens are seen, and a line says which are not.
"""

from configurator import Config, UserError, configure, note, run

init_from = "resume"  # 'resume' for out_dir, 'gpt2*', or a path: an out_dir, a .pt file, a Hugging Face folder
out_dir = "out"  # ckpt.pt is taken from here, where init_from is 'resume'
# What it begins with
start = "\n"  # the prompt, FILE:path, or - for stdin; <|endoftext|> is the special token; empty is a new text
title = ""  # begins a document with this title, in the layout of the dataset, where it has one; start then follows it
ask = ""  # a question, to a model that was fine-tuned on conversations: the samples are answers
system = ""  # what such a model is told about its part before anything is asked
num_samples = 10  # how many
max_new_tokens = 500  # tokens in each at most; an end-of-text token ends it before
# How the next token is chosen
temperature = 0.8  # below 1 less random, above 1 more; 0 takes the likeliest token each time
top_k = 200  # only the k likeliest tokens may come; 0 for all
top_p = 1.0  # only the likeliest tokens that together have this probability, above 0; 1 for all
min_p = 0.0  # only tokens at least this fraction as likely as the likeliest, 0 to 1; 0 for all
repetition_penalty = 1.0  # above 1, what the text has had already becomes less likely; 1 for no difference
seed = 1337  # the same seed, the same samples, however many are drawn together (but for bfloat16's rounding)
# Where a text ends
stop = []  # text that ends a sample and is not printed (several: --stop=A --stop=B); if it never comes, the length does
stop_at_sentence = False  # past max_new_tokens, go on to the next of stop_chars, at most to twice the length
stop_chars = "。！？!?.…\n"  # what ends a sentence
# How it is shown
stream = True  # on a terminal, print text while it is written; False prints each sample when it is complete
interactive = False  # write together: what you type is continued, and then you go on; or talk, where it has learnt to
show_probs = False  # colour each token by how probable the model thought it
# How it is computed
batch_size = 32  # samples drawn together at most; fewer need less memory and are the same
quantize = ""  # 'int8' (CPUs) or 'bf16': a quarter or half of the bytes to read for a token; for large models
device = "auto"  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = "auto"  # 'auto', 'float32', 'bfloat16', 'float16'; float32 where quantize is set
compile = False  # torch.compile of the one-token pass; not measured on a GPU yet, does not pay on a CPU
config = configure(globals())

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from math import exp
from pathlib import Path

import checkpoint
from chat import ChatTokenizer, Message
from decoder import Decoder
from device import autocast, can_compile, memory_error_told, try_compiled
from generate import Piece, Sampling, prompt_ids, titled
from generate import stream as stream_pieces
from model import GPT
from tokenizer import Tokenizer

SEPARATOR = "---------------"
# backgrounds of the 256-colour palette for tokens that were at least this probable
COLOURS = ((0.7, 157), (0.3, 193), (0.1, 229), (0.01, 223), (0.0, 217))


def check_stdin() -> None:
    if sys.stdin is None:
        raise UserError("stdin is closed, so there is nothing to read")


def read_prompt(start: str) -> str:
    """The prompt itself, the text of the file that FILE:path names, or stdin's for -."""
    if start != "-" and not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    name = "stdin" if start == "-" else f"FILE:{path}"
    try:
        if start != "-":
            return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        check_stdin()
        text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
        return text.removesuffix("\n")  # which `echo` adds
    except OSError as error:
        raise UserError(f"start={name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"start={name} is not UTF-8 (byte {error.start}): save it as UTF-8") from None


class Shown:
    """Prints samples in their order, the one in turn piece by piece where `live`; counts and times their tokens."""

    def __init__(self, live: bool, coloured: bool):
        self.live, self.coloured = live, coloured
        self.tokens, self.seconds, self.first_after = 0, 0.0, 0.0
        self.texts: list[str] = []  # what was written last, without the prompts

    def show(self, prompts: list[str], pieces: Iterable[Piece], separator: str = f"\n{SEPARATOR}\n") -> None:
        """Prints each prompt with what the pieces make of it."""
        self.texts, unseen = [""] * len(prompts), list(prompts)
        finished, turn, started, waited = set(), 0, time.perf_counter(), 0.0
        try:
            for piece in pieces:
                waited = waited or time.perf_counter() - started
                self.tokens += len(piece.tokens)
                self.texts[piece.row] += piece.text
                unseen[piece.row] += self.painted(piece)
                if piece.finished:
                    finished.add(piece.row)
                while turn < len(prompts) and (self.live or turn in finished):
                    print(unseen[turn], end="", flush=self.live)
                    unseen[turn] = ""
                    if turn not in finished:
                        break
                    print(end=separator)
                    turn += 1
        finally:
            self.seconds += time.perf_counter() - started
            self.first_after = self.first_after or waited

    def painted(self, piece: Piece) -> str:
        """The piece's text, where coloured on a background by the mean probability of its tokens."""
        if not (self.coloured and piece.text):
            return piece.text
        p = exp(sum(token.logprob for token in piece.tokens) / len(piece.tokens))
        colour = next(colour for least, colour in COLOURS if p >= least)
        lines = piece.text.split("\n")
        return "\n".join(f"\x1b[30;48;5;{colour}m{line}\x1b[0m" if line else "" for line in lines)

    def legend(self) -> str:
        words = [f"from {least:.0%}" if least else f"below {COLOURS[-2][0]:.0%}" for least, _ in COLOURS]
        shown = [f"\x1b[30;48;5;{colour}m {word} \x1b[0m" for word, (_, colour) in zip(words, COLOURS, strict=True)]
        return f"a token's probability: {' '.join(shown)}"

    def speed(self) -> str:
        return (
            f"{self.tokens:,} tokens in {self.seconds:.2f} s: {self.tokens / max(self.seconds, 1e-9):,.1f} tokens/s, "
            f"the first after {self.first_after:.2f} s"
        )


def note_dropped(model: GPT, tokenizer: Tokenizer, prompt: str | list[int]) -> None:
    """Says what the model does not see of a prompt longer than its context; UserError where the prompt cannot be."""
    ids, block_size = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt, model.config.block_size
    if len(ids) > block_size:
        unseen = len(ids) - block_size
        note(
            f"note: the prompt has {len(ids):,} tokens and the model's context holds {block_size:,}: it does not see "
            f"the first {unseen:,}, up to {tokenizer.decode(ids[max(0, unseen - 20) : unseen])[-20:]!r}"
        )


def compiles(c: Config, model: GPT, ctx) -> bool:
    """Whether the one-token pass is compiled: tried once, for this many samples."""
    if not (c.compile and can_compile(c.device)):
        return False

    def probe() -> None:
        rows = 1 if c.interactive else min(c.num_samples, c.batch_size)
        with ctx:
            decoder = Decoder(model, rows, model.config.block_size, compiled=True)
            decoder.prefill([[0]] * rows)
            decoder.decode([0] * rows)

    if model.config.block_size > 1:
        try_compiled(probe)
    return True


def typed(hint: str) -> Iterator[str]:
    """The lines that are typed, until the end of stdin."""
    check_stdin()
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no text in the terminal's encoding is told as that
    with suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited, and earlier ones come back
    note(hint)
    with suppress(EOFError):
        while True:
            yield input("> ")
    print()


def write_together(text: str, begin: Callable[[str, int], Iterable[Piece]], shown: Shown) -> None:
    """What is typed is appended to the text, the model goes on from there, and again; `begin` gives the pieces of a
    text's continuation in this turn."""
    lines = typed("Type a beginning. Enter: the model goes on. /new: another text. Ctrl-C: end its turn. Ctrl-D: end.")
    if text:
        print(text)
    for turn, line in enumerate(lines):
        if line == "/new":
            text = ""
            continue
        try:
            with suppress(KeyboardInterrupt):
                shown.show([""], begin(text + line, turn), separator="\n")
            text += line + shown.texts[0]
        except UserError as error:
            note(f"{error}")


def talk(system: list[Message], begin: Callable[[list[Message], int], Iterable[Piece]], shown: Shown) -> None:
    """What is typed is a question, the model answers, and again; `begin` gives the pieces of the answer to what was
    said in this turn."""
    said = list(system)
    lines = typed("Ask something. /new: another conversation. Ctrl-C: end its turn. Ctrl-D: end.")
    for turn, line in enumerate(map(str.strip, lines)):
        if line == "/new":
            said = list(system)
        if line in ("/new", ""):
            continue
        asked = [*said, {"role": "user", "content": line}]
        try:
            with suppress(KeyboardInterrupt):
                shown.show([""], begin(asked, turn), separator="\n")
            said = [*asked, {"role": "assistant", "content": shown.texts[0]}]
        except UserError as error:
            note(f"{error}")


@memory_error_told("lower batch_size or max_new_tokens, take a smaller model, or --quantize=bf16")
def main(c: Config) -> None:
    sampling = Sampling(**{field.name: getattr(c, field.name) for field in fields(Sampling)})
    for key in ("num_samples", "batch_size"):
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")
    if c.interactive and c.start == "-":
        raise UserError("start=- and interactive cannot share stdin: put the prompt into a file, --start=FILE:path")
    model, tokenizer, template = checkpoint.open_model(c)
    chats = isinstance(tokenizer, ChatTokenizer)
    if (c.ask or c.system) and not chats:
        raise UserError("ask and system are for a model that was fine-tuned on conversations, see data/instruct")
    if c.ask or c.interactive and chats:
        if ignored := [key for key in ("start", "title", *["ask"] * c.interactive) if key in c.given]:
            raise UserError(f"{ignored[0]} does not go together with {'interactive' if c.interactive else 'ask'}")
        sampling = replace(sampling, stop=[*sampling.stop, *tokenizer.special])  # nobody else speaks in an answer
    elif c.system:
        raise UserError("system comes before a question: give one with --ask, or --interactive")
    system = [{"role": "system", "content": c.system}] if c.system else []

    def opening(messages: list[Message]) -> list[int]:
        room = model.config.block_size
        return tokenizer.opening(messages, room - min(sampling.limit, room // 2))

    start = shown_start = ""
    if c.ask:
        start = opening([*system, {"role": "user", "content": c.ask}])
    elif c.title:
        start = shown_start = titled(template, c.title) + (read_prompt(c.start) if "start" in c.given else "")
    elif "start" in c.given or not c.interactive:
        start = shown_start = read_prompt(c.start)
    if start or not c.interactive:
        note_dropped(model, tokenizer, start)
    ctx = autocast(c.device, c.dtype)
    how = {"logprobs": 0 if c.show_probs else None, "compiled": compiles(c, model, ctx)}
    live = c.interactive or c.stream and sys.stdout.isatty()
    shown = Shown(live, c.show_probs)
    if c.show_probs:
        note(shown.legend())

    def pieces(prompts: Sequence[str | list[int]], first: int) -> Iterable[Piece]:
        return stream_pieces(model, tokenizer, prompts, sampling, first=first, **how)

    with ctx:
        if c.interactive and chats:
            talk(system, lambda messages, turn: pieces([opening(messages)], turn), shown)
        elif c.interactive:
            write_together(start, lambda text, turn: pieces([text], turn), shown)
        else:
            for first in range(0, c.num_samples, c.batch_size):
                rows = min(c.batch_size, c.num_samples - first)
                shown.show([shown_start] * rows, pieces([start] * rows, first))
    note(shown.speed())


if __name__ == "__main__":
    run(main, config)
