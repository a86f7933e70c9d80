"""sample.py as users run it."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_ARGS, run_script

OUT = "--out_dir=out"
SHORT = ["--num_samples=3", "--max_new_tokens=12"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder with out/, a tiny model of the embedded stories, and d/, their dataset."""
    folder = tmp_path_factory.mktemp("sampled")
    assert run_script("data/chinese/prepare.py", "--dest=d", cwd=folder).returncode == 0
    done = run_script("train.py", *TINY_ARGS, "--dataset=d", "--max_iters=30", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def samples(done) -> list[str]:
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n---------------\n")
    return done.stdout.split("\n---------------\n")[:-1]


def test_samples_are_the_same_however_many_are_drawn_together(run_folder):
    asked = [OUT, "--start=小", "--max_new_tokens=30"]
    seven = samples(run_script("sample.py", *asked, "--num_samples=7", cwd=run_folder))
    assert len(seven) == 7 == len(set(seven)) and all(text.startswith("小") for text in seven)
    done = run_script("sample.py", *asked, "--num_samples=7", "--batch_size=3", "--stream=False", cwd=run_folder)
    assert samples(done) == seven
    assert samples(run_script("sample.py", *asked, "--num_samples=2", cwd=run_folder)) == seven[:2]
    assert re.search(r"\d+ tokens in \S+ s: \S+ tokens/s, the first after \S+ s", done.stderr)
    assert samples(run_script("sample.py", *asked, "--num_samples=7", "--seed=2", cwd=run_folder)) != seven


def test_a_title_fills_the_datasets_layout_which_is_in_the_checkpoint(run_folder, tmp_path):
    shutil.copytree(run_folder / "out", tmp_path / "out")  # without the dataset
    texts = samples(run_script("sample.py", OUT, "--title=家乡的四季", *SHORT, cwd=tmp_path))
    assert len(texts) == 3 and all(text.startswith("《家乡的四季》\n") for text in texts)
    done = run_script("sample.py", OUT, "--title=家乡的四季", "--start=春天", *SHORT, cwd=tmp_path)
    assert all(text.startswith("《家乡的四季》\n春天") for text in samples(done))
    by_path = ["--init_from=out", "--title=家乡的四季", "--start=春天", *SHORT]
    assert run_script("sample.py", *by_path, cwd=tmp_path).stdout == done.stdout


def test_prompts_from_stdin_and_files(run_folder, tmp_path):
    done = run_script("sample.py", OUT, "--start=-", *SHORT, cwd=run_folder, input="小熊\n说")
    assert all(text.startswith("小熊\n说") for text in samples(done))
    (tmp_path / "prompt.txt").write_text("\ufeff小白兔", encoding="utf-8")
    done = run_script("sample.py", OUT, f"--start=FILE:{tmp_path}/prompt.txt", *SHORT, cwd=run_folder)
    assert all(text.startswith("小白兔") for text in samples(done))


def test_prompts_as_editors_and_shells_make_them(run_folder, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("小白\r\n兔".encode())
    done = run_script("sample.py", OUT, f"--start=FILE:{tmp_path}/prompt.txt", *SHORT, cwd=run_folder)
    assert all(text.startswith("小白\n兔") for text in samples(done))
    greedy = [OUT, "--temperature=0", "--num_samples=1", "--max_new_tokens=9"]
    echoed = run_script("sample.py", *greedy, "--start=-", cwd=run_folder, input="小白\n")
    assert samples(echoed) == samples(run_script("sample.py", *greedy, "--start=小白", cwd=run_folder))


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes stdin")
@pytest.mark.parametrize("how", ["--start=-", "--interactive"])
def test_a_closed_stdin_is_a_sentence(run_folder, how):
    command = f"{sys.executable} {ROOT / 'sample.py'} {OUT} {how} <&-"
    done = subprocess.run(command, shell=True, cwd=run_folder, capture_output=True, text=True)
    assert done.returncode == 2 and "stdin is closed" in done.stderr and "Traceback" not in done.stderr


def test_a_line_that_is_no_text_is_a_sentence_and_the_conversation_goes_on(run_folder):
    command = [sys.executable, str(ROOT / "sample.py"), OUT, "--interactive", "--max_new_tokens=3"]
    done = subprocess.run(command, cwd=run_folder, input=b"\xff\n\xe5\xb0\x8f\n", capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "utf-8"})  # fmt: skip
    assert done.returncode == 0 and b"lone surrogate" in done.stderr and b"Traceback" not in done.stderr
    assert len(done.stdout.decode()) > 6


def test_a_prompt_of_a_megabyte_says_what_is_not_seen(run_folder, tmp_path):
    (tmp_path / "long.txt").write_text("小白兔说，" * 70_000, encoding="utf-8")
    done = run_script("sample.py", OUT, f"--start=FILE:{tmp_path}/long.txt", "--num_samples=1", "--max_new_tokens=5",
                      cwd=run_folder)  # fmt: skip
    assert len(samples(done)[0]) >= 350_000
    assert "350,000 tokens" in done.stderr and "holds 32" in done.stderr and "the first 349,968" in done.stderr


def test_where_a_text_ends(run_folder):
    asked = [OUT, "--start=小", "--num_samples=4", "--max_new_tokens=40", "--temperature=1"]
    free = samples(run_script("sample.py", *asked, cwd=run_folder))
    character = free[0][5]
    ended = samples(run_script("sample.py", *asked, f"--stop={character}", "--stop=never met", cwd=run_folder))
    assert ended == [text[0] + text[1:].split(character)[0] for text in free]
    going_on = samples(run_script("sample.py", *asked, "--stop_at_sentence", "--stop_chars=，。", cwd=run_folder))
    for text, longer in zip(free, going_on, strict=True):
        assert longer.startswith(text[:40]) and (longer[-1] in "，。" or len(longer) >= 80 or longer == text)


def test_probabilities_are_colours_around_the_same_text(run_folder):
    asked = [OUT, "--start=小", "--num_samples=2", "--max_new_tokens=30"]
    plain = run_script("sample.py", *asked, cwd=run_folder)
    done = run_script("sample.py", *asked, "--show_probs", cwd=run_folder)
    assert re.sub(r"\x1b\[[0-9;]*m", "", done.stdout) == plain.stdout
    assert done.stdout.count("\x1b[30;48;5;") > 20 and "probability" in done.stderr


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_quantized_models_speak(run_folder, kind):
    asked = [OUT, "--start=小", "--num_samples=4", "--max_new_tokens=300", "--top_k=0", "--temperature=1"]
    plain = samples(run_script("sample.py", *asked, cwd=run_folder))
    small = samples(run_script("sample.py", *asked, f"--quantize={kind}", cwd=run_folder))
    assert len(small) == 4 and small != plain  # rounding shows somewhere in a thousand tokens
    assert [text[:2] for text in small] == [text[:2] for text in plain]


def test_writing_together(run_folder):
    """Each line is appended to the text so far, which is what the model sees: greedily, the same as all at once."""
    asked = [OUT, "--temperature=0", "--max_new_tokens=6", "--interactive"]
    done = run_script("sample.py", *asked, cwd=run_folder, input="小白\n兔\n/new\n小白\n")
    assert done.returncode == 0, done.stderr
    first, second, _, afresh, _ = [turn.removesuffix("\n") for turn in done.stdout.split("> ")[1:]]
    whole = [OUT, "--temperature=0", "--max_new_tokens=6", "--num_samples=1"]
    assert samples(run_script("sample.py", *whole, "--start=小白", cwd=run_folder)) == [f"小白{first}"]
    text = f"小白{first}兔"
    assert samples(run_script("sample.py", *whole, f"--start={text}", cwd=run_folder)) == [text + second]
    assert afresh == first


MISTAKES = {
    "--temperature=-1": "temperature=-1",
    "--top_p=0": "top_p=0",
    "--top_k=-5": "top_k=-5",
    "--min_p=2": "min_p=2",
    "--repetition_penalty=0": "repetition_penalty=0",
    "--max_new_tokens=-1": "max_new_tokens=-1",
    "--num_samples=0": "num_samples=0",
    "--batch_size=0": "batch_size=0",
    "--stop=": "stop=",
    "--quantize=int3": "int8, bf16",
    "--init_from=./nowhere": "no folder ./nowhere",
    "--out_dir=nowhere": "no checkpoint in nowhere",
    "--start=FILE:nowhere.txt": "nowhere.txt",
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(wrong, run_folder):
    done = run_script("sample.py", OUT, *SHORT, wrong, cwd=run_folder)
    said = [line for line in done.stderr.splitlines() if not line.startswith("overriding: ")]
    assert (done.returncode, done.stdout, len(said)) == (2, "", 1), done.stderr
    assert said[0].startswith("sample.py: ") and MISTAKES[wrong] in said[0]


def test_mistakes_that_need_two_keys(run_folder, tmp_path):
    done = run_script("sample.py", OUT, "--interactive", "--start=-", cwd=run_folder, input="")
    assert done.returncode == 2 and "cannot share stdin" in done.stderr
    (tmp_path / "text.txt").write_text("天地玄黄宇宙洪荒" * 60, encoding="utf-8")
    done = run_script("data/chinese/prepare.py", "--input=text.txt", "--dest=d", cwd=tmp_path)
    done = run_script("train.py", *TINY_ARGS, "--dataset=d", "--max_iters=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_script("sample.py", OUT, "--title=天", cwd=tmp_path)
    assert done.returncode == 2 and "no layout with a title" in done.stderr


def test_help_writes_down_what_odd_values_do():
    text = " ".join(run_script("sample.py", "--help", cwd=ROOT).stdout.split())
    for words in ("0 takes the likeliest", "0 for all", "above 0; 1 for all", "if it never comes", "- for stdin"):
        assert words in text, words


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX terminal")
def test_on_a_terminal_text_comes_while_it_is_written_and_ctrl_c_ends_it(tmp_path):
    """Through a pseudo-terminal: pieces arrive one by one; in a conversation Ctrl-C ends the model's turn alone."""
    import pty

    (tmp_path / "text.txt").write_text("大小天地玄黄宇宙洪荒" * 60, encoding="utf-8")
    endless = ["--input=text.txt", "--dest=d", "--byte_fallback=False"]  # a vocabulary without end of text
    assert run_script("data/chinese/prepare.py", *endless, cwd=tmp_path).returncode == 0
    done = run_script("train.py", *TINY_ARGS, "--dataset=d", "--max_iters=2", "--sample_interval=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), OUT, "--interactive", "--max_new_tokens=1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL,
                               env=os.environ | {"PYTHONIOENCODING": "utf-8"})  # fmt: skip

    def read_until(done) -> tuple[str, int]:
        text, reads, until = b"", 0, time.monotonic() + 60  # reads that ended inside a line
        while time.monotonic() < until and not done(text):
            if select.select([ours], [], [], 1)[0]:
                text += os.read(ours, 4096)
                reads += not text.endswith(b"\n")
        assert done(text), text[-200:]
        return text.decode("utf-8", errors="ignore"), reads

    read_until(lambda text: b"> " in text)
    os.write(ours, "小\n".encode())
    _, reads = read_until(lambda text: len(text) > 500)
    assert reads > 5
    process.send_signal(signal.SIGINT)
    read_until(lambda text: text.endswith(b"> "))
    os.write(ours, b"\x04")
    assert process.wait(20) == 0
    os.close(ours), os.close(theirs)
