"""A run's folder while the run lasts: no other run writes to it; its log, and its checkpoints, which are written while
training goes on.

    ckpt.pt, last.pt, last.prev.pt, ckpt-1000.pt, last-1000/   as in checkpoint.py
    log.jsonl    a JSON object a line, one for each logged step, evaluation, epoch and sample
    previous/    what a run started from scratch found here (then previous-2/, and so on)
    last.damaged.pt, last.diverged.pt   a last.pt that could not be resumed, set aside; without .pt, a last-1000/
    .lock        held while a run writes here
"""

import itertools
import json
import math
import os
import pickle
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import torch

import folders
from checkpoint import STATES, keep, numbered, peek, save, states, updates_in, verify
from configurator import UserError, note, user_errors
from device import is_memory_error


def open_out_dir(out_dir: str) -> Path:
    """The run's folder, made if need be. UserError where it cannot be written to."""
    folder = Path(out_dir)
    with user_errors(OSError, about=f"out_dir={out_dir} cannot be made or written to"):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    return folder


def claim_out_dir(folder: Path, resumed_from: Path | None, fresh: bool) -> None:
    """Makes an out_dir's files this run's own. A fresh run keeps what an earlier one left there in previous/."""
    with user_errors(OSError, about=f"out_dir={folder} cannot be made or written to"):
        for pattern in ("last*.pt.tmp", "ckpt*.pt.tmp", "log.jsonl.tmp"):  # of a save that was killed
            for litter in folder.glob(pattern):
                litter.unlink()
        for litter in folder.glob("last-*.tmp"):
            shutil.rmtree(litter, ignore_errors=True)
        done = updates_in(resumed_from) if resumed_from else math.inf
        # what could not be resumed is never to replace the good one before, nor to be resumed in its place
        for state in (folder / "last.pt", *folders.newest_first(folder)) if resumed_from else ():
            refused = resumed_from.name == "ckpt.pt" or updates_in(state) >= done + state.is_dir()
            if state.exists() and state != resumed_from and refused:
                set_aside(state, "damaged")
        old, sharded = numbered(folder), folders.newest_first(folder)
        found = [path for path in (*(folder / n for n in (*STATES, "ckpt.pt", "log.jsonl")), *old) if path.is_file()]
        if (found or sharded) and fresh:
            names = itertools.chain(["previous"], (f"previous-{n}" for n in itertools.count(2)))
            previous = next(folder / name for name in names if not (folder / name).exists())
            previous.mkdir()
            for path in found:
                keep(path, previous / path.name)
            for path in sharded:
                (previous / path.name).mkdir()
                for part in path.iterdir():
                    keep(part, previous / path.name / part.name)
            # The old ckpt.pt and last.pt, or newest folder, stay until this run has its own: out_dir is never without a
            # checkpoint. Other complete states must go, or they could be resumed instead of a younger one of this run.
            for path in (folder / "last.prev.pt", folder / "log.jsonl", *old):
                path.unlink(missing_ok=True)
            for path in sharded[1:]:
                folders.remove(path)
            note(f"note: {folder} holds an earlier run (init_from=resume continues it); it is kept in {previous}")


def set_aside(state: Path, why: str) -> Path:
    """Renames a complete state to last.damaged.pt and the like; the new path."""
    aside = state.with_name(f"last.{why}.pt" if state.is_file() else f"last.{why}")
    if state.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(state, aside)
    return aside


