"""extras/plot.py on real runs of train.py, the colours looked for in the picture, and on every mistake it tells."""

import io
import json
import math
import os

import numpy as np
import pytest
from conftest import TINY_ARGS, run_script

from configurator import UserError
from extras import plot

pytest.importorskip("matplotlib")
from matplotlib.font_manager import fontManager
from matplotlib.image import imread

CHINESE_FONT = any(name in plot.FONTS[1:] for name in fontManager.get_font_names())


@pytest.fixture(scope="module")
def real(stories, tmp_path_factory):
    """A folder with two runs of ten iterations, one under a Chinese name."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("微故事", "1e-2"), ("out-b", "1e-3")):
        args = [f"--dataset={stories}", "--max_iters=10", "--eval_interval=4", f"--learning_rate={rate}"]
        done = run_script("train.py", *TINY_ARGS, *args, f"--out_dir={name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def a_run(folder, losses, val_losses, ms=100.0, tokens=200):
    """A log with a train record for each iteration, and evaluations {iter: loss}; the folder."""
    records = [{"kind": "eval", "iter": i, "train_loss": loss, "val_loss": loss} for i, loss in val_losses.items()]
    speed = {"ms": ms, "tokens_per_second": tokens / ms * 1000}
    records += [{"kind": "train", "iter": i, "loss": loss, **speed} for i, loss in enumerate(losses)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join([*map(json.dumps, records), ""]), encoding="utf-8")
    return folder


def pixels(picture) -> np.ndarray:
    """RGB from 0 to 255, [height, width, 3]."""
    return np.round(imread(picture)[..., :3] * 255).astype(int)


def has_colour(image, colour) -> int:
    """How many pixels have exactly the colour '#rrggbb'."""
    return int((image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())


def drawn(histories, monkeypatch, smooth=0.02, ymax=0.0):
    """The matplotlib Figure that picture() makes of runs by name, and its image."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    png, complete = plot.picture(histories, smooth, ymax)
    assert complete
    return figures[0], pixels(io.BytesIO(png))


def read_runs(**folders):
    return {name: plot.read(str(folder)) for name, folder in folders.items()}


