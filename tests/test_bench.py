"""bench.py as users run it, at a size where its figures say nothing about speed."""

import json

import pytest
from conftest import run_script

TINY_BENCH = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64", "--vocab_size=100"]


@pytest.mark.parametrize("more", [["--batch_size=3"], ["--quantize=bf16"], ["--transformers", "--batch_size=1"]])
def test_generation_is_measured_beside_its_limits_and_peers(more, tmp_path):
    if "--transformers" in more:
        pytest.importorskip("transformers")
    asked = ["generate", *TINY_BENCH, "--max_new_tokens=20", "--num_rounds=2", "--json", *more]
    done = run_script("bench.py", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)  # and nothing else is printed
    sizes = {"--batch_size=3": [1, 3], "--quantize=bf16": [1, 8, 32], "--transformers": [1]}[more[0]]
    shapes = [(f["batch_size"], f["prompt_tokens"], f["new_tokens"]) for f in figures["generation"]]
    assert shapes == [(b, 16, 20) for b in sizes] + [(b, 32, 32) for b in sizes]
    for f in figures["generation"]:
        assert f["share_of_products"] == pytest.approx(f["decoded_tokens_per_second"] / f["products_tokens_per_second"])
        whole = f["batch_size"] * f["new_tokens"] / f["tokens_per_second"]
        assert 0 < f["first_token_seconds"] < whole
        assert ("uncached_tokens_per_second" in f) == (f["batch_size"] == 1)
    first = figures["generation"][0]
    assert ("transformers_tokens_per_second" in first) == ("--transformers" in more)
    assert figures["config"]["what"] == "generate" and figures["torch"]


def test_without_a_datasets_validation_split_there_is_no_perplexity(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=100)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    asked = ["generate", "--device=cpu", "--init_from=hf", "--quantize=bf16", "--num_rounds=1", "--batch_size=1"]
    done = run_script("bench.py", *asked, "--json", cwd=tmp_path)
    assert done.returncode == 0 and "no perplexity" in done.stderr, done.stderr
    assert "perplexity" not in json.loads(done.stdout)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["generat"], "there are train, generate, serve and prepare"),
        (["generate", "--num_rounds=0"], "num_rounds=0"),
        (["generate", "--against=nowhere"], "no model.py"),
        (["generate", "--quantize=int1"], "int8, bf16"),
        (["generate", "--block_size=1"], "block_size must be at least 2"),
        (["generate", "--vocab_size=1000001"], "vocab_size at most a million"),
        (["generate", "--init_from=./nowhere"], "no folder ./nowhere"),
    ],
)
def test_mistakes_are_sentences(wrong, words, tmp_path):
    done = run_script("bench.py", *TINY_BENCH, *wrong, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


NANO_MODEL = """
from dataclasses import dataclass
import torch


@dataclass
class GPTConfig:
    block_size: int = 1
    vocab_size: int = 1
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 1
    dropout: float = 0.0
    bias: bool = True


class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: many")
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.ballast = torch.ones(64 << 20)  # 256 MB

    def forward(self, idx, targets=None):
        logits = self.wte(idx) @ self.wte.weight.t()
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def test_training_is_measured_beside_nanogpt_each_in_a_process_of_its_own(tmp_path):
    (tmp_path / "model.py").write_text(NANO_MODEL, encoding="utf-8")
    asked = ["train", *TINY_BENCH, "--batch_size=2", "--num_steps=4", f"--against={tmp_path}", "--json"]
    done = run_script("bench.py", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    ours, theirs = figures["weigpt"], figures["nanogpt"]
    ratio = figures["tokens_per_second_ratio"]
    assert ratio == pytest.approx(theirs["ms_per_iteration"] / ours["ms_per_iteration"])
    assert min(ours["iterations"], theirs["iterations"]) >= 4
    assert theirs["peak_memory_bytes"] - ours["peak_memory_bytes"] > 200e6  # its ballast, which is not in our process
    (tmp_path / "model.py").write_text("raise RuntimeError('spoilt')", encoding="utf-8")
    done = run_script("bench.py", *asked, cwd=tmp_path)
    assert done.returncode == 2 and "spoilt" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_batch_and_block_sizes_are_swept_and_other_architectures_measured(tmp_path):
    modern = ["--act=relu2", "--pos=rope", "--norm=rmsnorm", "--qk_norm", "--tied=False", "--zero_init", "--smear=2"]
    sweep = ["--batch_sizes=1,2", "--block_sizes=8,16", "--optim=muon", "--num_steps=1", "--json"]
    done = run_script("bench.py", "train", *TINY_BENCH, *modern, *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sizes"]
    assert [(f["batch_size"], f["block_size"]) for f in found] == [(1, 8), (2, 8), (1, 16), (2, 16)]
    # by hand: embedding and head of their own, no positions, a block of two smears and 12 x 16 x 16
    assert {f["parameters"] for f in found} == {2 * 1600 + 2 * 2 * 16 + 12 * 256}


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--batch_sizes=1,x"], "whole numbers between commas"),
        (["--block_sizes=0"], "block_size=0"),
        (["--batch_sizes=1,2", "--profile"], "one batch size"),
        (["--against=nowhere"], "no model.py"),
        (["--pos=absolute"], "learned, rope"),
        (["--optim=lion"], "adamw or muon"),
    ],
)
def test_mistakes_in_measuring_training_are_sentences(wrong, words, tmp_path):
    done = run_script("bench.py", "train", *TINY_BENCH, "--num_steps=1", *wrong, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
