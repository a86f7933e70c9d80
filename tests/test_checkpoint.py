import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import checkpoint
from configurator import UserError
from model import GPT, GPTConfig
from run_dir import claim_out_dir
from tokenizer import CharTokenizer, GPT2Tokenizer


def a_state(iter_num=5, seed=0, **more):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=20, bias=False, **TINY))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    x = torch.randint(20, (2, 8))
    model(x, x)[1].backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model.config.model_args(),
        "iter_num": iter_num,
        "best_val_loss": 2.5,
        "config": {"dataset": "x"},
        **more,
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_is_what_is_loaded_and_nothing_lies_beside(tmp_path):
    state = a_state()
    checkpoint.save(tmp_path / "ckpt.pt", state)
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert same(loaded["model"], state["model"]) and os.listdir(tmp_path) == ["ckpt.pt"]
    assert loaded["iter_num"] == 5 and loaded["best_val_loss"] == 2.5
    assert same(loaded["optimizer"]["state"][0], state["optimizer"]["state"][0])


def test_the_one_before_is_kept(tmp_path):
    for iter_num in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", a_state(iter_num), keep_as=tmp_path / "last.prev.pt")
    assert checkpoint.load(tmp_path / "last.pt")["iter_num"] == 3
    assert checkpoint.load(tmp_path / "last.prev.pt")["iter_num"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_refuses_leaves_the_old_file_and_no_litter(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", a_state(1))
    before = (tmp_path / "ckpt.pt").read_bytes()
    code = """
import resource, signal, sys, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import checkpoint
from configurator import run
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
run(checkpoint.save, checkpoint.Path(sys.argv[1]), {"model": torch.zeros(10**6)})
"""
    command = [sys.executable, "-c", code, str(tmp_path / "ckpt.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]


def test_damage_is_noticed(tmp_path):
    path = tmp_path / "ckpt.pt"
    state = a_state()
    checkpoint.save(path, state)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        try:
            assert same(checkpoint.load(path)["model"], state["model"])
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30  # the rest hit padding
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="ckpt.pt"):
            checkpoint.load(path)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "model_args": Malice()}, "ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malice()))
    for name in ("ckpt.pt", "plain.pt"):
        with pytest.raises(UserError):
            checkpoint.load(name)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_checkpoints_are_sentences(tmp_path):
    torch.save([1, 2], tmp_path / "a.pt")
    torch.save({"model": 3}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            checkpoint.load(tmp_path / name)
    state = a_state()
    del state["model"]["transformer.wpe.weight"]
    with pytest.raises(UserError, match="wpe"):
        checkpoint.model_of(state, "c.pt")
    with pytest.raises(UserError, match="model_args"):
        checkpoint.model_of(a_state() | {"model_args": {"colour": 3}}, "c.pt")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_and_old_mask_buffers_are_dropped(tmp_path, prefix):
    state = a_state()
    weights = state["model"]
    state["model"] = {prefix + k: v for k, v in weights.items()}
    state["model"][prefix + "transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    state["best_val_loss"] = torch.tensor(1.5)  # nanoGPT's is a tensor
    torch.save(state, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert same(loaded["model"], weights) and type(loaded["best_val_loss"]) is float
    assert checkpoint.model_of(loaded, "x").config.n_layer == 2


def test_the_newest_whole_state_is_resumed(tmp_path, capsys):
    with pytest.raises(UserError, match="no checkpoint to resume"):
        checkpoint.newest(str(tmp_path))
    checkpoint.save(tmp_path / "ckpt.pt", a_state(9))
    assert checkpoint.newest(str(tmp_path))[1]["iter_num"] == 9
    checkpoint.save(tmp_path / "last.prev.pt", a_state(3))
    assert checkpoint.newest(str(tmp_path))[1]["iter_num"] == 3
    checkpoint.save(tmp_path / "last.pt", a_state(4))
    path, state = checkpoint.newest(str(tmp_path))
    assert (path.name, state["iter_num"]) == ("last.pt", 4) and "warning" not in capsys.readouterr().err
    (tmp_path / "last.pt").write_bytes(b"x" * 1000)
    path, state = checkpoint.newest(str(tmp_path))
    assert (path.name, state["iter_num"]) == ("last.prev.pt", 3)
    warning = capsys.readouterr().err
    assert warning.startswith("warning") and "last.pt" in warning and warning.count("\n") == 1
    claim_out_dir(tmp_path, path, False)  # and what is damaged can no longer replace the good one
    checkpoint.save(tmp_path / "last.pt", a_state(5), keep_as=tmp_path / "last.prev.pt")
    assert checkpoint.load(tmp_path / "last.prev.pt")["iter_num"] == 3 and (tmp_path / "last.damaged.pt").exists()


def restored(state, model_args=None):
    model = checkpoint.model_of(state | {"model_args": model_args or state["model_args"]}, "x")
    optimizer = model.configure_optimizers(0.2, 1e-3, (0.8, 0.95), "cpu")
    checkpoint.load_optimizers([optimizer], model, state, "x")
    return model, optimizer


def test_optimizer_state_by_name_and_by_position_agree_and_options_stay_the_runs():
    state = a_state()
    model, by_position = restored(state)
    named = checkpoint.named_state(model, [by_position])
    assert set(named) == {name for name, _ in model.named_parameters()}
    _, by_name = restored(state | {"optimizers": dict(reversed(named.items()))})
    a, b = by_position.state_dict(), by_name.state_dict()
    assert all(same(a["state"][i], b["state"][i]) for i in a["state"]) and len(a["state"]) == len(b["state"]) > 0
    assert same(a["state"][3], state["optimizer"]["state"][3])
    assert a["param_groups"][0]["weight_decay"] == 0.2 and a["param_groups"][0]["betas"] == (0.8, 0.95)


def test_an_optimizer_of_another_model_is_a_sentence():
    state = a_state()
    del state["optimizer"]["state"][0]
    with pytest.raises(UserError, match="parameters"):
        restored(state)


def test_tokenizers_come_from_the_checkpoint_or_from_nanogpts_dataset_folder(tmp_path, monkeypatch):
    ours = CharTokenizer("abc", byte_fallback=True, end_of_text=True)
    assert checkpoint.tokenizer_of(a_state(tokenizer=ours.meta()), "x") == ours
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="does not hold its tokenizer"):
        checkpoint.tokenizer_of(a_state(), "x")
    (folder / "train.bin").write_bytes(b"\x00\x00")
    chars = "\n abcdefghijklmnopqr"
    meta = {"vocab_size": 20, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert checkpoint.tokenizer_of(a_state(), "x").decode([2, 3, 4]) == "abc"
    shutil.rmtree(folder)
    big = a_state()
    big["model_args"]["vocab_size"] = 50304
    assert checkpoint.tokenizer_of(big, "x").kind == "gpt2"


def hf_folder(folder, vocab_size):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=vocab_size)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def test_a_hugging_face_folder_brings_its_own_tokenizer(tmp_path, capsys):
    vocab = {chr(0x4E00 + i): i for i in range(100)}
    for size, own in ((50257, GPT2Tokenizer()), (100, None)):
        folder = hf_folder(tmp_path / str(size), size)
        assert checkpoint.pretrained(folder)[1] == own
        told = capsys.readouterr().err
        assert ("taken for GPT-2's" in told) == bool(own)
        (tmp_path / str(size) / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
        model, tokenizer = checkpoint.pretrained(folder)
        assert tokenizer.encode("丁一").tolist() == [1, 0] and tokenizer.vocab_size == 100
        assert model.config.vocab_size == size and checkpoint.fits(tokenizer, size)
    folder = hf_folder(tmp_path / "small", 99)
    shutil.copy(tmp_path / "100" / "vocab.txt", folder)
    with pytest.raises(UserError, match="tokenizer has 100 tokens, but its model 99"):
        checkpoint.pretrained(folder)


def test_an_out_dir_speaks_from_its_best_checkpoint_else_its_last(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.best(str(tmp_path))
    checkpoint.save(tmp_path / "last.pt", a_state(7))
    assert checkpoint.best(str(tmp_path))[1]["iter_num"] == 7
    checkpoint.save(tmp_path / "ckpt.pt", a_state(4))
    assert checkpoint.best(str(tmp_path))[1]["iter_num"] == 4
    assert checkpoint.best(str(tmp_path / "last.pt"))[1]["iter_num"] == 7
