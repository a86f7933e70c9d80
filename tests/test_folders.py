"""A sharded run's checkpoint folders: what is damaged, half written or made up in them, and what comes of it."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_ARGS, torchrun
from test_train import log_of, settings, train_here
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import checkpoint
import folders
import sharded
import train
from configurator import UserError
from run_dir import RunDir, claim_out_dir

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "state.json"]
RESUME = ["--init_from=resume", "--device=cpu", "--compile=False", "--matmul=float32"]


@pytest.fixture(scope="module")
def sharded_run(stories, tmp_path_factory) -> Path:
    """The out_dir of a run on two processes: last-2/, last-4/, ckpt.pt and the log."""
    folder = tmp_path_factory.mktemp("sharded")
    keys = ["--parallel=fsdp", "--gradient_accumulation_steps=2", "--max_iters=4", "--eval_interval=2"]
    done = torchrun(2, "train.py", *TINY_ARGS, f"--dataset={stories}", *keys, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture
def out(sharded_run, tmp_path, monkeypatch) -> Path:
    """A copy of it, out/ in the current folder."""
    shutil.copytree(sharded_run, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def refused(folder: Path) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(UserError) as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value) and folder.name in str(error.value)
    return str(error.value)


def seal(folder: Path) -> None:
    """Makes checksums.json tell the files that are there, as one does who means harm."""
    told = {path.name: folders.checksum(path) for path in folder.iterdir() if path.name != "checksums.json"}
    (folder / "checksums.json").write_text(json.dumps(told), encoding="utf-8")


# ------- what is in one


def test_a_folder_holds_what_last_pt_does_and_plain_files(sharded_run):
    assert sorted(path.name for path in (sharded_run / "last-4").iterdir()) == FILES
    told = json.loads((sharded_run / "last-4" / "checksums.json").read_text(encoding="utf-8"))
    for name in set(FILES) - {"checksums.json"}:
        data = (sharded_run / "last-4" / name).read_bytes()
        assert told[name] == [len(data), zlib.crc32(data)]
    state = checkpoint.load(sharded_run / "last-4")
    assert state["iter_num"] == 4 and state["sequences_seen"] == 4 * 8 and state["config"]["parallel"] == "fsdp"
    ckpt = checkpoint.load(sharded_run / "ckpt.pt")
    assert ckpt["iter_num"] == 4 and same(state["model"], ckpt["model"])  # the best loss was the last one
    names = {name for name in state["model"] if name != "lm_head.weight"}
    assert state["optimizers"].keys() == names
    for name, entry in state["optimizers"].items():
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq"} and float(entry["step"]) == 4
        assert entry["exp_avg"].shape == state["model"][name].shape and entry["exp_avg"].abs().max() > 0
    model = checkpoint.model_of(state, "last-4")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_without_tensors_nothing_but_small_files_is_read(sharded_run):
    state = checkpoint.load(sharded_run / "last-4", tensors=False)
    assert "model" not in state and "optimizers" not in state and state["iter_num"] == 4
    assert all(p.is_meta for p in checkpoint.model_of(state, "last-4").parameters())


def test_the_newest_come_first_and_what_is_no_state_not_at_all(tmp_path):
    for name in ("last-5", "last-40", "last-40.old", "last-12", "last-50.tmp", "last-x", "last-", "last-12.gone.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "last-99").write_bytes(b"a file")
    assert [path.name for path in folders.newest_first(tmp_path)] == ["last-40", "last-40.old", "last-12", "last-5"]
    assert [folders.updates(path) for path in folders.newest_first(tmp_path)] == [40, 40, 12, 5]


# ------- damage


def test_no_bit_of_a_folder_can_change_unnoticed(out):
    """Flipped, or cut off; with what it is that does not fit."""
    folder, rng = out / "last-4", random.Random(0)
    wanted = checkpoint.load(folder)
    for name in FILES:
        path, unnoticed = folder / name, 0
        whole = path.read_bytes()
        for n in range(24):
            at = rng.randrange(len(whole))
            bit = bytes([whole[at] ^ (1 << rng.randrange(8))])
            path.write_bytes(whole[:at] + bit + whole[at + 1 :] if n % 4 else whole[:at])
            try:
                assert same(checkpoint.load(folder) | {"checksums": {}}, wanted | {"checksums": {}})
                unnoticed += 1
            except UserError as error:
                assert "\n" not in str(error) and "last-4" in str(error)
        assert not unnoticed or name == "checksums.json", name  # it has spaces, which say nothing
        path.unlink()
        assert "damaged or no checkpoint of a sharded run" in refused(folder)
        path.write_bytes(whole)
    assert same(checkpoint.load(folder), wanted)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newer_one_is_passed_over_told_of_and_set_aside(out, stories, capsys, name):
    (out / "last-4" / name).write_bytes((out / "last-4" / name).read_bytes()[:-1])
    path, state = checkpoint.newest("out")
    assert (
        path == Path("out/last-2") and state["iter_num"] == 2 and same(state["model"], checkpoint.load(path)["model"])
    )
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "last-4" in warning and "going on from" in warning
    train.main(settings(*RESUME, "--max_iters=3", "--eval_interval=1"))
    assert (out / "last.damaged").is_dir() and not (out / "last-4").exists()
    assert checkpoint.newest("out")[1]["iter_num"] == 3  # and not 4, once more
    assert [line["iter"] for line in log_of(out)] == [0, 1, 2]


def test_where_none_is_whole_ckpt_is_resumed_and_else_nothing(out, capsys):
    for name in ("last-2", "last-4"):
        (out / name / "state.json").unlink()
    assert checkpoint.newest("out")[0] == Path("out/ckpt.pt")
    assert capsys.readouterr().err.count("warning: ") == 2
    (out / "ckpt.pt").unlink()
    with pytest.raises(UserError, match=r"no checkpoint to resume in out: .*last-4.*; .*last-2"):
        checkpoint.newest("out")
    with pytest.raises(UserError, match="no checkpoint to resume"):  # it is no fresh start
        train.main(settings("--init_from=auto", "--out_dir=out", *RESUME[1:]))


def test_what_a_killed_save_leaves(out, capsys):
    """Half a folder under its temporary name; and one that is being replaced, before and after the other has taken its
    name."""
    shutil.copytree(out / "last-4", out / "last-6.tmp")
    (out / "last-6.tmp" / "checksums.json").unlink()
    shutil.copytree(out / "last-2", out / "last-2.gone.tmp")
    assert checkpoint.newest("out")[0] == Path("out/last-4")
    claim_out_dir(out, out / "last-4", False)
    assert sorted(path.name for path in out.glob("last*")) == ["last-2", "last-4"]
    os.rename(out / "last-4", out / "last-4.old")
    path, state = checkpoint.newest("out")
    assert path.name == "last-4.old" and state["iter_num"] == 4
    claim_out_dir(out, path, False)
    shutil.copytree(out / "last-4.old", out / "last-4")
    assert checkpoint.newest("out")[0].name == "last-4"
    (out / "last-4" / "__1_0.distcp").unlink()
    assert checkpoint.newest("out")[0].name == "last-4.old"
    claim_out_dir(out, out / "last-4.old", False)
    assert checkpoint.newest("out")[0].name == "last-4.old" and checkpoint.newest("out")[1]["iter_num"] == 4


def test_a_folder_takes_its_name_from_one_that_is_there(out):
    shutil.copytree(out / "last-4", out / "last-4.tmp")
    (out / "last-4.old").mkdir()
    (out / "last-4" / "old").touch()
    folders.take_name(out / "last-4.tmp", out / "last-4")
    assert sorted(path.name for path in out.glob("last*")) == ["last-2", "last-4"]
    assert not (out / "last-4" / "old").exists() and checkpoint.load(out / "last-4")["iter_num"] == 4


# ------- beside other runs and other states


def test_a_fresh_run_moves_an_earlier_sharded_one_to_previous(out, stories, capsys):
    train_here(f"--dataset={stories}", "--max_iters=1", "--gradient_accumulation_steps=1")
    assert "is kept in out/previous" in capsys.readouterr().err
    assert sorted(os.listdir(out / "previous")) == ["ckpt.pt", "last-2", "last-4", "log.jsonl"]
    assert checkpoint.newest("out/previous")[1]["iter_num"] == 4
    assert checkpoint.newest("out")[1]["iter_num"] == checkpoint.best("out")[1]["iter_num"] == 1
    assert not list(out.glob("last-*"))


def test_one_process_goes_on_and_keeps_two_states(out):
    """The folders go once there are two files."""
    train.main(settings(*RESUME, "--max_iters=5", "--eval_interval=10"))
    assert [path.name for path in checkpoint.states(out)] == ["last.pt", "last-4", "last-2"]
    train.main(settings(*RESUME, "--max_iters=6"))
    assert [path.name for path in checkpoint.states(out)] == ["last.pt", "last.prev.pt"]
    assert checkpoint.load(out / "last.prev.pt")["iter_num"] == 5


def test_folders_but_the_newest_two_go_and_numbered_ones_stay(tmp_path, out):
    files = RunDir(str(tmp_path / "new"), None)
    files.numbered_kept = 2
    kept = {}
    for n in range(1, 12):
        shutil.copytree(out / "last-4", files.folder / "temporary")
        state = json.loads((out / "last-4" / "state.json").read_text(encoding="utf-8")) | {"numbered": n % 3 == 0}
        (files.folder / "temporary" / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files.take_folder(files.folder / "temporary", f"last-{n}")
        kept[n] = sorted(folders.updates(path) for path in folders.newest_first(files.folder))
    files.close()
    assert kept[1] == [1] and kept[2] == [1, 2] and kept[4] == [3, 4] and kept[5] == [3, 4, 5]
    assert kept[7] == [3, 6, 7] and kept[9] == [6, 8, 9] and kept[11] == [6, 9, 10, 11]
    again = RunDir(str(tmp_path / "new"), files.folder / "last-11", 11, fresh=False)  # with keep_checkpoints=0 now
    shutil.copytree(out / "last-4", again.folder / "temporary")
    again.take_folder(again.folder / "temporary", "last-12")
    again.close()
    assert sorted(map(folders.updates, folders.newest_first(again.folder))) == [6, 9, 11, 12]


def test_an_earlier_runs_newest_folder_stays_until_a_new_run_has_a_state(tmp_path, out):
    files = RunDir(str(out), None)
    assert [path.name for path in checkpoint.states(out)] == ["last-4"] and not files.has_folder
    assert checkpoint.newest(str(out))[1]["iter_num"] == 4 == checkpoint.newest(str(out / "previous"))[1]["iter_num"]
    shutil.copytree(out / "last-4", out / "temporary")
    files.take_folder(out / "temporary", "last-1")
    files.close()
    assert [path.name for path in checkpoint.states(out)] == ["last-1"] and not (out / "ckpt.pt").exists()


def test_parts_that_lie_elsewhere_make_no_checkpoint(tmp_path, out):
    parts = {name: told for name, told in folders.checksums(out / "last-4").items() if name.startswith("__")}
    (out / "last-4" / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match="a disk that their machines share"):
        folders.complete(out / "last-4", {}, parts)


def test_what_is_read_is_what_was_verified(out, stories):
    told = folders.checksums(out / "last-4")
    tell(out / "last-4", {name: each for name, each in told.items() if name != "__1_0.distcp"})
    assert "points at '__1_0.distcp'" in refused(out / "last-4")
    for name in ("/dev/zero", "../last-2/state.json"):
        tell(out / "last-4", told | {name: [0, 0]})
        assert "checksums.json is not whole" in refused(out / "last-4")


def tell(folder: Path, checksums: dict) -> None:
    (folder / "checksums.json").write_text(json.dumps(checksums), encoding="utf-8")


# ------- what means harm


class Malice:
    def __init__(self, *call):
        self.call = call or (os.mkdir, ("executed",))

    def __reduce__(self):
        return self.call


def as_global(module: str, name: str) -> bytes:
    """A pickle of what is at this place, by its name."""
    stream = io.BytesIO()
    stream.write(b"\x80\x04")
    for text in (module.encode(), name.encode()):
        stream.write(b"\x8c" + bytes([len(text)]) + text)
    stream.write(b"\x93.")
    return stream.getvalue()


def first(table: dict):
    return next(iter(table))


def pointing(to: str):
    """What makes a first tensor's part lie elsewhere."""
    return lambda m: m.storage_data.update(
        {(at := first(m.storage_data)): replace(m.storage_data[at], relative_path=to)}
    )


