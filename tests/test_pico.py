import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

from configurator import UserError
from extras import pico
from model import GPT, GPTConfig
from tokenizer import GPT2Tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours and Hugging Face's
SHAPE = dict(n_layer=3, n_head=4, n_embd=48)
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
IDS = [5, 0, 99, 5, 17, 63, 42, 100, 8, 8, 1]


def randomize(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.dim() == 1 and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def arrays_of(model):
    """Our weights by Hugging Face's names; zeros for biases that the model does without."""
    arrays = {}
    for name, p in model.state_dict().items():
        name, value = name.removeprefix("transformer."), p.numpy()
        arrays[name] = value.T if name.endswith(CONV1D) else value
        arrays.setdefault(name.replace(".weight", ".bias"), np.zeros(value.shape[0], value.dtype))
    return {k: v for k, v in arrays.items() if k not in ("wte.bias", "wpe.bias", "lm_head.weight", "lm_head.bias")}


@torch.no_grad()
def stages_of(model, ids):
    """The stages that pico names, taken from our model's modules while it runs: float arrays [n_seq, ...]."""
    stages, hooks = {}, []

    def comes_into(module, name):
        hooks.append(module.register_forward_pre_hook(lambda _, x: stages.update({name: x[0][0].numpy()})))

    def comes_out_of(module, name):
        hooks.append(module.register_forward_hook(lambda _, x, y: stages.update({name: y[0].numpy()})))

    comes_into(model.transformer.h[0], "wte + wpe")
    for i, block in enumerate(model.transformer.h):
        comes_into(block.ln_2, f"h.{i} + attn")
        comes_out_of(block, f"h.{i} + mlp")
    comes_out_of(model.transformer.ln_f, "ln_f")
    comes_out_of(model.lm_head, "logits")
    x = torch.tensor([ids])
    model(x, x)
    for hook in hooks:
        hook.remove()
    return stages


def differences(expected, found):
    """The largest absolute difference at every stage."""
    assert list(found) == list(expected)
    assert all(found[name].shape == value.shape for name, value in expected.items())
    assert all(np.isfinite(value).all() for value in found.values())
    return {name: abs(found[name] - value).max() for name, value in expected.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_every_stage_of_our_model_is_picos(act, bias, seed):
    model = randomize(GPT(GPTConfig(**SHAPE, block_size=32, vocab_size=101, act=act, bias=bias)), seed)
    settings = {"n_head": 4, "act": pico.ACTIVATIONS[ACTS[act]]}
    arrays = {k: v.astype(np.float64) for k, v in arrays_of(model).items()}
    reference = {}
    logits = pico.gpt2(IDS, arrays, **settings, trace=reference)
    assert logits is reference["logits"] and logits.shape == (11, 101) and logits.dtype == np.float64
    assert len(reference) == 1 + 2 * 3 + 2

    single = differences(stages_of(model, IDS), reference)
    double = differences(stages_of(model.double(), IDS), reference)
    print(f"largest difference: float32 {max(single.values()):.1e}, float64 {max(double.values()):.1e}")
    assert max(single.values()) < 1e-4, single
    assert max(double.values()) < 1e-11, double


def test_single_precision_stays_single():
    model = randomize(GPT(GPTConfig(**SHAPE, block_size=32, vocab_size=101)), 0)
    for act in pico.gelu, pico.gelu_new:
        trace = {}
        pico.gpt2(IDS, arrays_of(model), 4, act, trace=trace)
        assert {x.dtype for x in trace.values()} == {np.dtype(np.float32)}


def test_numbers_known_from_tables():
    phi = 0.8413447460685429  # the probability that a standard normal number is below 1
    x = np.array([1.0, -1.0, 0.0, 40.0, -40.0])
    np.testing.assert_allclose(pico.gelu(x), [phi, phi - 1, 0, 40, 0], rtol=1e-15)
    np.testing.assert_allclose(pico.gelu_new(x), [phi, phi - 1, 0, 40, 0], atol=5e-4)
    np.testing.assert_allclose(
        pico.softmax(np.array([[1e4, 1e4, -np.inf], [0, np.log(3), 0]])), [[0.5, 0.5, 0], [0.2, 0.6, 0.2]]
    )


def hf_folder(folder, seed=0, **more):
    """A random GPT-2 of transformers', saved; every tensor random, biases and gains too."""
    sizes = SHAPE | dict(vocab_size=101, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | more)))
    randomize(model, seed).save_pretrained(folder)
    return model


