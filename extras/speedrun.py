"""How long a configuration takes to a loss, over several seeds, with variants of it and nanoGPT in turns.

    $ python extras/speedrun.py --recipe=config/speedrun_cpu_char.py --seeds=5 --against=FOLDER
    $ python extras/speedrun.py --recipe=config/speedrun_cpu_char.py --variant="--optim=adamw" --variant="--smear=0"

Notable choices:
- Every run is a process of its own, as a user starts it, one after the other; the order is turned around with each
  seed, so that a machine that slows down does so for all.
- A run's seconds of training are those in its log.jsonl. nanoGPT prints each iteration's; those that hold an evaluation
  are counted as the median of the others.
- Losses are of the whole validation split, for nanoGPT's checkpoint too, which our train.py reads.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import ROOT, Config, UserError, configure, run

recipe = ""  # the config file to run
seeds = 3  # runs of each, with the seeds 1, 2, 3, ...
variant = []  # arguments that make a variant of it, in one text; repeat the key for several
more = ""  # arguments for the recipe and for all its variants
against = ""  # a folder with nanoGPT and its data, to run in turns with the others
against_args = (  # what nanoGPT's train.py is given; the default is its README's for a CPU
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
dataset = "shakespeare_char"  # the dataset on whose validation split nanoGPT's loss is measured
json = False  # print one JSON object instead of the table
config = configure(globals())

import re
import shlex
import statistics
import subprocess
import tempfile
import time
from json import dumps, loads
from typing import Any

Figures = dict[str, Any]


def main(c: Config) -> None:
    if not c.recipe:
        raise UserError("no recipe: give a config file, such as --recipe=config/speedrun_cpu_char.py")
    if c.seeds < 1:
        raise UserError(f"seeds={c.seeds}: expected at least 1")
    nano = Path(c.against) / "train.py"
    if c.against and not nano.is_file():
        raise UserError(f"against={c.against}: there is no train.py in it; give a folder with a copy of nanoGPT")
    runs = {"the recipe": ours(c, ""), **{f"with {text}": ours(c, text) for text in c.variant}}
    if c.against:
        runs |= {"nanoGPT": lambda seed, folder: nanogpt(c, nano.resolve(), seed, folder)}
    found: dict[str, list[Figures]] = {name: [] for name in runs}
    for seed in range(1, c.seeds + 1):
        for name in list(runs) if seed % 2 else reversed(list(runs)):
            with tempfile.TemporaryDirectory(prefix="speedrun-") as folder:
                found[name].append(runs[name](seed, folder))
            print(f"seed {seed}, {name}: {line(found[name][-1])}", file=sys.stderr, flush=True)
    print(dumps({"runs": found}) if c.json else "\n".join(table(found)))


def ours(c: Config, text: str):
    """A function of a seed and a folder that runs the recipe with these arguments."""
    given = shlex.split(c.more) + shlex.split(text)

    def measured(seed: int, folder: str) -> Figures:
        args = [c.recipe, *given, f"--seed={seed}", f"--out_dir={folder}"]
        _, seconds = finished([sys.executable, str(ROOT / "train.py"), *args], Path.cwd())
        lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
        end = next(record for record in map(loads, reversed(lines)) if record["kind"] == "end")
        return {
            "steps": end["iter"],
            "training_seconds": end["training_seconds"],
            "process_seconds": seconds,
            "val_loss": end["val_loss"],
        }

    return measured


def nanogpt(c: Config, script: Path, seed: int, folder: str) -> Figures:
    """One run of nanoGPT, which has its seed in its source."""
    source = script.read_text(encoding="utf-8")
    seeded = script.with_name(f"train_seed_{seed}.py")
    seeded.write_text(source.replace("manual_seed(1337 +", f"manual_seed({1336 + seed} +"), encoding="utf-8")
    try:
        args = [*shlex.split(c.against_args), f"--out_dir={folder}"]
        output, seconds = finished([sys.executable, str(seeded), *args], script.parent)
    finally:
        seeded.unlink()
    times = [float(ms) / 1000 for ms in re.findall(r"^iter \d+: .* time ([\d.]+)ms", output, re.MULTILINE)]
    if not times:
        raise UserError("nanoGPT printed no iterations; against_args needs --log_interval=1")
    usual = statistics.median(times)
    evaluated = len(re.findall(r"^step \d+: ", output, re.MULTILINE))
    plain = sorted(times)[: len(times) - evaluated]  # an evaluation takes longer than any iteration
    asked = ["--init_from=resume", f"--out_dir={folder}", f"--dataset={c.dataset}", "--device=cpu", "--eval_only",
             "--eval_iters=1", "--target_val_loss=1", "--compile=False"]  # fmt: skip
    told, _ = finished([sys.executable, str(ROOT / "train.py"), *asked], Path.cwd())
    return {
        "steps": len(times),
        "training_seconds": sum(plain) + usual * evaluated,
        "process_seconds": seconds,
        "val_loss": float(re.search(r"val loss ([\d.]+)", told)[1]),
    }


def finished(command: list[str], where: Path) -> tuple[str, float]:
    """What a command prints, and its seconds. UserError where it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, encoding="utf-8", errors="replace")
    seconds = time.perf_counter() - started
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"{Path(command[1]).name} ended with status {done.returncode}: {reason}")
    return done.stdout, seconds


def line(f: Figures) -> str:
    return (
        f"val loss {f['val_loss']:.4f} after {f['steps']:,} steps, {f['training_seconds']:.2f}s of training, "
        f"{f['process_seconds']:.2f}s in all"
    )


def table(found: dict[str, list[Figures]]) -> list[str]:
    """A table in Markdown: medians, every run's loss, and how many times sooner than nanoGPT."""
    rows = ["| run | steps | seconds of training | whole process, s | whole-split val losses |", "| --- " * 5 + "|"]
    for name, runs in found.items():
        cells = [name, f"{statistics.median(f['steps'] for f in runs):,.0f}"]
        for key in ("training_seconds", "process_seconds"):
            own = statistics.median(f[key] for f in runs)
            cell = f"{own:.1f} ({min(f[key] for f in runs):.1f} to {max(f[key] for f in runs):.1f})"
            if "nanoGPT" in found and name != "nanoGPT":
                ratios = [n[key] / f[key] for n, f in zip(found["nanoGPT"], runs, strict=True)]
                cell += f", **{statistics.median(ratios):.1f}** times sooner (at least {min(ratios):.1f})"
            cells.append(cell)
        cells.append(", ".join(f"{f['val_loss']:.4f}" for f in runs))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    run(main, config)
