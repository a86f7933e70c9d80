import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_ARGS, run_script, torchrun

import checkpoint
import loader
import startup
import train
from configurator import UserError, configure
from model import GPT, GPTConfig
from run_dir import RunDir
from schedule import learning_rate_at

SLOWLY = ["--sample_interval=1", "--sample_tokens=300"]  # so that a signal comes before the end; changes no figure
RUN = ["--dropout=0.1", "--gradient_accumulation_steps=4", "--max_iters=30", "--lr_decay_iters=30", "--log_interval=1"]


def settings(*argv):
    """train.py's configuration for these arguments."""
    return configure(dict(vars(train.config), __file__=train.__file__), argv=argv)


def train_here(*argv) -> None:
    """train.py in this process; UserError where it would exit with status 2."""
    train.main(settings(*TINY_ARGS, *argv))


def log_of(folder, kind="train"):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def figures(folder):
    return [(line["iter"], line["loss"], line["lr"], line["grad_norm"]) for line in log_of(folder)]


def assert_same_state(a, b):
    a, b = checkpoint.load(a / "last.pt"), checkpoint.load(b / "last.pt")
    assert a["iter_num"] == b["iter_num"] and a["sequences_seen"] == b["sequences_seen"]
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
        if name in a["optimizers"]:
            for key, moment in a["optimizers"][name].items():
                assert torch.equal(moment, b["optimizers"][name][key]), (name, key)


def interrupted(folder, dataset, at, number, *argv):
    """Starts train.py and sends it the signal once it has printed iteration `at`; its exit status and output."""
    command = [sys.executable, str(ROOT / "train.py"), *TINY_ARGS, f"--dataset={dataset}", *RUN, *SLOWLY, *argv]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(f"iter {at}:"):
            while number == signal.SIGKILL and process.poll() is None and not (folder / "out" / "last.pt").is_file():
                time.sleep(0.001)  # saved while training goes on: at the latest when the next evaluation waits for it
            process.send_signal(number)
            break
    output += process.stdout.read()
    return process.wait(), output


@pytest.fixture(scope="module")
def straight(stories, tmp_path_factory):
    """A run of 30 iterations with dropout and accumulation, never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", *RUN, "--eval_interval=10", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [i for i, *_ in figures(folder / "out")] == list(range(30))
    return folder / "out", done.stdout


def test_the_console_lines_are_nanogpts(straight):
    lines = straight[1].splitlines()
    assert any(line.startswith("step 10: train loss ") and ", val loss " in line for line in lines)
    assert any(line.startswith("iter 7: loss ") and "ms, mfu " in line and ", time " in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_and_resumed_is_bit_for_bit_the_straight_run(straight, stories, tmp_path):
    status, _ = interrupted(tmp_path, stories, 13, signal.SIGKILL, "--eval_interval=10")
    assert status == -signal.SIGKILL and checkpoint.newest(str(tmp_path / "out"))[1]["iter_num"] in (10, 20)
    done = run_script(
        "train.py", "--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "out") == figures(straight[0])
    assert_same_state(tmp_path / "out", straight[0])


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)])
def test_stopped_by_a_signal_it_saves_its_step_and_says_how_to_go_on(straight, stories, tmp_path, number):
    status, output = interrupted(tmp_path, stories, 16, number, "--eval_interval=10")
    stopped_at = checkpoint.load(tmp_path / "out" / "last.pt")["iter_num"]
    assert status == 128 + number and 17 <= stopped_at < 30
    assert output.splitlines()[-1].endswith("python train.py --init_from=resume --out_dir=out")
    done = run_script(
        "train.py", "--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"at iteration {stopped_at}" in done.stdout
    assert figures(tmp_path / "out") == figures(straight[0])
    assert_same_state(tmp_path / "out", straight[0])


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_reader_that_leaves_does_not_end_training(straight, stories, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY_ARGS, f"--dataset={stories}", *RUN, "--eval_interval=10"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert_same_state(tmp_path / "out", straight[0])


def test_another_evaluation_interval_changes_nothing(straight, stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_here(f"--dataset={stories}", *RUN, "--eval_interval=7", "--eval_iters=3", "--sample_interval=9")
    assert figures(tmp_path / "out") == figures(straight[0])
    assert_same_state(tmp_path / "out", straight[0])


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
def test_two_processes_and_one_have_the_same_losses_with_dropout(straight, stories, tmp_path):
    done = torchrun(2, "train.py", *TINY_ARGS, f"--dataset={stories}", *RUN, "--eval_interval=10", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, alone = figures(tmp_path / "out"), figures(straight[0])
    assert len(ours) == 30 and done.stdout.count("iter 7:") == 1
    for (i, loss, lr, norm), (_, wanted, wanted_lr, wanted_norm) in zip(ours[:20], alone[:20], strict=True):
        assert abs(loss - wanted) < 1e-5 and lr == wanted_lr and abs(norm - wanted_norm) < 2e-4 * wanted_norm, i
    for one, other in zip(log_of(tmp_path / "out", "eval"), log_of(straight[0], "eval"), strict=True):
        assert abs(one["val_loss"] - other["val_loss"]) < 1e-4
    bad = ["--gradient_accumulation_steps=3"]
    done = torchrun(2, "train.py", *TINY_ARGS, f"--dataset={stories}", *RUN, *bad, cwd=tmp_path)
    assert done.returncode != 0 and "divisible by 2" in done.stderr


def test_files_have_nanogpts_layout_and_plain_types(straight):
    ckpt = torch.load(straight[0] / "ckpt.pt", weights_only=True)
    assert list(ckpt) == [
        "model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "tokenizer", "template"
    ]  # fmt: skip
    assert list(ckpt["model_args"]) == ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]
    assert list(ckpt["optimizer"]) == ["state", "param_groups"]
    assert set(ckpt["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    layer = [f"transformer.h.{i}.{n}.weight" for i in range(2)
             for n in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]  # fmt: skip
    assert list(ckpt["model"]) == [
        "transformer.wte.weight", "transformer.wpe.weight", *layer, "transformer.ln_f.weight", "lm_head.weight"
    ]  # fmt: skip
    nanogpt_keys = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log
        wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd
        dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters
        min_lr backend device dtype compile""".split()
    assert set(nanogpt_keys) <= set(ckpt["config"])
    evals = log_of(straight[0], "eval")
    assert ckpt["best_val_loss"] == min(e["val_loss"] for e in evals)
    assert ckpt["iter_num"] == min(evals, key=lambda e: e["val_loss"])["iter"]
    assert checkpoint.load(straight[0] / "last.prev.pt")["iter_num"] == 20


