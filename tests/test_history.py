"""history.py on logs whose sums are done by hand, on torn, replaced and damaged ones, and on real runs of train.py."""

import json
import math
import os
import shutil
import sys
from subprocess import run as run_process

import numpy as np
import pytest
from conftest import ROOT, TINY_ARGS, run_script

from history import History, Sample, thinned


def train(i, loss=3.0, ms=100.0, tokens=200, **more):
    """A train record whose iterations had so many tokens and took `ms` each."""
    return {"kind": "train", "iter": i, "loss": loss, "ms": ms, "tokens_per_second": tokens / ms * 1000, **more}


def evaluation(i, val_loss=3.0, **more):
    return {"kind": "eval", "iter": i, "train_loss": 2.5, "val_loss": val_loss, **more}


def sample(i, text, prompt="《"):
    return {"kind": "sample", "iter": i, "prompt": prompt, "text": text}


def lines_of(*records) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read(folder, *records) -> History:
    """The history of a log with these records."""
    (folder / "log.jsonl").write_bytes(lines_of(*records))
    history = History(folder)
    assert history.refresh() is bool(records)
    return history


def curve(history, *args):
    return [values.tolist() for values in history.curve(*args)]


def told(history) -> tuple:
    """All that a history tells, to be compared."""
    curves = {(name, a): curve(history, name, a) for name in history.points for a in ("step", "tokens", "seconds")}
    return curves, history.samples


def test_tokens_and_seconds_by_hand(tmp_path):
    """Iteration 0 takes 0.4 s, 1 to 10 take 0.1 s each, 11 to 20 take 0.05 s each, all of 200 tokens."""
    history = read(
        tmp_path, evaluation(0, 7.0), train(0, 7.0, ms=400), train(10, 4.0, ms=100), evaluation(15, 3.5),
        train(20, 3.0, ms=50), evaluation(25, 2.9),
    )  # fmt: skip
    assert curve(history, "val_loss") == [[0, 15, 25], [7.0, 3.5, 2.9]]
    # 15 updates: those of the first 11, and 4 more of the next 10; 25: 21, and 4 more like the last
    assert curve(history, "val_loss", "tokens") == [[0, 3000, 5000], [7.0, 3.5, 2.9]]
    x, _ = history.curve("val_loss", "seconds")
    assert x == pytest.approx([0, 0.4 + 10 * 0.1 + 4 * 0.05, 0.4 + 10 * 0.1 + 10 * 0.05 + 4 * 0.05])
    # a batch's loss is that of the weights before the update: iteration 10 comes after 10 of them
    assert curve(history, "loss", "step") == [[0, 10, 20], [7.0, 4.0, 3.0]]
    assert curve(history, "loss", "tokens")[0] == [0, 2000, 4000]
    assert history.curve("loss", "seconds")[0] == pytest.approx([0, 0.4 + 9 * 0.1, 0.4 + 10 * 0.1 + 9 * 0.05])
    assert curve(history, "train_loss", "tokens") == [[0, 3000, 5000], [2.5, 2.5, 2.5]]
    assert curve(history, "tokens_per_second")[1] == [500, 2000, 4000]
    assert history.after(21, "tokens") == 4200 and history.after(21, "step") == 21
    assert history.after([21, 22], "seconds") == pytest.approx([1.9, 1.95])


def test_another_batch_size_after_a_resume(tmp_path):
    history = read(tmp_path, train(0), train(9), train(19, tokens=400), evaluation(22))
    assert curve(history, "val_loss", "tokens")[0] == [10 * 200 + 10 * 400 + 2 * 400]


def test_tokens_are_whole_numbers(tmp_path):
    """tokens_per_second * ms alone is off by rounding."""
    for ms in np.random.default_rng(0).uniform(1, 1000, 300).tolist():
        assert read(tmp_path, train(0, ms=ms, tokens=12 * 1023)).after(1, "tokens") == 12 * 1023


def test_a_log_that_begins_in_the_middle(tmp_path):
    history = read(tmp_path, train(999), evaluation(1000))
    assert curve(history, "val_loss", "tokens")[0] == [200_000]