def continued(model, ids, new, **options):
    """The ids and what transformers continues them with, greedily. Without a mask it takes 0 in `ids` for padding."""
    x = torch.tensor([ids])
    options = dict(eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(x)) | options
    return model.generate(x, max_new_tokens=new, do_sample=False, **options)[0].tolist()


def load(folder, dtype=np.float32):
    config = pico.read_config(folder)
    return pico.read_params(folder, config, dtype), pico.settings_of(config)


@pytest.mark.parametrize("activation, eps", [("gelu_new", 1e-5), ("gelu", 1e-5), ("gelu_new", 1e-2)])
def test_a_folder_that_transformers_saved(tmp_path, activation, eps):
    model = hf_folder(tmp_path, activation_function=activation, layer_norm_epsilon=eps).double()
    trace = {}
    arrays, settings = load(tmp_path, np.float64)
    pico.gpt2(IDS, arrays, **settings, trace=trace)
    with torch.no_grad():
        theirs = model(torch.tensor([IDS]), output_hidden_states=True)
    names = ["wte + wpe", "h.0 + mlp", "h.1 + mlp", "ln_f", "logits"]  # the last hidden state is after ln_f
    expected = dict(zip(names, [x[0].numpy() for x in (*theirs.hidden_states, theirs.logits)], strict=True))
    found = differences(expected, {name: trace[name] for name in names})
    print(f"largest difference: float64 {max(found.values()):.1e}")
    assert max(found.values()) < 1e-11, found


def test_greedy_continuation_is_our_models_and_transformers(tmp_path):
    theirs, ours = hf_folder(tmp_path), GPT.from_pretrained(str(tmp_path)).eval()
    arrays, settings = load(tmp_path)
    found = pico.generate(IDS, arrays, 20, None, None, **settings)
    assert len(found) == 31
    x = torch.tensor([IDS])
    assert found == ours.generate(x, 20, temperature=0)[0].tolist()
    assert found == continued(theirs, IDS, 20) and len(set(found[11:])) > 5
    longer = pico.generate(IDS, arrays, 60, None, None, **settings)
    ids, n_ctx = list(IDS), ours.config.block_size  # past the context, where it slides and transformers cannot go
    for _ in range(60):
        ids.append(ours(torch.tensor([ids[-n_ctx:]]))[0].argmax().item())
    assert longer == ids

    stop = found[20]
    assert pico.generate(IDS, arrays, 20, stop, None, **settings) == found[: found.index(stop, 11)]
    n_vocab = max(found[11:])
    assert max(pico.generate(IDS, arrays, 20, None, n_vocab, **settings)[11:]) < n_vocab


