"""What a run's log.jsonl tells, read while the run may still be writing it: History(out_dir), refresh() now and then,
and curve("val_loss", against="tokens"). Imports neither torch nor matplotlib."""

import json
import math
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REMEMBERED = 1024  # bytes before the place read to, by which a file is known again


class Sample(NamedTuple):
    """What the model made of a prompt after `iter` updates; the text begins with the prompt."""

    iter: int
    prompt: str
    text: str


class History:
    """A run's curves and samples, as far as they have been read; `samples` has the newest last.

    It is for one thread at a time. Nothing is read before the first refresh().
    """

    def __init__(self, out_dir: str | Path):
        self.path = Path(out_dir) / "log.jsonl"
        self._forget()

    def _forget(self) -> None:
        self.offset, self.before = 0, b""  # the lines read end here, and with these bytes
        self.samples: list[Sample] = []
        self.points: dict[str, tuple[array, array]] = {}  # by name: the updates done, and the value
        # sums over the run's first so many updates, one entry for each train record
        self.sums = {"step": array("d", [0]), "tokens": array("d", [0]), "seconds": array("d", [0])}

    def refresh(self) -> bool:
        """Reads what was written since the last call; True if there is anything new, or all is gone.

        A torn last line waits for its end; a line that is no record is skipped. A resumed run puts a shorter file in
        place of its log, and a new run begins another: then all is read again. It is known by the bytes before the
        place read to, for a new file may be the longer one already, and a file system may give it the old one's inode.
        OSError where the file is there and cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset - len(self.before))
                replaced = file.read(len(self.before)) != self.before
                if replaced:
                    file.seek(0)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            replaced, data = self.offset > 0, b""
        if replaced:
            self._forget()
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.before = (self.before + whole[-REMEMBERED:])[-REMEMBERED:]
        added = [self._add(line) for line in whole.split(b"\n")]
        return replaced or any(added)

    def _add(self, line: bytes) -> bool:
        """Takes a line; False for one that tells nothing."""
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
            kind, updates = record["kind"], int(float(record["iter"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return False
        if kind == "sample":
            prompt, text = record.get("prompt"), record.get("text")
            if isinstance(prompt, str) and isinstance(text, str):
                self.samples.append(Sample(updates, prompt, text))
        elif kind in ("train", "eval"):
            figures = {name: value for name, value in flat(record) if name != "iter"}
            for name, value in figures.items():
                steps, values = self.points.setdefault(name, (array("d"), array("d")))
                while steps and steps[-1] >= updates:  # two logs joined by hand: the later one counts
                    steps.pop(), values.pop()
                steps.append(updates), values.append(value)
            if kind == "train" and {"ms", "tokens_per_second"} <= figures.keys():
                self._count(updates + 1, figures["ms"] / 1000, figures["tokens_per_second"])
        return True

    def _count(self, updates: int, seconds: float, tokens_per_second: float) -> None:
        """Adds the iterations since the train record before, each of so many seconds, to the sums."""
        steps, tokens, clock = self.sums.values()
        while len(steps) > 1 and steps[-1] >= updates:
            steps.pop(), tokens.pop(), clock.pop()
        since = updates - steps[-1]
        steps.append(updates)
        tokens.append(tokens[-1] + since * round(tokens_per_second * seconds))
        clock.append(clock[-1] + since * seconds)

    def after(self, updates: Any, what: str) -> np.ndarray:
        """The 'tokens' read in the run's first so many updates, or the 'seconds' of training that they took; for
        'step', their number itself. NaN where no train record tells. `updates` is a number, or an array of them.

        The log has them only as means: an iteration's seconds are ms / 1000, its tokens tokens_per_second * ms / 1000.
        Record i, written when i + 1 updates are done, stands for all iterations since the record before it, though its
        ms may leave some out: those before an evaluation, or before a run was resumed. Between records lies a line;
        after the last one, it goes on. Tokens so are exact unless a resumed run has another batch size; seconds are
        close to those of the record 'end', which is measured.
        """
        updates = np.asarray(updates, dtype=float)
        if what == "step":
            return updates
        steps, sums = np.array(self.sums["step"]), np.array(self.sums[what])
        slope = (sums[-1] - sums[-2]) / (steps[-1] - steps[-2]) if len(steps) > 1 else math.nan
        beyond = updates - steps[-1]
        return np.where(beyond > 0, sums[-1] + beyond * slope, np.interp(updates, steps, sums))

    def curve(self, name: str, against: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of a figure of the train records ('loss', 'lr', 'grad_norm', 'tokens_per_second', ...) or of the
        evaluations ('train_loss', 'val_loss', 'datasets/NAME/val_loss', ...), both float64 [points], x increasing.

        x is in steps, 'tokens' or 'seconds' of training. Iteration i is at the i updates before it, as an evaluation
        is: its loss is that of these weights, on tokens that they have not been trained on. What is null in the log,
        being no finite number, is left out. A name that the log does not have gives no points.
        """
        steps, values = self.points.get(name, (array("d"), array("d")))
        x, y = self.after(np.array(steps), against), np.array(values)
        return x[np.isfinite(x)], y[np.isfinite(x)]


def flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """A record's finite numbers by name, those of a record inside it as 'outer/inner', the names of wandb."""
    found = []
    for key, value in record.items():
        if type(value) is dict:
            found += flat(value, f"{prefix}{key}/")
        elif type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 1 << 63:
            found.append((prefix + key, float(value)))
    return found


def thinned(x: np.ndarray, y: np.ndarray, most: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` (2 or more) of the points: the first, the last, and the lowest and the highest of each of as many
    stretches as there is room for, so that spikes stay."""
    if len(x) <= most:
        return x, y
    stretches = np.array_split(np.arange(1, len(x) - 1), (most - 2) // 2) if most >= 4 else []
    extremes = {int(s[pick(y[s])]) for s in stretches for pick in (np.argmin, np.argmax)}
    kept = np.array(sorted({0, len(x) - 1} | extremes))
    return x[kept], y[kept]
