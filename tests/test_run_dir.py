import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_checkpoint import a_state, same

import checkpoint
from configurator import UserError
from run_dir import Log, RunDir, claim_out_dir, copy_to_cpu, open_out_dir


def test_a_fresh_run_keeps_what_an_earlier_one_left(tmp_path, capsys):
    for name in ("ckpt.pt", "last.pt", "last.prev.pt"):
        checkpoint.save(tmp_path / name, a_state(8))
    (tmp_path / "log.jsonl").write_text("{}\n", encoding="utf-8")
    claim_out_dir(tmp_path, tmp_path / "last.pt", False)
    assert not (tmp_path / "previous").exists()
    claim_out_dir(tmp_path, None, True)
    assert sorted(os.listdir(tmp_path / "previous")) == ["ckpt.pt", "last.prev.pt", "last.pt", "log.jsonl"]
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "last.pt", "previous"]
    assert "previous" in capsys.readouterr().err
    checkpoint.save(tmp_path / "last.pt", a_state(1), keep_as=tmp_path / "last.prev.pt")
    checkpoint.save(tmp_path / "last.pt", a_state(2), keep_as=tmp_path / "last.prev.pt")
    assert checkpoint.newest(str(tmp_path))[1]["iter_num"] == 2
    claim_out_dir(tmp_path, None, True)
    assert checkpoint.load(tmp_path / "previous" / "last.pt")["iter_num"] == 8
    assert checkpoint.load(tmp_path / "previous-2" / "last.pt")["iter_num"] == 2


def test_an_out_dir_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be made"):
        open_out_dir(str(tmp_path / "file" / "out"))


def test_the_log_drops_what_will_be_written_again(tmp_path):
    log = Log(tmp_path, 0)
    for i in range(5):
        log.write(kind="train", iter=i, loss=float("inf") if i == 3 else 0.1 + i, text="中文")
    log.write(kind="sample", iter=2, text="a\u2028b\x85c")
    log.file.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write('{"kind": "训'.encode()[:-1])  # torn inside a character
    log = Log(tmp_path, 4)
    log.write(kind="train", iter=4, loss=9.0)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert [line["iter"] for line in lines] == [0, 1, 2, 3, 2, 4] and lines[5]["loss"] == 9.0
    assert lines[4]["text"] == "a\u2028b\x85c"
    assert lines[1]["loss"] == 1.1 and lines[3]["loss"] is None and lines[0]["text"] == "中文"