def test_half_precision_is_read_and_names_may_lack_the_prefix(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        save_file({k: v if v.dtype == torch.uint8 else v.to(dtype) for k, v in tensors.items()}, path)
        found, _ = load(tmp_path)
        assert set(found) == set(tensors) - {"h.0.attn.bias"}
        for name, value in found.items():
            assert value.dtype == np.float32 and np.array_equal(value, tensors[name].to(dtype).float().numpy())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of 410 tokens and a tokenizer of 400, and both of them opened by their own packages."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [str(ROOT / "data" / "chinese" / "stories_zh.txt")]
    tokenizer.train(texts, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = hf_folder(folder, seed=1, vocab_size=410)
    with torch.no_grad():
        model.transformer.wte.weight[400:] *= 3  # often the likeliest, if they could be
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer)


def say(tiny, *args, **options):
    return run_script("extras/pico.py", *args, f"--model={tiny.folder}", cwd=tiny.folder, **options)


def expected_text(tiny, ids, new):
    """Greedy by transformers, without the ids that the tokenizer lacks."""
    out = continued(tiny.model, ids, new, eos_token_id=0, suppress_tokens=list(range(400, 410)))
    return tiny.tokenizer.decode(out[len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["从前有一只小白兔", "<|endoftext|>小"])
def test_the_prompt_and_its_continuation(tiny, prompt):
    done = say(tiny, prompt, "--max_new_tokens=12")
    assert done.returncode == 0, done.stderr
    assert done.stdout == prompt + expected_text(tiny, tiny.tokenizer.encode(prompt).ids, 12) + "\n"
    assert say(tiny, prompt, "--max_new_tokens=12").stdout == done.stdout
    assert say(tiny, prompt, "--max_new_tokens=0").stdout == prompt + "\n"


def test_the_end_of_text_that_config_names_ends_the_text(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    ids = tiny.tokenizer.encode("从前有一只小白兔").ids
    new = continued(tiny.model, ids, 12, suppress_tokens=list(range(400, 410)))[len(ids) :]
    until = new.index(new[6])
    assert until > 0
    without_end_of_text(tmp_path)
    edited(eos_token_id=new[6])(tmp_path)
    done = run_script("extras/pico.py", "从前有一只小白兔", f"--model={tmp_path}", cwd=tmp_path)
    assert done.stdout == tiny.tokenizer.decode(ids + new[:until]) + "\n", done.stderr


def test_an_empty_prompt_starts_from_the_end_of_text(tiny):
    done = say(tiny, "", "--max_new_tokens=12")
    assert (done.returncode, done.stdout) == (0, expected_text(tiny, [0], 12) + "\n")
    assert done.stdout.strip()


def test_a_prompt_longer_than_the_context_keeps_its_newest_part_and_says_so(tiny):
    ids = tiny.tokenizer.encode("小白兔" * 30).ids
    done = say(tiny, "小白兔" * 30, "--max_new_tokens=1")
    assert f"{len(ids)} tokens" in done.stderr and "32" in done.stderr
    assert done.stdout == "小白兔" * 30 + expected_text(tiny, ids[-32:], 1) + "\n"


def test_trace_tells_every_stage(tiny, tmp_path):
    done = say(tiny, "从前有一只小白兔", "--trace", "--max_new_tokens=3")
    *lines, text = done.stdout.splitlines()
    assert text.startswith("从前有一只小白兔")
    ids = tiny.tokenizer.encode("从前有一只小白兔").ids
    expected = stages_of(GPT.from_pretrained(str(tiny.folder)).eval(), ids)
    assert len(lines) == len(expected) == 9
    for line, (name, value) in zip(lines, expected.items(), strict=True):
        found = re.fullmatch(r"(.+?) +(\[.+\]) +norm (.+)", line)
        assert (found[1], json.loads(found[2])) == (name, list(value.shape))
        assert float(found[3]) == pytest.approx(np.linalg.norm(value), rel=1e-4)


def test_numpy_alone_computes(tiny, tmp_path):
    for name in "torch", "transformers", "safetensors", "scipy", "huggingface_hub":
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} is imported')", encoding="utf-8")
    assert "torch is imported" in run_script("model.py", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).stderr
    done = say(tiny, "小白兔", "--trace", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0 and "小白兔" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory):
    """A tiny model with GPT-2's 50257 tokens in a hub cache of its own, under the name gpt2."""
    home = tmp_path_factory.mktemp("home")
    repo = home / "hub" / "models--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc", encoding="utf-8")
    model = hf_folder(repo / "snapshots" / "0123abc", n_embd=8, vocab_size=50257)
    try:
        GPT2Tokenizer().encode("")
    except UserError as error:
        pytest.skip(str(error))
    return SimpleNamespace(home=home, folder=repo / "snapshots" / "0123abc", model=model)


def test_gpt2_from_the_hubs_cache_with_its_tokens(gpt2_like, tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')", encoding="utf-8")
    env = {"HF_HOME": str(gpt2_like.home), "PYTHONPATH": str(tmp_path)}
    done = run_script("extras/pico.py", "Alan Turing", "--max_new_tokens=5", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    ids = continued(gpt2_like.model, [36235, 39141], 5)
    assert done.stdout == GPT2Tokenizer().decode(ids) + "\n"
    by_path = run_script(
        "extras/pico.py", "Alan Turing", "--max_new_tokens=5", f"--model={gpt2_like.folder}", cwd=tmp_path
    )
    assert by_path.stdout == done.stdout


def test_gpt2_itself(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    for name in "config.json", "model.safetensors":
        if not isinstance(hub.try_to_load_from_cache("gpt2", name), str):
            pytest.skip(f"gpt2's {name} is not in the hub cache")
    prompt = "Alan Turing theorized that computers would one day become"
    done = run_script("extras/pico.py", prompt, "--max_new_tokens=8", cwd=tmp_path)
    assert done.stdout == f"{prompt} the most powerful machines on the planet.\n", done.stderr


def refused(done, *words):
    """Status 2 and one sentence that has these words, beside what the script notes about its settings."""
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if not line.startswith("overriding: ")]
    assert sentence.startswith("pico.py: ") and all(word in sentence for word in words), sentence


def edited(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return edit


def weights(data):
    return lambda folder: (folder / "model.safetensors").write_bytes(data((folder / "model.safetensors").read_bytes()))


def header(text):
    return weights(lambda _: len(text).to_bytes(8, "little") + text)


def text(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def gone(name):
    return lambda folder: (folder / name).unlink()


def without_end_of_text(folder):
    tokens = (folder / "tokenizer.json").read_text(encoding="utf-8")
    text("tokenizer.json", tokens.replace("<|endoftext|>", "<|other|>"))(folder)


@pytest.mark.parametrize(
    "damage, words",
    [
        (gone("config.json"), ["no config.json", "export"]),
        (text("config.json", "{"), ["config.json cannot be read"]),
        (text("config.json", "[]"), ["config.json", "architecture"]),
        (edited(model_type="llama"), ["config.json", "architecture"]),
        (edited(activation_function=["relu"]), ["config.json", "architecture"]),
        (edited(tie_word_embeddings=False), ["config.json", "architecture"]),
        (edited(n_layer=0), ["n_layer is 0"]),
        (edited(n_head="4"), ["n_head is '4'"]),
        (edited(n_head=5), ["n_embd = 48", "n_head = 5"]),
        (edited(n_layer=4), ["lacks the tensor h.3."]),
        (edited(n_positions=64), ["wpe.weight is [32, 48], expected [64, 48]"]),
        (edited(vocab_size=200), ["its tokenizer has 400 tokens", "200"]),
        (gone("tokenizer.json"), ["no tokenizer.json", "410"]),
        (text("tokenizer.json", "{}"), ["no tokenizer.json that can be read"]),
        (gone("model.safetensors"), ["no model.safetensors"]),
        (weights(lambda data: data[:-4]), ["model.safetensors", "bytes", "fetch it again"]),
        (weights(lambda data: b""), ["model.safetensors cannot be read"]),
        (weights(lambda data: b"\xff" * 100), ["model.safetensors cannot be read"]),
        (header(b"{}"), ["model.safetensors cannot be read"]),
        (header(b"[" * 100_000), ["model.safetensors cannot be read"]),
        (header(b"[1]"), ["model.safetensors cannot be read"]),
        (header(b'{"wte.weight": 3}'), ["model.safetensors cannot be read"]),
        (header(b'{"wte.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 0]}}'), ["cannot be read"]),
    ],
)
def test_a_folder_that_is_no_gpt2_is_refused_in_a_sentence(tiny, tmp_path, damage, words):
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    refused(run_script("extras/pico.py", "从前", f"--model={tmp_path}", cwd=tmp_path), *words)


def test_a_prompt_without_tokens_is_refused_in_a_sentence(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    without_end_of_text(tmp_path)
    refused(run_script("extras/pico.py", "", f"--model={tmp_path}", cwd=tmp_path), "empty prompt", "<|endoftext|>")


def test_mistakes_on_the_command_line_are_sentences(tiny, tmp_path):
    refused(say(tiny, "a", "--max_new_tokens=-1"), "max_new_tokens=-1")
    refused(say(tiny, "a\udcff"), "surrogate")
    refused(say(tiny, "a", "--top_k=3"), "top_k")
    refused(run_script("extras/pico.py", "a", "--model=gpt5", cwd=tmp_path), "gpt5", "gpt2-medium")
    for name in "tokenizers", "huggingface_hub":
        (tmp_path / f"{name}.py").write_text("raise ImportError", encoding="utf-8")
    env = {"PYTHONPATH": str(tmp_path)}
    refused(say(tiny, "a", env=env), "pip install tokenizers")
    refused(run_script("extras/pico.py", "a", cwd=tmp_path, env=env), "pip install huggingface_hub", "--model=FOLDER")
    (tmp_path / "huggingface_hub.py").unlink()
    done = run_script("extras/pico.py", "a", cwd=tmp_path, env={"HF_HOME": str(tmp_path)})
    refused(done, "gpt2", "HF_ENDPOINT", "config.json and model.safetensors", "--model=FOLDER")
