"""eval.py as users run it, and its figures by hand."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS, run_script
from test_export import a_run, exported

import checkpoint
import eval as evaluation
from configurator import Config, UserError
from loader import open_split
from packing import BEGINS, LEARNT
from tokenizer import CharTokenizer, load_tokenizer

BY_HAND = CharTokenizer("ab好\n", byte_fallback=True, end_of_text=True)  # 261 tokens
DEFAULTS = vars(evaluation.config)


def figures(*args, cwd) -> list[dict]:
    """What eval.py --json prints, as any JSON parser has it."""
    done = run_script("eval.py", *args, "--device=cpu", "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout, parse_constant=refused)


def refused(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def here(**settings) -> list[dict]:
    """The same from inside this process."""
    c = Config(**(DEFAULTS | {"device": "cpu"} | settings))
    return [row for source in c.models for row in evaluation.evaluated(c, source, evaluation.tasks_of(c))]


def uniform(folder: Path, tokenizer=BY_HAND, **shape) -> Path:
    """A checkpoint of a model to which all tokens are equally likely."""
    model = a_run(folder, tokenizer, **shape)
    state = checkpoint.load(folder / "ckpt.pt")
    state["model"] = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    checkpoint.save(folder / "ckpt.pt", state)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with d/ and d2/, datasets of one vocabulary, out/, trained on d, and mixed/, as if on both."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert run_script("data/chinese/prepare.py", "--dest=d", cwd=folder).returncode == 0
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
    (folder / "some.txt").write_text(text[:4000], encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=some.txt", "--tokenizer=d", "--dest=d2", cwd=folder)
    assert done.returncode == 0, done.stderr
    done = run_script("train.py", *TINY_ARGS, "--max_iters=20", "--eval_interval=10", "--dataset=d", cwd=folder)
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(folder / "out" / "ckpt.pt")
    state["config"]["dataset"] = "d:3,d2:1"
    (folder / "mixed").mkdir()
    checkpoint.save(folder / "mixed" / "ckpt.pt", state)
    return folder


def test_bytes_and_characters_by_hand(tmp_path):
    uniform(tmp_path / "out")
    (tmp_path / "text.txt").write_text("a好bé\n" * 30, encoding="utf-8")  # 6 tokens, 8 bytes, 5 characters
    (row,) = here(models=[str(tmp_path / "out")], data=[str(tmp_path / "text.txt")])
    assert (row["tokens"], row["bytes"], row["characters"]) == (6 * 30 - 1, 8 * 30 - 1, 5 * 30 - 1)
    bits = math.log2(261)
    assert row["loss"] == pytest.approx(math.log(261), rel=1e-6) and row["perplexity"] == pytest.approx(261, rel=1e-5)
    assert row["bits_per_token"] == pytest.approx(bits, rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(bits * 179 / 239, rel=1e-6)
    assert row["bits_per_character"] == pytest.approx(bits * 179 / 149, rel=1e-6)
    assert row["accuracy"] == pytest.approx(29 / 179)  # the likeliest of equal ones is the first, which is a
    assert (row["stride"], row["block_size"], row["split"]) == (16, 32, None)


def test_what_ends_a_document_is_scored_and_has_no_text(tmp_path):
    uniform(tmp_path / "out")
    (tmp_path / "docs.txt").write_text("\n".join(["ab好", "ba", "好b", "aab", "bba", "a好好"] * 9), encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=docs.txt", "--document=line", "--val_fraction=0.5",
                      f"--tokenizer={tmp_path / 'out'}", "--dest=d", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = open_split(tmp_path / "d", "val", 1).ids[1:]
    text = "".join(BY_HAND.decode([id]) for id in ids if id != BY_HAND.end_of_text)
    assert len(text) < len(ids)
    (row,) = here(models=[str(tmp_path / "out")], data=[str(tmp_path / "d")], stride=5)
    assert (row["tokens"], row["bytes"], row["characters"]) == (len(ids), len(text.encode()), len(text))
    assert row["bits_per_character"] == pytest.approx(math.log2(261) * len(ids) / len(text), rel=1e-6)


def test_by_default_the_validation_split_that_it_was_trained_with(trained, monkeypatch):
    (row,) = figures(cwd=trained)
    ids = open_split(trained / "d", "val", 1).ids
    assert (row["model"], row["data"], row["split"], row["tokens"]) == ("out", "d", "val", len(ids) - 1)
    state = checkpoint.load(trained / "out" / "ckpt.pt")
    model, sums = checkpoint.model_of(state, "out").eval(), [0.0, 0]
    with torch.inference_mode():  # a plain loop over windows of 32, moved on by 16
        for begin in range(0, len(ids), 16):
            x = torch.from_numpy(ids[begin : begin + 32].astype(np.int64))
            first = 0 if begin == 0 else 15
            logits = model(x[None, :-1], x[None, 1:])[0][0, first:]
            sums[0] += torch.nn.functional.cross_entropy(logits, x[first + 1 :], reduction="sum").item()
            sums[1] += len(logits)
            if begin + 32 >= len(ids):
                break
    assert sums[1] == row["tokens"] and row["loss"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
    monkeypatch.chdir(trained)
    both = here(models=["mixed", "out"])
    assert [(r["model"], r["data"]) for r in both] == [("mixed", "d"), ("mixed", "d2"), ("out", "d")]
    assert both[2] == row | {"model": "out"}
    (train,) = here(models=["out"], data=["d2"], split="train")
    assert train["tokens"] == len(open_split(trained / "d2", "train", 1).ids) - 1


def test_names_are_as_the_user_wrote_them_and_columns_are_aligned(trained, tmp_path):
    (tmp_path / "甲").mkdir()
    for name in ("甲/模型", "b"):
        shutil.copytree(trained / "out", tmp_path / name)
    shutil.copytree(trained / "out", tmp_path / "b" / "模型")
    (tmp_path / "小说.txt").write_text("小白兔说：" * 50, encoding="utf-8")
    names = ["甲/模型", "b/模型", "b/模型", f"{tmp_path}/b/ckpt.pt"]
    done = run_script("eval.py", *names, "--data=小说.txt", "--device=cpu", "--batch_size=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.rstrip("\n").split("\n")
    assert head.split() == ["model", "data", *evaluation.TEXT_COLUMNS]
    assert [line.split()[0] for line in lines] == names and all(line.split()[1] == "小说.txt" for line in lines)
    assert len({evaluation.width(line) for line in (head, *lines)}) == 1
    assert len({tuple(line.split()[2:]) for line in lines}) == 1 and evaluation.width("小说.txt") == 8
    assert "tqdm" not in done.stderr and "%|" not in done.stderr  # no bar where stderr is no terminal


def test_other_encodings_have_the_same_figures(trained, tmp_path):
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[:2000]
    for name, encoding in (("a", "utf-8"), ("b", "gb18030"), ("c", "utf-16"), ("d", "utf-8-sig")):
        (tmp_path / f"{name}.txt").write_bytes(text.replace("\n", "\r\n" if name == "b" else "\n").encode(encoding))
    found = here(models=[str(trained / "out")], data=[str(tmp_path / f"{name}.txt") for name in "abcd"])
    assert len({(row["loss"], row["tokens"], row["bytes"]) for row in found}) == 1 and found[0]["characters"] == 1999
    assert found[0]["bytes"] == len(text.encode()) - 3


@pytest.mark.parametrize("json_asked", [False, True])
def test_what_is_measured_is_shown_before_a_later_model_fails(tmp_path, capsys, json_asked):
    good, bad = uniform(tmp_path / "good"), uniform(tmp_path / "bad")
    state = checkpoint.load(bad / "ckpt.pt")
    state["model"]["transformer.ln_f.bias"][0] = math.nan
    checkpoint.save(bad / "ckpt.pt", state)
    (tmp_path / "text.txt").write_text("ab" * 30, encoding="utf-8")
    asked = {"device": "cpu", "models": [str(good), str(bad)], "data": [str(tmp_path / "text.txt")], "json": json_asked}
    with pytest.raises(UserError, match=f"{bad}: the model's logits are not finite"):
        evaluation.main(Config(**(DEFAULTS | asked)))
    out = capsys.readouterr().out
    shown = [row["model"] for row in json.loads(out)] if json_asked else [out.split("\n")[1].split()[0]]
    assert shown == [str(good)]
    row = {"context": "ab", "continuation": "ab" * 30}
    (tmp_path / "task.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match="task.jsonl, line 1: an answer has"):
        evaluation.main(Config(**(DEFAULTS | asked | {"models": [str(good)], "task": [str(tmp_path / "task.jsonl")]})))
    assert str(good) in capsys.readouterr().out


def test_a_model_is_named_as_for_sample_py_too(tmp_path, capsys):
    folder = uniform(tmp_path / "out")
    (tmp_path / "text.txt").write_text("ab" * 30, encoding="utf-8")
    asked = {"device": "cpu", "json": True, "data": [str(tmp_path / "text.txt")]}
    shown = []
    for how in ({"models": [str(folder)]}, {"init_from": str(folder)}, {"out_dir": str(folder)}):
        evaluation.main(Config(**(DEFAULTS | asked | how)))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2] and str(folder) in shown[0]


def test_an_infinite_perplexity_is_null_in_json(tmp_path, capsys):
    folder = uniform(tmp_path / "out")
    state = checkpoint.load(folder / "ckpt.pt")
    state["model"]["transformer.ln_f.bias"][0] = 1.0  # logits of 1000 for one token, of 0 for the others
    state["model"]["transformer.wte.weight"][7, 0] = state["model"]["lm_head.weight"][7, 0] = 1000.0
    checkpoint.save(folder / "ckpt.pt", state)
    (tmp_path / "text.txt").write_text("ab" * 30, encoding="utf-8")
    asked = {"device": "cpu", "models": [str(folder)], "data": [str(tmp_path / "text.txt")]}
    evaluation.main(Config(**(DEFAULTS | asked | {"json": True})))
    (row,) = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert row["loss"] == pytest.approx(1000) and row["perplexity"] is None
    evaluation.main(Config(**(DEFAULTS | asked)))
    assert capsys.readouterr().out.split("\n")[1].split()[2:4] == ["1000.0000", "inf"]


def test_conversations_are_scored_in_what_is_learnt(trained):
    said = [("小白兔说", "我们去看月亮。"), ("写", "大家都笑了。"), ("为什么", "因为天黑了，"), ("好", "好。")] * 5
    text = "".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in said)
    (trained / "chats.jsonl").write_text(text, encoding="utf-8")
    done = run_script("data/instruct/prepare.py", "--input=chats.jsonl", "--tokenizer=out", "--dest=chats",
                      "--val_fraction=0.5", cwd=trained)  # fmt: skip
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(trained / "chats")
    model = a_run(trained / "talks", tokenizer)
    talks, data, nll, scored = str(trained / "talks"), open_split(trained / "chats", "val", 32), 0.0, []
    (row,) = here(models=[talks], data=[str(trained / "chats")], batch_size=2)
    begins = [*np.flatnonzero(data.marks & BEGINS), len(data.ids)]
    for begin, end in zip(begins, begins[1:], strict=False):  # each conversation by itself
        ids = torch.from_numpy(data.ids[begin:end].astype(np.int64))[:33]
        learnt = torch.from_numpy(data.marks[begin:end][:33] & LEARNT).bool()[1:]
        with torch.inference_mode():
            logits = model(ids[None, :-1], ids[None, 1:])[0][0]
        nll += torch.nn.functional.cross_entropy(logits[learnt], ids[1:][learnt], reduction="sum").item()
        scored += ids[1:][learnt].tolist()
    assert row["tokens"] == len(scored) > 10 and row["loss"] == pytest.approx(nll / len(scored), rel=1e-5)
    answers = tokenizer.decode([id for id in scored if id != tokenizer.end_of_text])
    assert (row["characters"], row["bytes"], row["stride"]) == (len(answers), len(answers.encode()), None)
    sizes, special = evaluation.TextSizes(tokenizer), [-1, *tokenizer.special.values(), tokenizer.end_of_text]
    assert len(special) == 5 and len(list(sizes.counted([(None, torch.tensor([special]), None)]))) == 1
    assert (sizes.bytes, sizes.characters) == (0, 0)
    # the vocabulary before the marks were added is a part of it, but not the other way round
    assert len(here(models=[talks], data=[str(trained / "d2")])) == 1
    with pytest.raises(UserError, match="was prepared with another tokenizer than that of"):
        here(models=[str(trained / "out")], data=[str(trained / "chats")])


def test_fewer_bits_of_the_weights_and_lora_are_opened(trained, monkeypatch):
    run = [*TINY_ARGS, "--max_iters=3", "--dataset=d", "--init_from=out", "--lora_rank=2", "--out_dir=lora"]
    done = run_script("train.py", *run, "--eval_interval=3", cwd=trained)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(trained)
    whole, lora = here(models=["out", "lora"], data=["d2"])
    (fewer,) = here(models=["out"], data=["d2"], quantize="bf16")
    assert fewer["quantize"] == "bf16" and fewer["loss"] != whole["loss"] != lora["loss"]
    assert fewer["loss"] == pytest.approx(whole["loss"], rel=0.01)


def test_tasks_in_the_table_with_what_was_cut(trained, tmp_path, capsys):
    rows = [{"query": "小白兔" * n, "choices": ["笑了。", "走了。"], "gold": n % 2} for n in (1, 2, 30)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = [trained / "out", f"--task={tmp_path / 't.jsonl'}", "--device=cpu"]
    done = run_script("eval.py", *asked, "--delimiter=", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, line = done.stdout.rstrip("\n").split("\n")
    assert head.split() == ["model", "task", "accuracy", "accuracy_norm", "accuracy_per_token", "rows", "truncated"]
    assert line.split()[-2:] == ["3", "1"] and "perplexity" not in head
    assert "1 of 3 rows do not fit into the context of 32 tokens and are cut on the left" in done.stderr
    settings = {"models": [str(trained / "out")], "task": [str(tmp_path / "t.jsonl")], "shots": 1, "device": "cpu"}
    evaluation.main(Config(**(DEFAULTS | settings | {"data": [str(trained / "d2")]})))
    assert [part.split()[1] for part in capsys.readouterr().out.split("\n\n")] == ["data", "task"]
    ((_, shots),) = evaluation.tasks_of(Config(**(DEFAULTS | settings | {"seed": 5})))
    assert (shots.seed, shots.count, len(shots.task.rows)) == (5, 1, 3)
    (row,) = here(**settings, limit=2, delimiter="\\n答：", seed=5)
    wanted = {
        "rows": 2,
        "limit": 2,
        "shots": 1,
        "delimiter": "\n答：",
        "seed": 5,
        "shots_from": str(tmp_path / "t.jsonl"),
    }
    assert wanted.items() <= row.items()
    assert not any(isinstance(value, list | dict) for value in row.values())


@pytest.fixture(scope="module")
def endings(trained) -> Path:
    """data/endings in the folder of `trained`, with the embedded task."""
    done = run_script("data/endings/prepare.py", "--dest=data/endings", cwd=trained)
    assert done.returncode == 0, done.stderr
    folder = trained / "data" / "endings"
    assert sorted(os.listdir(folder)) == ["train.jsonl", "val.jsonl"]
    return folder


def test_the_embedded_task_has_the_stories_that_were_kept_for_validation(trained, endings):
    tokenizer, stories, seen = load_tokenizer(trained / "d"), {}, {}
    for split in ("train", "val"):
        text = tokenizer.decode(open_split(trained / "d", split, 1).ids)
        stories[split] = text.split("<|endoftext|>")[:-1]
        rows = seen[split] = list(map(json.loads, (endings / f"{split}.jsonl").open(encoding="utf-8")))
        for row, story in zip(rows, stories[split], strict=True):
            end = row["query"] + row["choices"][row["gold"]]
            before = story.removesuffix(end)
            assert before != story and (not before or before[-1] in "。！？…”\n")  # a query begins with a sentence
            assert 0 < len(row["query"]) <= 60 or row["query"].count("。") == 1
        own = {row["choices"][row["gold"]] for row in rows}
        for row in rows:
            assert len(set(row["choices"])) == 4 and set(row["choices"]) <= own
            assert all(choice.count("“") == choice.count("”") for choice in row["choices"])
            assert not any(choice.startswith(tuple("，、：；。地的")) for choice in row["choices"])
    assert len(seen["val"]) > 50 and {row["gold"] for row in seen["val"]} == {0, 1, 2, 3}
    sha256 = hashlib.sha256((endings / "val.jsonl").read_bytes()).hexdigest()  # the same file on every machine
    assert sha256.startswith("991fa0fe61513212")


def test_the_embedded_task_has_the_same_figures_in_lm_evaluation_harness(trained, endings, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(trained)  # the yaml names the files from the repository's folder
    model = a_run(tmp_path / "out", load_tokenizer(trained / "d"), block_size=128)
    folder = exported(tmp_path / "out")
    manager = TaskManager(include_path=str(ROOT / "extras" / "lm_eval"), include_defaults=False)
    lm = HFLM(pretrained=str(folder), device="cpu", batch_size=8)
    found = lm_eval.simple_evaluate(lm, tasks=["story_endings"], task_manager=manager, bootstrap_iters=0, limit=30)
    asked = {"task": ["data/endings/val.jsonl"], "delimiter": "", "limit": 30}
    ours, ours_too = here(models=[str(folder), str(tmp_path / "out")], **asked)
    theirs = found["results"]["story_endings"]
    assert model.config.block_size == 128 and ours["rows"] == 30
    assert (ours["accuracy"], ours["accuracy_norm"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    assert (ours["accuracy"], ours["accuracy_norm"]) == (ours_too["accuracy"], ours_too["accuracy_norm"])


MISTAKES = {
    "no model nowhere: expected an out_dir": ["nowhere"],
    "no checkpoint in out": ["--out_dir=out-nothing"],
    "no model out-nothing: expected an out_dir": ["--init_from=out-nothing"],
    "nowhere.pt": ["nowhere.pt"],
    "no model --out: expected": ["--models=--out"],
    "a key begins with two dashes": ["stride=3"],
    "there is no model in d (no ckpt.pt, last.pt or config.json)": ["d"],
    "--data=nowhere.txt: there is no such file": ["out", "--data=nowhere.txt"],
    "--data= is empty: expected the name of a file or a dataset": ["out", "--data="],
    "--task= is empty: expected the name of a file": ["out", "--task="],
    "dataset nowhere is not there": ["out", "--data=nowhere"],
    "holds token ids: name its dataset, --data=d": ["out", "--data=d/val.bin"],
    "empty.txt has 0 tokens": ["out", "--data=empty.txt"],
    "empty.txt is no model: expected an out_dir": ["empty.txt"],
    "records.jsonl: expected a plain text, or a dataset": ["out", "--data=records.jsonl"],
    "its encoding is neither UTF-8": ["out", "--data=bytes.txt"],
    "save it as UTF-8, or name its --encoding": ["out", "--data=gbk.txt", "--encoding=utf-8"],
    "--encoding=klingon: no such text encoding": ["out", "--data=gbk.txt", "--encoding=klingon"],
    "another tokenizer than that of out": ["out", "--data=other"],
    "stride=33: expected 1 to 32": ["out", "--data=d2", "--stride=33"],
    "stride=-1: expected at least 0": ["out", "--stride=-1"],
    "batch_size=0": ["out", "--batch_size=0"],
    "split=test: expected val or train": ["out", "--split=test"],
    "limit is for tasks": ["out", "--limit=3"],
    "shots_from=t.jsonl needs to know how many": ["out", "--task=t.jsonl", "--shots_from=t.jsonl"],
    "shots=3: expected 0 to 1, the rows of t.jsonl": ["out", "--task=t.jsonl", "--shots=3"],
    "shots=1: t.jsonl has 0 rows other than this one": ["out", "--task=t.jsonl", "--shots=1"],
    "nowhere.jsonl cannot be read": ["out", "--task=nowhere.jsonl"],
    "did you mean --stride": ["out", "--strid=3"],
    "quantize=int3": ["out", "--quantize=int3"],
    "does not say what it was trained with": ["hf"],
}


@pytest.fixture(scope="module")
def mistaken(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistaken")
    for name in ("d", "d2", "out"):
        shutil.copytree(trained / name, folder / name)
    exported(folder / "out", folder / "hf")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "records.jsonl").write_text('{"text": "大"}\n', encoding="utf-8")
    (folder / "gbk.txt").write_bytes("小白兔说，我们去看月亮。".encode("gbk") * 9)
    (folder / "bytes.txt").write_bytes(bytes(range(128, 256)) * 9)
    (folder / "t.jsonl").write_text('{"context": "小", "continuation": "大"}', encoding="utf-8")
    (folder / "other").mkdir()
    for split in ("train", "val"):  # without a meta.json, so these are GPT-2's tokens
        np.arange(100, dtype=np.uint16).tofile(folder / "other" / f"{split}.bin")
    return folder


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_sentences(mistaken, words, monkeypatch, capsys):
    """In this process, as starting one for each would take a minute; two of them as users run it below."""
    from configurator import configure, run

    monkeypatch.chdir(mistaken)
    with pytest.raises(SystemExit) as ended:
        namespace = {k: DEFAULTS[k] for k in DEFAULTS} | {"__file__": str(ROOT / "eval.py")}
        run(lambda: evaluation.main(configure(namespace, ("models",), [*MISTAKES[words], "--device=cpu"])))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and words in told.err.split("\n")[-2]


def test_a_mistake_ends_with_status_2(mistaken):
    for words in ("no model nowhere: expected an out_dir", "did you mean --stride"):
        done = run_script("eval.py", *MISTAKES[words], cwd=mistaken)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_character_that_the_vocabulary_lacks(tmp_path):
    a_run(tmp_path / "out", CharTokenizer("ab", byte_fallback=False, end_of_text=False))
    (tmp_path / "text.txt").write_text("abcab", encoding="utf-8")
    with pytest.raises(UserError, match=r"text.txt: this vocabulary of 2 characters lacks 'c'"):
        here(models=[str(tmp_path / "out")], data=[str(tmp_path / "text.txt")])


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pseudo-terminals are POSIX")
def test_a_terminal_has_a_bar_and_ctrl_c_ends_it_without_a_traceback(trained):
    import pty
    import termios

    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, str(ROOT / "eval.py"), "out", "--stride=1", "--batch_size=1", "--device=cpu"]
    streams = {"stdout": subprocess.PIPE, "stderr": theirs, "stdin": theirs}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which is ignored where the tests run in background
    with subprocess.Popen(command, cwd=trained, preexec_fn=heard, **streams) as process:
        os.close(theirs)
        told = b""
        while b"out, d:   0%|" not in told:
            told += os.read(terminal, 1000)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the end, on Linux
            while more := os.read(terminal, 1000):
                told += more
        out, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in told
    assert told.decode().rstrip().endswith("interrupted")
