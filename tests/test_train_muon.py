"""Training the newer architecture with Muon: resumed, by two processes, to a target; its schedules and its settings."""

import contextlib
import json
import math
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_ARGS, run_script, torchrun
from test_train import RESUME, RUN, assert_same_state, figures, interrupted, log_of, settings, train_here

import checkpoint
import startup
import train
from configurator import UserError
from model import GPT, GPTConfig, derive_seed
from schedule import learning_rate_at

FIELDS = dict(act="relu2", pos="rope", norm="rmsnorm", qk_norm=True, tied=False, zero_init=True, smear=3)
NEW = [f"--{key}={value}" for key, value in FIELDS.items()]
MUON = ["--optim=muon", "--muon_momentum_warmup=20", "--lr_schedule=wsd", "--decay_frac=0.5", "--min_lr=0"]
HIDDEN = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.fixture(scope="module")
def straight(stories, tmp_path_factory):
    """A run of 30 iterations with everything new, dropout and accumulation, never interrupted."""
    folder = tmp_path_factory.mktemp("straight-muon")
    new = [*RUN, *NEW, *MUON, "--eval_interval=10"]
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", *new, cwd=folder)
    assert done.returncode == 0, done.stderr
    losses = [loss for _, loss, _, _ in figures(folder / "out")]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    return folder / "out"


def copy_run(straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "out")
    monkeypatch.chdir(tmp_path)


def sentence(done) -> str:
    """What a script that exits with status 2 says, which must be one line."""
    said = [line for line in done.stderr.splitlines() if not line.startswith("overriding:")]
    assert done.returncode == 2 and len(said) == 1, done.stderr
    return said[0]


# ------- what is saved, and what comes of it


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)])
def test_ended_by_a_signal_and_resumed_it_is_bit_for_bit_the_straight_run(straight, stories, tmp_path, number):
    argv = [*NEW, *MUON, "--eval_interval=10", "--sample_tokens=100"]
    status, _ = interrupted(tmp_path, stories, 13, number, *argv)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    before = checkpoint.newest(str(tmp_path / "out"))[1]
    assert 10 <= before["iter_num"] < 30
    done = run_script("train.py", *RESUME, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "out") == figures(straight)
    assert_same_state(tmp_path / "out", straight)
    losses = [[(e["iter"], e["val_loss"]) for e in log_of(folder, "eval")] for folder in (tmp_path / "out", straight)]
    assert losses[0] == losses[1]
    [end] = log_of(tmp_path / "out", "end")  # the time of both parts
    assert end["training_seconds"] > before["progress"]["training_seconds"] > 0


def test_files_have_nanogpts_layout_but_for_its_optimizer(straight):
    ckpt, last = (torch.load(straight / name, weights_only=True) for name in ("ckpt.pt", "last.pt"))
    assert list(ckpt)[:6] == ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"]
    assert ckpt["optimizer"] is None and last["optimizer"] is None
    assert {k: v for k, v in ckpt["model_args"].items() if k in FIELDS} == FIELDS
    assert list(ckpt["model"]) == list(GPT(GPTConfig(**ckpt["model_args"])).state_dict())
    states = last["optimizers"]
    assert set(states) == set(last["model"])
    for name, state in states.items():
        expected = {"momentum_buffer"} if name.endswith(HIDDEN) else {"step", "exp_avg", "exp_avg_sq"}
        assert set(state) == expected, name
        moment = state["momentum_buffer" if name.endswith(HIDDEN) else "exp_avg"]
        assert moment.shape == last["model"][name].shape and (moment != 0).any()