def metadata_of(out: Path) -> tuple[Path, Any]:
    """The file that tells of last-4's tensors, and what is in it."""
    path = out / "last-4" / ".metadata"
    return path, pickle.loads(path.read_bytes())


CHANGES = {
    "a call": lambda m: m.state_dict_metadata.update(x=Malice()),
    "a call in what is not looked at": lambda m: setattr(m, "planner_data", Malice()),
    "a call as a key": lambda m: m.storage_data.update({"x": Malice()}),
    "bytes, which are unpickled": lambda m: m.state_dict_metadata.update(
        {first(m.state_dict_metadata): BytesStorageMetadata()}
    ),
    "a file outside": pointing("../x"),
    "a file anywhere": pointing("/etc/passwd"),
    "a file outside, in disguise": pointing("__0_0.distcp/../../x"),
    "a file, and a line": pointing("__0_0.distcp\n"),
    "a way to decode it": lambda m: m.storage_data.update(
        {(at := first(m.storage_data)): replace(m.storage_data[at], transform_descriptors=["zstd"])}
    ),
    "torch.load": lambda m: setattr(m, "planner_data", Malice(torch.load, ("executed",))),
    "torch.hub": lambda m: setattr(m, "planner_data", Malice(torch.hub.load, ("executed", "x"))),
    "eval": lambda m: setattr(m, "planner_data", Malice(eval, ("__import__('os').mkdir('executed')",))),
}


