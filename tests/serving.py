"""serve.py as users run it, for tests."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from conftest import ROOT, TINY

import checkpoint
from model import GPT, GPTConfig
from tokenizer import Tokenizer


class Served:
    """A server that runs: its address, its process, and what it has said on stderr so far."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.said = process, []
        for line in process.stderr:
            self.said.append(line)
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                break
        else:
            raise AssertionError(f"serve.py ended with {process.wait()}: {''.join(self.said)}")
        self.reader = threading.Thread(target=lambda: self.said.extend(process.stderr), daemon=True)
        self.reader.start()

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health", trust_env=False).json()

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Sends the signal; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout)
        self.reader.join(timeout)
        return status


@contextmanager
def serving(*args, cwd, env=None):
    """`python serve.py --port=0 args...` in the folder `cwd` while the block lasts."""
    command = [sys.executable, str(ROOT / "serve.py"), "--port=0", "--device=cpu", *map(str, args)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | (env or {})
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        encoding="utf-8",
    )  # fmt: skip
    try:
        yield Served(process)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def write_run(folder: Path, tokenizer: Tokenizer, **shape) -> GPT:
    """A ckpt.pt in `folder`, of a tiny model that speaks at random; the model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size} | shape))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "model_args": model.config.model_args(), "tokenizer": tokenizer.meta()}
    checkpoint.save(folder / "ckpt.pt", state)
    return model
