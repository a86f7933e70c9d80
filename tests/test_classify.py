"""extras/classify.py against transformers, scikit-learn and arithmetic; and on a Chinese task that docs/finetuning.md
makes, against random weights and a bag of characters."""

import json
import math
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, run_script

import adapt
import checkpoint
from configurator import Config, UserError
from extras import classify, labelled
from model import GPT, GPTConfig, derive_seed
from tokenizer import CharTokenizer

sklearn_metrics = pytest.importorskip("sklearn.metrics")
CHARS = "好坏天气真很也不,0123456789abcdefghij "
TOKENIZER = CharTokenizer(CHARS, byte_fallback=True, end_of_text=True)
NEW = TOKENIZER.vocab_size  # start; then delimiter, extract
WORDS = {
    "好": ["天气真好", "很好", "真好真好", "也好", "好天气"],
    "坏": ["天气真坏", "很坏", "真坏真坏", "也坏", "坏天气"],
}


def base(folder: Path, **shape) -> str:
    """A folder with the checkpoint of an untrained model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(TINY | {"vocab_size": NEW} | shape)))
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": TOKENIZER.meta()}
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / "ckpt.pt", state)
    return str(folder)


def settings(action: str, **given) -> Config:
    c = Config(**(vars(classify.config) | {"action": action, "device": "cpu"} | given))
    c.given = list(given)
    return c


def trained(folder: Path, data: Path, out: str = "out", **given) -> dict:
    """The metrics of a classifier in `folder`/`out`."""
    where = {"init_from": base(folder / "base"), "train": str(data), "out_dir": str(folder / out)}
    classify.main(settings("train", **({"val": str(data), "learning_rate": 1e-2, "epochs": 2} | where | given)))
    return json.loads((folder / out / "metrics.json").read_text(encoding="utf-8"))


def predicted(folder: Path, data: Path, out: str = "out") -> list[dict]:
    dest = folder / "predictions.jsonl"
    classify.main(settings("predict", out_dir=str(folder / out), input=str(data), dest=str(dest)))
    return [json.loads(line) for line in dest.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def moods(path: Path) -> Path:
    return write(path, [{"text": text, "label": label} for label, texts in WORDS.items() for text in texts])


def examples(task: str, *texts: list[str], length: int = 32) -> list[classify.Example]:
    made = [classify.Example("", list(each), None, []) for each in texts]
    classify.encode(made, TOKENIZER, task, NEW, length)
    return made


def classifier(task: str, classes: int = 3, multi_label: bool = False, **shape) -> classify.Classifier:
    """Every parameter random, on three tokens more than the tokenizer has."""
    torch.manual_seed(1)
    model = classify.Classifier(
        GPT(GPTConfig(**(TINY | {"vocab_size": NEW + 3} | shape))), task, multi_label, classes, 0
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def mood(tmp_path_factory):
    """A folder with the data of the task in docs/finetuning.md, made by its own lines, and out-small/, a smaller model
    than the demo's that is trained on the same stories, less long."""
    folder = tmp_path_factory.mktemp("mood")
    (folder / "data" / "chinese").mkdir(parents=True)
    stories = (ROOT / "data" / "chinese" / "stories_zh.txt").read_bytes()
    (folder / "data" / "chinese" / "stories_zh.txt").write_bytes(stories)
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (folder / "mood.py").write_text(re.search(r"```python\n(import hashlib\n.*?)```", page, re.DOTALL)[1], "utf-8")
    smaller = ["--n_layer=2", "--block_size=64", "--max_iters=300", "--lr_decay_iters=300", "--eval_interval=300"]
    for command in (
        [folder / "mood.py"],
        [
            "data/chinese/prepare.py",
            f"--input={folder / 'data/chinese/stories_zh.txt'}",
            "--document=blank",
            "--dest=bin",
        ],
        ["train.py", "config/demo_chinese.py", "--dataset=bin", "--out_dir=out-small", *smaller, "--sample_interval=0"],
    ):
        done = run_script(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_pretraining_beats_random_weights_and_a_bag_of_characters(mood):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    def records(name: str) -> tuple[list[str], list[str]]:
        lines = (mood / "out-mood" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines], [json.loads(line)["label"] for line in lines]

    (train, _), (val, _), (test, truth) = map(records, ("train", "val", "test"))
    assert not set(test) & {*train, *val} and not set(train) & set(val)
    right = {"pretrained": 0, "random": 0, "bag": 0}
    for draw in (1, 2, 3):
        texts, labels = records(f"50-{draw}")
        assert len(texts) == 150 and not set(texts) & {*test, *val}
        data = {"train": str(mood / "out-mood" / f"50-{draw}.jsonl"), "val": str(mood / "out-mood" / "val.jsonl")}
        how = {"init_from": str(mood / "out-small"), "learning_rate": 1e-3, "epochs": 8, "seed": draw}
        for out in ("pretrained", "random"):
            classify.main(settings("train", out_dir=str(mood / out), random_weights=out == "random", **data, **how))
            rows = predicted(mood, mood / "out-mood" / "test.jsonl", out)
            right[out] += sum(row["label"] == label for row, label in zip(rows, truth, strict=True))
        counts = CountVectorizer(analyzer="char")
        bag = LogisticRegression(max_iter=2000).fit(counts.fit_transform(texts), labels)
        right["bag"] += sum(bag.predict(counts.transform(test)) == truth)
    share = {name: n / 3 / len(test) for name, n in right.items()}
    assert share["pretrained"] > share["random"] + 0.02 and share["pretrained"] > share["bag"], share


@pytest.mark.parametrize("multi_label", [False, True])
def test_losses_are_those_of_transformers_hidden_states(tmp_path, multi_label):
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": NEW + 3}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    model = classify.Classifier(GPT.from_pretrained(str(tmp_path)), "single", multi_label, 3, seed=5).eval()
    assert model.head.weight.std() < 0.03 and not model.head.bias.any()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    made = examples("single", ["天气"], ["abcdefghij"], ["好"])
    truth = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]]).bool()
    if multi_label:
        truth[1, 2], truth[2, 2] = True, False

    logits, language, classes = [], [], []
    for each, right in zip(made, truth.tolist(), strict=True):
        ids = torch.tensor(each.rows)  # a text alone, without padding
        states = theirs.transformer(ids).last_hidden_state[0]
        logp = theirs(ids).logits[0].log_softmax(-1)
        language += [-logp[i, ids[0, i + 1]].item() for i in range(ids.size(1) - 1)]
        scores = (model.head.weight @ states[-1] + model.head.bias).tolist()
        logits.append(scores)
        if multi_label:
            yes = [1 / (1 + math.exp(-score)) for score in scores]
            classes += [-math.log(p if is_right else 1 - p) for p, is_right in zip(yes, right, strict=True)]
        else:
            classes.append(math.log(sum(map(math.exp, scores))) - scores[right.index(True)])
    batch = classify.batch_of(made, "cpu")
    ours, x = model(batch)
    torch.testing.assert_close(ours, torch.tensor(logits), atol=1e-5, rtol=1e-5)
    assert model.class_loss(ours, truth).item() == pytest.approx(sum(classes) / len(classes), abs=1e-5)
    assert model.lm_loss(x, batch).item() == pytest.approx(sum(language) / len(language), abs=1e-5)


