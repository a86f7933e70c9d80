import json
import os

import pytest
import torch

from model import GPT, GPTConfig, derive_seed

transformers = pytest.importorskip("transformers")

SHAPE = dict(n_layer=3, n_head=4, n_embd=48, vocab_size=101)


def hf_folder(folder, activation="gelu_new", seed=0, **more):
    """A random GPT-2 of transformers', saved; every tensor random, biases and gains too."""
    config = transformers.GPT2Config(
        **SHAPE, n_positions=64, activation_function=activation, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **more
    )
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_loss_and_every_gradient_equal_transformers(tmp_path, activation):
    theirs = hf_folder(tmp_path, activation)
    ours = GPT.from_pretrained(str(tmp_path))
    assert ours.config.act == {"gelu_new": "gelu_tanh", "gelu": "gelu"}[activation]
    ids = torch.randint(101, (3, 65), generator=torch.Generator().manual_seed(1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    logits, loss = ours(x, y)
    reference = theirs(x, labels=x)  # its labels are shifted inside, over one position fewer than ours
    torch.testing.assert_close(logits, reference.logits, atol=1e-4, rtol=0)
    expected = torch.nn.functional.cross_entropy(reference.logits.reshape(-1, 101), y.reshape(-1))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(x, x.roll(-1, 1).index_fill(1, torch.tensor([63]), -1))[1], reference.loss)

    loss.backward()
    expected.backward()
    gradients = dict(theirs.named_parameters())
    checked = 0
    for name, p in ours.named_parameters():
        wanted = gradients[name].grad
        wanted = wanted.t() if p.dim() == 2 and "wte" not in name and "wpe" not in name else wanted
        torch.testing.assert_close(p.grad, wanted, atol=1e-4, rtol=1e-4, msg=name)
        checked += 1
    assert checked == len(gradients) == 2 + 12 * 3 + 2


def test_greedy_continuation_equals_transformers(tmp_path):
    theirs, ours = hf_folder(tmp_path), GPT.from_pretrained(str(tmp_path)).eval()
    x = torch.randint(101, (1, 9), generator=torch.Generator().manual_seed(2))
    reference = theirs.generate(x, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ours.generate(x, 40, temperature=0).tolist() == reference.tolist()
    assert ours.generate(x, 40, top_k=1).tolist() == reference.tolist()


def test_ten_steps_of_adamw_equal_transformers_and_plain_adamw(tmp_path):
    theirs, ours = hf_folder(tmp_path), GPT.from_pretrained(str(tmp_path))
    optimizer = ours.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=False, fused=False)
    for step in range(10):
        ids = torch.randint(101, (2, 33), generator=torch.Generator().manual_seed(step))
        loss = ours(ids[:, :-1], ids[:, 1:])[1]
        wanted = theirs(ids, labels=ids).loss
        torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=0)
        for o, one in ((optimizer, loss), (reference, wanted)):
            o.zero_grad()
            one.backward()
            o.step()


def test_names_without_the_prefix_as_on_the_hub(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_folder(tmp_path)
    wanted = GPT.from_pretrained(str(tmp_path)).state_dict()
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, path)
    for name, value in GPT.from_pretrained(str(tmp_path)).state_dict().items():
        assert torch.equal(value, wanted[name])


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorchs_own_file_is_read_where_there_is_no_other_and_runs_nothing(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    theirs = hf_folder(tmp_path)
    wanted = GPT.from_pretrained(str(tmp_path)).state_dict()
    whole = theirs.state_dict() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "version": 3}
    torch.save(whole, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "model.safetensors").rename("kept")
    found = GPT.from_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for content in (whole | {"wte.weight": Malice()}, [1]):
        torch.save(content, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="pytorch_model.bin cannot be read") as error:
            GPT.from_pretrained(str(tmp_path))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "kept").rename("model.safetensors")
    GPT.from_pretrained(str(tmp_path))
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no model.safetensors and no pytorch_model.bin"):
        GPT.from_pretrained(str(tmp_path))


def test_several_files_are_one_model(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_folder(tmp_path)
    wanted = GPT.from_pretrained(str(tmp_path)).state_dict()
    tensors = list(load_file(tmp_path / "model.safetensors").items())
    for k, part in enumerate((tensors[:9], tensors[9:])):
        save_file(dict(part), tmp_path / f"model-0000{k + 1}-of-00002.safetensors")
    (tmp_path / "model.safetensors").unlink()
    found = GPT.from_pretrained(str(tmp_path)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_what_goes_out_is_what_transformers_writes(tmp_path, activation):
    from safetensors.torch import load_file

    theirs = hf_folder(tmp_path, activation)
    config, tensors = GPT.from_pretrained(str(tmp_path)).to_hf()
    wanted = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    written = transformers.GPT2Config(**config).to_dict()
    differing = {k for k, v in theirs.config.to_dict().items() if written[k] != v}
    assert differing <= {"dtype", "architectures", "bos_token_id", "eos_token_id", "transformers_version"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "architecture"),
        ({"activation_function": "relu"}, "architecture"),
        ({"layer_norm_epsilon": 1e-6}, "architecture"),
        ({"n_layer": 4}, "lacks the tensor"),
        ({"n_positions": 32}, "expected"),
        ({"n_head": 5}, "not divisible"),
    ],
)
def test_another_architecture_is_refused_in_a_sentence(tmp_path, change, words):
    hf_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_weights_that_cannot_be_had_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="model.safetensors into a folder"):
        GPT.from_pretrained("gpt2-xl")
    with pytest.raises(ValueError, match="gpt2-medium"):
        GPT.from_pretrained("gpt5")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(str(tmp_path))
    hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        GPT.from_pretrained(str(tmp_path))


