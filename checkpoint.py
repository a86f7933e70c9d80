"""Checkpoints: saved whole or not at all, verified before they are loaded, found in an `out_dir`, turned into a model.

    ckpt.pt        the best validation loss so far, in nanoGPT's layout plus `tokenizer`
    last.pt        the newest complete state: the same, and what resuming needs besides
    last.prev.pt   the one before
    ckpt-1000.pt   a complete state, numbered by its iteration, where some are to be kept
    last-1000/     a complete state of a sharded run, see folders.py

Of a run with LoRA or adapters these hold what was added alone, and `adapter` and `base`: what it is, and the name and
hash of the model that it is on, which is opened with it.

A file is either the old one, whole, or the new one, whole: it is written beside, flushed, fsynced and renamed. What is
loaded is verified first, by the CRC-32 that the zip inside a .pt holds for every record, and is never unpickled code.
"""

import math
import os
import pickle
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import adapt
import folders
from configurator import Config, UserError, note, user_errors
from device import choose_device, choose_dtype
from fsdp import like
from loader import dataset_folder
from model import GPT, GPTConfig
from quantize import check_quantize, quantize
from tokenizer import GPT2Tokenizer, Tokenizer, hf_tokenizer, load_tokenizer, read_meta, tokenizer_from_meta

STATES = ("last.pt", "last.prev.pt")  # complete ones, beside the numbered


def numbered(folder: Path) -> list[Path]:
    """The folder's numbered checkpoints, the newest first."""
    found = [path for path in folder.glob("ckpt-*.pt") if path.stem[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem[5:]), reverse=True)


def has_run(out_dir: str) -> bool:
    """Whether there is a checkpoint in out_dir, whole or not."""
    folder = Path(out_dir)
    return bool(states(folder)) or (folder / "ckpt.pt").is_file()


def save(path: Path, state: dict[str, Any], keep_as: Path | None = None) -> None:
    """Writes a checkpoint atomically; the file it replaces stays as `keep_as`. UserError where the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.is_file():
            keep(path, keep_as)
        os.replace(temporary, path)
        folders.sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        refusals = [e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError) and e.strerror]
        reason = refusals[0].strerror if refusals else str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}); the file that was there is unharmed") from error


def states(folder: Path) -> list[Path]:
    """The folder's complete states, by name."""
    files = [path for path in (*(folder / name for name in STATES), *numbered(folder)) if path.is_file()]
    return files + folders.newest_first(folder)


def keep(path: Path, copy: Path) -> None:
    """A second name for a file, replacing that name atomically: a hard link, or a copy where there are none."""
    temporary = copy.with_name(copy.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, copy)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path, tensors: bool = True) -> dict[str, Any]:
    """A verified checkpoint, ours or nanoGPT's, on the CPU, its keys without compile's and DDP's prefixes. Without
    `tensors`, a folder's are left for sharded.read_shares.

    UserError where the file is missing, damaged, holds more than tensors and plain values, or is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        folders.verify(path)
        state = folders.read_state(path)
        return state | read_tensors(path, state) if tensors else state
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} does not load as tensors and plain values, and no code in it is run: {reason}"
        ) from error
    if not (
        isinstance(state, dict) and isinstance(state.get("model"), dict) and isinstance(state.get("model_args"), dict)
    ):
        raise UserError(f"{path} is no GPT checkpoint: it lacks `model` or `model_args`")
    state["model"] = {_plain(k): v for k, v in state["model"].items() if not k.endswith(".attn.bias")}  # masks, once
    state["iter_num"] = int(state.get("iter_num", 0))
    state["best_val_loss"] = float(state.get("best_val_loss", 1e9))
    state["config"] = state.get("config") or {}
    return state


def read_tensors(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """As sharded.read_tensors, whose import takes half a second."""
    import sharded

    return sharded.read_tensors(folder, state)


def verify(path: Path) -> None:
    """UserError where a checksum in the file is not that of what it holds."""
    try:
        with zipfile.ZipFile(path) as records:
            broken = records.testzip()
        reason = broken and f"checksum of {broken}"
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = str(error) or type(error).__name__
    if reason:
        raise UserError(f"{path} is damaged or no PyTorch checkpoint ({reason})")


def _plain(key: str) -> str:
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        key = key.removeprefix(prefix)
    return key


def newest(out_dir: str, tensors: bool = True) -> tuple[Path, dict[str, Any]]:
    """The state from which a run resumes: the highest iter_num among the complete ones that are whole, else ckpt.pt, so
    that nanoGPT's folders resume too; `tensors` as in `load`. UserError where there is none."""
    folder = Path(out_dir)
    complete = sorted(states(folder), key=updates_in, reverse=True)
    problems = []
    for path in (*complete, folder / "ckpt.pt"):
        if not path.exists():
            continue
        try:
            state = load(path, tensors)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            note(f"warning: {problem}; going on from {path}")
        return path, state
    looked_for = "last.pt, last.prev.pt, ckpt-1000.pt, last-1000/ and the like, and ckpt.pt"
    why = f": {'; '.join(problems)}" if problems else f" (looked for {looked_for})"
    raise UserError(f"no checkpoint to resume in {out_dir}{why}")