def test_rows_are_the_papers_and_texts_that_are_too_long_lose_their_ends(capsys):
    start, delimiter, extract = NEW, NEW + 1, NEW + 2
    a, b, c = (TOKENIZER.encode(text).tolist() for text in ("天气", "真好", "abcdefghij"))
    assert examples("single", ["天气"])[0].rows == [[start, *a, extract]]
    assert examples("pair", ["天气", "真好"])[0].rows == [[start, *a, delimiter, *b, extract]]
    both = [[start, *a, delimiter, *b, extract], [start, *b, delimiter, *a, extract]]
    assert examples("similarity", ["天气", "真好"])[0].rows == both
    three = examples("choice", ["天气", "真好", "abcdefghij", "天气"])[0].rows
    assert three == [[start, *a, delimiter, *x, extract] for x in (b, c, a)]
    assert capsys.readouterr().err == ""

    assert examples("single", ["abcdefghij"], length=8)[0].rows == [[start, *c[:6], extract]]
    assert examples("pair", ["天气", "abcdefghij"], length=9)[0].rows == [[start, *a, delimiter, *c[:4], extract]]
    assert examples("pair", ["abcdefghij", "天气"], length=9)[0].rows == [[start, *c[:4], delimiter, *a, extract]]
    assert examples("pair", ["abcdefghij"] * 2, length=10)[0].rows == [[start, *c[:4], delimiter, *c[:3], extract]]
    examples("pair", ["天气", "真好"], ["天气", "abcde"], length=9)
    assert capsys.readouterr().err.splitlines()[-1] == "note: 1 of 2 rows are cut to 9 tokens"


