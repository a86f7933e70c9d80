"""An export is opened by transformers, whose logits and ids are the expected ones; and it comes back as it went."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, random_texts, run_script
from test_tokenizer import bert_folder, trained

import checkpoint
from chat import LAYOUT, ChatTokenizer
from configurator import Config, UserError
from extras import export
from model import GPT, GPTConfig
from tokenizer import GPT2_FILES, BPETokenizer, CharTokenizer, GPT2Tokenizer, hf_tokenizer

transformers = pytest.importorskip("transformers")
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR is not set"
)
CHARS = "".join(sorted(set("".join(random_texts(100, seed=1)))))
TOKENIZERS = {
    "char": CharTokenizer(CHARS, byte_fallback=True, end_of_text=True),
    "plain": CharTokenizer(CHARS, byte_fallback=False, end_of_text=False),
    "plain with an end": CharTokenizer(CHARS, byte_fallback=False, end_of_text=True),
    "gpt2": GPT2Tokenizer(),
}
WORDY = {"system": "{content}\n", "user": '"Q:\\" {content}\n', "assistant": "A: {content}<|endoftext|>\n"}
KINDS = [pytest.param(name, marks=[needs_gpt2] if name == "gpt2" else []) for name in TOKENIZERS]


def a_run(folder: Path, tokenizer=TOKENIZERS["char"], **shape) -> GPT:
    """A ckpt.pt in `folder`, every tensor of its model random, biases and gains too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size} | shape))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    folder.mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "ckpt.pt", state)
    return model


def exported(out_dir: Path, dest: str = "") -> Path:
    export.main(Config(out_dir=str(out_dir), dest=str(dest)))
    return Path(dest or out_dir / "hf")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [{"act": "gelu_tanh"}, {"bias": False, "dropout": 0.25}], ids=str)
def test_transformers_has_our_logits_and_the_way_back_changes_nothing(tmp_path, kind, shape):
    tokenizer = TOKENIZERS[kind]
    model = a_run(tmp_path, tokenizer, **shape, **({"vocab_size": 50304} if kind == "gpt2" else {}))
    folder = exported(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs) is transformers.GPT2LMHeadModel and theirs.dtype == torch.float32
    x = torch.randint(tokenizer.vocab_size, (3, 32))
    torch.testing.assert_close(theirs(x).logits, model(x, x)[0], atol=1e-5, rtol=0)
    c, end = theirs.config, tokenizer.end_of_text
    assert (c.bos_token_id, c.eos_token_id, theirs.generation_config.eos_token_id) == (end, end, end)
    assert {c.attn_pdrop, c.embd_pdrop, c.resid_pdrop} == {shape.get("dropout", 0.0)}

    again, its_tokenizer = checkpoint.pretrained(str(folder), shape.get("dropout", 0.0))
    assert again.config.model_args() == model.config.model_args() and its_tokenizer == tokenizer
    weights = again.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_our_ids_and_our_text(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]
    a_run(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path))
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 32
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["clean_up_tokenization_spaces"] is False  # older versions' default is True
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == tokenizer.end_of_text
    texts = random_texts(2000)
    if "plain" in kind:
        texts = ["".join(c for c in text if c in CHARS) for text in texts]
    for text in texts:
        ids = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).tolist() == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text == tokenizer.decode(ids)
        if tokenizer.end_of_text is not None:
            assert tokenizer.encode_prompt(text).tolist() == theirs(text)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [LAYOUT, WORDY])
def test_the_layout_of_conversations_is_a_chat_template(tmp_path, kind, layout):
    tokenizer = ChatTokenizer(TOKENIZERS[kind], layout)
    a_run(tmp_path, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path))
    assert len(theirs) == tokenizer.vocab_size and theirs.eos_token_id == tokenizer.end_of_text
    texts = [text for text in random_texts(60) if text and "<|" not in text]
    if "plain" in kind:
        texts = list(filter(None, ("".join(c for c in text if c in CHARS) for text in texts)))
    for one, two, three in zip(texts, texts[1:], texts[2:], strict=False):
        messages = [dict(zip(("role", "content"), pair, strict=True)) for pair in
                    (("system", one), ("user", two), ("assistant", three), ("user", one))]  # fmt: skip
        asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert asked == tokenizer.decode(tokenizer.opening(messages, 10**6))
        if layout is LAYOUT:  # a template's text is encoded as a whole, which is the same where marks stand between
            assert theirs(asked, add_special_tokens=False)["input_ids"] == tokenizer.opening(messages, 10**6)
    again = hf_tokenizer(tmp_path / "hf")
    assert again == tokenizer and isinstance(again, ChatTokenizer)


