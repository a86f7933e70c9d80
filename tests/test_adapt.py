"""LoRA, adapters, freezing: what they compute, against NumPy; what they leave alone; and that their files come back."""

import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import TINY, TINY_ARGS, run_script, torchrun
from test_train import assert_same_state, figures, log_of, settings, train_here

import adapt
import checkpoint
import train
from adapt import Adaptation, GrownEmbedding, LoRALinear, attach, merge, train_only
from chat import LAYOUT, ChatTokenizer
from configurator import Config, UserError
from extras import export
from extras import merge as merge_script
from generate import Sampling, continuations
from model import GPT, GPTConfig, derive_seed
from muon import build_optimizers
from startup import build_model, signature
from tokenizer import load_tokenizer

GPT2 = TINY | {"vocab_size": 65}
MODERN = GPT2 | {"bias": False, "act": "relu2", "pos": "rope", "norm": "rmsnorm", "qk_norm": True, "tied": False}
MODERN |= {"smear": 2}
DEMO = MODERN | {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 1311, "smear": 3}
LORA, ADAPTERS = Adaptation(lora_rank=8), Adaptation(adapter_dim=8)
EVERYWHERE = Adaptation(lora_rank=4, lora_alpha=8.0, lora_targets="c_attn, c_proj,c_fc")
FREEZES = [Adaptation(freeze=f) for f in ("all_but_head", "all_but_last_1", "every_other", "all_but_attention")]
ALL = [LORA, EVERYWHERE, ADAPTERS, *FREEZES]


def name_of(adaptation: Adaptation) -> str:
    default = Adaptation()
    return ",".join(f"{k}={v}" for k, v in vars(adaptation).items() if v != getattr(default, k))


def random_model(shape: dict, scale: float = 0.1) -> GPT:
    """Every parameter random, gains and biases too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, scale)
    return model


def disturb(model: GPT) -> None:
    """What was added to a model, random where it was zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] in adapt.ADDED:
                p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))


def logits(model: GPT, vocab_size: int = 65) -> torch.Tensor:
    x = torch.randint(vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x, x)[0]