@pytest.mark.parametrize("how", CHANGES)
def test_metadata_that_means_harm_is_refused_and_runs_nothing(out, how):
    path, found = metadata_of(out)
    CHANGES[how](found)
    (out / "x").write_bytes((out / "last-4" / "__0_0.distcp").read_bytes())
    path.write_bytes(pickle.dumps(found))
    seal(out / "last-4")
    assert "is not what a sharded run writes, and no code in it is run" in refused(out / "last-4")
    params = {"transformer.wpe.weight": torch.zeros(32, 32)}
    with pytest.raises(UserError, match="no code in it is run"):
        sharded.read_shares(out / "last-4", params, None)
    assert not Path("executed").exists()
    assert checkpoint.newest("out")[0].name == "last-2"


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch", "hub.load"), ("torch", "Tensor"),
        ("torch", "float32.__class__"), ("torch.serialization", "load"), ("torch.hub", "load"),
        ("torch.distributed.checkpoint.metadata", "os.system"), ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"), ("torch", "Size.__new__"),
        ("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict"), ("copyreg", "_reconstructor"),
    ],
)  # fmt: skip
def test_no_name_but_those_of_tensors_is_known(out, module, name):
    (out / "last-4" / ".metadata").write_bytes(as_global(module, name))
    with pytest.raises(pickle.UnpicklingError, match="has no place in it"):
        sharded.Unpickler(io.BytesIO(as_global(module, name))).load()
    seal(out / "last-4")
    refused(out / "last-4")