def updates_in(path: Path) -> float:
    """A checkpoint's iter_num; infinite where it cannot be read, so that load() tells why."""
    try:
        return folders.updates(path) if path.is_dir() else int(peek(path)["iter_num"])
    except Exception:  # a damaged file can raise nearly anything here
        return math.inf


def peek(path: Path) -> dict[str, Any]:
    """A checkpoint that is not verified, its tensors mapped from the file instead of read, or of a folder left out.
    UserError where it has no plain values at all."""
    if path.is_dir():
        return folders.read_state(path)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged or no PyTorch checkpoint ({reason})") from error


def best(source: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to use for its weights: a .pt file, or an out_dir's ckpt.pt, else its last state; or a sharded
    run's checkpoint folder."""
    path = best_path(source)
    return path, load(path)


def best_path(source: str) -> Path:
    """The file or folder of `best`. UserError where an out_dir has none."""
    path = Path(source)
    if path.suffix == ".pt" or folders.is_folder(path):
        return path
    found = [path / name for name in ("ckpt.pt", "last.pt") if (path / name).is_file()] + folders.newest_first(path)
    if not found:
        raise UserError(f"no checkpoint in {source} (looked for ckpt.pt and last.pt): train first, with --out_dir")
    return found[0]


def is_checkpoint(source: str) -> bool:
    """Whether it is a .pt file, an out_dir or a sharded run's checkpoint folder, and not a Hugging Face folder or the
    name of one."""
    path = Path(source)
    if path.is_file() or folders.is_folder(path):
        return True
    return any((path / name).is_file() for name in ("ckpt.pt", "last.pt")) or bool(folders.newest_first(path))


def model_of(state: dict[str, Any], where: str | Path, dropout: float = 0.0, merged: bool = True) -> GPT:
    """The model that a checkpoint holds, on the CPU, or where `load` left its tensors out, on the meta device. An
    adapter is put on its base: LoRA `merged` into it, as a GPT like others, or to be trained on. UserError where the
    base is not to be had, or is another model by now."""
    if "adapter" in state:
        return _on_its_base(state, where, dropout, merged)
    try:
        if "model" not in state:  # its weights are read where they are needed, each process its own
            with torch.device("meta"):
                return GPT(GPTConfig(**(state["model_args"] | {"dropout": dropout})))
        model = GPT(GPTConfig(**(state["model_args"] | {"dropout": dropout})))
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: model_args and weights do not make a GPT: {' '.join(str(error).split())}") from error
    return model


def _on_its_base(state: dict[str, Any], where: str | Path, dropout: float, merged: bool) -> GPT:
    try:
        adaptation, base = adapt.Adaptation(**state["adapter"]), state["base"]
        model = _base(base["source"], base["path"], base["sha256"], where, dropout)
        adapt.restore(model, adaptation, state["model"], state["model_args"])
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: its adapter does not fit its base: {' '.join(str(error).split())}") from error
    if merged:
        adapt.merge(model)
    return model


def _base(source: str, path: str, sha256: str, where: str | Path, dropout: float) -> GPT:
    """The model with this hash: from `source`, as it was given to train.py, or else from the same place's full path."""
    problems = []
    for place in dict.fromkeys(each for each in (source, path) if each):
        if not Path(place).exists() and not place.startswith("gpt2"):
            problems.append(f"{place} is not there")
            continue
        if Path(place).is_dir() and not (is_checkpoint(place) or (Path(place) / "config.json").is_file()):
            problems.append(f"{place} has no model in it")
            continue
        try:
            if is_checkpoint(place) and "adapter" in peek(best_path(place)):  # which could be on this one, in a circle
                raise UserError(f"{place} is an adapter itself")
            model, _ = pretrained(place, dropout)
        except UserError as error:
            problems.append(str(error))
            continue
        if adapt.weights_hash(model) == sha256:
            return model
        problems.append(f"{place} holds another model now")
    raise UserError(
        f"{where} is an adapter and needs the model that it was trained on, {source}, whose weights have the sha256 "
        f"{sha256[:16]}...: {'; '.join(dict.fromkeys(problems))}; put that model back there"
    )


def adapter_on(source: str, model: GPT, adaptation: adapt.Adaptation, out_dir: str) -> dict[str, Any]:
    """What a checkpoint of an adapter holds besides its weights: `adapter`, and `base`, which is `model` as it came
    from `source`; nothing where no adapter is trained. UserError where none can be trained on it."""
    if adapt.is_adapted(model):
        folder = best_path(source).parent
        raise UserError(
            f"init_from={source} has adapters, which nothing else can be trained on: go on training them with "
            f"--init_from=resume --out_dir={folder}, or start from the model that they are on"
        )
    if not adaptation.adds:
        return {}
    if is_checkpoint(source) and "adapter" in peek(best_path(source)):
        raise UserError(
            f"init_from={source} is LoRA on another model: make a checkpoint of its own of it, with python "
            f"extras/merge.py --out_dir={source}, and start from that"
        )
    path = Path(source).resolve()
    if Path(out_dir).resolve() in (path, path.parent):
        raise UserError(f"out_dir={out_dir} holds the model that the adapter is for: choose another out_dir")
    base = {"source": source, "path": str(path) if path.exists() else "", "sha256": adapt.weights_hash(model)}
    return {"adapter": asdict(adaptation), "base": base}


def tokenizer_of(state: dict[str, Any], where: str | Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with; for nanoGPT's, that of its dataset's folder, else GPT-2's."""
    if "tokenizer" in state:
        return tokenizer_from_meta(state["tokenizer"], str(where))
    name = state["config"].get("dataset", "")
    try:
        tokenizer = load_tokenizer(dataset_folder(name))
    except UserError:
        if state["model_args"]["vocab_size"] < 50257:
            raise UserError(
                f"{where} does not hold its tokenizer, and its dataset {name!r} with meta.pkl is not under data/"
            ) from None
        tokenizer = tokenizer_from_meta({"kind": "gpt2"}, str(where))
    if not fits(tokenizer, state["model_args"]["vocab_size"]):
        raise UserError(f"{where} was trained on another vocabulary than the one that is now in data/{name}")
    return tokenizer


def template_of(state: dict[str, Any]) -> str:
    """The layout of a document in the dataset that a checkpoint was trained on; '' where it has none."""
    if "template" in state:
        return str(state["template"])
    with suppress(UserError):
        return str(read_meta(dataset_folder(state["config"].get("dataset", ""))).get("template", ""))
    return ""


def fits(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether a model of this vocab_size can be this tokenizer's; all but a char model's may be padded."""
    return tokenizer.vocab_size == vocab_size or tokenizer.kind != "char" and tokenizer.vocab_size < vocab_size


def load_tokenizer_of(source: str) -> Tokenizer:
    """The tokenizer of an out_dir or of a .pt file."""
    path, state = best(source)
    return tokenizer_of(state, path)


def pretrained(source: str, dropout: float = 0.0) -> tuple[GPT, Tokenizer | None]:
    """Weights to start from, and their tokenizer: 'gpt2*', a Hugging Face folder, an out_dir or a .pt file.

    A Hugging Face folder brings its own; without one, a vocabulary of 50,257 is taken for GPT-2's, and that is said,
    and for any other the tokenizer is None. UserError where something is missing, broken or does not fit together.
    """
    folder = Path(source)
    if is_checkpoint(source) or folder.suffix == ".pt":
        path, state = best(source)
        return model_of(state, path, dropout), tokenizer_of(state, path)
    with user_errors(ValueError):
        model = GPT.from_pretrained(source, {"dropout": dropout})
    if not folder.is_dir():
        return model, GPT2Tokenizer()
    tokenizer, vocab_size = hf_tokenizer(folder), model.config.vocab_size
    if tokenizer is None and vocab_size == GPT2Tokenizer.vocab_size:
        note(f"note: {folder} holds no tokenizer; its {vocab_size:,} tokens are taken for GPT-2's")
        tokenizer = GPT2Tokenizer()
    if tokenizer and not fits(tokenizer, vocab_size):
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, but its model {vocab_size:,}")
    return model, tokenizer


def open_model(c: Config) -> tuple[GPT, Tokenizer, str]:
    """A model to speak with, its tokenizer, and the layout of its dataset's documents or ''. The settings are those of
    sample.py and serve.py: `init_from` is 'resume' for `out_dir`, or what `pretrained` takes; the model comes to
    `device`, in fewer bits with `quantize`, and what `device` and `dtype` come to is put into `c`."""
    c.device = choose_device(c.device)
    check_quantize(c.quantize, c.device)
    c.dtype = "float32" if c.quantize else choose_dtype(c.dtype, c.device)
    template = ""
    if c.init_from == "resume" or is_checkpoint(c.init_from):
        path, state = best(c.out_dir if c.init_from == "resume" else c.init_from)
        model, tokenizer, template = model_of(state, path), tokenizer_of(state, path), template_of(state)
    else:
        model, tokenizer = pretrained(c.init_from)
    if tokenizer is None:
        raise UserError(
            f"{c.init_from} holds no tokenizer: expected tokenizer.json, vocab.json and merges.txt, or vocab.txt"
        )
    model.eval().to(c.device)
    return quantize(model, c.quantize) if c.quantize else model, tokenizer, template


def named_state(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizers' state by parameter name, which survives a change of the parameters' order or grouping."""
    known = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {name: known[p] for name, p in model.named_parameters() if p in known}


def load_optimizers(
    optimizers: list[torch.optim.Optimizer], model: GPT, state: dict[str, Any], where: str | Path
) -> None:
    """Restores the optimizers' state, by name from our files, by position from nanoGPT's; their options stay the run's.

    A position table that a smaller block_size cropped crops its moments. Without a state, as in a file of weights
    alone, the optimizers stay fresh, and that is said.
    """
    if not (state.get("optimizers") or state.get("optimizer")):
        note(f"note: {where} holds no optimizer state; its moments start from zero")
        return
    for optimizer in optimizers:
        _load_optimizer(optimizer, model, state, where)


def _load_optimizer(optimizer: torch.optim.Optimizer, model: GPT, state: dict[str, Any], where: str | Path) -> None:
    own = optimizer.state_dict()
    names = {p: name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if state.get("optimizers"):
        loaded = {i: state["optimizers"][names[p]] for i, p in enumerate(params) if names[p] in state["optimizers"]}
    else:
        loaded = dict(state["optimizer"]["state"])
    if loaded and len(loaded) != len(params):
        raise UserError(f"{where}: its optimizer has {len(loaded)} parameters, this model {len(params)}")

    def fitted(v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        if v.dim() != p.dim():
            return v
        return like(v if v.shape == p.shape else v[: p.shape[0]], p)

    cropped = {i: {k: fitted(v, params[i]) for k, v in entry.items()} for i, entry in loaded.items()}
    optimizer.load_state_dict({"state": cropped, "param_groups": own["param_groups"]})
