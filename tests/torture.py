"""Tries to make train.py lose work: kills it, fills its disk, damages its files, forbids it to write, moves it to other
numbers of processes; and compares what comes of it with a run that nothing happened to.

    $ python tests/torture.py
    $ python tests/torture.py --minutes=60 --kills=2000
    $ python tests/torture.py --processes=2 --parallel=fsdp

Prints what was tried and what was lost; exit status 1 where a promise was broken.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import UserError, configure, run

minutes = 10.0  # no new attempt after so long
kills = 200  # enough of them
damaged = 100  # damaged copies of a checkpoint to load
processes = 1  # of a run, by torchrun where they are several
parallel = "ddp"  # or 'fsdp', whose checkpoints are folders
iterations = 240  # of a run
seed = 0  # of the choices; the instants of the kills cannot be repeated
folder = ""  # where to work, kept afterwards; empty for a temporary one
config = configure(globals())

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

import checkpoint
import folders

SETTINGS = {
    "matmul": "float32",  # or rounding to bfloat16 would make much of the little in which two and one process differ
    "device": "cpu", "compile": False, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 4,
    "gradient_accumulation_steps": 4, "dropout": 0.1, "learning_rate": 1e-2, "warmup_iters": 5, "eval_iters": 2,
    "eval_interval": 50, "save_interval": 1, "keep_checkpoints": 2, "checkpoint_interval": 60, "peer_timeout": 30,
    "max_iters": config.iterations, "lr_decay_iters": config.iterations, "init_from": "auto",
}  # fmt: skip


class Broken(Exception):
    """A promise that was not kept."""


class Tally:
    """What was tried and what was lost, counted by all threads."""

    def __init__(self):
        self.lock, self.counts, self.lost, self.broken = threading.Lock(), Counter(), [], []

    def add(self, what: str, n: int = 1) -> int:
        with self.lock:
            self.counts[what] += n
            return self.counts[what]


class Training:
    """train.py as a process of its own, in a session of its own, its output in a file."""

    def __init__(self, home: Path, *, processes: int = 0, prefix: tuple[str, ...] = (), **settings):
        self.home, self.out = home, home / "out"
        script, processes = [str(ROOT / "train.py")], processes or config.processes
        settings = {"parallel": config.parallel} | settings
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            script = [*launcher, *script]
        keys = SETTINGS | {"dataset": str(home.parent / "data"), "out_dir": str(self.out)} | settings
        self.said = home / "said.txt"
        with open(self.said, "ab") as file:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, *script, *[f"--{k}={v}" for k, v in keys.items()]],
                stdout=file, stderr=file, cwd=home, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, condition, seconds: float = 120) -> bool:
        """Until the condition holds: True; or the process ends, or the time is over: False."""
        until = time.monotonic() + seconds
        while self.running() and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.0002)
        return False

    def wait_for_lines(self, n: int) -> bool:
        """Until the log has more than n lines."""
        return self.wait_until(lambda: self.lines() > n)

    def wait_for_warning(self) -> bool:
        return self.wait_until(lambda: "training goes on" in self.said.read_text("utf-8", "replace"))

    def sleep(self, seconds: float) -> None:
        """For so long, or until the process ends."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def everyone(self) -> list[int]:
        """The process and all that it has started."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text(encoding="ascii").split())
        return found

    def kill(self) -> None:
        """All of it at once, as when the power fails."""
        for pid in self.everyone() if self.running() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finished(self) -> None:
        """Waits for an end that must be a good one."""
        try:
            status = self.process.wait(300)
        except subprocess.TimeoutExpired:
            self.kill()
            status = "no end within 300 s"
        if status:
            raise Broken(f"train.py ended with {status}: {self.last_words()}")

    def last_words(self) -> str:
        return "\n".join(self.said.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])

    def writing(self) -> bool:
        """Whether a file is being written, or waits to take its name."""
        names = os.listdir(self.out) if self.out.is_dir() else []
        return any(name.endswith(".tmp") and name != "log.jsonl.tmp" for name in names)

    def lines(self) -> int:
        """Lines in the log."""
        log = self.out / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def figures(out: Path) -> list[tuple]:
    """What must be the same in every log: evaluations and iterations, without their times."""
    keys = ("kind", "iter", "loss", "lr", "grad_norm", "train_loss", "val_loss", "val_accuracy", "mean_loss")
    return [tuple(line.get(key) for key in keys) for line in log_of(out)]


def newest(out: Path) -> dict:
    with contextlib.redirect_stderr(io.StringIO()):
        return checkpoint.newest(str(out))[1]


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def compare(out: Path, reference: Path) -> None:
    """Broken unless a run ended as the reference did, bit for bit."""
    ours, wanted = newest(out), newest(reference)
    for state in (ours, wanted):
        for key in ("epoch_seconds", "training_seconds", "evaluation_seconds"):
            del state["progress"][key]
        del state["config"]["out_dir"], state["config"]["dataset"]
    for key in ("iter_num", "sequences_seen", "best_val_loss", "progress", "model", "optimizers"):
        if not same(ours[key], wanted[key]):
            raise Broken(f"{out}: {key} differs from the uninterrupted run's")
    if not same(checkpoint.load(out / "ckpt.pt")["model"], checkpoint.load(reference / "ckpt.pt")["model"]):
        raise Broken(f"{out}: ckpt.pt differs from the uninterrupted run's")
    if figures(out) != figures(reference):
        raise Broken(f"{out}: log.jsonl differs from the uninterrupted run's")


def kill_until_done(home: Path, reference: Path, tally: Tally, rng: random.Random, enough) -> None:
    """One run, killed again and again and resumed each time, until it is done or there were enough kills."""
    home.mkdir()
    had_checkpoint, harmed = False, set()  # the inodes of the files that were damaged here
    while True:
        training = Training(home)
        how, start = rng.random(), training.lines()
        if enough():
            training.finished()
        elif how < 0.15:  # at any instant of the start
            training.sleep(rng.uniform(0, 4))
        elif training.wait_for_lines(start + 1):
            training.sleep(rng.uniform(0, 1.5))
            if how < 0.75:  # inside a save: at any instant of one
                training.wait_until(training.writing, 5)
                training.sleep(rng.uniform(0, 0.01))
        if not training.running():
            training.finished()
            compare(training.out, reference)
            tally.add("killed runs that ended bit for bit like the straight one")
            shutil.rmtree(home)
            return
        training.kill()
        inside = training.writing()
        tally.add("kills")
        tally.add("kills inside a save", inside)
        if checkpoint.has_run(str(training.out)):
            had_checkpoint = True
        if had_checkpoint:
            saved = newest(training.out)["iter_num"]  # raises where nothing is loadable
            for path in (*training.out.glob("*.pt"), *folders.newest_first(training.out)):
                if path.stat().st_ino not in harmed:
                    checkpoint.load(path)  # nothing is ever half written, whichever of them is resumed
            logged = [line["iter"] for line in complete_lines(training.out) if line["kind"] == "train"]
            with tally.lock:
                tally.lost.append(max(0, max(logged, default=-1) + 1 - saved))
            last = newest_state(training.out)
            if rng.random() < 0.15 and saved > 5 and last and last.stat().st_ino not in harmed:
                damage(last, rng)
                harmed.add(last.stat().st_ino)
                tally.add("resumes with a damaged last state")


def complete_lines(out: Path) -> list[dict]:
    """The log's lines; a kill may have torn the last one."""
    log = out / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def newest_state(out: Path) -> Path | None:
    """last.pt, or the newest checkpoint folder."""
    return next((path for path in (out / "last.pt", *folders.newest_first(out)) if path.exists()), None)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(each.stat().st_size for each in path.iterdir()) if path.is_dir() else path.stat().st_size


