"""What the tests share: no hub, GPT-2's vocabulary where there is one, a small dataset, and scripts run as users do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # texts beside the repository on some machines, never in a user's clone

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
if "TIKTOKEN_CACHE_DIR" not in os.environ and (SHARED / "data" / "tiktoken_cache").is_dir():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "data" / "tiktoken_cache")

import pytest
import torch

torch.set_num_threads(1)

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
TINY_ARGS = [f"--{k}={v}" for k, v in TINY.items()] + [
    "--device=cpu",
    "--compile=False",
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


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> Path:
    """A dataset folder: the first of the embedded stories, by characters, with byte fallback."""
    folder = tmp_path_factory.mktemp("stories")
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[:20000]
    (folder / "some.txt").write_text(text, encoding="utf-8")
    done = run_script("data/chinese/prepare.py", f"--input={folder / 'some.txt'}", f"--dest={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder
