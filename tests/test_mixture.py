"""Mixtures of datasets: who is drawn when, what a user can write, and training on two datasets."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ARGS, run_script, torchrun
from test_train import RESUME, RUN, assert_same_state, figures, interrupted, log_of, settings, train_here

import checkpoint
import loader
import train
from configurator import UserError
from loader import draw, drawn_before, fingerprint, open_mixture, open_split, parts_of, permute, sequence_starts
from model import derive_seed
from progress import flat

WEIGHTS = {
    "two": ["0.7", "0.3"],
    "three": ["0.6", "0.3", "0.1"],
    "not normalised": ["6", "3", "1"],
    "thirds": ["1", "1", "1"],
    "small": ["0.001", "0.999"],
    "smaller than a thousandth": ["0.0001", "0.00017", "0.5", "0.49973"],
    "huge and tiny": ["1e9", "1e-9"],
    "GPT-3's": ["60", "22", "8", "8", "3"],
    "many": [str(1 + i % 7) for i in range(40)],
}
SETS = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


def shares_of(weights):
    exact = [Fraction(weight) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def reference(shares, seed, n):
    """draw() for the first n sequences from the definition, a sequence at a time: each comes in at the whole list and
    goes to the half that lacks at least half a sequence of its due, and so on down to one dataset; each thousand of
    them, in the datasets' order, is then laid out by the permutation."""
    passed = {}

    def give(low, high):
        if high - low == 1:
            return low
        middle, counts = low + (high - low) // 2, passed.setdefault((low, high), [0, 0])
        counts[0] += 1
        due = counts[0] * sum(shares[low:middle]) / sum(shares[low:high])
        if due - counts[1] < Fraction(1, 2):
            return give(middle, high)
        counts[1] += 1
        return give(low, middle)

    drawn, seen = [], Counter()
    for thousand in range(-(-n // 1000)):
        slots = sorted(give(0, len(shares)) for _ in range(1000))
        for place in permute(np.arange(1000), 1000, derive_seed(seed, "mixture", thousand)):
            drawn.append((slots[place], seen[slots[place]]))
            seen[slots[place]] += 1
    return drawn[:n]


@SETS
def test_what_is_drawn_is_what_the_definition_says(weights):
    shares = shares_of(weights)
    which, own = draw(np.arange(6500), shares, 3)
    assert list(zip(which.tolist(), own.tolist(), strict=True)) == reference(shares, 3, 6500)


@SETS
def test_after_100_000_sequences_the_shares_are_the_weights(weights):
    total = sum(float(weight) for weight in weights)
    which, _ = draw(np.arange(100_000), shares_of(weights), 1)
    counts = np.bincount(which, minlength=len(weights))
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / 100_000 - float(weight) / total) < 0.001
        assert abs(count - 100_000 * float(weight) / total) < 0.5 * math.ceil(math.log2(len(weights))) + 1e-6


@SETS
def test_every_thousand_has_its_quotas(weights):
    shares = shares_of(weights)
    which, _ = draw(np.arange(50_000), shares, 2)
    quotas = np.array([np.bincount(thousand, minlength=len(shares)) for thousand in which.reshape(-1, 1000)])
    exact = np.array([1000 * float(share) for share in shares])
    if all((1000 * share).denominator == 1 for share in shares):
        assert (quotas == exact.round()).all()
    assert (abs(quotas - exact) < (1 if len(shares) <= 3 else 2)).all()
    if len(shares) <= 4:
        due = exact * np.arange(1, 51)[:, None]
        assert (abs(quotas.cumsum(0) - due) <= 1).all()


def test_no_count_falls_where_others_would_by_rounding():
    """Shares for which counts that are differences of rounded sums fall from one thousand to the next."""
    for seed in range(30):
        rng = random.Random(seed)
        shares = shares_of([str(rng.random() ** 12 + 1e-6) for _ in range(rng.randint(2, 9))])
        counts = [loader.shared_out(1000 * t, shares) for t in range(200)]
        assert all(sum(count) == 1000 * t for t, count in enumerate(counts))
        assert (np.diff(counts, axis=0) >= 0).all()


@SETS
def test_each_dataset_counts_its_own_sequences_without_a_gap(weights):
    which, own = draw(np.arange(20_700), shares_of(weights), 5)
    counts = []
    for i in range(len(weights)):
        counts.append(int((which == i).sum()))
        assert own[which == i].tolist() == list(range(counts[-1]))
    assert drawn_before(20_700, shares_of(weights), 5) == counts


def test_a_draw_depends_on_seed_and_number_alone():
    shares = shares_of(["0.6", "0.3", "0.1"])
    which, own = draw(np.arange(12_000), shares, 9)
    rng = np.random.default_rng(0)
    for size in (1, 1, 7, 64, 3000):  # thousands come and go, in any order
        for _ in range(20):
            numbers = rng.integers(0, 12_000, size)
            some, theirs = draw(numbers, shares, 9)
            assert (some == which[numbers]).all() and (theirs == own[numbers]).all()
    assert draw(np.array([10**12 + 7]), shares, 9)[1][0] < 10**12
    others = draw(np.arange(12_000), shares, 10)[0]
    assert 0.3 < (others == which).mean() < 0.6  # by chance 0.36 + 0.09 + 0.01
    assert 0.3 < (which[:1000] == which[1000:2000]).mean() < 0.6


def numbered(folder, first, n):
    """A dataset of n tokens that tell where they lie."""
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        np.arange(first, first + n).astype("<u2").tofile(folder / f"{split}.bin")
    return folder


def test_each_dataset_is_read_in_its_own_order_without_replacement(tmp_path):
    a, b = numbered(tmp_path / "a", 0, 901), numbered(tmp_path / "b", 10_000, 901)
    mixture = open_mixture(parts_of(f"{a}:1,{b}:1"), "train", 10)
    assert mixture.blocks(10) == [89, 89]
    numbers = np.arange(1000)
    x, y, positions = mixture.windows(numbers, 10, 20_000, 4)
    assert positions is None
    assert x.dtype == torch.int64 and (y == x + 1).all() and (x == x[:, :1] + torch.arange(10)).all()
    which, _ = draw(numbers, shares_of(["1", "1"]), 4)
    assert ((x[:, 0] >= 10_000).numpy() == (which == 1)).all()
    starts = [x[which == 0, 0].numpy(), x[which == 1, 0].numpy() - 10_000]
    for i in range(2):
        assert (starts[i] == sequence_starts(np.arange(500), 901, 10, derive_seed(4, "dataset", i))).all()
        for epoch in starts[i][:445].reshape(5, 89):
            assert (np.diff(np.sort(epoch)) == 10).all()
    assert (starts[0] == starts[1]).mean() < 0.1
    assert mixture.epochs(1000, 10, 4) == [500 / 89, 500 / 89]
    first = int((which[:137] == 0).sum())
    assert mixture.epochs(137, 10, 4) == [first / 89, (137 - first) / 89]


def test_one_dataset_is_read_as_it_always_was(tmp_path):
    folder = numbered(tmp_path / "a", 0, 905)
    tokens, numbers = open_split(folder, "train", 10), np.array([5, 900, 3, 88, 89, 10**9])
    wanted = tokens.windows(sequence_starts(numbers, 905, 10, 7), 10, 905)
    for dataset in (str(folder), f"{folder}:1", f"{folder}: 0.3"):
        got = open_mixture(parts_of(dataset), "train", 10).windows(numbers, 10, 905, 7)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got[:2], wanted, strict=True))
    sizes = {"train.bin": "1810 bytes", "val.bin": "1810 bytes"}
    assert fingerprint(parts_of(str(folder))) == fingerprint(parts_of(f"{folder}:5")) == sizes


