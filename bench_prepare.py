"""What `python bench.py prepare` measures; everything that is compared is measured in turns, in one run.

Notable choices:
- Whole processes, from the start of Python to the last byte on the disk, on one core; and the most memory they had.
- nanoGPT's way is its own data/shakespeare_char/prepare.py, in a folder that is given, on the same text.
- Of GPT-2's BPE, the encoding alone on all cores beside tiktoken's own batch method on the same pieces of text.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from configurator import ROOT, Config, UserError, note, user_errors
from tokenizer import GPT2Tokenizer, cut_up

STORIES = ROOT / "data" / "chinese" / "stories_zh.txt"
SAMPLE = 2**24  # characters that GPT-2's BPE is measured on
# a process of its own, because the memory of one that starts another counts as that one's
MEASURED = """
import json, os, resource, subprocess, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
begin = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"status": done.returncode, "said": done.stderr.decode(errors="replace")[-500:],
                  "seconds": seconds, "peak_bytes": peak}))
"""


def measure(c: Config, say: Callable[[str], None]) -> dict[str, Any]:
    """MB/s of UTF-8 and peak memory of preparing c.input, repeated c.copies times; says a line for each."""
    source = Path(c.input) if c.input else STORIES
    if sys.platform == "win32":
        raise UserError("prepare is not measured on Windows, which tells no peak of memory")
    with user_errors(OSError, UnicodeDecodeError, about=f"input={source}"):
        text = source.read_text(encoding="utf-8")
    if not text or c.copies < 1:
        raise UserError(f"input={source}, copies={c.copies}: expected a text, and at least 1")
    figures = {"input": str(source), "copies": c.copies, "bytes": source.stat().st_size * c.copies}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures |= compared_processes(c, source, Path(folder), say)
    return figures | compared_encoding(text[:SAMPLE], c.num_rounds, say)


def compared_processes(c: Config, source: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Whole processes that prepare the text by characters, on one core."""
    big, nano = folder / "input.txt", folder / "nanogpt" / "prepare.py"
    with big.open("wb") as file:
        for _ in range(c.copies):
            with source.open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
    prepare = [sys.executable, str(ROOT / "data" / "chinese" / "prepare.py"), f"--input={big}"]
    commands = {"characters": [*prepare, f"--dest={folder / 'out'}"]}
    if c.against:
        script = Path(c.against) / "data" / "shakespeare_char" / "prepare.py"
        if not script.is_file():
            raise UserError(f"against={c.against}: there is no {script.name} of shakespeare_char in it")
        nano.parent.mkdir()
        shutil.copy(script, nano)
        (nano.parent / "input.txt").symlink_to(big)
        commands["nanogpt"] = [sys.executable, str(nano)]
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(c.num_rounds):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            done = subprocess.run([sys.executable, "-c", MEASURED, *commands[name]], capture_output=True, check=True)
            found = json.loads(done.stdout)
            if found["status"]:
                raise UserError(f"{name} ended with status {found['status']}: {found['said']}")
            rounds[name].append(found)
    figures = {}
    for name, found in rounds.items():
        rates = [big.stat().st_size / 1e6 / one["seconds"] for one in found]
        peak = max(one["peak_bytes"] for one in found) / 1e6
        figures |= {f"{name}_mb_per_second": median(rates), f"{name}_peak_mb": peak}
        shown = ", ".join(f"{rate:.1f}" for rate in rates)
        say(f"{name}, whole process on one core: {median(rates):.1f} MB/s ({shown}), peak memory {peak:.0f} MB")
    return figures


def compared_encoding(text: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """GPT-2's BPE: our encoder, into an array of uint16, beside tiktoken's batch method on the same pieces."""
    tokenizer = GPT2Tokenizer()
    try:
        tokenizer.encode("")
        import tiktoken
    except (UserError, ImportError) as error:
        note(f"GPT-2's BPE is not measured: {error}")
        return {}
    library, threads = tiktoken.get_encoding("gpt2"), os.cpu_count() or 1
    parts, size, seconds = cut_up(text), len(text.encode("utf-8")) / 1e6, defaultdict(list)
    ways = {
        "gpt2": lambda: tokenizer.encode(text),
        "tiktoken": lambda: library.encode_ordinary_batch(parts, num_threads=threads),
    }
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
            begin = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - begin)
    rates = {f"{name}_mb_per_second": size / median(found) for name, found in seconds.items()}
    share = rates["gpt2_mb_per_second"] / rates["tiktoken_mb_per_second"]
    say(
        f"GPT-2's BPE, {size:.1f} MB on {threads} cores: {rates['gpt2_mb_per_second']:.1f} MB/s, tiktoken's batch "
        f"{rates['tiktoken_mb_per_second']:.1f} MB/s, {share:.0%} of it"
    )
    return rates | {"share_of_tiktoken": share}
