"""The commands of the README, each run as it stands there but for keys that make it small, and a user's mistakes."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT, TINY_ARGS, run_script
from serving import Served, serving
from torch.distributed.run import get_args_parser as torchrun_options

import train
from configurator import configure

TEXT = "却说刘姥姥进了大观园，见了许多从没见过的东西，心里又惊又喜。\n" * 80
SMALL = "--device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --eval_iters=1"
SMALL_TRAIN = f"{SMALL} --bias=False --dropout=0.0 --gradient_accumulation_steps=2 --sample_tokens=5 --max_iters=2"
SMALL_BENCH = (
    "--device=cpu --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --vocab_size=100 --num_steps=2 --real_data=False"
)
HUB = (
    "--init_from=gpt2",
    "--path=wikimedia",
    'pico.py "Alan',
    "config/eval_gpt2",
    "config/finetune_shakespeare",
    "config/train_gpt3.py --model_size",
    "--nnodes=2",
    "sbatch ",
    "--against=",
)
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="the README's commands are for a POSIX shell")


def commands(readme: str) -> list[str]:
    """The lines of a README's ```sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def keys_parse(command: str, clone: Path) -> None:
    """A command for a hub or a cluster: its script answers, and every config file and key in it is known."""
    if command.startswith("sbatch "):
        job = clone / command.split()[1]
        assert subprocess.run(["bash", "-n", job]).returncode == 0
        command = re.search(r"srun (torchrun .*?) &\n", job.read_text(encoding="utf-8").replace("\\\n", ""))[1]
    if command.startswith("torchrun "):
        launcher, command = re.fullmatch(r"torchrun (.*?) (train\.py .*)", command).groups()
        known = torchrun_options().parse_args([*shlex.split(launcher.replace('="$SLURM_NNODES"', "=2")), "train.py"])
        assert known.nnodes == "2" or known.standalone
    script, *arguments = [word for word in shlex.split(command) if word != "python"]
    done = run_script(script, *arguments, "--help", cwd=clone)
    assert done.returncode == 0, done.stderr
    namespace = {"__file__": script}
    before, call = (ROOT / script).read_text(encoding="utf-8").split("config = configure", 1)
    exec(compile(before, script, "exec"), namespace)
    words = re.search(r'positionals=\("(\w+)",\)', call.partition("\n")[0])
    configure(namespace, positionals=words.groups() if words else (), argv=arguments)


def test_both_readmes_have_the_same_commands_tables_and_headings():
    assert commands("README.md") == commands("README.zh.md")
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for mark in ("\n## ", "\n| `", "\n- "):
        assert english.count(mark) == chinese.count(mark), mark