def test_the_types_of_tensors_are_known():
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        name = str(dtype).removeprefix("torch.")
        assert sharded.Unpickler(io.BytesIO(as_global("torch", name))).load() is dtype


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_code_in_the_place_of_a_tensor_is_not_run(out):
    """Its bytes hold a file of torch.save's, which is read as tensors alone."""
    buffer = io.BytesIO()
    torch.save(Code(), buffer)
    with open(out / "last-4" / ".metadata", "rb") as file:
        found = pickle.load(file)
    for at, info in found.storage_data.items():
        found.storage_data[at] = replace(info, offset=0, length=len(buffer.getvalue()))
    (out / "last-4" / ".metadata").write_bytes(pickle.dumps(found))
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (out / "last-4" / name).write_bytes(buffer.getvalue())
    seal(out / "last-4")
    refused(out / "last-4")
    assert not Path("executed").exists()


def test_what_is_made_up_is_a_sentence_or_tensors(out):
    """Bits flipped in .metadata and state.json, with checksums that fit: whatever comes of it, it is no traceback."""
    rng, refusals = random.Random(1), 0
    for name in (".metadata", "state.json"):
        path = out / "last-4" / name
        whole = path.read_bytes()
        for _ in range(150):
            at = rng.randrange(len(whole))
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            seal(out / "last-4")
            try:
                state = checkpoint.load(out / "last-4")
                checkpoint.model_of(state, "last-4")
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
        path.write_bytes(whole)
    assert refusals > 60


def enlarge(m, name: str, size: tuple[int, ...]) -> None:
    m.state_dict_metadata[name].size = torch.Size(size)


MADE_UP = {
    "too large for any memory": lambda m: enlarge(m, "model/transformer.wpe.weight", (10**9, 10**6)),
    "of no size": lambda m: enlarge(m, "model/transformer.wpe.weight", (-1, 3)),
    "wider than it is": lambda m: enlarge(m, "model/transformer.wpe.weight", (32, 64)),
    "under a name that is none": lambda m: m.state_dict_metadata.update(
        {"optimizers/x": m.state_dict_metadata["model/transformer.wpe.weight"]}
    ),
    "under a number": lambda m: m.state_dict_metadata.update(
        {3: m.state_dict_metadata["model/transformer.wpe.weight"]}
    ),
    "missing": lambda m: m.state_dict_metadata.pop("model/transformer.wpe.weight"),
    "nowhere": lambda m: m.storage_data.clear(),
    "without parts": lambda m: m.state_dict_metadata["model/transformer.wpe.weight"].chunks.clear(),
    "no table": lambda m: setattr(m, "storage_data", None),
}


@pytest.mark.parametrize("how", MADE_UP)
def test_a_tensor_that_cannot_be_is_a_sentence(out, how):
    path, found = metadata_of(out)
    MADE_UP[how](found)
    path.write_bytes(pickle.dumps(found))
    seal(out / "last-4")
    with pytest.raises(UserError) as error:
        checkpoint.model_of(checkpoint.load(out / "last-4"), "last-4")
    assert "\n" not in str(error.value)


def test_what_opens_no_folder_imports_nothing_of_them(tmp_path):
    """torch.distributed.checkpoint takes half a second, which sample.py of a file does not pay."""
    code = "import sys, checkpoint, startup; print([n for n in sys.modules if n.startswith(sys.argv[1])])"
    done = subprocess.run(
        [sys.executable, "-c", code, "torch.distributed.checkpoint"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