def damage(path: Path, rng: random.Random) -> str:
    """Cuts a file, or one in a folder, short, zeroes a part of it or flips a bit; says what it did. The file is a new
    one under its name, for the old one may have other names."""
    path = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    data = bytearray(path.read_bytes())
    how = rng.choice(("cut short", "zeroed", "bit flipped"))
    at = rng.randrange(len(data))
    if how == "cut short":
        del data[at:]
    elif how == "zeroed":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    else:
        data[at] ^= 1 << rng.randrange(8)
    path.unlink()
    path.write_bytes(data)
    return how


def load_damaged(home: Path, reference: Path, tally: Tally, rng: random.Random, n: int) -> None:
    """Damaged copies of a checkpoint: each is refused with a sentence, or holds the same bits."""
    home.mkdir()
    source = newest_state(reference)
    wanted, harmed = checkpoint.load(source), home / source.name
    for _ in range(n):
        if source.is_dir():
            shutil.copytree(source, harmed, dirs_exist_ok=True)
        else:
            shutil.copy(source, harmed)
        how = damage(harmed, rng)
        try:
            loaded = checkpoint.load(harmed)
        except UserError:
            tally.add(f"damaged files refused ({how})")
        else:
            if not same(loaded, wanted):
                raise Broken(f"a damaged file ({how}) was loaded as something else: {harmed}")
            tally.add(f"damaged files that held the same bits ({how})")


