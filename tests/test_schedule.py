"""How a run proceeds: the batch's growth, rates by tokens, the papers' models by name."""

import math
import sys

import pytest
from conftest import TINY_ARGS, run_script, torchrun
from test_train import RESUME, assert_same_state, figures, log_of, settings, train_here

import train
from configurator import UserError
from presets import apply_size
from schedule import iterations_in, learning_rate_at, micro_steps_at, overrule, sequences_in, settle

GPT3 = ["--model_size=gpt3-13b", "--batch_size=8", "--lr_decay_tokens=260e9", "--warmup_tokens=375e6"]
RAMP = ["--batch_size=2", "--gradient_accumulation_steps=5", "--batch_ramp_tokens=1000", "--batch_ramp_start=50"]
RAMP += ["--block_size=16", "--dropout=0.1", "--max_iters=16", "--log_interval=1", "--eval_interval=5"]


def settled(*argv):
    c = settings(*argv)
    apply_size(c)
    overrule(c)
    settle(c, 1000)
    return c


def test_gpt3s_rate_goes_up_over_375_million_tokens_and_down_to_a_tenth_over_260_billion():
    """Brown et al. 2020, table 2.1 and appendix B; the batch of 2M tokens is one of 8 x 2048 tokens a micro-step."""
    c = settled(*GPT3)
    assert (c.n_layer, c.n_embd, c.n_head, c.block_size, c.bias) == (40, 5120, 40, 2048, True)
    assert c.gradient_accumulation_steps == 122 == round(2e6 / (8 * 2048)) and c.learning_rate == 1e-4
    step = 122 * 8 * 2048

    def rate(tokens):
        return learning_rate_at(10**9, round(tokens / 2048), c)  # whatever the iteration

    assert rate(0) == pytest.approx(1e-4 * step / (375e6 + step))
    assert rate(187.5e6) == pytest.approx(0.5e-4, rel=0.01)
    assert rate(375e6) == pytest.approx(1e-4, rel=1e-5)
    middle = (375e6 + 260e9) / 2
    assert rate(middle) == pytest.approx(0.55e-4, rel=1e-4)
    quarter = 375e6 + (260e9 - 375e6) / 4
    assert rate(quarter) == pytest.approx(1e-5 + 9e-5 * (1 + math.sqrt(0.5)) / 2, rel=1e-4)
    assert rate(260e9) == rate(300e9) == 1e-5


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_by_tokens_is_by_iterations_where_all_have_as_many(shape):
    both = ["--batch_size=3", "--block_size=8", "--gradient_accumulation_steps=2", f"--lr_schedule={shape}"]
    tokens = 3 * 8 * 2
    by_iterations = settled(*both, "--warmup_iters=10", "--lr_decay_iters=90")
    by_tokens = settled(*both, f"--warmup_tokens={10 * tokens}", f"--lr_decay_tokens={90 * tokens}")
    for n in range(100):
        wanted = learning_rate_at(n, 0, by_iterations)
        assert learning_rate_at(0, n * 6, by_tokens) == pytest.approx(wanted, rel=1e-12), n


