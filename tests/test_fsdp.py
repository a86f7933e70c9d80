"""parallel=fsdp, held against parallel=ddp and one process: gradients, losses, weights, what is saved and gone on from,
on 1 to 4 processes of a CPU that meet by gloo."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from gradients import carry_out
from test_train import figures, log_of, settings

import checkpoint
import startup
from configurator import UserError
from model import GPT, GPTConfig, derive_seed
from processes import Processes
from tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo is tried on POSIX")

# 42 rows do not divide by 4, nor by 3 what is left of the vocabulary
SMALL = {
    "device": "cpu", "compile": False, "matmul": "float32", "n_layer": 2, "n_head": 3, "n_embd": 42, "block_size": 16,
    "batch_size": 2, "gradient_accumulation_steps": 4, "dropout": 0.1, "grad_clip": 0.5, "learning_rate": 1e-3,
    "muon_learning_rate": 2e-3, "warmup_iters": 2, "lr_decay_iters": 20, "max_iters": 6, "eval_interval": 3,
    "eval_iters": 3, "log_interval": 1,
}  # fmt: skip
ARCHITECTURES = {
    "gpt2": {"bias": True},
    "modern": {
        "pos": "rope", "norm": "rmsnorm", "act": "relu2", "qk_norm": True, "tied": False, "zero_init": True, "smear": 3
    },
}  # fmt: skip
KINDS = {
    f"{name}-{optim}": architecture | {"optim": optim}
    for name, architecture in ARCHITECTURES.items()
    for optim in ("adamw", "muon")
}
MOVED = {"gpt2-adamw": KINDS["gpt2-adamw"], "modern-muon": KINDS["modern-muon"]}
MOVES = {"eval_interval": 2, "init_from": "auto"}
# iterations of 1, 2, 3, 4 and 5 micro-steps
UNEVEN = {"batch_tokens": 5 * 32, "batch_ramp_start": 32, "batch_ramp_tokens": 500, "max_iters": 9}
SIZES = {"n_embd": 250, "n_head": 5, "bias": True, "optim": "muon", "eval_only": True, "eval_iters": 1}
FSDP = {"parallel": "fsdp"}
BFLOAT16 = {"dtype": "bfloat16", "learning_rate": 1e-2, "max_iters": 12, "dropout": 0}
ADAPTED = {
    "lora": {"lora_rank": 2, "lora_dropout": 0.1, "lora_targets": "c_attn,c_proj"},
    "adapter": {"adapter_dim": 3, "optim": "muon"},
    "head": {"freeze": "all_but_head"},
    "last": {"freeze": "all_but_last_1", "optim": "muon"},
}
TORTURED = {"parallel": "fsdp", "max_iters": 60, "lr_decay_iters": 60, "eval_interval": 10, "init_from": "auto"}


class Runs:
    """Runs that are started together, for a number of processes, when the first of them is asked for: on "1", "2", "3"
    and "4" processes by torchrun, "alone" here, and "later", on 2, after all of them."""

    def __init__(self, home: Path, dataset: Path):
        self.home, self.dataset = home, dataset
        self.start = functools.cache(self.start)

    def out(self, where: str, name: str) -> Path:
        """A run's out_dir."""
        return self.home / where / name

    def told(self, where: str, name: str) -> dict:
        """What `carry_out` tells of a run."""
        self.start(where)
        return torch.load(self.home / where / f"{name}.pt", weights_only=True)

    def losses(self, where: str, name: str) -> list[tuple[int, float]]:
        self.start(where)
        return [(line["iter"], line["loss"]) for line in log_of(self.out(where, name))]

    def start(self, where: str) -> None:
        """All runs on so many processes, after those from which some of them go on."""
        if before := {"2": "alone", "3": "alone", "4": "2", "later": "4"}.get(where):
            self.start(before)
        (self.home / where).mkdir()
        runs = [(name, self.arguments(where, name, keys)) for name, keys in self.planned(where)]
        if where == "alone":
            for name, argv in runs:
                torch.save(carry_out(*argv), self.home / where / f"{name}.pt")
            return
        path = self.home / where / "runs.json"
        path.write_text(json.dumps(runs), encoding="utf-8")
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={2 if where == 'later' else where}",
        ]
        command = [sys.executable, *launcher, str(ROOT / "tests" / "gradients.py"), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=500)
        said = [line for line in done.stderr.splitlines() if not line.startswith("overriding:")]
        assert done.returncode == 0, "\n".join(said)
        (self.home / where / "said.txt").write_text("\n".join(said), encoding="utf-8")

    def arguments(self, where: str, name: str, keys: dict) -> list[str]:
        keys = {"dataset": self.dataset, "out_dir": self.out(where, name)} | SMALL | keys
        return [f"--{key}={value}" for key, value in keys.items()]

    def planned(self, where: str):
        """(name, settings) of each run."""
        base, after = self.out("alone", "gpt2-adamw"), self.out("alone", "cropped")
        if where == "alone":
            yield from KINDS.items()
            yield "recomputed", KINDS["gpt2-adamw"] | {"activation_checkpointing": True}
            yield "uneven", UNEVEN
            for name, keys in MOVED.items():
                yield f"straight-{name}", keys | MOVES | {"max_iters": 24}
                yield f"moved-{name}-4", keys | MOVES | {"max_iters": 4, "out_dir": self.out("moved", name)}
            for name, keys in ADAPTED.items():
                yield name, keys | {"init_from": base, "max_iters": 4}
            yield "cropped", {"max_iters": 3}
            yield "cropped again", {"max_iters": 6, "block_size": 8, "init_from": "resume", "out_dir": after}
            yield "epochs", {"epochs": 2, "batch_size": 100, "eval_interval": 0}
            yield "samples", {"sample_interval": 2, "sample_tokens": 8, "sample_prompts": "大", "max_iters": 4}
            yield "target", {"target_val_loss": 0.1, "eval_interval": 1}
            yield "sizes", SIZES
        if where == "1":
            yield from ((name, KINDS[name] | FSDP) for name in ("gpt2-muon", "modern-adamw"))
        if where == "3":
            yield "gpt2-muon", KINDS["gpt2-muon"] | FSDP | {"batch_tokens": 4 * 32}
            yield "uneven", UNEVEN | FSDP
            yield "ddp-uneven", UNEVEN
            yield "lora", ADAPTED["lora"] | FSDP | {"init_from": base, "max_iters": 4, "batch_tokens": 4 * 32}
        if where in ("2", "4"):
            for name, keys in KINDS.items():
                yield name, keys | FSDP
                yield f"ddp-{name}", keys
            yield "uneven", UNEVEN | FSDP
            yield "ddp-uneven", UNEVEN
            yield "sizes", SIZES | FSDP
        for name, keys in MOVED.items():
            legs = {"2": [("fsdp", 8)], "4": [("fsdp", 12), ("ddp", 16)], "later": [("fsdp", 20)]}
            for parallel, until in legs.get(where, []):
                there = {"parallel": parallel, "max_iters": until, "out_dir": self.out("moved", name)}
                yield f"moved-{name}-{until}", keys | MOVES | there
        if where == "2":
            yield "ddp-sizes", SIZES
            yield "recomputed", KINDS["gpt2-adamw"] | FSDP | {"activation_checkpointing": True}
            yield "bfloat16", BFLOAT16 | FSDP
            yield "ddp-bfloat16", BFLOAT16
            for name, keys in ADAPTED.items():
                yield (
                    f"{name} at first",
                    keys | FSDP | {"init_from": base, "max_iters": 2, "out_dir": self.out("2", name)},
                )
                yield name, FSDP | {"init_from": "resume", "max_iters": 4}
            yield "cropped at first", FSDP | {"max_iters": 3, "out_dir": self.out("2", "cropped")}
            yield "cropped", FSDP | {"max_iters": 6, "block_size": 8, "init_from": "resume"}
            yield "epochs", FSDP | {"epochs": 2, "batch_size": 100, "eval_interval": 0}
            yield "samples", FSDP | {"sample_interval": 2, "sample_tokens": 8, "sample_prompts": "大", "max_iters": 4}
            yield "numbered", FSDP | {
                "max_iters": 9, "eval_interval": 2, "keep_checkpoints": 2, "checkpoint_interval": 3
            }  # fmt: skip
            yield "patience", FSDP | {"learning_rate": 0, "min_lr": 0, "patience": 2, "eval_interval": 1}
            aim = min(line["val_loss"] for line in log_of(self.out("alone", "target"), "eval")[:4]) + 1e-4
            yield "target", FSDP | {"target_val_loss": aim, "eval_interval": 1}
            yield "eval_only", FSDP | {"eval_only": True, "init_from": "resume", "out_dir": self.out("2", "numbered")}
            yield "fresh", FSDP | {"max_iters": 2, "out_dir": self.out("2", "numbered")}
            yield "tortured", TORTURED


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stories) -> Runs:
    return Runs(tmp_path_factory.mktemp("fsdp"), stories)