class Background:
    """Saves to a folder that are written while training goes on, one at a time, from a copy in CPU memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer, self.job = ThreadPoolExecutor(1, "checkpoint", _give_way), None
        self.copies: dict[tuple, torch.Tensor] = {}
        self.problem, self.warned_at, self.told_of_memory = "", 0.0, False

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self.job is not None and not self.job.done()

    def copied(self, whole: dict[str, Any], processes: int = 1) -> dict[str, Any] | None:
        """A copy in CPU memory, of which each of so many processes on this machine makes one; None where there is no
        memory for them, and training has to wait for the disk."""
        if self.copies or processes * bytes_in(whole) < memory_left():
            try:
                return copy_to_cpu(whole, self.copies)
            except (MemoryError, RuntimeError) as error:
                if not is_memory_error(error):
                    raise
        self.copies.clear()
        if not self.told_of_memory:
            note("note: there is no memory for a copy of what is saved; training waits for the disk at every save")
            self.told_of_memory = True
        return None

    def report(self, wait: bool = False) -> None:
        """Warns if the save before was refused by the disk; whatever else went wrong in it is raised here."""
        if self.job is None or not (wait or self.job.done()):
            return
        try:
            self.finish()
        except UserError as error:
            if str(error) != self.problem or time.monotonic() - self.warned_at > 60:
                note(f"warning: {error}; training goes on, and the next save tries again")
                self.warned_at = time.monotonic()
            self.problem = str(error)

    def finish(self) -> None:
        """Waits for the save under way. UserError where the newest state is not on the disk."""
        job, self.job = self.job, None
        if job:
            job.result()
            if self.problem:
                note(f"note: saving to {self.folder} works again")
            self.problem = ""
        elif self.problem:
            raise UserError(self.problem)


class RunDir(Background):
    """A run's folder while the run lasts, for no other run to write to: its log, and its checkpoints. Only the first
    process has one."""

    def __init__(
        self, out_dir: str, resumed_from: Path | None, start: int = 0, best_val_loss: float = math.inf,
        fresh: bool = True, run_id: str = "", lock: filelock.BaseFileLock | None = None,
    ):  # fmt: skip
        """For a run from iteration `start` on, whose state and best loss came from the file `resumed_from`, if any.

        `run_id` tells its files from another run's; `lock` is the folder's, where it has been taken before. UserError
        where another run is writing, or the disk refuses.
        """
        super().__init__(open_out_dir(out_dir))
        self.lock = lock or take_lock(self.folder)
        claim_out_dir(self.folder, resumed_from, fresh)
        self.log = Log(self.folder, start)
        self.own = {
            name for name in ("ckpt.pt", "last.pt") if resumed_from and not _is_anothers(self.folder / name, run_id)
        }
        # the loss that ckpt.pt has, which can be ahead of the state that is resumed: only a lower one replaces it
        self.best_val_loss = _best_val_loss(self.folder / "ckpt.pt", best_val_loss) if resumed_from else best_val_loss
        if resumed_from and "ckpt.pt" not in self.own:
            self.best_val_loss = math.inf
        self.earlier = folders.newest_first(self.folder) if fresh else []  # another run's, until this one has a state
        self.numbered_kept = 0  # so many numbered folders stay besides the newest two; 0 for all there are

    def save(
        self, state: dict[str, Any], more: dict[str, Any], val_loss: float | None = None, *, always: bool = False,
        numbered_kept: int = 0, wait: bool = False,
    ) -> bool:  # fmt: skip
        """Writes last.pt, of `state` and what resuming needs `more`, after the save under way.

        With a `val_loss` below that of ckpt.pt, or `always`, ckpt.pt is written too, of `state` alone; True says so.
        `numbered_kept` makes last.pt a numbered checkpoint as well and keeps so many. Returns once everything is copied
        to CPU memory, if there is room; with `wait`, once it is on the disk. A disk that refuses is a warning, with
        `wait` a UserError.
        """
        self.report(wait=True)
        best = self.is_best(val_loss, always)
        whole = state | more
        copied = not wait and self.copied(whole)
        whole = copied or whole
        ckpt = {k: whole[k] for k in state} | {"best_val_loss": min(val_loss, self.best_val_loss)} if best else None
        self.job = self.writer.submit(self._write, whole, ckpt, numbered_kept)
        if wait:
            self.finish()
        elif not copied:
            self.report(wait=True)
        return best

    def is_best(self, val_loss: float | None, always: bool) -> bool:
        """Whether ckpt.pt is to be written after an evaluation that found `val_loss`."""
        return val_loss is not None and (always or val_loss < self.best_val_loss)

    def _write(self, whole: dict[str, Any], ckpt: dict[str, Any] | None, numbered_kept: int) -> None:
        self.log.sync()  # a state must not be ahead of the log: resuming writes no line that is before it
        last = self.folder / "last.pt"
        two = "last.pt" in self.own and last.is_file()
        newer = any(folders.updates(folder) > updates_in(last) for folder in folders.newest_first(self.folder))

        def save_last() -> None:
            save(last, whole, self.folder / "last.prev.pt" if two else None)
            self.own.add("last.pt")

        # ckpt.pt first, for a state that has counted an evaluation must not be ahead of its ckpt.pt; but last while
        # last.pt is still an earlier run's, which would be resumed if this one ended between the two
        if two or not last.is_file():
            self.save_best(ckpt), save_last()
        else:
            save_last(), self.save_best(ckpt)
        with user_errors(OSError, about=f"{self.folder} cannot be written to"):
            self.leave_earlier()
            if two and not newer:  # whole states of this run, after which those of its sharded part are not needed
                self.remove_folders(0)
            if numbered_kept:
                new = self.folder / f"ckpt-{whole['iter_num']}.pt"
                keep(last, new)
                older = numbered(self.folder)
                for path in older[older.index(new) + numbered_kept :]:
                    path.unlink()

    def save_best(self, ckpt: dict[str, Any] | None) -> None:
        """Writes ckpt.pt, if there is anything to write."""
        if ckpt:
            save(self.folder / "ckpt.pt", ckpt)
            self.best_val_loss = ckpt["best_val_loss"]
            self.own.add("ckpt.pt")

    @property
    def has_folder(self) -> bool:
        """Whether there is a checkpoint folder of this run."""
        return any(path not in self.earlier for path in folders.newest_first(self.folder))

    def leave_earlier(self) -> None:
        """Takes away what is an earlier run's, kept in previous/: a ckpt.pt, which would speak in this one's name, and
        folders, which would be resumed in its place."""
        if "ckpt.pt" not in self.own:
            (self.folder / "ckpt.pt").unlink(missing_ok=True)
        while self.earlier:
            folders.remove(self.earlier.pop())

    def take_folder(self, temporary: Path, name: str, ckpt: dict[str, Any] | None = None) -> None:
        """Gives a checkpoint folder that is whole its name, writes ckpt.pt if there is anything to write, and takes
        away states that are no longer needed."""
        self.earlier = [path for path in self.earlier if path.name != name]  # which is replaced
        folders.take_name(temporary, self.folder / name)
        if "last.pt" not in self.own:  # an earlier run's, which might be resumed instead
            for state in STATES:
                (self.folder / state).unlink(missing_ok=True)
        self.save_best(ckpt)
        self.leave_earlier()
        self.remove_folders(2)
        newest = folders.newest_first(self.folder)
        for state in STATES if len(newest) > 1 else ():
            path = self.folder / state
            if path.is_file() and not folders.updates(newest[1]) <= updates_in(path) < math.inf:
                path.unlink()

    def remove_folders(self, kept: int) -> None:
        """Removes checkpoint folders but the `kept` newest, and those that stay as numbered ones."""
        found = folders.newest_first(self.folder)
        stay = [folder for folder in found if folders.is_numbered(folder)]
        stay = stay[: self.numbered_kept or len(stay)]
        for folder in found[kept:]:
            if folder not in stay:
                folders.remove(folder)

    def let_go(self) -> None:
        """Lets other runs in, once the save under way is done."""
        self.writer.shutdown()
        self.log.file.close()
        self.lock.release()

    def close(self) -> None:
        """Waits for the save under way and lets other runs in. UserError where the newest state is not on the disk."""
        try:
            self.finish()
        finally:
            self.let_go()

    def set_aside(self, iteration: int) -> None:
        """Renames last.pt, and what else holds the state of this iteration, from which training diverges at once; not
        the only state there is."""
        self.report(wait=True)
        bad = [path for path in states(self.folder) if updates_in(path) == iteration]
        if bad and len(bad) < len(states(self.folder)):
            try:
                for path in bad:
                    aside = set_aside(path, "diverged")
                note(f"note: the state of iteration {iteration} is set aside as {aside}")
            except OSError as error:
                note(f"warning: {bad[0]}, from which training diverges, could not be set aside: {error}")


def _give_way() -> None:
    """Lets the computing threads go before this one, which halves what a save costs two busy cores."""
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def take_lock(folder: Path) -> filelock.BaseFileLock:
    """The lock of a run's folder, held until it is released or the process ends. UserError where another has it."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=5)  # a run that was told to stop may still be ending
    except filelock.Timeout:
        raise UserError(
            f"out_dir={folder} is in use: another run that has not ended writes there; choose another out_dir"
        ) from None
    except (NotImplementedError, OSError) as error:
        note(f"note: {folder} cannot be locked against other runs ({error}); see that none writes there")
    return lock


