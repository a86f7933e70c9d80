"""Every command of data/README.md, run as it stands there on small corpora of the same forms; the Hub's are parsed."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from test_end_to_end import SMALL_TRAIN, commands, keys_parse

RECORDS = {
    "news2016zh_{}.json": lambda n: {"news_id": str(n), "title": f"新闻{n}", "desc": "", "content": f"第{n}条。"},
    "baike_qa_{}.json": lambda n: {"category": "生活", "title": f"问{n}？", "desc": "", "answer": f"答{n}。"},
    "web_text_zh_{}.json": lambda n: {"qid": n, "title": f"问{n}？", "desc": "", "star": n, "content": f"答{n}。"},
    "translation2019zh_{}.json": lambda n: {"english": f"Sentence {n}.", "chinese": f"第{n}句。"},
}  # fmt: skip


def corpora(folder: Path) -> None:
    for name, record in RECORDS.items():
        for part, numbers in (("train", range(60)), ("valid", range(60, 80))):
            lines = [json.dumps(record(n), ensure_ascii=False) for n in numbers]
            (folder / name.format(part)).write_text("\n".join(lines), encoding="utf-8")
    files = {
        f"novels/{n}.txt": ("却说刘姥姥进了大观园。" * 9 + str(n), ("utf-8", "gb18030", "utf-16")[n % 3])
        for n in range(9)
    }
    files |= {f"THUCNews/体育/{n}.txt": (f"标题{n}\n　　第一段。\n　　第二段。\n", "utf-8") for n in range(30)}
    header = "---\n标题：{0}\n日期：2020-01-01\n作者：无名\n---\n作文{0}。\n"
    files |= {f"essays/{n}.txt": (header.format(n), "utf-8") for n in range(30)}
    for n in range(2):
        lines = [
            {"id": str(i), "url": "", "title": f"词{i}", "text": f"词{i}\n\n" + "条目。" * 40} for i in range(n, 60, 2)
        ]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
        files[f"wiki_zh/A{n}/wiki_0{n}"] = text, "utf-8"
    files["novel.txt"] = (
        "".join(f"第{n}回，却说刘姥姥进了大观园，见了许多没见过的东西。\n" for n in range(300)),
        "utf-8",
    )
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好，我是微GPT。"}]
    files["chats.jsonl"] = (json.dumps({"messages": chat}, ensure_ascii=False) + "\n") * 2, "utf-8"
    files["poems.txt"] = "床前明月光，疑是地上霜。\n" * 30, "utf-8"
    for name, (text, encoding) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding=encoding)


def conversations(folder: Path) -> list[str]:
    """The examples, by the masks, as text with the marks spelled out."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    table = [*meta["base"]["chars"], *[f"<{b:02X}>" for b in range(256)], "<E>", "<S>", "<U>", "<A>"]
    found = []
    for split in ("train", "val"):
        ids, marks = np.fromfile(folder / f"{split}.bin", "<u2"), np.fromfile(folder / f"{split}.mask", np.uint8)
        found += np.split(ids, np.flatnonzero(marks & 2)[1:])
    return sorted("".join(table[id] for id in ids) for ids in found)


def documents(folder: Path) -> list[str]:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    table = [*meta["chars"], *[f"<{b:02X}>" for b in range(256)], "\0"]
    ids = np.concatenate([np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val")])
    return sorted("".join(table[id] for id in ids).split("\0")[:-1])


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are for a POSIX shell")
def test_every_recipe(tmp_path):
    clone = tmp_path / "weiGPT"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "out*", "wandb", "__pycache__", "*.bin", "*.mask", "meta.*", "input.txt", ".*_cache"
    )
    shutil.copytree(ROOT, clone, ignore=ignored)
    corpora(clone)
    has_tokenizers = importlib.util.find_spec("tokenizers") is not None
    assert commands("data/README.md") == commands("data/README.zh.md")
    for command in commands("data/README.md"):
        script, *words = shlex.split(command.removeprefix("python "))
        if "data/hf" in script:
            keys_parse(command, clone)
            continue
        if not has_tokenizers and re.search("bpe|compare", command):
            continue
        words += shlex.split(SMALL_TRAIN) if script == "train.py" else []
        words += ["--vocab_size=300"] if "chinese_bpe" in script else []
        done = run_script(clone / script, *words, cwd=clone)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{command}\n{done.stdout}\n{done.stderr}"
    data = clone / "data"
    questions = (data / "my_endings" / "val.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(len(json.loads(question)["choices"]) == 4 for question in questions) and len(questions) > 50
    numbers = range(80)
    assert conversations(data / "chats") == ["<U>你好<A>你好，我是微GPT。<E>"] * 2
    assert conversations(data / "answers") == sorted(f"<U>问{n}？<A>答{n}。<E>" for n in numbers)
    assert conversations(data / "advice") == sorted(f"<U>问{n}？<A>答{n}。<E>" for n in numbers if n >= 10)
    assert conversations(data / "translate") == sorted(f"<U>翻译成中文：Sentence {n}.<A>第{n}句。<E>" for n in numbers)
    asked = "给下面的文章起一个标题：\n"
    assert conversations(data / "titles") == sorted(f"<U>{asked}第{n}条。<A>新闻{n}<E>" for n in numbers)
    assert documents(data / "wiki") == sorted(f"《词{n}》\n" + "条目。" * 40 for n in range(60))
    assert documents(data / "news") == sorted(f"《新闻{n}》\n第{n}条。" for n in numbers)
    assert documents(data / "baike") == sorted(f"《问{n}？》\n答{n}。" for n in numbers)
    assert documents(data / "webtext") == sorted(f"《问{n}？》\n答{n}。" for n in numbers if n >= 10)
    assert documents(data / "en_zh") == sorted(f"Sentence {n}.\n第{n}句。" for n in numbers)
    assert documents(data / "sentences") == sorted(f"第{n}句。" for n in range(60))
    assert documents(data / "thucnews") == sorted(f"《标题{n}》\n　　第一段。\n　　第二段。" for n in range(30))
    assert documents(data / "essays") == sorted(f"《{n}》\n作文{n}。" for n in range(30))
    assert documents(data / "novels") == sorted("却说刘姥姥进了大观园。" * 9 + str(n) for n in range(9))