def test_the_first_update_is_an_orthogonal_matrix_of_muons_rate(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = ["--qk_norm=True", "--optim=muon", "--muon_learning_rate=0.05", "--weight_decay=0.5", "--decay_lr=True"]
    train_here(f"--dataset={stories}", *plain, "--warmup_iters=3", "--max_iters=1", "--gradient_accumulation_steps=2")
    last = checkpoint.load("out/last.pt")
    torch.manual_seed(derive_seed(1337))
    begin = GPT(GPTConfig(**last["model_args"])).state_dict()
    rate = 0.05 / 4  # the first of three steps of warm-up
    for name in begin:
        if name.endswith(HIDDEN):
            update = (begin[name] * (1 - rate * 0.5) - last["model"][name]).double() / rate
            for part in update.chunk(3) if "c_attn" in name else [update]:
                values = torch.linalg.svdvals(part) / max(1, part.size(0) / part.size(1)) ** 0.5
                assert 0.65 < values.median() and values.max() < 1.25, name


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
@pytest.mark.parametrize("micro_steps", [2, 4])
def test_two_processes_and_one_have_the_same_losses(stories, tmp_path, monkeypatch, micro_steps):
    """One block: of its matrices, the processes share some unevenly, and of others one process has none. Gradients are
    sent at each micro-step, or at every second one."""
    monkeypatch.chdir(tmp_path)
    argv = [f"--dataset={stories}", *RUN, *NEW, *MUON, "--max_iters=15", "--n_layer=1"]
    argv += [f"--gradient_accumulation_steps={micro_steps}", "--eval_interval=5"]
    done = torchrun(2, "train.py", *TINY_ARGS, *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train_here(*argv, "--out_dir=alone")
    ours, alone = figures(tmp_path / "out"), figures(tmp_path / "alone")
    assert len(ours) == 15
    for (i, loss, lr, norm), (_, wanted, wanted_lr, wanted_norm) in zip(ours, alone, strict=True):
        assert abs(loss - wanted) < 1e-5 and lr == wanted_lr and abs(norm - wanted_norm) < 1e-4, i
    states = [checkpoint.load(f"{out}/last.pt") for out in ("out", "alone")]
    for name, state in states[0]["optimizers"].items():
        for key, moment in state.items():
            torch.testing.assert_close(moment, states[1]["optimizers"][name][key], atol=1e-4, rtol=1e-3)


def test_a_resumed_run_keeps_its_optimizer(straight, stories, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    said = sentence(run_script("train.py", *RESUME, "--optim=adamw", "--max_iters=31", cwd=tmp_path))
    assert "optim=adamw" in said and "muon" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    train.main(settings(*RESUME, "--optim=muon", "--max_iters=31"))
    assert checkpoint.load("out/last.pt")["iter_num"] == 31
    assert [end["iter"] for end in log_of(tmp_path / "out", "end")] == [31]
    train_here(f"--dataset={stories}", "--max_iters=1", "--out_dir=adamw", "--gradient_accumulation_steps=1")
    with pytest.raises(UserError, match="optim=muon is set, but .* has adamw"):
        train.main(settings(*RESUME, "--out_dir=adamw", "--optim=muon", "--max_iters=2"))
    with pytest.raises(UserError, match="smear=2 is set, but .* has 3"):
        train.main(settings(*RESUME, "--smear=2", "--max_iters=32"))


def test_weights_alone_may_go_on_with_another_optimizer(straight, stories, tmp_path, monkeypatch, capsys):
    copy_run(straight, tmp_path, monkeypatch)
    best = checkpoint.load("out/ckpt.pt")
    argv = [f"--dataset={stories}", "--init_from=out", "--out_dir=new", "--max_iters=1", "--learning_rate=1e-6"]
    train_here(*argv, "--gradient_accumulation_steps=1", "--smear=1")
    assert "smear=3 comes from out" in capsys.readouterr().err
    new = checkpoint.load("new/last.pt")
    assert set(new["optimizers"]["transformer.h.0.mlp.c_fc.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert new["optimizer"] and new["model_args"] | {"dropout": 0} == best["model_args"] | {"dropout": 0}
    assert all((new["model"][name] - value).abs().max() < 1e-4 for name, value in best["model"].items())


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_the_checkpoint_speaks(straight, tmp_path, quantize):
    """Further than its context of 32, as the model alone does."""
    asked = ["--start=从前", "--num_samples=2", "--max_new_tokens=60", "--temperature=0", "--device=cpu"]
    asked += [] if quantize == "none" else [f"--quantize={quantize}"]
    done = run_script("sample.py", f"--out_dir={straight}", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("\n---------------\n")[:2]
    assert len(texts) == 2 and texts[0] == texts[1] and texts[0].startswith("从前") and len(texts[0]) > 20
    if quantize == "none":
        path, state = checkpoint.best(str(straight))
        model, tokenizer = checkpoint.model_of(state, path).eval(), checkpoint.tokenizer_of(state, path)
        ids = torch.tensor([list(map(int, tokenizer.encode("从前")))])
        expected = tokenizer.decode(model.generate(ids, 20, temperature=0)[0].tolist())
        assert texts[0].startswith(expected.rstrip("\ufffd"))


# ------- to a target


def whole_val_loss(folder, state) -> float:
    """The mean loss of the validation split, read once, in windows that are spread evenly over it."""
    ids = np.fromfile(folder / "val.bin", np.uint16).astype(np.int64)
    block, batch = TINY["block_size"], 4
    windows = math.ceil((len(ids) - 1) // block / batch) * batch
    starts = np.linspace(0, len(ids) - 1 - block, windows).astype(np.int64)
    rows = torch.from_numpy(np.stack([ids[s : s + block + 1] for s in starts]))
    model = GPT(GPTConfig(**state["model_args"])).eval()
    model.load_state_dict(state["model"])
    with torch.no_grad():
        p = model(rows[:, :-1], rows[:, 1:])[0].double().log_softmax(-1)
    return -p.gather(-1, rows[:, 1:, None]).mean().item()


def last_line(out) -> dict:
    return json.loads((out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def test_a_target_ends_a_run_and_the_last_line_says_what_it_took(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [f"--dataset={stories}", *NEW, *MUON, "--max_iters=20", "--eval_interval=4", "--batch_size=4",
            "--gradient_accumulation_steps=2", "--lr_decay_iters=20"]  # fmt: skip
    train_here(*argv, "--target_val_loss=0.01", "--out_dir=never")
    evals = log_of(tmp_path / "never", "eval")
    assert [e["iter"] for e in evals] == [0, 4, 8, 12, 16, 20]
    state = checkpoint.load("never/last.pt")
    assert evals[-1]["val_loss"] == pytest.approx(whole_val_loss(stories, state), abs=1e-5)
    end = last_line(tmp_path / "never")
    assert end["kind"] == "end" and end["iter"] == 20 and end["tokens"] == 20 * 2 * 4 * 32
    assert end["target_val_loss"] == 0.01 and end["reached"] is False
    assert end["val_loss"] == min(e["val_loss"] for e in evals) and end["compile_seconds"] == 0
    assert end["training_seconds"] > 0 and end["evaluation_seconds"] > 0
    assert len(log_of(tmp_path / "never", "end")) == 1 and "stopped early" not in capsys.readouterr().out

    target = evals[3]["val_loss"]  # exactly that of iteration 12
    stop = next(e["iter"] for e in evals if e["val_loss"] <= target)
    train_here(*argv, f"--target_val_loss={target!r}")
    out = capsys.readouterr().out
    assert "stopped early" in out and "the validation loss is" in out
    assert [line["iter"] for line in log_of(tmp_path / "out")] == list(range(stop))
    end = last_line(tmp_path / "out")
    assert end["kind"] == "end" and end["reached"] is True and end["target_val_loss"] == target
    assert (end["iter"], end["tokens"]) == (stop, stop * 2 * 4 * 32) and end["val_loss"] <= target
    reached = checkpoint.load("out/ckpt.pt")
    assert reached["iter_num"] == stop and whole_val_loss(stories, reached) <= target + 1e-5
    train.main(settings(*RESUME))
    assert "nothing left to do: the validation loss is" in capsys.readouterr().out
    train.main(settings(*RESUME, "--target_val_loss=0.01"))
    assert figures(tmp_path / "out") == figures(tmp_path / "never")
    assert last_line(tmp_path / "out")["reached"] is False and len(log_of(tmp_path / "out", "end")) == 1


def test_without_an_interval_it_is_evaluated_and_saved_at_the_end_alone(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f"--dataset={stories}", "--gradient_accumulation_steps=1", "--max_iters=7"]
    train_here(*argv, "--eval_interval=0", "--keep_checkpoints=2")
    assert [e["iter"] for e in log_of(tmp_path / "out", "eval")] == [7]
    assert checkpoint.load("out/ckpt.pt")["iter_num"] == checkpoint.load("out/last.pt")["iter_num"] == 7
    assert not list((tmp_path / "out").glob("ckpt-*"))
    end = last_line(tmp_path / "out")
    assert end["kind"] == "end" and "reached" not in end and "target_val_loss" not in end
    train_here(*argv, "--eval_interval=3", "--out_dir=often")
    assert figures(tmp_path / "often") == figures(tmp_path / "out")
    assert_same_state(tmp_path / "often", tmp_path / "out")
    train_here(*argv, "--eval_interval=0", "--target_val_loss=9", "--out_dir=one")  # it is not looked at before
    assert [e["iter"] for e in log_of(tmp_path / "one", "eval")] == [7] and last_line(tmp_path / "one")["reached"]
    train.main(settings(*RESUME, "--max_iters=9"))
    assert [e["iter"] for e in log_of(tmp_path / "out", "eval")] == [9]


# ------- rates


def test_wsd_is_constant_and_then_a_line():
    c = settings("--learning_rate=1e-3", "--min_lr=1e-4", "--warmup_iters=100", "--lr_decay_iters=1100",
                 "--lr_schedule=wsd", "--decay_frac=0.5")  # fmt: skip
    at = {0: 1e-3 / 101, 99: 1e-3 * 100 / 101, 100: 1e-3, 400: 1e-3, 550: 1e-3}
    at |= {825: 5.5e-4, 1045: 1.9e-4, 1099: 1e-4 + 9e-4 / 550, 1100: 1e-4, 5000: 1e-4}
    for n, rate in at.items():
        assert learning_rate_at(n, 0, c) == pytest.approx(rate), n
    c.decay_frac = 0.2  # the default: from 880 on
    assert settings().decay_frac == 0.2
    for n, rate in {880: 1e-3, 881: 1e-3 - 9e-4 / 220, 990: 5.5e-4, 1100: 1e-4}.items():
        assert learning_rate_at(n, 0, c) == pytest.approx(rate), n
    c.decay_frac = 1.0  # all that is left after the warm-up
    assert learning_rate_at(100, 0, c) == pytest.approx(1e-3)
    assert learning_rate_at(600, 0, c) == pytest.approx(5.5e-4)
    c.decay_lr = False
    assert learning_rate_at(1000, 0, c) == 1e-3


def test_linear_is_a_line_to_the_end():
    c = settings("--learning_rate=0.02", "--min_lr=0", "--warmup_iters=0", "--lr_decay_iters=120",
                 "--lr_schedule=linear")  # fmt: skip
    for n in range(120):
        assert learning_rate_at(n, 0, c) == pytest.approx(0.02 * (120 - n) / 120)
    assert learning_rate_at(120, 0, c) == 0
    c.warmup_iters, c.min_lr = 20, 0.01
    assert learning_rate_at(70, 0, c) == pytest.approx(0.015)


@pytest.mark.parametrize(
    "argv, momenta",
    [
        ([], {0: 0.85, 10: 0.9, 15: 0.925, 20: 0.95, 21: 0.95, 100: 0.95}),
        (["--muon_momentum_warmup=0"], {0: 0.95, 10: 0.95}),
        (["--muon_momentum=0.87"], {0: 0.85, 10: 0.86, 20: 0.87, 30: 0.87}),
        (["--muon_momentum=0.6"], {0: 0.6, 10: 0.6, 100: 0.6}),  # below what it would rise from
    ],
)
def test_muons_rate_follows_the_schedule_and_its_momentum_rises(stories, tmp_path, monkeypatch, argv, momenta):
    monkeypatch.chdir(tmp_path)
    c = settings(*TINY_ARGS, f"--dataset={stories}", *MUON, "--muon_learning_rate=0.04", "--lr_decay_iters=40", *argv)
    with contextlib.ExitStack() as held:
        r, *_ = startup.prepare(c, held)
        adamw, muon = r.optimizers
        for n, momentum in momenta.items():
            r.progress.iter_num = n
            train.set_rates(r, 0.003)
            assert all(group["lr"] == 0.003 for group in adamw.param_groups)
            for group in muon.param_groups:
                assert group["lr"] == pytest.approx(0.04 * 0.3) and group["momentum"] == pytest.approx(momentum), n
        for n, part in {0: 1 / 3, 1: 2 / 3, 2: 1, 20: 1, 30: 0.5, 38: 0.1, 40: 0}.items():  # of two of warm-up
            train.set_rates(r, learning_rate_at(n, 0, c))
            assert all(group["lr"] == pytest.approx(0.01 * part) for group in adamw.param_groups), n
            assert all(group["lr"] == pytest.approx(0.04 * part) for group in muon.param_groups), n


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--optim=sgd"], r"optim=sgd: expected adamw or muon"),
        (["--lr_schedule=cos"], r"lr_schedule=cos: expected cosine, linear or wsd"),
        (["--decay_frac=0"], r"decay_frac=0.*more than 0"),
        (["--decay_frac=1.5"], r"decay_frac=1.5.*at most 1"),
        (["--muon_momentum=1"], r"muon_momentum=1.*below 1"),
        (["--muon_momentum=-0.1"], r"muon_momentum=-0.1.*at least 0"),
        (["--muon_momentum_warmup=-1"], r"muon_momentum_warmup=-1.*0 or more"),
        (["--muon_learning_rate=-0.1"], r"muon_learning_rate=-0.1.*0 or more"),
        (["--target_val_loss=-1"], r"target_val_loss=-1.*0 or more"),
        (["--eval_interval=-1"], r"eval_interval=-1.*0 or more"),
        (["--optim=muon", "--learning_rate=0"], r"learning_rate=0.*more than 0"),
        (["--pos=alibi"], r"pos = 'alibi'"),
        (["--norm=batchnorm"], r"norm = 'batchnorm'"),
        (["--act=swish"], r"act = 'swish'"),
        (["--smear=32"], r"smear = 32"),
        (["--pos=rope", "--n_embd=6"], r"even size"),
    ],
)
def test_settings_that_make_no_sense_are_a_sentence(stories, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        train_here(f"--dataset={stories}", *argv)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--optim=sgd"], ["--optim=muon", "--muon_momentum=2"], ["--smear=99"]])
def test_such_a_sentence_comes_with_status_2(stories, tmp_path, argv):
    said = sentence(run_script("train.py", *TINY_ARGS, f"--dataset={stories}", *argv, cwd=tmp_path))
    assert argv[-1].split("=")[0].removeprefix("--") in said
