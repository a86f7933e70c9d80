"""What comes before the first step, and can go wrong there: settings, machine, data, model and files."""

import uuid
import zlib
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from torch.distributed.device_mesh import init_device_mesh

import checkpoint
import folders
import fsdp
from adapt import Adaptation, attach, grow_vocabulary, memory, summary, train_only
from chat import ChatTokenizer
from configurator import Config, UserError, coerce, note, user_errors
from device import DTYPES, choose_device, choose_dtype, choose_matmul, keep_memory
from generate import prompt_ids
from loader import Mixture, Part, check_vocabulary, fingerprint, open_mixture, parts_of
from model import GPT, GPTConfig, derive_seed
from muon import OPTIMS, build_optimizers
from packing import Examples, Rows
from presets import apply_size
from processes import Processes, join_processes
from progress import Progress, Reporter, what_is_done
from run_dir import RunDir, open_out_dir, take_lock
from schedule import check_schedule, micro_steps_at, overrule, sequences_in, settle
from tokenizer import Tokenizer, load_tokenizer, read_meta

if TYPE_CHECKING:
    from sharded import Saves


@dataclass
class Run:
    """What belongs together while a run lasts. `files` is None in every process but the first."""

    c: Config
    processes: Processes
    model: GPT
    tokenizer: Tokenizer
    optimizers: list[torch.optim.Optimizer]  # AdamW, and Muon with optim='muon'
    scaler: torch.amp.GradScaler
    progress: Progress
    reporter: Reporter
    data: dict[str, str]  # the datasets' fingerprint
    adapter: dict[str, Any]  # of LoRA or adapters: what they are, and the base that a checkpoint does not hold
    template: str = ""  # how the dataset lays out a document, as in its meta.json; the first that says so
    files: RunDir | None = None
    saves: "Saves | None" = None  # with parallel='fsdp', in every process
    started_at: int = 0  # the iteration from which this process goes on
    whole: bool = True  # False while an update changes the weights: what is half done is never saved