def _is_anothers(path: Path, run_id: str) -> bool:
    """Whether a checkpoint is known to be another run's."""
    try:
        return peek(path)["config"].get("run_id") not in (None, run_id)
    except Exception:  # missing or damaged, which can raise nearly anything
        return False


def _best_val_loss(path: Path, default: float) -> float:
    """The loss below which a resumed run replaces ckpt.pt: that of the file; infinite where it is damaged."""
    if not path.is_file():
        return default
    try:
        verify(path)
        return float(peek(path)["best_val_loss"])
    except (UserError, pickle.UnpicklingError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        note(f"warning: {path} cannot be read and will be replaced at the next evaluation ({reason})")
        return math.inf


def bytes_in(state: dict[str, Any]) -> int:
    """The memory of a nested dictionary's tensors, in bytes; what tensors share is counted once."""
    tensors: dict[tuple, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, dict):
            for each in value.values():
                count(each)
        elif isinstance(value, torch.Tensor):
            tensors[value.data_ptr(), value.shape] = value.nbytes

    count(state)
    return sum(tensors.values())


def memory_left() -> float:
    """Bytes that new allocations can have before the system swaps or kills; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def copy_to_cpu(state: dict[str, Any], copies: dict[tuple, torch.Tensor]) -> dict[str, Any]:
    """A nested dictionary with its tensors copied to CPU memory; tensors that share memory (tied weights) still do.

    The memory is held in `copies` and used again: new pages cost fifteen times the copy.
    """
    seen: dict[tuple, torch.Tensor] = {}

    def copied(value: Any, place: tuple) -> Any:
        if isinstance(value, dict):
            return {k: copied(v, (*place, k)) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        identity = value.data_ptr(), value.shape, value.dtype
        if identity not in seen:
            copy = copies.get(place)
            if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
                copy = copies[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            seen[identity] = copy.copy_(value.detach(), non_blocking=value.is_cuda)
        return seen[identity]

    copy = copied(state, ())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copy


class Log:
    """log.jsonl: write(kind=..., iter=..., ...) appends a line. Opened for a run that resumes at iteration `start`, it
    drops the lines of `start` and later, which will be written again."""

    def __init__(self, folder: Path, start: int):
        path = folder / "log.jsonl"
        with user_errors(OSError, about=f"{path} cannot be written"):
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                temporary = path.with_name("log.jsonl.tmp")
                with open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line in lines if _iteration(line) < start)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            self.path, self.file = path, open(path, "ab", buffering=0)
        self.lock, self.unwritten, self.problem = threading.Lock(), b"", ""

    def write(self, **record: Any) -> None:
        """Lines that the disk refuses are kept and written before the next one."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.lock:
            self.unwritten += (json.dumps(finite, ensure_ascii=False) + "\n").encode()
            try:
                self._flush()
                self.problem = ""
            except OSError as error:
                if str(error) != self.problem:
                    note(f"warning: {self.path} cannot be written ({error}); training goes on, and its lines are kept")
                self.problem = str(error)

    def sync(self) -> None:
        """Puts every line so far on the disk. UserError where it refuses."""
        with user_errors(OSError, about=f"{self.path} cannot be written"):
            with self.lock:
                if not (self.path.exists() and os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))):
                    self.file = open(self.path, "ab", buffering=0)
                    note(f"warning: {self.path} is no longer there (deleted, moved, unmounted?); a new one begins")
                self._flush()
            os.fsync(self.file.fileno())

    def _flush(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]


def _iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iter"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return math.inf