def test_parameter_counts_of_the_papers_model():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    # 6N + 12 L H Q T, by hand
    assert model.estimate_flops() == 6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024
    assert model.estimate_mfu(1, 1.0) is None


def test_initial_values_are_gpt2s_and_depend_on_seed_and_name_alone():
    torch.manual_seed(7)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=300, block_size=64))
    state = model.state_dict()
    assert abs(state["transformer.wte.weight"].std() - 0.02) < 5e-4
    assert abs(state["transformer.h.3.attn.c_attn.weight"].std() - 0.02) < 5e-4
    assert abs(state["transformer.h.3.mlp.c_proj.weight"].std() - 0.02 / 16**0.5) < 2e-4
    assert abs(state["transformer.h.5.attn.c_proj.weight"].std() - 0.02 / 16**0.5) < 2e-4
    assert all((v == 0).all() for k, v in state.items() if k.endswith("bias"))
    assert all((v == 1).all() for k, v in state.items() if ".ln_" in k and k.endswith("weight"))
    torch.manual_seed(7)
    torch.rand(5)
    again = GPT(GPTConfig(n_layer=8, n_head=2, n_embd=128, vocab_size=300, block_size=64, bias=False)).state_dict()
    assert all(torch.equal(again[k], state[k]) for k in again)
    torch.manual_seed(8)
    other = GPT(model.config).state_dict()
    assert not torch.equal(other["lm_head.weight"], state["lm_head.weight"])
    assert not torch.equal(state["transformer.h.0.mlp.c_fc.weight"], state["transformer.h.1.mlp.c_fc.weight"])


def test_seeds_are_stable_and_unrelated():
    assert derive_seed(1337, "x") == derive_seed(1337, "x") != derive_seed(1337, "y")
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert 0 <= derive_seed(0) < 2**63


def test_embeddings_are_tied_in_training_too():
    model = GPT(GPTConfig(**SHAPE, block_size=16))
    x = torch.arange(16)[None]
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    model(x, x)[1].backward()
    optimizer.step()
    assert model.transformer.wte.weight is model.lm_head.weight


def test_only_matrices_decay():
    model = GPT(GPTConfig(**SHAPE, block_size=16))
    decay, rest = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) == 2 + 4 * 3 and all(p.dim() == 2 for p in decay["params"])
    assert len(rest["params"]) == 8 * 3 + 2 and all(p.dim() == 1 for p in rest["params"])


def test_no_position_sees_a_later_one():
    model = GPT(GPTConfig(**SHAPE, block_size=16)).eval()
    x = torch.randint(101, (2, 16))
    changed = x.clone()
    changed[:, 9:] = torch.randint(101, (2, 7))
    before, after = model(x, x)[0], model(changed, x)[0]
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


def test_cropping_keeps_the_logits_of_short_contexts():
    model = GPT(GPTConfig(**SHAPE, block_size=16)).eval()
    x = torch.randint(101, (2, 8))
    before = model(x, x)[0]
    model.crop_block_size(8)
    assert torch.equal(model(x, x)[0], before) and model.config.block_size == 8
    with pytest.raises(ValueError, match="block_size = 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError):
        model.crop_block_size(9)


def test_dropout_acts_in_training_only_and_where_gpt2_has_it():
    model = GPT(GPTConfig(**SHAPE, block_size=16, dropout=0.5))
    x = torch.randint(101, (2, 16))
    assert not torch.equal(model(x, x)[0], model(x, x)[0])
    model.eval()
    assert torch.equal(model(x, x)[0], model(x, x)[0])
    torch.manual_seed(3)
    seen = model.train()(x, x)[0]
    torch.manual_seed(3)
    assert torch.equal(model(x, x)[0], seen)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_embd": 50}, "n_embd = 50 is not divisible by n_head = 4"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"dropout": 1.0}, "dropout"),
        ({"act": "relu"}, "gelu_tanh"),
    ],
)
def test_impossible_shapes_are_sentences(change, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**(SHAPE | change))


def test_model_args_are_nanogpts_unless_the_architecture_is_not():
    nanogpt = ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]
    assert list(GPTConfig().model_args()) == nanogpt
    assert GPTConfig(act="gelu_tanh").model_args()["act"] == "gelu_tanh"


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "3", "[" * 100_000, {"activation_function": ["gelu"]}, {"n_embd": None}, {"n_embd": {}},
     {"n_layer": "2"}, {"n_layer": 2.0}, {"vocab_size": True}, {"vocab_size": 10**15}, {"n_positions": 10**9},
     {"n_layer": 10**7}, {"n_head": 0}],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused_before_a_model_of_that_size_is_made(tmp_path, content):
    hf_folder(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text(encoding="utf-8")) | content)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json|n_head"):
        GPT.from_pretrained(str(tmp_path))


def test_a_bin_file_with_code_or_without_numbers_is_refused(tmp_path):
    theirs = hf_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    for value in (state["transformer.ln_f.weight"].to("meta"), state["transformer.ln_f.weight"].to_sparse(), print):
        torch.save(state | {"transformer.ln_f.weight": value}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="without plain numbers|no code in it is run") as error:
            GPT.from_pretrained(str(tmp_path))
        assert "weights_only" not in str(error.value)