def full_disk(home: Path, reference: Path, tally: Tally, rng: random.Random) -> None:
    """The disk is full for a while, then not: training goes on, the files there stay good, the end is the same."""
    home.mkdir()
    (home / "out").mkdir()
    size = 9 * size_of(newest_state(reference))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(home / "out")]
    mounted = bool(shutil.which("mount")) and not subprocess.run(mount, capture_output=True).returncode
    training = Training(home, save_interval=3)
    try:
        training.wait_for_lines(30)
        filler = home / "out" / "filler"
        if mounted:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        else:  # no file may grow beyond half a checkpoint
            for pid in training.everyone():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size // 18 // config.processes, resource.RLIM_INFINITY))
        warned = training.wait_for_warning()
        newest(training.out)
        lines = training.lines()
        if not mounted:
            for pid in training.everyone():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        filler.unlink(missing_ok=True)
        if not warned:
            raise Broken(f"no warning of a full disk: {training.last_words()}")
        if not training.wait_for_lines(lines + 5):
            raise Broken(f"training did not go on after a full disk: {training.last_words()}")
        training.finished()
        compare(training.out, reference)
        tally.add(f"full disks ({'a small file system' if mounted else 'a limit on file sizes'})")
    finally:
        training.kill()
        if mounted:
            subprocess.run(["umount", str(home / "out")], check=True)


def unwritable(home: Path, reference: Path, tally: Tally, rng: random.Random) -> None:
    """out_dir is read-only for a while. Root may write anyway, so as root the process gives that right up."""
    home.mkdir()
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            tally.add("skipped: a read-only out_dir, for this is root and there is no setpriv")
            return
        caps = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]  # to read where root keeps Python
        prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *caps)
        os.chown(home, 65534, 65534)
    training = Training(home, prefix=prefix, save_interval=3)
    training.wait_for_lines(30)
    training.out.chmod(0o555)
    warned = training.wait_for_warning()
    newest(training.out)
    training.out.chmod(0o755)
    if not warned:
        raise Broken(f"no warning of an out_dir that cannot be written to: {training.last_words()}")
    training.finished()
    compare(training.out, reference)
    tally.add("out_dirs read-only for a while")