def prepare(c: Config, held: ExitStack) -> tuple[Run, Mixture, Mixture]:
    """Everything that can go wrong before the first step: the machine, the settings, the data, the model, the files,
    which are let go of when `held` ends."""
    processes = join_processes(c.backend, c.device, c.peer_timeout)
    c.device = choose_device(c.device, processes.local_rank if processes.world_size > 1 else None)
    c.dtype = choose_dtype(c.dtype, c.device)
    c.matmul = choose_matmul(c.matmul, c.device)
    apply_size(c)
    path, state, lock = to_resume(c, processes, held)
    inherit(c, state.get("config", {}))
    overrule(c)
    check(c, processes.world_size)

    shared_out = is_to_be_shared_out(c, processes)
    straight = shared_out and can_read_shares(c, state)
    if path and path.is_dir() and not straight:
        state |= checkpoint.read_tensors(path, state)
    parts = parts_of(c.dataset)
    tokenizer = common_tokenizer(parts)
    torch.manual_seed(derive_seed(c.seed))
    with torch.device("meta") if straight or shared_out and begins(c, state) else nullcontext():
        model, adapter = build_model(c, path, state, tokenizer)
    train, val = open_mixture(parts, "train", c.block_size), open_mixture(parts, "val", c.block_size)
    metas, vocab_size = [read_meta(part.folder) for part in parts], model.config.vocab_size
    opened = [*zip(train.tokens, metas, strict=True), *zip(val.tokens, metas, strict=True)]
    processes.first(lambda: [check_vocabulary(tokens, meta, vocab_size) for tokens, meta in opened])
    data = fingerprint(parts)
    if state.get("data", data) != data:
        note(f"warning: the dataset {c.dataset} is no longer the one that this run began with")
    epoch_length = sum(train.blocks(c.block_size))
    progress = progress_of(state, c)
    settle(c, epoch_length, progress.iter_num, progress.sequences_seen)
    per_step = c.batch_size * c.gradient_accumulation_steps

    kind = torch.device(c.device).type
    if shared_out:
        if read := place(model, c, processes, path if straight else None):
            state["optimizers"] = read
    else:
        model.to(c.device)
    optimizers = build_optimizers(
        model, c.optim, c.weight_decay, c.learning_rate, (c.beta1, c.beta2), c.adam_eps, c.muon_learning_rate,
        c.muon_momentum, kind, processes.rank, processes.world_size,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(kind, enabled=c.dtype == "float16")
    if state:
        checkpoint.load_optimizers(optimizers, model, state, path)
        if state.get("scaler"):
            scaler.load_state_dict(state["scaler"])
    reporter = Reporter(c, processes, model, progress, scaler.is_enabled())
    r = Run(c, processes, model, tokenizer, optimizers, scaler, progress, reporter, data, adapter)
    r.started_at = progress.iter_num
    r.template = next((meta["template"] for meta in metas if meta.get("template")), "")
    reporter.say(
        f"tokens per iteration will be: {per_step * c.block_size:,}; "
        f"an epoch is {epoch_length / per_step:,.1f} iterations"
    )
    if c.batch_ramp_tokens:
        first = micro_steps_at(0, c) * c.batch_size * c.block_size
        if first < per_step * c.block_size:
            reporter.say(f"the batch grows to that from {first:,} tokens over the first {c.batch_ramp_tokens:,}")
        else:
            reporter.say(
                f"it does not grow: batch_ramp_start={c.batch_ramp_start:,} is no smaller, in whole micro-steps"
            )
    if c.gradient_accumulation_steps % processes.world_size:
        reporter.say(
            f"its {c.gradient_accumulation_steps} micro-steps do not divide evenly by {processes.world_size} "
            f"processes: some wait"
        )
    reporter.say(
        f"number of parameters: {model.get_num_params() / 1e6:.2f}M; {processes.world_size} x {c.device}, {c.dtype}"
        f"{', products of bfloat16' if c.matmul == 'bfloat16' else ''}"
    )
    if c.parallel == "fsdp" and not shared_out:
        reporter.say(
            "parallel=fsdp shares a model out among the processes of torchrun, and this one is alone: it does not"
        )
    for line in memory_of_each(model, c.optim, processes):
        reporter.say(line)
    if adaptation_of(c):
        reporter.say(summary(model, c.optim))
        if c.optim == "muon" and len(optimizers) == 1:
            reporter.say("none of the blocks' own matrices is trained: AdamW trains all there is, and Muon nothing")
    for part, tokens in zip(train.parts, train.tokens, strict=True):
        if isinstance(tokens, Examples):
            reporter.say(told_of_rows(part.name, tokens.rows(c.block_size), c.block_size))
    if state:
        reporter.say(f"resuming from {path} at iteration {r.started_at:,}")
    if c.sample_interval:
        for prompt in c.sample_prompts:
            prompt_ids(tokenizer, prompt)
    if not c.eval_only and not what_is_done(c, progress):
        c.run_id = state.get("config", {}).get("run_id") or uuid.uuid4().hex
        processes.first(lambda: open_files(r, path, lock, held))
        if shared_out:
            from sharded import Saves

            r.saves = Saves(processes, c.out_dir, r.files, c.device)
    return r, train, val


def is_to_be_shared_out(c: Config, processes: Processes) -> bool:
    """Whether each process is to have a part of the model. UserError where that cannot be."""
    shared_out = c.parallel == "fsdp" and processes.control is not None
    if shared_out and c.dtype == "float16":
        raise UserError(
            "dtype=float16 cannot be had with parallel=fsdp: take --parallel=ddp, or --dtype=float32, or, where the "
            "GPU has it, --dtype=bfloat16"
        )
    return shared_out


def begins(c: Config, state: dict[str, Any]) -> bool:
    """Whether the run starts from weights that are drawn."""
    return not state and c.init_from in ("scratch", "auto")


def can_read_shares(c: Config, state: dict[str, Any]) -> bool:
    """Whether each process can read its own rows of the state alone: what a sharded run has saved, as it is."""
    if not state or "model" in state or "adapter" in state:
        return False
    return c.block_size == state["model_args"]["block_size"]


def place(model: GPT, c: Config, processes: Processes, path: Path | None) -> dict[str, dict[str, torch.Tensor]] | None:
    """Shares the model out among the processes, in place, on their devices: as it is, or drawn, or as the checkpoint
    folder `path` has it, whose optimizers' state comes back."""
    keep_memory(False)  # blocks come and go, and to need little of it is what a model is shared out for
    mesh = init_device_mesh(torch.device(c.device).type, (processes.world_size,))
    empty = fsdp.on_meta(model)
    fsdp.share_out(model, mesh, DTYPES[c.dtype])
    if not empty:
        model.to(c.device)
        return None
    fsdp.settle_on(model, c.device)
    if not path:
        fsdp.draw(model, derive_seed(c.seed))
        return None
    from sharded import read_shares

    return read_shares(path, fsdp.saved_parameters(model), processes.control)


def memory_of_each(model: GPT, optim: str, processes: Processes) -> list[str]:
    """A line on the memory of each process, those that are alike together."""
    sizes = list(memory(model, optim).values())
    everyones = torch.zeros(processes.world_size, len(sizes), dtype=torch.int64)
    everyones[processes.rank] = torch.tensor(sizes)
    told = "parameters {:,.2f} MB, gradients {:,.2f} MB, optimizer {:,.2f} MB".format
    alike: dict[str, list[str]] = {}
    for rank, of_one in enumerate(processes.sum(everyones).tolist()):
        alike.setdefault(told(*(size / 1e6 for size in of_one)), []).append(str(rank))
    if processes.world_size == 1:
        return [f"memory: {figures}" for figures in alike]
    return [f"memory of process{'es' * (len(who) > 1)} {', '.join(who)}: {figures}" for figures, who in alike.items()]


def progress_of(state: dict[str, Any], c: Config) -> Progress:
    """What a checkpoint says that its run has done; nothing where there is none."""
    if not state:
        return Progress()
    as_it_was = Config(**vars(c) | {key: value for key, value in state["config"].items() if key in vars(c)})
    seen = sequences_in(state["iter_num"], as_it_was)  # nanoGPT's files do not count them
    progress = Progress(state["iter_num"], state.get("sequences_seen", seen), state["best_val_loss"])
    progress.evaluated_at = progress.iter_num  # as ckpt.pt was, which alone has no progress of its own
    for key, value in state.get("progress", {}).items():
        setattr(progress, key, value)
    return progress


def to_resume(
    c: Config, processes: Processes, held: ExitStack
) -> tuple[Path | None, dict[str, Any], filelock.BaseFileLock | None]:
    """The checkpoint that the first process chooses to go on from, loaded by each, and the lock of its folder, which is
    taken before it is read; no checkpoint where a run begins."""
    if c.init_from not in ("resume", "auto"):
        return None, {}, None
    lock, found = None, (None, {})

    def choose() -> str:
        nonlocal lock, found
        if Path(c.out_dir).is_dir() and not c.eval_only:
            lock = take_lock(Path(c.out_dir))
            held.callback(lock.release)
        if c.init_from == "resume" or checkpoint.has_run(c.out_dir):
            found = checkpoint.newest(c.out_dir, tensors=False)
        return str(found[0] or "")

    path = processes.agreed(choose)
    if path and not processes.master and Path(path).exists():
        found = Path(path), folders.read_state(Path(path)) if Path(path).is_dir() else checkpoint.load(path)
    if path and processes.world_size > 1 and not processes.alike(signature(found[1])):
        raise UserError(
            f"not all processes find the same {path}: their machines need the same out_dir, on a shared disk"
        )
    return *found, lock


def signature(state: dict[str, Any]) -> int:
    """A number that differs for the states of different iterations and runs, and for none at all."""
    weights = state.get("model", {})
    found = zlib.crc32(str(state.get("config", {}).get("run_id")).encode())  # a head that is frozen tells no runs apart
    found = zlib.crc32(repr(state.get("checksums")).encode(), found)
    for tensor in weights.values() if "adapter" in state else [weights.get("lm_head.weight", torch.empty(0))]:
        found = zlib.crc32(tensor.float().numpy().tobytes(), found)
    return state.get("iter_num", -1) * 2**32 + found


def open_files(r: Run, resumed_from: Path | None, lock: filelock.BaseFileLock | None, held: ExitStack) -> None:
    """Where the first process writes to; last of all, so that a mistake has left an earlier run's files alone."""
    c = r.c
    r.reporter.wandb = start_wandb(c) if c.wandb_log else None
    fresh = not resumed_from and c.init_from != "auto"
    if not lock:
        lock = take_lock(open_out_dir(c.out_dir))
        held.callback(lock.release)
    if c.init_from == "auto" and not resumed_from and checkpoint.has_run(c.out_dir):
        raise UserError(f"another run has just begun in out_dir={c.out_dir}: start again to go on with it")
    r.files = RunDir(c.out_dir, resumed_from, r.started_at, r.progress.best_val_loss, fresh, c.run_id, lock)
    r.files.numbered_kept = c.keep_checkpoints
    r.reporter.log = r.files.log
    held.callback(r.files.let_go)


def inherit(c: Config, saved: dict[str, Any]) -> None:
    """On resuming, what the user did not set comes from the checkpoint, but for what belongs to this machine."""
    of_this_machine = (
        "device",
        "dtype",
        "matmul",
        "compile",
        "backend",
        "peer_timeout",
        "out_dir",
        "init_from",
        "eval_only",
    )
    if saved and "optim" in c.given and c.optim != (own := saved.get("optim", "adamw")):
        raise UserError(
            f"optim={c.optim} is set, but the run in {c.out_dir} has {own}: a resumed run keeps its optimizer"
        )
    for field in fields(Adaptation) if saved else ():
        own, asked = saved.get(field.name, field.default), getattr(c, field.name)
        if field.name in c.given and own != asked:
            raise UserError(
                f"{field.name}={asked} is set, but the run in {c.out_dir} has {own!r}: a resumed run goes on training "
                f"what it has trained; a new one starts from its weights with --init_from={c.out_dir} and an out_dir "
                f"of its own"
            )
    for key, value in saved.items():
        if key in vars(c) and key not in c.given and key not in of_this_machine:
            setattr(c, key, coerce(value, getattr(c, key), f"{key} in the checkpoint's config"))


def check(c: Config, world_size: int) -> None:
    """UserError for settings that make no sense."""
    if not c.out_dir:
        raise UserError("out_dir is empty: expected a folder")
    for key in ("batch_size", "block_size", "gradient_accumulation_steps",
                "eval_iters", "log_interval", "peer_timeout"):  # fmt: skip
        if getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 1")
    for key in ("sample_interval", "sample_tokens", "learning_rate", "min_lr", "weight_decay", "grad_clip", "patience",
                "save_interval", "eval_interval", "keep_checkpoints", "checkpoint_interval", "target_val_loss",
                "muon_learning_rate", "muon_momentum_warmup"):  # fmt: skip
        if getattr(c, key) < 0:
            raise UserError(f"{key}={getattr(c, key)}: expected 0 or more")
    for key in ("beta1", "beta2", "muon_momentum"):
        if not 0 <= getattr(c, key) < 1:
            raise UserError(f"{key}={getattr(c, key)}: expected at least 0 and below 1")
    if c.adam_eps <= 0:
        raise UserError(f"adam_eps={c.adam_eps}: expected more than 0")
    check_schedule(c)
    if c.parallel not in ("ddp", "fsdp"):
        raise UserError(f"parallel={c.parallel}: expected ddp or fsdp")
    if c.optim not in OPTIMS:
        raise UserError(f"optim={c.optim}: expected {' or '.join(OPTIMS)}")
    if c.optim == "muon" and not c.learning_rate:
        raise UserError("learning_rate=0.0: expected more than 0 with optim=muon, whose rate follows it")
    adaptation_of(c)
    if (unused := [key for key in c.given if key.startswith("lora_")]) and not c.lora_rank:
        raise UserError(f"{unused[0]} is set, but not lora_rank, so nothing would be LoRA: add --lora_rank=8")
    if c.gradient_accumulation_steps % world_size and not c.batch_tokens:
        raise UserError(
            f"gradient_accumulation_steps={c.gradient_accumulation_steps} counts the micro-steps of all {world_size} "
            f"processes together, so it must be divisible by {world_size}, such as "
            f"--gradient_accumulation_steps={c.gradient_accumulation_steps * world_size}"
        )


def adaptation_of(c: Config) -> Adaptation:
    """What the settings train of the model."""
    with user_errors(ValueError):
        return Adaptation(**{field.name: getattr(c, field.name) for field in fields(Adaptation)})


def told_of_rows(name: str, rows: Rows, block_size: int) -> str:
    """What becomes of a dataset's examples."""
    places = len(rows) * block_size
    gone = f"; {rows.cut:,} are longer and end there" if rows.cut else ""
    gone += f"; {rows.left_out:,} left out, with nothing to learn in their first {block_size}" if rows.left_out else ""
    return (
        f"{name}: {len(rows.begins):,} examples in {len(rows):,} rows of {block_size} "
        f"({rows.lengths.sum() / places:.0%} full, {rows.learnt.sum() / places:.0%} to learn){gone}"
    )


def common_tokenizer(parts: tuple[Part, ...]) -> Tokenizer:
    """The tokenizer of all the datasets; UserError where one has another than the first."""
    first, tokenizer = parts[0], load_tokenizer(parts[0].folder)
    for part in parts[1:]:
        if load_tokenizer(part.folder) != tokenizer:
            kept, again = first, part
            if isinstance(load_tokenizer(part.folder), ChatTokenizer) and not isinstance(tokenizer, ChatTokenizer):
                kept, again = part, first  # a text can be written in a chat's vocabulary, but not the other way round
            raise UserError(
                f"the datasets {first.name} and {part.name} have different tokenizers and cannot be mixed: prepare "
                f"{again.name} again, with --tokenizer={kept.folder}"
            )
    return tokenizer


def build_model(
    c: Config, path: Path | None, state: dict[str, Any], tokenizer: Tokenizer
) -> tuple[GPT, dict[str, Any]]:
    """The model to train, on the CPU, its context cropped to block_size; c's architecture is made to say what it is.
    And what a checkpoint of an adapter holds besides its weights, `adapter` and `base`; nothing for other models."""
    adaptation = adaptation_of(c)
    architecture = [f.name for f in fields(GPTConfig) if f.name not in ("block_size", "vocab_size", "dropout")]
    if not state and c.init_from in ("scratch", "auto"):
        if adaptation:
            raise UserError(
                f"init_from={c.init_from} begins a model of which everything is to be trained: lora_rank, adapter_dim "
                f"and freeze need a trained one, such as --init_from=out-demo or --init_from=gpt2"
            )
        kind, vocab_size = getattr(tokenizer, "base", tokenizer).kind, tokenizer.vocab_size
        vocab_size = max(50304, vocab_size) if kind == "gpt2" else vocab_size  # GPT-2's 50257, padded to be faster
        keys = (*architecture, "block_size", "dropout")
        with user_errors(ValueError):
            return GPT(GPTConfig(vocab_size=vocab_size, **{key: getattr(c, key) for key in keys})), {}
    known = None  # how many tokens the base knows, where the dataset has more
    if state:
        model = checkpoint.model_of(state, path, c.dropout, merged=False)
        theirs = checkpoint.tokenizer_of(state, path) if "tokenizer" in state else None
    else:
        model, theirs = checkpoint.pretrained(c.init_from, c.dropout)
    adapter = {key: state[key] for key in ("adapter", "base") if key in state}
    if not state and not c.eval_only:
        adapter = checkpoint.adapter_on(c.init_from, model, adaptation, c.out_dir)
    source = path or c.init_from
    if isinstance(tokenizer, ChatTokenizer) and theirs == tokenizer.base and not state:
        grow_vocabulary(model, max(tokenizer.vocab_size, model.config.vocab_size), c.seed)
        known, theirs = theirs.vocab_size, tokenizer
    if theirs not in (None, tokenizer) or not checkpoint.fits(tokenizer, model.config.vocab_size):
        again = "gpt2" if theirs and theirs.kind == "gpt2" else source
        raise UserError(
            f"the dataset {c.dataset} has another tokenizer than {source}: prepare it with --tokenizer={again}"
        )
    for key in architecture:
        own, asked = getattr(model.config, key), getattr(c, key)
        if key in c.given and own != asked:
            if state:
                raise UserError(f"{key}={asked} is set, but {source} has {own}: a resumed run keeps its architecture")
            note(f"note: {key}={own} comes from {source}, not {asked}")
        setattr(c, key, own)
    if c.block_size > model.config.block_size:
        if "block_size" in c.given and state:
            raise UserError(
                f"block_size={c.block_size} is set, but {source} has a context of {model.config.block_size}"
            )
        if "block_size" in c.given:
            note(f"note: block_size={model.config.block_size} comes from {source}, not {c.block_size}")
        c.block_size = model.config.block_size
    if c.block_size < model.config.block_size:
        with user_errors(ValueError):
            model.crop_block_size(c.block_size)
    with user_errors(ValueError):
        if adaptation.adds and not state:
            attach(model, adaptation, c.seed, known)
        train_only(model, adaptation)
    if adaptation.freeze == "all_but_head" and model.config.tied:
        note("note: this model's head is its token embedding too, which is trained with it")
    if known and not (adaptation.adds or model.transformer.wte.weight.requires_grad):
        note(f"note: freeze={c.freeze} leaves the embeddings of the dataset's new tokens as they were drawn")
    return model, adapter


def start_wandb(c: Config) -> Any:
    """A wandb run; its settings come from its own environment variables, such as WANDB_MODE=offline."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs a package: pip install wandb; or pass --wandb_log=False") from None
    with user_errors(wandb.Error, about="wandb could not start (WANDB_MODE=offline needs no account)"):
        return wandb.init(project=c.wandb_project, name=c.wandb_run_name, config=dict(vars(c)))