@pytest.mark.parametrize("shape", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("lora", [LORA, EVERYWHERE], ids=name_of)
def test_lora_begins_as_nothing_and_merged_is_unmerged_is_numpys(shape, lora):
    model, plain = random_model(shape), random_model(shape)
    attach(model, lora, seed=1)
    assert torch.equal(logits(model), logits(plain))
    disturb(model)
    parts = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    wanted = {t.strip() for t in lora.lora_targets.split(",")}
    assert {name.rpartition(".")[2] for name in parts} == wanted
    assert len(parts) == shape["n_layer"] * (len(wanted) + ("c_proj" in wanted))
    unmerged = logits(model)
    assert (unmerged - logits(plain)).abs().max() > 0.05
    state = plain.state_dict()
    for name, m in parts.items():
        a, b = (p.detach().numpy().astype(np.float64) for p in (m.lora_a, m.lora_b))
        update = lora.lora_alpha / lora.lora_rank * np.einsum("or,ri->oi", b, a)
        state[f"{name}.weight"] = torch.tensor(state[f"{name}.weight"].numpy() + update).float()
    plain.load_state_dict(state)
    assert (logits(plain) - unmerged).abs().max() < 1e-5
    merge(model)
    assert (logits(model) - unmerged).abs().max() < 1e-5
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("shape", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_adapters_begin_as_nothing_and_are_numpys(shape):
    model, plain = random_model(shape), random_model(shape)
    attach(model, ADAPTERS, seed=1)
    assert torch.equal(logits(model), logits(plain))
    disturb(model)
    assert (logits(model) - logits(plain)).abs().max() > 0.01
    x = torch.randn(5, 4 * shape["n_embd"])
    own, linear = model.transformer.h[1].mlp.c_proj, plain.transformer.h[1].mlp.c_proj
    y = linear(x).detach().numpy().astype(np.float64)
    down, d, up, u = (p.detach().numpy() for p in (own.down, own.down_bias, own.up, own.up_bias))
    assert down.shape == (8, shape["n_embd"]) and up.shape == (shape["n_embd"], 8)
    inner = y @ down.T + d
    gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    np.testing.assert_allclose(own(x).detach().numpy(), y + gelu @ up.T + u, atol=1e-5)
    assert type(model.transformer.h[0].attn.c_proj) is adapt.AdapterLinear is type(own)
    assert type(model.transformer.h[0].attn.c_attn) is nn.Linear is type(model.transformer.h[0].mlp.c_fc)


def test_lora_dropout_is_for_training_alone():
    model = random_model(GPT2)
    attach(model, Adaptation(lora_rank=8, lora_dropout=0.5), seed=1)
    disturb(model)
    m, x = model.transformer.h[0].attn.c_attn, torch.randn(2000, 32)
    assert torch.equal(m.eval()(x), m(x))
    dropped = torch.stack([m.train()(x) for _ in range(200)])
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - m.eval()(x)).abs().max() < 0.3 * dropped.std(0).max()


# what each trains, written down on its own
TRAINED = {
    "lora_rank=8": r"\.lora_[ab]$",
    name_of(EVERYWHERE): r"\.lora_[ab]$",
    "adapter_dim=8": r"c_proj\.(down|up)(_bias)?$",
    "freeze=all_but_head": r"ln_f|lm_head",
    "freeze=all_but_last_1": r"\.h\.1\.|ln_f|lm_head",
    "freeze=every_other": r"\.h\.1\.|ln_f|lm_head",
    "freeze=all_but_attention": r"\.attn\.",
}


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("adaptation", ALL, ids=name_of)
def test_in_50_steps_what_is_frozen_keeps_its_bits_and_the_rest_is_trained(adaptation, shape, optim):
    model = random_model(shape | {"dropout": 0.1}).train()
    if adaptation.adds:
        attach(model, adaptation, seed=1)
    train_only(model, adaptation)
    optimizers = build_optimizers(model, optim, 0.1, 1e-3, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.randint(65, (50, 2, 17), generator=torch.Generator().manual_seed(2))
    for batch in x:
        model(batch[:, :-1], batch[:, 1:], loss_only=True)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    own = TRAINED[name_of(adaptation)]
    if adaptation.freeze == "all_but_head" and shape is GPT2:
        own += "|wte"  # tied
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != bool(re.search(own, name)), name
    blocks = {p for p in model.transformer.h.parameters() if p.requires_grad}
    linears = {m.weight for m in model.transformer.h.modules() if isinstance(m, nn.Linear)}
    assert len(optimizers) == (2 if optim == "muon" and blocks & linears else 1)


def test_every_other_is_counted_from_the_last_block_and_any_number_of_last_ones_can_be_trained():
    model = random_model(GPT2 | {"n_layer": 5})
    for freeze, wanted in (("every_other", {0, 2, 4}), ("all_but_last_3", {2, 3, 4}), ("all_but_attention", range(5))):
        train_only(model, Adaptation(freeze=freeze))
        assert {i for i, block in enumerate(model.transformer.h) if block.attn.c_attn.weight.requires_grad} == {*wanted}
    with pytest.raises(ValueError, match="all_but_last_6: the model has 5 blocks"):
        train_only(model, Adaptation(freeze="all_but_last_6"))
    train_only(model, Adaptation())
    assert all(p.requires_grad for p in model.parameters())


def state_bytes(model: GPT, optim: str) -> int:
    """What the optimizers' tensors really take after a step; AdamW's count of steps, a number each, aside."""
    optimizers = build_optimizers(model, optim, 0.1, 1e-3, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")
    x = torch.randint(model.config.vocab_size, (1, 9))
    model(x[:, :-1], x[:, 1:])[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    tensors = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return sum(v.nbytes for v in tensors if v.dim())


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_the_optimizers_memory_is_what_is_told_and_under_a_twentieth_at_the_demos_shape(optim):
    full = state_bytes(random_model(DEMO), optim)
    assert full == adapt.memory(random_model(DEMO), optim)["optimizer"]
    for adaptation in (LORA, ADAPTERS):
        model = random_model(DEMO)
        attach(model, adaptation, seed=1)
        train_only(model, adaptation)
        own = state_bytes(model, optim)
        assert own == adapt.memory(model, optim)["optimizer"] < 0.05 * full
        assert full == adapt.memory(model, optim, whole=True)["optimizer"]
    model = random_model(DEMO)
    train_only(model, FREEZES[2])
    assert state_bytes(model, optim) == adapt.memory(model, optim)["optimizer"] < 0.7 * full


def test_the_optimizers_memory_at_gpt2s_shape(monkeypatch):
    monkeypatch.setattr(GPT, "init_weights", lambda self, seed: None)
    # by hand: 124,337,664 parameters without biases (50257 tokens), AdamW's two moments of 4 bytes each
    lora = 12 * (8 * 768 + 2304 * 8)
    adapters = 12 * 2 * (8 * 768 + 8 + 768 * 8 + 768)
    for adaptation, n in ((LORA, lora), (ADAPTERS, adapters)):
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50257, bias=False))
        attach(model, adaptation, seed=1)
        train_only(model, adaptation)
        assert adapt.memory(model, "adamw", whole=True)["optimizer"] == 8 * 124_337_664
        assert adapt.memory(model, "adamw")["optimizer"] == 8 * n < 0.05 * 8 * 124_337_664
        assert f"trained parameters: {n:,} of {124_337_664 + n:,} (0." in adapt.summary(model, "adamw")


def a_base(folder: Path, stories: Path, **shape) -> Path:
    """An out_dir with a random model for the stories' vocabulary."""
    tokenizer = load_tokenizer(stories)
    model = random_model(GPT2 | {"vocab_size": tokenizer.vocab_size, "bias": False} | shape, 0.05)
    folder.mkdir(parents=True)
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "ckpt.pt", state)
    return folder


SHORT = ["--gradient_accumulation_steps=2", "--lr_decay_iters=20", "--eval_interval=10", "--dropout=0.1"]


def adapted_run(stories: Path, adaptation: Adaptation, *argv: str) -> None:
    """A run in this folder, from the base that lies in it."""
    keys = [f"--{key}={value}" for key, value in vars(adaptation).items() if value != getattr(Adaptation(), key)]
    train_here(f"--dataset={stories}", "--init_from=base", *SHORT, *keys, *argv)


@pytest.fixture(scope="module")
def runs(stories, tmp_path_factory):
    """A folder with a base, and LoRA and adapters of ten iterations on it."""
    folder = tmp_path_factory.mktemp("adapted")
    a_base(folder / "base", stories)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        adapted_run(stories, EVERYWHERE, "--max_iters=10", "--out_dir=lora")
        adapted_run(stories, ADAPTERS, "--max_iters=10", "--out_dir=adapters")
    return folder


@pytest.fixture
def in_runs(runs, tmp_path, monkeypatch):
    """A copy of that folder, to work in."""
    shutil.copytree(runs, tmp_path / "runs")
    for path in tmp_path.glob("runs/*/*.pt"):
        state = torch.load(path, weights_only=True)
        if "base" in state:  # which is the copy of it, for its files
            state["base"]["path"] = str(tmp_path / "runs" / "base")
            checkpoint.save(path, state)
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "adaptation, more",
    [
        (Adaptation(lora_rank=8, lora_dropout=0.2), ["--dropout=0"]),
        (EVERYWHERE, ["--optim=muon"]),
        (ADAPTERS, []),
        (FREEZES[0], ["--optim=muon"]),
        (FREEZES[1], []),
        (FREEZES[2], ["--optim=muon"]),
        (FREEZES[3], []),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Adaptation) else "".join(value),
)
def test_resumed_is_bit_for_bit_the_straight_run(stories, tmp_path, monkeypatch, capsys, adaptation, more):
    monkeypatch.chdir(tmp_path)
    a_base(tmp_path / "base", stories)
    adapted_run(stories, adaptation, *more, "--max_iters=20", "--out_dir=straight")
    adapted_run(stories, adaptation, *more, "--max_iters=10", "--sample_interval=5", "--sample_tokens=5")
    resume = ["--init_from=resume", "--max_iters=20", "--device=cpu", "--compile=False", "--matmul=float32"]
    train.main(settings(*resume))
    assert "resuming from" in capsys.readouterr().out
    assert figures(tmp_path / "out") == figures(tmp_path / "straight") and len(figures(tmp_path / "out")) == 20
    assert_same_state(tmp_path / "out", tmp_path / "straight")
    first, last = (checkpoint.load(tmp_path / "out" / name) for name in ("last.prev.pt", "last.pt"))
    changed = [name for name in last["model"] if not torch.equal(last["model"][name], first["model"][name])]
    assert set(changed) - {"lm_head.weight"} == last["optimizers"].keys() - {"lm_head.weight"}
    if not adaptation.adds:  # a whole model, as nanoGPT opens it
        assert "adapter" not in last
        GPT(GPTConfig(**last["model_args"])).load_state_dict(last["model"])
    with pytest.raises(UserError, match="adapter_dim=3 is set, but the run in out has"):
        train.main(settings(*resume, "--adapter_dim=3"))


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
def test_two_processes_and_one_have_the_same_losses(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_base(tmp_path / "base", stories)
    lora = Adaptation(lora_rank=8, lora_dropout=0.2, lora_targets="c_attn,c_fc")
    adapted_run(stories, lora, "--max_iters=10", "--out_dir=alone")
    keys = ["--lora_rank=8", "--lora_dropout=0.2", "--lora_targets=c_attn,c_fc", "--max_iters=10", "--init_from=base"]
    done = torchrun(2, "train.py", *TINY_ARGS, f"--dataset={stories}", *SHORT, *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, alone = figures(Path("out")), figures(Path("alone"))
    for (_, loss, _, norm), (_, wanted, _, wanted_norm) in zip(ours, alone, strict=True):
        assert abs(loss - wanted) < 1e-5 and abs(norm - wanted_norm) < 2e-4 * wanted_norm


def test_a_file_is_small_and_holds_what_was_added_alone(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_base(tmp_path / "base", stories, **{key: DEMO[key] for key in ("n_layer", "n_head", "n_embd")}, block_size=64)
    base = checkpoint.load("base/ckpt.pt")
    whole = 4 * sum(w.numel() for name, w in base["model"].items() if name != "lm_head.weight")
    for adaptation, wanted in ((LORA, 4 * (8 * 128 + 384 * 8)), (ADAPTERS, 8 * (8 * 128 + 8 + 128 * 8 + 128))):
        adapted_run(stories, adaptation, "--max_iters=1", "--block_size=32")
        told = capsys.readouterr().out
        assert f"trained parameters: {wanted:,} of {whole // 4 + wanted - 32 * 128:,} (" in told
        assert f"optimizer {8 * wanted / 1e6:.2f} MB; training all of it: " in told
        state = checkpoint.load("out/last.pt")
        assert sum(w.numel() for w in state["model"].values()) == wanted
        assert state["optimizers"].keys() == state["model"].keys()
        assert state["model_args"]["block_size"] == 32
        assert Path("out/last.pt").stat().st_size < 12 * wanted + 60_000 < 0.2 * whole
        assert (state["base"]["source"], state["base"]["path"]) == ("base", str((tmp_path / "base").resolve()))
        assert set(state["adapter"]) == set(vars(Adaptation()))
        assert checkpoint.model_of(state, "out").config.block_size == 32  # of a base whose context is longer


def test_a_sample_while_training_is_drawn_without_dropout(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_base(tmp_path / "base", stories)
    lora = Adaptation(lora_rank=8, lora_dropout=0.9)
    adapted_run(stories, lora, "--max_iters=3", "--sample_interval=3", "--sample_tokens=40", "--sample_prompts=小")
    [line] = log_of(tmp_path / "out", "sample")
    path, state = tmp_path / "out" / "last.pt", checkpoint.load("out/last.pt")
    model, tokenizer = checkpoint.model_of(state, path, merged=False).eval(), checkpoint.tokenizer_of(state, path)
    sampling = Sampling(max_new_tokens=40, temperature=0.8, top_k=200, seed=derive_seed(1337, "sample", 3))
    assert continuations(model, tokenizer, ["小"], sampling) == [line["text"][1:]]


def test_states_of_different_runs_and_iterations_have_different_signatures(in_runs):
    state = checkpoint.load("lora/last.pt")
    other = state | {"model": {name: w + (name.endswith("1.mlp.c_proj.lora_b")) for name, w in state["model"].items()}}
    run = state | {"config": state["config"] | {"run_id": "another"}}
    found = {signature(each) for each in (state, other, run, state | {"iter_num": 11}, {})}
    assert len(found) == 5 and signature(checkpoint.load("lora/last.pt")) == signature(state)


def test_all_the_ways_to_open_an_adapter_give_what_was_trained(in_runs):
    for out_dir in ("lora", "adapters"):
        path, state = checkpoint.best(out_dir)
        vocab_size = state["model_args"]["vocab_size"]
        trained = checkpoint.model_of(state, path, merged=False)
        assert adapt.is_adapted(trained)
        assert all(torch.equal(p, state["model"][n]) for n, p in trained.named_parameters() if p.requires_grad)
        wanted = logits(trained, vocab_size)
        base = logits(checkpoint.pretrained("base")[0], vocab_size)
        assert (wanted - base).abs().max() > 0.01
        for source in (out_dir, f"{out_dir}/ckpt.pt"):
            model, tokenizer = checkpoint.pretrained(source)
            assert (logits(model, vocab_size) - wanted).abs().max() < 1e-5
            assert all(p.requires_grad for p in model.parameters())
        c = Config(init_from="resume", out_dir=out_dir, device="cpu", dtype="float32", quantize="")
        model, tokenizer, _ = checkpoint.open_model(c)
        greedy = Sampling(max_new_tokens=20, temperature=0)
        [text] = continuations(model, tokenizer, ["小"], greedy)
        ids = tokenizer.encode("小").tolist()
        for _ in range(20):  # the whole text again for each token
            ids.append(int(trained(torch.tensor([ids]))[0].argmax()))
        assert text == tokenizer.decode(ids)[1:]
        assert adapt.is_adapted(model) == (out_dir == "adapters")
        c = Config(init_from="resume", out_dir=out_dir, device="cpu", dtype="float32", quantize="int8")
        quantized = checkpoint.open_model(c)[0]
        assert (logits(quantized, vocab_size) - wanted).abs().max() < 0.2 * wanted.std()


def test_sample_py_speaks_from_an_adapter_and_says_what_it_lacks(in_runs):
    speak = ["sample.py", "--num_samples=1", "--max_new_tokens=8", "--device=cpu", "--temperature=0"]
    done = run_script(*speak, "--out_dir=lora", cwd=in_runs)
    assert done.returncode == 0 and len(done.stdout) > 8, done.stderr
    shutil.move(in_runs / "base", in_runs / "elsewhere")
    missing = run_script(*speak, "--out_dir=lora", cwd=in_runs)
    assert missing.returncode == 2 and missing.stdout == ""
    [sentence] = [line for line in missing.stderr.splitlines() if line.startswith("sample.py: ")]
    assert "needs the model that it was trained on, base," in sentence and "put that model back there" in sentence


def test_a_base_that_is_not_the_one_is_refused_and_the_full_path_is_a_second_try(in_runs, stories, monkeypatch):
    path, state = checkpoint.best("lora")
    wanted = logits(checkpoint.model_of(state, path), 65)
    (in_runs / "sub").mkdir()
    monkeypatch.chdir(in_runs / "sub")
    assert torch.equal(logits(checkpoint.model_of(state, path), 65), wanted)  # base is not there, its full path is
    a_base(in_runs / "sub" / "base", stories, n_layer=1)
    assert torch.equal(logits(checkpoint.model_of(state, path), 65), wanted)  # what is there is another model
    monkeypatch.chdir(in_runs)
    base = torch.load("base/ckpt.pt", weights_only=True)
    weight = base["model"]["transformer.h.1.mlp.c_fc.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))  # a single bit
    checkpoint.save(Path("base/ckpt.pt"), base)
    with pytest.raises(UserError, match="base holds another model now"):
        checkpoint.model_of(state, path)
    shutil.rmtree("base")
    shutil.copytree("lora", "base")  # in a circle
    with pytest.raises(UserError, match="base is an adapter itself"):
        checkpoint.model_of(state, path)


@pytest.mark.parametrize(
    "broken",
    [
        {"adapter": {"lora_rank": 4, "lora_targets": 7}},
        {"adapter": {"lora_rank": 2, "lora_targets": "c_attn, c_proj,c_fc"}},
        {"adapter": {"lora_rank": 4}},
        {"adapter": {"rank": 4}},
        {"base": {}},
        {"model": {}},
        {"model_args": {"block_size": 32}},
        {"model_args": dict(TINY, vocab_size=2000, bias=False, dropout=0.0)},
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_its_base_is_a_sentence(in_runs, broken):
    path, state = checkpoint.best("lora")
    with pytest.raises(UserError, match=r"lora.ckpt\.pt: its adapter does not fit its base"):
        checkpoint.model_of(state | broken, path)


def test_merge_py_makes_a_checkpoint_that_needs_no_base(in_runs, stories, monkeypatch, capsys):
    path, state = checkpoint.best("lora")
    vocab_size = state["model_args"]["vocab_size"]
    wanted = logits(checkpoint.model_of(state, path, merged=False), vocab_size)
    for _ in range(2):  # the second one replaces the first
        merge_script.main(Config(out_dir="lora", dest=""))
    with pytest.raises(UserError, match="cannot be merged"):
        merge_script.main(Config(out_dir="adapters", dest=""))
    with pytest.raises(UserError, match="no LoRA to merge"):
        merge_script.main(Config(out_dir="base", dest=""))
    with pytest.raises(UserError, match="no earlier merge"):
        merge_script.main(Config(out_dir="lora", dest="adapters"))
    Path("junk").mkdir()
    Path("junk/ckpt.pt").write_text("junk")
    with pytest.raises(UserError, match="junk.ckpt.pt is damaged"):
        merge_script.main(Config(out_dir="lora", dest="junk"))
    shutil.rmtree("base")
    shutil.copytree("junk", "base")
    with pytest.raises(UserError, match="needs the model that it was trained on.*base.ckpt.pt is damaged"):
        checkpoint.model_of(state, path)
    Path("base/ckpt.pt").unlink()
    with pytest.raises(UserError, match="base has no model in it"):
        checkpoint.model_of(state, path)
    theirs = torch.load("lora/merged/ckpt.pt", weights_only=True)
    keys = ["model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "tokenizer", "template"]
    assert list(theirs)[:8] == keys and theirs["iter_num"] == state["iter_num"] == 10
    model = GPT(GPTConfig(**theirs["model_args"]))  # as nanoGPT's sample.py does it
    model.load_state_dict(theirs["model"])
    assert (logits(model, vocab_size) - wanted).abs().max() < 1e-5
    train_here(f"--dataset={stories}", "--init_from=lora/merged", *SHORT, "--max_iters=1", "--out_dir=more")
    train_here(f"--dataset={stories}", "--init_from=resume", "--out_dir=lora/merged", *SHORT, "--max_iters=11")
    assert len(log_of(Path("more"))) == len(log_of(Path("lora/merged"))) == 1


def test_lora_is_exported_merged_and_adapters_are_not(in_runs):
    pytest.importorskip("safetensors")
    path, state = checkpoint.best("lora")
    export.main(Config(out_dir="lora", dest=""))
    vocab_size = state["model_args"]["vocab_size"]
    wanted = logits(checkpoint.model_of(state, path, merged=False), vocab_size)
    assert (logits(checkpoint.pretrained("lora/hf")[0], vocab_size) - wanted).abs().max() < 1e-5
    with pytest.raises(UserError, match="adapters, and GPT-2's layout has no place"):
        export.main(Config(out_dir="adapters", dest=""))


def test_a_new_run_starts_from_merged_lora_but_trains_no_adapter_on_an_adapter(in_runs, stories):
    base = [f"--dataset={stories}", *SHORT, "--max_iters=1"]
    path, state = checkpoint.best("lora")
    train_here(*base, "--init_from=lora", "--freeze=all_but_head", "--out_dir=new")
    wanted = checkpoint.model_of(state, path).state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(checkpoint.load("new/last.pt")["model"][name], wanted[name])
    with pytest.raises(UserError, match=r"extras/merge\.py --out_dir=lora"):
        train_here(*base, "--init_from=lora", "--lora_rank=8", "--out_dir=new")
    for more in ([], ["--adapter_dim=8"], ["--freeze=every_other"]):
        with pytest.raises(UserError, match="init_from=adapters has adapters"):
            train_here(*base, "--init_from=adapters", "--out_dir=new", *more)
    for base_of in ("base", "base/ckpt.pt"):
        with pytest.raises(UserError, match="choose another out_dir"):
            train_here(*base, f"--init_from={base_of}", "--lora_rank=8", "--out_dir=base")


@pytest.mark.parametrize("shape", [GPT2, MODERN], ids=["tied", "untied"])
def test_a_grown_vocabulary_begins_near_the_old_one(shape):
    model, plain = random_model(shape), random_model(shape)
    with torch.no_grad():
        for each in (model, plain):
            each.transformer.wte.weight += 0.5  # a trained embedding has a mean
    rows = 4000
    adapt.grow_vocabulary(model, 65 + rows, seed=3)
    assert model.config.vocab_size == 65 + rows and list(model.state_dict()) == list(plain.state_dict())
    assert (model.lm_head.weight is model.transformer.wte.weight) == (shape is GPT2)
    for one, other in ((model.transformer.wte, plain.transformer.wte), (model.lm_head, plain.lm_head)):
        old, new = other.weight.detach(), one.weight.detach()[65:]
        assert torch.equal(one.weight[:65], old) and new.shape == (rows, 32)
        assert (new.mean(0) - old.mean(0)).abs().max() < 0.01
        assert (new.std(0) / old.std(0, correction=0) - 1).abs().max() < 0.06
    again = random_model(shape)
    with torch.no_grad():
        again.transformer.wte.weight += 0.5
    adapt.grow_vocabulary(again, 65 + rows, seed=3)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    x = torch.tensor([[64, 65, 64 + rows]])
    assert model(x, x)[0].shape == (1, 3, 65 + rows)
    with pytest.raises(ValueError, match="cannot grow to 65"):
        adapt.grow_vocabulary(model, 65, seed=3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adaptation", [EVERYWHERE, ADAPTERS], ids=name_of)
def test_new_tokens_are_trained_beside_an_adapter_and_saved_in_its_file(
    stories, tmp_path, monkeypatch, adaptation, tied
):
    monkeypatch.chdir(tmp_path)
    a_base(tmp_path / "base", stories, tied=tied)
    tokenizer = ChatTokenizer(load_tokenizer(stories), LAYOUT)
    old = tokenizer.base.vocab_size
    c = settings(*TINY_ARGS, "--init_from=base", *(f"--{k}={v}" for k, v in vars(adaptation).items()), "--bias=False")
    model, adapter = build_model(c, None, {}, tokenizer)
    assert model.config.vocab_size == tokenizer.vocab_size > old
    x = torch.randint(old, tokenizer.vocab_size, (4, 17))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert isinstance(model.transformer.wte, GrownEmbedding)
    assert (before["transformer.wte.new"] - before["transformer.wte.old"].mean(0)).abs().max() < 0.5
    optimizers = build_optimizers(model, "adamw", 0.1, 1e-2, (0.9, 0.95), 1e-8, 0.02, 0.95, "cpu")
    for _ in range(5):
        model(x[:, :-1], x[:, 1:], loss_only=True)[1].backward()
        optimizers[0].step()
        model.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
    saved = adapt.saved_weights(model)
    assert saved["transformer.wte.new"].shape == (tokenizer.vocab_size - old, 32)
    assert ("lm_head.new" in saved) != tied and not any(len(w) == tokenizer.vocab_size for w in saved.values())
    state = {"model": saved, "model_args": model.config.model_args(), "tokenizer": tokenizer.meta(), **adapter}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    wanted = logits(model, tokenizer.vocab_size)
    path, state = checkpoint.best("ckpt.pt")
    trainable = checkpoint.model_of(state, path, merged=False)
    assert torch.equal(logits(trainable, tokenizer.vocab_size), wanted)
    merged, theirs = checkpoint.pretrained("ckpt.pt")
    assert (logits(merged, tokenizer.vocab_size) - wanted).abs().max() < 1e-5 and theirs == tokenizer
    assert type(merged.transformer.wte) is nn.Embedding
    assert (merged.lm_head.weight is merged.transformer.wte.weight) == tied


@pytest.mark.parametrize("adaptation", [EVERYWHERE, ADAPTERS], ids=name_of)
def test_it_is_one_graph_for_the_compiler(adaptation):
    model = random_model(MODERN)
    adapt.grow_vocabulary(model, 70, seed=0)
    attach(model, adaptation, seed=1, known=65)
    train_only(model, adaptation)
    disturb(model)
    x = torch.randint(70, (2, 16))
    loss = torch.compile(model, backend="eager", fullgraph=True)(x, x)[1]
    assert abs(loss.item() - model(x, x)[1].item()) < 1e-5


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--lora_rank=8"], "init_from=scratch begins a model"),
        (["--freeze=all_but_head", "--init_from=auto"], "init_from=auto begins a model"),
        (["--lora_rank=-1", "--init_from=base"], "lora_rank=-1: expected 0 or more"),
        (["--lora_rank=8", "--lora_alpha=0", "--init_from=base"], "lora_alpha=0.0: expected more than 0"),
        (["--lora_rank=8", "--lora_dropout=1", "--init_from=base"], "lora_dropout=1.0: expected at least 0"),
        (["--lora_rank=8", "--lora_targets=q_proj", "--init_from=base"], "expected some of c_attn,c_proj,c_fc"),
        (["--lora_rank=8", "--lora_targets=", "--init_from=base"], "expected some of c_attn,c_proj,c_fc"),
        (["--lora_targets=c_fc", "--init_from=base"], "lora_targets is set, but not lora_rank"),
        (["--lora_rank=8", "--adapter_dim=8", "--init_from=base"], "lora_rank=8 and adapter_dim=8 do not go together"),
        (["--lora_rank=8", "--freeze=every_other", "--init_from=base"], "do not go together"),
        (["--freeze=everything", "--init_from=base"], "freeze=everything: expected all_but_head"),
        (["--freeze=all_but_last_N", "--init_from=base"], "expected a number for N"),
        (["--freeze=all_but_last_0", "--init_from=base"], "freeze=all_but_last_0: expected"),
        (["--freeze=all_but_last_3", "--init_from=base"], "all_but_last_3: the model has 2 blocks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistakes_are_sentences(in_runs, stories, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        train_here(f"--dataset={stories}", *argv, "--max_iters=1")