def assert_alike(ours: dict, wanted: dict, within: float) -> None:
    """Two states, or dictionaries of tensors."""
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            assert_alike(ours[name], value, within)
        else:
            torch.testing.assert_close(ours[name], value, atol=within, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_losses(ours: list, wanted: list, within: float) -> None:
    assert [i for i, _ in ours] == [i for i, _ in wanted]
    assert max(abs(a - b) for (_, a), (_, b) in zip(ours, wanted, strict=True)) <= within


def assert_same_end(a: Path, b: Path, within: float = 1e-5) -> None:
    """The newest states of two out_dirs, weights and moments."""
    (_, a), (_, b) = checkpoint.newest(str(a)), checkpoint.newest(str(b))
    assert a["iter_num"] == b["iter_num"] and a["sequences_seen"] == b["sequences_seen"]
    assert_alike(a["model"], b["model"], within)
    assert_alike(a["optimizers"], b["optimizers"], within)


# ------- the same numbers


@pytest.mark.parametrize(
    "where, name",
    [(where, prefix + kind) for where in ("2", "4") for prefix in ("", "ddp-") for kind in KINDS]
    + [("1", "gpt2-muon"), ("1", "modern-adamw"), ("3", "gpt2-muon")],
)
def test_losses_gradients_and_weights_are_those_of_one_process(runs, where, name):
    kind = name.removeprefix("ddp-")
    ours, alone = runs.told(where, name), runs.told("alone", kind)
    assert len(ours["gradients"]) == len(alone["gradients"]) == 6
    for own, wanted in zip(ours["gradients"], alone["gradients"], strict=True):
        assert_alike(own, wanted, 1e-5)
    for parameter, wanted in alone["gradients"][0].items():  # small ones too
        assert (ours["gradients"][0][parameter] - wanted).norm() <= 1e-4 * wanted.norm(), parameter
    assert_same_losses(runs.losses(where, name), runs.losses("alone", kind), 1e-5)
    ours, alone = runs.out(where, name), runs.out("alone", kind)
    for one, other in zip(log_of(ours), log_of(alone), strict=True):
        assert one["lr"] == other["lr"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    evals = [[line["val_loss"] for line in log_of(out, "eval")] for out in (ours, alone)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-5) and len(evals[0]) == 3
    assert_same_end(ours, alone)


@pytest.mark.parametrize("where", ["2", "3", "4"])
@pytest.mark.parametrize("prefix", ["", "ddp-"])
def test_micro_steps_that_do_not_divide_by_the_processes(runs, where, prefix):
    """Of 1 to 5 micro-steps in an iteration, some processes have one more than others, or none."""
    told, alone = runs.told(where, f"{prefix}uneven"), runs.told("alone", "uneven")
    state = checkpoint.newest(str(runs.out("alone", "uneven")))[1]
    assert state["sequences_seen"] == 2 * sum((1, 1, 2, 2, 3, 3, 4, 5, 5))  # on paper
    assert_same_losses(runs.losses(where, f"{prefix}uneven"), runs.losses("alone", "uneven"), 1e-5)
    for own, wanted in zip(told["gradients"], alone["gradients"], strict=True):
        assert_alike(own, wanted, 1e-5)
    assert_same_end(runs.out(where, f"{prefix}uneven"), runs.out("alone", "uneven"))
    assert f"its 5 micro-steps do not divide evenly by {where} processes: some wait" in told["said"]


FROM_THE_START = [("1", "gpt2-muon"), ("2", "gpt2-adamw"), ("3", "gpt2-muon"), ("4", "gpt2-muon")]
FROM_THE_START += [("1", "modern-adamw"), ("2", "modern-muon"), ("4", "modern-adamw")]


@pytest.mark.parametrize("where, name", FROM_THE_START)
def test_initial_weights_are_a_whole_models_and_no_process_has_one(runs, where, name):
    told, (_, state) = runs.told(where, name), checkpoint.newest(str(runs.out(where, name)))
    torch.manual_seed(derive_seed(1337))
    wanted = GPT(GPTConfig(**state["model_args"])).state_dict()
    assert told["initial"].keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(told["initial"][key], value), key
    assert told["tied"] == ("gpt2" in name) and told["devices"] == ["meta"]
    assert runs.told("3", "ddp-uneven")["devices"] == ["cpu"]  # this would tell it


@pytest.mark.parametrize("kind", MOVED)
def test_a_run_moves_between_numbers_of_processes_and_ways_of_sharing(runs, kind):
    """1 process, 2 with FSDP, 4 with it, 4 with DDP, 2 with FSDP, 1; as if nothing had happened."""
    runs.start("later")
    out, keys = runs.out("moved", kind), KINDS[kind] | MOVES | {"max_iters": 24, "parallel": "ddp"}
    keys["out_dir"] = out
    carry_out(*runs.arguments("moved", kind, keys))
    found = {n: runs.told(where, f"moved-{kind}-{n}")["files"] for where, n in
             (("alone", 4), ("2", 8), ("4", 12), ("4", 16), ("later", 20))}  # fmt: skip
    always = [".lock", "ckpt.pt"]
    assert found[4] == [*always, "last.prev.pt", "last.pt", "log.jsonl"]
    assert found[8] == [*always, "last-6", "last-8", "log.jsonl"]
    assert found[12] == [*always, "last-10", "last-12", "log.jsonl"]
    assert found[16] == [*always, "last.prev.pt", "last.pt", "log.jsonl"]
    assert found[20] == [*always, "last-18", "last-20", "log.jsonl"]
    assert sorted(os.listdir(out)) == found[16]
    straight = runs.out("alone", f"straight-{kind}")
    losses = [[(line["iter"], line["loss"]) for line in log_of(folder)] for folder in (out, straight)]
    assert len(losses[1]) == 24
    assert_same_losses(*losses, 1e-4)
    assert [line["iter"] for line in log_of(out, "eval")] == list(range(0, 25, 2))
    assert_same_end(out, straight, 1e-4)


# ------- what goes with it


def test_activation_checkpointing_changes_no_figure(runs):
    assert runs.losses("alone", "recomputed") == runs.losses("alone", "gpt2-adamw")
    assert_same_end(runs.out("alone", "recomputed"), runs.out("alone", "gpt2-adamw"), 0.0)
    assert_same_losses(runs.losses("2", "recomputed"), runs.losses("2", "gpt2-adamw"), 1e-6)
    assert_same_end(runs.out("2", "recomputed"), runs.out("2", "gpt2-adamw"), 1e-6)


def test_bfloat16_trains_as_with_ddp(runs):
    ours, ddp = runs.losses("2", "bfloat16"), runs.losses("2", "ddp-bfloat16")
    assert ours[-1][1] < ours[0][1] - 0.5
    assert_same_losses(ours, ddp, 0.05)
    for name in ("bfloat16", "ddp-bfloat16"):  # master weights, moments and gradients are float32 all the same
        state = checkpoint.newest(str(runs.out("2", name)))[1]
        tensors = [*state["model"].values(), *(t for entry in state["optimizers"].values() for t in entry.values())]
        assert {t.dtype for t in tensors} == {torch.float32}
    first = runs.told("2", "bfloat16")["gradients"][0]
    for name, wanted in runs.told("2", "ddp-bfloat16")["gradients"][0].items():
        assert first[name].dtype == torch.float32
        assert (first[name] - wanted).norm() < 0.1 * wanted.norm(), name


@pytest.mark.parametrize("name", ADAPTED)
def test_adapting_a_model_is_the_same_and_goes_on(runs, name):
    """Resumed in between, of a base that every process opens."""
    assert_same_losses(runs.losses("2", name), runs.losses("alone", name), 1e-5)
    assert len(runs.losses("2", name)) == 4
    assert_same_end(runs.out("2", name), runs.out("alone", name))
    if name == "lora":  # of two rows, one of three processes has none
        assert_same_losses(runs.losses("3", name), runs.losses("alone", name), 1e-5)
        assert_same_end(runs.out("3", name), runs.out("alone", name))


def test_a_context_is_cropped_on_resuming(runs):
    assert_same_losses(runs.losses("2", "cropped"), runs.losses("alone", "cropped"), 1e-5)
    assert_same_end(runs.out("2", "cropped"), runs.out("alone", "cropped"))
    state = checkpoint.newest(str(runs.out("2", "cropped")))[1]
    assert state["model"]["transformer.wpe.weight"].shape == (8, 42) and state["iter_num"] == 6


def test_epochs_end_where_those_of_one_process_do(runs):
    assert_same_losses(runs.losses("2", "epochs"), runs.losses("alone", "epochs"), 1e-5)
    ends = [[(line["iter"], line["epoch"]) for line in log_of(runs.out(w, "epochs"), "epoch")] for w in ("2", "alone")]
    assert ends[0] == ends[1] and [epoch for _, epoch in ends[0]] == [1, 2]


def test_samples_are_drawn_along_the_way(runs):
    runs.start("2")
    ours, alone = (log_of(runs.out(where, "samples"), "sample") for where in ("2", "alone"))
    assert ours == alone and [line["iter"] for line in ours] == [2, 4]
    assert ours[0]["text"] in runs.told("2", "samples")["said"]
    assert_same_losses(
        runs.losses("2", "samples"), runs.losses("alone", "gpt2-adamw")[:0] or runs.losses("alone", "samples"), 1e-5
    )


def test_numbered_folders_stay_besides_the_newest_two(runs):
    assert runs.told("2", "numbered")["files"] == [".lock", "ckpt.pt", "last-6", "last-8", "last-9", "log.jsonl"]


def test_patience_and_a_target_end_a_run(runs):
    said = runs.told("2", "patience")["said"]
    assert "stopped early: the validation loss has not fallen in 2 evaluations" in said
    assert [line["iter"] for line in log_of(runs.out("2", "patience"), "eval")] == [0, 1, 2]
    assert "stopped early: the validation loss is" in runs.told("2", "target")["said"]
    end, evals = log_of(runs.out("2", "target"), "end")[0], log_of(runs.out("2", "target"), "eval")
    assert end["reached"] and end["iter"] == evals[-1]["iter"] <= 3
    assert all(line["val_loss"] > end["target_val_loss"] >= evals[-1]["val_loss"] for line in evals[:-1])


def test_eval_only_evaluates_and_saves_nothing(runs):
    told = runs.told("2", "eval_only")
    assert told["said"].count("step 9:") == 1 and "iter 9" not in told["said"] and told["gradients"] == []
    assert told["files"] == runs.told("2", "numbered")["files"]


def test_a_fresh_run_keeps_an_earlier_one_in_previous(runs):
    assert runs.told("2", "fresh")["files"] == [".lock", "ckpt.pt", "last-2", "log.jsonl", "previous"]
    previous = runs.out("2", "numbered") / "previous"
    assert sorted(os.listdir(previous)) == ["ckpt.pt", "last-6", "last-8", "last-9", "log.jsonl"]
    assert checkpoint.load(previous / "last-6")["iter_num"] == 6
    assert checkpoint.load(runs.out("2", "numbered") / "ckpt.pt")["iter_num"] == 2
    assert [line["iter"] for line in log_of(runs.out("2", "numbered"))] == [0, 1]


# ------- what comes of its files


def test_ckpt_is_an_ordinary_file_and_speaks(runs, tmp_path):
    runs.start("2")
    ckpt = torch.load(runs.out("2", "gpt2-adamw") / "ckpt.pt", weights_only=True)
    alone = torch.load(runs.out("alone", "gpt2-adamw") / "ckpt.pt", weights_only=True)
    assert list(ckpt) == list(alone) and ckpt["optimizer"] is None and alone["optimizer"]
    assert list(ckpt["model"]) == list(alone["model"]) and ckpt["model_args"] == alone["model_args"]
    assert {type(t) for t in ckpt["model"].values()} == {torch.Tensor}
    assert_alike(ckpt["model"], alone["model"], 1e-5)
    tied = [ckpt["model"][f"{name}.weight"].data_ptr() for name in ("transformer.wte", "lm_head")]
    assert tied[0] == tied[1]
    for key in ("iter_num", "tokenizer", "template"):
        assert ckpt[key] == alone[key]
    assert ckpt["best_val_loss"] == pytest.approx(alone["best_val_loss"], abs=1e-5)

    folders_alone = tmp_path / "folders"
    shutil.copytree(runs.out("2", "gpt2-adamw"), folders_alone)
    (folders_alone / "ckpt.pt").unlink()
    asked = ["--start=大", "--num_samples=1", "--max_new_tokens=8", "--device=cpu", "--stream=False"]
    texts = []
    for source in (runs.out("2", "gpt2-adamw"), folders_alone):
        done = run_script("sample.py", f"--out_dir={source}", *asked, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("大"), done.stderr
        texts.append(done.stdout)
    assert len(set(texts)) == 1  # its best state is its last one
    by_path = run_script("sample.py", f"--init_from={folders_alone / 'last-6'}", *asked, cwd=tmp_path)
    assert by_path.stdout == texts[0]
    sources = [str(runs.out("2", "gpt2-adamw")), str(folders_alone), str(folders_alone / "last-6")]
    done = run_script("eval.py", *sources, "--device=cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [model["loss"] for model in json.loads(done.stdout)]
    assert len(losses) == 3 and losses[0] == losses[1] == losses[2], done.stdout


@pytest.mark.parametrize("path", ["", "last-3", "last-6"])
def test_weights_of_a_folder_are_tuned_further(runs, tmp_path, monkeypatch, path):
    """Of an out_dir that has nothing but folders, and of one of these."""
    runs.start("2")
    shutil.copytree(runs.out("2", "modern-muon"), tmp_path / "base")
    (tmp_path / "base" / "ckpt.pt").unlink()
    source = tmp_path / "base" / path
    monkeypatch.chdir(tmp_path)
    more = {"init_from": source, "learning_rate": 0, "min_lr": 0, "max_iters": 1, "dropout": 0}
    told = carry_out(*runs.arguments("tuned", "", more | {"out_dir": "out"}))
    wanted = checkpoint.load(tmp_path / "base" / (path or "last-6"))
    assert_alike(told["initial"], wanted["model"], 0.0)
    assert checkpoint.load("out/last.pt")["iter_num"] == 1


def on_paper(vocab: int, width: int, context: int, layers: int, processes: int, rank: int) -> tuple[int, int, int]:
    """Bytes of the weights, of AdamW's moments, and of AdamW's and Muon's, of GPT-2 with biases."""
    c, of_block = width, []
    for rows, columns in ((3 * c, c), (c, c), (4 * c, c), (c, 4 * c)):  # c_attn, c_proj, c_fc, c_proj
        of_block += [((rows, columns), True), ((rows, 1), False)]
    of_block += [((c, 1), False)] * 4  # gains and biases of two norms
    shapes = [((vocab, c), False), ((context, c), False), ((c, 1), False), ((c, 1), False), *of_block * layers]

    def here(rows: int) -> int:
        chunks = torch.arange(rows).chunk(processes)
        return len(chunks[rank]) if rank < len(chunks) else 0

    sizes = [(4 * here(rows) * columns, hidden) for (rows, columns), hidden in shapes]
    weights = sum(size for size, _ in sizes)
    return weights, 2 * weights, 2 * weights - sum(size for size, hidden in sizes if hidden)


@pytest.mark.parametrize("where, name", [("alone", "sizes"), ("2", "ddp-sizes"), ("2", "sizes"), ("4", "sizes")])
def test_the_lines_on_memory_are_what_it_comes_to_on_paper(runs, where, name):
    found = re.findall(r"^memory(?: of process(?:es)? ([\d, ]+))?: (.*)$", runs.told(where, name)["said"], re.MULTILINE)
    told = {rank: line for ranks, line in found for rank in ranks.split(", ")}
    vocab = load_tokenizer(runs.dataset).vocab_size
    assert list(told) == ([""] if where == "alone" else [str(rank) for rank in range(int(where))])
    for rank, line in told.items():
        sharing = (int(where), int(rank)) if name == "sizes" and rank else (1, 0)
        weights, _, moments = (f"{size / 1e6:,.2f} MB" for size in on_paper(vocab, 250, 16, 2, *sharing))
        assert line == f"parameters {weights}, gradients {weights}, optimizer {moments}"


@pytest.mark.parametrize("where, processes", [("alone", 1), ("1", 1), ("2", 2), ("3", 3), ("4", 4)])
def test_that_memory_is_what_the_first_process_has(runs, where, processes):
    vocab = load_tokenizer(runs.dataset).vocab_size
    weights, adamw, muon = on_paper(vocab, 42, 16, 2, processes, 0)
    assert runs.told(where, "gpt2-muon")["bytes"] == [weights, muon]
    if where not in ("1", "3"):
        assert runs.told(where, "gpt2-adamw")["bytes"] == [weights, adamw]
    if where in ("2", "4"):
        whole = on_paper(vocab, 42, 16, 2, 1, 0)
        assert runs.told(where, "ddp-gpt2-muon")["bytes"] == [whole[0], whole[2]]


# ------- what happens to it


class Job:
    """torchrun with train.py on two processes, its output in a file."""

    def __init__(self, runs: Runs, folder: Path, *launcher: str, **settings):
        self.said, self.out = folder / "said.txt", folder / "out"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *launcher]
        keys = runs.arguments("", "", TORTURED | {"out_dir": self.out} | settings)
        with open(self.said, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / "train.py"), *keys], cwd=folder, stdout=file, stderr=file
            )

    def text(self) -> str:
        return self.said.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str, times: int = 1) -> None:
        until = time.monotonic() + 120
        while self.text().count(words) < times:
            assert self.process.poll() is None and time.monotonic() < until, self.text()
            time.sleep(0.005)

    def workers(self) -> list[int]:
        """The processes that torchrun has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="utf-8")
        found = [int(pid) for pid in children.split()]
        return [pid for pid in found if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]

    def assert_as_if_nothing_had_happened(self, runs: Runs) -> None:
        wanted = runs.out("2", "tortured")
        assert figures(self.out) == figures(wanted) and len(figures(self.out)) == 60
        assert_same_end(self.out, wanted, 0.0)


in_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")


@in_linux
def test_stopped_by_a_signal_it_saves_its_step_and_goes_on_exactly(runs, tmp_path):
    runs.start("2")
    job = Job(runs, tmp_path)
    job.wait_for("iter 12:")
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(120) != 0
    stopped_at = int(re.search(r"saved at iteration (\d+); go on with", job.text())[1])
    assert 12 < stopped_at < 60 and checkpoint.newest(str(job.out))[0].name == f"last-{stopped_at}"
    job = Job(runs, tmp_path, init_from="resume")
    assert job.process.wait(120) == 0, job.text()
    assert f"resuming from {job.out}/last-{stopped_at} at iteration {stopped_at}" in job.text()
    job.assert_as_if_nothing_had_happened(runs)


@in_linux
def test_a_killed_worker_costs_what_came_after_the_last_save(runs, tmp_path):
    runs.start("2")
    job = Job(runs, tmp_path, "--max_restarts=2", save_interval=3)
    job.wait_for("iter 25:")
    os.kill(job.workers()[1], signal.SIGKILL)
    assert job.process.wait(240) == 0, job.text()
    assert "no sign of life from process" in job.text() and "resuming from" in job.text(), job.text()
    assert not list(job.out.glob("*.tmp"))
    job.assert_as_if_nothing_had_happened(runs)


@in_linux
def test_a_disk_that_refuses_for_a_while_ends_nothing(runs, tmp_path):
    """In one process alone, then in the other: all of them learn of it, and none waits for it."""
    runs.start("2")
    job, free = Job(runs, tmp_path, save_interval=1), resource.RLIM_INFINITY
    job.wait_for("iter 9:")
    for n, rank in ((1, 1), (2, 0)):
        pid = job.workers()[rank]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (60_000, free))  # room for what is said and for the log
        job.wait_for("could not be written (File too large); training goes on", n)
        assert checkpoint.newest(str(job.out))[1]["iter_num"] > 0
        job.wait_for("\niter ", job.text().count("\niter ") + 4)  # a few refused saves more, of which nothing is said
        assert n == 2 or job.text().count("training goes on") == 1, job.text()  # the first process has ckpt.pt besides
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (free, free))
        job.wait_for("works again", n)
    assert job.process.wait(120) == 0, job.text()
    assert "Traceback" not in job.text() and not list(job.out.glob("*.tmp"))
    job.assert_as_if_nothing_had_happened(runs)


# ------- mistakes


def test_mistakes_are_a_sentence_and_status_2(runs, tmp_path):
    done = run_script("train.py", "--parallel=tp", *runs.arguments("", "", {"out_dir": "out"}), cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if not line.startswith("overriding:")]
    assert done.returncode == 2 and said == ["train.py: parallel=tp: expected ddp or fsdp"]
    assert not (tmp_path / "out").exists()
    asked = settings("--parallel=fsdp", "--dtype=float16")  # on a CPU it is float32 by the time it is looked at
    assert not startup.is_to_be_shared_out(asked, Processes())
    with pytest.raises(UserError, match="dtype=float16 cannot be had with parallel=fsdp: take --parallel=ddp") as error:
        startup.is_to_be_shared_out(asked, Processes(control=object()))
    assert "\n" not in str(error.value)


def test_alone_it_says_that_nothing_is_shared_out(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = carry_out(*runs.arguments("", "", FSDP | {"out_dir": "out", "max_iters": 1}))
    assert told["said"].count("this one is alone: it does not") == 1
    assert told["files"] == [".lock", "ckpt.pt", "last.pt", "log.jsonl"] and told["devices"] == ["cpu"]
