"""What a dataset's writer leaves in its folder, whatever ends it: the old files, whole, or the new ones, whole."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from configurator import UserError
from loader import dataset_folder, open_split
from tokenizer import FILES, CharTokenizer, load_tokenizer, read_meta
from writing import DatasetWriter

PREPARE = ROOT / "data" / "chinese" / "prepare.py"


def prepare(dest: Path, text: Path, *words: str) -> subprocess.CompletedProcess:
    done = run_script("data/chinese/prepare.py", f"--input={text}", f"--dest={dest}", *words, cwd=dest.parent)
    assert done.returncode == 0, done.stderr
    return done


def folder_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


AB = CharTokenizer("ab", byte_fallback=False, end_of_text=False)
COUNTS = {"documents": [1, 0], "characters": [3, 1], "distinct": 2, "unknown": 0}


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError(28, "No space left on device")])
def test_what_interrupts_the_writer_leaves_the_old_files(tmp_path, error):
    (tmp_path / "train.bin").write_bytes(b"old")
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        with DatasetWriter(tmp_path, AB) as writer:
            writer.write("train", AB.encode("ab"), "ab")
            raise error
    assert folder_of(tmp_path) == {"train.bin": b"old"}


@pytest.mark.parametrize("said, val", [("ba", "a"), ("ab", "")])
def test_a_wrong_or_an_empty_file_replaces_nothing(tmp_path, said, val):
    (tmp_path / "train.bin").write_bytes(b"old")
    with pytest.raises(UserError, match="round trip" if val else "val.bin"):
        with DatasetWriter(tmp_path, AB) as writer:
            writer.write("train", AB.encode("ab"), said)
            writer.write("val", AB.encode(val), val)
            writer.finish(**COUNTS)
    assert folder_of(tmp_path) == {"train.bin": b"old"}


def test_what_a_killed_run_left_is_overwritten(tmp_path):
    for name in ("train.bin.tmp", "val.bin.tmp", "meta.json.tmp"):
        (tmp_path / name).write_bytes(b"left by a run that was killed")
    (tmp_path / "t.txt").write_text("ab" * 10)
    prepare(tmp_path, tmp_path / "t.txt")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == [
        "meta.json",
        "t.txt",
        "train.bin",
        "val.bin",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX's")
def test_full_disk(tmp_path):
    (tmp_path / "t.txt").write_text("ab" * 10**6)
    dest = tmp_path / "out"
    prepare(dest, ROOT / "data" / "chinese" / "stories_zh.txt")
    before = folder_of(dest)
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(PREPARE), f"--input={tmp_path / 't.txt'}", f"--dest={dest}"]
    done = subprocess.run(command, capture_output=True)
    sentence = done.stderr.decode().strip().splitlines()[-1]
    assert done.returncode == 2 and str(dest) in sentence and "File too large" in sentence
    assert folder_of(dest) == before


def as_read(folder: Path) -> dict[str, str]:
    """A dataset as training reads it, by what tells one from another; checks that its parts belong together."""
    found = dataset_folder(str(folder))
    meta, tokenizer, sums = read_meta(found), load_tokenizer(found), {}
    for split in ("train", "val"):
        data = open_split(found, split, 8).ids.tobytes()
        sums[split] = hashlib.sha256(data).hexdigest()
        assert meta["files"][f"{split}.bin"] == {"bytes": len(data), "sha256": sums[split], "tokens": len(data) // 2}
    return sums | {"tokenizer": hashlib.sha256(repr(tokenizer.meta()).encode()).hexdigest()}


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    """Two texts whose datasets differ in every file."""
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, text in zip(paths, ("却说刘姥姥进了大观园。\n" * 30000, "天地玄黄，宇宙洪荒。\n" * 40000), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_fifty_times(tmp_path, texts):
    undisturbed = []
    for number, text in enumerate(texts):
        begin = time.perf_counter()
        prepare(tmp_path / str(number), text)
        seconds = time.perf_counter() - begin
        undisturbed.append(as_read(tmp_path / str(number)))
    dest, rng, seen = tmp_path / "dest", random.Random(0), []
    prepare(dest, texts[0])
    for number in range(50):
        command = [sys.executable, str(PREPARE), f"--input={texts[(number + 1) % 2]}", f"--dest={dest}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.1) * seconds)
        process.kill()
        process.wait()
        seen.append(undisturbed.index(as_read(dest)))
    assert set(seen) == {0, 1}  # some runs were killed before the end, some after it
    for text, expected in zip(texts, undisturbed, strict=True):
        prepare(dest, text)
        assert as_read(dest) == expected
        assert {p.name for p in dest.iterdir()} == {".lock", "meta.json", "train.bin", "val.bin"}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_killed_between_any_two_renames(tmp_path, texts, tokenizer):
    """A process that is killed before its n-th rename, for every n: before the commit it is the old dataset, then the
    new one; and a folder that had none has none, or a whole one."""
    words = [f"--tokenizer={tokenizer}", "--vocab_size=300"]
    old, new = tmp_path / "old", tmp_path / "new"
    prepare(old, texts[0])
    prepare(new, texts[1], *words)
    code = (
        "import os, runpy, sys; left = int(sys.argv.pop(1)); sys.argv = sys.argv[1:]; rename = os.replace\n"
        "def replace(*names):\n"
        "    global left\n"
        "    left -= 1\n"
        "    return rename(*names) if left >= 0 else os.kill(os.getpid(), 9)\n"
        "os.replace = replace\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    own = 1 if tokenizer == "char" else 2  # files besides the .bin ones
    commit, renames, outcomes = 2 + own, 2 + own + len(FILES), []
    for before in range(renames + 1):
        for first in (False, True) if tokenizer == "char" else (False,):
            dest = tmp_path / f"{before}-{first}"
            if not first:
                prepare(dest, texts[0])
            command = [sys.executable, "-c", code, str(before), str(PREPARE), f"--input={texts[1]}", f"--dest={dest}"]
            done = subprocess.run([*command, *words], capture_output=True)
            assert done.returncode == (-signal.SIGKILL if before < renames else 0), done.stderr
            if first and before < commit:
                with pytest.raises(UserError, match="is not there"):
                    dataset_folder(str(dest))
            else:
                outcomes.append((before, as_read(dest) == as_read(new)))
                assert outcomes[-1][1] or as_read(dest) == as_read(old)
            prepare(dest, texts[1], *words)
            assert as_read(dest) == as_read(new)
            assert not [p for p in dest.iterdir() if p.suffix in (".tmp", ".new")]
    assert all(is_new == (before >= commit) for before, is_new in outcomes)


def test_two_at_once(tmp_path, texts):
    with DatasetWriter(tmp_path / "dest", AB):
        done = run_script(PREPARE, f"--input={texts[0]}", f"--dest={tmp_path / 'dest'}", cwd=tmp_path)
        assert done.returncode == 2 and "another prepare.py is writing into" in done.stderr.splitlines()[-1]
        assert (tmp_path / "dest" / "train.bin.tmp").exists()
    prepare(tmp_path / "dest", texts[0])


def test_a_bpe_leaves_with_its_dataset(tmp_path, texts):
    pytest.importorskip("tokenizers")
    dest = tmp_path / "dest"
    prepare(dest, texts[0], "--tokenizer=bpe", "--vocab_size=300")
    assert (dest / "tokenizer.json").read_text(encoding="utf-8") == read_meta(dest)["json"]
    prepare(dest, texts[0])
    assert not (dest / "tokenizer.json").exists()
    (dest / "tokenizer.json").write_text("the user's own")
    prepare(dest, texts[0])
    assert (dest / "tokenizer.json").exists()