def test_without_train_records_only_steps_are_known(tmp_path):
    history = read(tmp_path, evaluation(0), evaluation(5))
    assert curve(history, "val_loss") == [[0, 5], [3.0, 3.0]]
    assert curve(history, "val_loss", "tokens") == [[0], [3.0]]
    assert math.isnan(history.after(5, "seconds")) and history.after(0, "seconds") == 0


def test_what_is_null_or_no_number_is_left_out(tmp_path):
    datasets = {"wiki": {"weight": 0.9, "val_loss": 2.0}, "诗": {"weight": 0.1, "val_loss": None}}
    history = read(
        tmp_path, train(0, grad_norm=None, mfu=None, lr=1e-3), train(1, loss=None, grad_norm=2.0, lr=True, note="x"),
        train(2, loss=math.nan, grad_norm=math.inf, skipped_steps=3), evaluation(3, None, datasets=datasets),
        {"kind": "end", "iter": 3, "val_loss": 1.0}, {"kind": "epoch", "iter": 2, "mean_loss": 1.0, "loss": 1.0},
    )  # fmt: skip
    assert curve(history, "loss") == [[0], [3.0]]
    assert curve(history, "grad_norm") == [[1], [2.0]]
    assert curve(history, "lr") == [[0], [1e-3]]
    assert curve(history, "skipped_steps") == [[2], [3.0]]
    assert curve(history, "datasets/wiki/val_loss", "tokens") == [[600], [2.0]]
    for name in ("val_loss", "mfu", "note", "iter", "kind", "mean_loss", "datasets/诗/val_loss", "nothing"):
        assert curve(history, name) == curve(history, name, "tokens") == [[], []], name
    with pytest.raises(KeyError):
        history.curve("loss", "epochs")


def test_samples(tmp_path):
    history = read(tmp_path, sample(5, "《一"), sample(5, "从前", "从"), train(5), sample(10, "《二"))
    assert history.samples == [(5, "《", "《一"), (5, "从", "从前"), (10, "《", "《二")]
    assert history.samples[-1] == Sample(iter=10, prompt="《", text="《二")


def test_any_cut_gives_the_same_and_a_torn_line_waits(tmp_path):
    """Whatever bytes have arrived, those of half a character too: a line counts once it has its end, and once."""
    records = [evaluation(0), train(0), sample(1, "《雾里的蜜蜂》😀"), train(1), evaluation(2), sample(2, "《鞋》")]
    data = lines_of(*records)
    whole = told(read(tmp_path, *records))
    history, log = History(tmp_path / "live"), tmp_path / "live" / "log.jsonl"
    assert history.refresh() is False  # not even a folder
    log.parent.mkdir()
    assert history.refresh() is False
    for at in range(len(data)):
        with open(log, "ab") as file:
            file.write(data[at : at + 1])
        assert history.refresh() is (data[at : at + 1] == b"\n"), at
    assert told(history) == whole and history.refresh() is False
    for size in (7, 100, 333):
        log.unlink()
        assert history.refresh() is True and told(history) == ({}, []) and history.refresh() is False
        for at in range(0, len(data), size):
            with open(log, "ab") as file:
                file.write(data[at : at + size])
            history.refresh()
        assert told(history) == whole


def replaced_by_a_new_file(log, data):
    log.with_name("new").write_bytes(data)
    os.replace(log.with_name("new"), log)


def written_over(log, data):
    inode = log.stat().st_ino
    with open(log, "wb") as file:
        file.write(data)
    assert log.stat().st_ino == inode


