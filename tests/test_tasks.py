"""Task files, prompts and figures, held against lm-evaluation-harness over the same files."""

import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import SHARED, TINY
from test_export import a_run, exported
from test_tokenizer import trained

from configurator import UserError
from scoring import continuation_likelihoods
from tasks import Row, Shots, Task, check_shots, encode_pair, exp, measured, prompts, read_task
from tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set"
)
EVAL = SHARED / "data" / "eval"
CHARS = "的一是不了人我在有他这中大来上个国说们，。！？ \nabcdefgh"
KINDS = {  # how lm-evaluation-harness is told of them
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{DELIMITER+continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc"},
        ],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "contexts": {  # as Winogrande's: the place of the right context is the "text", the contexts are the "choices"
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_choice": "context_options",
        "doc_to_target": "continuation",
        "metric_list": [{"metric": "acc"}],
    },
}
NAMES = {"accuracy": "acc", "accuracy_norm": "acc_norm", "perplexity": "perplexity"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice(CHARS) for _ in range(rng.randint(least, most)))


def made_rows(kind: str, n: int, seed: int, model=None, tokenizer=None) -> list[dict]:
    """Rows of a kind, some longer than the context, with spaces around; of LAMBADA's every third one right."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        if kind == "choices":
            choices = [text(rng, 1, 9) for _ in range(rng.randint(2, 5))]
            rows.append({"query": text(rng, 1, 50), "choices": choices, "gold": rng.randrange(len(choices))})
        elif kind == "contexts":
            options = [text(rng, 1, 50) for _ in range(2)]
            rows.append({"context_options": options, "continuation": text(rng, 1, 9), "gold": rng.randrange(2)})
        else:
            context, continuation = text(rng, 2, 50), text(rng, 1, 3)
            if i % 3 == 0:
                ids = tokenizer.encode(context)[-TINY["block_size"] :].tolist()
                greedy = tokenizer.decode([int(model(torch.tensor([ids]))[0].argmax())])
                continuation = greedy if greedy.isprintable() and set(greedy).isdisjoint("\ufffd<") else continuation
            rows.append({"context": context, "continuation": continuation})
    return [row for row in rows if can_be_scored(row, tokenizer)]


def can_be_scored(row: dict, tokenizer) -> bool:
    """Whether lm-evaluation-harness does not stop at it: at a context of spaces alone, and where a token of the whole
    lies over the end of the context, so that none may be left for the continuation."""
    contexts = row.get("context_options", [row.get("query", row.get("context"))])
    answers = row.get("choices", [row.get("continuation")])
    sizes = [[len(tokenizer.encode(t)) for t in (c.rstrip(), c + answer)] for c in contexts for answer in answers]
    return all(0 < before < both for before, both in sizes)


def harness(folder: Path, tmp_path: Path, monkeypatch, tasks: dict[str, tuple]) -> dict:
    """lm-evaluation-harness's results on an export, for tasks by name: (kind, file, delimiter, shots, their file)."""
    lm_eval = pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = []
    for name, (kind, path, delimiter, shots, shots_from) in tasks.items():
        own = json.loads(json.dumps(KINDS[kind]).replace("DELIMITER", f"'{delimiter}'").replace("\n", "\\n"))
        files = {"validation": path} | ({"train": shots_from} if shots_from else {})
        own |= {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": shots}
        own |= {"validation_split": "validation", "target_delimiter": delimiter}
        if shots:
            between = "" if kind == "continuation" else delimiter  # where the target has it already
            own |= {"training_split": "train", "fewshot_config": {"split": "train", "target_delimiter": between}}
        config.append(own)
    model = HFLM(pretrained=str(folder), device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=config, task_manager=manager, log_samples=True, bootstrap_iters=0)


def assert_equal(model, tokenizer, found: dict, name: str, kind, path, delimiter, shots, shots_from) -> dict:
    """Ours are the harness's figures, and each log-likelihood, to float32's rounding."""
    task = read_task(path)
    own = Shots(read_task(shots_from), shots, 0) if shots else None
    figures = measured(model, tokenizer, task, delimiter, own, batch_size=5)
    theirs = found["results"][name]
    for ours, key in NAMES.items():
        assert (ours in figures) == (f"{key},none" in theirs)
        if ours in figures:
            assert figures[ours] == pytest.approx(theirs[f"{key},none"], rel=1e-5), (name, ours)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == figures["rows"] == len(task.rows)
    flat = [answer for sample in samples for (answer,) in sample["resps"]]
    pairs = [encode_pair(tokenizer, *each) for i in range(len(task.rows)) for each in prompts(task, i, delimiter, own)]
    likelihoods = continuation_likelihoods(model, pairs, 7)
    assert [one.greedy for one in likelihoods] == [greedy for _, greedy in flat]
    assert [one.logprob for one in likelihoods] == pytest.approx([logprob for logprob, _ in flat], rel=1e-5)
    return figures


@pytest.mark.parametrize("which", ["char", "bpe"])
def test_all_figures_are_lm_evaluation_harnesses(which, tmp_path, monkeypatch):
    tokenizer = CharTokenizer(CHARS, True, True) if which == "char" else BPETokenizer(trained("byte level").to_str(), 0)
    model = a_run(tmp_path / "out", tokenizer)
    tasks = {}
    for kind in KINDS:
        path = write(tmp_path / f"{kind}.jsonl", made_rows(kind, 40, 0, model, tokenizer))
        examples = made_rows(kind, 3, 1, model, tokenizer)
        one = write(tmp_path / f"{kind}1.jsonl", examples[:1])
        two = write(tmp_path / f"{kind}2.jsonl", [examples[-1]] * 2)  # whichever is drawn first, they are the same
        tasks |= {kind: (kind, path, "", 0, ""), f"{kind} after a space": (kind, path, " ", 0, "")}
        tasks |= {f"{kind} one": (kind, path, "\n", 1, one), f"{kind} two": (kind, path, " ", 2, two)}
    found = harness(exported(tmp_path / "out"), tmp_path, monkeypatch, tasks)
    figures = {name: assert_equal(model, tokenizer, found, name, *task) for name, task in tasks.items()}
    assert any(0 < f["truncated"] < f["rows"] for f in figures.values())
    from lm_eval.api.metrics import mean_stderr  # simple_evaluate itself needs a bootstrap for it

    for ours, key in (("accuracy_stderr", "acc"), ("accuracy_norm_stderr", "acc_norm")):
        theirs = mean_stderr([sample[key] for sample in found["samples"]["choices"]])
        assert figures["choices"][ours] == pytest.approx(theirs)
    assert 0 < figures["continuation"]["accuracy"] < 1


@needs_gpt2
@pytest.mark.skipif(not EVAL.is_dir(), reason="no task files beside the repository")
def test_gpt2s_tokens_on_the_fields_own_tasks(tmp_path, monkeypatch):
    tokenizer = GPT2Tokenizer()
    model = a_run(tmp_path / "out", tokenizer, block_size=128)
    tasks = {}
    for name, kind, delimiter in (
        ("lambada_openai", "continuation", " "),
        ("arc_easy", "choices", "\nAnswer: "),
        ("piqa", "choices", "Answer: "),
        ("copa", "choices", " "),
        ("winogrande", "contexts", " "),
    ):
        lines = (EVAL / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
        path, one = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-train.jsonl"
        path.write_text("\n".join(lines[:40]), encoding="utf-8")
        one.write_text(lines[41], encoding="utf-8")
        tasks[name] = (kind, str(path), delimiter, 0, "")
        if name in ("arc_easy", "winogrande"):
            tasks[f"{name} one"] = (kind, str(path), delimiter, 1, str(one))
    found = harness(exported(tmp_path / "out"), tmp_path, monkeypatch, tasks)
    for name, task in tasks.items():
        assert_equal(model, tokenizer, found, name, *task)


CHAR = CharTokenizer("abc好 \n", byte_fallback=True, end_of_text=True)
PLAIN = CharTokenizer("abc ", byte_fallback=False, end_of_text=False)


def test_spaces_at_the_contexts_end_go_to_the_continuation():
    ids = CHAR.encode("ab \n c").tolist()
    assert encode_pair(CHAR, "ab \n ", "c") == (ids[:2], ids[2:])
    assert encode_pair(CHAR, " ab", " c") == (CHAR.encode(" ab").tolist(), CHAR.encode(" c").tolist())


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_end_of_text_stands_for_an_empty_context(context):
    assert encode_pair(CHAR, context, "ab") == ([CHAR.end_of_text], CHAR.encode(context + "ab").tolist())
    with pytest.raises(UserError, match="nothing stands before the answer"):
        encode_pair(PLAIN, context.replace("\n", " "), "ab")


def test_a_special_token_spelled_out_is_text():
    context, continuation = encode_pair(CHAR, "a<|endoftext|>", "b<|endoftext|>")
    assert CHAR.end_of_text not in context + continuation and len(context) == 14 == len(continuation)


@needs_gpt2
def test_the_continuations_ids_are_those_of_the_whole():
    tokenizer = GPT2Tokenizer()
    context, continuation = encode_pair(tokenizer, "Question: what\nAnswer: ", "a cat")
    assert tokenizer.decode(context) == "Question: what\nAnswer:" and tokenizer.pieces(continuation) == [" a", " cat"]
    assert [tokenizer.encode(text).tolist() for text in ("a", "b", "ab")] == [[64], [65], [397]]
    assert encode_pair(tokenizer, "a", "b") == ([64], [65])  # no token of the whole is behind those of the context


def task_of(kind: str, rows: list[Row]) -> Task:
    return Task("t.jsonl", kind, tuple(rows))


def numbered(n: int) -> list[Row]:
    return [Row(((f"q{i}", f"a{i}"), (f"q{i}", f"b{i}")), i % 2, f"t.jsonl, line {i + 1}") for i in range(n)]


def test_the_layout_of_a_prompt_with_examples():
    task, examples = task_of("choices", numbered(3)), task_of("choices", numbered(9)[8:])
    shots = Shots(examples, 1, 0)
    assert prompts(task, 1, "\nAnswer: ", shots) == [
        ("q8\nAnswer: a8\n\nq1", "\nAnswer: a1"),
        ("q8\nAnswer: a8\n\nq1", "\nAnswer: b1"),
    ]
    assert prompts(task, 0, " ", None) == [("q0", " a0"), ("q0", " b0")]
    row = Row((("x", "end"), ("y", "end")), 1, "")
    assert prompts(task_of("contexts", [row]), 0, " ", Shots(task_of("contexts", [row, row]), 0, 0)) == [
        ("x", " end"),
        ("y", " end"),
    ]
    example = Row((("v", "done"), ("w", "done")), 1, "")
    shots = Shots(task_of("contexts", [example]), 1, 0)
    assert prompts(task_of("contexts", [row]), 0, " ", shots)[0] == ("w done\n\nx", " end")


def test_the_examples_depend_on_the_seed_and_the_rows_number_alone():
    rows = numbered(40)
    shots = Shots(task_of("choices", rows), 3, seed=1)
    first = [shots.before(i, row) for i, row in enumerate(rows)]
    assert first == [shots.before(i, row) for i, row in reversed(list(enumerate(rows)))][::-1]
    assert [s.before(5, rows[5]) for s in (Shots(shots.task, 3, 1), Shots(shots.task, 1, 1))] == [
        first[5],
        first[5][:1],
    ]
    assert first != [Shots(shots.task, 3, seed=2).before(i, row) for i, row in enumerate(rows)]
    assert len({tuple(row.where for row in own) for own in first}) > 35
    assert {row.where for own in first for row in own} == {row.where for row in rows}  # each stands before some
    assert all(len({row.where for row in own}) == 3 for own in first)


def test_a_row_is_never_its_own_example():
    rows = numbered(4)
    shots = Shots(task_of("choices", [*rows, *rows]), 6, seed=0)  # each is there twice
    for i, row in enumerate(rows):
        elsewhere = Row(row.pairs, row.gold, "another file")
        assert len(shots.before(i, elsewhere)) == 6 and row not in shots.before(i, elsewhere)
    with pytest.raises(UserError, match=r"shots=7: t.jsonl has 6 rows other than this one"):
        Shots(shots.task, 7, 0).before(0, rows[0])
    many = Shots(task_of("choices", [rows[0]] * 500 + rows[1:]), 3, 0)  # those few are found all the same
    assert sorted(row.where[-1] for row in many.before(0, rows[0])) == ["2", "3", "4"]


def test_shots_that_do_not_fit_the_task():
    task = task_of("choices", numbered(3))
    with pytest.raises(UserError, match="shots=4: expected 0 to 3, the rows of t.jsonl"):
        check_shots(task, Shots(task, 4, 0))
    with pytest.raises(UserError, match="of another kind than t.jsonl: expected query, choices, gold"):
        check_shots(task, Shots(task_of("continuation", numbered(3)), 1, 0))


def test_which_answer_is_right_by_each_measure(tmp_path):
    """A model to which all tokens are equally likely prefers the fewest; of equal ones the first is taken."""
    model = a_run(tmp_path, CHAR)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    rows = [
        {"query": "a", "choices": ["bb", "c"], "gold": 1},  # one token is likelier than two
        {"query": "a", "choices": ["b", "c"], "gold": 0},  # equal
        {"query": "a", "choices": ["b", "c"], "gold": 1},
        {"query": "a", "choices": ["é", "b"], "gold": 0},  # two tokens, one character
        {"query": "a", "choices": ["bb", "c"], "gold": 0},
    ]
    figures = measured(model, CHAR, read_task(write(tmp_path / "t.jsonl", rows)), "", None, 8)
    assert [figures[key] for key in ("accuracy", "accuracy_norm", "accuracy_per_token")] == [0.4, 0.4, 0.6]
    assert figures["accuracy_stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 4))
    assert (figures["rows"], figures["truncated"]) == (5, 0)
    lines = [{"context": "a", "continuation": "bb"}]
    figures = measured(model, CHAR, read_task(write(tmp_path / "t.jsonl", lines)), "", None, 8)
    assert figures["perplexity"] == pytest.approx(CHAR.vocab_size**2, rel=1e-5)
    assert figures["accuracy_stderr"] is None and figures["accuracy"] == 0
    assert exp(1e6) == math.inf


def test_rows_that_are_cut_are_counted(tmp_path):
    model = a_run(tmp_path, CHAR)
    rows = [{"context": "a" * n, "continuation": "b"} for n in (31, 32, 33, 34)]  # and the delimiter
    assert measured(model, CHAR, read_task(write(tmp_path / "t.jsonl", rows)), " ", None, 8)["truncated"] == 3
    with pytest.raises(UserError, match=r"t.jsonl, line 1: an answer has 33 tokens, and the model's context holds 32"):
        measured(
            model,
            CHAR,
            read_task(write(tmp_path / "t.jsonl", [{"context": "a", "continuation": "b" * 33}])),
            "",
            None,
            8,
        )


def test_characters_that_a_vocabulary_lacks_are_told_with_their_line(tmp_path):
    model = a_run(tmp_path, PLAIN)
    path = write(tmp_path / "t.jsonl", [{"context": "ab", "continuation": c} for c in ("c", "é")])
    with pytest.raises(UserError, match=r"t.jsonl, line 2: this vocabulary of 4 characters lacks 'é'"):
        measured(model, PLAIN, read_task(path), "", None, 8)
    path = write(tmp_path / "t.jsonl", [{"context": "", "continuation": "a"}])
    with pytest.raises(UserError, match=r"t.jsonl, line 1: nothing stands before the answer"):
        measured(model, PLAIN, read_task(path), "", None, 8)


def test_a_file_with_a_mark_empty_lines_and_windows_line_ends(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"context": "a\xe2\x80\xa8b", "continuation": "c", "id": 7}\r\n\r\n \n')
    task = read_task(str(path))
    assert task.kind == "continuation" and task.rows[0].pairs == (("a\u2028b", "c"),) and len(task.rows) == 1
    assert task.rows[0].where == f"{path}, line 1"


ROW = {"query": "a", "choices": ["b", "c"], "gold": 0}
MISTAKES = {
    "line 2 is no JSON": [ROW, "{"],
    "line 1: expected an object with the fields context, continuation; or query, choices, gold": [{"text": "a"}],
    "it has 'text'": [{"text": "a"}],
    "it is no object": [[1]],
    "line 2: expected an object with the fields query, choices, gold": [ROW, 3],
    "line 2: the field 'gold' is missing": [ROW, {"query": "a", "choices": ["b", "c"]}],
    "query is 3, expected a text": [ROW | {"query": 3}],
    "one of choices is \"\", expected some text": [ROW | {"choices": ["b", ""]}],
    "choices is \"bc\", expected a list of two texts or more": [ROW | {"choices": "bc"}],
    "choices is \\[\"b\"\\], expected a list": [ROW | {"choices": ["b"]}],
    "gold is 2, expected the place of one of the 2 choices, 0 to 1": [ROW | {"gold": 2}],
    "gold is -1": [ROW | {"gold": -1}],
    "gold is true": [ROW | {"gold": True}],
    "gold is \"0\"": [ROW | {"gold": "0"}],
    "continuation is null": [{"context": "a", "continuation": None}],
    "0 to 1": [{"context_options": ["a", "b"], "continuation": "c", "gold": 2}],
    "is empty: expected a JSON object in each line": [],
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_in_a_file_are_sentences_with_file_and_line(tmp_path, words):
    path = tmp_path / "t.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in MISTAKES[words]]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        read_task(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "gbk.jsonl").write_bytes('{"context": "好"}'.encode("gbk"))
    with pytest.raises(UserError, match="gbk.jsonl is not UTF-8"):
        read_task(str(tmp_path / "gbk.jsonl"))
    for name in ("nowhere.jsonl", ""):
        with pytest.raises(UserError, match="cannot be read"):
            read_task(str(tmp_path / name))
