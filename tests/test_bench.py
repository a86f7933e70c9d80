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
        (["generat"], "there are train, generate and prepare"),
        (["generate", "--num_rounds=0"], "num_rounds=0"),
        (["generate", "--nanogpt=nowhere"], "no model.py"),
        (["generate", "--quantize=int1"], "int8, bf16"),
        (["generate", "--block_size=1"], "block_size must be at least 2"),
        (["generate", "--vocab_size=1000001"], "vocab_size at most a million"),
        (["generate", "--init_from=./nowhere"], "no folder ./nowhere"),
    ],
)
def test_mistakes_are_sentences(wrong, words, tmp_path):
    done = run_script("bench.py", *TINY_BENCH, *wrong, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
