"""Questions with their answers, or whole conversations, for fine-tuning: bins, and masks that say what is learnt.

    $ python data/instruct/prepare.py --tokenizer=out-demo                     # requests out of the embedded stories
    $ python data/instruct/prepare.py --input=chats.jsonl --tokenizer=out-demo --dest=data/chats
    $ python data/instruct/prepare.py --input=baike_qa_train.json --format=baike2018qa --tokenizer=out-chinese

A record has `prompt` and `response`, or `messages`, a list of {"role", "content"}, or is one of a known corpus. Only
what the assistant says is learnt. --tokenizer names the model that is to be fine-tuned: its vocabulary is kept, and
grows by the marks of the layout.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, configure, run

# what to read
input = []  # .jsonl, .json, .csv, .tsv, .parquet files, folders, patterns (repeat the key); default: out of the stories
val_input = []  # the corpus's own validation files, in place of val_fraction
format = "auto"  # by the fields, or 'messages', 'prompt', or the corpus: 'baike2018qa', 'webtext2019zh', ...
fields = ""  # of records in another form: the prompt's, then the response's, such as "question,answer"
direction = "both"  # of translation2019zh: 'en-zh', 'zh-en', or both as two examples
min_star = 0.0  # of webtext2019zh, only answers with so many
encoding = "auto"  # told from each file, or its name, such as gb18030
errors = "stop"  # at bytes that cannot be decoded: 'stop', or 'skip' the record
max_bad = "0.1%"  # malformed records are left out; more than this of them stop it
dedup = False  # leave out records that are the same, character by character, as an earlier one
# how it is written
system = "<|system|>{content}"  # what the model is told about its part; words like <|this|> become tokens of their own
user = "<|user|>{content}"  # a question
assistant = "<|assistant|>{content}<|endoftext|>"  # an answer; from {content} on, it is learnt
val_fraction = 0.1  # of the records, by their hash, for validation
tokenizer = (
    "char"  # the model's own: its out_dir, .pt file, Hugging Face folder, or 'gpt2'; or a new one: 'char', 'bpe'
)
vocab_size = 8192  # of 'bpe'
byte_fallback = True  # with 'char': 256 byte tokens, so that any text has tokens
min_count = 1  # with 'char': rarer characters take the byte tokens instead of one of their own
dest = ""  # the folder for the dataset; default: this folder
config = configure(globals())

import itertools
import re

import dialogues

SENTENCE = re.compile(r".+?[。！？]”?|.+?$")
SHORT = 115  # characters of several turns together: they fit into the demo's context of 128


def requests(story: str) -> list[list[dict[str, str]]]:
    """Conversations of one to three turns out of a story: begin one of this title, find a title, go on from a
    sentence."""
    title, *lines = story.split("\n")
    made = [(f"写一个故事的开头，题目是{title}。", lines[0]), (f"给这个故事起个题目：{lines[0]}", title)]
    for line in lines:
        sentences = SENTENCE.findall(line)
        pairs = zip(sentences[::2], sentences[1::2], strict=False)
        made += [(f"接着写：{before}", after) for before, after in pairs]
    conversations: list[list[dict[str, str]]] = []
    while made:
        turns = made[: 1 + len(conversations) % 3]
        while len(turns) > 1 and sum(map(len, itertools.chain(*turns))) > SHORT:
            turns.pop()
        del made[: len(turns)]
        said = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in turns]
        conversations.append(list(itertools.chain(*said)))
    return conversations


def main(config: Config) -> None:
    here = Path(__file__).resolve().parent
    dialogues.check(config)
    if config.input:
        source = dialogues.open_dialogues(config.input, config)
    else:
        stories = (here.parent / "chinese" / "stories_zh.txt").read_text(encoding="utf-8").strip().split("\n\n")
        source = dialogues.Dialogues(None, own=tuple(map(requests, stories)))
    dialogues.prepare(source, config, here)


if __name__ == "__main__":
    run(main, config)