def test_the_batch_grows_in_a_line_over_the_tokens():
    """From 32,768 tokens to 0.5M over 4 billion, as GPT-3's small model."""
    c = settled("--model_size=gpt3-125m", "--batch_size=4", "--batch_ramp_tokens=4e9")
    one, whole = 4 * 2048, 61 * 4 * 2048
    assert c.gradient_accumulation_steps == 61 and micro_steps_at(0, c) == 4 == 32768 // one
    for part in (0.1, 0.25, 0.5, 0.9, 0.999):
        tokens = micro_steps_at(round(part * 4e9 / 2048), c) * one
        assert abs(tokens - (32768 + part * (whole - 32768))) <= one / 2 + 1, part
    assert micro_steps_at(4 * 10**9 // 2048 + 1, c) == micro_steps_at(10**9, c) == 61
    n = 0  # iterations and sequences, counted one by one
    seen = 0
    while seen * 2048 < 5e9:
        seen += micro_steps_at(seen, c) * 4
        n += 1
        if n % 1000 == 0:
            assert sequences_in(n, c) == seen and iterations_in(seen, c) == n and iterations_in(seen - 1, c) == n - 1
    assert sequences_in(n, c) == seen
    # a line in tokens is an exponential in iterations: so many take its logarithm
    growing = 4e9 / (whole - 32768) * math.log(whole / 32768)
    assert n == pytest.approx(growing + 1e9 / whole, rel=0.01)
    c.batch_ramp_start = 10**9  # more than the whole batch
    assert micro_steps_at(0, c) == 61


def test_what_is_given_later_counts():
    assert settled("--max_tokens=64000", "--block_size=16", "--batch_size=2").max_iters == 64000 // (16 * 2 * 40)
    assert settled("--max_tokens=64000", "--max_iters=7").max_iters == 7
    assert settled("--max_iters=7", "--max_tokens=64000", "--block_size=16", "--batch_size=2").max_iters == 50
    assert settled("--epochs=2", "--max_tokens=64000", "--block_size=16", "--batch_size=2").max_iters == 50
    c = settled("--max_tokens=64000", "--epochs=2", "--batch_size=5", "--gradient_accumulation_steps=2")
    assert c.max_iters == 200 == c.lr_decay_iters  # of 1,000 sequences an epoch
    assert (
        settled("--max_tokens=64000", "--epochs=2", "--epochs=0", "--block_size=16", "--batch_size=2").max_iters == 50
    )
    assert settled("--batch_tokens=1e6", "--gradient_accumulation_steps=3").gradient_accumulation_steps == 3
    c = settled("--gradient_accumulation_steps=3", "--batch_tokens=1e6", "--batch_size=10", "--block_size=1000")
    assert c.gradient_accumulation_steps == 100
    c = settled("--warmup_tokens=1e3", "--lr_decay_tokens=1e6", "--lr_decay_iters=100", "--warmup_iters=0")
    assert c.warmup_tokens == c.lr_decay_tokens == 0 and learning_rate_at(100, 10**9, c) == c.min_lr


@pytest.fixture(scope="module")
def grown(stories, tmp_path_factory):
    """A run whose batch grows, in one process."""
    folder = tmp_path_factory.mktemp("grown")
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", *RAMP, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "grows to that from 64 tokens over the first 1,000" in done.stdout
    return folder / "out"


def test_a_runs_batch_grows_as_said_and_its_log_counts_the_tokens(grown):
    c, seen = settings(*TINY_ARGS, *RAMP), 0
    for line in log_of(grown):
        taken = micro_steps_at(seen, c) * 2 * 16
        assert line["tokens_per_second"] * line["ms"] / 1000 == pytest.approx(taken), line["iter"]
        seen += taken // 16
    sizes = [round(line["tokens_per_second"] * line["ms"] / 1000) for line in log_of(grown)]
    assert sizes == sorted(sizes) and sizes[0] == 64 and set(sizes) == {64, 96, 128, 160}
    assert log_of(grown, "end")[0]["tokens"] == sum(sizes)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
@pytest.mark.parametrize("processes", [2, 4])
def test_a_growing_batch_is_the_same_on_any_number_of_processes(grown, stories, tmp_path, processes):
    """Also where an iteration has fewer micro-steps than there are processes, or does not divide by them."""
    argv = [*RAMP, "--batch_tokens=160"]  # of its own, gradient_accumulation_steps would have to divide
    done = torchrun(processes, "train.py", *TINY_ARGS, f"--dataset={stories}", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"5 micro-steps do not divide evenly by {processes} processes: some wait" in done.stdout
    ours, alone = figures(tmp_path / "out"), figures(grown)
    assert len(ours) == len(alone) == 16
    for (i, loss, lr, norm), (_, wanted, wanted_lr, wanted_norm) in zip(ours, alone, strict=True):
        assert abs(loss - wanted) < 1e-5 and lr == wanted_lr and norm == pytest.approx(wanted_norm, rel=2e-4), i


def test_a_run_resumed_while_its_batch_grows_is_the_run_that_was_never_interrupted(
    grown, stories, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train_here(f"--dataset={stories}", *RAMP, "--max_iters=5", "--lr_decay_iters=600000")
    train.main(settings(*RESUME, "--max_iters=16"))
    assert figures(tmp_path / "out") == figures(grown)
    assert_same_state(tmp_path / "out", grown)


def test_a_run_of_so_many_tokens_ends_there_and_goes_on_with_more(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--block_size=16", "--batch_size=2", "--gradient_accumulation_steps=2", "--log_interval=1"]
    by_tokens = ["--max_tokens=500", "--lr_decay_tokens=1000", "--warmup_tokens=128"]
    train_here(f"--dataset={stories}", *size, *by_tokens)
    assert log_of(tmp_path / "out", "end")[0]["tokens"] == 448  # seven iterations of 64
    train.main(settings(*RESUME, "--max_tokens=700"))
    assert log_of(tmp_path / "out", "end")[0]["tokens"] == 640
    rates = [line["lr"] for line in log_of(tmp_path / "out")]
    assert len(rates) == 10 and rates[:2] == pytest.approx([1e-2 * 64 / 192, 1e-2 * 128 / 192])
    assert rates[2] == 1e-2 and rates[2:] == sorted(rates[2:], reverse=True)


def test_a_run_of_fewer_tokens_than_an_iteration_has_is_one_iteration():
    for tokens in (1, 15, 16, 1279, 2559):
        assert settled(f"--max_tokens={tokens}", "--block_size=16", "--batch_size=2").max_iters == 1
    assert settled("--max_tokens=2560", "--block_size=16", "--batch_size=2").max_iters == 2


@pytest.mark.parametrize("length", ["max_tokens=10240", "epochs=1"])
def test_what_a_run_is_to_read_stays_when_it_is_resumed_with_another_batch(
    stories, tmp_path, monkeypatch, capsys, length
):
    """What is left is counted from where the run is, and so is the time that it takes."""
    monkeypatch.chdir(tmp_path)
    size = ["--block_size=32", "--batch_size=4", "--log_interval=1", "--eval_interval=0"]
    train_here(f"--dataset={stories}", *size, "--gradient_accumulation_steps=4", "--max_tokens=5120")
    assert log_of(tmp_path / "out", "end")[-1]["tokens"] == 5120
    train.main(settings(*RESUME))
    assert "a larger --max_tokens goes on" in capsys.readouterr().out
    train.main(settings(*RESUME, f"--{length}", "--gradient_accumulation_steps=8"))
    out, wanted = capsys.readouterr().out, 10240
    if length.startswith("epochs"):
        wanted = blocks_of(stories) * 32
    read = log_of(tmp_path / "out", "end")[-1]["tokens"]
    assert wanted - 8 * 4 * 32 < read <= wanted and "eta -" not in out


def blocks_of(folder):
    """Sequences of 32 in an epoch of a dataset."""
    tokens = (folder / "train.bin").stat().st_size // 2
    return max(1, (tokens - 32) // 32)


def test_warm_up_is_by_iterations_where_no_tokens_are_said():
    size = ["--batch_size=2", "--block_size=16", "--gradient_accumulation_steps=4", "--lr_decay_tokens=100000"]
    c, step = settled(*size, "--warmup_iters=5"), 2 * 16 * 4
    assert [learning_rate_at(0, 8 * n, c) / c.learning_rate for n in range(5)] == pytest.approx(
        [1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6]
    )
    assert learning_rate_at(0, 40, c) == c.learning_rate
    assert settled(*size, "--warmup_tokens=9000", "--warmup_iters=5").warmup_tokens == 0
    by_tokens = settled(*size, "--warmup_iters=5", f"--warmup_tokens={7 * step}")
    assert learning_rate_at(0, 40, by_tokens) == pytest.approx(c.learning_rate * 6 / 8)


def test_a_batch_that_cannot_grow_is_not_said_to(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_here(f"--dataset={stories}", "--batch_ramp_tokens=1000", "--gradient_accumulation_steps=2", "--max_iters=1")
    out = capsys.readouterr().out
    assert "it does not grow: batch_ramp_start=32,768" in out and "grows to that" not in out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--warmup_tokens=10"], "lr_decay_tokens"),
        (["--batch_ramp_tokens=-1"], "batch_ramp_tokens=-1"),
        (["--max_tokens=-5"], "max_tokens=-5"),
        (["--model_size=gpt5"], "model_size=gpt5.*gpt3-175b"),
        (["--attn_pattern=dense,sparse"], "attn_pattern = 'dense,sparse'"),
        (["--attn_pattern=banded", "--attn_window=0"], "attn_window = 0"),
    ],
)
def test_a_schedule_or_a_size_that_makes_no_sense_is_a_sentence(stories, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        train_here(f"--dataset={stories}", *argv)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_papers_model_is_trained_by_its_name(stories, tmp_path, monkeypatch, capsys):
    """The smallest, made smaller by what is given after it; and the same in bench.py."""
    monkeypatch.chdir(tmp_path)
    small = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--batch_tokens=64"]
    gpt3 = ["config/train_gpt3.py", "--model_size=gpt3-350m", "--attn_window=4", "--device=cpu", "--compile=False"]
    train.main(settings(*gpt3, f"--dataset={stories}", *small, "--max_iters=2", "--eval_iters=2", "--out_dir=out"))
    assert "tokens per iteration will be: 64;" in capsys.readouterr().out
    config = train.checkpoint.load(tmp_path / "out" / "last.pt")["config"]
    assert (config["learning_rate"], config["n_layer"], config["bias"]) == (3e-4, 2, True)
    train.main(settings(*RESUME, "--max_iters=3"))  # nothing of the name is asked again
    assert log_of(tmp_path / "out", "end")[-1]["tokens"] == 3 * 64
    done = run_script("sample.py", "--start=大", "--num_samples=1", "--max_new_tokens=30", "--device=cpu", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("大"), done.stderr
    done = run_script("bench.py", "--model_size=gpt3-350m", "--n_layer=1", "--block_size=16", "--vocab_size=100",
                      "--device=cpu", "--num_steps=1", "--real_data=False", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "12.70M parameters" in done.stdout, done.stderr + done.stdout
