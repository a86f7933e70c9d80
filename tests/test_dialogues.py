import gzip
import json
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, TINY_ARGS, run_script, torchrun
from test_train import RUN, assert_same_state, figures

import checkpoint
from chat import ChatTokenizer
from configurator import Config, UserError
from dialogues import DIRECTIONS, Dialogues, open_dialogues
from documents import Found
from generate import Sampling, continuations
from loader import open_split
from packing import BEGINS, LEARNT, Examples
from tokenizer import load_tokenizer

SYLLABLES = "天地人日月山水火土木金石田禾"


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def reader(path, **keys) -> Dialogues:
    defaults = {"format": "auto", "fields": "", "direction": "both", "min_star": 0.0, "encoding": "auto"}
    return open_dialogues([str(path)], Config(**(defaults | {"errors": "stop"} | keys)))


def said(path, **keys):
    """[(role: content, ...)] of all conversations, and what was found."""
    found = Found(quiet=True)
    groups = list(reader(path, **keys).read(found=found))
    return [[f"{m['role']}: {m['content']}" for m in messages] for group in groups for messages in group], found


def qa(question, answer):
    return [f"user: {question}", f"assistant: {answer}"]


MESSAGES = [
    {"role": "system", "content": "短"},
    {"role": "user", "content": "甲"},
    {"role": "assistant", "content": "乙"},
]
FORMS = {
    "prompt": ({"prompt": " 一加一？ ", "response": "二\r\n", "id": 3}, [qa("一加一？", "二")]),
    "system": (
        {"prompt": "问", "response": "答", "system": "你是老师"},
        [["system: 你是老师", "user: 问", "assistant: 答"]],
    ),
    "messages": ({"messages": MESSAGES}, [["system: 短", "user: 甲", "assistant: 乙"]]),
    "conversations of roles": (
        {"conversations": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]},
        [qa("甲", "乙")],
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "甲"}, {"from": "gpt", "value": "乙"}]},
        [qa("甲", "乙")],
    ),
    "instruction": ({"instruction": "翻译", "input": "cat", "output": "猫"}, [qa("翻译\ncat", "猫")]),
    "no input": ({"instruction": "说", "input": "", "output": "好"}, [qa("说", "好")]),
    "baike2018qa": (
        {"qid": "1", "category": "生活", "title": "冬天？", "desc": "冬天？", "answer": "冷"},
        [qa("冬天？", "冷")],
    ),
    "webtext2019zh": ({"title": "围棋？", "desc": "细说", "star": 3, "content": "会"}, [qa("围棋？\n细说", "会")]),
    "translation2019zh": (
        {"english": "A cat.", "chinese": "一只猫。"},
        [qa("翻译成中文：A cat.", "一只猫。"), qa("翻译成英文：一只猫。", "A cat.")],
    ),
    "news2016zh": (
        {"title": "大雪", "keywords": "雪", "content": "昨天下雪。"},
        [qa("给下面的文章起一个标题：\n昨天下雪。", "大雪")],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_recognised_and_read(name, tmp_path):
    record, wanted = FORMS[name]
    assert said(write(tmp_path / "a.jsonl", [record, record]))[0] == wanted * 2


@pytest.mark.skipif(not (SHARED / "data" / "formats").is_dir(), reason="the corpora's example records are not here")
def test_real_records_of_the_corpora():
    folder = SHARED / "data" / "formats"
    for name, begins, answers in (
        ("baike2018qa_example.jsonl", "user: 冬天进补好一些呢，还是夏天进步好啊？", "assistant: 你好！\n"),
        (
            "webtext2019zh_example.jsonl",
            "user: AlphaGo只会下围棋吗？阿法狗能写小说吗？\n那么现在",
            "assistant: AlphaGo只会",
        ),
        ("news2016zh_example.jsonl", "user: 给下面的文章起一个标题：\n近日有网友", "assistant: 故宫淡季门票40元"),
    ):
        (conversation,), _ = said(folder / name)
        assert conversation[0].startswith(begins) and conversation[1].startswith(answers), conversation
    pairs, found = said(folder / "translation2019zh_head.json")
    assert len(pairs) == 2 * 59 and found.malformed == 1  # line 28, as in the wild
    assert pairs[0] == qa(
        "翻译成中文：What body changes occur when the sperm whale dives?", "巨头鲸潜入水中时，身体会发生什么变化？"
    )


def test_one_direction_stars_and_fields(tmp_path):
    pair = write(tmp_path / "a.jsonl", [FORMS["translation2019zh"][0]])
    for direction, wanted in zip(DIRECTIONS[1:], FORMS["translation2019zh"][1], strict=True):
        assert said(pair, direction=direction)[0] == [wanted]
    stars = write(tmp_path / "b.jsonl", [FORMS["webtext2019zh"][0] | {"star": n} for n in (1, 5, 9)])
    found, counted = said(stars, min_star=5)
    assert len(found) == 2 and counted.few_stars == 1
    other = write(tmp_path / "c.jsonl", [{"q": "甲", "more": "乙", "a": "丙"}])
    assert said(other, fields="q,more,a")[0] == [qa("甲\n乙", "丙")]
    with pytest.raises(UserError, match="--fields=question,answer"):
        said(other)


def test_files_of_all_kinds(tmp_path):
    rows = [("问题，一", "答案"), ("二", '有"引号"')]
    wanted = [qa(*row) for row in rows]
    records = [dict(zip(("prompt", "response"), row, strict=True)) for row in rows]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    (tmp_path / "a.jsonl").write_bytes(text.encode("gb18030"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(records, indent=1), encoding="utf-16")
    (tmp_path / "d.csv").write_text('prompt,response\n"问题，一",答案\n二,"有""引号"""\n', encoding="utf-8")
    (tmp_path / "e.tsv").write_text('prompt\tresponse\n问题，一\t答案\n二\t有"引号"\n', encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.tsv"):
        assert said(tmp_path / name)[0] == wanted, name
    assert said(tmp_path)[0] == wanted * 5
    if pytest.importorskip("pyarrow"):
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(records), tmp_path / "f.parquet")
        assert said(tmp_path / "f.parquet")[0] == wanted


BROKEN = [
    {"prompt": "甲"}, {"prompt": "", "response": "乙"}, {"prompt": "甲", "response": " \n"}, ["甲", "乙"],
    {"prompt": ["甲"], "response": "乙"}, {"prompt": "甲", "response": "\ud800"},
]  # fmt: skip
BROKEN_MESSAGES = [
    {"messages": "甲"}, {"messages": [{"role": "teacher", "content": "甲"}]}, {"messages": MESSAGES[:2]},
    {"messages": [MESSAGES[2]]}, {"messages": []}, {"messages": [*MESSAGES, {"role": "user"}]},
]  # fmt: skip


def test_what_is_malformed_is_left_out_and_told(tmp_path):
    good = FORMS["prompt"][0]
    lines = "".join(json.dumps(r) + "\n" for r in [good, *BROKEN]) + "{broken\n"
    (tmp_path / "a.jsonl").write_text(lines)
    found, counted = said(tmp_path / "a.jsonl")
    assert found == FORMS["prompt"][1] and counted.malformed == len(BROKEN) + 1
    found, counted = said(write(tmp_path / "b.jsonl", [FORMS["messages"][0], *BROKEN_MESSAGES]))
    assert found == FORMS["messages"][1] and counted.malformed == len(BROKEN_MESSAGES)


def prepare(folder, *args):
    return run_script("data/instruct/prepare.py", *args, f"--dest={folder / 'd'}", cwd=folder)


def test_bins_and_masks_are_the_conversations(tmp_path):
    records = [{"prompt": f"第{i}问", "response": f"答{i * i}"} for i in range(300)]
    done = prepare(tmp_path, f"--input={write(tmp_path / 'a.jsonl', records)}")
    assert done.returncode == 0 and "round trip: identical" in done.stdout, done.stderr
    tokenizer = load_tokenizer(tmp_path / "d")
    meta = json.loads((tmp_path / "d" / "meta.json").read_text(encoding="utf-8"))
    assert meta["kind"] == "chat" and meta["special"]["<|user|>"] == meta["vocab_size"] - 2 and "layout" in meta
    texts = []
    for split in ("train", "val"):
        data = open_split(tmp_path / "d", split, 8)
        begins = np.flatnonzero(data.marks & BEGINS)
        for ids, marks in zip(np.split(data.ids, begins[1:]), np.split(data.marks, begins[1:]), strict=True):
            text = tokenizer.decode(ids)
            answer = text.partition("<|assistant|>")[2]
            assert tokenizer.decode(ids[marks & LEARNT > 0]) == answer and answer.endswith("<|endoftext|>")
            texts.append((split, text))
    wanted = {f"<|user|>{r['prompt']}<|assistant|>{r['response']}<|endoftext|>" for r in records}
    assert {text for _, text in texts} == wanted and len(texts) == 300
    held_out = {text for split, text in texts if split == "val"}
    assert 10 < len(held_out) < 60
    # what is added moves no record from one split to the other
    more = [*records[::-1], *({"prompt": f"又{i}", "response": "好"} for i in range(100))]
    assert prepare(tmp_path, f"--input={write(tmp_path / 'a.jsonl', more)}", "--dedup").returncode == 0
    data = open_split(tmp_path / "d", "val", 8)
    tokenizer = load_tokenizer(tmp_path / "d")
    assert held_out == {text for text in held_out if text in tokenizer.decode(data.ids)}
    # a text in the same folder takes the masks away
    (tmp_path / "t.txt").write_text("从前有一个人。\n" * 50, encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=t.txt", "--dest=d", cwd=tmp_path)
    assert done.returncode == 0 and not list((tmp_path / "d").glob("*.mask")), done.stderr
    assert not isinstance(open_split(tmp_path / "d", "train", 8), Examples)


def test_the_same_twice_once_and_validation_files_of_ones_own(tmp_path):
    records = [{"prompt": f"第{i % 50}问", "response": "答"} for i in range(100)]
    a, b = write(tmp_path / "a.jsonl", records), write(tmp_path / "b.jsonl", [{"prompt": "别的", "response": "好"}])
    done = prepare(tmp_path, f"--input={a}", f"--val_input={b}", "--dedup")
    assert done.returncode == 0 and "left out: 50 seen before" in done.stdout, done.stderr
    assert "50                1               51" in done.stdout
    two = write(tmp_path / "c.jsonl", records[:2])
    assert prepare(tmp_path, f"--input={two}").returncode == 0  # one for each split, whatever their hashes


def test_a_bpe_and_a_model_s_own_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    records = [{"prompt": f"今天是几月几日？第{i}次", "response": "今天是三月八日。"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", records)
    assert prepare(tmp_path, f"--input={path}", "--tokenizer=bpe", "--vocab_size=300").returncode == 0
    first = load_tokenizer(tmp_path / "d")
    assert first.base.kind == "bpe" and first.base.vocab_size <= 300
    shutil.move(tmp_path / "d", tmp_path / "first")
    done = prepare(tmp_path, f"--input={path}", f"--tokenizer={tmp_path / 'first'}")
    assert done.returncode == 0 and load_tokenizer(tmp_path / "d") == first, done.stderr


MISTAKES = {
    "no file": (["--input=none.jsonl"], "none.jsonl"),
    "plain text": (["--input=t.txt"], "plain text"),
    "no such format": (["--input=a.jsonl", "--format=alpaca"], "--format=alpaca"),
    "no such direction": (["--input=a.jsonl", "--direction=de-zh"], "--direction=de-zh"),
    "no such format of nothing": (["--format=alpaca"], "--format=alpaca"),
    "a format of nothing": (["--format=baike2018qa"], "--format is about --input"),
    "one field": (["--input=a.jsonl", "--fields=prompt"], "--fields=prompt"),
    "a layout without an end": (["--input=a.jsonl", "--assistant=A{content}"], "<|endoftext|>"),
    "too much is malformed": (["--input=b.jsonl"], "--max_bad"),
    "fields of nothing known": (["--input=c.jsonl"], "--fields=question,answer"),
    "a vocabulary that lacks a character": (["--input=a.jsonl", "--tokenizer=v"], "byte_fallback"),
    "nothing": (["--input=e.jsonl"], "no conversation"),
    "one record": (["--input=f.jsonl"], "one record"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(name, tmp_path):
    keys, words = MISTAKES[name]
    write(tmp_path / "a.jsonl", [FORMS["prompt"][0]] * 9)
    write(tmp_path / "b.jsonl", [FORMS["prompt"][0]] * 9 + [{"prompt": ""}] * 3)
    write(tmp_path / "c.jsonl", [{"x": "y"}])
    write(tmp_path / "e.jsonl", [])
    write(tmp_path / "f.jsonl", [FORMS["prompt"][0]])
    (tmp_path / "t.txt").write_text("从前" * 50, encoding="utf-8")
    if "v" in keys[-1][-1:]:
        done = run_script("data/chinese/prepare.py", "--input=t.txt", "--byte_fallback=False", "--dest=v", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = prepare(tmp_path, *keys)
    lines = [
        line for line in done.stderr.splitlines() if "malformed, left out" not in line and "overriding" not in line
    ]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr
    assert not (tmp_path / "d").exists()


def follow(n, seed):
    """Instructions about random syllables, and what is right."""
    rng, found = random.Random(seed), {}
    while len(found) < n:
        word, kind = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 5))), rng.randint(0, 2)
        asked, right = [("照着说：", word), ("倒着说：", word[::-1]), ("第一个字：", word[0])][kind]
        found[asked + word] = right
    return [{"prompt": asked, "response": right} for asked, right in found.items()]


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    """A folder with a dataset of instructions, d, and a small model that has learnt to follow them, out; and what it
    was not shown."""
    folder = tmp_path_factory.mktemp("instructed")
    records = follow(6000, 0)
    shown, held_out = records[200:], records[:200]
    keys = [f"--input={write(folder / 'a.jsonl', shown)}", f"--val_input={write(folder / 'b.jsonl', held_out)}"]
    assert prepare(folder, *keys, "--byte_fallback=False").returncode == 0
    newer = "--act=relu2 --pos=rope --norm=rmsnorm --qk_norm --tied=False --zero_init --smear=2 --optim=muon"
    how = "--learning_rate=0.01 --warmup_iters=0 --lr_schedule=linear --min_lr=0 --weight_decay=0 --eval_interval=0"
    done = run_script(
        "train.py", *TINY_ARGS, "--dataset=d", *newer.split(), *how.split(), "--n_embd=64", "--n_head=4",
        "--block_size=64", "--batch_size=16", "--gradient_accumulation_steps=1", "--max_iters=250",
        "--lr_decay_iters=250", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, held_out, done.stdout


def test_a_small_model_learns_to_follow(instructed):
    folder, held_out, printed = instructed
    path, state = checkpoint.best(str(folder / "out"))
    model, tokenizer = checkpoint.model_of(state, path).eval(), checkpoint.tokenizer_of(state, path)
    assert isinstance(tokenizer, ChatTokenizer)
    prompts = [tokenizer.opening([{"role": "user", "content": r["prompt"]}], 64) for r in held_out]
    answers = continuations(model, tokenizer, prompts, Sampling(max_new_tokens=10, temperature=0))
    right = sum(answer == r["response"] for answer, r in zip(answers, held_out, strict=True))
    assert right > 0.9 * len(held_out), right
    assert "5,800 examples in" in printed and "% full" in printed


def test_it_is_asked_from_the_command_line(instructed):
    folder, *_ = instructed
    asked = ["照着说：天水", "倒着说：山土人"]
    for question, answer in zip(asked, ("天水", "人土山"), strict=True):
        done = run_script("sample.py", f"--ask={question}", "--num_samples=2", "--temperature=0", cwd=folder)
        assert done.stdout == f"{answer}\n---------------\n" * 2, (done.stdout, done.stderr)
    for keys, words in (
        (["--ask=a", "--start=b"], "start does not go together with ask"),
        (["--ask=a", "--interactive"], "ask does not go together with interactive"),
        (["--interactive", "--title=b"], "title does not go together with interactive"),
        (["--system=b"], "system comes before a question"),
    ):
        done = run_script("sample.py", *keys, cwd=folder, input="")
        assert done.returncode == 2 and words in done.stderr, done.stderr
    typed = f"{asked[0]}\n \n/new\n{asked[1]}\n"
    done = run_script("sample.py", "--interactive", "--temperature=0", cwd=folder, input=typed)
    assert done.returncode == 0 and done.stdout == "> 天水\n> > > 人土山\n> \n", (done.stdout, done.stderr)


def test_an_answer_ends_where_another_speaks(instructed, tmp_path):
    """A model that never ends its turn: its marks are likelier than all else."""
    path, state = checkpoint.best(str(instructed[0] / "out"))
    size, marks = state["model_args"]["vocab_size"], state["tokenizer"]["special"].values()
    state["model"]["lm_head.weight"] = torch.zeros(size, state["model_args"]["n_embd"])
    state["model"]["lm_head.weight"][max(marks)] = 9.0 * state["model"]["transformer.wte.weight"][max(marks)].sign()
    checkpoint.save(tmp_path / "ckpt.pt", state)
    done = run_script(
        "sample.py", "--out_dir=.", "--ask=照着说：天", "--num_samples=9", "--temperature=5", cwd=tmp_path
    )
    assert done.returncode == 0 and "<|" not in done.stdout, (done.stdout, done.stderr)


def test_a_text_joins_a_mixture_in_the_vocabulary_of_the_conversations(instructed, tmp_path):
    (tmp_path / "t.txt").write_text(SYLLABLES * 40, encoding="utf-8")
    chat = instructed[0] / "d"
    for dest, tokenizer in (("own", "char"), ("theirs", chat)):
        keys = ["--input=t.txt", f"--dest={dest}", f"--tokenizer={tokenizer}"]
        assert run_script("data/chinese/prepare.py", *keys, cwd=tmp_path).returncode == 0
    for dataset in (f"own:1,{chat}:1", f"{chat}:1,own:1"):
        done = run_script("train.py", *TINY_ARGS, f"--dataset={dataset}", cwd=tmp_path)
        assert done.returncode == 2 and f"prepare own again, with --tokenizer={chat}" in done.stderr, done.stderr
    keys = [f"--dataset=theirs:1,{chat}:1", "--max_iters=3", "--gradient_accumulation_steps=2"]
    done = run_script("train.py", *TINY_ARGS, *keys, cwd=tmp_path)
    assert done.returncode == 0 and "5,800 examples in" in done.stdout, done.stderr


def test_asking_a_model_that_has_no_chat_is_told(tmp_path):
    (tmp_path / "t.txt").write_text("从前有一个人。\n" * 80, encoding="utf-8")
    assert run_script("data/chinese/prepare.py", "--input=t.txt", "--dest=d", cwd=tmp_path).returncode == 0
    assert run_script("train.py", *TINY_ARGS, "--dataset=d", "--max_iters=1", cwd=tmp_path).returncode == 0
    done = run_script("sample.py", "--ask=你好", cwd=tmp_path)
    assert done.returncode == 2 and "fine-tuned on conversations" in done.stderr


def test_a_run_on_examples_resumes_bit_for_bit_and_so_do_two_processes(instructed, tmp_path):
    data = f"--dataset={instructed[0] / 'd'}"
    keys = [*TINY_ARGS, data, *RUN, "--eval_interval=10"]
    for name, more in (("straight", []), ("parts", ["--max_iters=20"])):
        done = run_script("train.py", *keys, f"--out_dir={name}", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    resumed = ["--init_from=resume", "--out_dir=parts", "--max_iters=30", *TINY_ARGS[4:7]]
    done = run_script("train.py", *resumed, cwd=tmp_path)
    assert done.returncode == 0 and "no longer the one" not in done.stderr, done.stderr
    assert figures(tmp_path / "parts") == figures(tmp_path / "straight")
    assert_same_state(tmp_path / "parts", tmp_path / "straight")
    if sys.platform != "win32":
        done = torchrun(2, "train.py", *keys, "--out_dir=two", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for (i, loss, *_), (_, wanted, *_) in zip(
            figures(tmp_path / "two"), figures(tmp_path / "straight"), strict=True
        ):
            assert abs(loss - wanted) < 1e-4, i


def test_a_model_is_taught_to_talk_with_its_own_vocabulary(instructed, stories, tmp_path):
    """Its words keep their ids, the marks are added, and without a step nothing else has changed."""
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", "--max_iters=3", "--out_dir=base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = instructed[0] / "a.jsonl"
    done = run_script("data/instruct/prepare.py", f"--input={path}", "--tokenizer=base", "--dest=d", cwd=tmp_path)
    assert done.returncode == 0 and "new tokens: <|system|> (" in done.stdout, done.stderr
    keys = [*TINY_ARGS, "--init_from=base", "--dataset=d", "--learning_rate=0", "--decay_lr=False", "--max_iters=1"]
    done = run_script("train.py", *keys, "--always_save_checkpoint", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    old, new = (checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("base", "out"))
    size = old["model_args"]["vocab_size"]
    assert new["model_args"]["vocab_size"] == size + 3 and new["tokenizer"]["base"] == old["tokenizer"]
    for name, value in old["model"].items():
        assert torch.equal(new["model"][name][: len(value)], value), name
    other = run_script("data/instruct/prepare.py", f"--input={path}", "--dest=e", cwd=tmp_path)
    assert other.returncode == 0
    done = run_script("train.py", *TINY_ARGS, "--init_from=base", "--dataset=e", "--out_dir=x", cwd=tmp_path)
    assert done.returncode == 2 and "prepare it with --tokenizer=base" in done.stderr, done.stderr


def test_the_embedded_requests(tmp_path):
    """Without any input: requests out of the stories, each of which is whole on one side."""
    done = run_script("data/instruct/prepare.py", f"--dest={tmp_path}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    story = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8").split("\n\n")[0]
    title, first, *_ = story.split("\n")
    tokenizer = load_tokenizer(tmp_path)
    sides = SimpleNamespace(**{s: tokenizer.decode(open_split(tmp_path, s, 64).ids) for s in ("train", "val")})
    side = sides.train if first in sides.train else sides.val
    for text in (
        f"题目是{title}。<|assistant|>{first}<|endoftext|>",
        f"起个题目：{first}<|assistant|>{title}<|endoftext|>",
    ):
        assert text in side
    titles = {
        split: {part.partition("。<|")[0] for part in text.split("题目是")[1:]} for split, text in vars(sides).items()
    }
    assert len(titles["train"]) > 500 and len(titles["val"]) > 30 and not titles["train"] & titles["val"]
