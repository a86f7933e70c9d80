"""The loss curves of one run or of several, as a picture: against steps, against tokens and against training time.

    $ python extras/plot.py out-chinese                          # writes curves.png
    $ python extras/plot.py out-gpt out-muon --dest=both.png

Notable choices:
- Pale is the loss of each logged batch, a line is their mean, and a line with markers is the validation loss. The mean
  looks ahead as far as it looks back, so that it does not lag behind a falling loss as a running one does.
- Time is that of training alone, without evaluations and compiling; a run that still trains is drawn as far as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import Config, UserError, configure, note, run, user_errors

runs = []  # the folders of the runs to draw; also words without a key
dest = "curves.png"  # the picture to write; one that is there is replaced
smooth = 0.02  # how far the training loss is averaged to either side, as a part of the run; 0 for not at all
ymax = 0.0  # the highest loss shown; 0 leaves out what the losses fall from in a run's first tenth
config = configure(globals(), positionals=("runs",))

import io
import os
import warnings
from contextlib import suppress
from typing import Any

import numpy as np

from history import History, thinned

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito 2008
MARKERS = "osD^vP*"  # the next one for every seven runs
FONTS = ["DejaVu Sans"]  # and, for what it has not, the first of these that is there
FONTS += ["Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"]
FONTS += ["Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "SimHei", "DengXian"]
FONTS += ["WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "SimSun", "Arial Unicode MS"]
FONTS += ["Noto Serif CJK SC", "Noto Serif CJK JP", "AR PL UMing CN", "AR PL UKai CN"]
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
STYLE |= {"text.parse_math": False}  # a dollar in a folder's name is a dollar
BATCH = {"linewidth": 0.8, "alpha": 0.3, "zorder": 2}  # no run's batches cover another's lines
MEAN = {"linewidth": 1.2, "alpha": 0.75, "zorder": 3}
VAL = {"linewidth": 1.8, "markersize": 5, "zorder": 4}
LOSSES = ("loss", "val_loss")
UNITS = {  # what a panel's axis says, and the size of its unit
    "step": {"steps": 1},
    "tokens": {"tokens": 1, "thousand tokens": 1e3, "million tokens": 1e6, "billion tokens": 1e9},
    "seconds": {"seconds of training": 1, "minutes of training": 60, "hours of training": 3600},
}


def read(folder: str) -> History:
    """A run's log. UserError where there is none, or no loss in it."""
    if not Path(folder).is_dir():
        what = "is no folder" if Path(folder).exists() else "is not there"
        raise UserError(f"{folder} {what}; expected a run's folder, its out_dir")
    history = History(folder)
    with user_errors(OSError, about=f"{history.path} cannot be read"):
        if not history.path.exists():
            raise UserError(f"{folder} has no log.jsonl, which train.py writes; nanoGPT's own runs have none")
        history.refresh()
    if not any(len(history.curve(name)[0]) for name in LOSSES):
        raise UserError(f"{history.path} has no loss in it yet; wait for the run's first step")
    return history


def short_names(folders: list[Path]) -> list[str]:
    """The end of each path, of as many parts as tell it from the others."""
    names = []
    for folder in folders:
        for n in range(1, len(folder.parts) + 1):
            end = folder.parts[-n:]
            if sum(other.parts[-n:] == end for other in folders) == 1:
                break
        names.append(str(Path(*end)))
    return names


def smoothed(y: np.ndarray, reach: float) -> np.ndarray:
    """The mean around each point with weights exp(-distance / reach), a distance of 1 from a point to the next."""
    if reach <= 0:
        return y
    decay = np.exp(-1 / reach)

    def sums(values: np.ndarray) -> np.ndarray:
        """Of the values so far, the older ones decayed."""
        found, total = np.empty(len(values)), 0.0
        for i, value in enumerate(values):
            found[i] = total = total * decay + value
        return found

    def both_ways(values: np.ndarray) -> np.ndarray:
        return sums(values) + sums(values[::-1])[::-1] - values

    return both_ways(y) / both_ways(np.ones(len(y)))


def limits(histories: list[History], ymax: float) -> tuple[float, float]:
    """The lowest and the highest loss to show.

    A first loss near ln(vocab_size) would squash all the rest, so what is to be seen is what comes after the first
    tenth of a run: every validation loss, and of the batches all but the highest hundredth, which are spikes. UserError
    for a `ymax` below every loss.
    """
    lows, highs = [], []
    for history in histories:
        (train_x, train_y), (val_x, val_y) = history.curve("loss"), history.curve("val_loss")
        from_step = max([*train_x[-1:], *val_x[-1:]]) / 10
        late = train_y[train_x >= from_step]
        highs += [*val_y[val_x >= from_step], *([np.quantile(late, 0.99)] if len(late) else [])]
        lows += [*train_y, *val_y]
    low, high = min(lows), ymax or max(highs)
    if high < low:
        raise UserError(f"ymax={ymax}: expected more than the lowest loss, {low:.4f}")
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high if ymax else high + margin


def unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The largest of the units of which there are two at least, with its size; else the first."""
    return [item for item in units.items() if item[1] == 1 or largest >= 2 * item[1]][-1]


def verdict(history: History) -> str:
    """A run's best validation loss in words."""
    steps, losses = history.curve("val_loss")
    if not len(losses):
        return "not evaluated yet"
    return f"best val loss {losses.min():.4f} at step {steps[losses.argmin()]:,.0f}"


def picture(histories: dict[str, History], smooth: float, ymax: float) -> tuple[bytes, bool]:
    """The PNG of these runs, by name, 1500 pixels wide and 504 high, 24 more for each further line of the legend; and
    whether there was a font for every character."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
    from matplotlib.lines import Line2D

    matplotlib.rcdefaults()  # the same picture whatever the user's own style
    there = set(fontManager.get_font_names())  # to name another one is a warning for each text
    matplotlib.rcParams.update(STYLE | {"font.family": [name for name in FONTS if name in there]})
    labels = [f"{name}: {verdict(history)}" for name, history in histories.items()]
    columns = max(1, min(3, len(labels), 150 // max(map(len, labels))))
    rows = 1 + -(-len(labels) // columns)
    figure = Figure(figsize=(12.5, 3.8 + 0.2 * rows), dpi=120, layout="constrained")
    looks = [(COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i in range(len(histories))]
    panels = figure.subplots(1, 3, sharey=True)
    for ax, against in zip(panels, ("step", "tokens", "seconds"), strict=True):
        ends = [history.curve(name, against)[0][-1:] for history in histories.values() for name in LOSSES]
        name, size = unit(np.concatenate(ends).max(initial=0), UNITS[against])
        for history, (colour, marker) in zip(histories.values(), looks, strict=True):
            draw(ax, history, against, size, smooth, colour, marker)
        ax.set_xlabel(name)
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=against == "step"))
        ax.xaxis.set_major_formatter("{x:,g}")
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_ylim(limits(list(histories.values()), ymax))
    kinds = [Line2D([], [], color="0.35", **style) for style in (BATCH, MEAN, VAL | {"marker": MARKERS[0]})]
    of_runs = [Line2D([], [], color=colour, **VAL, marker=marker) for colour, marker in looks]
    names = ["training, each logged batch", "training, their mean", "validation"]
    chosen = slice(0 if smooth else 1, 3)
    figure.legend(of_runs, labels, loc="outside upper center", ncols=columns, frameon=False)
    figure.legend(kinds[chosen], names[chosen], loc="outside lower center", ncols=3, frameon=False)
    png = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(png, format="png")
    return png.getvalue(), not any("missing from" in str(each.message) for each in caught)


def draw(ax: Any, history: History, against: str, size: float, smooth: float, colour: str, marker: str) -> None:
    """A run's curves, x in units of so many steps, tokens or seconds."""
    x, y = history.curve("loss", against)
    for values, style in [(y, BATCH), (smoothed(y, smooth * len(y)), MEAN)] if smooth else [(y, MEAN)]:
        across, up = thinned(x / size, values, 2000)
        ax.plot(across, up, color=colour, **style, marker=marker if len(up) == 1 else None)
    x, y = history.curve("val_loss", against)
    across, up = thinned(x / size, y, 2000)
    ax.plot(across, up, color=colour, **VAL, marker=marker, markevery=max(1, len(up) // 20))


def write(path: Path, data: bytes) -> None:
    """Puts a file in place whole, its folder too. UserError where the disk refuses."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with user_errors(OSError, about=f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            os.replace(beside, path)
        except BaseException:  # Ctrl-C, too
            with suppress(OSError):
                beside.unlink()
            raise


def main(c: Config) -> None:
    if not c.runs:
        raise UserError("no run to draw: name the runs' folders, such as python extras/plot.py out-chinese")
    if Path(c.dest).suffix.lower() != ".png":
        raise UserError(f"dest={c.dest}: expected the name of a picture that ends in .png")
    if not 0 <= c.smooth <= 0.5:
        raise UserError(f"smooth={c.smooth}: expected a part of the run's length from 0 to 0.5, such as 0.02")
    if not 0 <= c.ymax < float("inf"):
        raise UserError(f"ymax={c.ymax}: expected a loss above 0, or 0 to choose one")
    folders = {Path(folder).resolve(): folder for folder in c.runs}  # one that is named twice is drawn once
    histories = dict(zip(short_names(list(folders)), map(read, folders.values()), strict=True))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("pictures need a package: pip install matplotlib") from None
    png, complete = picture(histories, c.smooth, c.ymax)
    write(Path(c.dest), png)
    if not complete:
        note("note: no font here has all the characters of these names (for Chinese, install Noto Sans CJK)")
    print(f"{c.dest}: " + "; ".join(f"{name}, {verdict(history)}" for name, history in histories.items()))


if __name__ == "__main__":
    run(main, config)
