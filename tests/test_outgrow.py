"""A model that is too large for the memory of one process, and not for that of four."""

import os
import re
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and measures address space in Linux's ways")

# 114 million parameters, and next to no activations
SHAPE = {"n_layer": 16, "n_head": 8, "n_embd": 768, "block_size": 32, "batch_size": 1}
PARAMETERS = 16 * 12 * 768 * 768
SETTINGS = {
    "device": "cpu", "compile": False, "matmul": "float32", "gradient_accumulation_steps": 4, "eval_iters": 1,
    "eval_interval": 0, "max_iters": 2,
}  # fmt: skip
PEAK = """
import atexit, re, runpy, sys
del sys.argv[0]
atexit.register(lambda: print(re.search("VmPeak.*", open("/proc/self/status").read())[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(processes: int, limit: int, dataset, folder, **settings) -> subprocess.CompletedProcess:
    """train.py by torchrun, no process of which can have more than `limit` bytes of addresses."""
    (folder / "peak.py").write_text(PEAK, encoding="utf-8")
    keys = SETTINGS | SHAPE | {"dataset": dataset, "out_dir": folder / "out"} | settings
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, folder / "peak.py", ROOT / "train.py", *[f"--{k}={v}" for k, v in keys.items()]],
        cwd=folder, capture_output=True, text=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        # each thread's arena would reserve addresses, unused
        env=os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_model_too_large_for_one_process_trains_on_four(stories, tmp_path):
    empty = train(4, resource.RLIM_INFINITY, stories, tmp_path, n_layer=1, n_embd=64, parallel="fsdp")
    assert empty.returncode == 0, empty.stdout + empty.stderr
    without_a_model = 1024 * max(map(int, re.findall(r"VmPeak:\s+(\d+) kB", empty.stdout)))
    limit = without_a_model + 12 * PARAMETERS  # weights, gradients and moments take 16 for each
    alone = train(1, limit, stories, tmp_path)
    assert alone.returncode != 0 and "train.py: out of memory: " in alone.stderr, alone.stderr
    four = train(4, limit, stories, tmp_path, parallel="fsdp", out_dir=tmp_path / "four")
    assert four.returncode == 0, four.stdout + four.stderr
    assert "done: 2 iterations" in four.stdout and (tmp_path / "four" / "ckpt.pt").stat().st_size > 4 * PARAMETERS
    assert max(map(int, re.findall(r"VmPeak:\s+(\d+) kB", four.stdout))) * 1024 <= limit