@POSIX
def test_every_command_of_the_readme(tmp_path):
    """In order, in one copy of the repository, as someone who reads from top to bottom would."""
    clone = tmp_path / "weiGPT"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "out*", "wandb", "__pycache__", "*.bin", "*.mask", "meta.*", "input.txt", ".*_cache"
    )
    shutil.copytree(ROOT, clone, ignore=skipped)
    (clone / ".venv").symlink_to(sys.prefix)  # what `make` and the first commands install
    (clone / "novel.txt").write_text(TEXT, encoding="utf-8")
    (clone / "more.txt").write_text(TEXT[::-1], encoding="utf-8")
    (clone / "docs.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(4)), encoding="utf-8")
    chats = [{"prompt": f"{c}？", "response": c * 2} for c in TEXT[:20]]
    (clone / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    titles = [f"{word}{n}\t{label}\n" for n in range(20) for label, word in enumerate(("足球", "股票"))]
    for name in ("titles.tsv", "new.tsv"):
        (clone / name).write_text("".join(titles), encoding="utf-8")
    english = clone / "english.txt"
    english.write_text("To be, or not to be: that is the question.\n" * 60, encoding="utf-8")
    gpt2 = "TIKTOKEN_CACHE_DIR" in os.environ and bool(importlib.util.find_spec("datasets"))
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "HF_HOME": str(tmp_path / "hf"), "WANDB_MODE": "disabled"}
    ran = 0
    for command in commands("README.md"):
        python = f"{shlex.quote(sys.executable)} "
        if "-m venv" in command or "-m pip" in command:
            for file in re.findall(r"-r (\S+)", command):  # what pip is asked for: `make test` has installed it
                line = re.compile(r"[-a-z_0-9]+(\[hf\])?([=>]=[\d.]+(,<[\d.]+)?)?(\s+#.*)?$|-r |#|$")
                assert all(line.match(x) for x in (clone / file).open())
            continue
        if any(word in command for word in HUB) or command.endswith("out-shakespeare"):
            keys_parse(command, clone)
            continue
        if not gpt2 and any(word in command for word in ("openwebtext", "train_gpt2", "data/shakespeare/")):
            keys_parse(command, clone)
            continue
        if command.startswith("make"):
            target = command.split()[1]
            small = {"demo": f"ARGS='{SMALL_TRAIN}'", "test": "TEST_ARGS=tests/test_loader.py",
                     "bench": f"ARGS='{SMALL_BENCH}'"}[target]  # fmt: skip
            run = f"make -o .venv/core -o .venv/dev {target} {small}"
        elif "serve.py" in command:
            with serving(*shlex.split(command.partition("serve.py ")[2]), cwd=clone, env=env) as served:
                assert httpx.get(served.url, trust_env=False).status_code == 200
                key = re.search(r"--api_key=(\w+)", command)
                if key:
                    answers_as_the_readme_says(served, key[1], tmp_path)
                assert served.end() == 0, served.said
            ran += 1
            continue
        else:
            run = re.sub(r"^(\.venv/bin/)?python ", python, command)
            run = run.replace("-m pytest", "-m pytest tests/test_loader.py")  # not this test again, without end
            run = run.replace("torchrun --standalone --nproc_per_node=8", f"{python} -m torch.distributed.run "
                              "--standalone --nproc_per_node=2")  # fmt: skip
            if "speedrun.py" in run:
                run += f" --seeds=1 --more='{SMALL_TRAIN}'"
            elif "train.py" in run and "--help" not in run:
                run += f" {SMALL_TRAIN}" + (" --max_iters=4" if "=resume" in run or "=auto" in run else "")
                if re.search(r"demo_chinese|config/train_chinese\.py|=out-chinese$", command) and "bpe" not in command:
                    run += " --block_size=160"  # the answers of a task are to fit, in bytes
            elif run.startswith("lm_eval "):
                run = f"{python} -m {run}"
            elif "sample.py" in run:
                run += " --device=cpu --max_new_tokens=8 --num_samples=2"
            elif "bench.py serve" in run:
                run += " --device=cpu --num_rounds=1 --max_seconds=2 --clients=1,2 --hang_ups=3 --max_new_tokens=8"
            elif "bench.py" in run:
                run += f" {SMALL_BENCH} --num_rounds=1"
            elif "classify.py train" in run:
                run += " --epochs=1"
            elif "pico.py" in run:
                run += " --max_new_tokens=4"
            elif "shakespeare" in run:
                run += f" --input={english}"
            elif "openwebtext" in run:
                run += ("" if "--input" in run else " --input=docs.jsonl") + " --val_fraction=0.3 --num_proc=1"
        done = subprocess.run(
            run, shell=True, cwd=clone, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300
        )
        assert done.returncode == 0, f"{command}\n{run}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"
        ran += 1
    assert ran > 15
    assert {"out-demo", "out-chinese", "out-more", "out-shakespeare-char"} <= {p.name for p in clone.iterdir()}


def answers_as_the_readme_says(served: Served, key: str, folder: Path) -> None:
    """Runs the README's Python against a server that is there."""
    for readme in ("README.md", "README.zh.md"):
        [program] = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
        assert f'api_key="{key}"' in program and "http://127.0.0.1:8000/v1" in program
        (folder / "ask.py").write_text(program.replace("http://127.0.0.1:8000", served.url), encoding="utf-8")
        done = run_script(folder / "ask.py", cwd=folder, env={"NO_PROXY": "127.0.0.1"})
        assert done.returncode == 0 and done.stdout, done.stderr


def test_the_demo_prints_chinese_stories_and_its_model_knows_any_text(tmp_path):
    """The main job with nothing but the embedded text: after 60 steps the model is past guessing single characters."""
    assert run_script("data/chinese/prepare.py", "--dest=data", cwd=tmp_path).returncode == 0
    quick = ["--max_iters=100", "--n_layer=2", "--n_embd=64", "--batch_size=8", "--block_size=64", "--eval_interval=30"]
    done = run_script("train.py", "config/demo_chinese.py", "--dataset=data", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = torch.load(tmp_path / "out-demo" / "ckpt.pt", weights_only=True)["best_val_loss"]
    story = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")
    assert best < unigram_entropy(story)  # it has learnt more than how frequent each character is
    shutil.rmtree(tmp_path / "data")  # a checkpoint is complete without its dataset
    for start in ("", "《小白兔》\n", "🙂 hello 囍"):
        asked = ["--out_dir=out-demo", f"--start={start}", "--num_samples=2", "--max_new_tokens=30"]
        done = run_script("sample.py", *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        samples = done.stdout.split("\n---------------\n")
        assert len(samples) == 3 and all(s.startswith(start) and len(s) > len(start) for s in samples[:2])
        again = run_script("sample.py", *asked, cwd=tmp_path)
        assert again.stdout == done.stdout


def unigram_entropy(text: str) -> float:
    """Nats a character of a text's own character frequencies."""
    counts = torch.tensor([text.count(c) for c in set(text)], dtype=torch.float64)
    p = counts / counts.sum()
    return float(-(p * p.log()).sum())


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler here")
def test_sampling_compiled_says_the_same(straight_model, tmp_path):
    asked = [f"--out_dir={straight_model}", "--start=却", "--num_samples=1", "--max_new_tokens=12", "--temperature=0"]
    plain = run_script("sample.py", *asked, cwd=tmp_path)
    done = run_script("sample.py", *asked, "--compile", cwd=tmp_path)
    assert done.returncode == 0 and "running without it" not in done.stderr, done.stderr
    assert done.stdout == plain.stdout and done.stdout.startswith("却")


@pytest.fixture
def straight_model(tmp_path) -> Path:
    """An out_dir with a tiny model of the text above."""
    done = run_script("train.py", *TINY_ARGS, broken_dataset(tmp_path, "fine"), "--max_iters=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def broken_dataset(folder: Path, what: str) -> str:
    source = folder / "text.txt"
    source.write_text(TEXT, encoding="utf-8")
    done = run_script("data/chinese/prepare.py", f"--input={source}", "--byte_fallback=False", "--dest=d", cwd=folder)
    assert done.returncode == 0, done.stderr
    if what == "meta":
        (folder / "d" / "meta.json").write_text('{"kind": "char", ', encoding="utf-8")
    elif what == "ids":
        meta = json.loads((folder / "d" / "meta.json").read_text(encoding="utf-8"))
        del meta["max_id"]  # as where there is no meta.json: the file itself is read
        size = (folder / "d" / "train.bin").stat().st_size
        (folder / "d" / "train.bin").write_bytes(b"\xff\x7f" * (size // 2))
        (folder / "d" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return "--dataset=d"


MISTAKES = {
    "unknown key": (["--learning_rte=1"], "learning_rate"),
    "bad type": (["--max_iters=soon"], "whole number"),
    "missing dataset": (["--dataset=nowhere"], "nowhere"),
    "corrupt meta.json": (["meta"], "meta.json"),
    "ids beyond the vocabulary": (["ids"], "32767"),
    "out_dir that cannot be made": (["fine", "--out_dir=text.txt/out"], "out_dir"),
    "n_embd not divisible by n_head": (["fine", "--n_embd=30", "--n_head=4"], "divisible"),
    "CUDA device that is not there": (["fine", "--device=cuda:99"], "cuda"),
    "no such backend value": (["fine", "--dtype=float8"], "float8"),
    "resume from nothing": (["--init_from=resume", "--out_dir=empty"], "no checkpoint to resume"),
    "weights from nowhere": (["fine", "--init_from=gpt7"], "gpt7"),
    "too short a text": (["fine", "--block_size=5000"], "block_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_users_mistake_is_one_sentence_and_status_2(name, tmp_path):
    (first, *rest), words = MISTAKES[name]
    first = first if first.startswith("--") else broken_dataset(tmp_path, first)
    done = run_script("train.py", *TINY_ARGS, "--max_iters=2", first, *rest, cwd=tmp_path)
    assert_a_sentence(done, words)
    assert not (tmp_path / "out").exists()


def assert_a_sentence(done: subprocess.CompletedProcess, words: str) -> None:
    said = [line for line in done.stderr.splitlines() if not line.startswith("overriding: ")]
    assert done.returncode == 2 and len(said) == 1 and words in said[0], (done.returncode, done.stderr)


def test_sampling_mistakes_are_one_sentence_and_status_2(tmp_path):
    dataset = broken_dataset(tmp_path, "fine")
    done = run_script("train.py", *TINY_ARGS, dataset, "--max_iters=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_a_sentence(run_script("sample.py", "--start=hello", cwd=tmp_path), "U+0068")
    assert_a_sentence(run_script("sample.py", "--start=", cwd=tmp_path), "empty prompt")
    assert_a_sentence(run_script("sample.py", "--start=FILE:none.txt", cwd=tmp_path), "none.txt")
    assert_a_sentence(run_script("sample.py", "--temperature=-1", cwd=tmp_path), "temperature")
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert_a_sentence(run_script("sample.py", "--start=却", cwd=tmp_path), "ckpt.pt")
    assert_a_sentence(run_script("sample.py", "--out_dir=nowhere", cwd=tmp_path), "no checkpoint in nowhere")


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "gbk"}, {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": ""}])
def test_prepare_train_and_sample_in_a_gbk_console_and_in_the_c_locale(tmp_path, env):
    (tmp_path / "文.txt").write_text("表情🙂，𠮷野家。" * 300, encoding="utf-8")
    steps = [
        ["data/chinese/prepare.py", "--input=文.txt", "--dest=d"],
        ["train.py", *TINY_ARGS, "--dataset=d", "--max_iters=2", "--sample_interval=1", "--sample_prompts=🙂"],
        ["sample.py", "--start=🙂𠮷", "--num_samples=1", "--max_new_tokens=5"],
    ]
    for step in steps:
        done = run_script(*step, cwd=tmp_path, env=env)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (step, done.stderr)


def test_bench_prints_figures_and_json(tmp_path):
    small = [*shlex.split(SMALL_BENCH), "--batch_size=2"]
    done = run_script("bench.py", *small, cwd=tmp_path)
    assert done.returncode == 0 and "tokens/s" in done.stdout and "MFU: n/a" in done.stdout, done.stderr
    done = run_script("bench.py", *small, "--json", cwd=tmp_path)
    figures = json.loads(done.stdout)
    assert abs(figures["tokens_per_second"] * figures["ms_per_iteration"] / 1000 - 2 * 16) < 1e-6
    # by hand: embeddings 100 x 16, a layer of two norms and 12 x 16 x 16, a last norm
    assert figures["parameters"] == 1600 + 16 * 16 + 2 * 16 + 12 * 256 + 16
    done = run_script("bench.py", *small, "--profile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "aten::addmm" in done.stdout or "aten::mm" in done.stdout
    assert json.loads((tmp_path / "bench_log" / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_the_loop_stays_one_screen():
    lines = Path(train.__file__).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "while True:")
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("def "))
    assert end - start < 60