def iterations(folder):
    return [json.loads(line)["iter"] for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_copy_shares_memory_where_its_tensors_do_and_uses_it_again():
    tied, copies = torch.arange(4.0), {}
    state = {"a": tied, "b": tied[:], "c": {"d": torch.ones(2), "n": 3}, "list": [1, 2]}
    copy = copy_to_cpu(state, copies)
    tied += 1
    assert copy["a"].tolist() == [0, 1, 2, 3] and copy["a"] is copy["b"] and copy["c"]["n"] == 3
    place = copy["a"].data_ptr()
    again = copy_to_cpu(state, copies)
    assert again["a"].data_ptr() == place and again["a"].tolist() == [1, 2, 3, 4] and copy["list"] == [1, 2]
    assert copy_to_cpu({"a": torch.zeros(9)}, copies)["a"].shape == (9,)


def test_a_save_holds_what_the_weights_were_when_it_was_asked_for(tmp_path):
    files, state = RunDir(str(tmp_path / "out"), None), a_state(1)
    weight = state["model"]["lm_head.weight"]
    before = weight.clone()
    assert files.save(state, {"sequences_seen": 7}, 2.5)
    with torch.no_grad():
        weight += 1  # training goes on while the disk works
    files.close()
    last, ckpt = checkpoint.load(tmp_path / "out" / "last.pt"), checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert torch.equal(last["model"]["lm_head.weight"], before) and same(last["model"], ckpt["model"])
    assert last["sequences_seen"] == 7 and "sequences_seen" not in ckpt and list(ckpt) == list(state)
    weights = last["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()  # tied, saved once


def test_ckpt_is_replaced_by_a_better_one_only_unless_always(tmp_path):
    files = RunDir(str(tmp_path), None)
    for iter_num, loss, always, held in (
        (1, 3.0, 0, 1),
        (2, 3.0, 0, 1),
        (3, 3.5, 0, 1),
        (4, 2.5, 0, 4),
        (5, 9.0, 1, 5),
    ):
        assert files.save(a_state(iter_num), {}, loss, always=bool(always)) == (held == iter_num)
        files.finish()
        ckpt = checkpoint.load(tmp_path / "ckpt.pt")
        assert ckpt["iter_num"] == held and checkpoint.load(tmp_path / "last.pt")["iter_num"] == iter_num
    assert ckpt["best_val_loss"] == 2.5
    files.close()
    # a resumed run may have fallen back behind its ckpt.pt: what counts is the loss of the file that is there
    files = RunDir(str(tmp_path), tmp_path / "last.pt", 3, 3.0, fresh=False)
    assert not files.save(a_state(4), {}, 2.7) and files.save(a_state(5), {}, 2.4)
    files.close()
    (tmp_path / "ckpt.pt").write_bytes(b"damaged")
    files = RunDir(str(tmp_path), tmp_path / "last.pt", 5, 2.4, fresh=False)
    assert files.save(a_state(6), {}, 2.6)
    files.close()


def test_numbered_checkpoints_are_complete_and_only_so_many_stay(tmp_path):
    files = RunDir(str(tmp_path), None)
    for iter_num in range(1, 8):
        files.save(a_state(iter_num), {"sequences_seen": iter_num}, numbered_kept=2 if iter_num % 2 == 0 else 0)
    files.close()
    assert sorted(p.name for p in tmp_path.glob("ckpt-*")) == ["ckpt-4.pt", "ckpt-6.pt"]
    assert checkpoint.load(tmp_path / "ckpt-4.pt")["sequences_seen"] == 4
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).unlink()  # a second name of ckpt-6.pt, which is not to be damaged
        (tmp_path / name).write_bytes(b"damaged")
    path, state = checkpoint.newest(str(tmp_path))
    assert path.name == "ckpt-6.pt" and state["iter_num"] == 6
    claim_out_dir(tmp_path, None, True)  # a new run: none of them may be taken for its own
    assert not list(tmp_path.glob("ckpt-*")) and (tmp_path / "previous" / "ckpt-4.pt").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot move a folder with open files")
def test_a_vanished_folder_is_a_warning_and_the_next_save_tries_again(tmp_path, capsys):
    files = RunDir(str(tmp_path / "out"), None)
    files.save(a_state(1), {})
    files.finish()
    os.rename(tmp_path / "out", tmp_path / "away")
    files.log.write(kind="train", iter=1)
    for iter_num in (2, 3):
        files.save(a_state(iter_num), {})
        files.report(wait=True)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "training goes on" in warnings[0]  # the same one is not told at every save
    assert checkpoint.load(tmp_path / "away" / "last.pt")["iter_num"] == 1
    with pytest.raises(UserError, match="No such file"):
        files.save(a_state(4), {}, wait=True)
    os.rename(tmp_path / "away", tmp_path / "out")
    files.save(a_state(5), {})
    files.close()
    assert "works again" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "out" / "last.pt")["iter_num"] == 5 and iterations(tmp_path / "out") == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_a_warning_and_neither_log_lines_nor_files_are_lost(tmp_path):
    code = """
import json, resource, sys
sys.path.insert(0, "tests")
from test_checkpoint import a_state
from run_dir import RunDir
from configurator import UserError
files = RunDir(sys.argv[1], None)
files.save(a_state(1), {}, 3.0)
files.finish()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited))
for i in range(9):
    files.log.write(kind="train", iter=i, loss=1 / 3)
files.save(a_state(2), {}, 2.0)
files.report(wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, unlimited))
files.log.write(kind="train", iter=9, loss=1 / 3)
files.save(a_state(3), {}, 2.5)
try:
    files.close()
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be written (File too large)" in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.count("warning: ") == 2 and "its lines are kept" in done.stderr, done.stderr
    assert iterations(tmp_path) == list(range(10))
    for name in ("last.pt", "ckpt.pt"):
        assert checkpoint.load(tmp_path / name)["iter_num"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    files = RunDir(str(tmp_path), None)
    files.save(a_state(1), {})
    files.finish()
    code = "import sys; from configurator import run; from run_dir import RunDir; run(RunDir, sys.argv[1], None)"
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "in use" in done.stderr and not (tmp_path / "previous").exists()
    files.close()
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_killed_saves_litter_goes_and_a_damaged_logs_lines_too(tmp_path):
    (tmp_path / "last.pt.tmp").write_bytes(b"half")
    lines = [
        '{"iter": 0}',
        '{"iter": "1"}',
        '{"iter": [2]}',
        "[]",
        "3",
        '{"iter": null}',
        '{"iter": 1e999}',
        '{"iter": 5}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = RunDir(str(tmp_path), tmp_path / "last.pt", 5, math.inf, fresh=False)
    files.close()
    assert not (tmp_path / "last.pt.tmp").exists()
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines() == lines[:2]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_without_memory_for_a_copy_it_is_saved_all_the_same(tmp_path):
    code = """
import resource, sys, torch
from run_dir import RunDir
files, big = RunDir(sys.argv[1], None), torch.ones(30_000_000)
files.save({"model": {"w": torch.ones(3)}, "model_args": {}, "iter_num": 1}, {})
files.finish()
files.copies.clear()
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 60_000_000, resource.RLIM_INFINITY))
for iter_num in (2, 3):
    files.save({"model": {"w": big}, "model_args": {}, "iter_num": iter_num}, {})
files.close()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("no memory for a copy") == 1, done.stderr
    assert checkpoint.load(tmp_path / "last.pt")["model"]["w"].sum() == 30_000_000


def test_an_earlier_runs_files_are_never_taken_for_this_ones(tmp_path, capsys):
    def state(iter_num, run_id):
        return a_state(iter_num) | {"config": {"run_id": run_id}}

    old = RunDir(str(tmp_path), None, run_id="old")
    old.save(state(500, "old"), {}, 1.0)
    old.close()
    new = RunDir(str(tmp_path), None, run_id="new")
    (tmp_path / "ckpt.pt.tmp").mkdir()  # so that ckpt.pt cannot be written, as if the run ended before it was
    new.save(state(10, "new"), {}, 2.0)
    with pytest.raises(UserError, match="ckpt.pt"):
        new.close()
    assert checkpoint.newest(str(tmp_path))[1]["config"]["run_id"] == "new"
    assert checkpoint.load(tmp_path / "ckpt.pt")["config"]["run_id"] == "old"
    (tmp_path / "ckpt.pt.tmp").rmdir()
    new = RunDir(str(tmp_path), tmp_path / "last.pt", 10, 2.0, fresh=False, run_id="new")
    assert new.save(state(12, "new"), {}, 2.5)  # worse than the other run's, which is not its to keep
    new.close()
    assert checkpoint.load(tmp_path / "ckpt.pt")["iter_num"] == 12
    assert checkpoint.load(tmp_path / "last.prev.pt")["iter_num"] == 10