@pytest.fixture
def four(tmp_path, monkeypatch):
    """Four datasets, three of them in data/, one in a folder with a space in its path."""
    monkeypatch.chdir(tmp_path)
    for i, folder in enumerate(("data/wiki", "data/novels", "data/poems", "my texts/letters")):
        numbered(tmp_path / folder, 1000 * i, 500)
    return tmp_path


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("wiki", {"wiki": "1"}),
        ("wiki:0.25", {"wiki": "1"}),
        ("wiki:0.6,novels:0.3,poems:0.1", {"wiki": "3/5", "novels": "3/10", "poems": "1/10"}),
        ("wiki:6,novels:3,poems:1", {"wiki": "3/5", "novels": "3/10", "poems": "1/10"}),
        (" wiki : 1 , novels:2 ", {"wiki": "1/3", "novels": "2/3"}),
        ("wiki:1e-3,data/novels:999e-3", {"wiki": "1/1000", "data/novels": "999/1000"}),
        ("my texts/letters:.5,poems:1.", {"my texts/letters": "1/3", "poems": "2/3"}),
    ],
)
def test_a_mixture_is_names_and_weights(four, text, wanted):
    parts = parts_of(text)
    assert [part.name for part in parts] == list(wanted)
    assert [str(part.share) for part in parts] == list(wanted.values())
    assert all((part.folder / "train.bin").is_file() for part in parts)


