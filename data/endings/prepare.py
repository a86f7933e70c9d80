"""A Chinese multiple-choice task out of the embedded stories: which of four sentences ends the story that goes so?

    $ python data/endings/prepare.py                             # train.jsonl and val.jsonl
    $ python eval.py out-chinese --task=data/endings/val.jsonl --delimiter=

A row has `query`, the sentences before a story's last one, as many as 60 characters hold, `choices`, its own last one
and those of three other stories, and `gold`, the place of its own. So a context of 128 holds a question, one of 256
another one before it. val.jsonl has the stories that data/chinese/prepare.py keeps for
validation, which a model of them has not seen, and the wrong endings are of the same split.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[1:3]]
from configurator import Config, configure, run, user_errors

dest = ""  # the folder for the task's files; default: this folder
config = configure(globals())

import json
import os
import re

from corpus import DEFAULTS, Document, open_source
from model import derive_seed

ROOM = 60  # characters of a query
SENTENCE = re.compile(r"[^。！？…]+[。！？…]*”?")


def last_sentence(story: str) -> str:
    """The sentence that the story ends with, whole where it has a quotation in it, or is one of several sentences."""
    line, found = story.rpartition("\n")[2], ""
    for part in reversed(SENTENCE.findall(line)):
        found = part + found
        if found.count("“") == found.count("”") and found[0] not in "，、地的":  # what goes on behind a quotation
            break
    return found


def before_it(text: str) -> str:
    """The last sentences of what stands before an ending, no more than there is room for; at least one."""
    parts = re.findall(rf"(?:{SENTENCE.pattern})\n?", text)
    while len(parts) > 1 and sum(map(len, parts)) > ROOM:
        del parts[0]
    return "".join(parts)


def questions(stories: dict[int, str]) -> list[dict]:
    """Those of one split, whose stories come by their hashes, on which alone it depends which wrong endings a question
    has, and where the right one is."""
    endings, made = {number: last_sentence(story) for number, story in stories.items()}, []
    for number, own in endings.items():
        others = sorted(stories, key=lambda other: derive_seed("ending", number, other))
        choices = list(dict.fromkeys(endings[other] for other in others if endings[other] != own))[:3]
        gold = derive_seed("gold", number) % 4
        choices.insert(gold, own)
        made.append({"query": before_it(stories[number].removesuffix(own)), "choices": choices, "gold": gold})
    return made


def main(c: Config) -> None:
    here = Path(__file__).resolve().parent
    source = open_source([str(here.parent / "chinese" / "stories_zh.txt")], Config(document="blank"))
    splits: dict[str, dict[int, str]] = {"train": {}, "val": {}}
    document, story = Document(), ""
    for piece in source.read():
        if piece is not None:
            document.add(piece)
            story += piece
            continue
        number = document.number()
        splits["val" if number < DEFAULTS["val_fraction"] * 2**64 else "train"][number] = story
        document, story = Document(), ""
    folder = Path(c.dest or here)
    with user_errors(OSError, about=f"cannot write into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, stories in splits.items():
            path, made = folder / f"{name}.jsonl", questions(stories)
            beside = path.with_name(f"{path.name}.tmp")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            beside.write_text(text, encoding="utf-8", newline="\n")
            os.replace(beside, path)
            print(f"{path}: {len(made)} questions")


if __name__ == "__main__":
    run(main, config)
