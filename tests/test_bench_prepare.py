"""python bench.py prepare, run as a user runs it, on a text and on a stand-in for nanoGPT's folder."""

import json

from conftest import run_script

SLOW = """
import os, numpy as np
text = open(os.path.join(os.path.dirname(__file__), "input.txt"), encoding="utf-8").read()
np.frombuffer(text.encode("utf-16-le"), np.uint16).tofile(os.path.join(os.path.dirname(__file__), "train.bin"))
"""


def test_figures_of_both_ways(tmp_path):
    text = "却说刘姥姥进了大观园。\n" * 2000
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    script = tmp_path / "nano" / "data" / "shakespeare_char" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text(SLOW)
    words = f"--input={tmp_path / 't.txt'}", "--copies=3", f"--against={tmp_path / 'nano'}", "--num_rounds=2", "--json"
    done = run_script("bench.py", "prepare", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["bytes"] == 3 * len(text.encode())
    for name in ("characters", "nanogpt"):
        assert figures[f"{name}_mb_per_second"] > 0 and 5 < figures[f"{name}_peak_mb"] < 2000
    assert ("share_of_tiktoken" in figures) == ("GPT-2's BPE is not measured" not in done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano", "t.txt"]


def test_mistakes(tmp_path):
    for words, said in (
        (["--input=nowhere.txt"], "nowhere.txt"),
        (["--copies=0"], "copies=0"),
        (["--against=nowhere"], "against=nowhere"),
    ):
        done = run_script("bench.py", "prepare", "--num_rounds=1", *words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    (tmp_path / "broken").mkdir()
    script = tmp_path / "broken" / "data" / "shakespeare_char" / "prepare.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('it does not work')")
    done = run_script("bench.py", "prepare", "--num_rounds=1", f"--against={tmp_path / 'broken'}", cwd=tmp_path)
    assert done.returncode == 2 and "it does not work" in done.stderr