@pytest.mark.skipif(sys.platform == "win32", reason="colons in names of folders")
def test_colons_and_commas_in_paths(four):
    folder = four / "C:\\data\\x"
    shutil.copytree(four / "data" / "wiki", folder)
    assert [(p.name, p.folder.name) for p in parts_of("C:\\data\\x")] == [("C:\\data\\x", folder.name)]
    assert [(p.name, str(p.share)) for p in parts_of("C:\\data\\x:0.5,wiki:1.5")] == [
        ("C:\\data\\x", "1/4"), ("wiki", "3/4")
    ]  # fmt: skip
    for name in ("wiki:1", "wiki:1,novels:2"):  # what lies there under the whole text
        shutil.copytree(four / "data" / "poems", four / "data" / name)
        assert [p.folder.name for p in parts_of(name)] == [name]
    with pytest.raises(UserError, match=r"dataset C:\\data\\y is not there"):
        parts_of("C:\\data\\y")


SHORT = ["--block_size=8", "--max_iters=1", "--gradient_accumulation_steps=1"]  # an error that is missed ends soon


@pytest.mark.parametrize(
    "text, words",
    [
        ("wiki:0,novels:1", "'wiki:0' in a mixture: expected a finite weight above 0"),
        ("wiki:-1,novels:1", "'wiki:-1' in a mixture: expected a finite weight"),
        ("wiki:nan,novels:1", "'wiki:nan'"),
        ("wiki:inf,novels:1", "'wiki:inf'"),
        ("wiki:1e999999999,novels:1", "'wiki:1e999999999'"),
        ("wiki:1e-999999999,novels:1", "'wiki:1e-999999999'"),
        ("wiki:half,novels:1", "'wiki:half'"),
        ("wiki:,novels:1", "'wiki:' in a mixture: expected a finite weight"),
        ("wiki:x", "'wiki:x'"),
        ("wiki:0,6,novels:0,4", "'wiki:0'"),
        ("wiki,novels", "'wiki' in a mixture: expected NAME:WEIGHT"),
        ("wiki:1,novels", "'novels' in a mixture: expected NAME:WEIGHT"),
        ("wiki:1,,novels:1", "'' in a mixture: expected NAME:WEIGHT"),
        ("wiki:1,", "'' in a mixture: expected NAME:WEIGHT"),
        (",", "'' in a mixture"),
        (":1,wiki:1", "':1' in a mixture: expected NAME:WEIGHT"),
        ("wiki:1,data/wiki:2", "'data/wiki:2' in a mixture that has .*wiki already"),
        ("wiki:1,elsewhere:2", "dataset elsewhere is not there"),
        ("elsewhere:2", "dataset elsewhere is not there"),
        ("wiki:1,openwebtext:2", "python data/openwebtext/prepare.py"),
        ("wiki:1,C:\\data\\y", "expected NAME:WEIGHT"),
        (",".join(f"a{i}:1" for i in range(1001)), "1,001 datasets, expected 1,000 at most"),
        (",".join(f"a{i}:1" for i in range(100)), "dataset a0 is not there"),
        ("a" * 5000, "is not there"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_a_sentence(four, text, words):
    with pytest.raises(UserError, match=words) as raised:
        train_here(f"--dataset={text}", *SHORT)
    assert "\n" not in str(raised.value) and not (four / "out").exists()


def test_what_is_wrong_with_one_part_names_its_file(four):
    mixture = ["--dataset=wiki:3,my texts/letters:1", *SHORT]
    path = four / "my texts" / "letters" / "val.bin"
    for content, words in ((None, "is missing"), (b"123", "3 bytes"), (b"12" * 5, "fewer than block_size")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=f"letters.val.bin.*{words}"):
            train_here(*mixture)
    ids = np.zeros(500, "<u2")
    ids[40] = 60_000  # between the windows of an evaluation
    ids.tofile(path)
    with pytest.raises(UserError, match="letters.val.bin holds the token id 60000"):
        train_here(*mixture)


@pytest.fixture(scope="module")
def poems(stories, tmp_path_factory):
    """A second dataset, of another size, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("poems")
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[-6000:]
    (folder / "some.txt").write_text(text, encoding="utf-8")
    reuse = [f"--input={folder / 'some.txt'}", f"--tokenizer={stories}", f"--dest={folder}"]
    done = run_script("data/chinese/prepare.py", *reuse, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


EVERY_TEN = "--eval_interval=10"


@pytest.fixture(scope="module")
def mixed(stories, poems, tmp_path_factory):
    """30 iterations on three parts stories and one part poems, never interrupted: its folder, text and output."""
    folder, dataset = tmp_path_factory.mktemp("mixed"), f"{stories}:3, {poems}:1"
    done = run_script("train.py", *TINY_ARGS, f"--dataset={dataset}", *RUN, EVERY_TEN, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out", dataset, done.stdout


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_logs_and_says_each_dataset(mixed, stories, poems):
    evals, said = log_of(mixed[0], "eval"), mixed[2].splitlines()
    assert [e["iter"] for e in evals] == [0, 10, 20, 30]
    blocks = [(np.fromfile(folder / "train.bin", "<u2").size - 32) // 32 for folder in (stories, poems)]
    drawn = reference(shares_of(["3", "1"]), 1337, 480)  # 16 sequences an iteration
    for e in evals:
        own = e["datasets"]
        assert list(own) == [str(stories), str(poems)] and [d["weight"] for d in own.values()] == [0.75, 0.25]
        for figure in ("train_loss", "val_loss", "val_accuracy"):
            a, b = (d[figure] for d in own.values())
            assert math.isclose(e[figure], 0.75 * a + 0.25 * b, rel_tol=1e-12) and a != b
        seen = Counter(i for i, _ in drawn[: 16 * e["iter"]])
        assert [d["epoch"] for d in own.values()] == [seen[i] / blocks[i] for i in range(2)]
        assert math.isclose(e["epoch"], 16 * e["iter"] / sum(blocks))
        line = said[said.index(next(s for s in said if s.startswith(f"step {e['iter']}:"))) + 1]
        for name, d in own.items():
            percent = {0.75: "75.00%", 0.25: "25.00%"}[d["weight"]]
            assert f"{name} ({percent}): val loss {d['val_loss']:.4f}, epoch {d['epoch']:.2f}" in line
    assert checkpoint.load(mixed[0] / "ckpt.pt")["best_val_loss"] == min(e["val_loss"] for e in evals)
    # the order of the parts decides the order of the data, so what they are is kept with it
    files = [hash_of(folder / name) for folder in (stories, poems) for name in ("train.bin", "val.bin")]
    data = checkpoint.load(mixed[0] / "last.pt")["data"]
    assert list(data.values()) == files and all("3/4" in key for key in list(data)[:2])


def test_each_datasets_losses_are_those_of_the_dataset_alone(mixed, stories, poems, tmp_path, monkeypatch, capsys):
    """As train.py measures them where it evaluates the same weights on one dataset, and on the mixture."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mixed[0], "out")
    at_end = log_of(tmp_path / "out", "eval")[-1]
    for folder in (stories, poems):
        train.main(settings(*RESUME, "--eval_only", f"--dataset={folder}"))
        printed, own = capsys.readouterr(), at_end["datasets"][str(folder)]
        assert f"train loss {own['train_loss']:.4f}, val loss {own['val_loss']:.4f}" in printed.out
        assert f"val accuracy {own['val_accuracy']:.2%}" in printed.out and "no longer the one" in printed.err
    train.main(settings(*RESUME, "--eval_only"))
    lines, lines_then = capsys.readouterr().out.splitlines(), mixed[2].splitlines()
    at = lines_then.index(next(line for line in lines_then if line.startswith("step 30:")))
    assert lines_then[at : at + 2] == lines[-2:]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_a_mixture_interrupted_and_resumed_is_bit_for_bit_the_straight_run(mixed, tmp_path, number):
    status, _ = interrupted(tmp_path, mixed[1], 13, number, EVERY_TEN)
    assert status in (128 + number, -number) and checkpoint.newest(str(tmp_path / "out"))[1]["iter_num"] < 30
    done = run_script("train.py", *RESUME, cwd=tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert figures(tmp_path / "out") == figures(mixed[0])
    assert log_of(tmp_path / "out", "eval") == log_of(mixed[0], "eval")
    assert_same_state(tmp_path / "out", mixed[0])


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
def test_two_processes_and_one_learn_the_same_from_a_mixture(mixed, tmp_path):
    done = torchrun(2, "train.py", *TINY_ARGS, f"--dataset={mixed[1]}", *RUN, EVERY_TEN, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, alone = figures(tmp_path / "out"), figures(mixed[0])
    assert len(ours) == 30
    for (i, loss, *_), (_, wanted, *_) in zip(ours[:20], alone[:20], strict=True):
        assert abs(loss - wanted) < 1e-5, i
    for one, other in zip(log_of(tmp_path / "out", "eval"), log_of(mixed[0], "eval"), strict=True):
        assert list(one["datasets"]) == list(other["datasets"])
        for name, d in one["datasets"].items():
            assert d["epoch"] == other["datasets"][name]["epoch"]
            assert abs(d["val_loss"] - other["datasets"][name]["val_loss"]) < 1e-4


def test_a_mixture_of_one_trains_as_the_dataset(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [*RUN, "--max_iters=4", "--eval_interval=2"]
    train_here(f"--dataset={stories}", *short, "--out_dir=plain")
    train_here(f"--dataset={stories}:0.4", *short, "--out_dir=weighed")
    assert figures(tmp_path / "plain") == figures(tmp_path / "weighed")
    evals = log_of(tmp_path / "weighed", "eval")
    assert evals == log_of(tmp_path / "plain", "eval") and "datasets" not in evals[0]
    assert_same_state(tmp_path / "plain", tmp_path / "weighed")
    files = {name: hash_of(stories / name) for name in ("train.bin", "val.bin")}
    assert checkpoint.load("plain/last.pt")["data"] == checkpoint.load("weighed/last.pt")["data"] == files


def test_a_changed_mixture_is_told_on_resuming_and_one_that_is_only_written_otherwise_is_not(
    mixed, stories, poems, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mixed[0], "out")
    same = [f"{stories}:0.75,{poems}:0.25", f"{os.path.relpath(stories)}:6,{poems}:2"]
    others = [f"{stories}:1,{poems}:1", f"{poems}:1,{stories}:3", str(stories), f"{stories}:1"]
    for until, dataset in enumerate(same + others, 31):
        train.main(settings(*RESUME, f"--dataset={dataset}", f"--max_iters={until}"))
        assert ("no longer the one" in capsys.readouterr().err) == (dataset in others), dataset
        shutil.rmtree("out")
        shutil.copytree(mixed[0], "out")


def test_an_epoch_of_a_mixture_has_the_blocks_of_all_its_datasets(stories, poems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--gradient_accumulation_steps=8", "--eval_interval=1000", "--n_layer=1"]
    train_here(f"--dataset={stories}:1,{poems}:1", "--epochs=2", *quick)
    blocks = sum((np.fromfile(folder / "train.bin", "<u2").size - 32) // 32 for folder in (stories, poems))
    assert len(log_of(tmp_path / "out")) == 2 * blocks // 32
    assert [e["epoch"] for e in log_of(tmp_path / "out", "epoch")] == [1, 2]


def test_a_dataset_too_light_to_be_drawn_is_evaluated_all_the_same(stories, poems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_here(f"--dataset={stories}:1,{poems}:1e-12", *RUN, "--max_iters=2")
    own = log_of(tmp_path / "out", "eval")[-1]["datasets"][str(poems)]
    assert own["epoch"] == 0 and own["val_loss"] > 0


def test_all_parts_have_one_tokenizer(stories, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("another text, with other characters. " * 50, encoding="utf-8")
    prepare = ["data/chinese/prepare.py", "--input=t.txt", "--dest=other"]
    assert run_script(*prepare, cwd=tmp_path).returncode == 0
    mixture = [*TINY_ARGS, f"--dataset={stories}:1,other:1", "--max_iters=1", "--gradient_accumulation_steps=1"]
    done = run_script("train.py", *mixture, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert f"the datasets {stories} and other have different tokenizers" in last
    remedy = last.split()[-1]
    assert remedy == f"--tokenizer={stories}"
    assert run_script(*prepare, remedy, cwd=tmp_path).returncode == 0
    assert run_script("train.py", *mixture, cwd=tmp_path).returncode == 0
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}:1,other:none", cwd=tmp_path)
    assert done.returncode == 2 and "'other:none'" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_mixtures_template_is_the_first_that_there_is(stories, poems, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, template in (("a", "first {text}"), ("b", "second {text}")):
        shutil.copytree(poems, name)
        meta = json.loads((tmp_path / name / "meta.json").read_text(encoding="utf-8")) | {"template": template}
        (tmp_path / name / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    (tmp_path / "plain").mkdir()
    for path in stories.iterdir():
        shutil.copy(path, tmp_path / "plain")
    meta = json.loads((tmp_path / "plain" / "meta.json").read_text(encoding="utf-8"))
    meta.pop("template", None)
    (tmp_path / "plain" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    train_here("--dataset=plain:1,a:1,b:1", "--max_iters=1", "--gradient_accumulation_steps=1")
    assert checkpoint.template_of(checkpoint.load("out/last.pt")) == "first {text}"


@pytest.mark.parametrize("dataset", ["wiki:1,novels:2", "wiki:1", ",".join(f"a{i}:1" for i in range(1000))])
def test_a_checkpoint_that_lacks_a_tokenizer_is_not_upset_by_a_mixture(four, dataset):
    state = {"config": {"dataset": dataset}, "model_args": {"vocab_size": 65}}
    assert checkpoint.template_of(state) == ""
    with pytest.raises(UserError, match="does not hold its tokenizer"):
        checkpoint.tokenizer_of(state, "ckpt.pt")


def test_figures_of_datasets_have_flat_names_in_wandb():
    figures = {"iter": 3, "val_loss": 2.0, "datasets": {"wiki": {"val_loss": 1.0, "epoch": 0.5}}, "empty": {}}
    assert flat(figures) == {
        "iter": 3, "val_loss": 2.0, "datasets/wiki/val_loss": 1.0, "datasets/wiki/epoch": 0.5, "empty": {}
    }  # fmt: skip
