"""extras/speedrun.py on tiny runs, with a stand-in for nanoGPT: a script that prints its lines and leaves its files."""

import importlib.util
import json
import shutil

import pytest
from conftest import ROOT, TINY_ARGS, run_script
from test_train import nanogpt_run

NANO_TRAIN = """
import pathlib, shutil, sys, time
import torch
torch.manual_seed(1337 + 0)
out = pathlib.Path([a for a in sys.argv if a.startswith("--out_dir=")][0][10:])
for i in range(4):
    if i % 2 == 0:
        print(f"step {i}: train loss 3.0000, val loss 3.0000")
    print(f"iter {i}: loss 3.0, time {[900, 10, 800, 30][i]:.2f}ms, mfu 0.10%")
print("seed", torch.initial_seed())
shutil.copy(pathlib.Path(__file__).with_name("kept.pt"), out / "ckpt.pt")
"""


@pytest.fixture
def recipe(tmp_path, stories):
    lines = [f"dataset = {str(stories)!r}", "max_iters = 4", "eval_interval = 0"]
    (tmp_path / "recipe.py").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "recipe.py"


def test_variants_and_nanogpt_in_turns(recipe, tmp_path):
    out, _ = nanogpt_run(tmp_path)
    nano = tmp_path / "nano"
    nano.mkdir()
    (nano / "train.py").write_text(NANO_TRAIN, encoding="utf-8")
    shutil.copy(out / "ckpt.pt", nano / "kept.pt")
    more = " ".join(TINY_ARGS)
    asked = ["--recipe=recipe.py", "--seeds=2", f"--more={more}", "--variant=--max_iters=3", "--json"]
    asked += [f"--against={nano}", "--against_args=--log_interval=1", "--dataset=letters"]
    done = run_script("extras/speedrun.py", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    names = ["the recipe", "with --max_iters=3", "nanoGPT"]
    assert list(runs) == names and all(len(found) == 2 for found in runs.values())
    assert [f["steps"] for name in names for f in runs[name]] == [4, 4, 3, 3, 4, 4]
    for f in runs["nanoGPT"]:  # two iterations hold an evaluation: each counts as the median of all, 0.415 s
        assert f["training_seconds"] == pytest.approx(0.01 + 0.03 + 2 * (0.03 + 0.8) / 2)
        assert 2 < f["val_loss"] < 3 and f["process_seconds"] > 0.5
    assert runs["the recipe"][0]["val_loss"] != runs["the recipe"][1]["val_loss"]  # other seeds
    told = [text for text in done.stderr.splitlines() if text.startswith("seed ")]
    assert [text.split(":")[0].split(", ")[1] for text in told] == names + names[::-1]
    assert sorted(p.name for p in nano.iterdir()) == ["kept.pt", "train.py"]
    spec = importlib.util.spec_from_file_location("speedrun", ROOT / "extras" / "speedrun.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    table = module.table(runs)
    assert len(table) == 5 and table[2].startswith("| the recipe | 4 |") and "times sooner" in table[3]
    assert "times" not in table[4]


def test_mistakes_are_sentences(recipe, tmp_path):
    for wrong, words in (
        ([], "no recipe"),
        (["--recipe=recipe.py", "--seeds=0"], "seeds=0"),
        (["--recipe=recipe.py", "--against=nowhere"], "no train.py"),
        (["--recipe=recipe.py", "--seeds=1", "--more=--n_layer=none"], "whole number"),
        (["--recipe=nothing.py", "--seeds=1"], "nothing.py"),
    ):
        done = run_script("extras/speedrun.py", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["cpu_char", "gpu_char", "gpt2_124m", "chinese"])
def test_every_recipe_trains_at_a_reduced_size_and_resumes(name, stories, tmp_path):
    small = ["--device=cpu", "--compile=False", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
    small += ["--batch_size=2", "--gradient_accumulation_steps=2", "--eval_iters=1", f"--dataset={stories}"]
    done = run_script("train.py", f"config/speedrun_{name}.py", *small, "--max_iters=2", "--out_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    end = json.loads((tmp_path / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert end["kind"] == "end" and end["iter"] == 2 and end["tokens"] == 2 * 4 * 16
    assert end.get("reached") is (None if name == "chinese" else False)
    more = ["--init_from=resume", "--out_dir=out", "--device=cpu", "--compile=False", "--max_iters=3"]
    done = run_script("train.py", *more, cwd=tmp_path)
    assert done.returncode == 0 and "step 3" in done.stdout, done.stderr