def other_numbers_of_processes(home: Path, reference: Path, tally: Tally, rng: random.Random) -> None:
    """1 -> 2 -> 4 -> 1 processes, killed in between: the same losses within 1e-4, each iteration once. With 'fsdp' also
    from 'ddp' to that and back."""
    home.mkdir()
    if config.processes > 1:  # which rounds differently from the first iteration on, and that grows
        (home / "one").mkdir()
        straight = Training(home / "one", processes=1, parallel="ddp", dataset=home.parent / "data")
        straight.finished()
        reference = straight.out
    for part, processes in enumerate((1, 2, 4, 1)):
        kind = "ddp" if processes == 1 else config.parallel
        training = Training(home, processes=processes, save_interval=5, parallel=kind)
        if part < 3:
            until = (part + 1) * config.iterations // 4
            training.wait_for_lines(until)
            training.kill()
            newest(training.out)
    training.finished()
    ours, wanted = ([x for x in log_of(out) if x["kind"] == "train"] for out in (training.out, reference))
    if [x["iter"] for x in ours] != [x["iter"] for x in wanted]:
        raise Broken(f"{training.out}: log.jsonl does not have each iteration once")
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, wanted, strict=True))
    if worst > 1e-4:
        raise Broken(f"{training.out}: with 1, 2, 4 and 1 processes a loss differs by {worst:.1e}")
    tally.add("runs moved from 1 to 2 to 4 to 1 processes")
    tally.add(f"largest difference of their losses {worst:.0e}")


def main(c) -> None:
    home = Path(c.folder or tempfile.mkdtemp(prefix="torture-")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o755)
    rng, tally, started = random.Random(c.seed), Tally(), time.monotonic()
    text = (ROOT / "data" / "chinese" / "stories_zh.txt").read_text(encoding="utf-8")[:20000]
    (home / "text.txt").write_text(text, encoding="utf-8")
    prepare = [sys.executable, ROOT / "data" / "chinese" / "prepare.py", f"--input={home / 'text.txt'}"]
    subprocess.run([*prepare, f"--dest={home / 'data'}"], check=True, capture_output=True)
    print(f"working in {home}; a run that nothing happens to comes first", flush=True)
    (home / "reference").mkdir()
    straight = Training(home / "reference")
    straight.finished()
    reference = straight.out

    def enough() -> bool:
        return tally.counts["kills"] >= c.kills or time.monotonic() - started > c.minutes * 60

    def attempt(what, name: str, *more) -> None:
        if tally.broken:
            return
        try:
            what(home / name, reference, tally, random.Random(rng.random()), *more)
        except (Broken, UserError, OSError, ValueError) as error:
            tally.broken.append(f"{name}: {type(error).__name__}: {error}")
            print(tally.broken[-1], flush=True)

    def kill_on(first: list, thread: int) -> None:
        for what in first:
            attempt(what, what.__name__)
        for n in range(10**6):
            if enough() or tally.broken:
                return
            attempt(kill_until_done, f"kills-{thread}-{n}", enough)
            print(f"{time.monotonic() - started:4.0f} s: {tally.counts['kills']} kills", flush=True)

    attempt(load_damaged, "damaged", c.damaged)
    with ThreadPoolExecutor(2) as pool:  # two at a time: one waits for its disk while the other computes
        jobs = [pool.submit(kill_on, [full_disk, unwritable, other_numbers_of_processes], 0)]
        jobs.append(pool.submit(kill_on, [], 1))
        for job in jobs:
            job.result()

    print(f"\nin {time.monotonic() - started:.0f} s:")
    for what, n in sorted(tally.counts.items()):
        print(f"{n:6}  {what}")
    if tally.lost:
        mean = sum(tally.lost) / len(tally.lost)
        print(f"iterations lost by a kill: {mean:.1f} on average, {max(tally.lost)} at most")
    print(f"promises broken: {len(tally.broken)}")
    if tally.broken:
        print(f"the files are in {home}")
        sys.exit(1)
    if not c.folder:
        shutil.rmtree(home)


if __name__ == "__main__":
    run(main, config)