@needs_gpt2
def test_gpt2s_files_are_openais_and_need_no_tiktoken_to_come_back(tmp_path, monkeypatch):
    a_run(tmp_path, GPT2Tokenizer())
    folder = exported(tmp_path)
    bpe, encoder = (Path(os.environ["TIKTOKEN_CACHE_DIR"], name).read_text(encoding="utf-8") for name in GPT2_FILES)
    assert (folder / "merges.txt").read_text(encoding="utf-8") == bpe
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == json.loads(encoder)
    wanted = {text: GPT2Tokenizer().encode(text).tolist() for text in random_texts(300)}
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    for without in ("", "tokenizer.json"):
        (folder / without).unlink() if without else None
        tokenizer = checkpoint.pretrained(str(folder))[1]
        assert tokenizer == GPT2Tokenizer() and hash(tokenizer) == hash(GPT2Tokenizer())
        assert {text: tokenizer.encode(text).tolist() for text in wanted} == wanted


@pytest.mark.parametrize("kind", ["byte level", "bert"])
def test_a_vocabulary_that_came_from_a_folder_goes_out_again(tmp_path, kind):
    tokenizer = hf_tokenizer(bert_folder(tmp_path / "bert"))
    if kind != "bert":
        tokenizer = BPETokenizer(trained(kind).to_str(), 0)
    a_run(tmp_path, tokenizer, vocab_size=tokenizer.vocab_size + 5)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path))
    assert (theirs.eos_token_id, theirs.unk_token_id) == (tokenizer.end_of_text, tokenizer.unknown_id)
    for text in random_texts(500):
        ids = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).tolist() == ids
    model, again = checkpoint.pretrained(str(tmp_path / "hf"))
    assert again == tokenizer and model.config.vocab_size == tokenizer.vocab_size + 5


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    a_run(tmp_path, bias=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported(tmp_path)).eval()
    with torch.no_grad():
        theirs.transformer.h[1].ln_2.bias[3] = 0.5
    theirs.save_pretrained(tmp_path / "trained")
    ours = GPT.from_pretrained(str(tmp_path / "trained")).eval()
    x = torch.arange(32)[None]
    assert ours.config.bias
    torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, atol=1e-5, rtol=0)


def test_the_command_and_text_from_what_it_wrote(tmp_path):
    a_run(tmp_path / "out")
    done = run_script("extras/export.py", "--out_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{Path('out/ckpt.pt')} -> {Path('out/hf')}: ")
    assert sorted(os.listdir(tmp_path / "out")) == ["ckpt.pt", "hf"]
    speak = ["--start=的", "--num_samples=2", "--max_new_tokens=20", "--device=cpu"]
    first = run_script("sample.py", "--out_dir=out", *speak, cwd=tmp_path)
    second = run_script("sample.py", "--init_from=out/hf", *speak, cwd=tmp_path)
    assert first.stdout.startswith("的") and first.stdout == second.stdout, second.stderr


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
    a_run(tmp_path / "a")
    a_run(tmp_path / "b", n_layer=1)
    folder = exported(tmp_path / "a", tmp_path / "deep" / "hf")
    exported(tmp_path / "b", folder)
    assert GPT.from_pretrained(str(folder)).config.n_layer == 1 and os.listdir(folder.parent) == ["hf"]
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "config.json").stat().st_mode}
    (tmp_path / "empty").mkdir()
    exported(tmp_path / "a", tmp_path / "empty")

    (tmp_path / "file").write_text("mine", encoding="utf-8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(folder)  # trained elsewhere, perhaps
    (tmp_path / "empty" / "notes.txt").write_text("mine", encoding="utf-8")
    for name, words in {"a": "config.json", "file": "file", "deep/hf": "not from here", "empty": "notes.txt"}.items():
        before = contents(tmp_path / name) if name != "file" else {}
        with pytest.raises(UserError, match=f"no earlier export; choose another --dest.*{words}"):
            exported(tmp_path / "a", tmp_path / name)
        assert (contents(tmp_path / name) if name != "file" else {}) == before
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_mistakes_are_sentences(tmp_path, monkeypatch):
    done = run_script("extras/export.py", "--out_dir=nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "no checkpoint in nowhere" in done.stderr and "Traceback" not in done.stderr
    a_run(tmp_path)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        exported(tmp_path, tmp_path / "file" / "hf")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        exported(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_refuses_leaves_the_earlier_export(tmp_path):
    a_run(tmp_path)
    before = contents(exported(tmp_path))
    code = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from configurator import Config, run
from extras import export
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
run(export.main, Config(out_dir=sys.argv[1], dest=""))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert contents(tmp_path / "hf") == before and sorted(os.listdir(tmp_path)) == ["ckpt.pt", "hf"]