def test_two_real_runs(real, tmp_path):
    dest = tmp_path / "new" / "两条曲线.png"
    done = run_script("extras/plot.py", "微故事", "out-b", f"--dest={dest}", cwd=real)
    assert done.returncode == 0, done.stderr
    expected = []
    for name in ("微故事", "out-b"):
        lines = [json.loads(line) for line in (real / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        best = min((line for line in lines if line["kind"] == "eval"), key=lambda line: line["val_loss"])
        expected.append(f"{name}, best val loss {best['val_loss']:.4f} at step {best['iter']}")
    assert done.stdout == f"{dest}: {'; '.join(expected)}\n"
    told = [line for line in done.stderr.splitlines() if not line.startswith("overriding: ")]
    assert told == [] or not CHINESE_FONT and len(told) == 1 and told[0].startswith("note: no font"), told
    assert os.listdir(dest.parent) == [dest.name]
    assert dest.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = pixels(dest)
    assert image.shape == (504, 1500, 3)
    for panel in np.array_split(image[50:400], 3, axis=1):
        assert has_colour(panel, plot.COLOURS[0]) > 50 and has_colour(panel, plot.COLOURS[1]) > 50
        assert has_colour(panel, plot.COLOURS[2]) == 0 and has_colour(panel, "#ffffff") > 10_000


def test_default_dest_replaces_the_picture_before(real, tmp_path):
    (tmp_path / "curves.png").write_bytes(b"old")
    done = run_script("extras/plot.py", real / "out-b", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("curves.png: out-b, best val loss ")
    assert os.listdir(tmp_path) == ["curves.png"]
    image = pixels(tmp_path / "curves.png")
    assert has_colour(image, plot.COLOURS[0]) and not has_colour(image, plot.COLOURS[1])


def test_what_the_lines_are(tmp_path, monkeypatch):
    """x in the units that the axes name, y the logged losses, thin for batches and with markers for evaluations."""
    run = a_run(tmp_path / "a", [5.0, 4, 3, 2], {0: 5.0, 2: 2.5, 4: 3.5}, ms=45e3, tokens=2_000_000)
    figure, _ = drawn(read_runs(a=run), monkeypatch, smooth=0)
    labels = ["steps", "million tokens", "minutes of training"]
    for ax, label, scale in zip(figure.axes, labels, [1, 2, 0.75], strict=True):
        assert ax.get_xlabel() == label
        train, val = ax.lines
        assert train.get_xdata() == pytest.approx(scale * np.arange(4)) and list(train.get_ydata()) == [5, 4, 3, 2]
        assert val.get_xdata() == pytest.approx([0, 2 * scale, 4 * scale]) and list(val.get_ydata()) == [5, 2.5, 3.5]
        assert val.get_marker() == "o" and train.get_marker() == "None"
        assert train.get_color() == val.get_color() == plot.COLOURS[0]
    runs, kinds = figure.legends
    assert [text.get_text() for text in runs.get_texts()] == ["a: best val loss 2.5000 at step 2"]
    assert [text.get_text() for text in kinds.get_texts()] == ["training, their mean", "validation"]
    figure, _ = drawn(read_runs(a=run), monkeypatch, smooth=0.5)
    batches, mean, _ = figure.axes[0].lines
    assert list(batches.get_ydata()) == [5, 4, 3, 2] and batches.get_alpha() < mean.get_alpha()
    assert list(mean.get_ydata()) == pytest.approx(plot.smoothed(np.array([5.0, 4, 3, 2]), 2.0))
    assert len(figure.legends[1].get_texts()) == 3


def test_the_mean_by_the_formula():
    y = np.random.default_rng(0).normal(size=50)
    distance = np.abs(np.arange(50)[:, None] - np.arange(50))
    weights = np.exp(-distance / 3.0)
    assert plot.smoothed(y, 3.0) == pytest.approx(weights @ y / weights.sum(1))
    assert np.array_equal(plot.smoothed(y, 0.0), y) and len(plot.smoothed(y[:0], 1.0)) == 0


def test_units():
    for largest, name in ((0, "tokens"), (1999, "tokens"), (2000, "thousand tokens"), (3e10, "billion tokens")):
        assert plot.unit(largest, plot.UNITS["tokens"])[0] == name
    for largest, name in ((119, "seconds"), (120, "minutes"), (7199, "minutes"), (7200, "hours"), (1e7, "hours")):
        assert plot.unit(largest, plot.UNITS["seconds"]) == (
            f"{name} of training",
            plot.UNITS["seconds"][f"{name} of training"],
        )
    assert plot.unit(1e9, plot.UNITS["step"]) == ("steps", 1)


def test_first_losses_and_spikes_do_not_squash_the_rest(tmp_path):
    losses = [11 - 8 * min(1, i / 100) + 0.01 * (i % 2) for i in range(1000)]  # 11 to 3 in 100 steps
    losses[500] = 40.0
    run = a_run(tmp_path / "a", losses, {0: 11.0, 500: 3.2, 1000: 3.5})
    low, high = plot.limits([plot.read(str(run))], 0.0)
    assert 2.9 < low < 3 and 3.5 < high < 3.6
    assert plot.limits([plot.read(str(run))], 5.0)[1] == 5.0
    short = a_run(tmp_path / "b", [11.0, 10.0], {0: 11.0})  # all of a run that has just begun is to be seen
    assert plot.limits([plot.read(str(run)), plot.read(str(short))], 0.0)[1] > 9.9
    with pytest.raises(UserError, match="ymax=1.0: expected more than the lowest loss, 3.0000"):
        plot.limits([plot.read(str(run))], 1.0)


def test_runs_that_have_hardly_begun(tmp_path, monkeypatch):
    """One point, or no evaluation, or evaluations alone: the point is seen, and nothing raises."""
    one = a_run(tmp_path / "one", [4.0], {})
    figure, image = drawn(read_runs(one=one), monkeypatch)
    assert figure.legends[0].get_texts()[0].get_text() == "one: not evaluated yet"
    assert all(has_colour(panel, "#ffffff") < panel[..., 0].size for panel in np.array_split(image[50:400], 3, axis=1))
    assert figure.axes[0].lines[1].get_marker() == "o"
    only = a_run(tmp_path / "only", [], {5: 4.0, 10: 3.0})
    figure, _ = drawn(read_runs(only=only), monkeypatch)
    assert list(figure.axes[0].lines[2].get_ydata()) == [4, 3] and not len(figure.axes[1].lines[2].get_ydata())
    drawn(read_runs(one=one, only=only), monkeypatch)


def test_names_that_matplotlib_would_read_otherwise(tmp_path, monkeypatch):
    names = ["_hidden", "a$b_{c$", "{x} %s \\alpha"]
    figure, _ = drawn(
        {n: plot.read(str(a_run(tmp_path / str(i), [3.0, 2.0], {0: 3.0}))) for i, n in enumerate(names)}, monkeypatch
    )
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        f"{n}: best val loss 3.0000 at step 0" for n in names
    ]


def test_the_same_name_in_two_places_and_a_run_named_twice(tmp_path):
    for parent in ("甲", "乙"):
        a_run(tmp_path / parent / "out", [3.0, 2.0], {0: 3.0})
    done = run_script("extras/plot.py", "甲/out", "乙/out", tmp_path / "甲" / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [part.partition(",")[0] for part in done.stdout.removeprefix("curves.png: ").split("; ")]
    assert names == [os.path.join("甲", "out"), os.path.join("乙", "out")]
    image = pixels(tmp_path / "curves.png")
    assert has_colour(image, plot.COLOURS[1]) and not has_colour(image, plot.COLOURS[2])


def test_short_names():
    paths = [plot.Path(p) for p in ("/x/a/out", "/y/a/out", "/x/b/out", "/x/a/other", "/out")]
    assert plot.short_names(paths) == [str(plot.Path(p)) for p in ("x/a/out", "y/a/out", "b/out", "other", "/out")]


def test_many_runs_are_told_apart(tmp_path, monkeypatch):
    runs = {
        f"run {i}": plot.read(str(a_run(tmp_path / str(i), [3.0, 2.0 + i], {0: 3.0, 2: 2.0 + i}))) for i in range(16)
    }
    figure, image = drawn(runs, monkeypatch)
    looks = [(handle.get_color(), handle.get_marker()) for handle in figure.legends[0].get_lines()]
    assert len(set(looks)) == 16 and looks == [
        (line.get_color(), line.get_marker()) for line in figure.axes[2].lines[2::3]
    ]
    assert image.shape == (504 + 5 * 24, 1500, 3)  # six lines of three in place of one


@pytest.mark.skipif(not CHINESE_FONT, reason="no Chinese font")
def test_chinese_has_glyphs_and_what_has_none_gets_one_note(tmp_path):
    a_run(tmp_path / "微故事", [3.0, 2.0], {0: 3.0})
    a_run(tmp_path / "\U0010fffd\U0010fffc", [3.0, 2.0], {0: 3.0})
    histories = {"微故事": plot.read(str(tmp_path / "微故事"))}
    assert plot.picture(histories, 0.0, 0.0)[1] is True
    other = {"微故亊": histories["微故事"]}  # boxes would be the same boxes
    assert plot.picture(histories, 0.0, 0.0)[0] != plot.picture(other, 0.0, 0.0)[0]
    done = run_script("extras/plot.py", "\U0010fffd\U0010fffc", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count("\n") == 2 and "note: no font here has all" in done.stderr


def test_mistakes(tmp_path):
    good = str(a_run(tmp_path / "good", [3.0, 2.0], {0: 3.0}))
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "ckpt.pt").write_bytes(b"")
    a_run(tmp_path / "empty", [], {})
    a_run(tmp_path / "null", [math.nan], {})
    (tmp_path / "odd" / "log.jsonl").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    cases = {
        (): "no run to draw: name the runs' folders",
        ("missing",): "missing is not there; expected a run's folder",
        (good, "missing"): "missing is not there",
        ("good/log.jsonl",): "good/log.jsonl is no folder; expected a run's folder",
        ("nano",): "nano has no log.jsonl, which train.py writes; nanoGPT's own runs have none",
        ("empty",): f"{os.path.join('empty', 'log.jsonl')} has no loss in it yet",
        ("null",): f"{os.path.join('null', 'log.jsonl')} has no loss in it yet",
        ("odd",): f"{os.path.join('odd', 'log.jsonl')} cannot be read: ",
        (good, "--dest=curves.pdf"): "dest=curves.pdf: expected the name of a picture that ends in .png",
        (good, "--dest="): "dest=: expected the name of a picture",
        (good, "--dest=folder.png"): "folder.png cannot be written: ",
        (good, "--dest=file/curves.png"): f"{os.path.join('file', 'curves.png')} cannot be written: ",
        (good, "--smooth=0.9"): "smooth=0.9: expected a part of the run's length from 0 to 0.5",
        (good, "--smooth=-1"): "smooth=-1.0: expected",
        (good, "--ymax=-1"): "ymax=-1.0: expected a loss above 0",
        (good, "--ymax=1"): "ymax=1.0: expected more than the lowest loss, 2.0000",
        (good, "--log_y"): "unknown key --log_y",
    }
    before = sorted(os.listdir(tmp_path))
    for args, sentence in cases.items():
        done = run_script("extras/plot.py", *args, cwd=tmp_path)
        told = done.stderr.splitlines()
        assert done.returncode == 2 and done.stdout == "", (args, done.stderr)
        assert told[-1].startswith(f"plot.py: {sentence}"), (args, told)
        assert all(line.startswith("overriding: ") for line in told[:-1]), told
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "folder.png") == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_takes_no_file(tmp_path):
    a_run(tmp_path / "good", [3.0, 2.0], {0: 3.0})
    (tmp_path / "shut").mkdir(mode=0o500)
    done = run_script("extras/plot.py", "good", "--dest=shut/curves.png", cwd=tmp_path)
    assert done.returncode == 2 and "shut/curves.png cannot be written: Permission denied" in done.stderr


def test_without_matplotlib(tmp_path):
    a_run(tmp_path / "good", [3.0, 2.0], {0: 3.0})
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "matplotlib.py").write_text(
        "raise ImportError('no module named matplotlib')", encoding="utf-8"
    )
    done = run_script("extras/plot.py", "good", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "none")})
    assert done.returncode == 2 and not (tmp_path / "curves.png").exists()
    assert done.stderr.splitlines()[-1] == "plot.py: pictures need a package: pip install matplotlib"


def test_help_names_every_key(tmp_path):
    done = run_script("extras/plot.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and all(f"--{key}=" in done.stdout for key in ("runs", "dest", "smooth", "ymax"))