@pytest.mark.parametrize("shape", [{}, {"pos": "rope", "norm": "rmsnorm", "smear": 2, "tied": False}], ids=str)
@pytest.mark.parametrize("task", classify.FIELDS)
def test_neighbours_and_padding_change_nothing(task, shape):
    model = classifier(task, **shape)
    texts = [["天气", "真好", "坏"], ["abcdefghij", "坏", "好坏天气"], ["好", "0123456789", "a"]]
    made = examples(task, *(each[: {"single": 1, "choice": 3}.get(task, 2)] for each in texts))
    together = model(classify.batch_of(made, "cpu"))[0]
    alone = [model(classify.batch_of([each], "cpu"))[0] for each in made]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    all_of_them = classify.logits_of(model, made, together.size(1), 2, "cpu")  # sorted by length in between
    torch.testing.assert_close(all_of_them, together, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.1


def test_similarity_has_no_order_and_a_pair_has():
    one, other = ["天气真好", "很坏"], ["很坏", "天气真好"]
    for task, is_same in (("similarity", True), ("pair", False)):
        a, b = classifier(task)(classify.batch_of(examples(task, one, other), "cpu"))[0]
        assert torch.allclose(a, b, atol=1e-5) == is_same


def test_choices_are_scored_one_by_one():
    model = classifier("choice")
    made = examples("choice", ["天气", "真好", "坏"], ["天气", "abc", "坏", "真好"])
    two, three = model(classify.batch_of(made, "cpu"))[0]
    assert model.head.out_features == 1 and two[2] == -torch.inf
    torch.testing.assert_close(three[[2, 1]], two[:2], atol=1e-5, rtol=1e-5)
    truth = torch.tensor([[False, True, False], [True, False, False]])
    wanted = (F.cross_entropy(two[None, :2], torch.tensor([1])) + F.cross_entropy(three[None], torch.tensor([0]))) / 2
    torch.testing.assert_close(model.class_loss(torch.stack((two, three)), truth), wanted)


def test_measures_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = ["体育", "财经", "股票", "从未"]
    y, p = torch.randint(3, (2, 200), generator=generator)
    p = torch.where(torch.rand(200, generator=generator) < 0.5, y, p)
    m = classify.measured(F.one_hot(y, 4).bool(), F.one_hot(p, 4).bool(), labels, False)
    options = {"labels": range(4), "zero_division": 0}
    assert m["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(y, p))
    assert m["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(y, p, average="macro"))  # of those that occur
    assert m["confusion"] == sklearn_metrics.confusion_matrix(y, p, labels=range(4)).tolist()
    theirs = sklearn_metrics.precision_recall_fscore_support(y, p, **options)
    for i, label in enumerate(labels):
        assert list(m["classes"][label].values()) == pytest.approx([each[i] for each in theirs[:3]])

    y, p = (torch.rand(2, 200, 4, generator=generator) < torch.tensor([0.5, 0.3, 0.9, 0.0])).bool()
    m = classify.measured(y, p, labels, True)
    assert m["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(y, p))
    assert m["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(y, p, average="macro", labels=[0, 1, 2]))
    theirs = sklearn_metrics.multilabel_confusion_matrix(y, p)  # [[true negatives, false positives], [fn, tp]]
    assert m["confusion"] == [[int(c[1, 1]), int(c[1, 0]), int(c[0, 1]), int(c[0, 0])] for c in theirs]


def gradients(monkeypatch, folder: Path, data: Path, **given) -> tuple[list[torch.Tensor], list[float]]:
    """The gradients of a run's first step, and the learning rate of each step."""
    first, rates, step = [], [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[-1]["lr"])
        if len(rates) == 1:
            first.extend(p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        trained(folder, data, **given)
    return first, rates


def test_the_loss_is_l2_and_lambda_l1_and_the_rate_rises_and_falls_in_lines(tmp_path, monkeypatch):
    data = moods(tmp_path / "moods.jsonl")
    given = {"grad_clip": 0.0, "batch_size": 4, "dropout": 0.0, "epochs": 2}
    none, half, whole = (
        gradients(monkeypatch, tmp_path, data, lm_weight=weight, **given)[0] for weight in (0.0, 0.5, 1.0)
    )
    assert len(none) == len(half) and sum((a - b).norm() for a, b in zip(none, whole, strict=True)) > 0.1
    for a, b, c in zip(none, half, whole, strict=True):
        torch.testing.assert_close(b - a, (c - a) / 2, atol=1e-6, rtol=1e-4)
    clipped = gradients(monkeypatch, tmp_path, data, **(given | {"grad_clip": 0.01}))[0]
    assert torch.stack([g.norm() for g in clipped]).norm() == pytest.approx(0.01, rel=1e-3)

    rates = gradients(monkeypatch, tmp_path, data, learning_rate=6e-3, warmup=0.5, **given)[1]
    assert rates == pytest.approx([2e-3, 4e-3, 4e-3, 3e-3, 2e-3, 1e-3])  # 10 records are 3 batches of 4, twice
    rates = gradients(monkeypatch, tmp_path, data, learning_rate=6e-3, **given)[1]
    assert rates == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_every_record_is_taken_once_an_epoch_with_others_of_its_length():
    made = [classify.Example("", [], None, [[0] * length]) for length in torch.randperm(700).tolist()]
    drawn = classify.batches(made, 8, seed=3)
    assert sorted(torch.cat(drawn).tolist()) == list(range(700)) and {len(b) for b in drawn} == {8, 4}
    spread = [max(x) - min(x) for x in ([len(made[i].rows[0]) for i in batch] for batch in drawn)]
    assert sum(spread) / len(spread) < 100  # of 8 drawn anyhow it is near 540
    again, other = (torch.cat(classify.batches(made, 8, seed)).tolist() for seed in (3, 4))
    assert again == torch.cat(drawn).tolist() != other


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    data = moods(tmp_path / "moods.jsonl")
    states = []
    given = {"init_from": base(tmp_path / "base"), "train": str(data), "val": str(data), "learning_rate": 1e-2}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(states))  # on which nothing is to depend
        classify.main(settings("train", out_dir=str(tmp_path / out), seed=seed, random_weights=True, **given))
        states.append(torch.load(tmp_path / out / "classify.pt", weights_only=True))
    a, b, c = ({f"{k} {n}": t for k in ("model", "head") for n, t in s[k].items()} for s in states)
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()
    assert sum(torch.equal(a[name], c[name]) for name in a) < len(a) / 3
    began = checkpoint.load(Path(base(tmp_path / "base")) / "ckpt.pt")["model"]["transformer.wte.weight"]
    trained(tmp_path, data, learning_rate=0.0, weight_decay=0.0)  # the old tokens stay what they were
    kept = torch.load(tmp_path / "out" / "classify.pt", weights_only=True)["model"]["transformer.wte.weight"]
    assert kept.shape == (NEW + 3, 32) and torch.equal(kept[:NEW], began)
    trained(tmp_path, data, learning_rate=0.0, weight_decay=0.0, random_weights=True)
    kept = torch.load(tmp_path / "out" / "classify.pt", weights_only=True)["model"]["transformer.wte.weight"]
    assert not torch.isclose(kept[:NEW], began).all(1).any()


@pytest.mark.parametrize("task", [*classify.FIELDS, "multi_label"])
def test_each_task_is_learnt_and_predicted_as_it_was_measured(tmp_path, task, capsys):
    kind = "single" if task == "multi_label" else task
    records = []
    for label, texts in WORDS.items():
        for text in texts:
            one = {"text": text, "label": label}
            if task == "choice":
                choices = ["天", "真", "很"] if len(text) > 2 else ["真", "天"]  # the right one is 真
                one = {"text": text, "choices": choices, "label": choices.index("真")}
            elif task == "multi_label":
                one["label"] = [label, *(["长"] if len(text) > 2 else [])]
            elif task != "single":
                one = {"text": text, "text_2": texts[0], "label": len(text) > 2}
            records.append(one)
    data = write(tmp_path / "data.jsonl", records)
    m = trained(tmp_path, data, task=kind, multi_label=task == "multi_label", epochs=30, batch_size=4, dropout=0.0)
    assert m["accuracy"] == 1 and m["macro_f1"] == 1 and 1 <= m["epoch"] <= 30
    capsys.readouterr()
    rows = predicted(tmp_path, data)
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'predictions.jsonl'}: 10 predictions\n"
    assert told.err.splitlines()[-1] == f"{data}: accuracy 100.00%, macro-F1 1.0000"
    for row, record in zip(rows, records, strict=True):
        assert {**row, "probabilities": 0} == {**record, "label": row["label"], "probabilities": 0}
        wanted = record["label"]
        assert sorted(row["label"]) == sorted(wanted) if task == "multi_label" else row["label"] == str(wanted)
        p = row["probabilities"]
        if task == "multi_label":
            assert {label for label, x in p.items() if x > 0.5} == set(wanted)
        else:
            assert max(p, key=p.get) == row["label"] and sum(p.values()) == pytest.approx(1, abs=1e-4)
        if task == "choice":
            assert len(p) == len(record["choices"])


def test_what_is_kept_is_the_best_epoch_and_predict_has_its_measures(tmp_path, capsys):
    data, val = moods(tmp_path / "moods.jsonl"), tmp_path / "val.jsonl"
    write(
        val, [{"text": t, "label": k} for t, k in (("好好", "好"), ("坏坏", "坏"), ("很不好", "坏"), ("不很坏", "好"))]
    )
    m = trained(tmp_path, data, val=str(val), epochs=6, seed=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    shown = [
        (float(a), -float(loss)) for loss, a in re.findall(r"held out ([\d.]+), accuracy ([\d.]+)%", "\n".join(lines))
    ]
    assert len(shown) == 6 and m["epoch"] == shown.index(max(shown)) + 1 < 6
    rows, truth = predicted(tmp_path, val), ["好", "坏", "坏", "好"]
    assert m["accuracy"] == sum(row["label"] == label for row, label in zip(rows, truth, strict=True)) / 4
    loss = -sum(math.log(row["probabilities"][label]) for row, label in zip(rows, truth, strict=True)) / 4
    assert m["loss"] == pytest.approx(loss, abs=1e-4)
    assert -m["loss"] == pytest.approx(max(shown)[1], abs=1e-4)


def test_files_of_all_kinds_say_the_same(tmp_path):
    def read(name: str, content: str, encoding: str = "utf-8", **given):
        (tmp_path / name).write_bytes(content.encode(encoding))
        found = classify.read(settings("train", train=str(tmp_path / name), **given), "train")
        return [(each.texts, each.labels) for each in found]

    wanted = [(["今天天气真好"], ["3"]), (["“坏”天气, 很坏"], ["10"])]
    rows = [{"text": texts[0], "label": int(labels[0])} for texts, labels in wanted]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert read("a.jsonl", lines) == read("a.json", json.dumps(rows)) == wanted
    table = "今天天气真好\t3\n“坏”天气, 很坏\t10\n"
    assert read("a.tsv", table) == read("a.txt", table) == read("gbk.tsv", table * 50, "gb18030")[:2] == wanted
    assert read("b.tsv", "label\tid\ttext\n3\t1\t今天天气真好\n10\t2\t“坏”天气, 很坏\n") == wanted
    assert read("c.csv", 'title,class\r\n今天天气真好,3\r\n"“坏”天气, 很坏",10\r\n', fields="title,class") == wanted
    assert read("d.tsv", "3\t今天天气真好\n10\t“坏”天气, 很坏\n", fields="2,1") == wanted
    assert read("e.csv", "天气真好,好|新\n很坏,\n", multi_label=True) == [(["天气真好"], ["好", "新"]), (["很坏"], [])]
    assert read("f.csv", "天,a | b,1\n", task="choice") == [(["天", "a", "b"], ["1"])]
    assert read("g.tsv", "天\t气\t是\n", task="similarity") == [(["天", "气"], ["是"])]
    found = classify.classes(settings("train"), [classify.Example("", [], [x], []) for x in ("10", "b", "9", "a", "9")])
    assert found == ["9", "10", "a", "b"]


def test_equal_texts_are_on_one_side_whatever_the_seed():
    made = [classify.Example(str(i), [f"天气 {i % 500}"], ["好"], []) for i in range(1000)]
    train, val = classify.split(made, 0.2)
    assert 70 < len({each.texts[0] for each in val}) < 130 and len(train) + len(val) == 1000
    assert not {each.texts[0] for each in train} & {each.texts[0] for each in val}
    assert [each.where for each in val] == [each.where for each in classify.split(made, 0.2)[1]]
    assert derive_seed("held out", val[0].texts[0]) < 0.2 * 2**63


def test_the_commands_on_titles_as_thucnews_has_them(tmp_path):
    lines = [f"{text}{i}\t{label}" for i in range(8) for label, text in enumerate(("天气真好", "很坏", "abc"))]
    (tmp_path / "titles.tsv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "new.tsv").write_text("天气真好9\n很坏9\n", encoding="utf-8")
    base(tmp_path / "out-base")
    common = ["--learning_rate=1e-2", "--epochs=12", "--device=cpu", "--val_fraction=0.3"]
    done = run_script(
        "extras/classify.py", "train", "--init_from=out-base", "--train=titles.tsv", *common, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out-classify")) == ["classify.pt", "confusion.png", "metrics.json"]
    assert "precision    recall        F1  label\n    1.000     1.000     1.000  0\n" in done.stdout
    done = run_script("extras/classify.py", "predict", "--input=new.tsv", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == ["0", "1"]
    assert "accuracy" not in done.stderr


def test_the_picture_has_the_counts_and_chinese_labels():
    pytest.importorskip("matplotlib")
    import io

    from matplotlib.font_manager import fontManager
    from matplotlib.image import imread

    y = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    p = torch.tensor([0, 1, 0, 2, 1, 1, 1, 2, 0])
    labels = ["体育", "财经", "股票"]
    for multi_label in (False, True):
        metrics = classify.measured(F.one_hot(y).bool(), F.one_hot(p).bool(), labels, multi_label)
        with warnings.catch_warnings():
            if any(name in classify.FONTS[1:] for name in fontManager.get_font_names()):
                warnings.simplefilter("error")  # a character that no font has
            image = imread(io.BytesIO(classify.picture(metrics, multi_label)))[..., :3]
        darkest = (abs(image * 255 - [8, 48, 107]).max(-1) < 1).mean()
        assert (darkest > 0.02) == (not multi_label)  # the end of Blues: all of 财经 are right
        assert min(image.shape[:2]) > 300 and abs(image * 255 - [255, 255, 255]).max(-1).min() == 0


def test_without_matplotlib_all_else_is_there(tmp_path, monkeypatch, capsys):
    import sys

    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    trained(tmp_path, moods(tmp_path / "moods.jsonl"))
    assert sorted(os.listdir(tmp_path / "out")) == ["classify.pt", "metrics.json"]
    assert "pip install matplotlib" in capsys.readouterr().err


GOOD = "天气\t0\n真好\t1\n" * 5
MISTAKES = {
    "no file": ({}, None, "expected a file with the fields text and label"),
    "a folder": ({"train": "."}, None, "expected a file with the fields text and label"),
    "an empty file": ({}, "", "is empty"),
    "no label": ({}, "天气\n真好\n", "line 1: no label among 1"),
    "no text": ({}, "label\tname\n0\t天\n", "line 2: no text among label, name: name the fields with --fields"),
    "an empty text": ({}, GOOD + "\t1\n", "line 11: a text in 1 is empty"),
    "an empty label": ({}, GOOD + "天\t\n", "line 11: no label"),
    "a column too many": ({}, GOOD + "天\t1\t2\n", "line 11: 3 columns instead of 2"),
    "one class": ({}, "天气\t0\n真好\t0\n", "trained on are 0: expected two classes or more"),
    "bytes": ({}, b"\x81\xff\x80\xfe\n" * 50, "its encoding is neither UTF-8 nor"),
    "bytes of another encoding": ({"encoding": "utf-8"}, GOOD.encode("gb18030"), "cannot be decoded"),
    "no encoding": ({"encoding": "klingon"}, GOOD, "klingon"),
    "no task": ({"task": "ranking"}, GOOD, "--task=ranking: expected single, pair, similarity, choice"),
    "another task": ({"task": "pair"}, GOOD, "line 1: no label among 1, 2"),
    "no such choice": ({"task": "choice"}, "天\ta|b\t2\n", "2: expected the index of one of the 2 choices, from 0"),
    "several labels": ({"task": "choice", "multi_label": True}, GOOD, "cannot go with --multi_label"),
    "fields": ({"fields": "a,b,c"}, GOOD, "--fields=a,b,c: expected names for text and label"),
    "no epochs": ({"epochs": 0}, GOOD, "--epochs=0: expected 1 or more"),
    "a dropout": ({"dropout": 1.0}, GOOD, "--dropout=1.0: expected 0 or more, and less than 1"),
    "a rate": ({"learning_rate": float("nan")}, GOOD, "--learning_rate=nan"),
    "nothing held out": ({"val": "", "val_fraction": 0.0}, GOOD, "leaves one side empty"),
    "too long": (
        {"max_length": 33},
        GOOD,
        "--max_length=33: expected 8 or more, and at most the model's block_size, 32",
    ),
    "too short": ({"max_length": 5}, GOOD, "--max_length=5"),
    "no model": ({"init_from": "nowhere"}, GOOD, "nowhere"),
    "a suffix": ({"train": "a.doc"}, GOOD, "expected a file that ends in"),
    "no action": ({"action": ""}, GOOD, "expected train or predict as the first word"),
    "no classifier": ({"action": "predict", "out_dir": "base"}, GOOD, "classify.pt does not exist"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch, name):
    given, content, sentence = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    train = given.get("train", "data.tsv")
    if content is not None:
        Path(train).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    defaults = {"train": train, "val": train, "init_from": base(tmp_path / "base"), "out_dir": "out", "action": "train"}
    with pytest.raises(UserError) as told:
        classify.main(settings(**(defaults | given)))
    assert sentence in str(told.value) and "\n" not in str(told.value)
    assert not Path("out").exists()


def test_more_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = moods(tmp_path / "moods.jsonl")
    val = write(tmp_path / "val.jsonl", [{"text": "天", "label": "好"}, {"text": "天", "label": "怪"}])
    with pytest.raises(UserError, match="val.jsonl, line 2: the label 怪 is none of 坏, 好"):
        trained(tmp_path, data, val=str(val))
    with pytest.raises(UserError, match="several labels need --multi_label"):
        trained(tmp_path, write(tmp_path / "many.jsonl", [{"text": "天", "label": ["好"]}]))
    with pytest.raises(UserError, match="line 1: list, where an object"):
        trained(tmp_path, write(tmp_path / "lists.jsonl", [["天", "好"]]))
    done = run_script("extras/classify.py", "train", "--train=nowhere.tsv", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--train=nowhere.tsv: expected" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-classify").exists()
    (tmp_path / "out").mkdir()
    checkpoint.save(tmp_path / "out" / "classify.pt", checkpoint.load(Path(base(tmp_path / "base")) / "ckpt.pt"))
    with pytest.raises(UserError, match="is no classifier"):
        predicted(tmp_path, data)
    trained(tmp_path, data)
    predicted(tmp_path, val)
    assert "the labels of" in capsys.readouterr().err and not list(tmp_path.rglob("*.tmp"))


def test_of_a_few_records_each_side_has_one():
    made = examples("single", *[[f"第{n}个"] for n in range(6)])
    for fraction in (1e-9, 0.1, 0.5, 0.999999):
        train, held_out = labelled.split(made, fraction)
        assert train and held_out and len(train) + len(held_out) == 6
        again = labelled.split(made[::-1], fraction)
        assert sorted(each.texts[0] for each in again[1]) == sorted(each.texts[0] for each in held_out)
    assert [len(side) for side in (labelled.split(made, 1e-9)[1], labelled.split(made, 0.999999)[0])] == [1, 1]
    with pytest.raises(UserError, match="one side empty"):
        labelled.split(made[:1], 0.5)


def test_what_diverges_and_what_cannot_be_opened_again_is_not_saved(tmp_path):
    data = moods(tmp_path / "moods.jsonl")
    with pytest.raises(UserError, match="is no finite number: training has diverged"):
        trained(tmp_path, data, learning_rate=1e38, grad_clip=0.0)
    assert not (tmp_path / "out" / "classify.pt").exists()
    model = GPT(GPTConfig(**TINY, vocab_size=TOKENIZER.vocab_size))
    base = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": TOKENIZER.meta()}
    checkpoint.save(tmp_path / "base.pt", base)
    adapted = {"adapter": {"adapter_dim": 4}, "model_args": model.config.model_args(), "tokenizer": TOKENIZER.meta()}
    adapted["base"] = {"source": str(tmp_path / "base.pt"), "path": "", "sha256": adapt.weights_hash(model)}
    adapt.attach(model, adapt.Adaptation(adapter_dim=4), 1)
    adapt.train_only(model, adapt.Adaptation(adapter_dim=4))
    checkpoint.save(tmp_path / "adapted.pt", adapted | {"model": adapt.saved_weights(model)})
    with pytest.raises(UserError, match="has adapters: start from the model that they are on"):
        trained(tmp_path, data, init_from=str(tmp_path / "adapted.pt"))
