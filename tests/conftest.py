"""What the tests share: no hub, GPT-2's vocabulary where there is one, a small dataset, and scripts run as users do."""

import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # texts beside the repository on some machines, never in a user's clone

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others leave them the core
if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "data" / "tiktoken_cache").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "data" / "tiktoken_cache")

import pytest
import torch

torch.set_num_threads(1)

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
TINY_ARGS = [f"--{k}={v}" for k, v in TINY.items()] + [
    "--device=cpu",
    "--compile=False",
    "--matmul=float32",
    "--batch_size=4",
    "--eval_iters=2",
    "--learning_rate=1e-2",
    "--warmup_iters=2",
]


def run_script(*args, cwd, env=None, **options) -> subprocess.CompletedProcess:
    """`python args...` as a user runs it, from the folder `cwd`; its output as text."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | (env or {})
    command = [sys.executable, str(ROOT / args[0]), *map(str, args[1:])]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace", **options
    )


def torchrun(processes: int, *args, cwd) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc_per_node=processes args...`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, str(ROOT / args[0]), *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture(autouse=True)
def exact_products():
    """A script that is run inside a test may have chosen bfloat16 for the products of float32 matrices."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """A dataset folder: the first of the embedded stories, by characters, with byte fallback."""
    folder = tmp_path_factory.mktemp("stories")
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[:20000]
    (folder / "some.txt").write_text(text, encoding="utf-8")
    done = run_script("data/chinese/prepare.py", f"--input={folder / 'some.txt'}", f"--dest={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


SCRIPTS = [
    [*map(chr, range(0x20, 0x7F))],
    list("的一是不了人我在有他这中大来上国个到说们，。！？《》“”、：；…—　"),
    [*map(chr, range(0x4E00, 0x4E00 + 3000)), *map(chr, range(0x20000, 0x20100))],
    list("😀👍🏽❤️👨‍👩‍👧🇨🇳é\u0301ñßŁſ²½Жяابअ한あア々〇"),
    list(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u200b\ufeff"),
    list("\x00\x01\x07\x1b\x7f\ufffd\uffff\U0010ffff"),
    ["<|endoftext|>", "[SEP]", "[UNK]", "<s>", "</s>", "<0x41>", "##a", "▁", "Ġ", "Ċ", "don't", " the", "  ", "\n\n"],
]


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Strings of up to 60 pieces: Latin, Chinese, emoji, spaces of all kinds, controls, what looks like tokens."""
    rng = random.Random(seed)
    texts = [""]
    while len(texts) < n:
        scripts = rng.sample(SCRIPTS, rng.randint(1, 3))
        texts.append("".join(rng.choice(rng.choice(scripts)) for _ in range(rng.randint(1, 60))))
    return texts