@pytest.mark.parametrize("put", [replaced_by_a_new_file, written_over])
@pytest.mark.parametrize("n", [3, 100], ids=["short", "long"])
def test_another_file_in_its_place(tmp_path, put, n):
    """As a resumed run leaves it: shorter; or longer already; or as long; or the same, to which lines were added."""
    records = [train(i, loss=3 + i / 64) for i in range(n)]
    history, log = read(tmp_path, *records), tmp_path / "log.jsonl"
    resumed = [*records[: n // 2], *(train(i, loss=2 + i / 64) for i in range(n // 2, 2 * n))]
    for new in (resumed[: n // 2], resumed, resumed[:n], [*resumed[: n - 1], train(n - 1, loss=2.5 + (n - 1) / 64)]):
        put(log, lines_of(*new))
        assert history.refresh() is True
        assert curve(history, "loss") == [[r["iter"] for r in new], [r["loss"] for r in new]]
        assert history.after(len(new), "tokens") == 200 * len(new)
        assert history.refresh() is False
    put(log, lines_of(*new))
    assert history.refresh() is False
    put(log, lines_of(*new, train(n)))
    assert history.refresh() is True and curve(history, "loss")[0] == list(range(n + 1))
    put(log, b"")
    assert history.refresh() is True and told(history) == ({}, []) and history.refresh() is False


def test_damaged_lines_are_skipped(tmp_path):
    junk = [
        b"",
        b"{",
        b"\0" * 50,
        b"\xff\xfe\x80",
        b"[1, 2]",
        b"7",
        b"null",
        b'"train"',
        b'{"kind": "train"}',
        b"[" * 99999,
    ]
    junk += [
        b'{"kind": "train", "iter": %s, "loss": 1.0}' % x
        for x in (b"null", b'"x"', b"[]", b"1e999", b"NaN", b"9" * 400)
    ]
    junk += [b'{"iter": 1, "loss": 1.0}', b'{"kind": ["eval"], "iter": 1}', b'{"kind": "sample", "iter": 1, "text": 5}']
    junk += [b'{"kind": "train", "iter": 1, "lr": 1' + b"0" * 400 + b"}", lines_of(train(2))[:40]]
    good = lines_of(train(0)), lines_of(evaluation(9))
    (tmp_path / "log.jsonl").write_bytes(good[0] + b"\n".join(junk) + b"\r\n" + good[1])
    history = History(tmp_path)
    assert history.refresh() is True
    assert curve(history, "loss") == [[0], [3.0]] and curve(history, "lr") == [[], []]
    assert curve(history, "val_loss", "tokens") == [[1800], [3.0]] and history.samples == []
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b"no record\n")
    assert history.refresh() is False
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(OSError):
        history.refresh()


def test_two_logs_joined_by_hand(tmp_path):
    """Where an iteration comes twice, the later one counts, and x goes on increasing."""
    first, second = [train(i, loss=4.0) for i in range(5)], [train(i, loss=2.0, tokens=300) for i in range(3, 8)]
    history = read(tmp_path, *first, evaluation(4, 4.0), *second, evaluation(4, 2.0))
    assert curve(history, "loss") == [list(range(8)), [4.0] * 3 + [2.0] * 5]
    assert curve(history, "loss", "tokens")[0] == [0, 200, 400, 600, 900, 1200, 1500, 1800]
    assert curve(history, "val_loss", "tokens") == [[900], [2.0]]


def test_a_damaged_character_costs_no_more_than_itself(tmp_path):
    data = lines_of(train(0), sample(5, "《雾里"))
    (tmp_path / "log.jsonl").write_bytes(data.replace("雾".encode(), b"\xff"))
    history = History(tmp_path)
    assert history.refresh() is True and history.samples == [(5, "《", "《\ufffd里")]


def test_a_hundred_thousand_lines(tmp_path):
    losses = 3 + np.random.default_rng(0).normal(size=100_000)
    losses[77_777] = 50
    history = read(tmp_path, *(train(i, loss) for i, loss in enumerate(losses.tolist())))
    x, y = history.curve("loss", "tokens")
    assert np.array_equal(x, 200.0 * np.arange(100_000)) and np.array_equal(y, losses)
    few_x, few_y = thinned(x, y)
    assert 900 < len(few_x) <= 1000 and np.all(np.diff(few_x) > 0)
    assert few_x[few_y.argmax()] == 200 * 77_777 and few_y.min() == losses.min()
    assert np.isin(few_x, x).all() and np.array_equal(few_y, losses[(few_x / 200).astype(int)])


def test_thinned_keeps_the_ends_and_each_stretchs_extremes():
    x, y = np.arange(10.0), np.array([5.0, 0, 9, 1, 2, 4, 3, 7, 8, 6])
    assert thinned(x, y, 10)[0] is x  # nothing to leave out
    # two stretches between the ends, points 1 to 4 and 5 to 8: of the one 0 and 9, of the other 3 and 8
    assert [v.tolist() for v in thinned(x, y, 6)] == [[0, 1, 2, 6, 8, 9], [5, 0, 9, 3, 8, 6]]
    assert [v.tolist() for v in thinned(x, y, 7)] == [[0, 1, 2, 6, 8, 9], [5, 0, 9, 3, 8, 6]]
    assert [v.tolist() for v in thinned(x, y, 3)] == [[0, 9], [5, 6]]
    for n in range(12):
        for most in range(2, 12):
            few, _ = thinned(np.arange(n), np.zeros(n), most)
            assert len(few) <= most and few.tolist()[:1] == [0][:n] and few.tolist()[-1:] == [n - 1][:n]


def test_neither_torch_nor_matplotlib():
    code = "import sys, history; sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    assert run_process([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_real_runs_and_a_real_resume(stories, tmp_path):
    """The end record's tokens are where the last evaluation stands; a run that resumes from an older state shortens
    its log, and the history follows."""

    def trained(*argv):
        more = [f"--dataset={stories}", "--log_interval=3", "--eval_interval=4", "--gradient_accumulation_steps=2"]
        more += ["--sample_interval=4", "--sample_tokens=5", "--sample_prompts=从前", "--sample_prompts=《"]
        done = run_script("train.py", *TINY_ARGS, *more, *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        assert lines[-1]["kind"] == "end"
        return lines

    def follows(lines):
        assert history.refresh() is True
        fresh = History(out)
        assert fresh.refresh() and told(history) == told(fresh)
        steps, losses = curve(history, "val_loss")
        assert [steps, losses] == [[r[key] for r in lines if r["kind"] == "eval"] for key in ("iter", "val_loss")]
        assert curve(history, "val_loss", "tokens")[0] == [2 * 4 * 32 * step for step in steps]
        assert curve(history, "val_loss", "tokens")[0][-1] == lines[-1]["tokens"]
        seconds = history.curve("val_loss", "seconds")[0]
        assert seconds[0] == 0 and np.all(np.diff(seconds) > 0)
        assert curve(history, "loss") == [[r[key] for r in lines if r["kind"] == "train"] for key in ("iter", "loss")]
        expected = [(r["iter"], r["prompt"], r["text"]) for r in lines if r["kind"] == "sample"]
        assert history.samples == expected
        assert all(text.startswith(prompt) and prompt in ("从前", "《") for _, prompt, text in expected)

    out = tmp_path / "out"
    history = History(out)
    follows(trained("--max_iters=10"))
    assert curve(history, "val_loss")[0] == [0, 4, 8, 10] and curve(history, "loss")[0] == [0, 3, 6, 9]
    assert [s.iter for s in history.samples] == [4, 4, 8, 8]
    shutil.copy(out / "last.pt", tmp_path / "at_10.pt")
    follows(trained("--max_iters=17", "--init_from=resume"))
    assert curve(history, "loss")[0] == [0, 3, 6, 9, 12, 15]
    longer = (out / "log.jsonl").stat().st_size
    for path in out.glob("*.pt"):
        path.unlink()
    shutil.copy(tmp_path / "at_10.pt", out / "last.pt")
    with open(out / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "iter": 17, "lo')  # of a killed run
    assert history.refresh() is False
    follows(trained("--max_iters=13", "--init_from=resume"))
    assert (out / "log.jsonl").stat().st_size < longer
    assert curve(history, "val_loss")[0] == [0, 4, 8, 12, 13] and curve(history, "loss")[0] == [0, 3, 6, 9, 12]