def nanogpt_run(folder):
    """A dataset folder and an out_dir as nanoGPT writes them: meta.pkl, compiled keys, tensors, no tokenizer."""
    data, out = folder / "data" / "letters", folder / "out"
    data.mkdir(parents=True)
    out.mkdir()
    chars = "\n abcdefghij"
    ids = np.random.default_rng(0).integers(0, len(chars), 2000).astype(np.uint16)
    ids[:1800].tofile(data / "train.bin")
    ids[1800:].tofile(data / "val.bin")
    meta = {"vocab_size": 12, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    args = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=12, dropout=0.0)
    model = GPT(GPTConfig(**args))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    for _ in range(3):
        x = torch.randint(12, (2, 16))
        model(x, x)[1].backward()
        optimizer.step()
    state = {
        "model": {"_orig_mod." + k: v for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 20,
        "best_val_loss": torch.tensor(2.75),
        "config": dict(
            dataset="letters",
            batch_size=4,
            gradient_accumulation_steps=2,
            block_size=16,
            n_layer=2,
            n_head=2,
            n_embd=32,
            learning_rate=1e-3,
            max_iters=30,
            eval_interval=5,
            eval_iters=2,
            device="cuda",
            dtype="bfloat16",
            compile=True,
            out_dir="elsewhere",
            always_save_checkpoint=True,
            beta2=0.99,
            warmup_iters=0,
            lr_decay_iters=30,
        ),  # fmt: skip
    }
    torch.save(state, out / "ckpt.pt")
    return out, state


def test_a_nanogpt_folder_resumes_and_speaks(tmp_path, monkeypatch, capsys):
    out, state = nanogpt_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    train.main(settings("--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32"))
    printed = capsys.readouterr().out
    assert "resuming from out/ckpt.pt at iteration 20" in printed.replace("\\", "/") and "iter 20:" in printed
    last = checkpoint.load(out / "last.pt")
    assert last["iter_num"] == 30 and last["sequences_seen"] == 30 * 8 and last["config"]["beta2"] == 0.99
    assert float(last["optimizers"]["transformer.wpe.weight"]["step"]) == 13
    assert last["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    (out / "last.pt").unlink()
    torch.save(state, out / "ckpt.pt")
    done = run_script(
        "sample.py", "--start=abc", "--num_samples=2", "--max_new_tokens=20", "--device=cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    samples = done.stdout.split("---------------\n")
    assert len(samples) == 3 and all(s.startswith("abc") and len(s) == 24 for s in samples[:2])
    assert set("".join(samples)) <= set("\n abcdefghij")


def test_a_config_file_in_nanogpts_manner_runs_unchanged(stories, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import time\nout_dir = 'out-mine'\neval_interval = 5 # often\neval_iters = 2\nwandb_log = False # feel free\n"
        f"wandb_run_name = 'ft-' + str(time.time())\ndataset = {str(stories)!r}\ninit_from = 'scratch'\n"
        "always_save_checkpoint = True\nbatch_size = 1\ngradient_accumulation_steps = 2\nmax_iters = 5\n"
        "learning_rate = 3e-5\ndecay_lr = False\ndevice = 'cpu'\ncompile = False\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    train.main(settings("mine.py", *[f"--{k}={v}" for k, v in TINY.items()]))
    assert {line["lr"] for line in log_of(tmp_path / "out-mine")} == {3e-5}
    assert checkpoint.load(tmp_path / "out-mine" / "ckpt.pt")["iter_num"] == 5


def copy_run(straight, tmp_path, monkeypatch):
    shutil.copytree(straight[0], tmp_path / "out")
    monkeypatch.chdir(tmp_path)


RESUME = ["--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32"]


def test_a_finished_run_says_so_and_a_larger_max_iters_goes_on(straight, tmp_path, monkeypatch, capsys):
    copy_run(straight, tmp_path, monkeypatch)
    before = (tmp_path / "out" / "last.pt").read_bytes()
    train.main(settings(*RESUME))
    assert "nothing left to do: all 30 iterations are done" in capsys.readouterr().out
    assert (tmp_path / "out" / "last.pt").read_bytes() == before
    train.main(settings(*RESUME, "--max_iters=32"))
    assert [i for i, *_ in figures(tmp_path / "out")] == list(range(32))


def test_eval_only_evaluates_once_and_saves_nothing_after_resuming_too(
    straight, stories, tmp_path, monkeypatch, capsys
):
    copy_run(straight, tmp_path, monkeypatch)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    train.main(settings(*RESUME, "--eval_only=True"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "iter"))]
    wanted = log_of(tmp_path / "out", "eval")[-1]["val_loss"]
    assert len(lines) == 1 and lines[0].startswith("step 30:") and f"val loss {wanted:.4f}" in lines[0]
    train_here(f"--dataset={stories}", "--eval_only", "--out_dir=new")
    assert capsys.readouterr().out.count("step 0:") == 1 and not (tmp_path / "new").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_what_the_user_sets_on_resuming(straight, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    dataset = checkpoint.load("out/ckpt.pt")["config"]["dataset"]
    longer = ["--init_from=out", "--block_size=64", f"--dataset={dataset}", "--out_dir=longer"]
    train_here(*longer, "--max_iters=1", "--gradient_accumulation_steps=1")
    assert checkpoint.load(tmp_path / "longer" / "last.pt")["model_args"]["block_size"] == 32
    for key in ("--n_layer=3", "--n_embd=64", "--bias=True", "--block_size=64"):
        with pytest.raises(UserError, match=key[2:].split("=")[0]):
            train.main(settings(*RESUME, key, "--max_iters=32"))
    with pytest.raises(UserError, match="coloration|expected"):
        train.main(settings(*RESUME, "--max_iters=32", "--lr_schedule=coloration"))
    train.main(settings(*RESUME, "--n_layer=2", "--dropout=0.0", "--block_size=16", "--max_iters=32"))
    last = checkpoint.load(tmp_path / "out" / "last.pt")
    assert last["model"]["transformer.wpe.weight"].shape == (16, 32) and last["model_args"]["block_size"] == 16
    assert last["config"]["gradient_accumulation_steps"] == 4 and last["config"]["dropout"] == 0.0


def test_a_dataset_with_another_tokenizer_is_refused(straight, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    (tmp_path / "t.txt").write_text("another text, with other characters. " * 50, encoding="utf-8")
    assert run_script("data/chinese/prepare.py", "--input=t.txt", "--dest=other", cwd=tmp_path).returncode == 0
    for start in ("--init_from=resume", "--init_from=out"):
        with pytest.raises(UserError, match="another tokenizer"):
            train_here(start, "--dataset=other", "--max_iters=40")
    reuse = ["--input=t.txt", "--tokenizer=out", "--dest=reused"]
    assert run_script("data/chinese/prepare.py", *reuse, cwd=tmp_path).returncode == 0
    train_here("--init_from=out", "--dataset=reused", "--max_iters=3", "--out_dir=new", "--warmup_iters=0",
               "--gradient_accumulation_steps=1", "--decay_lr=False", "--learning_rate=1e-6")  # fmt: skip
    new, old = checkpoint.load(tmp_path / "new" / "last.pt"), checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert new["iter_num"] == 3 and float(new["optimizers"]["transformer.wpe.weight"]["step"]) == 3
    for name, value in new["model"].items():
        assert (value - old["model"][name]).abs().max() < 1e-5


def test_weights_from_a_hugging_face_folder(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's vocabulary is not on this machine (TIKTOKEN_CACHE_DIR)")
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")
    (tmp_path / "t.txt").write_text("All that glitters is not gold. " * 100, encoding="utf-8")
    assert run_script("data/shakespeare/prepare.py", "--input=t.txt", "--dest=gold", cwd=tmp_path).returncode == 0
    start = ["--init_from=hf", "--dataset=gold", "--device=cpu", "--compile=False", "--matmul=float32"]
    small = ["--batch_size=2", "--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=1"]
    done = run_script("train.py", *start, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ckpt = checkpoint.load(tmp_path / "out" / "last.pt")
    assert ckpt["model_args"] | {"dropout": 0} == dict(
        n_layer=1, n_head=2, n_embd=8, block_size=64, bias=True, vocab_size=50257, dropout=0, act="gelu_tanh"
    )
    done = run_script(
        "sample.py", "--init_from=hf", "--start=All", "--max_new_tokens=3", "--num_samples=1", cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout.startswith("All"), done.stderr


def test_weights_and_vocabulary_from_a_hugging_face_folder(tmp_path, stories, monkeypatch):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    text = (stories / "some.txt").read_text(encoding="utf-8")
    (tmp_path / "hf").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(text) - set("\n　 ")), *"abc"]
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64, vocab_size=len(words) + 3)
    transformers.GPT2LMHeadModel(config).save_pretrained("hf")
    os.mkdir("texts")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(text + "ABC", encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=texts", "--tokenizer=hf", "--dest=bert", cwd=tmp_path)
    assert done.returncode == 0 and "not compared" in done.stdout, done.stderr
    reference = tokenizers.BertWordPieceTokenizer("hf/vocab.txt", lowercase=True)
    ids = [*reference.encode(text + "ABC", add_special_tokens=False).ids, words.index("[SEP]")]
    assert np.fromfile("bert/train.bin", "<u2").tolist() == np.fromfile("bert/val.bin", "<u2").tolist() == ids

    small = ["--batch_size=2", "--max_iters=2", "--eval_iters=1", "--gradient_accumulation_steps=1", "--init_from=hf"]
    train_here(*small, "--dataset=bert", "--sample_interval=1", "--sample_prompts=从前")
    saved = checkpoint.load("out/last.pt")
    assert saved["tokenizer"]["kind"] == "bpe" and saved["model_args"]["vocab_size"] == len(words) + 3
    os.mkdir("other")
    (tmp_path / "other" / "vocab.txt").write_text("\n".join(words[:5] + words[:4:-1]), encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=texts", "--tokenizer=other", "--dest=data2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for dataset in (stories, "data2"):
        with pytest.raises(UserError, match="prepare it with --tokenizer=hf"):
            train_here(*small, f"--dataset={dataset}", "--out_dir=new")
    speak = ["--start=从前", "--max_new_tokens=3", "--num_samples=1", "--device=cpu"]
    for source in ("--init_from=hf", "--out_dir=out"):
        done = run_script("sample.py", source, *speak, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("从前"), done.stderr


def test_a_diverging_run_stops_with_a_sentence_and_harms_no_checkpoint(straight, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    before = {n: (tmp_path / "out" / n).read_bytes() for n in ("ckpt.pt", "last.pt", "last.prev.pt")}
    wild = ["--learning_rate=1e20", "--decay_lr=False", "--max_iters=60", "--eval_interval=5", "--log_interval=100"]
    with pytest.raises(UserError, match="diverged"):
        train.main(settings(*RESUME, *wild))
    assert before == {n: (tmp_path / "out" / n).read_bytes() for n in before}
    with pytest.raises(UserError, match="diverged"):
        train.main(settings(*RESUME, *wild[:3], "--eval_interval=1000", "--log_interval=1"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_out_of_memory_names_the_keys_to_change(stories, tmp_path):
    big = ["--batch_size=200000", "--gradient_accumulation_steps=1"]
    code = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
sys.argv = {["train.py", *TINY_ARGS, f"--dataset={stories}", *big]!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(key in done.stderr for key in ("batch_size", "gradient_accumulation_steps", "block_size"))


def test_epochs_count_iterations_and_report_their_mean_loss(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    n = (stories / "train.bin").stat().st_size // 2
    per_epoch = ((n - 32) // 32) / 8
    train_here(f"--dataset={stories}", "--epochs=3", "--batch_size=8", "--gradient_accumulation_steps=1")
    iterations = math.floor(3 * per_epoch)
    log = log_of(tmp_path / "out")
    assert len(log) == iterations and checkpoint.load(tmp_path / "out" / "last.pt")["config"]["max_iters"] == iterations
    ends = log_of(tmp_path / "out", "epoch")
    assert [e["epoch"] for e in ends] == [1, 2, 3] and ends[0]["seconds"] > 0
    losses = [line["loss"] for line in log]
    first = ends[0]["iter"] + 1
    assert first == math.ceil(per_epoch)
    assert abs(ends[0]["mean_loss"] - np.mean(losses[:first])) < 1e-5
    assert abs(ends[1]["mean_loss"] - np.mean(losses[first : ends[1]["iter"] + 1])) < 1e-5
    assert log_of(tmp_path / "out", "eval")[-1]["val_accuracy"] > 0.05 and "epoch 2.99" in capsys.readouterr().out
    assert log[-1]["lr"] < 1e-3  # the decay ended with the epochs
    train_here(f"--dataset={stories}", "--epochs=3", "--max_iters=2", "--out_dir=short")
    assert len(log_of(tmp_path / "short")) == 2


def test_samples_are_drawn_along_the_way(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = ["--sample_prompts=《", "--sample_prompts=大大", "--sample_tokens=5", "--sample_interval=2"]
    train_here(f"--dataset={stories}", *prompts, "--max_iters=4", "--gradient_accumulation_steps=1")
    samples = log_of(tmp_path / "out", "sample")
    assert [(s["iter"], s["prompt"]) for s in samples] == [(2, "《"), (2, "大大"), (4, "《"), (4, "大大")]
    assert all(s["text"].startswith(s["prompt"]) for s in samples) and samples[3]["text"] in capsys.readouterr().out


def test_the_schedules_are_nanogpts_cosine_and_a_line():
    c = settings("--learning_rate=1e-3", "--min_lr=1e-4", "--warmup_iters=100", "--lr_decay_iters=1100")
    assert learning_rate_at(0, 0, c) == pytest.approx(1e-3 / 101)
    assert learning_rate_at(99, 0, c) == pytest.approx(1e-3 * 100 / 101)
    assert learning_rate_at(100, 0, c) == pytest.approx(1e-3)
    assert learning_rate_at(600, 0, c) == pytest.approx(5.5e-4)
    assert learning_rate_at(350, 0, c) == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_at(1100, 0, c) == learning_rate_at(10**6, 0, c) == 1e-4
    c.lr_schedule = "linear"
    assert learning_rate_at(350, 0, c) == pytest.approx(1e-4 + 9e-4 * 0.75)
    c.decay_lr = False
    assert learning_rate_at(10**6, 0, c) == 1e-3


def test_every_config_file_has_known_keys_and_sound_settings(capsys):
    for path in sorted((ROOT / "config").glob("*.py")):
        c = settings(str(path))
        assert c.given and "also sets" not in capsys.readouterr().err, path
        startup.check(c, 1)
        GPTConfig(**{k: getattr(c, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")})


@pytest.mark.parametrize("processes", [1, 2, 4, 5, 8, 10, 20, 40])
def test_gpt2s_config_gives_half_a_million_tokens_at_any_number_of_processes(processes):
    c = settings("config/train_gpt2.py")
    startup.check(c, processes)
    assert c.batch_size * c.block_size * c.gradient_accumulation_steps == 491_520


def test_the_shakespeare_512_recipe_has_its_papers_numbers():
    c = settings("config/train_shakespeare_512.py")
    blocks = loader.blocks_per_epoch(1_003_854, c.block_size)
    assert c.epochs * blocks // c.batch_size == 1960 and c.warmup_iters * c.batch_size * c.block_size == 128 * 128 * 20


def test_bfloat16_on_a_cpu_trains(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_here(f"--dataset={stories}", "--dtype=bfloat16", "--max_iters=12", "--gradient_accumulation_steps=1")
    losses = [line["loss"] for line in log_of(tmp_path / "out")]
    assert losses[-1] < losses[0] - 0.3


def test_wandb_offline(stories, tmp_path):
    pytest.importorskip("wandb")
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", "--max_iters=2", "--wandb_log=True", cwd=tmp_path,
                      env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_without_a_compiler_it_trains_without_compiling(stories, tmp_path):
    done = run_script("train.py", *TINY_ARGS, "--compile=True", f"--dataset={stories}", "--max_iters=1", cwd=tmp_path,
                      env={"PATH": "", "CXX": "no-such-compiler"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "running without it" in line]
    assert len(notes) == 1 and "iter 0:" in done.stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_compiled_is_equal_to_eager_but_for_rounding(stories, tmp_path):
    common = [*TINY_ARGS, f"--dataset={stories}", "--max_iters=3", "--n_layer=1", "--gradient_accumulation_steps=1"]
    for out, flag in (("eager", "False"), ("compiled", "True")):
        done = run_script("train.py", *common, f"--compile={flag}", f"--out_dir={out}", cwd=tmp_path)
        assert done.returncode == 0 and "running without it" not in done.stderr, done.stdout + done.stderr
    for (_, a, _, _), (_, b, _, _) in zip(figures(tmp_path / "eager"), figures(tmp_path / "compiled"), strict=True):
        assert abs(a - b) < 1e-4
    assert not any("_orig_mod" in k for k in torch.load(tmp_path / "compiled" / "last.pt")["model"])


def test_a_new_run_in_an_old_folder_never_speaks_with_the_old_ones_voice(straight, stories, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    old = (tmp_path / "out" / "ckpt.pt").read_bytes()
    train_here(f"--dataset={stories}", "--max_iters=1", "--eval_interval=5", "--learning_rate=0", "--min_lr=0")
    assert checkpoint.best("out")[1]["iter_num"] == checkpoint.newest("out")[1]["iter_num"] == 1
    assert (tmp_path / "out" / "previous" / "ckpt.pt").read_bytes() == old
    assert len(log_of(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "error, told",
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (NotImplementedError("no such operator"), False),
    ],
)
def test_only_a_lack_of_memory_is_told_as_one(error, told):
    with pytest.raises(UserError if told else type(error), match="batch_size" if told else None):
        with train.memory_error_told():
            raise error


def test_auto_begins_a_run_and_then_goes_on_with_it(straight, stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    auto = [f"--dataset={stories}", *RUN, "--eval_interval=10", "--init_from=auto"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"iter": 0}\n', encoding="utf-8")  # of a start killed before its save
    train_here(*auto, "--max_iters=12")
    assert "resuming" not in capsys.readouterr().out and not (tmp_path / "out" / "previous").exists()
    train_here(*auto)
    assert "resuming from" in capsys.readouterr().out
    assert figures(tmp_path / "out") == figures(straight[0])
    assert_same_state(tmp_path / "out", straight[0])
    train_here(*auto)
    assert "nothing left to do" in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="no checkpoint to resume"):  # a run whose files are damaged is no fresh start
        train_here(*auto)


def test_last_pt_is_saved_as_often_as_asked_and_numbered_ones_are_kept(straight, stories, tmp_path):
    often = ["--eval_interval=10", "--save_interval=3", "--keep_checkpoints=2", "--checkpoint_interval=7"]
    status, _ = interrupted(tmp_path, stories, 23, signal.SIGKILL, *often)
    assert status == -signal.SIGKILL
    assert 14 <= checkpoint.newest(str(tmp_path / "out"))[1]["iter_num"] <= 30  # numbered ones are waited for
    assert (tmp_path / "out" / "ckpt-14.pt").is_file()
    done = run_script(
        "train.py", "--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").glob("ckpt-*")} == {"ckpt-21.pt", "ckpt-28.pt"}
    assert figures(tmp_path / "out") == figures(straight[0])
    assert_same_state(tmp_path / "out", straight[0])
    (tmp_path / "branch").mkdir()
    shutil.copy(tmp_path / "out" / "ckpt-21.pt", tmp_path / "branch" / "last.pt")
    resume = ["--init_from=resume", "--out_dir=branch", "--device=cpu", "--compile=False", "--matmul=float32"]
    assert run_script("train.py", *resume, cwd=tmp_path).returncode == 0
    assert_same_state(tmp_path / "branch", straight[0])


def test_patience_counts_evaluations_across_resumes(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # trained a little, then with a rate that ruins it: the validation loss rises from some evaluation on
    worse = [f"--dataset={stories}", "--gradient_accumulation_steps=1", "--decay_lr=False", "--eval_interval=2"]
    worse += ["--learning_rate=0.3", "--max_iters=200", "--eval_iters=4"]
    train_here(*worse, "--patience=3", "--out_dir=straight")
    assert "stopped early: the validation loss has not fallen in 3 evaluations" in capsys.readouterr().out
    losses = [e["val_loss"] for e in log_of(tmp_path / "straight", "eval")]
    best = losses.index(min(losses))
    assert len(losses) == best + 4  # counted on paper: three evaluations after the best one
    stopped = checkpoint.load("straight/last.pt")["iter_num"]
    assert stopped == 2 * (best + 3) < 200 and checkpoint.load("straight/ckpt.pt")["iter_num"] == 2 * best
    for until in (*range(2, stopped, 2), 200):  # stopped and resumed at each evaluation: none is counted twice
        train_here(*worse, "--patience=3", "--init_from=auto", f"--max_iters={until}")
    assert checkpoint.load("out/last.pt")["iter_num"] == stopped
    capsys.readouterr()
    train_here(*worse, "--patience=3", "--init_from=resume")
    assert "nothing left to do: the validation loss has not fallen in 3" in capsys.readouterr().out


def test_an_exception_saves_what_was_done_before_it_leaves(straight, stories, tmp_path, monkeypatch, capsys):
    """A token beyond the vocabulary in the middle of the data, which meta.json does not know of."""
    shutil.copytree(stories, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    bad = [f"--dataset={tmp_path / 'data'}", *RUN, "--eval_interval=1000"]
    c = settings(*TINY_ARGS, *bad)
    ids = np.fromfile("data/train.bin", np.uint16)
    numbers = np.arange(16 * 22, 16 * 23)  # the sequences of iteration 22
    starts = loader.sequence_starts(numbers, len(ids), c.block_size, c.seed)
    before = loader.sequence_starts(np.arange(16 * 22), len(ids), c.block_size, c.seed)
    reached = {int(s) + k for s in before for k in range(33)}
    at = next(int(s) + k for s in starts for k in range(33) if int(s) + k not in reached)
    good = ids[at]
    ids[at] = 60000
    ids.tofile("data/train.bin")
    with pytest.raises(UserError, match="60000"):
        train.main(c)
    assert "saved at iteration 2" in capsys.readouterr().err
    assert checkpoint.newest("out")[1]["iter_num"] in (21, 22)  # the batch is read while the step before runs
    ids[at] = good
    ids.tofile("data/train.bin")
    train.main(settings(*RESUME, "--eval_interval=10"))
    assert figures(tmp_path / "out") == figures(straight[0])


def test_a_gradient_that_is_not_finite_is_noticed_before_anything_is_saved(straight, tmp_path, monkeypatch):
    """Read one iteration late: the weights are ruined by then, and no file may have them."""
    copy_run(straight, tmp_path, monkeypatch)
    wild = ["--learning_rate=1e20", "--decay_lr=False", "--max_iters=60", "--save_interval=1", "--log_interval=1000"]
    with pytest.raises(UserError, match=r"(loss|gradient norm) of iteration 3\d is no finite number"):
        train.main(settings(*RESUME, *wild))
    for path in (tmp_path / "out").glob("*.pt"):
        assert all(w.isfinite().all() for w in checkpoint.load(path)["model"].values()), path
    # weights of 1e20 are finite, but their loss is not: the state that leads there is not the one to go on from
    train.main(settings(*RESUME, "--max_iters=36"))
    assert checkpoint.newest("out")[1]["iter_num"] == 36 and (tmp_path / "out" / "last.diverged.pt").is_file()


def test_skipped_updates_of_a_loss_scaler_are_counted_and_logged_and_resumed(stories, tmp_path, monkeypatch, capsys):
    """The scaler of fp16 training, here with float32 and a scale at which the first gradients overflow."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, until):
        held = contextlib.ExitStack()
        c = settings(*TINY_ARGS, f"--dataset={stories}", *RUN, f"--max_iters={until}", *argv)
        r, *data = startup.prepare(c, held)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=5)
        if r.started_at:
            scaler.load_state_dict(checkpoint.load("out/last.pt")["scaler"])
        r.scaler, r.reporter.scaled = scaler, True
        train.train_until_done(r, *data)
        train.finish(r)
        held.close()
        return log_of(tmp_path / r.c.out_dir)

    straight = run("--out_dir=straight", until=30)
    skipped = [line["skipped_steps"] for line in straight]
    overflowed = [line["grad_norm"] is None for line in straight]  # JSON has no infinity
    assert 0 < skipped[-1] < 20 and skipped == list(np.cumsum(overflowed))
    assert f"skipped {skipped[-1]}" in capsys.readouterr().out
    run("--init_from=auto", until=int(skipped.index(skipped[-1])))
    resumed = run("--init_from=auto", until=30)
    keys = ("iter", "loss", "grad_norm", "skipped_steps")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in straight]
    assert_same_state(tmp_path / "out", tmp_path / "straight")


@pytest.mark.skipif(not shutil.which("g++") or sys.platform == "win32", reason="no compiler here, or no POSIX signals")
def test_compiled_killed_and_resumed_is_bit_for_bit_the_straight_compiled_run(stories, tmp_path):
    one = ["--compile=True", "--n_layer=1", "--eval_interval=5", "--max_iters=12"]
    for folder in ("straight", "killed"):
        (tmp_path / folder).mkdir()
    done = run_script("train.py", *TINY_ARGS, f"--dataset={stories}", *RUN, *one, cwd=tmp_path / "straight")
    assert done.returncode == 0 and "running without it" not in done.stderr, done.stderr
    status, _ = interrupted(tmp_path / "killed", stories, 7, signal.SIGKILL, *one)
    assert status == -signal.SIGKILL
    done = run_script("train.py", *RESUME[:2], "--matmul=float32", "--compile=True", cwd=tmp_path / "killed")
    assert done.returncode == 0 and "resuming from" in done.stdout, done.stdout + done.stderr
    assert figures(tmp_path / "killed" / "out") == figures(tmp_path / "straight" / "out")
    assert_same_state(tmp_path / "killed" / "out", tmp_path / "straight" / "out")


def test_a_dataset_that_has_changed_is_told_on_resuming(straight, stories, tmp_path, monkeypatch, capsys):
    copy_run(straight, tmp_path, monkeypatch)
    shutil.copytree(stories, tmp_path / "data")
    train.main(settings(*RESUME, f"--dataset={tmp_path / 'data'}", "--max_iters=31"))
    assert "no longer the one" not in capsys.readouterr().err
    meta = json.loads((tmp_path / "data" / "meta.json").read_text(encoding="utf-8"))
    meta["files"]["train.bin"]["sha256"] = "0" * 64
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    train.main(settings(*RESUME, f"--dataset={tmp_path / 'data'}", "--max_iters=32"))
    assert "no longer the one" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the file that is always full")
def test_a_console_on_a_full_disk_does_not_end_training(straight, stories, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY_ARGS, f"--dataset={stories}", *RUN, "--eval_interval=10"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full).returncode == 0
    assert_same_state(tmp_path / "out", straight[0])


def test_a_run_that_is_ending_is_waited_for_before_its_checkpoint_is_chosen(straight, stories, tmp_path):
    ending = RunDir(str(tmp_path / "out"), None)
    auto = [f"--dataset={stories}", *RUN, "--eval_interval=10", "--init_from=auto", "--max_iters=31"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY_ARGS, *auto]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    time.sleep(4)
    for path in straight[0].iterdir():
        shutil.copy(path, tmp_path / "out")
    ending.close()
    said = process.communicate()[0]
    assert process.returncode == 0 and "at iteration 30" in said, said
    assert [i for i, *_ in figures(tmp_path / "out")] == list(range(31))


def test_an_evaluation_that_the_end_of_a_run_lacks_is_made_up_for(straight, tmp_path, monkeypatch, capsys):
    copy_run(straight, tmp_path, monkeypatch)
    state = torch.load("out/last.pt", weights_only=True)
    state["progress"]["evaluated_at"] = 20  # as an error during the last evaluation leaves it
    checkpoint.save(tmp_path / "out" / "last.pt", state)
    train.main(settings(*RESUME))
    assert "step 30:" in capsys.readouterr().out
    assert [e["iter"] for e in log_of(tmp_path / "out", "eval")] == [0, 10, 20, 30]
    train.main(settings(*RESUME))
    assert "nothing left to do" in capsys.readouterr().out


def test_patience_ends_no_epoch(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    still = [f"--dataset={stories}", "--epochs=10", "--learning_rate=0", "--min_lr=0", "--eval_interval=20"]
    train_here(*still, "--patience=2", "--gradient_accumulation_steps=4")
    assert len(log_of(tmp_path / "out")) == 40 and [e["epoch"] for e in log_of(tmp_path / "out", "epoch")] == [1]


def test_a_checkpoint_that_lacks_a_weight_is_a_sentence(straight, tmp_path, monkeypatch):
    copy_run(straight, tmp_path, monkeypatch)
    state = torch.load("out/last.pt", weights_only=True)
    del state["model"]["lm_head.weight"]
    checkpoint.save(tmp_path / "out" / "last.pt", state)
    with pytest.raises(UserError, match="do not make a GPT"):
        train.main(settings(*RESUME, "--max_iters=40"))
